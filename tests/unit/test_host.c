/* The host arena and what it is made of: machine memory, memory files, first touch. */
#include "proto/errors.h"
#include "tests/support/cunit_run.h"
#include "tiers/host/host.h"
#include "tiers/host/machine.h"
#include "tiers/host/memfd.h"
#include "tiers/host/touch.h"

#include <CUnit/Basic.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB (UINT64_C(1) << 20)

static struct kvt_host *host;
static int notify_fd;
static bool huge_pages;
static char text[KVT_TEXT_BYTES];

/* What a device would do, and what it was told. */
enum { SLOTS = 256 };
static struct {
    pthread_mutex_t lock;
    bool there[SLOTS];      /* a MiB each */
    uint32_t calls;         /* that brought something */
    uint32_t inside;        /* just now */
    uint32_t wait_for;      /* so many are inside at one time, before any of them goes on */
    uint64_t refuse_offset; /* of the part that is refused; UINT64_MAX: none */
} parts = {.lock = PTHREAD_MUTEX_INITIALIZER, .refuse_offset = UINT64_MAX};

static bool parts_turn(uint64_t offset, uint64_t bytes, bool there) {
    bool ok = true;
    for (uint64_t i = offset / MIB; i < (offset + bytes + MIB - 1) / MIB; i++) {
        ok = ok && (bytes < MIB || parts.there[i] != there);
        parts.there[i] = there;
    }
    return ok;
}

static int part_added(void *context, uint64_t offset, uint64_t bytes, char *why) {
    (void)context;
    pthread_mutex_lock(&parts.lock);
    parts.calls++;
    parts.inside++;
    for (int i = 0; i < 5000 && parts.inside < parts.wait_for; i++) {
        pthread_mutex_unlock(&parts.lock);
        poll(NULL, 0, 1);
        pthread_mutex_lock(&parts.lock);
    }
    bool enough = parts.inside >= parts.wait_for;
    parts.wait_for = enough ? 0 : parts.wait_for;
    parts.inside -= enough;
    bool ok = enough && offset != parts.refuse_offset && parts_turn(offset, bytes, true);
    pthread_mutex_unlock(&parts.lock);
    snprintf(why, KVT_TEXT_BYTES, "the device refuses");
    return ok ? 0 : -KVT_ENOTSUP;
}

static int part_removed(void *context, uint64_t offset, uint64_t bytes, char *why) {
    (void)context;
    pthread_mutex_lock(&parts.lock);
    bool ok = parts_turn(offset, bytes, false);
    pthread_mutex_unlock(&parts.lock);
    snprintf(why, KVT_TEXT_BYTES, "the device does not have it");
    return ok ? 0 : -KVT_EINVAL;
}

static uint32_t parts_there(void) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < SLOTS; i++) {
        count += parts.there[i];
    }
    return count;
}

static void start(uint64_t budget_bytes, uint32_t threads) {
    notify_fd = eventfd(0, EFD_CLOEXEC);
    struct kvt_host_config c = {
        .budget_bytes = budget_bytes, .threads = threads, .notify_fd = notify_fd};
    c.huge_pages = huge_pages;
    c.added = part_added;
    c.removed = part_removed;
    CU_ASSERT_EQUAL_FATAL(kvt_host_start(&c, &host, text), 0);
}

static void stop(void) {
    kvt_host_free(host);
    host = NULL;
    memset(parts.there, 0, sizeof(parts.there));
    close(notify_fd);
}

static struct kvt_host_event next_event(void) {
    struct kvt_host_event e = {0};
    while (!kvt_host_event(host, &e)) {
        uint64_t count;
        CU_ASSERT_EQUAL_FATAL(read(notify_fd, &count, sizeof(count)), sizeof(count));
    }
    return e;
}

