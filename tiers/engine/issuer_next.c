/* Which operation goes next: gates, turns, cuts and posts; and what closed gates wait for. */
#include "tiers/engine/assert.h"
#include "tiers/engine/issuer_internal.h"
#include "tiers/engine/mutants.h"

#include <string.h>

/* ---- gates ----------------------------------------------------------------------------------- */

static bool deps_complete(const struct kvt_issuer_session *s, struct kvt_op_progress *p) {
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
static bool deps_lost(const struct kvt_issuer_session *s, const struct kvt_op_progress *p) {
    if (p->op->id <= s->lost_up_to && p->op->dep_count > 0) {
        return true;
    }
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
                                                 const struct kvt_issuer_session *s,
                                                 const struct kvt_op *op) {
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
    struct kvt_issuer_session *s = &i->sessions[session];
    struct kvt_op_progress *p = s->queues[q].head;
    if (!p || (!p->begun && !deps_complete(s, p))) {
        return false;
    }
    if (!p->begun && p->op->kind != KVT_OP_STEP && deps_lost(s, p)) {
        kvt_op_dequeue(s, p);
        kvt_op_lose(s, p->op);
        kvt_op_complete(i, p, KVT_CANCELLED);
        return true;
    }
    if (!p->begun && counter_missing(i, s, p->op)) {
        return false;
    }
    if (!copy_next(p)) {
        p->begun = true;
        kvt_op_dequeue(s, p);
        kvt_op_settle(i, p);
        return true;
    }
    struct kvt_op_progress **best = &i->candidates[p->op->traffic][session];
    if (!*best ||
        (p->op->id < (*best)->op->id) != KVT_BROKEN(i->broken_rules, KVT_BREAK_LAST_FIRST)) {
        *best = p;
    }
    return false;
}

static bool look_at_session(struct kvt_issuer *i, uint32_t session) {
    struct kvt_issuer_session *s = &i->sessions[session];
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
    uint32_t any = i->candidates_count[c];
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

static uint32_t flight_begin(struct kvt_issuer *i, struct kvt_issuer_flight f) {
    uint32_t tag = i->flight_free;
    i->flight_free = i->flights[tag].free_next;
    i->flights[tag] = f;
    i->cuts_inflight += !f.is_post;
    i->bytes_inflight[f.progress->op->traffic] += f.bytes;
    i->posts_inflight += f.is_post;
    return tag;
}

struct kvt_issuer_flight kvt_issuer_flight_end(struct kvt_issuer *i, uint32_t tag) {
    struct kvt_issuer_flight f = i->flights[tag];
    i->cuts_inflight -= !f.is_post;
    i->bytes_inflight[f.progress->op->traffic] -= f.bytes;
    i->posts_inflight -= f.is_post;
    i->flights[tag] = (struct kvt_issuer_flight){.free_next = i->flight_free};
    i->flight_free = tag;
    return f;
}

static void issue_post(struct kvt_issuer *i, struct kvt_op_progress *p, struct kvt_issue *out) {
    KVT_ASSERT(!p->posted);
    p->posted = true;
    *out = (struct kvt_issue){.is_post = 1,
                              .session = p->program->session,
                              .op = p->op->id,
                              .slot = p->op->slot,
                              .value = p->op->generation};
    if (i->config.post_behind) {
        p->post_inflight = true;
        out->tag = flight_begin(i, (struct kvt_issuer_flight){.progress = p, .is_post = true});
    }
}

static void issue_cut(struct kvt_issuer *i, struct kvt_op_progress *p, struct kvt_issue *out) {
    uint64_t bytes = cut_bytes_next(i, p);
    const struct kvt_copy *c = copy_next(p);
    *out = (struct kvt_issue){
        .session = p->program->session,
        .op = p->op->id,
        .tag = flight_begin(i, (struct kvt_issuer_flight){.progress = p, .bytes = bytes}),
        .stream = stream_of(c),
        .copy = {.source = c->source, .target = c->target, .bytes = bytes}};
    out->copy.source.offset += p->cut_offset;
    out->copy.target.offset += p->cut_offset;
    p->begun = true;
    p->cuts_inflight++;
    p->cut_offset += bytes;
    if (!copy_next(p)) {
        kvt_op_dequeue(kvt_issuer_session_of(i, p), p);
        kvt_op_settle(i, p);
    }
}

/* Posts that are due, behind their copies: at once, since somebody waits for them. */
static bool next_post(struct kvt_issuer *i, struct kvt_issue *out) {
    while (i->posts.head && i->posts_inflight < i->config.inflight_max) {
        struct kvt_op_progress *p = kvt_op_list_take(&i->posts);
        p->post_due = false;
        bool posts = !p->failed;
        if (posts) {
            issue_post(i, p, out);
        }
        kvt_op_settle(i, p);
        if (posts) {
            return true;
        }
    }
    return false;
}

/* Looks at all sessions, until nothing more comes of it, and counts what could go. */
static void find_candidates(struct kvt_issuer *i) {
    memset(i->candidates_count, 0, sizeof(i->candidates_count));
    memset(i->copying, 0, sizeof(i->copying));
    for (uint32_t n = 0; n < i->opened_count; n++) {
        uint32_t session = i->opened[n];
        while (look_at_session(i, session)) {}
        for (uint32_t c = 0; c < CLASSES; c++) {
            i->candidates_count[c] += i->candidates[c][session] != NULL;
            i->copying[c] += i->sessions[session].copying[c];
        }
    }
}

/* Of class c and those below it. */
static uint64_t bytes_inflight_from(const struct kvt_issuer *i, uint32_t c) {
    uint64_t bytes = 0;
    for (; c < CLASSES; c++) {
        bytes += i->bytes_inflight[c];
    }
    return bytes;
}

static bool flight_is_full(const struct kvt_issuer *i) {
    return i->cuts_inflight == i->config.inflight_max ||
           (i->config.inflight_bytes != 0 && bytes_inflight_from(i, 0) >= i->config.inflight_bytes);
}

/* This class, and those below it, may have nothing more under way; CLASSES: that holds for none. */
static uint32_t class_held(const struct kvt_issuer *i) {
    uint32_t lower = 1; /* than the highest class that has something to copy, now or soon */
    while (lower < CLASSES && i->copying[lower - 1] == 0) {
        lower++;
    }
    bool full = i->config.inflight_bytes != 0 &&
                KVT_ISSUER_LOWER_PART * bytes_inflight_from(i, lower) >= i->config.inflight_bytes;
    return full && !KVT_BROKEN(i->broken_rules, KVT_BREAK_PREFILL_FILLS_LINK) ? lower : CLASSES;
}

/* The class to go: the highest, or one below it that has waited for long; CLASSES: none is open. */
static uint32_t class_next(const struct kvt_issuer *i) {
    uint64_t most = KVT_ISSUER_PATIENCE * i->config.quantum_bytes;
    uint32_t held = class_held(i);
    uint32_t first = CLASSES;
    for (uint32_t n = 0; n < CLASSES; n++) {
        uint32_t c = KVT_BROKEN(i->broken_rules, KVT_BREAK_DECODE_LAST) ? CLASSES - 1 - n : n;
        if (i->candidates_count[c] == 0 || c >= held) {
            continue;
        }
        if (i->passed_bytes[c] >= most && !KVT_BROKEN(i->broken_rules, KVT_BREAK_PREFILL_STARVES)) {
            return c;
        }
        first = first == CLASSES ? c : first;
    }
    return first;
}

static void class_goes(struct kvt_issuer *i, uint32_t goes, uint64_t bytes) {
    uint64_t owed = KVT_ISSUER_PATIENCE * bytes;
    i->passed_bytes[goes] -= owed < i->passed_bytes[goes] ? owed : i->passed_bytes[goes];
    for (uint32_t c = goes + 1; c < CLASSES; c++) {
        i->passed_bytes[c] = i->candidates_count[c] > 0 ? i->passed_bytes[c] + bytes : 0;
    }
}

bool kvt_issuer_next(struct kvt_issuer *i, struct kvt_issue *out) {
    if (next_post(i, out)) {
        return true;
    }
    find_candidates(i);
    if (next_post(i, out)) {
        return true;
    }
    uint32_t c = flight_is_full(i) ? (uint32_t)CLASSES : class_next(i);
    if (c == CLASSES) {
        return false;
    }
    struct kvt_op_progress *p = pick(i, c);
    if (KVT_BROKEN(i->broken_rules, KVT_BREAK_POST_BEFORE_COPY) && p->op->kind == KVT_OP_FILL &&
        !p->posted && i->posts_inflight < i->config.inflight_max) {
        p->begun = true;
        issue_post(i, p, out);
        return true;
    }
    issue_cut(i, p, out);
    class_goes(i, c, out->copy.bytes);
    return true;
}

/* ---- what closed gates wait for --------------------------------------------------------- */

static const struct kvt_counter *head_waits_for(const struct kvt_issuer *i,
                                                struct kvt_issuer_session *s, uint32_t q) {
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
        struct kvt_issuer_session *s = &i->sessions[i->opened[n]];
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
