/* The issuer; its contract is in issuer.h.
 *
 * An operation is in the queue of its slot (or of its kind) until all of it is submitted, then in
 * flight until its copies have come back, then in the list of completions until it is collected.
 * So the head of each queue is the only one whose gates are looked at, and whether what it waits
 * for is complete is found in the session's set of outstanding ids.
 */
#include "tiers/engine/issuer.h"

#include "tiers/engine/assert.h"
#include "tiers/engine/engine.h"
#include "tiers/engine/mutants.h"
#include "tiers/engine/outstanding.h"
#include "tiers/engine/progress.h"

#include <stdlib.h>

enum { QUEUE_COPY = KVT_SLOTS_MAX, QUEUE_STEP, QUEUES };
enum { CLASSES = KVT_CLASS_BACKGROUND + 1 };

struct list {
    struct kvt_op_progress *head;
    struct kvt_op_progress *tail;
};

/* A write-back or copy that did not bring what it should: what waits for it may not go on. */
struct loss {
    uint64_t op;
    uint64_t last; /* operations above this were submitted when it was known */
};

struct session {
    const struct kvt_control_page *page; /* borrowed; NULL: not open */
    bool closed;                         /* and not drained yet */
    struct kvt_outstanding outstanding;
    struct loss *losses; /* owned */
    uint32_t losses_count;
    uint32_t losses_room;
    uint64_t ops_left; /* taken over, completion not collected */
    struct list queues[QUEUES];
    uint64_t slots_filled;    /* bit q: the queue of slot q is not empty */
    uint64_t queued[CLASSES]; /* operations in queues */
    uint64_t deficit_bytes[CLASSES];
};

/* A cut, or a post behind cuts, that is submitted and not completed; its index is the tag. */
struct flight {
    struct kvt_op_progress *progress; /* NULL: the tag is free */
    uint64_t bytes;
    bool is_post;
    uint32_t free_next;
};

struct kvt_issuer {
    struct kvt_issuer_config config;
    uint64_t broken_rules;
    struct session *sessions;
    uint32_t *opened; /* sessions that are open, or closed and not drained; in no order */
    uint32_t opened_count;
    /* The open operation of each session with the smallest id, by class; NULL: none. Filled and
     * used inside one call. */
    struct kvt_op_progress **candidates[CLASSES];
    uint32_t turn[CLASSES]; /* session whose turn it is in the round-robin */
    struct flight *flights; /* inflight_max cuts, and as many posts */
    uint32_t flight_free;   /* first free tag */
    uint32_t cuts_inflight;
    uint32_t posts_inflight;
    struct list posts;
    struct list completions;
    struct kvt_program *programs;
};

/* ---- lists ----------------------------------------------------------------------------------- */

static void list_append(struct list *l, struct kvt_op_progress *p) {
    p->next = NULL;
    if (l->tail) {
        l->tail->next = p;
    } else {
        l->head = p;
    }
    l->tail = p;
}

