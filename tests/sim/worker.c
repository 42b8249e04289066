/* A worker's life: it attaches, asks for this and that, and ends in one of many ways. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

static void on_think(struct sim *sim, void *object, uint64_t value);

struct sim_worker *sim_session(struct sim *sim, uint32_t session) {
    if (session >= SIM_SESSIONS_MAX || !sim->sessions[session]) {
        sim_fail(sim, "session %u is not there", session);
    }
    return sim->sessions[session];
}

struct sim_cache *sim_cache_find(struct sim_worker *w, uint32_t id) {
    for (uint32_t i = 0; i < SIM_CACHES_MAX; i++) {
        if (w->caches[i].id == id) {
            return &w->caches[i];
        }
    }
    return NULL;
}

/* ---- attaching ------------------------------------------------------------------------------- */

static uint32_t sessions_taken(const struct sim *sim) {
    uint32_t taken = 0;
    for (uint32_t i = 0; i < SIM_SESSIONS_MAX; i++) {
        taken += sim->sessions[i] != NULL;
    }
    return taken;
}

static struct sim_worker *worker_add(struct sim *sim) {
    if (sim->worker_count == sim->worker_room) {
        sim->worker_room = sim->worker_room == 0 ? 16 : sim->worker_room * 2;
        sim->workers = sim_grow(sim->workers, sim->worker_room * sizeof(struct sim_worker *));
    }
    struct sim_worker *w = sim_zeroed(sizeof(*w));
    sim->workers[sim->worker_count++] = w;
    w->ring_bytes = 8192 * sim_between(&sim->random, 4, 40);
    w->page = sim_zeroed(KVT_CONTROL_PAGE_BYTES);
    w->ring = sim_zeroed(w->ring_bytes);
    return w;
}

static void attach(struct sim *sim, void *object, uint64_t process) {
    struct sim_random *r = &sim->random;
    if (sim->lingering) {
        return;
    }
    struct sim_worker *w = worker_add(sim);
    w->index = (uint32_t)process;
    w->tenant = (uint32_t)sim_below(r, 2);
    w->device = (uint32_t)sim_below(r, sim->config.device_count);
    w->kind = sim_chance(r, 500) ? KVT_WORKER_SEGMENT : KVT_WORKER_DENSE;
    w->liar = sim->fault_per_mille[SIM_LIED] != 0 && sim_chance(r, 400);
    w->unchecked = sim->devices[w->device].lost;
    struct kvt_session_options o = {.tenant = w->tenant,
                                    .device = w->device,
                                    .worker_kind = w->kind,
                                    .keeps_addresses = sim_chance(r, sim->static_ones ? 950 : 500),
                                    .ring = w->ring,
                                    .ring_bytes = w->ring_bytes};
    int session = kvt_engine_session_open(sim->engine, &o);
    if (session < 0) {
        if (session != -KVT_EBUSY || sessions_taken(sim) < sim->config.sessions_max) {
            sim_fail(sim, "attach: error %d with %u of %u sessions", session, sessions_taken(sim),
                     sim->config.sessions_max);
        }
        w->process = SIM_GONE;
        w->freed = true;
        sim_after(sim, sim_us(sim, 1000, 20000), attach, NULL, process);
        return;
    }
    if (session >= SIM_SESSIONS_MAX || sim->sessions[session]) {
        sim_fail(sim, "attach: session %d is in use", session);
    }
    w->session = (uint32_t)session;
    w->attached = true;
    w->counted = true;
    sim->sessions[session] = w;
    sim->processes[process] = w;
    sim->stats.sessions++;
    sim_trace(sim, "session %d: attached, %s worker on device %u%s", session,
              w->kind == KVT_WORKER_DENSE ? "dense" : "segment", w->device,
              w->liar ? ", a liar" : "");
    sim_actions(sim);
    sim_after(sim, sim_us(sim, 0, 200), on_think, w, 0);
}

void sim_worker_start(struct sim *sim, uint32_t process) {
    sim_after(sim, sim_us(sim, 0, 3000), attach, NULL, process);
}

void sim_worker_free(struct sim *sim, struct sim_worker *w) {
    for (uint32_t i = 0; i < SIM_CACHES_MAX; i++) {
        sim_cache_clear(&w->caches[i]);
    }
    free(w->schedule.bytes);
    free(w->stream);
    free(w->page);
    free(w->ring);
    free(w);
}

/* ---- the end --------------------------------------------------------------------------------- */

