/* Budgets: device extents and host memory.
 *
 * Allocation never blocks. KVT_READY: here it is. KVT_WAIT: something is on its way (an extent is
 * being created or given back, a chunk is being brought up) and the caller asks again when it is
 * called next. -KVT_EQUOTA: nothing is on its way, and the budget is exhausted.
 *
 * An extent that is empty is given back at the end of the engine call (extents_sweep), so that
 * memory which moves within one call does not travel through the worker.
 */
#include "tiers/engine/state.h"

#include <stdlib.h>
#include <string.h>

#define KEEP_RANGES_MAX 32u /* of what is to be kept, on their way at one time */

uint32_t session_index(const struct kvt_engine *e, const struct session *s) {
    return (uint32_t)(s - e->sessions);
}

/* ---- device ------------------------------------------------------------------------------------ */

struct extent *extent_find(const struct kvt_engine *e, uint32_t id) {
    struct extent *x = &e->extents[id % EXTENTS_MAX];
    return x->state != 0 && x->id == id ? x : NULL;
}

static struct extent *extent_entry(struct kvt_engine *e) {
    for (uint32_t i = 1; i < e->extent_top; i++) {
        if (e->extents[i].state == 0) {
            return &e->extents[i];
        }
    }
    return e->extent_top < EXTENTS_MAX ? &e->extents[e->extent_top++] : NULL;
}

/* Charges the extent's memory, and asks for it. */
static void extent_order(struct kvt_engine *e, struct extent *x) {
    struct session *s = &e->sessions[x->session];
    x->state = EXTENT_CREATING;
    e->devices[x->device].used_bytes += x->bytes;
    s->device_bytes += x->bytes;
    s->extents_creating++;
    struct kvt_action *a = action_push(e, KVT_ACTION_EXTENT_CREATE);
    a->device = x->device;
    a->session = x->session;
    a->extent = x->id;
    a->bytes = x->bytes;
}

static int extent_create(struct kvt_engine *e, struct session *s, uint64_t bytes) {
    struct extent *x = s->extent_count < KVT_EXTENTS_MAX ? extent_entry(e) : NULL;
    if (x == NULL) { /* as good as no memory: fewer and larger places would help */
        e->short_tier = KVT_TIER_GPU;
        e->short_bytes = bytes;
        e->short_own = false;
        return -KVT_EQUOTA;
    }
    uint32_t index = (uint32_t)(x - e->extents);
    e->extent_generation[index]++;
    *x = (struct extent){.id = ((uint32_t)e->extent_generation[index] << 16) | index,
                         .device = s->device,
                         .session = session_index(e, s),
                         .bytes = bytes};
    kvt_ranges_init(&x->space);
    s->extent_count++;
    extent_order(e, x);
    return 0;
}

uint64_t dev_available(const struct kvt_engine *e, const struct session *s) {
    const struct device *d = &e->devices[s->device];
    if (d->full || d->lost) {
        return 0;
    }
    uint64_t of_device = d->config.budget_bytes - d->used_bytes;
    uint64_t of_session = d->config.worker_max_bytes - s->device_bytes;
    return of_device < of_session || KVT_BROKEN(e->rules, KVT_BREAK_LIMIT_IGNORED) ? of_device
                                                                                   : of_session;
}

static void extent_destroy(struct kvt_engine *e, struct extent *x) {
    KVT_ASSERT(x->live_bytes == 0 || x->vacates);
    x->state = EXTENT_DESTROYING;
    struct kvt_action *a = action_push(e, KVT_ACTION_EXTENT_DESTROY);
    a->device = x->device;
    a->extent = x->id;
}