/* Bytes of [offset, offset + bytes) of the arena that have memory. */
static uint64_t present_bytes(uint64_t offset, uint64_t bytes) {
    static unsigned char pages[256 * MIB / 4096];
    uint64_t present = 0;
    uint8_t *base = kvt_host_base(host);
    CU_ASSERT_EQUAL_FATAL(mincore(base + offset, bytes, pages), 0);
    for (uint64_t i = 0; i < bytes / 4096; i++) {
        present += (pages[i] & 1) * UINT64_C(4096);
    }
    return present;
}

static void test_grows_and_shrinks(void) {
    start(64 * MIB, 4);
    uint8_t *base = kvt_host_base(host);
    CU_ASSERT_EQUAL((uintptr_t)base % (2 * MIB), 0);
    CU_ASSERT_EQUAL(present_bytes(0, 64 * MIB), 0);

    CU_ASSERT_EQUAL(kvt_host_grow(host, 8 * MIB, 33 * MIB), 0); /* in several parts */
    struct kvt_host_event e = next_event();
    CU_ASSERT_TRUE(e.grown);
    CU_ASSERT_EQUAL(e.code, 0);
    CU_ASSERT_EQUAL(e.offset, 8 * MIB);
    CU_ASSERT_EQUAL(e.bytes, 33 * MIB);
    CU_ASSERT_EQUAL(present_bytes(8 * MIB, 33 * MIB), 33 * MIB);
    CU_ASSERT_EQUAL(present_bytes(0, 64 * MIB), 33 * MIB);

    memset(base + 8 * MIB, 0xa5, 33 * MIB);
    CU_ASSERT_EQUAL(kvt_host_shrink(host, 9 * MIB, 4096), 0);
    CU_ASSERT_EQUAL(kvt_host_shrink(host, 10 * MIB, 30 * MIB), 0);
    e = next_event();
    CU_ASSERT_FALSE(e.grown);
    CU_ASSERT_EQUAL(e.bytes, 4096);
    e = next_event();
    CU_ASSERT_EQUAL(e.offset, 10 * MIB);
    CU_ASSERT_EQUAL(e.code, 0);
    CU_ASSERT_EQUAL(present_bytes(0, 64 * MIB), 3 * MIB - 4096);

    CU_ASSERT_EQUAL(kvt_host_grow(host, 9 * MIB, 4096), 0);
    e = next_event();
    CU_ASSERT_EQUAL(e.code, 0);
    CU_ASSERT_EQUAL(base[9 * MIB], 0); /* came back zeroed */
    CU_ASSERT_EQUAL(base[9 * MIB - 1], 0xa5);
    CU_ASSERT_EQUAL(base[9 * MIB + 4096], 0xa5);
    stop();
}

/* A range of 160 MiB has three parts. Each is touched and made known by a thread of its own. */
static void test_parts_come_up_beside_each_other(void) {
    start(192 * MIB, 3);
    parts.calls = 0;
    parts.wait_for = 3;
    CU_ASSERT_EQUAL(kvt_host_grow(host, 32 * MIB, 160 * MIB), 0);
    struct kvt_host_event e = next_event();
    CU_ASSERT_EQUAL(e.code, 0);
    CU_ASSERT_EQUAL(e.offset, 32 * MIB);
    CU_ASSERT_EQUAL(e.bytes, 160 * MIB);
    CU_ASSERT_EQUAL(parts.calls, 3);
    CU_ASSERT_EQUAL(parts_there(), 160);
    CU_ASSERT_EQUAL(present_bytes(0, 192 * MIB), 160 * MIB);
    CU_ASSERT_EQUAL(kvt_host_shrink(host, 32 * MIB, 160 * MIB), 0);
    CU_ASSERT_EQUAL(next_event().code, 0);
    CU_ASSERT_EQUAL(parts_there(), 0);
    CU_ASSERT_EQUAL(present_bytes(0, 192 * MIB), 0);

    parts.calls = 0;
    parts.wait_for = 3; /* three ranges do the same */
    for (uint64_t i = 0; i < 3; i++) {
        CU_ASSERT_EQUAL(kvt_host_grow(host, i * 64 * MIB, MIB), 0);
    }
    for (int i = 0; i < 3; i++) {
        CU_ASSERT_EQUAL(next_event().code, 0);
    }
    CU_ASSERT_EQUAL(parts_there(), 3);
    stop();
}

