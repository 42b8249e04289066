/* The cuda plug-in against a fake libcuda (tests/fake_cuda), which has the properties of the real one
 * that the driver must get right. On a real GPU: tests/gpu.
 *
 * The fake's device memory is a memfd, so an extent's fd can be mapped and looked at here.
 */
#include "proto/errors.h"
#include "tests/support/cunit_run.h"
#include "tests/support/device_rig.h"
#include "tiers/device/counter.h"

#include <CUnit/Basic.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MIB          (UINT64_C(1) << 20)
#define GIB          (UINT64_C(1) << 30)
#define EXTENT_BYTES (4 * MIB)
#define ARENA_BYTES  (160 * MIB)

static const struct kvt_driver_ops *ops;
static char text[KVT_TEXT_BYTES];
static struct kvt_driver *driver;
static struct kvt_driver_info info;
static uint8_t *arena;

static void pause_us(long us) {
    struct timespec t = {.tv_nsec = us * 1000};
    nanosleep(&t, NULL);
}

static int open_with(struct kvt_driver_config c) {
    c.budget_bytes = c.budget_bytes ? c.budget_bytes : 16 * MIB;
    c.host_base = arena;
    c.host_bytes = ARENA_BYTES;
    driver = NULL;
    text[0] = '\0';
    return ops->open(&c, &driver, &info, text);
}

static void open_driver(uint32_t kind) {
    CU_ASSERT_EQUAL_FATAL(open_with((struct kvt_driver_config){.extent_kind = kind}), 0);
}

static uint8_t *extent(uint32_t id, uint64_t bytes) {
    struct kvt_export e;
    CU_ASSERT_EQUAL_FATAL(ops->extent_create(driver, id, bytes, &e, text), 0);
    CU_ASSERT_EQUAL_FATAL(e.kind, KVT_EXTENT_FD);
    uint8_t *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, e.fd, 0);
    CU_ASSERT_NOT_EQUAL_FATAL(p, MAP_FAILED);
    close(e.fd);
    return p;
}

/* Waits for so many tags, each of them once. */
static void collect(uint32_t count) {
    uint32_t tags[8];
    bool ok[8];
    bool seen[KVT_DRIVER_TAGS_MAX] = {false};
    while (count > 0) {
        int n = ops->poll(driver, tags, ok, 8);
        CU_ASSERT_TRUE_FATAL(n >= 0);
        for (int i = 0; i < n; i++) {
            CU_ASSERT_TRUE(ok[i]);
            CU_ASSERT_FALSE(seen[tags[i]]);
            seen[tags[i]] = true;
        }
        count -= (uint32_t)n;
    }
    CU_ASSERT_EQUAL(ops->poll(driver, tags, ok, 8), 0);
}

static int copy(struct kvt_place source, struct kvt_place target, uint64_t bytes, uint32_t tag) {
    struct kvt_copy c = {.source = source, .target = target, .bytes = bytes};
    return ops->copy(driver, source.tier == KVT_TIER_GPU && target.tier != KVT_TIER_GPU, &c, tag);
}

static void fill_arena(uint64_t bytes) {
    for (uint64_t i = 0; i < bytes; i++) {
        arena[i] = (uint8_t)(i * 7 ^ i >> 9);
    }
}

/* ---- opening ----------------------------------------------------------------------------------- */

static void test_info(void) {
    uint8_t uuid[KVT_UUID_BYTES];
    open_driver(0);
    CU_ASSERT_STRING_EQUAL(info.name, "cuda");
    CU_ASSERT_EQUAL(info.extent_kind, KVT_EXTENT_FD);
    CU_ASSERT_EQUAL(info.granule_bytes, 2 * MIB);
    CU_ASSERT_TRUE(info.post_behind);
    CU_ASSERT_TRUE(info.pins_host);
    CU_ASSERT_EQUAL(info.numa_node, -1);
    CU_ASSERT_FALSE(info.can_sleep);
    memset(uuid, 0xa0, sizeof(uuid));
    CU_ASSERT_EQUAL(memcmp(info.uuid, uuid, sizeof(uuid)), 0);
    ops->close(driver);
    /* The second GPU, by its UUID. */
    setenv("FAKE_CUDA_GPUS", "2", 1);
    struct kvt_driver_config c = {.extent_kind = KVT_EXTENT_IPC};
    memset(c.uuid, 0xa1, sizeof(c.uuid));
    CU_ASSERT_EQUAL_FATAL(open_with(c), 0);
    CU_ASSERT_EQUAL(memcmp(info.uuid, c.uuid, sizeof(c.uuid)), 0);
    CU_ASSERT_EQUAL(info.extent_kind, KVT_EXTENT_IPC);
    ops->close(driver);
    unsetenv("FAKE_CUDA_GPUS");
    setenv("FAKE_CUDA_NODE", "3", 1);
    open_driver(0);
    CU_ASSERT_EQUAL(info.numa_node, 3);
    ops->close(driver);
    unsetenv("FAKE_CUDA_NODE");
}

