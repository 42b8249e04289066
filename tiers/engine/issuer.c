/* The issuer: its life, what it is told, and what it tells. The contract is in issuer.h, what an
 * operation goes through in issuer_internal.h.
 */
#include "tiers/engine/issuer.h"

#include "tiers/engine/assert.h"
#include "tiers/engine/issuer_internal.h"

#include <stdlib.h>

/* ---- life ------------------------------------------------------------------------------------ */

int kvt_issuer_create(const struct kvt_issuer_config *config, struct kvt_issuer **out) {
    KVT_ASSERT(config->sessions_max > 0);
    KVT_ASSERT(config->inflight_max > 0);
    KVT_ASSERT(config->cut_bytes > 0);
    KVT_ASSERT(config->quantum_bytes > 0);
    struct kvt_issuer *i = calloc(1, sizeof(*i));
    if (!i) {
        return -KVT_ENOMEM;
    }
    i->config = *config;
    i->sessions = calloc(config->sessions_max, sizeof(*i->sessions));
    i->opened = calloc(config->sessions_max, sizeof(*i->opened));
    i->flights = calloc(2 * (size_t)config->inflight_max, sizeof(*i->flights));
    bool ok = i->sessions && i->opened && i->flights;
    for (uint32_t c = 0; c < CLASSES; c++) {
        i->candidates[c] = calloc(config->sessions_max, sizeof(struct kvt_op_progress *));
        ok = ok && i->candidates[c];
    }
    if (!ok) {
        kvt_issuer_free(i);
        return -KVT_ENOMEM;
    }
    for (uint32_t t = 0; t < 2 * config->inflight_max; t++) {
        i->flights[t].free_next = t + 1;
    }
    *out = i;
    return 0;
}

void kvt_issuer_free(struct kvt_issuer *i) {
    if (!i) {
        return;
    }
    while (i->programs) {
        struct kvt_program *p = i->programs;
        i->programs = p->next;
        kvt_program_free(p);
    }
    for (uint32_t n = 0; n < i->opened_count; n++) {
        kvt_outstanding_clear(&i->sessions[i->opened[n]].outstanding);
    }
    for (uint32_t c = 0; c < CLASSES; c++) {
        free(i->candidates[c]);
    }
    free(i->flights);
    free(i->opened);
    free(i->sessions);
    free(i);
}

void kvt_issuer_break_rules(struct kvt_issuer *i, uint64_t rules) {
    i->broken_rules = rules;
}

static void keep_program(struct kvt_issuer *i, struct kvt_program *p) {
    p->previous = NULL;
    p->next = i->programs;
    if (p->next) {
        p->next->previous = p;
    }
    i->programs = p;
}

static void drop_program(struct kvt_issuer *i, struct kvt_program *p) {
    if (p->next) {
        p->next->previous = p->previous;
    }
    if (p->previous) {
        p->previous->next = p->next;
    } else {
        i->programs = p->next;
    }
    kvt_program_free(p);
}

/* ---- what is told to the issuer -------------------------------------------------------------- */

void kvt_issuer_session_open(struct kvt_issuer *i, uint32_t session,
                             const struct kvt_control_page *page) {
    KVT_ASSERT(session < i->config.sessions_max);
    KVT_ASSERT(page != NULL);
    struct kvt_issuer_session *s = &i->sessions[session];
    KVT_ASSERT(s->page == NULL);
    *s = (struct kvt_issuer_session){.page = page};
    i->opened[i->opened_count++] = session;
}

/* Completes as cancelled what was not begun. In the last of the queue comes the largest id. */
static void cancel_queue(struct kvt_issuer *i, struct kvt_issuer_session *s, uint32_t q,
                         uint64_t first_op) {
    struct kvt_op_list all = s->queues[q];
    s->queues[q] = (struct kvt_op_list){0};
    for (struct kvt_op_progress *p = kvt_op_list_take(&all); p; p = kvt_op_list_take(&all)) {
        kvt_op_unqueued(s, p);
        if (p->begun || p->op->id < first_op) {
            kvt_op_enqueue(s, p);
        } else {
            kvt_op_complete(i, p, KVT_CANCELLED);
        }
    }
    kvt_issuer_note_filled(s, q);
}

void kvt_issuer_cancel(struct kvt_issuer *i, uint32_t session, uint64_t first_op) {
    KVT_ASSERT(session < i->config.sessions_max);
    struct kvt_issuer_session *s = &i->sessions[session];
    KVT_ASSERT(s->page != NULL);
    for (uint32_t q = 0; q < QUEUES; q++) {
        cancel_queue(i, s, q, first_op);
    }
}

