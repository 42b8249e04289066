/* Records of a session's operations: a window over ascending ids. An id below the window is
 * complete and forgotten. And programs of a single operation.
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

/* The window has grown: so must what the issuer keeps of it. */
int ops_window_attach(const struct op_window *w, struct kvt_program *program) {
    if (w->window_sent >= w->capacity) {
        return 0;
    }
    program->window = calloc(w->capacity / 64, sizeof(uint64_t));
    if (program->window == NULL) {
        return -KVT_ENOMEM;
    }
    program->window_capacity = w->capacity;
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

/* ---- handing over ------------------------------------------------------------------------------- */

void program_push(struct kvt_engine *e, struct session *s, struct kvt_program *program) {
    struct kvt_action *a = action_push(e, KVT_ACTION_PROGRAM);
    a->device = s->device;
    a->session = session_index(e, s);
    a->program = program;
}

/* An operation that completes when the worker has posted the schedule's last step. */
void end_op_emit(struct kvt_engine *e, struct session *s) {
    struct schedule *sc = &s->schedule;
    struct kvt_program *program = sc->end_program; /* and there is room for its record */
    KVT_ASSERT(program != NULL);
    sc->end_program = NULL;
    uint64_t last = sc->first_step + sc->steps - 1;
    program->op_count = 1;
    program->ops[0] = (struct kvt_op){.id = ops_add(&s->ops, ROLE_END, sc->cache->id, last, 0),
                                      .kind = KVT_OP_STEP,
                                      .step_wait = last};
    program_push(e, s, program);
}

/* One operation of role MIGRATE with these copies. */
int copy_op_emit(struct kvt_engine *e, struct session *s, const struct kvt_copy *copies,
                 uint32_t count) {
    struct kvt_program *program = kvt_program_create(session_index(e, s), 1, count, 0);
    if (program == NULL || ops_reserve(&s->ops, 2) != 0 || /* the schedule's end keeps one */
        ops_window_attach(&s->ops, program) != 0) {
        kvt_program_free(program);
        return -KVT_ENOMEM;
    }
    s->ops.window_sent = s->ops.capacity;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < count; i++) {
        program->copies[i] = copies[i];
        bytes += copies[i].bytes;
    }
    s->ops.migrates++;
    program->op_count = 1;
    program->copy_count = count;
    program->ops[0] = (struct kvt_op){.id = ops_add(&s->ops, ROLE_MIGRATE, 0, 0, bytes),
                                      .kind = KVT_OP_COPY,
                                      .traffic = KVT_CLASS_PREFILL,
                                      .copy_count = count};
    program_push(e, s, program);
    return 0;
}