/* The worker may have it mapped: ask. A worker that is certainly gone has nothing mapped. */
static void extent_give_back(struct kvt_engine *e, struct extent *x) {
    const struct session *s = &e->sessions[x->session];
    if (!x->sent || s->dead || KVT_BROKEN(e->rules, KVT_BREAK_NO_RECLAIM) ||
        (s->hung && KVT_BROKEN(e->rules, KVT_BREAK_FREE_BEFORE_DEATH))) {
        extent_destroy(e, x);
        return;
    }
    x->state = EXTENT_RECLAIMING;
    x->since_ms = e->now_ms;
    if (!s->hung || s->evicted) { /* otherwise there is no socket to ask on */
        struct kvt_action *a = action_push(e, KVT_ACTION_EXTENT_RECLAIM);
        a->session = x->session;
        a->extent = x->id;
        a->value = x->vacates;
    }
}

/* Its memory goes; what is allocated in it stays allocated, at the worker's addresses. */
void extent_vacate(struct kvt_engine *e, struct extent *x) {
    KVT_ASSERT(x->state == EXTENT_LIVE);
    KVT_ASSERT(!x->vacates);
    x->vacates = true;
    e->sessions[x->session].vacating++;
    extent_give_back(e, x);
}

/* A vacant extent gets memory again. The budget has room for it. */
void extent_refill(struct kvt_engine *e, struct extent *x) {
    const struct device *d = &e->devices[x->device];
    KVT_ASSERT(x->state == EXTENT_VACANT);
    KVT_ASSERT(x->bytes <= d->config.budget_bytes - d->used_bytes);
    extent_order(e, x);
}

/* The entry is free again: there is no memory behind it. */
static void extent_forget(struct kvt_engine *e, struct extent *x) {
    e->sessions[x->session].extent_count--;
    e->sessions[x->session].vacating -= x->vacates;
    kvt_ranges_destroy(&x->space);
    x->state = 0;
}

/* Nothing lies in a vacant extent any more: the worker, if it is there, gives up the addresses. */
static void extent_drop(struct kvt_engine *e, struct extent *x) {
    if (!e->sessions[x->session].hung) {
        struct kvt_action *a = action_push(e, KVT_ACTION_EXTENT_RECLAIM);
        a->session = x->session;
        a->extent = x->id;
    }
    extent_forget(e, x);
    e->epoch++; /* it may have been the last of a session that is gone */
}

/* No memory is charged for it any more. */
static void extent_uncharge(struct kvt_engine *e, const struct extent *x) {
    struct device *d = &e->devices[x->device];
    KVT_ASSERT(d->used_bytes >= x->bytes);
    d->used_bytes -= x->bytes;
    e->sessions[x->session].device_bytes -= x->bytes;
}

/* Whether memory will come by itself and soon: an extent that the session has asked for, one that is
 * being destroyed, one that a worker was asked for just now. If the session's own limit is what is
 * short (e->short_own) only its own extents count. */
bool dev_pending(const struct kvt_engine *e, const struct session *s) {
    for (uint32_t i = 1; i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        const struct session *owner = &e->sessions[x->session];
        if (x->state == 0 || x->device != s->device || (e->short_own && owner != s)) {
            continue;
        }
        bool asked_now =
            x->state == EXTENT_RECLAIMING && !owner->hung && e->now_ms - x->since_ms < ASK_AGAIN_MS;
        bool swept_now = x->state == EXTENT_LIVE && x->live_bytes == 0 && !owner->hung &&
                         owner != s && !owner->settling && !owner->schedule.moved_in_place;
        if (x->state == EXTENT_DESTROYING || (x->state == EXTENT_CREATING && owner == s) ||
            asked_now || swept_now) {
            return true;
        }
    }
    return false;
}

/* Whether memory may still come, though nobody knows when: a worker that was asked is slow, one that
 * hung up is not yet certainly gone, one that gathers memory holds some that it does not use. */
bool dev_hoped_for(const struct kvt_engine *e, const struct session *s) {
    for (uint32_t i = 1; i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        const struct session *owner = &e->sessions[x->session];
        if (!extent_is_charged(x) || x->device != s->device || (e->short_own && owner != s)) {
            continue;
        }
        if (x->state == EXTENT_RECLAIMING || owner->hung ||
            (owner != s &&
             (x->state == EXTENT_CREATING || (x->state == EXTENT_LIVE && x->live_bytes == 0)))) {
            return true;
        }
    }
    return false;
}