static void add_counters(struct sim *sim, const struct sim_worker *w) {
    struct kvt_session_info info;
    uint32_t at = w->session;
    if (kvt_engine_session_info(sim->engine, &at, &info) && info.session == w->session) {
        sim->stats.compacted_bytes += info.counters.compacted_bytes;
        sim->stats.migrated_bytes += info.counters.migrated_bytes;
        sim->stats.copied_on_write_bytes += info.counters.copied_on_write_bytes;
        sim->stats.discarded_bytes += info.counters.prefetch_discarded_bytes;
    }
}

static void on_hangup(struct sim *sim, void *object, uint64_t value) {
    struct sim_worker *w = object;
    if (!w->attached) {
        return;
    }
    sim_trace(sim, "session %u: hang-up", w->session);
    sim_clock(sim);
    w->attached = false;
    w->request_count = 0;
    kvt_engine_session_hangup(sim->engine, w->session);
    sim_actions(sim);
}

static void on_dead(struct sim *sim, void *object, uint64_t value) {
    struct sim_worker *w = object;
    if (w->process == SIM_GONE) {
        return;
    }
    sim_trace(sim, "session %u: dead", w->session);
    add_counters(sim, w);
    sim_clock(sim);
    w->process = SIM_GONE;
    w->attached = false;
    w->request_count = 0;
    sim_schedule_close(w);
    sim_extents_unmap(sim, w);
    if (sim->processes[w->index] == w) {
        sim->processes[w->index] = NULL;
        sim_worker_start(sim, w->index);
    }
    kvt_engine_session_dead(sim->engine, w->session);
    sim_actions(sim);
}

/* The stream of a dying process may run on for a while; its hang-up may be seen first. */
static void worker_kill(struct sim *sim, struct sim_worker *w) {
    if (w->process != SIM_RUNNING) {
        return;
    }
    w->process = SIM_DYING;
    w->hung = w->hung || sim_chance(&sim->random, 500);
    uint64_t dead_us = sim_chance(&sim->random, 700) ? sim_us(sim, 0, 500) : sim_us(sim, 0, 30000);
    if (sim_chance(&sim->random, 700)) {
        sim_after(sim, sim_us(sim, 0, dead_us), on_hangup, w, 0);
    }
    sim_after(sim, dead_us, on_dead, w, 0);
}

void sim_worker_freed(struct sim *sim, uint32_t session) {
    struct sim_worker *w = sim_session(sim, session);
    if (w->attached || w->freed) {
        sim_fail(sim, "session %u is freed, but its worker is attached", session);
    }
    sim_trace(sim, "session %u: freed", session);
    w->freed = true;
    sim->sessions[session] = NULL;
    sim_order_clear(sim, session);
    memset(w->ring, 0xdb, w->ring_bytes);
}

/* The socket is lost, the process lives. It attaches anew (another session, not simulated here) and
 * tells what it has unmapped of the old one; or it does nothing, until it is dead. */
static void on_reattached(struct sim *sim, void *object, uint64_t value) {
    struct sim_worker *w = object;
    if (w->process != SIM_RUNNING || w->freed) {
        return;
    }
    sim_schedule_close(w); /* its stream has been let go */
    for (uint32_t i = 0; i < sim->extent_top; i++) {
        if (sim->extents[i].mapped == w) {
            sim->extents[i].mapped = NULL;
            kvt_engine_extent_reclaimed(sim->engine, w->session, sim->extents[i].id);
            sim_actions(sim);
        }
    }
}

static void hang_up(struct sim *sim, struct sim_worker *w) {
    on_hangup(sim, w, 0);
    if (sim_chance(&sim->random, 600)) {
        sim_after(sim, sim_us(sim, 100, 20000), on_reattached, w, 0);
    }
    sim_after(sim, sim_us(sim, 1000, 200000), on_dead, w, 0);
}

/* ---- stopping -------------------------------------------------------------------------------- */

static void resume(struct sim *sim, struct sim_worker *w) {
    if (!w->hung || w->process != SIM_RUNNING) {
        return;
    }
    sim_trace(sim, "session %u: goes on", w->session);
    w->hung = false;
    w->progress_us = w->turn_us = sim->now_us;
    sim_stream_wake(sim, w);
    sim_stream_resume(sim, w);
    sim_after(sim, sim_us(sim, 0, 200), on_think, w, 0);
}

static void on_resume(struct sim *sim, void *object, uint64_t value) {
    resume(sim, object);
}

