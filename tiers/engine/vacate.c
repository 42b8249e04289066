/* Static caches that are demoted while idle: their memory goes, their addresses stay.
 *
 * Their layers go to the host like those of other caches (migrate.c), but keep their places. When
 * nothing of the session is on the device any more, its extents are vacated: the worker unmaps them and
 * keeps the ranges of addresses, and the memory is free for others. An extent without memory is
 * EXTENT_VACANT: it is charged to nobody, and what is allocated in it stays so.
 *
 * Before the session's next step all of it comes back, or nothing: two sessions that each had a half
 * would wait for each other. Then the cache's layers come back to where they were.
 *
 * Only for workers that can keep addresses (struct kvt_session_options).
 */
#include "tiers/engine/state.h"

/* Whether the family's memory may leave while the session is idle. */
bool family_may_leave(const struct kvt_engine *e, const struct family *f) {
    return !f->is_static || e->sessions[f->session].keeps_addresses;
}

/* Whether a session that has nothing to demote any more still holds memory that can go. */
bool session_may_vacate(const struct kvt_engine *e, const struct session *s) {
    for (uint32_t i = 1; s->keeps_addresses && i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        if (&e->sessions[x->session] == s && x->state == EXTENT_LIVE && x->live_bytes > 0) {
            return true;
        }
    }
    return false;
}

/* What static caches of the session hold is on the host, and nothing is in flight. */
void session_vacate(struct kvt_engine *e, struct session *s) {
    KVT_ASSERT(s->schedule.phase == PHASE_NONE);
    KVT_ASSERT(s->ops.outstanding == 0);
    for (uint32_t i = 1; s->keeps_addresses && i < e->extent_top; i++) {
        struct extent *x = &e->extents[i];
        if (&e->sessions[x->session] == s && x->state == EXTENT_LIVE && x->live_bytes > 0) {
            extent_vacate(e, x);
        }
    }
}

uint64_t session_vacant_bytes(const struct kvt_engine *e, const struct session *s) {
    uint64_t bytes = 0;
    for (uint32_t i = 1; i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        bytes += x->state == EXTENT_VACANT && &e->sessions[x->session] == s ? x->bytes : 0;
    }
    return bytes;
}

/* KVT_READY: every extent of the session has its memory. KVT_WAIT: it is on its way, or just leaving.
 * -KVT_EQUOTA: there is not enough for all of them. */
int session_return(struct kvt_engine *e, struct session *s) {
    uint64_t vacant_bytes = session_vacant_bytes(e, s);
    bool away = false; /* on its way out, or back */
    for (uint32_t i = 1; i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        away |= x->state != 0 && x->state != EXTENT_VACANT && &e->sessions[x->session] == s &&
                x->vacates;
    }
    if (away || vacant_bytes == 0) {
        return away ? KVT_WAIT : KVT_READY;
    }
    if (vacant_bytes > dev_available(e, s)) {
        int quota = dev_short(e, s, vacant_bytes);
        return dev_pending(e, s) ? KVT_WAIT : quota;
    }
    for (uint32_t i = 1; i < e->extent_top; i++) {
        struct extent *x = &e->extents[i];
        if (x->state == EXTENT_VACANT && &e->sessions[x->session] == s) {
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
