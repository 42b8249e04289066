/* Static caches that are demoted while idle: their memory goes, their addresses stay.
 *
 * Their layers go to the host like those of other caches (migrate.c), but keep their places. When
 * nothing of the session is on the device any more, its extents are vacated: the worker unmaps them and
 * keeps the ranges of addresses, and the memory is free for others. An extent without memory is
 * EXTENT_VACANT: it is charged to nobody, and what is allocated in it stays so.
 *
 * Before a cache's next step the memory of all its places comes back, or none: two sessions that each had
 * a half would wait for each other. Then its layers come back to where they were. A CREATE wants all of the
 * session's: what it makes has to fit beside them. If the worker wakes before anything was vacated, the
 * device still has every byte, and the layers are resident again at once.
 *
 * Only for workers that can keep addresses (struct kvt_session_options).
 */
#include "tiers/engine/state.h"

/* Whether the family's memory may leave while the session is idle. */
bool family_may_leave(const struct kvt_engine *e, const struct family *f) {
    return !f->is_static || e->sessions[f->session].keeps_addresses;
}

static bool may_vacate(const struct kvt_engine *e, const struct session *s,
                       const struct extent *x) {
    return &e->sessions[x->session] == s && x->state == EXTENT_LIVE && x->live_bytes > 0;
}

/* Whether a session that has nothing to demote any more still holds memory that can go. */
bool session_may_vacate(const struct kvt_engine *e, const struct session *s) {
    for (uint32_t i = 1; s->keeps_addresses && i < e->extent_top; i++) {
        if (may_vacate(e, s, &e->extents[i])) {
            return true;
        }
    }
    return false;
}

/* Whether the host can take what the session's static caches have on the device; if not, nothing of them
 * leaves: their places would stay, and nobody would gain anything. */
bool session_statics_fit_host(const struct kvt_engine *e, const struct session *s) {
    const struct host *h = &e->host;
    uint64_t of_host = e->config.host_budget_bytes - h->live_bytes;
    uint64_t of_session = e->config.host_worker_max_bytes - s->host_bytes;
    uint64_t bytes = 0;
    const struct family *f;
    for (uint32_t at = 0; (f = session_family(e, s, &at)) != NULL;) {
        for (uint32_t l = 0; f->is_static && l < f->layer_count; l++) {
            for (const struct group *g = f->groups; g != NULL && f->resident[l]; g = g->next) {
                bytes += round_up(group_layer_bytes(e, f, g->block_count, l), KVT_ALIGN_BYTES);
            }
        }
    }
    return bytes <= (of_host < of_session ? of_host : of_session);
}

/* What static caches of the session hold is on the host, and nothing is in flight. */
void session_vacate(struct kvt_engine *e, struct session *s) {
    KVT_ASSERT(s->schedule.phase == PHASE_NONE);
    KVT_ASSERT(s->ops.outstanding == 0);
    if (!s->keeps_addresses) {
        return;
    }
    struct family *f;
    for (uint32_t at = 0; (f = session_family(e, s, &at)) != NULL;) {
        KVT_ASSERT(!f->is_static || f->resident_count == 0);
        f->vacated = f->is_static && f->demoted;
    }
    for (uint32_t i = 1; i < e->extent_top; i++) {
        if (may_vacate(e, s, &e->extents[i])) {
            extent_vacate(e, &e->extents[i]);
        }
    }
}

static void want(const struct kvt_engine *e, struct dev_place place) {
    struct extent *x = place.extent != 0 ? extent_find(e, place.extent) : NULL;
    if (x != NULL) {
        x->wanted = true;
    }
}

/* Marks the session's extents in which the family has places, or slots; NULL: all of them. */
static void want_extents(const struct kvt_engine *e, const struct session *s,
                         const struct family *f) {
    for (uint32_t i = 1; i < e->extent_top; i++) {
        e->extents[i].wanted = f == NULL && &e->sessions[e->extents[i].session] == s;
    }
    for (const struct group *g = f != NULL ? f->groups : NULL; g != NULL && g->gpu != NULL;
         g = g->next) {
        for (uint32_t l = 0; l < f->layer_count; l++) {
            want(e, g->gpu[l]);
        }
    }
    for (uint32_t i = 0; f != NULL && i < e->config.caches_max; i++) {
        const struct cache *c = e->caches[i];
        for (uint32_t l = 0; c != NULL && c->family == f && c->planes != NULL && l < f->layer_count;
             l++) {
            want(e, c->planes->place[l]);
        }
    }
    for (uint32_t i = 0; f != NULL && family_streams(f) && i < s->slot_count; i++) {
        want(e, s->slots[i].place);
    }
}

/* What the family's next step has to get back; NULL: all of the session. */
uint64_t session_vacant_bytes(const struct kvt_engine *e, const struct session *s,
                              const struct family *f) {
    uint64_t bytes = 0;
    if (s->vacating == 0) {
        return 0;
    }
    want_extents(e, s, f);
    for (uint32_t i = 1; i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        bytes += x->state == EXTENT_VACANT && x->wanted ? x->bytes : 0;
    }
    return bytes;
}

/* KVT_READY: every extent that the family's places are in has its memory (NULL: every one of the session).
 * KVT_WAIT: it is on its way, or just leaving. -KVT_EQUOTA: there is not enough for all of them. */
int session_return(struct kvt_engine *e, struct session *s, const struct family *f) {
    if (s->vacating == 0) {
        return KVT_READY;
    }
    uint64_t vacant_bytes = session_vacant_bytes(e, s, f);
    bool away = false; /* on its way out, or back */
    for (uint32_t i = 1; i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        away |= extent_is_charged(x) && x->vacates && x->wanted;
    }
    if (away || vacant_bytes == 0) {
        (void)dev_short(e, s, 0); /* if it waits: for the device */
        return away ? KVT_WAIT : KVT_READY;
    }
    if (vacant_bytes > dev_available(e, s)) {
        int quota = dev_short(e, s, vacant_bytes);
        return dev_pending(e, s) ? KVT_WAIT : quota;
    }
    for (uint32_t i = 1; i < e->extent_top; i++) {
        struct extent *x = &e->extents[i];
        if (x->state == EXTENT_VACANT && x->wanted) {
            extent_refill(e, x);
        }
    }
    return KVT_WAIT;
}

/* Whether a layer of the family is streamed, or would be if it were not demoted. */
bool family_streams(const struct family *f) {
    uint32_t resident = f->is_static
                            ? resident_layers_most(f->mode, f->layer_count, f->resident_layers_max)
                            : f->resident_count;
    return resident < f->layer_count;
}