/* The first part, one in the middle, the last: nothing of the range stays. */
static void test_a_refused_part_takes_the_range_with_it(void) {
    for (uint32_t threads = 1; threads <= 3; threads++) {
        start(192 * MIB, threads);
        for (uint64_t refused = 0; refused < 3; refused++) {
            parts.refuse_offset = refused * KVT_HOST_PART_BYTES;
            CU_ASSERT_EQUAL(kvt_host_grow(host, 0, 160 * MIB), 0);
            struct kvt_host_event e = next_event();
            CU_ASSERT_TRUE(e.grown);
            CU_ASSERT_EQUAL(e.code, -KVT_ENOTSUP);
            CU_ASSERT_STRING_EQUAL(e.text, "the device refuses");
            CU_ASSERT_EQUAL(parts_there(), 0);
            CU_ASSERT_EQUAL(present_bytes(0, 192 * MIB), 0);
        }
        parts.refuse_offset = UINT64_MAX;
        CU_ASSERT_EQUAL(kvt_host_grow(host, 0, 160 * MIB), 0);
        CU_ASSERT_EQUAL(next_event().code, 0);
        stop();
    }
}

/* Eight threads, and a loop that takes events only when it must: nobody waits for ever. */
static void test_several_wait_for_room(void) {
    start(192 * MIB, 8);
    for (int round = 0; round < 2000; round++) {
        uint64_t offset = (uint64_t)(round % 128) * MIB;
        while (kvt_host_grow(host, offset, 4096) != 0) {
            CU_ASSERT_EQUAL(next_event().code, 0);
        }
    }
    struct kvt_host_event e;
    int taken = 0;
    for (int i = 0; i < 200 && taken < 64; i++) { /* the rest is on its way */
        taken += kvt_host_event(host, &e);
        poll(NULL, 0, 1);
    }
    CU_ASSERT_EQUAL(taken, 64);
    stop();
}

static void test_many_requests_wait_for_a_slow_loop(void) {
    start(4 * MIB, 1);
    unsigned accepted = 0;
    int rc = 0;
    /* More than the events' queue holds, and then until the commands' queue is full as well. */
    for (unsigned i = 0; rc == 0 && i < 100000; i++) {
        rc = i % 2 == 0 ? kvt_host_grow(host, 0, 4096) : kvt_host_shrink(host, 0, 4096);
        accepted += rc == 0;
    }
    CU_ASSERT_EQUAL(rc, -KVT_EBUSY);
    for (unsigned i = 0; i < accepted; i++) {
        struct kvt_host_event e = next_event();
        CU_ASSERT_EQUAL(e.grown, i % 2 == 0);
    }
    struct kvt_host_event e;
    CU_ASSERT_FALSE(kvt_host_event(host, &e));
    CU_ASSERT_EQUAL(kvt_host_grow(host, 0, 4096), 0);
    CU_ASSERT_TRUE(next_event().grown);
    stop();
}

static void test_stops_with_everything_waiting(void) {
    start(4 * MIB, 1);
    while (kvt_host_grow(host, 0, 4096) == 0) {}
    stop();
    kvt_host_free(NULL);
}

static void test_refuses_more_than_the_machine_has(void) {
    struct kvt_machine_memory m;
    struct kvt_host_config c = {.threads = 1, .notify_fd = -1};
    kvt_machine_memory("", &m);
    uint64_t most = m.limit_bytes < m.total_bytes ? m.limit_bytes : m.total_bytes;
    c.budget_bytes = most + MIB;
    char asked[KVT_SIZE_TEXT_BYTES];
    char have[KVT_SIZE_TEXT_BYTES];
    CU_ASSERT_EQUAL(kvt_host_start(&c, &host, text), -KVT_ECONFIG);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "host: "));
    CU_ASSERT_PTR_NOT_NULL(strstr(text, kvt_size_text(c.budget_bytes, asked)));
    CU_ASSERT_PTR_NOT_NULL(strstr(text, kvt_size_text(most, have)));
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "lower"));
    c.budget_bytes = UINT64_MAX / 2;
    CU_ASSERT_EQUAL(kvt_host_start(&c, &host, text), -KVT_ECONFIG);
    CU_ASSERT_PTR_NULL(host);
}