static struct kvt_op_progress *list_take(struct list *l) {
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

static struct session *session_of(struct kvt_issuer *i, const struct kvt_op_progress *p) {
    return &i->sessions[p->program->session];
}

static uint32_t queue_of(const struct kvt_op *op) {
    if (op->kind == KVT_OP_COPY) {
        return QUEUE_COPY;
    }
    return op->kind == KVT_OP_STEP ? (uint32_t)QUEUE_STEP : op->slot;
}

static void note_filled(struct session *s, uint32_t q) {
    if (q < KVT_SLOTS_MAX) {
        uint64_t bit = UINT64_C(1) << q;
        s->slots_filled = s->queues[q].head ? s->slots_filled | bit : s->slots_filled & ~bit;
    }
}

static void enqueue(struct session *s, struct kvt_op_progress *p) {
    uint32_t q = queue_of(p->op);
    list_append(&s->queues[q], p);
    note_filled(s, q);
    s->queued[p->op->traffic]++;
    p->queued = true;
}

static void dequeue(struct session *s, struct kvt_op_progress *p) {
    uint32_t q = queue_of(p->op);
    struct kvt_op_progress *head = list_take(&s->queues[q]);
    KVT_ASSERT(head == p);
    note_filled(s, q);
    s->queued[p->op->traffic]--;
    p->queued = false;
}

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
        free(i->sessions[i->opened[n]].losses);
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

/* ---- the end of an operation ----------------------------------------------------------------- */

static void complete(struct kvt_issuer *i, struct kvt_op_progress *p,
                     enum kvt_completion_status status) {
    KVT_ASSERT(!p->queued);
    KVT_ASSERT(!p->post_due);
    KVT_ASSERT(!p->post_inflight);
    KVT_ASSERT(p->cuts_inflight == 0);
    p->status = (uint8_t)status;
    kvt_outstanding_remove(&session_of(i, p)->outstanding, p->op->id);
    list_append(&i->completions, p);
}

static void lose(struct session *s, const struct kvt_op *op) {
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
    if (kept == s->losses_room) {
        s->losses_room = kept == 0 ? 8 : kept * 2;
        s->losses = realloc(s->losses, s->losses_room * sizeof(*s->losses));
        KVT_ASSERT(s->losses != NULL);
    }
    s->losses[s->losses_count++] = (struct loss){.op = op->id, .last = s->outstanding.last};
}

/* Something changed with an operation that is in no queue any more: post, complete, or wait. */
static void settle(struct kvt_issuer *i, struct kvt_op_progress *p) {
    KVT_ASSERT(!p->queued);
    if (p->post_due) {
        return;
    }
    if (p->op->kind == KVT_OP_FILL && !p->posted && !p->failed) {
        if (session_of(i, p)->closed) {
            p->failed = true;
        } else if (i->config.post_behind || p->cuts_inflight == 0) {
            p->post_due = true;
            list_append(&i->posts, p);
            return;
        }
    }
    if (p->cuts_inflight == 0 && !p->post_inflight) {
        if (p->failed) {
            lose(session_of(i, p), p->op);
        }
        complete(i, p, p->failed ? KVT_FAILED : KVT_DONE);
    }
}

/* Submits nothing more of it. */
static void fail(struct kvt_issuer *i, struct kvt_op_progress *p) {
    p->failed = true;
    if (p->queued) {
        dequeue(session_of(i, p), p);
    }
    settle(i, p);
}

/* ---- gates ----------------------------------------------------------------------------------- */

static bool deps_complete(const struct session *s, struct kvt_op_progress *p) {
    const uint64_t *deps = &p->program->deps[p->op->dep_first];
    while (p->deps_seen < p->op->dep_count) {
        if (!kvt_outstanding_complete(&s->outstanding, deps[p->deps_seen])) {
            return false;
        }
        p->deps_seen++;
    }
    return true;
}

/* Whether one of the dependencies, which are complete, did not bring what it should. */
static bool deps_lost(const struct session *s, const struct kvt_op_progress *p) {
    for (uint32_t n = 0; n < s->losses_count; n++) {
        for (uint32_t d = 0; d < p->op->dep_count && p->op->id <= s->losses[n].last; d++) {
            if (p->program->deps[p->op->dep_first + d] == s->losses[n].op) {
                return true;
            }
        }
    }
    return false;
}

/* The counter that the operation waits for, if it has not come yet; NULL: that gate is open. */
static const struct kvt_counter *counter_missing(const struct kvt_issuer *i,
                                                 const struct session *s, const struct kvt_op *op) {
    uint64_t broken = i->broken_rules;
    const struct kvt_counter *counter = &s->page->done[op->slot];
    uint64_t wanted = op->generation;
    switch (op->kind) {
    case KVT_OP_FILL:
        if (op->done_wait == 0 || KVT_BROKEN(broken, KVT_BREAK_FILL_IGNORES_DONE)) {
            return NULL;
        }
        wanted = op->done_wait;
        break;
    case KVT_OP_WRITEBACK:
        if (KVT_BROKEN(broken, KVT_BREAK_WRITEBACK_IGNORES_DONE)) {
            return NULL;
        }
        break;
    case KVT_OP_STEP:
        if (KVT_BROKEN(broken, KVT_BREAK_COMMIT_IGNORES_STEP)) {
            return NULL;
        }
        counter = &s->page->step;
        return kvt_counter_reached(__atomic_load_n(&counter->value, __ATOMIC_ACQUIRE),
                                   op->step_wait)
                   ? NULL
                   : counter;
    default:
        return NULL;
    }
    return __atomic_load_n(&counter->value, __ATOMIC_ACQUIRE) == wanted ? NULL : counter;
}

/* ---- submitting ------------------------------------------------------------------------------ */

/* The copy that is next to be cut; NULL: all are submitted. */
static const struct kvt_copy *copy_next(struct kvt_op_progress *p) {
    while (p->copies_begun < p->op->copy_count) {
        const struct kvt_copy *c = &p->program->copies[p->op->copy_first + p->copies_begun];
        if (p->cut_offset < c->bytes) {
            return c;
        }
        p->copies_begun++;
        p->cut_offset = 0;
    }
    return NULL;
}

static uint64_t cut_bytes_next(const struct kvt_issuer *i, struct kvt_op_progress *p) {
    uint64_t left = copy_next(p)->bytes - p->cut_offset;
    return left < i->config.cut_bytes ? left : i->config.cut_bytes;
}

/* Finds what each session could submit, and completes on the way what is open and has nothing to
 * copy. Returns whether there was any: then the operations behind it are to be looked at too. */
static bool look_at_queue(struct kvt_issuer *i, uint32_t session, uint32_t q) {
    struct session *s = &i->sessions[session];
    struct kvt_op_progress *p = s->queues[q].head;
    if (!p || (!p->begun && !deps_complete(s, p))) {
        return false;
    }
    if (!p->begun && p->op->kind != KVT_OP_STEP && deps_lost(s, p)) {
        dequeue(s, p);
        lose(s, p->op);
        complete(i, p, KVT_CANCELLED);
        return true;
    }
    if (!p->begun && counter_missing(i, s, p->op)) {
        return false;
    }
    if (!copy_next(p)) {
        p->begun = true;
        dequeue(s, p);
        settle(i, p);
        return true;
    }
    struct kvt_op_progress **best = &i->candidates[p->op->traffic][session];
    if (!*best || p->op->id < (*best)->op->id) {
        *best = p;
    }
    return false;
}

static bool look_at_session(struct kvt_issuer *i, uint32_t session) {
    struct session *s = &i->sessions[session];
    bool changed = false;
    for (uint32_t c = 0; c < CLASSES; c++) {
        i->candidates[c][session] = NULL;
        if (s->queued[c] == 0) {
            s->deficit_bytes[c] = 0;
        }
    }
    for (uint64_t slots = s->slots_filled; slots != 0; slots &= slots - 1) {
        changed |= look_at_queue(i, session, (uint32_t)__builtin_ctzll(slots));
    }
    changed |= look_at_queue(i, session, QUEUE_COPY);
    changed |= look_at_queue(i, session, QUEUE_STEP);
    return changed;
}

static void turn_begins(struct kvt_issuer *i, uint32_t c, uint32_t session) {
    uint64_t most = i->config.quantum_bytes + i->config.cut_bytes;
    uint64_t *deficit = &i->sessions[session].deficit_bytes[c];
    *deficit += i->config.quantum_bytes;
    *deficit = *deficit < most ? *deficit : most;
    i->turn[c] = session;
}

/* Deficit round-robin among the sessions that have a candidate in class c; NULL: none has. */
static struct kvt_op_progress *pick(struct kvt_issuer *i, uint32_t c) {
    struct kvt_op_progress **candidates = i->candidates[c];
    uint32_t sessions_max = i->config.sessions_max;
    uint32_t any = 0;
    for (uint32_t n = 0; n < i->opened_count; n++) {
        any += candidates[i->opened[n]] != NULL;
    }
    for (uint32_t session = i->turn[c]; any != 0; session = (session + 1) % sessions_max) {
        struct kvt_op_progress *p = candidates[session];
        if (!p) {
            continue;
        }
        if (session != i->turn[c]) {
            turn_begins(i, c, session);
        }
        uint64_t bytes = cut_bytes_next(i, p);
        uint64_t *deficit = &i->sessions[session].deficit_bytes[c];
        while (any == 1 && *deficit < bytes) {
            turn_begins(i, c, session); /* nobody to take turns with */
        }
        if (*deficit >= bytes) {
            *deficit -= bytes;
            return p;
        }
    }
    return NULL;
}

static uint32_t stream_of(const struct kvt_copy *c) {
    return c->source.tier == KVT_TIER_GPU && c->target.tier != KVT_TIER_GPU;
}

static uint32_t flight_begin(struct kvt_issuer *i, struct flight f) {
    uint32_t tag = i->flight_free;
    i->flight_free = i->flights[tag].free_next;
    i->flights[tag] = f;
    i->cuts_inflight += !f.is_post;
    i->posts_inflight += f.is_post;
    return tag;
}

static struct flight flight_end(struct kvt_issuer *i, uint32_t tag) {
    struct flight f = i->flights[tag];
    i->cuts_inflight -= !f.is_post;
    i->posts_inflight -= f.is_post;
    i->flights[tag] = (struct flight){.free_next = i->flight_free};
    i->flight_free = tag;
    return f;
}

static void issue_post(struct kvt_issuer *i, struct kvt_op_progress *p, struct kvt_issue *out) {
    KVT_ASSERT(!p->posted);
    p->posted = true;
    *out = (struct kvt_issue){.is_post = 1,
                              .session = p->program->session,
                              .slot = p->op->slot,
                              .value = p->op->generation};
    if (i->config.post_behind) {
        p->post_inflight = true;
        out->tag = flight_begin(i, (struct flight){.progress = p, .is_post = true});
    }
}

static void issue_cut(struct kvt_issuer *i, struct kvt_op_progress *p, struct kvt_issue *out) {
    uint64_t bytes = cut_bytes_next(i, p);
    const struct kvt_copy *c = copy_next(p);
    *out =
        (struct kvt_issue){.session = p->program->session,
                           .tag = flight_begin(i, (struct flight){.progress = p, .bytes = bytes}),
                           .stream = stream_of(c),
                           .copy = {.source = c->source, .target = c->target, .bytes = bytes}};
    out->copy.source.offset += p->cut_offset;
    out->copy.target.offset += p->cut_offset;
    p->begun = true;
    p->cuts_inflight++;
    p->cut_offset += bytes;
    if (!copy_next(p)) {
        dequeue(session_of(i, p), p);
        settle(i, p);
    }
}

/* Posts that are due, behind their copies: at once, since somebody waits for them. */
static bool next_post(struct kvt_issuer *i, struct kvt_issue *out) {
    while (i->posts.head && i->posts_inflight < i->config.inflight_max) {
        struct kvt_op_progress *p = list_take(&i->posts);
        p->post_due = false;
        bool posts = !p->failed;
        if (posts) {
            issue_post(i, p, out);
        }
        settle(i, p);
        if (posts) {
            return true;
        }
    }
    return false;
}

bool kvt_issuer_next(struct kvt_issuer *i, struct kvt_issue *out) {
    if (next_post(i, out)) {
        return true;
    }
    for (uint32_t n = 0; n < i->opened_count; n++) {
        while (look_at_session(i, i->opened[n])) {}
    }
    if (next_post(i, out)) {
        return true;
    }
    if (i->cuts_inflight == i->config.inflight_max) {
        return false;
    }
    for (uint32_t c = 0; c < CLASSES; c++) {
        struct kvt_op_progress *p = pick(i, c);
        if (!p) {
            continue;
        }
        if (KVT_BROKEN(i->broken_rules, KVT_BREAK_POST_BEFORE_COPY) && p->op->kind == KVT_OP_FILL &&
            !p->posted && i->posts_inflight < i->config.inflight_max) {
            p->begun = true;
            issue_post(i, p, out);
        } else {
            issue_cut(i, p, out);
        }
        return true;
    }
    return false;
}

/* ---- what is told to the issuer -------------------------------------------------------------- */

void kvt_issuer_session_open(struct kvt_issuer *i, uint32_t session,
                             const struct kvt_control_page *page) {
    KVT_ASSERT(session < i->config.sessions_max);
    KVT_ASSERT(page != NULL);
    struct session *s = &i->sessions[session];
    KVT_ASSERT(s->page == NULL);
    *s = (struct session){.page = page};
    i->opened[i->opened_count++] = session;
}

/* Completes as cancelled what was not begun. In the last of the queue comes the largest id. */
static void cancel_queue(struct kvt_issuer *i, struct session *s, uint32_t q, uint64_t first_op) {
    struct list all = s->queues[q];
    s->queues[q] = (struct list){0};
    for (struct kvt_op_progress *p = list_take(&all); p; p = list_take(&all)) {
        s->queued[p->op->traffic]--;
        p->queued = false;
        if (p->begun || p->op->id < first_op) {
            enqueue(s, p);
        } else {
            complete(i, p, KVT_CANCELLED);
        }
    }
    note_filled(s, q);
}

void kvt_issuer_cancel(struct kvt_issuer *i, uint32_t session, uint64_t first_op) {
    KVT_ASSERT(session < i->config.sessions_max);
    struct session *s = &i->sessions[session];
    KVT_ASSERT(s->page != NULL);
    for (uint32_t q = 0; q < QUEUES; q++) {
        cancel_queue(i, s, q, first_op);
    }
}

/* Posts of a closed session are not issued any more. */
static void drop_posts(struct kvt_issuer *i, uint32_t session) {
    struct list all = i->posts;
    i->posts = (struct list){0};
    for (struct kvt_op_progress *p = list_take(&all); p; p = list_take(&all)) {
        if (p->program->session == session) {
            p->post_due = false;
            fail(i, p);
        } else {
            list_append(&i->posts, p);
        }
    }
}

void kvt_issuer_session_close(struct kvt_issuer *i, uint32_t session) {
    kvt_issuer_cancel(i, session, 0);
    struct session *s = &i->sessions[session];
    KVT_ASSERT(!s->closed);
    s->closed = true;
    for (uint32_t q = 0; q < QUEUES; q++) {
        if (s->queues[q].head) {
            fail(i, s->queues[q].head); /* the head alone can be begun */
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
    struct session *s = &i->sessions[p->session];
    KVT_ASSERT(s->page != NULL);
    KVT_ASSERT(!s->closed);
    if (p->op_count == 0) {
        kvt_program_free(p);
        return;
    }
    keep_program(i, p);
    p->ops_left = p->op_count;
    s->ops_left += p->op_count;
    for (uint32_t n = 0; n < p->op_count; n++) {
        const struct kvt_op *op = &p->ops[n];
        check_op(p, op);
        kvt_outstanding_add(&s->outstanding, op->id);
        p->progress[n] = (struct kvt_op_progress){.program = p, .op = op};
        enqueue(s, &p->progress[n]);
    }
}

void kvt_issuer_copied(struct kvt_issuer *i, uint32_t tag, bool ok) {
    KVT_ASSERT(tag < 2 * i->config.inflight_max);
    KVT_ASSERT(i->flights[tag].progress != NULL);
    struct flight f = flight_end(i, tag);
    struct kvt_op_progress *p = f.progress;
    if (f.is_post) {
        p->post_inflight = false;
    } else {
        KVT_ASSERT(p->cuts_inflight > 0);
        p->cuts_inflight--;
        p->bytes += ok ? f.bytes : 0;
    }
    if (!ok) {
        fail(i, p);
    } else if (!p->queued) {
        settle(i, p);
    }
}

/* ---- what the issuer tells ------------------------------------------------------------------- */

bool kvt_issuer_completion(struct kvt_issuer *i, struct kvt_completion *out) {
    struct kvt_op_progress *p = list_take(&i->completions);
    if (!p) {
        return false;
    }
    *out = (struct kvt_completion){
        .session = p->program->session, .status = p->status, .op = p->op->id, .bytes = p->bytes};
    session_of(i, p)->ops_left--;
    if (--p->program->ops_left == 0) {
        drop_program(i, p->program);
    }
    return true;
}

bool kvt_issuer_session_drained(struct kvt_issuer *i, uint32_t *session) {
    for (uint32_t n = 0; n < i->opened_count; n++) {
        struct session *s = &i->sessions[i->opened[n]];
        if (s->closed && s->ops_left == 0) {
            *session = i->opened[n];
            i->opened[n] = i->opened[--i->opened_count];
            for (uint32_t c = 0; c < CLASSES; c++) {
                i->candidates[c][*session] = NULL;
            }
            kvt_outstanding_clear(&s->outstanding);
            free(s->losses);
            *s = (struct session){0};
            return true;
        }
    }
    return false;
}

static const struct kvt_counter *head_waits_for(const struct kvt_issuer *i, struct session *s,
                                                uint32_t q) {
    struct kvt_op_progress *p = s->queues[q].head;
    if (p->begun || !deps_complete(s, p)) {
        return NULL;
    }
    return counter_missing(i, s, p->op);
}

uint32_t kvt_issuer_watched(const struct kvt_issuer *i, const struct kvt_counter **out,
                            uint32_t max) {
    uint32_t count = 0;
    for (uint32_t n = 0; n < i->opened_count; n++) {
        struct session *s = &i->sessions[i->opened[n]];
        for (uint32_t q = 0; q < QUEUES && count < max; q++) {
            const struct kvt_counter *counter = s->queues[q].head ? head_waits_for(i, s, q) : NULL;
            if (counter) {
                out[count++] = counter;
            }
        }
    }
    return count;
}

bool kvt_issuer_waits_for_worker(const struct kvt_issuer *i) {
    const struct kvt_counter *one;
    return kvt_issuer_watched(i, &one, 1) != 0;
}
