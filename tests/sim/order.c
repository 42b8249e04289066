/* The order in which a copy thread issues, looked at from outside: a second, slow opinion on which
 * operations are open. When a copy goes, none of the same session and class that is used earlier may
 * be open, and no operation of a higher class in any session of the device, unless that class has had
 * its quanta while this one waited; then it must go, unless lower classes have their part of what may be
 * under way while a higher one has something to copy, open or not (docs/STEP.md, rules 22, 23, 32 and
 * 33). Whether the gates themselves are right is told by the bytes, not here.
 */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

typedef unsigned long long ull;

enum { QUEUE_COPY = KVT_SLOTS_MAX, QUEUES };

/* Index of the first operation with this id or a later one. */
static uint32_t at_or_behind(const struct sim_ops *ops, uint64_t id) {
    uint32_t low = 0;
    uint32_t high = ops->count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (ops->op[middle].id < id) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static struct sim_op *find(struct sim_ops *ops, uint64_t id) {
    uint32_t at = at_or_behind(ops, id);
    return at < ops->count && ops->op[at].id == id ? &ops->op[at] : NULL;
}

void sim_order_program(struct sim *sim, const struct kvt_program *p) {
    struct sim_ops *ops = &sim->ops[p->session];
    if (ops->count + p->op_count > ops->room) {
        ops->room = 2 * (ops->count + p->op_count);
        ops->op = sim_grow(ops->op, ops->room * sizeof(*ops->op));
    }
    for (uint32_t i = 0; i < p->op_count; i++) {
        const struct kvt_op *o = &p->ops[i];
        struct sim_op *op = &ops->op[ops->count];
        if (ops->count > 0 && o->id <= ops->op[ops->count - 1].id) {
            sim_fail(sim, "session %u: operation %llu is submitted behind a later one", p->session,
                     (ull)o->id);
        }
        *op = (struct sim_op){.id = o->id,
                              .kind = o->kind,
                              .traffic = o->traffic,
                              .slot = o->slot,
                              .gate = o->kind == KVT_OP_FILL        ? o->done_wait
                                      : o->kind == KVT_OP_WRITEBACK ? o->generation
                                                                    : 0,
                              .generation = o->generation,
                              .dep_count = o->dep_count};
        for (uint32_t c = 0; c < o->copy_count; c++) {
            op->left_bytes += p->copies[o->copy_first + c].bytes;
        }
        op->empty = op->left_bytes == 0;
        op->deps = sim_grow(NULL, (o->dep_count + 1) * sizeof(uint64_t));
        for (uint32_t n = 0; n < o->dep_count; n++) {
            op->deps[n] = p->deps[o->dep_first + n];
        }
        ops->last_id = o->id;
        ops->count++;
    }
}

uint64_t sim_order_completion(struct sim *sim, const struct kvt_completion *c) {
    uint64_t guessed_bytes = 0;
    struct sim_ops *ops = &sim->ops[c->session];
    struct sim_op *op = find(ops, c->op);
    if (!op) {
        sim_fail(sim, "session %u: operation %llu completes, which was not submitted", c->session,
                 (ull)c->op);
    }
    struct sim_worker *w = sim->sessions[c->session];
    if (op->kind == KVT_OP_FILL && op->generation <= w->slot_ready[op->slot]) {
        w->crossed_bytes += op->copied_bytes;
    } else if (op->kind == KVT_OP_FILL) {
        w->guessed[op->slot].generation = op->generation;
        w->guessed[op->slot].bytes = op->copied_bytes;
        guessed_bytes = op->copied_bytes;
    }
    uint32_t at = (uint32_t)(op - ops->op);
    free(op->deps);
    ops->count--;
    memmove(op, op + 1, (ops->count - at) * sizeof(*op));
    return guessed_bytes;
}

void sim_order_clear(struct sim *sim, uint32_t session) {
    struct sim_ops *ops = &sim->ops[session];
    for (uint32_t i = 0; i < ops->count; i++) {
        free(ops->op[i].deps);
    }
    free(ops->op);
    *ops = (struct sim_ops){0};
}

struct sim_op *sim_order_find(struct sim *sim, uint32_t session, uint64_t op) {
    return find(&sim->ops[session], op);
}

/* ---- which are open -------------------------------------------------------------------------- */

static bool gates_open(struct sim_ops *ops, const struct kvt_control_page *page,
                       const struct sim_op *op) {
    if (op->begun) {
        return true;
    }
    for (uint32_t n = 0; n < op->dep_count; n++) {
        if (find(ops, op->deps[n])) {
            return false;
        }
    }
    return op->gate == 0 ||
           __atomic_load_n(&page->done[op->slot].value, __ATOMIC_ACQUIRE) == op->gate;
}

/* What is looked at when a copy goes, by class. */
struct classes {
    bool is_open[SIM_CLASSES];
    bool copies[SIM_CLASSES]; /* now or later: of something that is submitted bytes are left */
};

/* The first operation of the session that is open and of which something is left, by class; NULL. */
static void open_ops(struct sim *sim, uint32_t session, const struct sim_op *first[],
                     struct classes *k) {
    struct sim_ops *ops = &sim->ops[session];
    bool seen[QUEUES] = {false};
    for (uint32_t i = 0; i < ops->count; i++) {
        const struct sim_op *op = &ops->op[i];
        uint32_t queue = op->kind == KVT_OP_COPY ? QUEUE_COPY : op->slot;
        if (op->kind == KVT_OP_STEP || op->failed || (op->left_bytes == 0 && !op->empty)) {
            continue; /* all of it is submitted: it holds back nobody */
        }
        k->copies[op->traffic] |= !op->empty;
        bool head = !seen[queue];
        seen[queue] = true;
        if (head && !op->empty && first[op->traffic] == NULL &&
            gates_open(ops, sim->sessions[session]->page, op)) {
            first[op->traffic] = op;
        }
    }
}

/* Bytes under way of class c and those below it. */
static uint64_t inflight_from(struct sim *sim, const struct sim_device *d, uint32_t c) {
    uint64_t bytes = 0;
    for (uint32_t tag = 0; tag < 2 * SIM_INFLIGHT_MAX; tag++) {
        const struct sim_copy *copy = &d->copies[tag];
        if (copy->used && sim_order_find(sim, copy->session, copy->op)->traffic >= c) {
            bytes += copy->copy.bytes;
        }
    }
    return bytes;
}

/* The class that has something to copy and lets none below it go, since these have their part under
 * way; SIM_CLASSES: there is none. */
static uint32_t holding_class(struct sim *sim, const struct sim_device *d,
                              const struct classes *k) {
    for (uint32_t c = 0; c < SIM_CLASSES && d->inflight_bytes != 0; c++) {
        if (k->copies[c] &&
            KVT_ISSUER_LOWER_PART * inflight_from(sim, d, c + 1) >= d->inflight_bytes) {
            return c;
        }
    }
    return SIM_CLASSES;
}

/* What the classes above the one that goes have had meanwhile. */
static void check_classes(struct sim *sim, struct sim_device *d, const struct sim_op *op,
                          const struct classes *k, uint64_t bytes) {
    const bool *is_open = k->is_open;
    uint64_t most = KVT_ISSUER_PATIENCE * d->quantum_bytes;
    uint32_t holding = holding_class(sim, d, k);
    if (op->traffic > holding) {
        sim_fail(sim,
                 "order: an operation of class %u goes: of %llu bytes that may be under way "
                 "classes below %u, which has something to copy, have %llu",
                 op->traffic, (ull)d->inflight_bytes, holding,
                 (ull)inflight_from(sim, d, holding + 1));
    }
    if (d->inflight_bytes != 0 && inflight_from(sim, d, 0) >= d->inflight_bytes) {
        sim_fail(sim, "order: a copy goes, though %llu bytes are under way already",
                 (ull)inflight_from(sim, d, 0));
    }
    for (uint32_t c = 0; c < op->traffic; c++) {
        if (is_open[c] && d->passed_bytes[op->traffic] < most) {
            sim_fail(sim, "order: an operation of class %u goes, while one of class %u is open",
                     op->traffic, c);
        }
    }
    uint64_t owed = KVT_ISSUER_PATIENCE * bytes;
    d->passed_bytes[op->traffic] -=
        owed < d->passed_bytes[op->traffic] ? owed : d->passed_bytes[op->traffic];
    for (uint32_t c = op->traffic + 1; c < SIM_CLASSES; c++) {
        if (is_open[c] && c <= holding && d->passed_bytes[c] >= most) {
            sim_fail(sim, "order: class %u waits though %llu bytes of higher ones have gone", c,
                     (ull)d->passed_bytes[c]);
        }
        d->passed_bytes[c] = is_open[c] ? d->passed_bytes[c] + bytes : 0;
    }
}

void sim_order_issue(struct sim *sim, uint32_t device, const struct kvt_issue *issue) {
    struct sim_op *op = sim_order_find(sim, issue->session, issue->op);
    if (!op || issue->copy.bytes > op->left_bytes) {
        sim_fail(sim, "session %u: a copy of operation %llu, which has none left", issue->session,
                 (ull)issue->op);
    }
    struct classes k = {{false}, {false}};
    for (uint32_t s = 0; s < SIM_SESSIONS_MAX; s++) {
        const struct sim_worker *w = sim->sessions[s];
        const struct sim_op *first[SIM_CLASSES] = {NULL};
        if (!w || w->device != device || sim->ops[s].closed) {
            continue;
        }
        open_ops(sim, s, first, &k);
        const struct sim_op *own = first[op->traffic];
        if (s == issue->session && own && own->id < op->id) {
            sim_fail(sim, "order: session %u: operation %llu goes, while %llu of its class is open",
                     s, (ull)op->id, (ull)own->id);
        }
        for (uint32_t c = 0; c < SIM_CLASSES; c++) {
            k.is_open[c] |= first[c] != NULL;
        }
    }
    check_classes(sim, &sim->devices[device], op, &k, issue->copy.bytes);
    op->begun = true;
    op->left_bytes -= issue->copy.bytes;
}