/* Whether `check` holds in a child of ours, since limits stay. */
static bool holds_in_a_child(bool (*check)(void)) {
    pid_t pid = fork();
    CU_ASSERT_TRUE_FATAL(pid >= 0);
    if (pid == 0) {
        _exit(check() ? 0 : 1);
    }
    int status = -1;
    CU_ASSERT_EQUAL(waitpid(pid, &status, 0), pid);
    return status == 0;
}

static const char *refused_budget(uint64_t bytes, int code) {
    struct kvt_host_config c = {.budget_bytes = bytes, .threads = 1, .notify_fd = -1};
    text[0] = '\0';
    return kvt_host_start(&c, &host, text) == code ? text : "";
}

static bool a_limit_is_named(void) {
    struct rlimit limit = {.rlim_cur = 16 * MIB, .rlim_max = 16 * MIB};
    if (setrlimit(RLIMIT_DATA, &limit) != 0) {
        return false;
    }
    const char *why = refused_budget(32 * MIB, -KVT_ECONFIG);
    return strstr(why, "32 MiB") && strstr(why, "16 MiB") && strstr(why, "RLIMIT_DATA");
}

static bool a_files_limit_is_none_of_ours(void) {
    struct rlimit limit = {.rlim_cur = 4096, .rlim_max = 4096};
    struct kvt_host_config c = {.budget_bytes = 32 * MIB, .threads = 1, .notify_fd = -1};
    return setrlimit(RLIMIT_FSIZE, &limit) == 0 && kvt_host_start(&c, &host, text) == 0;
}

/* The limit would suffice for the budget alone. So a kernel refuses that does not overcommit. */
static bool what_the_kernel_refuses_is_named(void) {
    struct rlimit limit = {.rlim_cur = 64 * MIB, .rlim_max = 64 * MIB};
    if (setrlimit(RLIMIT_DATA, &limit) != 0) {
        return false;
    }
    const char *why = refused_budget(64 * MIB, -KVT_ENOMEM);
    return strstr(why, "64 MiB") && strstr(why, "[host] budget") && strstr(why, "overcommit");
}

static void test_refuses_more_than_a_limit(void) {
    CU_ASSERT_TRUE(holds_in_a_child(a_files_limit_is_none_of_ours));
#if !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__) /* they map memory of their own */
    CU_ASSERT_TRUE(holds_in_a_child(a_limit_is_named));
    CU_ASSERT_TRUE(holds_in_a_child(what_the_kernel_refuses_is_named));
#else
    (void)a_limit_is_named;
    (void)what_the_kernel_refuses_is_named;
#endif
}

/* Nobody's process, as one that is not root: it has no CAP_IPC_LOCK. */
static bool locked_memory_is_allowed(void) {
    struct rlimit limit = {.rlim_cur = MIB, .rlim_max = 8 * MIB};
    if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0 || (geteuid() == 0 && setuid(65534) != 0)) {
        return false;
    }
    bool raised = kvt_machine_allow_locked("host", 4 * MIB, text) == 0 &&
                  getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur == 8 * MIB;
    return raised && kvt_machine_allow_locked("host", 16 * MIB, text) == -KVT_ENOMEM &&
           strstr(text, "16 MiB") && strstr(text, "8 MiB") && strstr(text, "LimitMEMLOCK");
}

static void test_locked_memory(void) {
    CU_ASSERT_TRUE(holds_in_a_child(locked_memory_is_allowed));
}

/* ---- the arena in this process ----------------------------------------------------------------- */

