/* See extent_table.h.
 *
 * An extent's key is 0 or KEY_LIVE + its id. The copy thread pins first and then reads the key; the
 * control thread takes the key away first and then reads the pins: so an extent that goes away
 * under a copy is noticed by one of the two.
 */
#include "tiers/device/extent_table.h"

#include "proto/errors.h"
#include "proto/limits.h"
#include "tiers/engine/assert.h"
#include "tiers/host/machine.h"

#include <stdio.h>
#include <stdlib.h>

enum { EXTENTS_MAX = 65536 };
#define KEY_LIVE (UINT64_C(1) << 32)

struct extent {
    uint64_t key;  /* atomic */
    uint32_t pins; /* atomic, written by the copy thread */
    uint64_t address;
    uint64_t bytes;
};

struct kvt_extent_table {
    struct kvt_extent_table_config config;
    uint64_t used_bytes;                /* control thread */
    struct extent extents[EXTENTS_MAX]; /* by the low 16 bits of the id */
};

int kvt_extent_table_create(const struct kvt_extent_table_config *c,
                            struct kvt_extent_table **out) {
    struct kvt_extent_table *t = calloc(1, sizeof(*t));
    if (!t) {
        return -KVT_ENOMEM;
    }
    t->config = *c;
    *out = t;
    return 0;
}

void kvt_extent_table_free(struct kvt_extent_table *t) {
    free(t);
}

/* ---- control thread -------------------------------------------------------------------------- */

int kvt_extent_table_check(const struct kvt_extent_table *t, uint32_t extent, uint64_t bytes,
                           char *text) {
    const struct kvt_extent_table_config *c = &t->config;
    uint64_t key = t->extents[extent % EXTENTS_MAX].key;
    char size[KVT_SIZE_TEXT_BYTES];
    char left[KVT_SIZE_TEXT_BYTES];
    char budget[KVT_SIZE_TEXT_BYTES];
    if (bytes == 0 || bytes % c->granule_bytes != 0) {
        snprintf(text, KVT_TEXT_BYTES,
                 "%s: extent %u of %llu bytes: the size must be a multiple of %llu", c->what,
                 extent, (unsigned long long)bytes, (unsigned long long)c->granule_bytes);
        return -KVT_EINVAL;
    }
    if (key != 0) {
        snprintf(text, KVT_TEXT_BYTES, "%s: extent %u: its place is taken by extent %u", c->what,
                 extent, (uint32_t)key);
        return -KVT_EEXIST;
    }
    if (bytes > c->budget_bytes - t->used_bytes) {
        snprintf(text, KVT_TEXT_BYTES, "%s: extent of %s wanted, %s left of the budget of %s",
                 c->what, kvt_size_text(bytes, size),
                 kvt_size_text(c->budget_bytes - t->used_bytes, left),
                 kvt_size_text(c->budget_bytes, budget));
        return -KVT_EQUOTA;
    }
    return 0;
}

void kvt_extent_table_put(struct kvt_extent_table *t, uint32_t extent, uint64_t address,
                          uint64_t bytes) {
    struct extent *x = &t->extents[extent % EXTENTS_MAX];
    KVT_ASSERT(x->key == 0);
    KVT_ASSERT(address != 0);
    KVT_ASSERT(bytes <= t->config.budget_bytes - t->used_bytes);
    x->address = address;
    x->bytes = bytes;
    t->used_bytes += bytes;
    __atomic_store_n(&x->key, KEY_LIVE + extent, __ATOMIC_SEQ_CST);
}

static void take(struct kvt_extent_table *t, struct extent *x, uint64_t *address, uint64_t *bytes) {
    __atomic_store_n(&x->key, 0, __ATOMIC_SEQ_CST);
    t->used_bytes -= x->bytes;
    *address = x->address;
    *bytes = x->bytes;
}

int kvt_extent_table_take(struct kvt_extent_table *t, uint32_t extent, uint64_t *address,
                          uint64_t *bytes, char *text) {
    struct extent *x = &t->extents[extent % EXTENTS_MAX];
    if (x->key != KEY_LIVE + extent) {
        snprintf(text, KVT_TEXT_BYTES, "%s: extent %u: %s", t->config.what, extent,
                 kvt_error_text(KVT_ENOENT));
        return -KVT_ENOENT;
    }
    take(t, x, address, bytes);
    KVT_ASSERT(__atomic_load_n(&x->pins, __ATOMIC_SEQ_CST) == 0);
    return 0;
}

int kvt_extent_table_take_any(struct kvt_extent_table *t, uint64_t *address, uint64_t *bytes) {
    for (uint32_t i = 0; t->used_bytes > 0 && i < EXTENTS_MAX; i++) {
        if (t->extents[i].key != 0) {
            take(t, &t->extents[i], address, bytes);
            return 0;
        }
    }
    return -KVT_ENOENT;
}

/* ---- copy thread ----------------------------------------------------------------------------- */

uint64_t kvt_extent_table_pin(struct kvt_extent_table *t, uint32_t extent, uint64_t offset,
                              uint64_t bytes) {
    struct extent *x = &t->extents[extent % EXTENTS_MAX];
    __atomic_add_fetch(&x->pins, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&x->key, __ATOMIC_SEQ_CST) == KEY_LIVE + extent && offset <= x->bytes &&
        bytes <= x->bytes - offset) {
        return x->address + offset;
    }
    kvt_extent_table_unpin(t, extent);
    return 0;
}

void kvt_extent_table_unpin(struct kvt_extent_table *t, uint32_t extent) {
    __atomic_sub_fetch(&t->extents[extent % EXTENTS_MAX].pins, 1, __ATOMIC_SEQ_CST);
}