/* `s` has waited for long: empty extents of sessions that began to gather later are given back. */
void dev_take_from_younger(struct kvt_engine *e, const struct session *s, uint64_t since_ms) {
    for (uint32_t i = 1; i < e->extent_top; i++) {
        struct extent *x = &e->extents[i];
        if (x->state != EXTENT_LIVE || x->live_bytes > 0 || x->device != s->device) {
            continue;
        }
        struct session *owner = &e->sessions[x->session];
        if (owner != s && owner->settling && !owner->hung && owner->settling_since_ms >= since_ms &&
            !owner->schedule.moved_in_place) {
            extent_give_back(e, x);
        }
    }
}

/* In extents that are empty, or in those that are not, except one. */
static int dev_alloc_in(struct kvt_engine *e, struct session *s, uint64_t bytes, bool empty,
                        uint32_t except, struct dev_place *out) {
    for (uint32_t i = 1; i < e->extent_top; i++) {
        struct extent *x = &e->extents[i];
        if (x->state != EXTENT_LIVE || x->session != session_index(e, s) ||
            x->space.free_bytes < bytes || (x->live_bytes == 0) != empty || x->id == except) {
            continue;
        }
        uint64_t offset;
        int rc = kvt_ranges_alloc(&x->space, bytes, KVT_ALIGN_BYTES, &offset);
        if (rc == 0) {
            x->live_bytes += bytes;
            *out = (struct dev_place){.extent = x->id, .offset = offset};
        }
        if (rc != -KVT_EQUOTA) {
            return rc;
        }
    }
    return -KVT_EQUOTA;
}

static int dev_alloc_live(struct kvt_engine *e, struct session *s, uint64_t bytes,
                          struct dev_place *out) {
    int rc = dev_alloc_in(e, s, bytes, false, 0, out);
    return rc == -KVT_EQUOTA ? dev_alloc_in(e, s, bytes, true, 0, out) : rc;
}

/* A hole in an extent that is neither empty nor `except`. -KVT_EQUOTA: there is none so large. */
int dev_alloc_hole(struct kvt_engine *e, struct session *s, uint64_t bytes, uint32_t except,
                   struct dev_place *out) {
    return dev_alloc_in(e, s, round_up(bytes, KVT_ALIGN_BYTES), false, except, out);
}

/* Gives back empty extents of the session itself, none of which is large enough: their budget is. A
 * few times a request: what cannot fit must not go round for ever. */
bool own_empty_give_back(struct kvt_engine *e, struct session *s) {
    bool any = false;
    if (e->chaining || s->give_backs_left == 0 || s->schedule.moved_in_place) {
        return false;
    }
    for (uint32_t i = 1; i < e->extent_top; i++) {
        struct extent *x = &e->extents[i];
        if (x->state == EXTENT_LIVE && x->session == session_index(e, s) && x->live_bytes == 0) {
            extent_give_back(e, x);
            any = true;
        }
    }
    s->give_backs_left -= any;
    return any;
}

/* What earlier passes have asked for and has not come yet may be claimed once in this pass. */
void memory_pass_begin(struct kvt_engine *e, struct session *s) {
    e->host.claimed_bytes = 0;
    s->creating_bytes = 0;
    for (uint32_t i = 1; i < e->extent_top && s->extents_creating > 0; i++) {
        const struct extent *x = &e->extents[i];
        if (x->state == EXTENT_CREATING && !x->vacates && x->session == session_index(e, s)) {
            s->creating_bytes += x->bytes;
        }
    }
}

/* Notes what is short: the session's own limit, or else the budget. */
int dev_short(struct kvt_engine *e, const struct session *s, uint64_t bytes) {
    e->short_tier = KVT_TIER_GPU;
    e->short_bytes = bytes;
    const struct kvt_engine_device *c = &e->devices[s->device].config;
    e->short_own =
        c->worker_max_bytes < c->budget_bytes && bytes > c->worker_max_bytes - s->device_bytes;
    return -KVT_EQUOTA;
}

