/* What can be asked of the engine, without changing it. */
#include "tiers/engine/state.h"

#include <string.h>

void kvt_engine_device_info(const struct kvt_engine *e, uint32_t device,
                            struct kvt_tier_info *out) {
    KVT_ASSERT(device < e->config.device_count);
    const struct device *d = &e->devices[device];
    *out =
        (struct kvt_tier_info){.budget_bytes = d->config.budget_bytes, .used_bytes = d->used_bytes};
    for (uint32_t i = 1; i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        if (!extent_is_charged(x) || x->device != device) {
            continue;
        }
        out->live_bytes += x->live_bytes;
        if (e->sessions[x->session].hung) {
            out->pinned_dead_bytes += x->bytes;
        }
    }
}

void kvt_engine_host_info(const struct kvt_engine *e, struct kvt_tier_info *out) {
    const struct host *h = &e->host;
    *out = (struct kvt_tier_info){.budget_bytes = e->config.host_budget_bytes,
                                  .used_bytes = h->used_bytes,
                                  .live_bytes = h->live_bytes,
                                  .kept_bytes = h->kept_bytes,
                                  .keep_pending = h->keep_growing > 0};
}

static uint32_t session_state(const struct session *s) {
    if (s->hung) {
        return KVT_SESSION_RECLAIMING;
    }
    return s->schedule.phase != PHASE_NONE ? KVT_SESSION_STEP : KVT_SESSION_IDLE;
}

bool kvt_engine_session_info(const struct kvt_engine *e, uint32_t *at,
                             struct kvt_session_info *out) {
    while (*at < e->config.sessions_max) {
        uint32_t index = (*at)++;
        const struct session *s = &e->sessions[index];
        if (!s->in_use) {
            continue;
        }
        bool stepping = s->schedule.phase != PHASE_NONE;
        *out = (struct kvt_session_info){.session = index,
                                         .state = session_state(s),
                                         .tenant = s->tenant,
                                         .device = s->device,
                                         .worker_kind = s->worker_kind,
                                         .cache_count = s->cache_count,
                                         .device_bytes = s->device_bytes,
                                         .host_bytes = s->host_bytes,
                                         .idle_ms = stepping ? 0 : e->now_ms - s->last_step_ms,
                                         .migrating = s->migration.family != NULL,
                                         .counters = s->counters};
        return true;
    }
    return false;
}

void kvt_counters_add(struct kvt_counters *sum, const struct kvt_counters *c) {
    sum->to_device_bytes += c->to_device_bytes;
    sum->from_device_bytes += c->from_device_bytes;
    sum->prefetch_discarded_bytes += c->prefetch_discarded_bytes;
    sum->migrated_bytes += c->migrated_bytes;
    sum->compacted_bytes += c->compacted_bytes;
    sum->copied_on_write_bytes += c->copied_on_write_bytes;
    sum->steps_committed += c->steps_committed;
    sum->steps_failed += c->steps_failed;
    sum->tokens_appended += c->tokens_appended;
}

void kvt_engine_ended_counters(const struct kvt_engine *e, struct kvt_counters *out) {
    *out = e->ended;
}

bool kvt_engine_cache_info(const struct kvt_engine *e, uint32_t *at, struct kvt_cache_info *out) {
    while (*at < e->config.caches_max) {
        const struct cache *c = e->caches[(*at)++];
        if (c == NULL) {
            continue;
        }
        const struct family *f = c->family;
        *out = (struct kvt_cache_info){.cache = c->id,
                                       .session = c->session,
                                       .mode = f->mode,
                                       .rows = c->row_count,
                                       .layer_count = f->layer_count,
                                       .device_bytes = f->vacated ? 0 : f->gpu_bytes,
                                       .host_bytes = f->host_bytes,
                                       .slots = e->sessions[c->session].slot_count,
                                       .slot_bytes = e->sessions[c->session].slot_bytes,
                                       .counters = c->counters,
                                       .need_to_device_bytes = c->need_to_bytes,
                                       .need_from_device_bytes = c->need_from_bytes};
        memcpy(out->name, c->name, sizeof(out->name));
        for (uint32_t i = 0; i < c->row_count; i++) {
            uint32_t length = c->rows[i].length;
            out->tokens_total += length;
            out->tokens_longest = length > out->tokens_longest ? length : out->tokens_longest;
        }
        for (uint32_t l = 0; l < f->layer_count; l++) {
            out->layers[l] = f->resident[l] ? 'R' : f->demoted ? 'I' : 'S';
        }
        return true;
    }
    return false;
}
