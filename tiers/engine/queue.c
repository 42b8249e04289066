/* Requests: checked, queued, and carried out when it is their turn.
 *
 * Requests on a cache take effect in order, and wait until the cache's open schedule has ended.
 * Only ABORT overtakes. A request that waits for memory keeps its place.
 */
#include "tiers/engine/state.h"

#include <stdlib.h>
#include <string.h>

#define WAITS_MAX 16 /* reclaim deadlines that a request waits at most */

static void pending_free(struct pending *p) {
    free(p->layout);
    free(p->rows);
    free(p->values);
    *p = (struct pending){0};
}

static uint32_t *copy_of(const uint32_t *values, uint32_t count) {
    uint32_t *copy = malloc((count + 1) * sizeof(*copy));
    if (copy != NULL && count > 0) {
        memcpy(copy, values, count * sizeof(*copy));
    }
    return copy;
}

/* Owns copies of everything that the request only lent. */
static int pending_fill(struct pending *p, const struct kvt_request *r) {
    *p = (struct pending){.request = *r};
    bool failed = false;
    if (r->layout != NULL) {
        p->layout = malloc(sizeof(*p->layout));
        failed = p->layout == NULL;
        if (!failed) {
            memcpy(p->layout, r->layout, sizeof(*p->layout));
        }
    }
    if (r->options != NULL) {
        p->options = *r->options;
        p->request.options = NULL; /* set at use: the entry moves in the queue */
    }
    if (r->rows != NULL) {
        p->rows = copy_of(r->rows, r->count);
        failed |= p->rows == NULL;
    }
    if (r->values != NULL) {
        p->values = copy_of(r->values, r->count);
        failed |= p->values == NULL;
    }
    p->request.layout = p->layout;
    p->request.rows = p->rows;
    p->request.values = p->values;
    if (failed) {
        pending_free(p);
        return -KVT_ENOMEM;
    }
    return 0;
}

static void queue_remove(struct kvt_engine *e, struct session *s, uint32_t at) {
    pending_free(&s->queue[at]);
    s->queue_count--;
    memmove(&s->queue[at], &s->queue[at + 1], (s->queue_count - at) * sizeof(s->queue[0]));
    s->queue[s->queue_count] = (struct pending){0};
    e->sweep_due = true;
    e->host.sweep_due = true;
    e->epoch++;
}

void queue_drop(struct kvt_engine *e, struct session *s) {
    while (s->queue_count > 0) {
        struct pending *p = &s->queue[0];
        if (s->evicted) {
            answer_error(e, session_index(e, s), p->request.tag, -KVT_EEVICTED,
                         "the worker was evicted by an administrator; attach again");
        } else {
            answer_drop(e);
        }
        queue_remove(e, s, 0);
    }
}

/* ---- answers ------------------------------------------------------------------------------------------- */

static void answer_schedule(struct kvt_engine *e, struct session *s, uint64_t tag) {
    const struct schedule *sc = &s->schedule;
    struct kvt_answer *a = answer_push(e, session_index(e, s), tag, 0, sc->cache);
    a->first_step = sc->first_step;
    a->steps = sc->steps;
    a->ring_offset = sc->ring_offset;
    a->ring_bytes = sc->ring_bytes;
}

static void answer_created(struct kvt_engine *e, struct session *s, uint64_t tag,
                           const struct cache *c) {
    struct kvt_answer *a = answer_push(e, session_index(e, s), tag, 0, c);
    a->slots = s->slot_count;
    a->slot_bytes = s->slot_bytes;
    a->resident_layers = c->family->resident_count;
}

/* ---- carrying out ---------------------------------------------------------------------------------------- */

static int carry_out_step(struct kvt_engine *e, struct session *s, struct pending *p, char *text) {
    int rc = step_request(e, s, p, text);
    if (rc == KVT_READY) {
        if (s->failed_posted) {
            s->failed_posted = false;
            struct kvt_action *a = action_push(e, KVT_ACTION_POST_FAILED);
            a->session = session_index(e, s);
        }
        answer_schedule(e, s, p->request.tag);
    }
    return rc;
}

