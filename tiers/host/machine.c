/* Reads /proc/meminfo and the control groups' limits (version 2, and version 1's memory
 * controller); see machine.h.
 */
#include "tiers/host/machine.h"

#include "proto/errors.h"
#include "proto/limits.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/capability.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Never taken: what the daemon itself and its neighbours need to go on. */
#define RESERVE_BYTES (UINT64_C(64) << 20)

enum { PATH_BYTES = 4352, FILE_BYTES = 16384 };

/* The files are in memory and short. Returns false if there is none. */
static bool read_file(const char *root, const char *folder, const char *name,
                      char out[FILE_BYTES]) {
    char full[PATH_BYTES];
    int n = snprintf(full, sizeof(full), "%s%s/%s", root, folder, name);
    if (n < 0 || (size_t)n >= sizeof(full)) {
        return false;
    }
    int fd = open(full, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }
    size_t used = 0;
    for (;;) {
        ssize_t got = read(fd, out + used, FILE_BYTES - 1 - used);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            break;
        }
        used += (size_t)got;
    }
    close(fd);
    out[used] = '\0';
    return true;
}

/* The number behind `key` at the beginning of a line; 0: not there. */
static uint64_t number_after(const char *text, const char *key) {
    size_t length = strlen(key);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, key, length) == 0) {
            return strtoull(line + length, NULL, 10);
        }
    }
    return 0;
}

/* What one level of the hierarchy allows, and how much of that is left. */
static void look_at_group(const char *root, const char *folder, bool version_2,
                          struct kvt_machine_memory *m) {
    char text[FILE_BYTES];
    if (!read_file(root, folder, version_2 ? "memory.max" : "memory.limit_in_bytes", text) ||
        text[0] < '0' || text[0] > '9') {
        return; /* none, or "max" */
    }
    uint64_t limit = strtoull(text, NULL, 10);
    if (limit >= m->total_bytes) {
        return; /* version 1 has no word for "no limit", but a huge number */
    }
    m->limit_bytes = limit < m->limit_bytes ? limit : m->limit_bytes;

    bool read =
        read_file(root, folder, version_2 ? "memory.current" : "memory.usage_in_bytes", text);
    uint64_t used = read ? strtoull(text, NULL, 10) : 0;
    if (read_file(root, folder, "memory.stat", text)) { /* the file cache gives way */
        uint64_t cache = number_after(text, version_2 ? "inactive_file " : "total_inactive_file ") +
                         number_after(text, version_2 ? "active_file " : "total_active_file ");
        used -= cache < used ? cache : used;
    }
    uint64_t left = used < limit ? limit - used : 0;
    m->available_bytes = left < m->available_bytes ? left : m->available_bytes;
}

/* Our group and all above it, up to the mount's root. In a container the path may name folders
 * that are not mounted here; those are skipped. */
static void look_at_groups(const char *root, const char *mount, const char *group, bool version_2,
                           struct kvt_machine_memory *m) {
    char path[PATH_BYTES];
    int n = snprintf(path, sizeof(path), "%s%s", mount, group);
    if (n < 0 || (size_t)n >= sizeof(path)) {
        return;
    }
    size_t mount_length = strlen(mount);
    for (;;) {
        size_t length = strlen(path);
        while (length > mount_length && path[length - 1] == '/') {
            path[--length] = '\0';
        }
        look_at_group(root, path, version_2, m);
        char *slash = strrchr(path + mount_length, '/');
        if (!slash) {
            return;
        }
        *slash = '\0';
    }
}

/* A line is "number:controllers:path"; version 2's is "0::path". */
static void look_at_line(const char *root, char *line, struct kvt_machine_memory *m) {
    char *controllers = strchr(line, ':');
    char *path = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!path) {
        return;
    }
    *controllers++ = '\0';
    *path++ = '\0';
    if (*controllers == '\0') {
        look_at_groups(root, "/sys/fs/cgroup", path, true, m);
    } else if (strcmp(controllers, "memory") == 0) {
        look_at_groups(root, "/sys/fs/cgroup/memory", path, false, m);
    }
}

void kvt_machine_memory(const char *root, struct kvt_machine_memory *out) {
    struct kvt_machine_memory m = {.limit_bytes = KVT_MACHINE_NO_LIMIT};
    char text[FILE_BYTES];
    m.total_bytes = m.available_bytes = KVT_MACHINE_NO_LIMIT;
    if (read_file(root, "/proc", "meminfo", text)) {
        uint64_t total_kib = number_after(text, "MemTotal:");
        if (total_kib != 0) {
            m.total_bytes = total_kib * 1024;
            m.available_bytes = number_after(text, "MemAvailable:") * 1024;
        }
    }
    if (read_file(root, "/proc/self", "cgroup", text)) {
        char *rest = NULL;
        for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
            look_at_line(root, line, &m);
        }
    }
    *out = m;
}

const char *kvt_size_text(uint64_t bytes, char text[KVT_SIZE_TEXT_BYTES]) {
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    unsigned unit = 0;
    while (value >= 1024 && unit + 1 < sizeof(units) / sizeof(units[0])) {
        value /= 1024;
        unit++;
    }
    bool whole = value == (double)(uint64_t)value;
    snprintf(text, KVT_SIZE_TEXT_BYTES, whole ? "%.0f %s" : "%.1f %s", value, units[unit]);
    return text;
}