/* A line of the arena's mapping in /proc/self/smaps that begins with `key`; "": none. */
static const char *mapping_line(const char *key) {
    static char line[512];
    unsigned long begin = 0;
    unsigned long end = 0;
    bool inside = false;
    FILE *f = fopen("/proc/self/smaps", "r");
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    while (fgets(line, sizeof(line), f)) {
        if (sscanf(line, "%lx-%lx ", &begin, &end) == 2) {
            inside = begin == (uintptr_t)kvt_host_base(host);
        } else if (inside && strncmp(line, key, strlen(key)) == 0) {
            fclose(f);
            return line;
        }
    }
    fclose(f);
    return "";
}

/* The kernel says no to huge pages on some machines: "never" between brackets, or no such file. */
static bool machine_has_huge_pages(void) {
    char line[128] = "";
    FILE *f = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
    bool has = f && fgets(line, sizeof(line), f) && !strstr(line, "[never]");
    if (f) {
        fclose(f);
    }
    return has;
}

static void test_huge_pages(void) {
    for (int huge = 0; huge < 2; huge++) {
        huge_pages = huge;
        start(16 * MIB, 1);
        CU_ASSERT_EQUAL(kvt_host_grow(host, 2 * MIB, 2 * MIB), 0);
        struct kvt_host_event e = next_event();
        CU_ASSERT_EQUAL(e.code, 0);
        CU_ASSERT_EQUAL(present_bytes(0, 16 * MIB), 2 * MIB); /* and nothing else */
        CU_ASSERT_PTR_NOT_NULL(strstr(mapping_line("VmFlags:"), huge ? " hg" : " nh"));
        if (machine_has_huge_pages()) {
            long kib = -1;
            CU_ASSERT_EQUAL(sscanf(mapping_line("AnonHugePages:"), "AnonHugePages: %ld", &kib), 1);
            CU_ASSERT_EQUAL(kib, huge ? 2048 : 0);
            CU_ASSERT_EQUAL(e.huge_bytes, huge ? 2 * MIB : 0);
        }
        if (!huge) { /* ranges that a huge page would cross */
            CU_ASSERT_EQUAL(kvt_host_grow(host, 4096, 4096), 0);
            CU_ASSERT_EQUAL(next_event().code, 0);
            CU_ASSERT_EQUAL(present_bytes(0, 16 * MIB), 2 * MIB + 4096);
        }
        stop();
    }
    huge_pages = false;
}

/* Copying pinned pages into a child would cost as much memory again, and core files are no place for
 * other people's text. */
static void test_is_neither_forked_nor_dumped(void) {
    start(4 * MIB, 1);
    CU_ASSERT_PTR_NOT_NULL(strstr(mapping_line("VmFlags:"), " dc")); /* not copied on fork */
    CU_ASSERT_PTR_NOT_NULL(strstr(mapping_line("VmFlags:"), " dd")); /* not dumped */
    stop();
}