static void expect_refusal(int code, const char *part, struct kvt_driver_config c) {
    CU_ASSERT_EQUAL(open_with(c), code);
    CU_ASSERT_PTR_NULL(driver);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "device cuda: "));
    if (!strstr(text, part)) {
        printf("\n    \"%s\" does not say \"%s\"\n", text, part);
        CU_FAIL("the text lacks a part");
    }
}

static void test_refusals(void) {
    struct kvt_driver_config c = {.budget_bytes = 0};
    c.uuid[3] = 9;
    expect_refusal(-KVT_ENOENT, "no GPU has that UUID; there are 1, the first is GPU-a0a0a0a0", c);
    expect_refusal(-KVT_ECONFIG, "the GPU has 1 GiB; lower it",
                   (struct kvt_driver_config){.budget_bytes = 2048 * MIB});
    setenv("FAKE_CUDA_NO_VALUES", "1", 1);
    expect_refusal(-KVT_ENOTSUP, "64-bit stream memory operations", (struct kvt_driver_config){0});
    unsetenv("FAKE_CUDA_NO_VALUES");
}

/* ---- extents ----------------------------------------------------------------------------------- */

static void test_extents(void) {
    struct kvt_export e;
    open_driver(0);
    uint8_t *p = extent(7, EXTENT_BYTES);
    uint64_t sum = 0;
    for (uint64_t i = 0; i < EXTENT_BYTES; i++) {
        sum += p[i]; /* the fake's memory is never zero by itself */
    }
    CU_ASSERT_EQUAL(sum, 0);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 7 + 65536, 2 * MIB, &e, text), -KVT_EEXIST);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 8, MIB, &e, text), -KVT_EINVAL);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 8, 14 * MIB, &e, text), -KVT_EQUOTA);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "14 MiB wanted, 12 MiB left of the budget of 16 MiB"));
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 8, text), -KVT_ENOENT);
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 7, text), 0);
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 7, text), -KVT_ENOENT);
    for (int i = 0; i < 100; i++) { /* nothing is charged for ever */
        munmap(extent(9, 16 * MIB), 16 * MIB);
        CU_ASSERT_EQUAL(ops->extent_destroy(driver, 9, text), 0);
    }
    munmap(p, EXTENT_BYTES);
    ops->close(driver);
    /* The GPU's memory may be less than the budget when others use it. */
    setenv("FAKE_CUDA_MEMORY", "16777216", 1);
    open_driver(KVT_EXTENT_IPC);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 1, 8 * MIB, &e, text), 0);
    CU_ASSERT_EQUAL(e.kind, KVT_EXTENT_IPC);
    CU_ASSERT_EQUAL(e.fd, -1);
    setenv("FAKE_CUDA_MEMORY", "12582912", 1);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 2, 8 * MIB, &e, text), -KVT_EQUOTA);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "the GPU has 4 MiB free"));
    unsetenv("FAKE_CUDA_MEMORY");
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 1, text), 0);
    ops->close(driver);
}

/* ---- host memory and copies -------------------------------------------------------------------- */