/* Posts of a closed session are not issued any more. */
static void drop_posts(struct kvt_issuer *i, uint32_t session) {
    struct kvt_op_list all = i->posts;
    i->posts = (struct kvt_op_list){0};
    for (struct kvt_op_progress *p = kvt_op_list_take(&all); p; p = kvt_op_list_take(&all)) {
        if (p->program->session == session) {
            p->post_due = false;
            kvt_op_fail(i, p);
        } else {
            kvt_op_list_append(&i->posts, p);
        }
    }
}

void kvt_issuer_session_close(struct kvt_issuer *i, uint32_t session) {
    kvt_issuer_cancel(i, session, 0);
    struct kvt_issuer_session *s = &i->sessions[session];
    KVT_ASSERT(!s->closed);
    s->closed = true;
    for (uint32_t q = 0; q < QUEUES; q++) {
        if (s->queues[q].head) {
            kvt_op_fail(i, s->queues[q].head); /* the head alone can be begun */
        }
    }
    drop_posts(i, session);
}

static void check_op(const struct kvt_program *p, const struct kvt_op *op) {
    KVT_ASSERT(op->kind >= KVT_OP_FILL && op->kind <= KVT_OP_STEP);
    KVT_ASSERT(op->traffic < CLASSES);
    KVT_ASSERT(op->slot < KVT_SLOTS_MAX);
    KVT_ASSERT(op->copy_first <= p->copy_count);
    KVT_ASSERT(op->copy_count <= p->copy_count - op->copy_first);
    KVT_ASSERT(op->dep_first <= p->dep_count);
    KVT_ASSERT(op->dep_count <= p->dep_count - op->dep_first);
    KVT_ASSERT(op->kind != KVT_OP_STEP || op->copy_count == 0);
}

void kvt_issuer_submit(struct kvt_issuer *i, struct kvt_program *p) {
    KVT_ASSERT(p->session < i->config.sessions_max);
    struct kvt_issuer_session *s = &i->sessions[p->session];
    KVT_ASSERT(s->page != NULL);
    KVT_ASSERT(!s->closed);
    if (p->op_count == 0) {
        kvt_program_free(p);
        return;
    }
    keep_program(i, p);
    if (p->window_capacity > s->outstanding.capacity) {
        kvt_outstanding_move(&s->outstanding, p->window, p->window_capacity);
        p->window = NULL;
    }
    p->ops_left = p->op_count;
    s->ops_left += p->op_count;
    for (uint32_t n = 0; n < p->op_count; n++) {
        const struct kvt_op *op = &p->ops[n];
        check_op(p, op);
        kvt_outstanding_add(&s->outstanding, op->id);
        p->progress[n] = (struct kvt_op_progress){.program = p, .op = op};
        kvt_op_enqueue(s, &p->progress[n]);
    }
}

void kvt_issuer_copied(struct kvt_issuer *i, uint32_t tag, bool ok) {
    KVT_ASSERT(tag < 2 * i->config.inflight_max);
    KVT_ASSERT(i->flights[tag].progress != NULL);
    struct kvt_issuer_flight f = kvt_issuer_flight_end(i, tag);
    struct kvt_op_progress *p = f.progress;
    if (f.is_post) {
        p->post_inflight = false;
    } else {
        KVT_ASSERT(p->cuts_inflight > 0);
        p->cuts_inflight--;
        p->bytes += ok ? f.bytes : 0;
    }
    if (!ok) {
        kvt_op_fail(i, p);
    } else if (!p->queued) {
        kvt_op_settle(i, p);
    }
}

/* ---- what the issuer tells ------------------------------------------------------------------- */

bool kvt_issuer_completion(struct kvt_issuer *i, struct kvt_completion *out) {
    struct kvt_op_progress *p = kvt_op_list_take(&i->completions);
    if (!p) {
        return false;
    }
    *out = (struct kvt_completion){
        .session = p->program->session, .status = p->status, .op = p->op->id, .bytes = p->bytes};
    kvt_issuer_session_of(i, p)->ops_left--;
    if (--p->program->ops_left == 0) {
        drop_program(i, p->program);
    }
    return true;
}

bool kvt_issuer_session_drained(struct kvt_issuer *i, uint32_t *session) {
    for (uint32_t n = 0; n < i->opened_count; n++) {
        struct kvt_issuer_session *s = &i->sessions[i->opened[n]];
        if (s->closed && s->ops_left == 0) {
            *session = i->opened[n];
            i->opened[n] = i->opened[--i->opened_count];
            for (uint32_t c = 0; c < CLASSES; c++) {
                i->candidates[c][*session] = NULL;
            }
            kvt_outstanding_clear(&s->outstanding);
            *s = (struct kvt_issuer_session){0};
            return true;
        }
    }
    return false;
}
