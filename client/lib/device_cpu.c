#include "client/lib/device.h"

#include "proto/attach.h"
#include "proto/errors.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

static int cpu_map(const struct kvt_client_import *import, void **address) {
    struct stat st;
    if (import->kind != KVT_EXTENT_FD || import->bytes == 0) {
        return -KVT_EPROTO;
    }
    /* A file shorter than its mapping would be a SIGBUS later. */
    if (fstat(import->fd, &st) != 0 || st.st_size < 0 || (uint64_t)st.st_size < import->bytes) {
        return -KVT_EPROTO;
    }
    void *p = mmap(NULL, import->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, import->fd, 0);
    if (p == MAP_FAILED) {
        return -KVT_ENOMEM;
    }
    (void)madvise(p, import->bytes, MADV_HUGEPAGE); /* the pages are there: map them whole */
    (void)madvise(p, import->bytes, MADV_DONTFORK);
    *address = p;
    return 0;
}

static void cpu_unmap(void *address, uint64_t bytes) {
    (void)munmap(address, bytes);
}

static void cpu_move(void *target, const void *source, uint64_t bytes) {
    memcpy(target, source, bytes);
}

static void cpu_store(struct kvt_counter *c, uint64_t value) {
    (void)kvt_client_counter_store(c, value);
}

static bool cpu_busy(void) {
    return false;
}

const struct kvt_client_device_ops kvt_client_device_cpu = {
    .name = "cpu",
    .extent_kind = KVT_EXTENT_FD,
    .map = cpu_map,
    .unmap = cpu_unmap,
    .move = cpu_move,
    .wait = kvt_client_counter_wait,
    .post = kvt_client_counter_post,
    .store = cpu_store,
    .busy = cpu_busy,
};