static void test_host_memory(void) {
    open_driver(0);
    CU_ASSERT_EQUAL(ops->host_added(driver, 4096, 3 * 4096, text), 0);
    CU_ASSERT_EQUAL(ops->host_added(driver, 8192, 4096, text), -KVT_EINVAL);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "registered already"));
    CU_ASSERT_EQUAL(ops->host_added(driver, 100, 4096, text), -KVT_EINVAL);
    CU_ASSERT_EQUAL(ops->host_added(driver, ARENA_BYTES - 4096, 8192, text), -KVT_EINVAL);
    CU_ASSERT_EQUAL(ops->host_removed(driver, 4096, 4096, text), -KVT_EINVAL);
    CU_ASSERT_EQUAL(ops->host_removed(driver, 8192, 4096, text), -KVT_EINVAL);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "not made of ranges that were registered"));
    CU_ASSERT_EQUAL(ops->host_added(driver, 4 * 4096, 4096, text), 0);
    CU_ASSERT_EQUAL(ops->host_removed(driver, 4096, 4 * 4096, text), 0); /* both */
    /* Up to the arena's end. */
    CU_ASSERT_EQUAL(ops->host_added(driver, 2 * MIB, ARENA_BYTES - 2 * MIB, text), 0);
    CU_ASSERT_EQUAL(ops->host_removed(driver, 2 * MIB, ARENA_BYTES - 2 * MIB, text), 0);
    CU_ASSERT_EQUAL(ops->host_added(driver, 0, ARENA_BYTES, text), 0);
    ops->close(driver); /* unregisters, or the next one could not register */
    open_driver(0);
    CU_ASSERT_EQUAL(ops->host_added(driver, 0, ARENA_BYTES, text), 0);
    ops->close(driver);
}

/* Neighbours, whose bits share words. */
static void *add_and_remove(void *argument) {
    uint64_t offset = (uintptr_t)argument * 12 * 1024;
    char why[KVT_TEXT_BYTES];
    uintptr_t wrong = 0;
    for (int i = 0; i < 20000; i++) {
        wrong += ops->host_added(driver, offset, 8 * 1024, why) != 0;
        wrong += ops->host_added(driver, offset + 8 * 1024, 4 * 1024, why) != 0;
        wrong += ops->host_removed(driver, offset, 12 * 1024, why) != 0;
    }
    return (void *)wrong;
}

static void test_threads_register_beside_each_other(void) {
    enum { THREADS = 8 };
    pthread_t threads[THREADS];
    open_driver(0);
    for (uintptr_t i = 0; i < THREADS; i++) {
        CU_ASSERT_EQUAL_FATAL(pthread_create(&threads[i], NULL, add_and_remove, (void *)i), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        void *wrong = NULL;
        pthread_join(threads[i], &wrong);
        CU_ASSERT_PTR_NULL(wrong);
    }
    CU_ASSERT_EQUAL(ops->host_added(driver, 0, MIB, text), 0); /* nothing is left */
    ops->close(driver);
}

static void test_copies(void) {
    open_driver(0);
    uint8_t *p = extent(1, EXTENT_BYTES);
    /* Two registrations side by side: a copy crosses the border. */
    CU_ASSERT_EQUAL(ops->host_added(driver, 0, MIB, text), 0);
    CU_ASSERT_EQUAL(ops->host_added(driver, MIB, 2 * MIB, text), 0);
    fill_arena(3 * MIB);
    CU_ASSERT_EQUAL(copy(kvt_on_host(100), kvt_on_device(1, 512), 2 * MIB, 3), 0);
    collect(1);
    CU_ASSERT_EQUAL(memcmp(p + 512, arena + 100, 2 * MIB), 0);
    memset(p + 3 * MIB, 0x5a, MIB);
    CU_ASSERT_EQUAL(copy(kvt_on_device(1, 3 * MIB), kvt_on_host(MIB - 1000), 5000, 511), 0);
    collect(1);
    CU_ASSERT_EQUAL(arena[MIB - 1000], 0x5a);
    CU_ASSERT_EQUAL(arena[MIB + 3999], 0x5a);
    CU_ASSERT_NOT_EQUAL(arena[MIB - 1001], 0x5a);
    CU_ASSERT_EQUAL(copy(kvt_on_host(0), kvt_on_host(2 * MIB), MIB, 4), 0);
    CU_ASSERT_EQUAL(copy(kvt_on_device(1, 3 * MIB), kvt_on_device(1, 0), 300, 5), 0);
    collect(2);
    CU_ASSERT_EQUAL(memcmp(arena, arena + 2 * MIB, MIB), 0);
    CU_ASSERT_EQUAL(p[299], 0x5a);
    /* What is not there, or overlaps, is refused. */
    CU_ASSERT_EQUAL(copy(kvt_on_host(3 * MIB - 8), kvt_on_device(1, 0), 16, 6), -KVT_EINVAL);
    CU_ASSERT_EQUAL(copy(kvt_on_host(ARENA_BYTES), kvt_on_device(1, 0), 16, 6), -KVT_EINVAL);
    CU_ASSERT_EQUAL(copy(kvt_on_host(0), kvt_on_device(1, EXTENT_BYTES - 8), 16, 6), -KVT_EINVAL);
    CU_ASSERT_EQUAL(copy(kvt_on_host(0), kvt_on_device(2, 0), 16, 6), -KVT_EINVAL);
    CU_ASSERT_EQUAL(copy(kvt_on_host(0), kvt_on_host(8), 16, 6), -KVT_EINVAL);
    CU_ASSERT_EQUAL(copy(kvt_on_device(1, 8), kvt_on_device(1, 0), 16, 6), -KVT_EINVAL);
    struct kvt_place disk = {.tier = KVT_TIER_NVME};
    CU_ASSERT_EQUAL(copy(disk, kvt_on_device(1, 0), 16, 6), -KVT_EINVAL);
    collect(0);
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 1, text), 0); /* nothing is pinned */
    munmap(p, EXTENT_BYTES);
    ops->close(driver);
}

