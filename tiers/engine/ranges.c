#include "tiers/engine/ranges.h"

#include "proto/errors.h"
#include "tiers/engine/assert.h"

#include <stdlib.h>
#include <string.h>

void kvt_ranges_init(struct kvt_ranges *r) {
    memset(r, 0, sizeof(*r));
}

void kvt_ranges_destroy(struct kvt_ranges *r) {
    free(r->free);
    memset(r, 0, sizeof(*r));
}

/* Room for `more` ranges beyond one per allocation. */
static int reserve(struct kvt_ranges *r, uint32_t more) {
    uint64_t need = (uint64_t)r->count + r->allocations + more + 1;
    if (need <= r->capacity) {
        return 0;
    }
    uint64_t capacity = need + need / 2 + 8;
    struct kvt_range *grown = realloc(r->free, capacity * sizeof(*grown));
    if (grown == NULL || capacity > UINT32_MAX) {
        return -KVT_ENOMEM;
    }
    r->free = grown;
    r->capacity = (uint32_t)capacity;
    return 0;
}

/* Index of the first free range whose end is behind `offset`. */
static uint32_t lower(const struct kvt_ranges *r, uint64_t offset) {
    uint32_t low = 0;
    uint32_t high = r->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (r->free[middle].offset + r->free[middle].bytes <= offset) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static void insert_at(struct kvt_ranges *r, uint32_t at, uint64_t offset, uint64_t bytes) {
    KVT_ASSERT(r->count < r->capacity);
    memmove(&r->free[at + 1], &r->free[at], (r->count - at) * sizeof(*r->free));
    r->free[at] = (struct kvt_range){.offset = offset, .bytes = bytes};
    r->count++;
}

static void remove_at(struct kvt_ranges *r, uint32_t at) {
    memmove(&r->free[at], &r->free[at + 1], (r->count - at - 1) * sizeof(*r->free));
    r->count--;
}

/* Puts a range back and joins it with its neighbours. */
static void give(struct kvt_ranges *r, uint64_t offset, uint64_t bytes) {
    uint32_t at = lower(r, offset);
    KVT_ASSERT(at == r->count || offset + bytes <= r->free[at].offset);
    bool joins_next = at < r->count && offset + bytes == r->free[at].offset;
    bool joins_previous = at > 0 && r->free[at - 1].offset + r->free[at - 1].bytes == offset;
    if (joins_previous && joins_next) {
        r->free[at - 1].bytes += bytes + r->free[at].bytes;
        remove_at(r, at);
    } else if (joins_previous) {
        r->free[at - 1].bytes += bytes;
    } else if (joins_next) {
        r->free[at].offset = offset;
        r->free[at].bytes += bytes;
    } else {
        insert_at(r, at, offset, bytes);
    }
    r->free_bytes += bytes;
}

/* Cuts [offset, offset + bytes) out of the free range at index `at`, which covers it. */
static void cut(struct kvt_ranges *r, uint32_t at, uint64_t offset, uint64_t bytes) {
    struct kvt_range whole = r->free[at];
    uint64_t before = offset - whole.offset;
    uint64_t after = whole.bytes - before - bytes;
    if (before > 0 && after > 0) {
        r->free[at].bytes = before;
        insert_at(r, at + 1, offset + bytes, after);
    } else if (before > 0) {
        r->free[at].bytes = before;
    } else if (after > 0) {
        r->free[at] = (struct kvt_range){.offset = offset + bytes, .bytes = after};
    } else {
        remove_at(r, at);
    }
    r->free_bytes -= bytes;
}

int kvt_ranges_add(struct kvt_ranges *r, uint64_t offset, uint64_t bytes) {
    KVT_ASSERT(bytes > 0);
    int rc = reserve(r, 1);
    if (rc == 0) {
        give(r, offset, bytes);
    }
    return rc;
}

bool kvt_ranges_is_free(const struct kvt_ranges *r, uint64_t offset, uint64_t bytes) {
    uint32_t at = lower(r, offset);
    return at < r->count && r->free[at].offset <= offset &&
           offset + bytes <= r->free[at].offset + r->free[at].bytes;
}

int kvt_ranges_remove(struct kvt_ranges *r, uint64_t offset, uint64_t bytes) {
    int rc = reserve(r, 1);
    if (rc == 0) {
        KVT_ASSERT(kvt_ranges_is_free(r, offset, bytes));
        cut(r, lower(r, offset), offset, bytes);
    }
    return rc;
}

int kvt_ranges_alloc(struct kvt_ranges *r, uint64_t bytes, uint64_t align, uint64_t *offset) {
    KVT_ASSERT(bytes > 0);
    KVT_ASSERT(align > 0 && (align & (align - 1)) == 0);
    for (uint32_t i = 0; i < r->count; i++) {
        uint64_t start = (r->free[i].offset + align - 1) & ~(align - 1);
        uint64_t skipped = start - r->free[i].offset; /* wraps if start did */
        if (start < r->free[i].offset || skipped > r->free[i].bytes ||
            bytes > r->free[i].bytes - skipped) {
            continue;
        }
        int rc = reserve(r, 2);
        if (rc != 0) {
            return rc;
        }
        cut(r, i, start, bytes);
        r->allocations++;
        *offset = start;
        return 0;
    }
    return -KVT_EQUOTA;
}

void kvt_ranges_take(struct kvt_ranges *r, uint64_t offset, uint64_t bytes) {
    KVT_ASSERT(kvt_ranges_is_free(r, offset, bytes));
    cut(r, lower(r, offset), offset, bytes);
    r->allocations++;
}

void kvt_ranges_free(struct kvt_ranges *r, uint64_t offset, uint64_t bytes) {
    KVT_ASSERT(r->allocations > 0);
    give(r, offset, bytes);
    r->allocations--;
}
