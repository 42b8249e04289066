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

/* Makes room for ids [base, id]. */
static void grow(struct kvt_outstanding *o, uint64_t id) {
    struct kvt_outstanding larger = {.base = o->base, .last = o->last, .capacity = 1024};
    while (larger.capacity <= id - o->base) {
        larger.capacity *= 2;
    }
    larger.bits = calloc(larger.capacity / 64, sizeof(uint64_t));
    KVT_ASSERT(larger.bits != NULL);
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
