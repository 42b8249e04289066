/* Records of a session's operations: a window over ascending ids. An id below the window is
 * complete and forgotten.
 */
#include "tiers/engine/state.h"

#include <stdlib.h>
#include <string.h>

int ops_reserve(struct op_window *w, uint64_t more) {
    uint64_t need = w->next - w->base + more;
    if (need <= w->capacity) {
        return 0;
    }
    uint64_t capacity = w->capacity == 0 ? 64 : w->capacity;
    while (capacity < need) {
        capacity *= 2;
    }
    struct op_record *grown = calloc(capacity, sizeof(*grown));
    if (grown == NULL) {
        return -KVT_ENOMEM;
    }
    for (uint64_t id = w->base; id < w->next; id++) {
        grown[id & (capacity - 1)] = w->records[id & (w->capacity - 1)];
    }
    free(w->records);
    w->records = grown;
    w->capacity = capacity;
    return 0;
}

uint64_t ops_add(struct op_window *w, uint32_t role, uint32_t cache, uint64_t step,
                 uint64_t bytes) {
    KVT_ASSERT(w->next - w->base < w->capacity);
    uint64_t id = w->next++;
    w->records[id & (w->capacity - 1)] =
        (struct op_record){.role = (uint8_t)role, .cache = cache, .step = step, .bytes = bytes};
    w->outstanding++;
    return id;
}

struct op_record *ops_find(const struct op_window *w, uint64_t id) {
    if (id < w->base || id >= w->next) {
        return NULL;
    }
    return &w->records[id & (w->capacity - 1)];
}

void ops_complete(struct op_window *w, struct op_record *r, uint32_t status) {
    KVT_ASSERT(!r->complete);
    KVT_ASSERT(w->outstanding > 0);
    r->complete = true;
    r->status = (uint8_t)status;
    w->outstanding--;
}

/* Guesses stay: whether they are used is decided later. */
void ops_trim(struct op_window *w) {
    while (w->base < w->next) {
        struct op_record *r = &w->records[w->base & (w->capacity - 1)];
        if (!r->complete || r->role == ROLE_GUESS) {
            return;
        }
        w->base++;
    }
}
