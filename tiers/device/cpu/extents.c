/* Extents of the cpu device; see extents.h.
 *
 * An extent's key is 0 or KEY_LIVE + its id. The copy thread pins first and then reads the key; the
 * control thread takes the key away first and then reads the pins: so an extent that goes away
 * under a copy is noticed by one of the two.
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
#include "tiers/engine/assert.h"
#include "tiers/host/machine.h"
#include "tiers/host/memfd.h"
#include "tiers/host/touch.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { EXTENTS_MAX = 65536 };
#define KEY_LIVE (UINT64_C(1) << 32)

struct extent {
    uint64_t key;  /* atomic */
    uint32_t pins; /* atomic, written by the copy thread */
    uint8_t *base;
    uint64_t bytes;
};

struct kvt_extents {
    uint64_t budget_bytes;
    uint64_t used_bytes; /* control thread */
    uint32_t touch_threads;
    struct extent extents[EXTENTS_MAX]; /* by the low 16 bits of the id */
};

int kvt_extents_create(uint64_t budget_bytes, uint32_t touch_threads, struct kvt_extents **out) {
    struct kvt_extents *e = calloc(1, sizeof(*e));
    if (!e) {
        return -KVT_ENOMEM;
    }
    e->budget_bytes = budget_bytes;
    e->touch_threads = touch_threads;
    *out = e;
    return 0;
}

void kvt_extents_free(struct kvt_extents *e) {
    if (!e) {
        return;
    }
    for (uint32_t i = 0; e->used_bytes > 0 && i < EXTENTS_MAX; i++) {
        struct extent *x = &e->extents[i];
        if (x->key != 0) {
            e->used_bytes -= x->bytes;
            munmap(x->base, x->bytes);
        }
    }
    free(e);
}

static struct extent *extent_of(struct kvt_extents *e, uint32_t extent) {
    return &e->extents[extent % EXTENTS_MAX];
}

/* Refuses what cannot be, before anything is made. */
static int check(const struct kvt_extents *e, const struct extent *x, uint32_t extent,
                 uint64_t bytes, char *text) {
    char size[KVT_SIZE_TEXT_BYTES];
    char left[KVT_SIZE_TEXT_BYTES];
    char budget[KVT_SIZE_TEXT_BYTES];
    if (bytes == 0 || bytes % KVT_CPU_PAGE_BYTES != 0) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device cpu: extent %u of %llu bytes: the size must be a multiple of %d", extent,
                 (unsigned long long)bytes, KVT_CPU_PAGE_BYTES);
        return -KVT_EINVAL;
    }
    if (x->key != 0) {
        snprintf(text, KVT_TEXT_BYTES, "device cpu: extent %u: its place is taken by extent %u",
                 extent, (uint32_t)x->key);
        return -KVT_EEXIST;
    }
    if (bytes > e->budget_bytes - e->used_bytes) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device cpu: extent of %s wanted, %s left of the budget of %s",
                 kvt_size_text(bytes, size), kvt_size_text(e->budget_bytes - e->used_bytes, left),
                 kvt_size_text(e->budget_bytes, budget));
        return -KVT_EQUOTA;
    }
    return kvt_machine_check_available("device cpu", bytes, text);
}

int kvt_extents_add(struct kvt_extents *e, uint32_t extent, uint64_t bytes, int *fd, char *text) {
    struct extent *x = extent_of(e, extent);
    int rc = check(e, x, extent, bytes, text);
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
    rc = kvt_touch("device cpu", file, base, 0, bytes, e->touch_threads, text);
    if (rc != 0) {
        goto unmap;
    }
    x->base = base;
    x->bytes = bytes;
    e->used_bytes += bytes;
    __atomic_store_n(&x->key, KEY_LIVE + extent, __ATOMIC_SEQ_CST);
    *fd = file;
    return 0;

unmap:
    munmap(base, bytes);
close_file:
    close(file);
    return rc;
}

/* Takes the pages out of the file, whoever else maps it. The fd is with the worker: hence by address. */
static int empty(const struct extent *x) {
    int rc;
    do {
        rc = madvise(x->base, x->bytes, MADV_REMOVE);
    } while (rc != 0 && (errno == EINTR || errno == EAGAIN));
    return rc == 0 ? 0 : -KVT_ESYS;
}

int kvt_extents_remove(struct kvt_extents *e, uint32_t extent, char *text) {
    struct extent *x = extent_of(e, extent);
    if (x->key != KEY_LIVE + extent) {
        snprintf(text, KVT_TEXT_BYTES, "device cpu: extent %u: %s", extent,
                 kvt_error_text(KVT_ENOENT));
        return -KVT_ENOENT;
    }
    __atomic_store_n(&x->key, 0, __ATOMIC_SEQ_CST);
    KVT_ASSERT(__atomic_load_n(&x->pins, __ATOMIC_SEQ_CST) == 0);
    int rc = empty(x);
    if (rc != 0) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device cpu: extent %u: its memory is not back before every process has unmapped "
                 "it: %s",
                 extent, strerror(errno));
    }
    munmap(x->base, x->bytes);
    e->used_bytes -= x->bytes;
    return rc;
}

uint8_t *kvt_extents_pin(struct kvt_extents *e, uint32_t extent, uint64_t offset, uint64_t bytes) {
    struct extent *x = extent_of(e, extent);
    __atomic_add_fetch(&x->pins, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&x->key, __ATOMIC_SEQ_CST) == KEY_LIVE + extent && offset <= x->bytes &&
        bytes <= x->bytes - offset) {
        return x->base + offset;
    }
    kvt_extents_unpin(e, extent);
    return NULL;
}

void kvt_extents_unpin(struct kvt_extents *e, uint32_t extent) {
    __atomic_sub_fetch(&extent_of(e, extent)->pins, 1, __ATOMIC_SEQ_CST);
}