/* Bytes of the extent that is made for a place of so many: its own, or one for several such places, with
 * no rest that fits nothing. */
uint64_t dev_extent_bytes(const struct kvt_engine_device *config, uint64_t bytes) {
    uint64_t alone = round_up(bytes, config->granule_bytes);
    uint64_t packed = round_up(config->extent_bytes, config->granule_bytes);
    return alone > packed / 2 ? alone : packed / alone * alone;
}

int dev_alloc(struct kvt_engine *e, struct session *s, uint64_t bytes, struct dev_place *out) {
    KVT_ASSERT(bytes > 0);
    if (bytes > e->devices[s->device].config.worker_max_bytes) {
        return dev_short(e, s, bytes);
    }
    bytes = round_up(bytes, KVT_ALIGN_BYTES);
    int rc = dev_alloc_live(e, s, bytes, out);
    if (rc != -KVT_EQUOTA) {
        return rc;
    }
    int quota = dev_short(e, s, bytes);
    if (s->creating_bytes >= bytes) { /* an earlier pass has asked for it */
        s->creating_bytes -= bytes;
        return KVT_WAIT;
    }
    const struct kvt_engine_device *config = &e->devices[s->device].config;
    uint64_t want = dev_extent_bytes(config, bytes);
    uint64_t available = dev_available(e, s);
    if (want > available) {
        want = round_up(bytes, config->granule_bytes);
    }
    if (want <= available) {
        rc = extent_create(e, s, want);
        s->creating_bytes += rc == 0 ? want - bytes : 0; /* for what this pass allocates next */
        return rc == 0 ? KVT_WAIT : rc;
    }
    return own_empty_give_back(e, s) || dev_pending(e, s) ? KVT_WAIT : quota;
}

/* One extent for several places that will be allocated next, so that they can trade places later.
 * KVT_READY: there is one, or it cannot be had and they go wherever there is room. */
int dev_reserve(struct kvt_engine *e, struct session *s, uint64_t bytes) {
    const struct device *d = &e->devices[s->device];
    struct dev_place whole;
    if (bytes > d->config.worker_max_bytes || dev_alloc_live(e, s, bytes, &whole) == KVT_READY) {
        if (bytes <= d->config.worker_max_bytes) {
            dev_free(e, whole, bytes);
        }
        return KVT_READY;
    }
    uint64_t want = round_up(bytes, d->config.granule_bytes);
    if (s->extents_creating > 0 || want > dev_available(e, s)) {
        return s->extents_creating > 0 ? KVT_WAIT : KVT_READY;
    }
    return extent_create(e, s, want) == 0 ? KVT_WAIT : KVT_READY;
}

void dev_free(struct kvt_engine *e, struct dev_place place, uint64_t bytes) {
    if (place.extent == 0) {
        return;
    }
    bytes = round_up(bytes, KVT_ALIGN_BYTES);
    struct extent *x = extent_find(e, place.extent);
    KVT_ASSERT(x != NULL);
    KVT_ASSERT(x->live_bytes >= bytes);
    kvt_ranges_free(&x->space, place.offset, bytes);
    x->live_bytes -= bytes;
    e->sweep_due |= x->live_bytes == 0;
}

/* Undoes dev_free, within one call of the engine and before anything else was allocated there. */
void dev_take(struct kvt_engine *e, struct dev_place place, uint64_t bytes) {
    bytes = round_up(bytes, KVT_ALIGN_BYTES);
    struct extent *x = extent_find(e, place.extent);
    KVT_ASSERT(x != NULL);
    kvt_ranges_take(&x->space, place.offset, bytes);
    x->live_bytes += bytes;
}