/* KVT_READY: answered. KVT_WAIT: later. Negative: refused, the reason is in `text`. */
static int carry_out(struct kvt_engine *e, struct session *s, struct pending *p, char *text) {
    struct cache *c = NULL;
    int rc;
    if (e->devices[s->device].lost && p->request.kind != KVT_REQUEST_CLOSE) {
        c = cache_find(e, p->request.session, p->request.cache);
        if (c != NULL) {
            settle_undo(e, c); /* a step that had waited */
        }
        kvt_text_format(text, KVT_TEXT_BYTES,
                        "device %u has failed and what was on it is lost; attach again after the "
                        "daemon's restart",
                        s->device);
        return -KVT_EDEVICE;
    }
    switch (p->request.kind) {
    case KVT_REQUEST_CREATE:
        p->request.options = &p->options;
        rc = cache_create(e, s, &p->request, &c, text);
        if (rc == KVT_READY) {
            answer_created(e, s, p->request.tag, c);
        } else if (rc < 0) {
            slots_shrink(e, s);
        }
        return rc;
    case KVT_REQUEST_ACQUIRE:
    case KVT_REQUEST_STEP:
        return carry_out_step(e, s, p, text);
    default:
        rc = cache_edit(e, s, &p->request, &c, text);
        if (rc == -KVT_EBUSY && text[0] == 0) {
            blocks_full_text(e, s, "edit of rows", text);
        }
        if (rc == KVT_READY) {
            (void)answer_push(e, session_index(e, s), p->request.tag, 0, c);
        }
        return rc;
    }
}

static bool is_step(const struct kvt_request *r) {
    return r->kind == KVT_REQUEST_STEP || r->kind == KVT_REQUEST_ACQUIRE;
}

/* Whether the request at `at` must wait for the open schedule, or for one before it. */
static bool must_wait(const struct kvt_engine *e, const struct session *s, uint32_t at) {
    const struct kvt_request *r = &s->queue[at].request;
    const struct schedule *sc = &s->schedule;
    const struct migration *m = &s->migration;
    const struct cache *c = cache_find(e, r->session, r->cache);
    if (m->family != NULL && (!m->early || (c != NULL && c->family == m->family))) {
        return true;
    }
    if (sc->phase != PHASE_NONE &&
        (is_step(r) || r->kind == KVT_REQUEST_CREATE ||
         (sc->cache->id == r->cache && !KVT_BROKEN(e->rules, KVT_BREAK_REQUESTS_OVERTAKE)))) {
        return true;
    }
    for (uint32_t i = 0; i < at; i++) {
        const struct kvt_request *earlier = &s->queue[i].request;
        bool both_gather = (is_step(r) || r->kind == KVT_REQUEST_CREATE) &&
                           (is_step(earlier) || earlier->kind == KVT_REQUEST_CREATE) &&
                           !KVT_BROKEN(e->rules, KVT_BREAK_GATHER_OVERTAKES);
        if (both_gather || (r->kind != KVT_REQUEST_CREATE && earlier->cache == r->cache)) {
            return true;
        }
    }
    return false;
}

static void settling_update(struct kvt_engine *e, struct session *s) {
    bool settling = s->migration.family != NULL && !s->migration.to_host;
    for (uint32_t i = 0; i < s->queue_count; i++) {
        const struct pending *p = &s->queue[i];
        settling |= p->started && (is_step(&p->request) || p->request.kind == KVT_REQUEST_CREATE);
    }
    if (settling != s->settling) {
        s->settling = settling;
        s->settling_since_ms = e->now_ms;
        e->settling_count += settling ? 1u : (uint32_t)-1;
        e->sweep_due = true;
        e->host.sweep_due = true;
    }
}

void queue_progress(struct kvt_engine *e, struct session *s) {
    for (uint32_t i = 0; i < s->queue_count;) {
        struct pending *p = &s->queue[i];
        if (must_wait(e, s, i) || (p->started && p->epoch == e->epoch)) {
            i++;
            continue;
        }
        if (!p->started) { /* each request asks once more what there is */
            e->host.full = false;
            e->devices[s->device].full = false;
            s->give_backs_left = GIVE_BACKS_MAX;
            s->compactions_left = e->extent_top;
        }
        char text[KVT_TEXT_BYTES] = "";
        uint64_t epoch = e->epoch; /* what happens from here on is a reason to try again */
        int rc = -KVT_ENOENT;
        e->refused = false;
        if (p->request.kind == KVT_REQUEST_CREATE ||
            cache_find(e, p->request.session, p->request.cache) != NULL) {
            rc = carry_out(e, s, p, text);
        } else {
            kvt_text_format(text, sizeof(text), "cache %u: the session has none of this number",
                            p->request.cache);
        }
        if (rc == KVT_WAIT) {
            p->started_ms = p->started ? p->started_ms : e->now_ms;
            p->started = true;
            p->short_tier = e->short_tier;
            p->epoch = epoch;
            i++;
            continue;
        }
        if (rc == -KVT_EQUOTA && e->refused) {
            refuse_text(e, s, p, text);
        }
        if (rc < 0) {
            answer_error(e, session_index(e, s), p->request.tag, rc, "%s",
                         text[0] != 0 ? text : kvt_error_text(rc));
        }
        queue_remove(e, s, i);
    }
    settling_update(e, s);
}