static int check_limit(const char *what, const char *option, int resource, const char *name,
                       uint64_t budget_bytes, char *text) {
    struct rlimit limit;
    char wanted[KVT_SIZE_TEXT_BYTES];
    char most[KVT_SIZE_TEXT_BYTES];
    if (getrlimit((__rlimit_resource_t)resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY ||
        budget_bytes <= limit.rlim_cur) {
        return 0;
    }
    snprintf(text, KVT_TEXT_BYTES,
             "%s: a budget of %s was asked for, but the limit on %s is %s; lower %s or raise the "
             "limit",
             what, kvt_size_text(budget_bytes, wanted), name, kvt_size_text(limit.rlim_cur, most),
             option);
    return -KVT_ECONFIG;
}

int kvt_machine_check_budget(const char *what, const char *option, enum kvt_machine_use use,
                             uint64_t budget_bytes, char *text) {
    struct kvt_machine_memory m;
    char wanted[KVT_SIZE_TEXT_BYTES];
    char most[KVT_SIZE_TEXT_BYTES];
    kvt_machine_memory("", &m);
    kvt_size_text(budget_bytes, wanted);
    if (budget_bytes > m.total_bytes) {
        snprintf(text, KVT_TEXT_BYTES,
                 "%s: a budget of %s was asked for, but this machine has %s of memory; lower %s",
                 what, wanted, kvt_size_text(m.total_bytes, most), option);
        return -KVT_ECONFIG;
    }
    if (budget_bytes > m.limit_bytes) {
        snprintf(text, KVT_TEXT_BYTES,
                 "%s: a budget of %s was asked for, but the control group's memory limit is %s; "
                 "lower %s or raise the limit",
                 what, wanted, kvt_size_text(m.limit_bytes, most), option);
        return -KVT_ECONFIG;
    }
    /* A file that is made larger than its limit raises SIGXFSZ. */
    int rc = use == KVT_MACHINE_FILE
                 ? check_limit(what, option, RLIMIT_FSIZE, "file size (RLIMIT_FSIZE)", budget_bytes,
                               text)
                 : check_limit(what, option, RLIMIT_DATA, "private memory (RLIMIT_DATA)",
                               budget_bytes, text);
    return rc != 0 ? rc
                   : check_limit(what, option, RLIMIT_AS, "address space (RLIMIT_AS)", budget_bytes,
                                 text);
}

int kvt_machine_check_available(const char *what, uint64_t bytes, char *text) {
    struct kvt_machine_memory m;
    kvt_machine_memory("", &m);
    uint64_t have = m.available_bytes > RESERVE_BYTES ? m.available_bytes - RESERVE_BYTES : 0;
    if (bytes <= have) {
        return 0;
    }
    char wanted[KVT_SIZE_TEXT_BYTES];
    char left[KVT_SIZE_TEXT_BYTES];
    snprintf(text, KVT_TEXT_BYTES,
             "%s: %s more memory wanted, %s free; lower the budgets or free memory", what,
             kvt_size_text(bytes, wanted), kvt_size_text(have, left));
    return -KVT_ENOMEM;
}

/* A list as "0-1,4". */
static uint64_t nodes_of(const char *list) {
    uint64_t nodes = 0;
    char *end = NULL;
    for (const char *p = list; *p >= '0' && *p <= '9'; p = end + (*end == ',')) {
        uint64_t first = strtoull(p, &end, 10);
        uint64_t last = *end == '-' ? strtoull(end + 1, &end, 10) : first;
        for (uint64_t node = first; node <= last && node < 64; node++) {
            nodes |= UINT64_C(1) << node;
        }
    }
    return nodes;
}

uint64_t kvt_machine_nodes_near(const char *root, uint64_t near) {
    char text[FILE_BYTES];
    if (!read_file(root, "/sys/devices/system/node", "has_memory", text)) {
        return 0;
    }
    uint64_t all = nodes_of(text);
    return (all & near) == all ? 0 : all & near;
}

static bool may_lock_without_limit(void) {
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {{0}};
    return syscall(SYS_capget, &head, data) == 0 &&
           (data[0].effective & (UINT32_C(1) << CAP_IPC_LOCK)) != 0;
}

int kvt_machine_allow_locked(const char *what, uint64_t bytes, char *text) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY ||
        bytes <= limit.rlim_cur || may_lock_without_limit()) {
        return 0;
    }
    if (bytes <= limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        if (setrlimit(RLIMIT_MEMLOCK, &limit) == 0) {
            return 0;
        }
    }
    char wanted[KVT_SIZE_TEXT_BYTES];
    char most[KVT_SIZE_TEXT_BYTES];
    snprintf(
        text, KVT_TEXT_BYTES,
        "%s: %s are to be pinned, and the limit on locked memory (RLIMIT_MEMLOCK) is %s; raise "
        "LimitMEMLOCK= of the service (ulimit -l), or lower the budget",
        what, kvt_size_text(bytes, wanted), kvt_size_text(limit.rlim_max, most));
    return -KVT_ENOMEM;
}