/* Gives back empty extents. A hung-up session's go only when nothing of it is in flight. */
void extents_sweep(struct kvt_engine *e) {
    if (!e->sweep_due) {
        return;
    }
    e->sweep_due = false;
    for (uint32_t i = 1; i < e->extent_top; i++) {
        struct extent *x = &e->extents[i];
        if (x->state == EXTENT_LIVE && x->live_bytes == 0) {
            const struct session *s = &e->sessions[x->session];
            if ((!s->hung && !s->settling && !s->schedule.moved_in_place) || s->emptied) {
                extent_give_back(e, x);
            }
        } else if (x->state == EXTENT_RECLAIMING && e->sessions[x->session].dead) {
            extent_destroy(e, x);
        } else if (x->state == EXTENT_VACANT && x->live_bytes == 0) {
            extent_drop(e, x);
        }
    }
}

void extent_created(struct kvt_engine *e, uint32_t extent, int code) {
    struct extent *x = extent_find(e, extent);
    KVT_ASSERT(x != NULL);
    KVT_ASSERT(x->state == EXTENT_CREATING);
    struct session *s = &e->sessions[x->session];
    KVT_ASSERT(s->extents_creating > 0);
    s->extents_creating--;
    e->epoch++;
    e->devices[x->device].changed_ms = e->now_ms;
    if (code == 0 && !x->vacates) {
        code = kvt_ranges_add(&x->space, 0, x->bytes);
        if (code != 0) {
            extent_destroy(e, x);
            return;
        }
    }
    if (code != 0) {
        extent_uncharge(e, x);
        e->devices[x->device].full = true;
        if (x->vacates) {
            x->state = EXTENT_VACANT;
            e->sweep_due = true;
        } else {
            extent_forget(e, x);
        }
        return;
    }
    x->state = EXTENT_LIVE;
    s->vacating -= x->vacates;
    x->vacates = false;
    e->sweep_due = true; /* the one who asked may have gone meanwhile */
    if (!s->hung) {
        x->sent = true;
        struct kvt_action *a = action_push(e, KVT_ACTION_EXTENT_SEND);
        a->device = x->device;
        a->session = x->session;
        a->extent = x->id;
        a->bytes = x->bytes;
    }
}

void extent_destroyed(struct kvt_engine *e, uint32_t extent) {
    struct extent *x = extent_find(e, extent);
    KVT_ASSERT(x != NULL);
    KVT_ASSERT(x->state == EXTENT_DESTROYING);
    struct device *d = &e->devices[x->device];
    extent_uncharge(e, x);
    d->full = false;
    d->changed_ms = e->now_ms;
    e->epoch++;
    if (x->vacates) {
        x->state = EXTENT_VACANT;
        x->sent = false;
        e->sweep_due = true; /* what lay in it may have gone meanwhile */
    } else {
        extent_forget(e, x);
    }
}

void extent_reclaimed(struct kvt_engine *e, uint32_t session, uint32_t extent) {
    struct extent *x = extent_find(e, extent);
    if (x == NULL || x->session != session || x->state != EXTENT_RECLAIMING) {
        return; /* a lie, or late: nothing was waiting for it */
    }
    extent_destroy(e, x);
}

/* ---- host --------------------------------------------------------------------------------------- */

static void chunk_state_set(struct kvt_engine *e, uint32_t chunk, uint8_t state) {
    struct host *h = &e->host;
    bool was_busy = h->chunks[chunk] == CHUNK_GROWING || h->chunks[chunk] == CHUNK_SHRINKING;
    bool is_busy = state == CHUNK_GROWING || state == CHUNK_SHRINKING;
    h->busy_chunks += (uint32_t)is_busy - (uint32_t)was_busy;
    if (chunk < h->keep_chunks) {
        h->keep_growing += state == CHUNK_GROWING;
        h->keep_growing -= h->chunks[chunk] == CHUNK_GROWING;
        h->kept_bytes += state != CHUNK_ABSENT ? h->chunk_bytes : 0;
        h->kept_bytes -= h->chunks[chunk] != CHUNK_ABSENT ? h->chunk_bytes : 0;
    }
    h->growing_bytes += state == CHUNK_GROWING ? h->chunk_bytes : 0;
    h->growing_bytes -= h->chunks[chunk] == CHUNK_GROWING ? h->chunk_bytes : 0;
    if (h->claimed_bytes > h->growing_bytes) {
        h->claimed_bytes = h->growing_bytes;
    }
    if (h->chunks[chunk] == CHUNK_ABSENT && state != CHUNK_ABSENT) {
        h->used_bytes += h->chunk_bytes;
    } else if (h->chunks[chunk] != CHUNK_ABSENT && state == CHUNK_ABSENT) {
        h->used_bytes -= h->chunk_bytes;
    }
    h->chunks[chunk] = state;
}

