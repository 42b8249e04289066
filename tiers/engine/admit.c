/* Where memory is taken from when a budget is exhausted, in this order: idle sessions' caches and
 * slots (least recently stepped first), then resident layers of dynamic and offloaded caches, those
 * with most on the device first. Nobody's open step is disturbed: a layer of an active session goes
 * when its schedule has ended.
 */
#include "tiers/engine/state.h"

/* The next distinct family of the session; *at starts at 0. */
struct family *session_family(const struct kvt_engine *e, const struct session *s, uint32_t *at) {
    while (*at < e->config.caches_max) {
        const struct cache *c = e->caches[(*at)++];
        if (c == NULL || &e->sessions[c->session] != s) {
            continue;
        }
        bool first = true;
        for (uint32_t i = 0; i + 1 < *at && first; i++) {
            first = e->caches[i] == NULL || e->caches[i]->family != c->family;
        }
        if (first) {
            return c->family;
        }
    }
    return NULL;
}

static bool has_fixed_slots(const struct kvt_engine *e, const struct session *s) {
    struct family *f;
    for (uint32_t at = 0; (f = session_family(e, s, &at)) != NULL;) {
        if (f->is_static && family_streams(f)) {
            return true;
        }
    }
    return false;
}

static bool session_has_demotable(const struct kvt_engine *e, const struct session *s) {
    struct family *f;
    for (uint32_t at = 0; (f = session_family(e, s, &at)) != NULL;) {
        if (family_may_leave(e, f) && f->resident_count > 0 && f->gpu_bytes > 0) {
            return true;
        }
    }
    return (s->slot_count > 0 && !has_fixed_slots(e, s)) || session_may_vacate(e, s);
}

static bool session_is_idle(const struct kvt_engine *e, const struct session *s) {
    return s->in_use && !s->hung && s->schedule.phase == PHASE_NONE && s->queue_count == 0 &&
           s->migration.family == NULL && !s->demote_failed &&
           e->now_ms - s->last_step_ms >= e->config.idle_after_ms;
}

/* Sends a layer of the session's static caches, or of its others. false: there is none that can go. */
static bool demote_next(struct kvt_engine *e, struct session *s, bool statics) {
    struct family *f;
    if (statics && s->keeps_addresses && !session_statics_fit_host(e, s)) {
        s->demote_failed = true;
        return false;
    }
    for (uint32_t at = 0; (f = session_family(e, s, &at)) != NULL;) {
        if (f->is_static == statics && family_may_leave(e, f) && f->resident_count > 0) {
            f->demoted = true;
            if (demote_layer(e, s, f) == KVT_WAIT) {
                return true;
            }
        }
    }
    return false;
}

/* Static caches that could not leave, all of the session, stay. */
static void demote_end(struct kvt_engine *e, struct session *s) {
    struct family *f;
    for (uint32_t at = 0; s->demote_failed && (f = session_family(e, s, &at)) != NULL;) {
        if (f->is_static && f->demoted) {
            (void)family_stays(e, s, f);
        }
    }
    s->demoting = false;
    e->epoch++;
}

/* Moves an idle session's memory to the host, layer by layer, and its slots last. What static caches
 * leave behind are addresses. */
void demote_progress(struct kvt_engine *e, struct session *s) {
    if (!s->demoting || s->migration.family != NULL || s->schedule.phase != PHASE_NONE) {
        return;
    }
    if (s->queue_count > 0 || s->demote_failed) { /* it is awake again, or there is no room */
        demote_end(e, s);
        return;
    }
    if (demote_next(e, s, false) || demote_next(e, s, true)) {
        return;
    }
    guess_discard(e, s, 0);
    if (s->ops.outstanding > 0) {
        return;
    }
    if (!has_fixed_slots(e, s)) {
        slots_free(e, s);
    }
    if (!s->demote_failed) {
        session_vacate(e, s);
    }
    demote_end(e, s);
}

/* Whether `s` may be asked for what `asking` lacks: anybody on the device for its budget, and only
 * `asking` itself for its own limit. */
static bool may_give(const struct kvt_engine *e, const struct session *s,
                     const struct session *asking) {
    return s->in_use && !s->hung && s->device == asking->device &&
           (!e->short_own || s == asking ||
            KVT_BROKEN(e->rules, KVT_BREAK_LIMIT_TAKES_FROM_OTHERS));
}

static struct session *idle_victim(struct kvt_engine *e, const struct session *asking) {
    struct session *oldest = NULL;
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        struct session *s = &e->sessions[i];
        if (s != asking && may_give(e, s, asking) && session_is_idle(e, s) &&
            session_has_demotable(e, s) &&
            (oldest == NULL || s->last_step_ms < oldest->last_step_ms)) {
            oldest = s;
        }
    }
    return oldest;
}