static void test_posts(void) {
    open_driver(0);
    struct kvt_control_page *page = kvt_rig_page();
    uint8_t *p = extent(1, EXTENT_BYTES);
    CU_ASSERT_EQUAL(ops->host_added(driver, 0, 4 * MIB, text), 0);
    CU_ASSERT_EQUAL(ops->post(driver, 0, 3, 5, 9, 1), -KVT_ESTATE);
    CU_ASSERT_EQUAL(ops->page_added(driver, 3, page, text), 0);
    setenv("FAKE_CUDA_GIB_S", "1", 1); /* a copy takes 4 ms */
    fill_arena(4 * MIB);
    CU_ASSERT_EQUAL(copy(kvt_on_host(0), kvt_on_device(1, 0), 4 * MIB, 0), 0);
    CU_ASSERT_EQUAL(ops->post(driver, 0, 3, 5, 9, 300), 0);
    CU_ASSERT_EQUAL(__atomic_load_n(&page->ready[5].value, __ATOMIC_ACQUIRE), 0);
    while (__atomic_load_n(&page->ready[5].value, __ATOMIC_ACQUIRE) == 0) {
        sched_yield();
    }
    CU_ASSERT_EQUAL(memcmp(p, arena, 4 * MIB), 0); /* behind the copy */
    CU_ASSERT_EQUAL(page->ready[5].value, 9);
    CU_ASSERT_EQUAL(page->ready[4].value, 0);
    CU_ASSERT_EQUAL(page->ready[6].value, 0);
    collect(2);
    unsetenv("FAKE_CUDA_GIB_S");
    ops->page_removed(driver, 3);
    CU_ASSERT_EQUAL(ops->post(driver, 0, 3, 5, 10, 1), -KVT_ESTATE);
    munmap(p, EXTENT_BYTES);
    ops->close(driver);
    kvt_rig_page_free(page);
}

static void test_many_in_flight(void) {
    enum { TURNS = 50, EACH = 100 };
    open_driver(0);
    uint8_t *p = extent(1, EXTENT_BYTES);
    CU_ASSERT_EQUAL(ops->host_added(driver, 0, 4 * MIB, text), 0);
    for (uint32_t turn = 0; turn < TURNS; turn++) {
        for (uint32_t i = 0; i < EACH; i++) {
            CU_ASSERT_EQUAL(copy(kvt_on_host(i * 8), kvt_on_device(1, i * 8), 8, 2 * i), 0);
            CU_ASSERT_EQUAL(
                copy(kvt_on_device(1, MIB + i * 8), kvt_on_host(MIB + i * 8), 8, 2 * i + 1), 0);
        }
        collect(2 * EACH);
    }
    munmap(p, EXTENT_BYTES);
    ops->close(driver);
}