static void chunks_turn(struct kvt_engine *e, uint64_t offset, uint64_t bytes, uint8_t from,
                        uint8_t to) {
    struct host *h = &e->host;
    uint64_t first = offset / h->chunk_bytes;
    uint64_t count = bytes / h->chunk_bytes;
    KVT_ASSERT(count > 0);
    KVT_ASSERT(bytes % h->chunk_bytes == 0);
    KVT_ASSERT(first < h->chunk_count);
    KVT_ASSERT(count <= h->chunk_count - first);
    for (uint64_t i = first; i < first + count; i++) {
        KVT_ASSERT(h->chunks[i] == from);
        chunk_state_set(e, (uint32_t)i, to);
    }
}

static void chunks_shrink(struct kvt_engine *e, uint64_t offset, uint64_t bytes) {
    struct kvt_action *a = action_push(e, KVT_ACTION_HOST_SHRINK);
    a->offset = offset;
    a->bytes = bytes;
    chunks_turn(e, offset, bytes, CHUNK_READY, CHUNK_SHRINKING);
}

static void chunks_ask(struct kvt_engine *e, uint32_t first, uint32_t count) {
    struct kvt_action *a = action_push(e, KVT_ACTION_HOST_GROW);
    a->offset = first * e->host.chunk_bytes;
    a->bytes = count * e->host.chunk_bytes;
    chunks_turn(e, a->offset, a->bytes, CHUNK_ABSENT, CHUNK_GROWING);
}

/* Asks for what is to be kept, in order: as much as keeps those busy who bring it up. */
void host_keep(struct kvt_engine *e) {
    struct host *h = &e->host;
    uint64_t range = e->config.host_range_bytes / h->chunk_bytes;
    range = range > 0 ? range : 1;
    while (h->keep_growing < KEEP_RANGES_MAX * range && h->keep_next < h->keep_chunks) {
        uint32_t first = h->keep_next;
        uint32_t count = 0;
        while (count < range && first + count < h->keep_chunks &&
               h->chunks[first + count] == CHUNK_ABSENT) {
            count++;
        }
        if (count > 0) {
            chunks_ask(e, first, count);
        }
        h->keep_next += count > 0 ? count : 1; /* a cache has asked for it before */
    }
}

/* Asks for as many chunks as hold `bytes`, or for what there is. */
static void host_grow(struct kvt_engine *e, uint64_t bytes) {
    struct host *h = &e->host;
    uint64_t asked_bytes = 0;
    for (uint32_t i = 0; i < h->chunk_count && asked_bytes < bytes; i++) {
        if (h->chunks[i] == CHUNK_ABSENT) {
            chunks_ask(e, i, 1);
            asked_bytes += h->chunk_bytes;
        }
    }
}

/* Sees to it that `bytes` come beside what this pass counts on already, so that all that a step lacks
 * is brought up at one time. false: nothing comes. */
static bool host_ask(struct kvt_engine *e, uint64_t bytes) {
    struct host *h = &e->host;
    uint64_t unclaimed = h->growing_bytes - h->claimed_bytes;
    if (unclaimed < bytes && !h->full) {
        host_grow(e, bytes - unclaimed);
        unclaimed = h->growing_bytes - h->claimed_bytes;
    }
    h->claimed_bytes += bytes < unclaimed ? bytes : unclaimed;
    return h->busy_chunks > 0;
}