static void test_memory_files_are_sealed_and_private(void) {
    int fd = kvt_memfd_create("test", "kvtier-test", 3 * MIB, text);
    CU_ASSERT_TRUE_FATAL(fd >= 0);
    struct stat st;
    CU_ASSERT_EQUAL(fstat(fd, &st), 0);
    CU_ASSERT_EQUAL(st.st_mode & 0777, 0600);
    CU_ASSERT_EQUAL(st.st_size, (off_t)(3 * MIB));
    CU_ASSERT_TRUE(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    CU_ASSERT_EQUAL(ftruncate(fd, 0), -1);
    CU_ASSERT_EQUAL(errno, EPERM);
    CU_ASSERT_EQUAL(ftruncate(fd, (off_t)(4 * MIB)), -1);
    CU_ASSERT_EQUAL(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
    /* Sizes that the kernel would not align by itself. */
    for (uint64_t bytes = 2 * MIB + 4096; bytes <= 2 * MIB + 16 * 4096; bytes += 4096) {
        void *p = kvt_memfd_map(fd, bytes);
        CU_ASSERT_PTR_NOT_NULL_FATAL(p);
        CU_ASSERT_EQUAL((uintptr_t)p % (2 * MIB), 0);
        munmap(p, bytes);
    }
    close(fd);
}

/* What a lack of memory looks like to madvise can be had without one: pages behind the file. */
static void test_touch_answers_when_there_is_no_memory(void) {
    int fd = memfd_create("test", MFD_CLOEXEC);
    CU_ASSERT_EQUAL_FATAL(ftruncate(fd, (off_t)(16 * MIB)), 0);
    uint8_t *base = mmap(NULL, 64 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CU_ASSERT_TRUE_FATAL(base != MAP_FAILED);
    text[0] = '\0';
    CU_ASSERT_EQUAL(kvt_touch("host", base, 16 * MIB, 2, text), 0);
    CU_ASSERT_EQUAL(kvt_touch("host", base, 64 * MIB, 4, text), -KVT_ENOMEM);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "host: 64 MiB"));
    munmap(base, 64 * MIB);
    close(fd);
}

/* ---- the machine's memory, from a tree of files that is ours ----------------------------------- */

static char root[256];

static void put(const char *path, const char *content) {
    char full[512];
    snprintf(full, sizeof(full), "%s%s", root, path);
    for (char *slash = strchr(full + strlen(root) + 1, '/'); slash;
         slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        (void)mkdir(full, 0700);
        *slash = '/';
    }
    FILE *f = fopen(full, "w");
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    fputs(content, f);
    fclose(f);
}

static struct kvt_machine_memory look(void) {
    struct kvt_machine_memory m;
    kvt_machine_memory(root, &m);
    return m;
}

static void test_machine_memory(void) {
    const char *folder = getenv("KVT_TEST_DIR");
    snprintf(root, sizeof(root), "%s/machine.XXXXXX", folder ? folder : "/tmp");
    CU_ASSERT_PTR_NOT_NULL_FATAL(mkdtemp(root));
    struct kvt_machine_memory m = look(); /* nothing there */
    CU_ASSERT_EQUAL(m.total_bytes, KVT_MACHINE_NO_LIMIT);
    CU_ASSERT_EQUAL(m.limit_bytes, KVT_MACHINE_NO_LIMIT);

    put("/proc/meminfo", "MemTotal:  1024 kB\nMemFree: 1 kB\nMemAvailable:  512 kB\n");
    m = look();
    CU_ASSERT_EQUAL(m.total_bytes, MIB);
    CU_ASSERT_EQUAL(m.available_bytes, MIB / 2);
    CU_ASSERT_EQUAL(m.limit_bytes, KVT_MACHINE_NO_LIMIT);

    put("/proc/self/cgroup", "0::/a/b\n");
    put("/sys/fs/cgroup/a/b/memory.max", "max\n");
    put("/sys/fs/cgroup/a/memory.max", "400000\n"); /* the parent's holds too */
    put("/sys/fs/cgroup/a/memory.current", "300000\n");
    put("/sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 40000\nactive_file 10000\n");
    m = look();
    CU_ASSERT_EQUAL(m.limit_bytes, 400000);
    CU_ASSERT_EQUAL(m.available_bytes, 150000);
    put("/sys/fs/cgroup/a/memory.current", "500000\n"); /* above it */
    put("/sys/fs/cgroup/a/memory.stat", "");
    CU_ASSERT_EQUAL(look().available_bytes, 0);

    put("/proc/self/cgroup", "3:cpu,cpuacct:/x\n9:memory:/not/mounted/here\n0::/\n");
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "200000\n");
    put("/sys/fs/cgroup/memory/memory.usage_in_bytes", "1000\n");
    m = look();
    CU_ASSERT_EQUAL(m.limit_bytes, 200000);
    CU_ASSERT_EQUAL(m.available_bytes, 199000);
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    CU_ASSERT_EQUAL(look().limit_bytes, KVT_MACHINE_NO_LIMIT);
}