/* Memory that was asked for the session and is being made ready: that takes as long as it takes. */
static bool memory_is_made(const struct kvt_engine *e, const struct session *s,
                           const struct pending *p) {
    return s->extents_creating > 0 || (p->short_tier == KVT_TIER_HOST && e->host.busy_chunks > 0);
}

/* When a request that waits for memory fails: when none has come or gone for a while, and at last
 * when there has not been more than before for long, since what comes and goes may never suffice. */
uint64_t pending_deadline_ms(const struct kvt_engine *e, const struct session *s,
                             const struct pending *p) {
    uint64_t since_ms = e->devices[s->device].changed_ms;
    since_ms = e->host.changed_ms > since_ms ? e->host.changed_ms : since_ms;
    since_ms = p->started_ms > since_ms ? p->started_ms : since_ms;
    uint64_t last_ms = p->started_ms + (uint64_t)WAITS_MAX * e->config.reclaim_deadline_ms;
    uint64_t deadline_ms = since_ms + e->config.reclaim_deadline_ms;
    return deadline_ms < last_ms ? deadline_ms : last_ms;
}

static bool waits_for_memory(const struct kvt_engine *e, const struct session *s,
                             const struct pending *p) {
    bool gathers = (is_step(&p->request) || p->request.kind == KVT_REQUEST_CREATE) &&
                   !KVT_BROKEN(e->rules, KVT_BREAK_WAIT_FOR_EVER);
    return p->started && gathers && s->migration.family == NULL && s->schedule.phase == PHASE_NONE;
}

/* Where more memory is taken than ever since it waits, the clock begins anew. That has an end, the
 * budgets; a clock that stood while memory is made would have none where others take it. */
static void clock_renew(const struct kvt_engine *e, const struct session *s, struct pending *p) {
    uint64_t used = e->devices[s->device].used_bytes + e->host.used_bytes;
    if (used > p->used_most) {
        p->used_most = used;
        p->started_ms = e->now_ms;
    }
}

static bool is_expired(const struct kvt_engine *e, const struct session *s,
                       const struct pending *p) {
    return !memory_is_made(e, s, p) && e->now_ms >= pending_deadline_ms(e, s, p);
}

/* Device memory that was asked back and has not come: of the session itself, or of others. */
static uint64_t asked_back_bytes(const struct kvt_engine *e, const struct session *s, bool own) {
    uint64_t bytes = 0;
    for (uint32_t i = 1; i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        bool counts = x->state == EXTENT_RECLAIMING && x->device == s->device;
        bytes += counts && (&e->sessions[x->session] == s) == own ? x->bytes : 0;
    }
    return bytes;
}

static void answer_expired(struct kvt_engine *e, const struct session *s, const struct pending *p) {
    bool host = p->short_tier == KVT_TIER_HOST;
    const struct device *d = &e->devices[s->device];
    uint64_t own = host ? 0 : asked_back_bytes(e, s, true);
    uint64_t others = host ? 0 : asked_back_bytes(e, s, false);
    char why[128];
    if (own > 0) {
        kvt_text_format(why, sizeof(why),
                        "this worker was asked to unmap %llu of its own (RECLAIM) and has not%s",
                        (unsigned long long)own, others > 0 ? "; others have not, either" : "");
    } else {
        kvt_text_format(why, sizeof(why), "%s",
                        host ? "none came free" : "other workers gave back none");
    }
    answer_error(
        e, session_index(e, s), p->request.tag, -KVT_EQUOTA,
        "%s memory: %llu of the budget of %llu bytes are in use, and %s for %u ms; %s, or raise "
        "%s budget",
        host ? "host" : "device", (unsigned long long)(host ? e->host.used_bytes : d->used_bytes),
        (unsigned long long)(host ? e->config.host_budget_bytes : d->config.budget_bytes), why,
        e->config.reclaim_deadline_ms,
        own > 0 ? "answer RECLAIM" : "evict one that hangs (kvtierctl workers)",
        host ? "[host]" : "the device's");
}