/* ---- the link ---------------------------------------------------------------------------------- */

static void check_measure(uint64_t budget_bytes, bool measured) {
    struct kvt_link link = {7, 7};
    CU_ASSERT_EQUAL_FATAL(open_with((struct kvt_driver_config){.budget_bytes = budget_bytes}), 0);
    CU_ASSERT_EQUAL(ops->measure(driver, &link, text), 0);
    CU_ASSERT_EQUAL(link.to_bytes_per_s > 0, measured);
    CU_ASSERT_EQUAL(link.from_bytes_per_s > 0, measured);
    CU_ASSERT_TRUE(link.to_bytes_per_s <= GIB);
    CU_ASSERT_TRUE(link.from_bytes_per_s <= GIB);
    ops->close(driver);
}

static void test_measure(void) {
    setenv("FAKE_CUDA_GIB_S", "1", 1);
    setenv("FAKE_CUDA_MEMORY", "67108864", 1);
    for (int i = 0; i < 5; i++) { /* nothing of the GPU's 64 MiB stays taken */
        check_measure(64 * MIB, true);
    }
    check_measure(2 * MIB, true);
    check_measure(2 * MIB - 4096, false); /* too little to say anything */
    unsetenv("FAKE_CUDA_GIB_S");
    /* Others have the GPU's memory: it is tried, and then it is an error. */
    struct kvt_link link = {7, 7};
    struct kvt_export e;
    setenv("FAKE_CUDA_MEMORY", "16777216", 1);
    open_driver(KVT_EXTENT_IPC);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 1, 2 * MIB, &e, text), 0);
    CU_ASSERT_EQUAL(ops->measure(driver, &link, text), -KVT_EQUOTA);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "measuring: cuMemAlloc: "));
    CU_ASSERT_EQUAL(link.to_bytes_per_s, 7); /* written on success only */
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 1, text), 0);
    CU_ASSERT_EQUAL(ops->measure(driver, &link, text), 0);
    CU_ASSERT_TRUE(link.to_bytes_per_s > 7);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 1, 16 * MIB, &e, text), 0);
    unsetenv("FAKE_CUDA_MEMORY");
    ops->close(driver);
}

/* ---- as a device ------------------------------------------------------------------------------- */

struct worker {
    const struct kvt_rig_stream *stream;
    const struct kvt_rig *rig;
    struct kvt_control_page *page;
    uint8_t *slots;
    uint32_t wrong;
};

/* What a GPU worker does: it polls, and stores no wake words. */
static void *work(void *argument) {
    struct worker *w = argument;
    const struct kvt_rig_stream *s = w->stream;
    for (uint32_t i = 0; i < s->pieces; i++) {
        uint32_t slot = i % s->slots;
        uint64_t wanted = KVT_RIG_GENERATION(s, i);
        while (!kvt_counter_reached(__atomic_load_n(&w->page->ready[slot].value, __ATOMIC_ACQUIRE),
                                    wanted)) {
            sched_yield();
        }
        uint8_t *at = w->slots + slot * kvt_rig_slot_bytes(s);
        w->wrong +=
            memcmp(at, w->rig->arena + i % s->distinct * s->piece_bytes, s->piece_bytes) != 0;
        memset(at + s->piece_bytes, (int)(i % 251), s->append_bytes);
        __atomic_store_n(&w->page->done[slot].value, wanted, __ATOMIC_SEQ_CST);
    }
    __atomic_store_n(&w->page->step.value, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void test_stream_of_pieces(void) {
    struct kvt_rig rig;
    struct kvt_rig_stream s = {.session = 2,
                               .extent = 1,
                               .slots = 3,
                               .pieces = 400,
                               .distinct = 5,
                               .piece_bytes = 100000,
                               .append_bytes = 64,
                               .append_offset = MIB};
    struct worker w = {.stream = &s, .rig = &rig};
    pthread_t thread;
    kvt_rig_start(&rig,
                  &(struct kvt_rig_config){
                      .ops = ops, .arena_bytes = 2 * MIB, .budget_bytes = 4 * MIB, .spin_us = 20});
    for (uint64_t i = 0; i < MIB; i++) {
        rig.arena[i] = (uint8_t)(i * 3 ^ i >> 7);
    }
    w.slots = kvt_rig_extent(&rig, 1, 2 * MIB);
    w.page = kvt_rig_page();
    kvt_rig_open(&rig, 2, w.page);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, work, &w), 0);
    kvt_rig_submit(&rig, kvt_rig_stream_program(&s));
    for (uint32_t i = 0; i < KVT_RIG_STREAM_OPS(&s); i++) {
        struct kvt_device_event e = kvt_rig_event(&rig);
        CU_ASSERT_EQUAL_FATAL(e.kind, KVT_DEVICE_COMPLETION);
        CU_ASSERT_EQUAL(e.completion.status, KVT_DONE);
    }
    pthread_join(thread, NULL);
    CU_ASSERT_EQUAL(w.wrong, 0);
    for (uint32_t i = 0; i < s.pieces; i++) {
        CU_ASSERT_EQUAL(rig.arena[MIB + i * 64 + 63], i % 251);
    }
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 2), 0);
    kvt_rig_stop(&rig);
    munmap(w.slots, 2 * MIB);
    kvt_rig_page_free(w.page);
}

