/* The order in which a copy thread issues, looked at from outside: a second, slow opinion on which
 * operations are open. When a copy goes, no operation of a higher class may be open in any session
 * of the device, and none of the same session and class that is used earlier (docs/STEP.md, rules 22
 * and 23). Whether the gates themselves are right is told by the bytes, not here.
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
        ops->count++;
    }
}

void sim_order_completion(struct sim *sim, const struct kvt_completion *c) {
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
    }
    uint32_t at = (uint32_t)(op - ops->op);
    free(op->deps);
    ops->count--;
    memmove(op, op + 1, (ops->count - at) * sizeof(*op));
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

/* The first operation of the session, and of a class up to `traffic`, that is open and might have
 * gone instead of `issued`; NULL: none. */
static const struct sim_op *better(struct sim *sim, uint32_t session, uint32_t issuing,
                                   const struct sim_op *issued) {
    struct sim_ops *ops = &sim->ops[session];
    bool seen[QUEUES] = {false};
    for (uint32_t i = 0; i < ops->count; i++) {
        const struct sim_op *op = &ops->op[i];
        uint32_t queue = op->kind == KVT_OP_COPY ? QUEUE_COPY : op->slot;
        if (op->kind == KVT_OP_STEP || op->failed || (op->left_bytes == 0 && !op->empty)) {
            continue; /* all of it is submitted: it holds back nobody */
        }
        bool head = !seen[queue];
        seen[queue] = true;
        bool before = op->traffic < issued->traffic ||
                      (session == issuing && op->traffic == issued->traffic && op->id < issued->id);
        if (head && before && !op->empty && gates_open(ops, sim->sessions[session]->page, op)) {
            return op;
        }
    }
    return NULL;
}

void sim_order_issue(struct sim *sim, uint32_t device, const struct kvt_issue *issue) {
    struct sim_op *op = sim_order_find(sim, issue->session, issue->op);
    if (!op || issue->copy.bytes > op->left_bytes) {
        sim_fail(sim, "session %u: a copy of operation %llu, which has none left", issue->session,
                 (ull)issue->op);
    }
    for (uint32_t s = 0; s < SIM_SESSIONS_MAX; s++) {
        const struct sim_worker *w = sim->sessions[s];
        if (!w || w->device != device || sim->ops[s].closed) {
            continue;
        }
        const struct sim_op *other = better(sim, s, issue->session, op);
        if (other) {
            sim_fail(sim,
                     "order: session %u: operation %llu of class %u goes, while %llu of class %u "
                     "of session %u is open",
                     issue->session, (ull)op->id, op->traffic, (ull)other->id, other->traffic, s);
        }
    }
    op->begun = true;
    op->left_bytes -= issue->copy.bytes;
}