static void test_nodes_near(void) {
    const char *folder = getenv("KVT_TEST_DIR");
    snprintf(root, sizeof(root), "%s/nodes.XXXXXX", folder ? folder : "/tmp");
    CU_ASSERT_PTR_NOT_NULL_FATAL(mkdtemp(root));
    CU_ASSERT_EQUAL(kvt_machine_nodes_near(root, 1), 0); /* no such file */
    static const struct {
        const char *with_memory;
        uint64_t near;
        uint64_t preferred;
    } cases[] = {
        {"0\n", 1, 0},             /* one node: no matter */
        {"0-1\n", 2, 2},           /* the device's */
        {"0-1\n", 3, 0},           /* devices on both */
        {"0-1\n", 0, 0},           /* nobody knows */
        {"0,2-3,5\n", 0x6e, 0x2c}, /* 1 and 6 have none */
        {"0-1\n", 4, 0},           /* a node without memory */
        {"0-127\n", 2, 2},
        {"\n", 1, 0},
        {"nonsense", 1, 0},
    };
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        put("/sys/devices/system/node/has_memory", cases[i].with_memory);
        CU_ASSERT_EQUAL(kvt_machine_nodes_near(root, cases[i].near), cases[i].preferred);
    }
}

/* Node 0 is everywhere where the kernel knows of nodes. */
static void test_memory_is_preferred_on_a_node(void) {
    start(4 * MIB, 1);
    int rc = kvt_host_prefer(host, 1, text);
    if (access("/proc/self/numa_maps", R_OK) == 0) {
        CU_ASSERT_EQUAL(rc, 0);
        char line[512] = "";
        char wanted[32];
        snprintf(wanted, sizeof(wanted), "%lx ", (unsigned long)(uintptr_t)kvt_host_base(host));
        FILE *f = fopen("/proc/self/numa_maps", "r");
        CU_ASSERT_PTR_NOT_NULL_FATAL(f);
        while (fgets(line, sizeof(line), f) && strncmp(line, wanted, strlen(wanted)) != 0) {}
        fclose(f);
        CU_ASSERT_PTR_NOT_NULL(strstr(line, "prefer (many):0"));
    }
    CU_ASSERT_EQUAL(kvt_host_grow(host, 0, 4 * MIB), 0);
    CU_ASSERT_EQUAL(next_event().code, 0);
    stop();
}

static void test_sizes_as_text(void) {
    char out[KVT_SIZE_TEXT_BYTES];
    CU_ASSERT_STRING_EQUAL(kvt_size_text(17, out), "17 bytes");
    CU_ASSERT_STRING_EQUAL(kvt_size_text(65536, out), "64 KiB");
    CU_ASSERT_STRING_EQUAL(kvt_size_text(MIB + MIB / 2, out), "1.5 MiB");
    CU_ASSERT_STRING_EQUAL(kvt_size_text(UINT64_MAX, out), "16 EiB");
}

int main(void) {
    CU_TestInfo tests[] = {
        {"grows and shrinks", test_grows_and_shrinks},
        {"parts come up beside each other", test_parts_come_up_beside_each_other},
        {"a refused part takes the range with it", test_a_refused_part_takes_the_range_with_it},
        {"several wait for room", test_several_wait_for_room},
        {"many requests wait for a slow loop", test_many_requests_wait_for_a_slow_loop},
        {"stops with everything waiting", test_stops_with_everything_waiting},
        {"refuses more than the machine has", test_refuses_more_than_the_machine_has},
        {"refuses more than a limit", test_refuses_more_than_a_limit},
        {"locked memory", test_locked_memory},
        {"huge pages", test_huge_pages},
        {"is neither forked nor dumped", test_is_neither_forked_nor_dumped},
        {"memory files are sealed and private", test_memory_files_are_sealed_and_private},
        {"touch answers when there is no memory", test_touch_answers_when_there_is_no_memory},
        {"machine memory", test_machine_memory},
        {"nodes near", test_nodes_near},
        {"memory is preferred on a node", test_memory_is_preferred_on_a_node},
        {"sizes as text", test_sizes_as_text},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("host", tests);
}