/* The last test: the fake's GPU stays lost. What is under way fails, and CUDA's word is told. */
static void test_lost(void) {
    struct kvt_rig rig;
    bool lost = false;
    uint32_t failed = 0;
    kvt_rig_start(&rig, &(struct kvt_rig_config){
                            .ops = ops, .arena_bytes = 2 * MIB, .budget_bytes = 4 * MIB});
    munmap(kvt_rig_extent(&rig, 1, 2 * MIB), 2 * MIB);
    struct kvt_control_page *page = kvt_rig_page();
    kvt_rig_open(&rig, 0, page);
    setenv("FAKE_CUDA_FAIL_AFTER", "1", 1);
    struct kvt_program *p = kvt_rig_program(0, 1);
    kvt_rig_op(p, KVT_OP_FILL, 1, 0, kvt_on_host(0), kvt_on_device(1, 0), 4096)->generation = 1;
    kvt_rig_submit(&rig, p);
    while (!lost || failed < 1) { /* noticed although nothing comes back */
        struct kvt_device_event e = kvt_rig_event(&rig);
        failed += e.kind == KVT_DEVICE_COMPLETION && e.completion.status == KVT_FAILED;
        if (e.kind == KVT_DEVICE_LOST) {
            lost = true;
            CU_ASSERT_PTR_NOT_NULL(strstr(e.text, "CUDA_ERROR_ILLEGAL_ADDRESS 700"));
        }
    }
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 0), 0);
    kvt_rig_page_free(page);
    pause_us(1000);
    /* The fake's streams end with the process. */
}

int main(void) {
    char path[512];
    char here[256];
    ssize_t n = readlink("/proc/self/exe", here, sizeof(here) - 1);
    here[n < 0 ? 0 : n] = '\0';
    char *slash = strstr(here, "/tests/unit/");
    if (slash) {
        *slash = '\0';
    }
    snprintf(path, sizeof(path), "%s/fake_cuda/libcuda.so.1", here);
    /* By its name it is found again by whoever opens libcuda.so.1. */
    if (!slash || !dlopen(path, RTLD_NOW)) {
        puts("SKIP: built without CUDA");
        return 77;
    }
    snprintf(path, sizeof(path), "%s/lib/kvtierd", here);
    if (kvt_driver_find("cuda", path, &ops, text) != 0) {
        puts(text);
        return 1;
    }
    arena = mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CU_TestInfo tests[] = {
        {"info", test_info},
        {"refusals", test_refusals},
        {"extents", test_extents},
        {"host memory", test_host_memory},
        {"threads register beside each other", test_threads_register_beside_each_other},
        {"copies", test_copies},
        {"posts", test_posts},
        {"many in flight", test_many_in_flight},
        {"measure", test_measure},
        {"stream of pieces", test_stream_of_pieces},
        {"lost", test_lost},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("cuda driver", tests);
}
