/* An allocator of ranges in [0, size): first fit over a sorted array of free ranges. It holds no
 * bytes itself. Used for the host arena and for the inside of device extents.
 *
 * Invariants: free ranges are sorted, not empty, and never touch each other. The array always has
 * room for one more range than there are allocations, so that freeing cannot fail.
 */
#ifndef KVT_ENGINE_RANGES_H
#define KVT_ENGINE_RANGES_H

#include <stdbool.h>
#include <stdint.h>

struct kvt_range {
    uint64_t offset;
    uint64_t bytes;
};

struct kvt_ranges {
    struct kvt_range *free;
    uint32_t count;
    uint32_t capacity;
    uint32_t allocations;
    uint64_t free_bytes;
};

/* Nothing is free at first: see kvt_ranges_add. */
void kvt_ranges_init(struct kvt_ranges *r);
void kvt_ranges_destroy(struct kvt_ranges *r);

/* Makes [offset, offset + bytes) free for the first time. -KVT_ENOMEM. */
int kvt_ranges_add(struct kvt_ranges *r, uint64_t offset, uint64_t bytes)
    __attribute__((warn_unused_result));
/* Takes [offset, offset + bytes) away again; all of it is free. -KVT_ENOMEM (nothing changed). */
int kvt_ranges_remove(struct kvt_ranges *r, uint64_t offset, uint64_t bytes)
    __attribute__((warn_unused_result));

/* Allocates `bytes` at a multiple of `align` (a power of two). 0; -KVT_EQUOTA: no free range is
 * large enough; -KVT_ENOMEM. */
int kvt_ranges_alloc(struct kvt_ranges *r, uint64_t bytes, uint64_t align, uint64_t *offset)
    __attribute__((warn_unused_result));
/* Allocates exactly [offset, offset + bytes), all of which is free, and was allocated before. Cannot
 * fail: that is how a free is undone. */
void kvt_ranges_take(struct kvt_ranges *r, uint64_t offset, uint64_t bytes);
void kvt_ranges_free(struct kvt_ranges *r, uint64_t offset, uint64_t bytes);

/* Whether all of [offset, offset + bytes) is free. */
bool kvt_ranges_is_free(const struct kvt_ranges *r, uint64_t offset, uint64_t bytes);

#endif
