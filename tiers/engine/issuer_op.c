/* What happens to an operation: into a queue, out of it, and to its end. */
#include "tiers/engine/assert.h"
#include "tiers/engine/issuer_internal.h"

/* ---- lists ----------------------------------------------------------------------------------- */

void kvt_op_list_append(struct kvt_op_list *l, struct kvt_op_progress *p) {
    p->next = NULL;
    if (l->tail) {
        l->tail->next = p;
    } else {
        l->head = p;
    }
    l->tail = p;
}

struct kvt_op_progress *kvt_op_list_take(struct kvt_op_list *l) {
    struct kvt_op_progress *p = l->head;
    if (p) {
        l->head = p->next;
        if (!l->head) {
            l->tail = NULL;
        }
        p->next = NULL;
    }
    return p;
}

struct kvt_issuer_session *kvt_issuer_session_of(struct kvt_issuer *i,
                                                 const struct kvt_op_progress *p) {
    return &i->sessions[p->program->session];
}

static uint32_t queue_of(const struct kvt_op *op) {
    if (op->kind == KVT_OP_COPY) {
        return QUEUE_COPY;
    }
    return op->kind == KVT_OP_STEP ? (uint32_t)QUEUE_STEP : op->slot;
}

void kvt_issuer_note_filled(struct kvt_issuer_session *s, uint32_t q) {
    if (q < KVT_SLOTS_MAX) {
        uint64_t bit = UINT64_C(1) << q;
        s->slots_filled = s->queues[q].head ? s->slots_filled | bit : s->slots_filled & ~bit;
    }
}

void kvt_op_enqueue(struct kvt_issuer_session *s, struct kvt_op_progress *p) {
    uint32_t q = queue_of(p->op);
    kvt_op_list_append(&s->queues[q], p);
    kvt_issuer_note_filled(s, q);
    s->queued[p->op->traffic]++;
    s->copying[p->op->traffic] += p->op->copy_count > 0;
    p->queued = true;
}

void kvt_op_unqueued(struct kvt_issuer_session *s, struct kvt_op_progress *p) {
    s->queued[p->op->traffic]--;
    s->copying[p->op->traffic] -= p->op->copy_count > 0;
    p->queued = false;
}

void kvt_op_dequeue(struct kvt_issuer_session *s, struct kvt_op_progress *p) {
    uint32_t q = queue_of(p->op);
    struct kvt_op_progress *head = kvt_op_list_take(&s->queues[q]);
    KVT_ASSERT(head == p);
    kvt_issuer_note_filled(s, q);
    kvt_op_unqueued(s, p);
}

/* ---- the end of an operation ----------------------------------------------------------------- */

void kvt_op_complete(struct kvt_issuer *i, struct kvt_op_progress *p,
                     enum kvt_completion_status status) {
    KVT_ASSERT(!p->queued);
    KVT_ASSERT(!p->post_due);
    KVT_ASSERT(!p->post_inflight);
    KVT_ASSERT(p->cuts_inflight == 0);
    p->status = (uint8_t)status;
    kvt_outstanding_remove(&kvt_issuer_session_of(i, p)->outstanding, p->op->id);
    kvt_op_list_append(&i->completions, p);
}

void kvt_op_lose(struct kvt_issuer_session *s, const struct kvt_op *op) {
    if (op->kind != KVT_OP_WRITEBACK && op->kind != KVT_OP_COPY) {
        return; /* a fill's bytes are waited for by `done` only */
    }
    uint32_t kept = 0;
    for (uint32_t n = 0; n < s->losses_count; n++) {
        if (s->losses[n].last >= s->outstanding.base) {
            s->losses[kept++] = s->losses[n];
        }
    }
    s->losses_count = kept;
    if (kept == KVT_LOSSES_MAX) {
        s->lost_up_to = s->outstanding.last;
        return;
    }
    s->losses[s->losses_count++] = (struct kvt_op_loss){.op = op->id, .last = s->outstanding.last};
}

void kvt_op_settle(struct kvt_issuer *i, struct kvt_op_progress *p) {
    KVT_ASSERT(!p->queued);
    if (p->post_due) {
        return;
    }
    if (p->op->kind == KVT_OP_FILL && !p->posted && !p->failed) {
        if (kvt_issuer_session_of(i, p)->closed) {
            p->failed = true;
        } else if (i->config.post_behind || p->cuts_inflight == 0) {
            p->post_due = true;
            kvt_op_list_append(&i->posts, p);
            return;
        }
    }
    if (p->cuts_inflight == 0 && !p->post_inflight) {
        if (p->failed) {
            kvt_op_lose(kvt_issuer_session_of(i, p), p->op);
        }
        kvt_op_complete(i, p, p->failed ? KVT_FAILED : KVT_DONE);
    }
}

void kvt_op_fail(struct kvt_issuer *i, struct kvt_op_progress *p) {
    p->failed = true;
    if (p->queued) {
        kvt_op_dequeue(kvt_issuer_session_of(i, p), p);
    }
    kvt_op_settle(i, p);
}