static void hang(struct sim *sim, struct sim_worker *w) {
    sim_trace(sim, "session %u: hangs", w->session);
    w->hung = true;
    if (sim_chance(&sim->random, 700)) {
        uint64_t most_us = sim_chance(&sim->random, 600) ? 30000 : 1000000;
        sim_after(sim, sim_us(sim, 100, most_us), on_resume, w, 0);
    }
}

void sim_worker_cool(struct sim *sim, struct sim_worker *w) {
    if (w->hung && sim_chance(&sim->random, 500)) {
        resume(sim, w);
    }
    bool dies = sim->world == SIM_ROUGH && sim_chance(&sim->random, 150);
    if (w->hung || w->liar || w->stubborn || w->unchecked || dies) {
        worker_kill(sim, w);
    }
}

/* ---- memory ---------------------------------------------------------------------------------- */

void sim_worker_extent(struct sim *sim, const struct kvt_action *a) {
    struct sim_worker *w = sim_session(sim, a->session);
    struct sim_extent *x = sim_extent_find(sim, a->extent);
    if (!x || !x->live || x->destroying || x->mapped || x->session != a->session ||
        x->bytes != a->bytes) {
        sim_fail(sim, "extent %u is sent to session %u", a->extent, a->session);
    }
    if (!w->attached) {
        sim_fail(sim, "extent %u is sent to session %u, which has hung up", a->extent, a->session);
    }
    x->mapped = w;
}

static void on_reclaimed(struct sim *sim, void *object, uint64_t extent) {
    struct sim_worker *w = object;
    struct sim_extent *x = sim_extent_find(sim, (uint32_t)extent);
    if (w->process == SIM_GONE || !x || x->mapped != w) {
        return;
    }
    if (w->hung || w->process == SIM_DYING) {
        sim_after(sim, sim_us(sim, 500, 2000), on_reclaimed, w, extent);
        return;
    }
    if (w->liar || w->unchecked || !w->attached) {
        sim_schedule_close(w); /* it lets everything go */
    } else if (sim_stream_uses(w, (uint32_t)extent)) {
        sim_fail(sim, "session %u: extent %llu is taken back while a step uses it", w->session,
                 (unsigned long long)extent);
    }
    x->mapped = NULL;
    sim_clock(sim);
    kvt_engine_extent_reclaimed(sim->engine, w->session, (uint32_t)extent);
    sim_actions(sim);
}

void sim_worker_reclaim(struct sim *sim, const struct kvt_action *a) {
    struct sim_worker *w = sim_session(sim, a->session);
    sim_trace(sim, "session %u: extent %u is asked back%s", a->session, a->extent,
              a->value != 0 ? ", but for its addresses" : "");
    sim->stats.vacated += a->value != 0;
    if (w->process == SIM_GONE || !w->attached) {
        return;
    }
    if (sim_fault(sim, SIM_RECLAIM_NEVER)) {
        w->stubborn = true;
        return;
    }
    uint64_t delay_us =
        sim_fault(sim, SIM_RECLAIM_LATE) ? sim_us(sim, 1000, 300000) : sim_us(sim, 0, 300);
    sim_after(sim, delay_us, on_reclaimed, w, a->extent);
}

/* ---- the control page ------------------------------------------------------------------------ */

void sim_worker_ready(struct sim *sim, struct sim_worker *w, uint32_t slot, uint64_t value) {
    if (w->stream_waits) {
        w->stream_waits = false;
        sim_stream_wake(sim, w);
    }
}

void sim_worker_post(struct sim *sim, const struct kvt_action *a) {
    struct sim_worker *w = sim_session(sim, a->session);
    struct kvt_control_page *page = w->page;
    sim_trace(sim, "session %u: %s %llu%s", a->session,
              a->kind == KVT_ACTION_POST_READY       ? "ready by the loop"
              : a->kind == KVT_ACTION_POST_COMMITTED ? "committed"
                                                     : "failed",
              (unsigned long long)a->value, a->kind == KVT_ACTION_POST_READY ? " in a slot" : "");
    switch (a->kind) {
    case KVT_ACTION_POST_READY:
        if (a->slot >= KVT_SLOTS_MAX) {
            sim_fail(sim, "ready[%u] is posted", a->slot);
        }
        page->ready[a->slot].value = a->value;
        sim_worker_ready(sim, w, a->slot, a->value);
        break;
    case KVT_ACTION_POST_COMMITTED:
        page->committed.value = a->value;
        sim_schedule_committed(sim, w, a->value);
        break;
    default:
        page->failed.aux = a->code;
        page->failed.value = a->value;
        sim_schedule_failed(sim, w, a->value, a->code);
        sim_stream_resume(sim, w);
    }
}

