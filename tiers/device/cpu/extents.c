/* Extents of the cpu device; see extents.h.
 *
 * What sealing cannot prevent: a worker may punch holes into its own extent. Its own bytes are then
 * zeroes, and the next copy allocates the pages again, inside the same budget.
 *
 * An extent that is removed is emptied for everybody: a worker that lies about having unmapped it, or
 * a process that it forked, holds a file without pages. What such a one writes later is memory that
 * it takes from the kernel itself, in its own cgroup, as with any memory file of its own. (Truncating
 * the file would turn that into SIGBUS; but then a worker could truncate it, under the copy threads.)
 */
#include "tiers/device/cpu/extents.h"

#include "proto/errors.h"
#include "proto/limits.h"
#include "tiers/device/cpu/page_map.h"
#include "tiers/device/extent_table.h"
#include "tiers/host/machine.h"
#include "tiers/host/memfd.h"
#include "tiers/host/touch.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct kvt_extents {
    struct kvt_extent_table *table; /* addresses are this process's */
    uint32_t touch_threads;
};

int kvt_extents_create(uint64_t budget_bytes, uint32_t touch_threads, struct kvt_extents **out) {
    struct kvt_extent_table_config c = {
        .what = "device cpu", .budget_bytes = budget_bytes, .granule_bytes = KVT_CPU_PAGE_BYTES};
    struct kvt_extents *e = calloc(1, sizeof(*e));
    if (!e || kvt_extent_table_create(&c, &e->table) != 0) {
        free(e);
        return -KVT_ENOMEM;
    }
    e->touch_threads = touch_threads;
    *out = e;
    return 0;
}

void kvt_extents_free(struct kvt_extents *e) {
    uint64_t address;
    uint64_t bytes;
    if (!e) {
        return;
    }
    while (kvt_extent_table_take_any(e->table, &address, &bytes) == 0) {
        munmap((void *)(uintptr_t)address, bytes);
    }
    kvt_extent_table_free(e->table);
    free(e);
}

int kvt_extents_add(struct kvt_extents *e, uint32_t extent, uint64_t bytes, int *fd, char *text) {
    int rc = kvt_extent_table_check(e->table, extent, bytes, text);
    if (rc == 0) {
        rc = kvt_machine_check_available("device cpu", bytes, text);
    }
    if (rc != 0) {
        return rc;
    }
    int file = kvt_memfd_create("device cpu", "kvtier-extent", bytes, text);
    if (file < 0) {
        return file;
    }
    uint8_t *base = kvt_memfd_map(file, bytes);
    if (!base) {
        snprintf(text, KVT_TEXT_BYTES, "device cpu: an extent could not be mapped: %s",
                 strerror(errno));
        rc = -KVT_ESYS;
        goto close_file;
    }
    rc = kvt_touch("device cpu", base, bytes, e->touch_threads, text);
    if (rc != 0) {
        goto unmap;
    }
    kvt_extent_table_put(e->table, extent, (uintptr_t)base, bytes);
    *fd = file;
    return 0;

unmap:
    munmap(base, bytes);
close_file:
    close(file);
    return rc;
}

/* Takes the pages out of the file, whoever else maps it. The fd is with the worker: hence by address. */
static int empty(void *base, uint64_t bytes) {
    int rc;
    do {
        rc = madvise(base, bytes, MADV_REMOVE);
    } while (rc != 0 && (errno == EINTR || errno == EAGAIN));
    return rc == 0 ? 0 : -KVT_ESYS;
}

int kvt_extents_remove(struct kvt_extents *e, uint32_t extent, char *text) {
    uint64_t address;
    uint64_t bytes;
    int rc = kvt_extent_table_take(e->table, extent, &address, &bytes, text);
    if (rc != 0) {
        return rc;
    }
    void *base = (void *)(uintptr_t)address;
    rc = empty(base, bytes);
    if (rc != 0) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device cpu: extent %u: its memory is not back before every process has unmapped "
                 "it: %s",
                 extent, strerror(errno));
    }
    munmap(base, bytes);
    return rc;
}

uint8_t *kvt_extents_pin(struct kvt_extents *e, uint32_t extent, uint64_t offset, uint64_t bytes) {
    return (uint8_t *)(uintptr_t)kvt_extent_table_pin(e->table, extent, offset, bytes);
}

void kvt_extents_unpin(struct kvt_extents *e, uint32_t extent) {
    kvt_extent_table_unpin(e->table, extent);
}
