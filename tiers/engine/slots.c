/* Slots: device memory that streamed pieces are brought into. They belong to a session, all of one
 * size, large enough for each of its caches.
 *
 * A slot's generation outlives its memory: counters only grow.
 */
#include "tiers/engine/state.h"

static bool slots_are_fixed(const struct kvt_engine *e, const struct session *s) {
    for (uint32_t i = 0; i < e->config.caches_max; i++) {
        const struct cache *c = e->caches[i];
        if (c != NULL && &e->sessions[c->session] == s && c->family->is_static &&
            family_streams(c->family)) {
            return true;
        }
    }
    return false;
}

/* Nothing in flight touches them; contents are gone. */
void slots_free(struct kvt_engine *e, struct session *s) {
    for (uint32_t i = 0; i < s->slot_count; i++) {
        dev_free(e, s->slots[i].place, s->slot_bytes);
        s->slots[i].place = (struct dev_place){0};
        s->slots[i].last_op = 0;
        s->slots[i].named = 0;
    }
    s->slot_count = 0;
    s->slot_bytes = 0;
    s->slot_cursor = 0;
}

/* A STEP has failed, or tries another size: slots that are not all there are none. */
void slots_undo(struct kvt_engine *e, struct session *s) {
    for (uint32_t i = 0; i < s->slot_count; i++) {
        if (s->slots[i].place.extent == 0) {
            slots_free(e, s);
            return;
        }
    }
}

/* Sees to `count` slots of `bytes`. Between schedules only. -KVT_ESTATE: a static cache has fixed
 * what there is. */
int slots_settle(struct kvt_engine *e, struct session *s, uint32_t count, uint64_t bytes) {
    KVT_ASSERT(s->schedule.phase == PHASE_NONE);
    if (count > s->slot_count || bytes > s->slot_bytes) {
        if (s->slot_count > 0 && slots_are_fixed(e, s)) {
            return -KVT_ESTATE;
        }
        guess_discard(e, s, 0);
        if (s->ops.outstanding > 0) {
            return KVT_WAIT;
        }
        count = count > s->slot_count ? count : s->slot_count;
        bytes = bytes > s->slot_bytes ? bytes : s->slot_bytes;
        slots_free(e, s);
        s->slot_count = count;
        s->slot_bytes = bytes;
    }
    int result = KVT_READY;
    for (uint32_t i = 0; i < s->slot_count && result >= 0; i++) {
        if (s->slots[i].place.extent == 0) {
            int rc = dev_alloc(e, s, s->slot_bytes, &s->slots[i].place);
            result = rc != KVT_READY ? rc : result;
        }
    }
    return result;
}

/* A cache was closed: no slots without one that streams. Nothing is in flight. */
void slots_shrink(struct kvt_engine *e, struct session *s) {
    if (s->slot_count == 0 || s->ops.outstanding > 0 || s->guess.active ||
        s->schedule.phase != PHASE_NONE) {
        return;
    }
    for (uint32_t i = 0; i < e->config.caches_max; i++) {
        const struct cache *c = e->caches[i];
        if (c != NULL && &e->sessions[c->session] == s && family_streams(c->family)) {
            return;
        }
    }
    slots_free(e, s);
}
