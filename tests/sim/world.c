/* One run: what the world is like, the queue of events, the engine's actions, the end. */
#include "tests/sim/sim.h"
#include "tiers/engine/assert.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EVENTS_MAX = 2000000 };

/* An assertion of the engine or the issuer is a finding like any other. One run at a time. */
static struct sim *running;

/* ---- telling --------------------------------------------------------------------------------- */

void sim_fail(struct sim *sim, const char *format, ...) {
    va_list list;
    va_start(list, format);
    int n =
        snprintf(sim->reason, sizeof(sim->reason), "at %llu us: ", (unsigned long long)sim->now_us);
    (void)vsnprintf(sim->reason + n, sizeof(sim->reason) - (size_t)n, format, list);
    va_end(list);
    longjmp(sim->failure, 1); /* lint: allow call: out of whatever depth, as a failed run must */
}

static void on_assert(const char *file, int line, const char *condition) {
    if (running) {
        sim_fail(running, "%s:%d: assertion failed: %s", file, line, condition);
    }
}

void sim_trace(struct sim *sim, const char *format, ...) {
    if (!sim->options.trace) {
        return;
    }
    va_list list;
    va_start(list, format);
    printf("%10llu  ", (unsigned long long)sim->now_us);
    (void)vprintf(format, list);
    printf("\n");
    va_end(list);
}

void sim_hash(struct sim *sim, uint64_t value) {
    sim->hash = sim_mix(sim->hash ^ value) + sim->now_us;
}

bool sim_fault(struct sim *sim, enum sim_fault fault) {
    bool over = sim->lingering || sim->cooling;
    if (over || !sim_chance(&sim->random, sim->fault_per_mille[fault])) {
        return false;
    }
    sim->stats.faults[fault]++;
    return true;
}

/* ---- events ---------------------------------------------------------------------------------- */

static bool earlier(const struct sim_event *a, const struct sim_event *b) {
    return a->time_us != b->time_us ? a->time_us < b->time_us : a->sequence < b->sequence;
}

