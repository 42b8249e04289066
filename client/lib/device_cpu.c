#include "client/lib/device.h"

#include "proto/attach.h"
#include "proto/errors.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

static int cpu_open(void *stream, uint8_t *uuid, struct kvt_client_gpu **out, char *text) {
    (void)stream;
    (void)uuid;
    (void)text;
    *out = NULL;
    return 0;
}

static int cpu_page(struct kvt_client_gpu *g, struct kvt_control_page *page, char *text) {
    (void)g;
    (void)page;
    (void)text;
    return 0;
}

static void cpu_close(struct kvt_client_gpu *g) {
    (void)g;
}

static int cpu_vacate(struct kvt_client_gpu *g, void *address, uint64_t bytes) {
    (void)g;
    void *p = mmap(address, bytes, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return p == MAP_FAILED ? -KVT_ENOMEM : 0;
}

static int cpu_map(struct kvt_client_gpu *g, const struct kvt_client_import *import,
                   void **address) {
    (void)g;
    struct stat st;
    if (import->kind != KVT_EXTENT_FD || import->bytes == 0) {
        return -KVT_EPROTO;
    }
    /* A file shorter than its mapping would be a SIGBUS later. */
    if (fstat(import->fd, &st) != 0 || st.st_size < 0 || (uint64_t)st.st_size < import->bytes) {
        return -KVT_EPROTO;
    }
    int fixed = *address != NULL ? MAP_FIXED : 0;
    void *p =
        mmap(*address, import->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | fixed, import->fd, 0);
    if (p == MAP_FAILED && fixed != 0) {
        (void)cpu_vacate(g, *address,
                         import->bytes); /* a failed mmap may have made a hole of the range */
    }
    if (p == MAP_FAILED) {
        return -KVT_ENOMEM;
    }
    (void)madvise(p, import->bytes, MADV_HUGEPAGE); /* the pages are there: map them whole */
    (void)madvise(p, import->bytes, MADV_DONTFORK);
    *address = p;
    return 0;
}

static void cpu_unmap(struct kvt_client_gpu *g, void *address, uint64_t bytes) {
    (void)g;
    (void)munmap(address, bytes);
}

static int cpu_move(struct kvt_client_gpu *g, void *target, const void *source, uint64_t bytes) {
    (void)g;
    memcpy(target, source, bytes);
    return 0;
}

static int cpu_wait(struct kvt_client_gpu *g, struct kvt_counter *c, uint64_t value,
                    struct kvt_client_spin *spin, int (*stop)(void *), void *argument) {
    (void)g;
    return kvt_client_counter_wait(c, value, spin, stop, argument);
}

static int cpu_post(struct kvt_client_gpu *g, struct kvt_counter *c, uint64_t value) {
    (void)g;
    kvt_client_counter_post(c, value);
    return 0;
}

static int cpu_store(struct kvt_client_gpu *g, struct kvt_counter *c, uint64_t value) {
    (void)g;
    (void)kvt_client_counter_store(c, value);
    return 0;
}

static bool cpu_busy(struct kvt_client_gpu *g) {
    (void)g;
    return false;
}

static bool cpu_passed(struct kvt_client_gpu *g, const struct kvt_counter *c, uint64_t value) {
    (void)g;
    (void)c;
    (void)value;
    return true; /* nothing is ever enqueued */
}

static void cpu_drain(struct kvt_client_gpu *g) {
    (void)g;
}

static const char *cpu_why(const struct kvt_client_gpu *g) {
    (void)g;
    return "";
}

const struct kvt_client_device_ops kvt_client_device_cpu = {
    .name = "cpu",
    .extent_kind = KVT_EXTENT_FD,
    .features = KVT_FEATURE_KEEP_ADDRESS,
    .open = cpu_open,
    .page = cpu_page,
    .close = cpu_close,
    .map = cpu_map,
    .unmap = cpu_unmap,
    .vacate = cpu_vacate,
    .unreserve = cpu_unmap,
    .move = cpu_move,
    .wait = cpu_wait,
    .post = cpu_post,
    .store = cpu_store,
    .busy = cpu_busy,
    .passed = cpu_passed,
    .drain = cpu_drain,
    .why = cpu_why,
};
