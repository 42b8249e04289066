#include "tiers/engine/outstanding.h"

#include "tiers/engine/assert.h"

#include <stdlib.h>

void kvt_outstanding_clear(struct kvt_outstanding *o) {
    free(o->bits);
    *o = (struct kvt_outstanding){0};
}

static void set_bit(struct kvt_outstanding *o, uint64_t id) {
    uint64_t at = id & (o->capacity - 1);
    o->bits[at / 64] |= UINT64_C(1) << (at % 64);
}

void kvt_outstanding_move(struct kvt_outstanding *o, uint64_t *bits, uint64_t capacity) {
    struct kvt_outstanding larger = {
        .bits = bits, .base = o->base, .last = o->last, .capacity = capacity};
    if (o->capacity != 0) {
        for (uint64_t i = o->base; i <= o->last; i++) {
            if (kvt_outstanding_has(o, i)) {
                set_bit(&larger, i);
            }
        }
    }
    free(o->bits);
    *o = larger;
}

/* Makes room for ids [base, id]. */
static void grow(struct kvt_outstanding *o, uint64_t id) {
    uint64_t capacity = 1024;
    while (capacity <= id - o->base) {
        capacity *= 2;
    }
    uint64_t *bits = calloc(capacity / 64, sizeof(uint64_t));
    KVT_ASSERT(bits != NULL);
    kvt_outstanding_move(o, bits, capacity);
}

void kvt_outstanding_add(struct kvt_outstanding *o, uint64_t id) {
    KVT_ASSERT(id > o->last);
    if (o->base > o->last) {
        o->base = id; /* empty: ids that were skipped need no room */
    }
    if (o->capacity == 0 || id - o->base >= o->capacity) {
        grow(o, id);
    }
    o->last = id;
    set_bit(o, id);
}

void kvt_outstanding_remove(struct kvt_outstanding *o, uint64_t id) {
    KVT_ASSERT(kvt_outstanding_has(o, id));
    uint64_t at = id & (o->capacity - 1);
    o->bits[at / 64] &= ~(UINT64_C(1) << (at % 64));
    while (o->base <= o->last && !kvt_outstanding_has(o, o->base)) {
        o->base++;
    }
}
