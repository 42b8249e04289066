/* Which operations are outstanding. Ids ascend, so this is a window: everything below `base` is
 * complete, everything above `last` is not known yet, and between the two a ring of bits says. */
#ifndef KVT_ENGINE_OUTSTANDING_H
#define KVT_ENGINE_OUTSTANDING_H

#include <stdbool.h>
#include <stdint.h>

struct kvt_outstanding {
    uint64_t *bits;    /* owned; bit id % capacity is set while `id` is outstanding */
    uint64_t capacity; /* bits: 0 or a power of two, 64 or more */
    uint64_t base;     /* the smallest id that may be outstanding */
    uint64_t last;     /* the largest id ever added; 0: none */
};

/* Zeroed memory is an empty set. Frees what it holds and leaves it empty. */
void kvt_outstanding_clear(struct kvt_outstanding *o);

/* Goes on in `bits`, zeroed memory for `capacity` bits (a power of two, more than it has), which it
 * takes over. */
void kvt_outstanding_move(struct kvt_outstanding *o, uint64_t *bits, uint64_t capacity);

/* Adds `id`, which is larger than every id before. Where the room that it was given does not suffice
 * it grows, and asserts that there is memory. */
void kvt_outstanding_add(struct kvt_outstanding *o, uint64_t id);

/* `id` is outstanding. Amortised O(1). */
void kvt_outstanding_remove(struct kvt_outstanding *o, uint64_t id);

static inline bool kvt_outstanding_has(const struct kvt_outstanding *o, uint64_t id) {
    if (id < o->base || id > o->last) {
        return false;
    }
    uint64_t at = id & (o->capacity - 1);
    return (o->bits[at / 64] >> (at % 64)) & 1;
}

/* Whether `id` was added and removed again, or was skipped. */
static inline bool kvt_outstanding_complete(const struct kvt_outstanding *o, uint64_t id) {
    return id <= o->last && !kvt_outstanding_has(o, id);
}

#endif