/* A request that has waited for others' memory for too long fails. */
void queue_expire(struct kvt_engine *e, struct session *s) {
    for (uint32_t i = 0; i < s->queue_count;) {
        struct pending *p = &s->queue[i];
        bool waits = waits_for_memory(e, s, p); /* and not for what its own worker leaves undone */
        if (waits && e->now_ms - p->since_ms >= ASK_AGAIN_MS) {
            dev_take_from_younger(e, s, p->since_ms);
        }
        if (waits) {
            clock_renew(e, s, p);
        }
        if (!waits || !is_expired(e, s, p)) {
            i++;
            continue;
        }
        struct cache *c = cache_find(e, p->request.session, p->request.cache);
        if (c != NULL) {
            settle_undo(e, c);
        }
        answer_expired(e, s, p);
        queue_remove(e, s, i);
    }
    settling_update(e, s);
}

/* ---- coming in --------------------------------------------------------------------------------------------- */

static void request_abort(struct kvt_engine *e, struct session *s, const struct kvt_request *r) {
    struct schedule *sc = &s->schedule;
    if (sc->phase == PHASE_OPEN || sc->phase == PHASE_DRAIN) {
        step_fail(e, s, r->first_step, KVT_EABORTED);
    }
    bool over = sc->phase != PHASE_DRAIN && sc->phase != PHASE_STOP;
    if (over || sc->answer_abort) {
        int rc = over ? 0 : -KVT_ESTATE;
        struct kvt_answer *a = answer_push(e, r->session, r->tag, rc, over ? sc->cache : NULL);
        kvt_text_format(a->text, sizeof(a->text), "%s",
                        over ? "" : "abort: an earlier abort is still under way");
        return;
    }
    sc->answer_abort = true;
    sc->abort_tag = r->tag;
}

static void acquire_open(struct kvt_engine *e, struct session *s, const struct kvt_request *r) {
    const struct schedule *sc = &s->schedule;
    if (sc->phase == PHASE_OPEN && sc->committed < sc->steps && sc->cache->id == r->cache) {
        answer_schedule(e, s, r->tag);
    } else {
        answer_error(e, r->session, r->tag, -KVT_ESTATE,
                     "acquire: layer %u: no step of cache %u is open; begin with layer 0", r->layer,
                     r->cache);
    }
}

void request_enter(struct kvt_engine *e, const struct kvt_request *r) {
    struct session *s = &e->sessions[r->session];
    if (s->hung && !s->evicted) {
        return;
    }
    if (!answer_reserve(e)) {
        answer_error(e, r->session, r->tag, -KVT_ENOMEM, "%s", kvt_error_text(-KVT_ENOMEM));
        return;
    }
    if (s->hung) {
        answer_error(e, r->session, r->tag, -KVT_EEVICTED,
                     "the worker was evicted by an administrator; attach again");
        return;
    }
    if (r->kind == KVT_REQUEST_ABORT) {
        request_abort(e, s, r);
        return;
    }
    if (r->kind == KVT_REQUEST_ACQUIRE && r->layer > 0) {
        /* Layer 0 opens a step and waits its turn; a later one is in the step that is open. */
        acquire_open(e, s, r);
        return;
    }
    if (s->queue_count == KVT_REQUESTS_MAX) {
        answer_error(e, r->session, r->tag, -KVT_EBUSY,
                     "%d requests of this session wait already; wait for answers",
                     KVT_REQUESTS_MAX);
        return;
    }
    struct pending *p = &s->queue[s->queue_count];
    int rc = pending_fill(p, r);
    if (rc != 0) {
        answer_error(e, r->session, r->tag, rc, "%s", kvt_error_text(rc));
        return;
    }
    if (r->kind == KVT_REQUEST_ACQUIRE) {
        p->request.count = 0;
        p->request.steps = 1;
    }
    p->since_ms = e->now_ms;
    s->queue_count++;
}