/* Whether streaming a layer of it can save device memory. A dense worker's slots are as large as its
 * layers: three of these in three slots save nothing. */
static bool family_may_shrink(const struct kvt_engine *e, const struct family *f) {
    return !f->is_static && f->resident_count > 0 &&
           (family_is_segment(e, f) || f->layer_count > 3);
}

/* The family on the device that has most resident bytes and may lose a layer: of sessions between
 * schedules, or (open) of those in one that were not asked yet. */
static struct family *fattest_family(struct kvt_engine *e, const struct session *asking,
                                     bool open) {
    struct family *fattest = NULL;
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        const struct session *s = &e->sessions[i];
        if (!may_give(e, s, asking) || s->demote_failed ||
            (s->schedule.phase != PHASE_NONE) != open) {
            continue;
        }
        struct family *f;
        for (uint32_t at = 0; (f = session_family(e, s, &at)) != NULL;) {
            if (family_may_shrink(e, f) && (f->gpu_bytes > 0 || s == asking) &&
                f->demote_wanted == 0 && (fattest == NULL || f->gpu_bytes > fattest->gpu_bytes)) {
                fattest = f;
            }
        }
    }
    return fattest;
}

static bool somebody_was_asked(const struct kvt_engine *e, const struct session *asking) {
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        const struct session *s = &e->sessions[i];
        struct family *f;
        for (uint32_t at = 0; may_give(e, s, asking) && (f = session_family(e, s, &at)) != NULL;) {
            if (f->demote_wanted > 0) {
                return true;
            }
        }
    }
    return false;
}

static bool layers_are_leaving(const struct kvt_engine *e, const struct session *asking) {
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        const struct session *s = &e->sessions[i];
        if (may_give(e, s, asking) && s->schedule.phase == PHASE_NONE &&
            (s->demoting ||
             (s->migration.family != NULL && (s->migration.to_host || s->migration.compacts)))) {
            return true;
        }
    }
    return false;
}

/* No memory is to be had: refuse.c says why, when the request has been undone. */
static int refuse(struct kvt_engine *e) {
    e->refused = true;
    return -KVT_EQUOTA;
}

/* Memory is on its way: what the session has gathered meanwhile may be given back for another size. */
static int wait_for_memory(struct session *s) {
    s->give_backs_left = GIVE_BACKS_MAX;
    return KVT_WAIT;
}

/* Whether an extent is being emptied: of the session itself, or else of another one. */
static bool extents_are_emptied(struct kvt_engine *e, struct session *asking) {
    if (compact_begin(e, asking, asking)) {
        return true;
    }
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        struct session *s = &e->sessions[i];
        if (s != asking && may_give(e, s, asking) && compact_begin(e, s, asking)) {
            return true;
        }
    }
    return false;
}

/* Called when an allocation for `s` has failed with -KVT_EQUOTA. KVT_WAIT: memory is on its way.
 * -KVT_EQUOTA: none can be had. */
int memory_take(struct kvt_engine *e, struct session *s) {
    if (e->short_tier == KVT_TIER_HOST) {
        return refuse(e);
    }
    if (own_empty_give_back(e, s) || layers_are_leaving(e, s)) {
        return KVT_WAIT;
    }
    if (extents_are_emptied(e, s)) {
        return wait_for_memory(s);
    }
    uint64_t bytes = e->short_bytes;
    bool own = e->short_own;
    struct session *idle = idle_victim(e, s);
    if (idle != NULL) {
        idle->demoting = true;
        demote_progress(e, idle);
        return wait_for_memory(s);
    }
    struct family *f = fattest_family(e, s, false);
    if (f != NULL && demote_layer(e, &e->sessions[f->session], f) == KVT_WAIT) {
        return wait_for_memory(s);
    }
    e->short_tier = KVT_TIER_GPU; /* demoting may have found the host short */
    e->short_bytes = bytes;
    e->short_own = own;
    /* Of those in a schedule one is asked at a time, the next when it has not answered for long:
     * it may be stopped. */
    struct device *d = &e->devices[s->device];
    if (somebody_was_asked(e, s) && e->now_ms - d->asked_ms < ASK_AGAIN_MS) {
        return KVT_WAIT;
    }
    f = fattest_family(e, s, true);
    if (f != NULL) {
        f->demote_wanted = 1;
        e->wanted_count++;

        d->asked_ms = e->now_ms;
        return wait_for_memory(s);
    }
    if (somebody_was_asked(e, s) || dev_hoped_for(e, s)) {
        return KVT_WAIT; /* until the request's deadline */
    }
    return refuse(e);
}