int host_alloc(struct kvt_engine *e, struct session *s, uint64_t bytes, uint64_t *offset) {
    struct host *h = &e->host;
    KVT_ASSERT(bytes > 0);
    bytes = round_up(bytes, KVT_ALIGN_BYTES);
    const struct kvt_engine_config *c = &e->config;
    bool over = bytes > c->host_worker_max_bytes - s->host_bytes;
    bool own = over && c->host_worker_max_bytes < c->host_budget_bytes;
    int rc = over ? -KVT_EQUOTA : kvt_ranges_alloc(&h->space, bytes, KVT_ALIGN_BYTES, offset);
    if (rc == 0) {
        h->live_bytes += bytes;
        s->host_bytes += bytes;
    }
    if (rc != -KVT_EQUOTA) {
        return rc;
    }
    e->short_tier = KVT_TIER_HOST;
    e->short_bytes = bytes;
    e->short_own = own;
    return !over && host_ask(e, bytes) ? KVT_WAIT : -KVT_EQUOTA;
}

void host_free(struct kvt_engine *e, struct session *s, uint64_t offset, uint64_t bytes) {
    if (offset == KVT_NOWHERE) {
        return;
    }
    bytes = round_up(bytes, KVT_ALIGN_BYTES);
    kvt_ranges_free(&e->host.space, offset, bytes);
    e->host.sweep_due = true;
    KVT_ASSERT(e->host.live_bytes >= bytes);
    KVT_ASSERT(s->host_bytes >= bytes);
    e->host.live_bytes -= bytes;
    s->host_bytes -= bytes;
}

/* Gives back free chunks, but for those to be kept and, as long as anything is allocated, one. */
void host_sweep(struct kvt_engine *e) {
    struct host *h = &e->host;
    if (!h->sweep_due || e->settling_count > 0) {
        return;
    }
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        const struct migration *m = &e->sessions[i].migration;
        if (m->family != NULL && m->to_host && !m->submitted) {
            return; /* a layer that leaves the device gathers several chunks */
        }
    }
    h->sweep_due = false;
    uint64_t keep_bytes = h->live_bytes > 0 ? h->chunk_bytes : 0;
    for (uint32_t i = h->chunk_count; i-- > h->keep_chunks;) {
        if (h->space.free_bytes < keep_bytes + h->chunk_bytes) {
            return;
        }
        uint64_t offset = i * h->chunk_bytes;
        if (h->chunks[i] != CHUNK_READY || !kvt_ranges_is_free(&h->space, offset, h->chunk_bytes) ||
            kvt_ranges_remove(&h->space, offset, h->chunk_bytes) != 0) {
            continue;
        }
        chunks_shrink(e, offset, h->chunk_bytes);
    }
}

void host_grown(struct kvt_engine *e, uint64_t offset, uint64_t bytes, int code) {
    struct host *h = &e->host;
    if (code == 0 && kvt_ranges_add(&h->space, offset, bytes) != 0) {
        chunks_turn(e, offset, bytes, CHUNK_GROWING, CHUNK_READY);
        chunks_shrink(e, offset, bytes); /* it is there, and cannot be written down */
        code = -KVT_ENOMEM;
    } else {
        chunks_turn(e, offset, bytes, CHUNK_GROWING, code == 0 ? CHUNK_READY : CHUNK_ABSENT);
    }
    if (code != 0) {
        h->full = true; /* others may come that were asked for before */
        h->keep_next = h->keep_chunks;
    }
    host_keep(e);
    h->changed_ms = e->now_ms;
    e->epoch++;
    h->sweep_due = true;
}

void host_shrunk(struct kvt_engine *e, uint64_t offset, uint64_t bytes) {
    struct host *h = &e->host;
    chunks_turn(e, offset, bytes, CHUNK_SHRINKING, CHUNK_ABSENT);
    h->full = false;
    h->changed_ms = e->now_ms;
    e->epoch++;
}
