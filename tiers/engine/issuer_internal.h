/* The issuer's own structures: what issuer.c, issuer_op.c and issuer_next.c share, and nobody else
 * includes.
 *
 * An operation is in the queue of its slot (or of its kind) until all of it is submitted, then in
 * flight until its copies have come back, then in the list of completions until it is collected.
 * So the head of each queue is the only one whose gates are looked at, and whether what it waits
 * for is complete is found in the session's set of outstanding ids.
 */
#ifndef KVT_ENGINE_ISSUER_INTERNAL_H
#define KVT_ENGINE_ISSUER_INTERNAL_H

#include "tiers/engine/engine.h"
#include "tiers/engine/issuer.h"
#include "tiers/engine/outstanding.h"
#include "tiers/engine/progress.h"

enum { QUEUE_COPY = KVT_SLOTS_MAX, QUEUE_STEP, QUEUES };
enum { CLASSES = KVT_CLASS_BACKGROUND + 1 };

struct kvt_op_list {
    struct kvt_op_progress *head;
    struct kvt_op_progress *tail;
};

/* A write-back or copy that did not bring what it should: what waits for it may not go on. */
struct kvt_op_loss {
    uint64_t op;
    uint64_t last; /* operations above this were submitted when it was known */
};

#define KVT_LOSSES_MAX 16

struct kvt_issuer_session {
    const struct kvt_control_page *page; /* borrowed; NULL: not open */
    bool closed;                         /* and not drained yet */
    struct kvt_outstanding outstanding;
    struct kvt_op_loss losses[KVT_LOSSES_MAX];
    uint32_t losses_count;
    uint64_t lost_up_to; /* more than that were lost: what waits for anything, up to this operation,
                            may not go on; 0: none */
    uint64_t ops_left;   /* taken over, completion not collected */
    struct kvt_op_list queues[QUEUES];
    uint64_t slots_filled;     /* bit q: the queue of slot q is not empty */
    uint64_t queued[CLASSES];  /* operations in queues */
    uint64_t copying[CLASSES]; /* those of them that copy something */
    uint64_t deficit_bytes[CLASSES];
};

/* A cut, or a post behind cuts, that is submitted and not completed; its index is the tag. */
struct kvt_issuer_flight {
    struct kvt_op_progress *progress; /* NULL: the tag is free */
    uint64_t bytes;
    bool is_post;
    uint32_t free_next;
};

struct kvt_issuer {
    struct kvt_issuer_config config;
    uint64_t broken_rules;
    struct kvt_issuer_session *sessions;
    uint32_t *opened; /* sessions that are open, or closed and not drained; in no order */
    uint32_t opened_count;
    /* The open operation of each session with the smallest id, by class; NULL: none; and how many
     * sessions have one. Filled and used inside one call. */
    struct kvt_op_progress **candidates[CLASSES];
    uint32_t candidates_count[CLASSES];
    uint64_t copying[CLASSES];         /* of all sessions; likewise */
    uint64_t passed_bytes[CLASSES];    /* of higher classes, while this one waited to go */
    uint32_t turn[CLASSES];            /* session whose turn it is in the round-robin */
    struct kvt_issuer_flight *flights; /* inflight_max cuts, and as many posts */
    uint32_t flight_free;              /* first free tag */
    uint32_t cuts_inflight;
    uint64_t bytes_inflight[CLASSES];
    uint32_t posts_inflight;
    struct kvt_op_list posts;
    struct kvt_op_list completions;
    struct kvt_program *programs;
};

/* ---- issuer_op.c: lists, and the end of an operation ------------------------------------------ */

void kvt_op_list_append(struct kvt_op_list *l, struct kvt_op_progress *p);
struct kvt_op_progress *kvt_op_list_take(struct kvt_op_list *l); /* NULL: it is empty */
struct kvt_issuer_session *kvt_issuer_session_of(struct kvt_issuer *i,
                                                 const struct kvt_op_progress *p);

/* Puts it into, takes it as the head out of, the queue of its slot or kind. */
void kvt_op_enqueue(struct kvt_issuer_session *s, struct kvt_op_progress *p);
void kvt_op_dequeue(struct kvt_issuer_session *s, struct kvt_op_progress *p);
/* It was taken out of a queue otherwise. */
void kvt_op_unqueued(struct kvt_issuer_session *s, struct kvt_op_progress *p);
/* Queue q has become filled or empty. */
void kvt_issuer_note_filled(struct kvt_issuer_session *s, uint32_t q);

/* Remembers that a write-back or copy did not bring its bytes. */
void kvt_op_lose(struct kvt_issuer_session *s, const struct kvt_op *op);
/* It is in no queue, and nothing of it is in flight: hands its completion over. */
void kvt_op_complete(struct kvt_issuer *i, struct kvt_op_progress *p,
                     enum kvt_completion_status status);
/* Something changed with an operation that is in no queue any more: posts, completes, or waits. */
void kvt_op_settle(struct kvt_issuer *i, struct kvt_op_progress *p);
/* Submits nothing more of it. */
void kvt_op_fail(struct kvt_issuer *i, struct kvt_op_progress *p);

/* ---- issuer_next.c ----------------------------------------------------------------------------- */

/* Takes the tag back. */
struct kvt_issuer_flight kvt_issuer_flight_end(struct kvt_issuer *i, uint32_t tag);

#endif