void sim_after(struct sim *sim, uint64_t delay_us, sim_handler *run, void *object, uint64_t value) {
    struct sim_events *q = &sim->events;
    if (q->count == q->room) {
        q->room = q->room == 0 ? 256 : q->room * 2;
        q->heap = sim_grow(q->heap, q->room * sizeof(*q->heap));
    }
    struct sim_event event = {.time_us = sim->now_us + delay_us,
                              .sequence = q->sequence++,
                              .run = run,
                              .object = object,
                              .value = value};
    uint32_t at = q->count++;
    while (at > 0 && earlier(&event, &q->heap[(at - 1) / 2])) {
        q->heap[at] = q->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    q->heap[at] = event;
}

static struct sim_event event_take(struct sim_events *q) {
    struct sim_event first = q->heap[0];
    struct sim_event last = q->heap[--q->count];
    uint32_t at = 0;
    for (uint32_t child = 1; child < q->count; child = 2 * at + 1) {
        if (child + 1 < q->count && earlier(&q->heap[child + 1], &q->heap[child])) {
            child++;
        }
        if (!earlier(&q->heap[child], &last)) {
            break;
        }
        q->heap[at] = q->heap[child];
        at = child;
    }
    q->heap[at] = last;
    return first;
}

/* ---- time ------------------------------------------------------------------------------------ */

static void on_tick(struct sim *sim, void *object, uint64_t value) {
    if (value != sim->tick_us) {
        return; /* an earlier one has taken its place */
    }
    sim->tick_us = UINT64_MAX;
    kvt_engine_tick(sim->engine, sim->now_us / 1000);
    sim_actions(sim);
}

static void tick_plan(struct sim *sim) {
    uint64_t deadline_ms = kvt_engine_deadline_ms(sim->engine);
    if (deadline_ms == UINT64_MAX) {
        return;
    }
    uint64_t due_us = deadline_ms * 1000;
    if (due_us <= sim->now_us) {
        due_us = sim->now_us + 1000; /* the loop looks once a millisecond at most */
    }
    if (due_us < sim->tick_us) {
        sim->tick_us = due_us;
        sim_after(sim, due_us - sim->now_us, on_tick, NULL, due_us);
    }
}

void sim_clock(struct sim *sim) {
    if (sim_chance(&sim->random, 300)) {
        kvt_engine_tick(sim->engine, sim->now_us / 1000);
        sim_actions(sim);
    }
}

/* ---- actions --------------------------------------------------------------------------------- */

static void act(struct sim *sim, const struct kvt_action *a) {
    switch (a->kind) {
    case KVT_ACTION_ANSWER:
        sim_answer(sim, a);
        break;
    case KVT_ACTION_PROGRAM:
        sim_check_leaving(sim, a->program);
        sim_device_mail(sim, a);
        break;
    case KVT_ACTION_CANCEL:
    case KVT_ACTION_SESSION_OPEN:
    case KVT_ACTION_SESSION_CLOSE:
        sim_device_mail(sim, a);
        break;
    case KVT_ACTION_SESSION_FREED:
        sim_worker_freed(sim, a->session);
        break;
    case KVT_ACTION_EXTENT_CREATE:
        sim_extent_create(sim, a);
        break;
    case KVT_ACTION_EXTENT_SEND:
        sim_worker_extent(sim, a);
        break;
    case KVT_ACTION_EXTENT_RECLAIM:
        sim_worker_reclaim(sim, a);
        break;
    case KVT_ACTION_EXTENT_DESTROY:
        sim_extent_destroy(sim, a);
        break;
    case KVT_ACTION_HOST_GROW:
        sim_host_grow(sim, a);
        break;
    case KVT_ACTION_HOST_SHRINK:
        sim_host_shrink(sim, a);
        break;
    case KVT_ACTION_POST_READY:
    case KVT_ACTION_POST_COMMITTED:
    case KVT_ACTION_POST_FAILED:
        sim_worker_post(sim, a);
        break;
    default:
        sim_fail(sim, "unknown action %u", a->kind);
    }
}

void sim_actions(struct sim *sim) {
    struct kvt_action a;
    while (kvt_engine_action(sim->engine, &a)) {
        sim_hash(sim, (uint64_t)a.kind << 56 ^ (uint64_t)a.session << 48 ^ a.value);
        sim_hash(sim, (uint64_t)a.extent << 32 ^ (uint64_t)a.slot << 24 ^ a.offset);
        sim_hash(sim, a.bytes ^ a.code);
        act(sim, &a);
    }
    tick_plan(sim);
}

/* ---- what the world is like ------------------------------------------------------------------ */

static void choose_faults(struct sim *sim) {
    /* Rare enough that runs get somewhere; each run has its own mix. */
    static const uint16_t most_per_mille[SIM_FAULT_COUNT] = {
        [SIM_COPY_FAILED] = 15,    [SIM_COPY_TORN] = 15,       [SIM_COPY_DELAYED] = 60,
        [SIM_EXTENT_REFUSED] = 60, [SIM_EXTENT_DELAYED] = 200, [SIM_HOST_REFUSED] = 60,
        [SIM_HOST_DELAYED] = 200,  [SIM_RECLAIM_LATE] = 300,   [SIM_RECLAIM_NEVER] = 150,
        [SIM_KILLED] = 30,         [SIM_HUNG_UP] = 15,         [SIM_HUNG] = 20,
        [SIM_LIED] = 300,          [SIM_ABORTED] = 500,        [SIM_INVALID] = 60,
        [SIM_EVICTED] = 10,        [SIM_DEVICE_LOST] = 2,      [SIM_ALLOCATION_FAILED] = 6,
    };
    struct sim_random *r = &sim->random;
    if (sim->world != SIM_ROUGH || sim_chance(r, 150)) {
        return; /* none at all */
    }
    for (uint32_t f = 0; f < SIM_FAULT_COUNT; f++) {
        if (sim_chance(r, 400)) {
            sim->fault_per_mille[f] = (uint32_t)sim_between(r, 1, most_per_mille[f]);
        }
    }
}

static void choose_config(struct sim *sim) {
    struct sim_random *r = &sim->random;
    struct kvt_engine_config *c = &sim->config;
    c->device_count = sim_chance(r, 700) ? 1 : 2;
    for (uint32_t i = 0; i < c->device_count; i++) {
        struct kvt_engine_device *d = &c->devices[i];
        d->granule_bytes = sim_chance(r, 800) ? 4096 : 16384;
        d->extent_bytes = d->granule_bytes * sim_between(r, 1, 32);
        d->piece_bytes = 4096 * sim_between(r, 1, 24);
        d->budget_bytes = d->granule_bytes * sim_between(r, 20, sim_chance(r, 500) ? 150 : 1000);
    }
    if (sim->world == SIM_STEADY) {
        for (uint32_t i = 0; i < c->device_count; i++) {
            c->devices[i].budget_bytes = (uint64_t)64 << 20;
        }
    }
    c->host_chunk_bytes = 65536 * sim_between(r, 1, 6);
    c->host_budget_bytes = c->host_chunk_bytes * sim_between(r, 6, sim_chance(r, 300) ? 12 : 60);
    if (sim->world == SIM_STEADY) {
        c->host_budget_bytes = c->host_chunk_bytes * (((uint64_t)64 << 20) / c->host_chunk_bytes);
    }
    if (sim_chance(r, 400)) { /* some of it is there from the start, or all */
        uint64_t chunks = c->host_budget_bytes / c->host_chunk_bytes;
        c->host_keep_bytes = c->host_chunk_bytes * sim_between(r, 1, chunks);
        c->host_range_bytes = c->host_chunk_bytes * sim_between(r, 0, 4);
    }
    c->block_tokens = sim_chance(r, 850) ? 256 : 512;
    c->sessions_max = (uint32_t)sim_between(r, 2, SIM_SESSIONS_MAX);
    c->caches_max = (uint32_t)sim_between(r, 4, 32);
    c->idle_after_ms = (uint32_t)sim_between(r, 5, 60);
    c->reclaim_deadline_ms = (uint32_t)sim_between(r, 20, 200);
    c->poison_host = true;
}

/* What one session may hold: often less than there is; sometimes so that all have their share. */
static void choose_limits(struct sim *sim) {
    struct sim_random *r = &sim->random;
    struct kvt_engine_config *c = &sim->config;
    if (sim->world == SIM_STEADY || sim_chance(r, 500)) {
        return;
    }
    sim->shared_out = sim_chance(r, 500);
    for (uint32_t i = 0; i < c->device_count; i++) {
        struct kvt_engine_device *d = &c->devices[i];
        uint64_t least = d->budget_bytes / c->sessions_max;
        uint64_t most = sim->shared_out ? least : d->budget_bytes;
        d->worker_max_bytes =
            sim_between(r, sim->shared_out ? least : least / 2, most) / d->granule_bytes;
        d->worker_max_bytes = d->worker_max_bytes == 0 ? 1 : d->worker_max_bytes;
        d->worker_max_bytes *= d->granule_bytes;
    }
    uint64_t share = c->host_budget_bytes / c->sessions_max;
    c->host_worker_max_bytes = sim_chance(r, 500) ? 0 : sim_between(r, share, c->host_budget_bytes);
}

/* The end begins when nobody waits for an answer any more: who waits for ever is noticed by then. */
static void on_cool(struct sim *sim, void *object, uint64_t value) {
    if (sim->cooling) {
        return;
    }
    if (!sim->lingering) {
        sim->lingering = true;
        sim->linger_until_us = sim->now_us + sim_wait_most_us(sim) + 1000000;
    }
    if (sim->now_us < sim->linger_until_us && sim_somebody_waits(sim)) {
        return;
    }
    sim_trace(sim, "cooling");
    sim->cooling = true;
    for (uint32_t i = 0; i < sim->process_count; i++) {
        if (sim->processes[i]) {
            sim_worker_cool(sim, sim->processes[i]);
        }
    }
}

static void begin(struct sim *sim) {
    struct sim_random *r = &sim->random;
    uint64_t world = sim_below(r, 1000);
    sim->world = sim->options.world != SIM_ANY ? sim->options.world
                 : world < 50                  ? SIM_PLAIN
                 : world < 100                 ? SIM_STEADY
                                               : SIM_ROUGH;
    sim->static_ones = sim_chance(r, 200);
    choose_faults(sim);
    choose_config(sim);
    choose_limits(sim);
    int rc = kvt_engine_create(&sim->config, &sim->engine);
    if (rc != 0) {
        sim_fail(sim, "the engine does not start: %d", rc);
    }
    kvt_engine_break_rules(sim->engine, sim->options.broken_rules);
    sim_host_open(sim);
    for (uint32_t i = 0; i < sim->config.device_count; i++) {
        sim_device_open(sim, i, sim_chance(r, 400));
    }
    sim->tick_us = UINT64_MAX;
    sim->check_every = (uint32_t)sim_between(r, 1, 40);
    sim->steps_left =
        sim->options.steps != 0 ? sim->options.steps : (uint32_t)sim_between(r, 5, 60);
    sim_after(sim, sim_us(sim, 500, 4000) * 1000, on_cool, NULL, 0);
    sim->process_count = (uint32_t)sim_between(r, 1, SIM_WORKERS_MAX);
    for (uint32_t i = 0; i < sim->process_count; i++) {
        sim_worker_start(sim, i);
    }
    sim_heap_arm(sim);
    sim_actions(sim);
}

static void loop(struct sim *sim) {
    uint64_t stuck_us = 0;
    while (sim->events.count > 0) {
        struct sim_event event = event_take(&sim->events);
        sim->now_us = event.time_us;
        event.run(sim, event.object, event.value);
        if (++sim->stats.events > EVENTS_MAX) {
            sim_fail(sim, "%d events, and no end in sight", EVENTS_MAX);
        }
        if (sim->stats.events % sim->check_every == 0) {
            sim_check(sim);
        }
        if (sim->steps_left == 0 || sim->lingering) {
            on_cool(sim, NULL, 0);
        }
        if (sim->now_us >= stuck_us) {
            stuck_us = sim->now_us + 100000;
            sim_check_stuck(sim);
        }
    }
    sim_check(sim);
    sim_check_end(sim);
}

bool sim_run(struct sim *sim, const struct sim_options *options) {
    uint8_t *host_memory = sim->host.memory;
    uint64_t host_room = sim->host.room;
    *sim = (struct sim){.options = *options};
    sim->host.memory = host_memory;
    sim->host.room = host_room;
    sim->content_next = 1;
    sim->tag_next = 1;
    sim_random_seed(&sim->random, options->seed);
    running = sim;
    kvt_assert_hook_set(on_assert);
    bool ok = setjmp(sim->failure) == 0; /* lint: allow call: see sim_fail */
    if (ok) {
        begin(sim);
        loop(sim);
    }
    running = NULL;
    sim_heap_arm(NULL);
    sim->stats.seeds = 1;
    sim->stats.virtual_us = sim->now_us;
    return ok;
}

void sim_end(struct sim *sim) {
    for (uint32_t i = 0; i < sim->worker_count; i++) {
        sim_worker_free(sim, sim->workers[i]);
    }
    free(sim->workers);
    for (uint32_t i = 0; i < sim->config.device_count; i++) {
        sim_device_close(sim, i);
    }
    sim_host_close(sim);
    for (uint32_t i = 0; i < SIM_SESSIONS_MAX; i++) {
        sim_order_clear(sim, i);
    }
    free(sim->events.heap);
    kvt_engine_free(sim->engine);
}