/* ---- thinking -------------------------------------------------------------------------------- */

static void lie(struct sim *sim, struct sim_worker *w) {
    struct sim_random *r = &sim->random;
    if (!w->liar || !sim_fault(sim, SIM_LIED)) {
        return;
    }
    struct kvt_counter *counter =
        sim_chance(r, 500) ? &w->page->step : &w->page->done[sim_below(r, KVT_SLOTS_MAX)];
    uint64_t values[] = {sim_random_next(r), 0, counter->value + 1, counter->value + KVT_POISON,
                         w->last_step + sim_below(r, 3)};
    counter->value = values[sim_below(r, 5)];
    for (uint32_t i = 0; i < sim->extent_top; i++) {
        struct sim_extent *x = &sim->extents[i];
        if (x->mapped == w && x->live && sim_chance(r, 200)) {
            x->memory[sim_below(r, x->bytes)] = (uint8_t)sim_random_next(r);
        }
    }
    sim_device_look(sim, w->device);
}

/* Whether it goes on as before. */
static bool survives(struct sim *sim, struct sim_worker *w) {
    if (sim_fault(sim, SIM_KILLED)) {
        worker_kill(sim, w);
        return false;
    }
    if (sim_fault(sim, SIM_HUNG_UP)) {
        hang_up(sim, w);
        return false;
    }
    if (sim_fault(sim, SIM_HUNG)) {
        hang(sim, w);
        return false;
    }
    if (!w->unchecked && sim_fault(sim, SIM_EVICTED)) {
        w->unchecked = true;
        kvt_engine_session_evict(sim->engine, w->session);
        sim_actions(sim);
    }
    if (!sim->devices[w->device].lost && sim_fault(sim, SIM_DEVICE_LOST)) {
        sim_device_lose(sim, w->device);
    }
    return true;
}

/* Done with everything: it closes its caches, or just goes. */
static void leave(struct sim *sim, struct sim_worker *w) {
    struct sim_schedule *s = &w->schedule;
    if (sim->world == SIM_ROUGH && s->open && s->begun && !s->aborted &&
        sim_chance(&sim->random, 100)) {
        sim_request_abort(sim, w);
    }
    if (w->request_count > 0 || (s->open && !w->liar)) {
        return;
    }
    if (!w->leaving) {
        w->leaving = true;
        w->goes = sim_chance(&sim->random, 500);
    }
    bool any = false;
    for (uint32_t i = 0; i < SIM_CACHES_MAX; i++) {
        any = any || w->caches[i].id != 0;
    }
    if (any && !w->goes && !w->unchecked) {
        sim_request_close(sim, w);
    } else {
        worker_kill(sim, w);
    }
}

static void ask(struct sim *sim, struct sim_worker *w) {
    struct sim_random *r = &sim->random;
    struct sim_schedule *s = &w->schedule;
    if (s->open && s->begun && !s->aborted && w->request_count < SIM_REQUESTS_MAX &&
        sim_fault(sim, SIM_ABORTED)) {
        sim_request_abort(sim, w);
        return;
    }
    if (s->open && s->acquired && w->request_count == 0 && s->begun && sim_chance(r, 500)) {
        sim_request_acquire(sim, w);
        return;
    }
    bool busy = s->open || w->request_count > 0;
    if ((!busy || sim_chance(r, 60)) && w->request_count < SIM_REQUESTS_MAX - 1) {
        sim_request_random(sim, w);
    }
}

static void on_think(struct sim *sim, void *object, uint64_t value) {
    struct sim_worker *w = object;
    if (w->process != SIM_RUNNING || w->hung || !w->attached || !survives(sim, w)) {
        return;
    }
    lie(sim, w);
    if (sim->cooling) {
        leave(sim, w);
    } else if (!sim->lingering) {
        ask(sim, w);
    }
    uint64_t delay_us = sim_us(sim, 10, 600);
    if (!sim->cooling && (sim->lingering || sim_chance(&sim->random, 30))) {
        delay_us = sim_us(sim, 1000, 150000); /* long enough to be idle */
    }
    sim_after(sim, delay_us, on_think, w, 0);
}
