/* Invariants, and who waits for ever. */
#include "tests/sim/sim.h"

#include <stdio.h>
#include <string.h>

typedef unsigned long long ull;

static const char *const fault_names[SIM_FAULT_COUNT] = {
#define SIM_FAULT_NAME(name, text) text,
    SIM_FAULTS(SIM_FAULT_NAME)
#undef SIM_FAULT_NAME
};

const char *sim_fault_name(uint32_t fault) {
    return fault_names[fault];
}

/* What the engine has charged is what is there, and no more than the budgets. */
static void check_budgets(struct sim *sim) {
    struct kvt_tier_info info;
    for (uint32_t i = 0; i < sim->config.device_count; i++) {
        kvt_engine_device_info(sim->engine, i, &info);
        if (info.used_bytes != sim->devices[i].extent_bytes ||
            info.used_bytes > info.budget_bytes || info.live_bytes > info.used_bytes ||
            info.pinned_dead_bytes > info.used_bytes) {
            sim_fail(sim,
                     "device %u: used %llu, there are %llu, live %llu, pinned %llu, budget %llu", i,
                     (ull)info.used_bytes, (ull)sim->devices[i].extent_bytes, (ull)info.live_bytes,
                     (ull)info.pinned_dead_bytes, (ull)info.budget_bytes);
        }
    }
    kvt_engine_host_info(sim->engine, &info);
    if (info.used_bytes != sim_host_used(sim) || info.used_bytes > info.budget_bytes ||
        info.live_bytes > info.used_bytes) {
        sim_fail(sim, "host: used %llu, there are %llu, live %llu, budget %llu",
                 (ull)info.used_bytes, (ull)sim_host_used(sim), (ull)info.live_bytes,
                 (ull)info.budget_bytes);
    }
}

/* No session holds more than its limit. Its extents are counted here; what it holds of the host only
 * the engine knows. */
static void check_limits(struct sim *sim) {
    uint64_t held[SIM_SESSIONS_MAX] = {0};
    struct kvt_session_info info;
    for (uint32_t i = 0; i < sim->extent_top; i++) {
        held[sim->extents[i].session] += sim->extents[i].bytes;
    }
    for (uint32_t at = 0; kvt_engine_session_info(sim->engine, &at, &info);) {
        const struct kvt_engine_device *d = &sim->config.devices[info.device];
        uint64_t device_most = d->worker_max_bytes != 0 ? d->worker_max_bytes : d->budget_bytes;
        uint64_t host_most = sim->config.host_worker_max_bytes;
        host_most = host_most != 0 ? host_most : sim->config.host_budget_bytes;
        if (held[info.session] > device_most || held[info.session] != info.device_bytes ||
            info.host_bytes > host_most) {
            sim_fail(sim,
                     "session %u: %llu bytes of extents, the engine says %llu, its limit is %llu; "
                     "host: %llu of %llu",
                     info.session, (ull)held[info.session], (ull)info.device_bytes,
                     (ull)device_most, (ull)info.host_bytes, (ull)host_most);
        }
    }
}

/* Where all limits together are within the device's budget, what a worker lacks is its own business:
 * a layer leaves only for a request of the same worker. */
void sim_check_leaving(struct sim *sim, const struct kvt_program *p) {
    const struct sim_worker *w = sim->sessions[p->session];
    bool leaves = false;
    for (uint32_t i = 0; i < p->op_count; i++) {
        for (uint32_t c = 0; c < p->ops[i].copy_count && p->ops[i].kind == KVT_OP_COPY; c++) {
            const struct kvt_copy *copy = &p->copies[p->ops[i].copy_first + c];
            leaves = leaves || (copy->source.tier == KVT_TIER_GPU);
        }
    }
    if (leaves && sim->shared_out && sim->fault_per_mille[SIM_EXTENT_REFUSED] == 0 &&
        w->request_count == 0) {
        sim_fail(sim, "session %u: a layer leaves the device, though it has asked for nothing",
                 p->session);
    }
}

/* The order in which layers become resident, told apart from the engine: those that later layers
 * read, then the others by bit reversal of their number. */
static uint32_t resident_order(const struct sim_cache *c, uint32_t *order) {
    uint32_t count = 0;
    uint32_t places = 1;
    for (uint32_t l = 0; l < c->layer_count; l++) {
        if (c->layers[l].last_reader > l) {
            order[count++] = l;
        }
    }
    while (places < c->layer_count) {
        places *= 2;
    }
    for (uint32_t i = 0; i < places; i++) {
        uint32_t l = 0;
        for (uint32_t bit = 1, value = places / 2; bit < places; bit *= 2, value /= 2) {
            l += (i & bit) != 0 ? value : 0;
        }
        if (l < c->layer_count && c->layers[l].last_reader == l) {
            order[count++] = l;
        }
    }
    return count;
}

/* Resident sets are nested: what is resident is a prefix of the order. */
static void check_nested(struct sim *sim) {
    struct kvt_cache_info info;
    uint32_t order[SIM_LAYERS_MAX];
    for (uint32_t at = 0; kvt_engine_cache_info(sim->engine, &at, &info);) {
        struct sim_worker *w = sim->sessions[info.session];
        const struct sim_cache *c = w ? sim_cache_find(w, info.cache) : NULL;
        if (!c) {
            continue; /* it is not answered yet, or closed */
        }
        bool behind = false;
        uint32_t count = resident_order(c, order);
        for (uint32_t i = 0; i < count; i++) {
            bool resident = info.layers[order[i]] == 'R';
            if (behind && resident) {
                sim_fail(sim, "session %u: cache %u: layer %u is resident, %u before it is not",
                         info.session, info.cache, order[i], order[i - 1]);
            }
            behind = behind || !resident;
        }
    }
}

void sim_check(struct sim *sim) {
    char text[KVT_TEXT_BYTES] = "";
    if (kvt_engine_check(sim->engine, text, sizeof(text)) != 0) {
        sim_fail(sim, "kvt_engine_check: %s", text);
    }
    check_budgets(sim);
    check_limits(sim);
    check_nested(sim);
}

/* What a request may take whose turn it is: 16 deadlines, and as many again for a clock that began anew
 * when more than ever was in use. */
uint64_t sim_wait_most_us(const struct sim *sim) {
    const uint64_t slack_us = 800000;
    return 32000 * (uint64_t)sim->config.reclaim_deadline_ms + slack_us;
}

static bool is_checked(const struct sim_worker *w) {
    return w && w->process == SIM_RUNNING && !w->hung && !w->liar && !w->unchecked && w->attached;
}

bool sim_somebody_waits(const struct sim *sim) {
    bool any = false;
    for (uint32_t i = 0; i < sim->process_count; i++) {
        const struct sim_worker *w = sim->processes[i];
        any = any || (is_checked(w) && w->request_count > 0 && !w->schedule.open);
    }
    return any;
}

static bool is_migrating(const struct sim *sim, uint32_t session) {
    struct kvt_session_info info;
    for (uint32_t at = 0; kvt_engine_session_info(sim->engine, &at, &info);) {
        if (info.session == session) {
            return info.migrating;
        }
    }
    return false;
}

/* A request whose turn it is is answered in time: it may wait for others, but not for ever. Not while
 * layers of its own migrate: they go behind what others read and write, and a link may be slow. */
static void check_waits(struct sim *sim, struct sim_worker *w) {
    bool own = w->schedule.open || is_migrating(sim, w->session);
    w->turn_us = own ? sim->now_us : w->turn_us;
    if (w->request_count > 0 && sim->now_us > w->turn_us + sim_wait_most_us(sim)) {
        sim_fail(sim,
                 "session %u: request %llu of kind %u has waited for %llu ms, the deadline is %u",
                 w->session, (ull)w->requests[0].tag, w->requests[0].kind,
                 (ull)(sim->now_us - w->turn_us) / 1000, sim->config.reclaim_deadline_ms);
    }
}

/* A worker that runs and waits gets on within a time that covers every delay of the world. */
void sim_check_stuck(struct sim *sim) {
    const uint64_t limit_us = 20000000;
    for (uint32_t i = 0; i < sim->process_count; i++) {
        struct sim_worker *w = sim->processes[i];
        if (!is_checked(w)) {
            continue;
        }
        check_waits(sim, w);
        bool waits =
            w->request_count > 0 || w->stream_waits || (w->schedule.open && !w->schedule.begun);
        if (waits && sim->now_us > w->progress_us + limit_us) {
            sim_fail(sim,
                     "stuck: session %u has waited for %llu ms; %u requests, first of kind %u, "
                     "%s a schedule (failed %llu, posted %llu, last %llu)%s",
                     w->session, (ull)(sim->now_us - w->progress_us) / 1000, w->request_count,
                     w->request_count > 0 ? w->requests[0].kind : 0,
                     w->schedule.open ? "in" : "not in", (ull)w->schedule.failed,
                     (ull)w->schedule.posted, (ull)w->last_step,
                     w->stream_waits ? ", its stream waits for a fill" : "");
        }
    }
}

/* Everybody is gone: nothing may be left. */
void sim_check_end(struct sim *sim) {
    struct kvt_tier_info info;
    for (uint32_t i = 0; i < SIM_SESSIONS_MAX; i++) {
        if (sim->sessions[i]) {
            sim_fail(sim, "the end: session %u is not freed", i);
        }
    }
    for (uint32_t i = 0; i < sim->config.device_count; i++) {
        kvt_engine_device_info(sim->engine, i, &info);
        if (info.used_bytes != 0 || info.live_bytes != 0) {
            sim_fail(sim, "the end: device %u has %llu bytes in use, %llu live", i,
                     (ull)info.used_bytes, (ull)info.live_bytes);
        }
    }
    kvt_engine_host_info(sim->engine, &info);
    if (info.used_bytes != info.kept_bytes || info.live_bytes != 0 || info.keep_pending ||
        info.kept_bytes > sim->config.host_keep_bytes) {
        sim_fail(sim, "the end: the host has %llu bytes in use, %llu live; to keep are %llu",
                 (ull)info.used_bytes, (ull)info.live_bytes, (ull)info.kept_bytes);
    }
}

/* ---- what is said after a failure ------------------------------------------------------------ */

static void dump_worker(const struct sim_worker *w) {
    const struct sim_schedule *s = &w->schedule;
    printf("  session %u: %s worker, device %u%s%s%s%s%s\n", w->session,
           w->kind == KVT_WORKER_DENSE ? "dense" : "segment", w->device, w->hung ? ", hung" : "",
           w->liar ? ", liar" : "", w->attached ? "" : ", hung up",
           w->process == SIM_RUNNING ? "" : ", not running", w->unchecked ? ", unchecked" : "");
    for (uint32_t i = 0; i < w->request_count; i++) {
        printf("    request %llu: kind %u, cache %u, since %llu us\n", (ull)w->requests[i].tag,
               w->requests[i].kind, w->requests[i].cache, (ull)w->requests[i].sent_us);
    }
    for (uint32_t i = 0; i < SIM_CACHES_MAX; i++) {
        const struct sim_cache *c = &w->caches[i];
        if (c->id != 0) {
            printf("    cache %u: mode %u, %u layers, %u rows:", c->id, c->mode, c->layer_count,
                   c->row_count);
            for (uint32_t row = 0; row < c->row_count; row++) {
                printf(" %u", c->rows[row].length);
            }
            printf("\n");
        }
    }
    if (s->open) {
        printf("    steps %llu to %llu of cache %u: %u committed, posted %llu, failed %llu\n",
               (ull)s->header.first_step, (ull)w->last_step, s->cache->id, s->committed,
               (ull)s->posted, (ull)s->failed);
    }
    if (w->stream_head < w->stream_count) {
        const struct sim_stream_op *op = &w->stream[w->stream_head];
        printf(
            "    stream: %u left, first kind %u step %u piece %u slot %u value %llu (ready %llu)\n",
            w->stream_count - w->stream_head, op->kind, op->step, op->index, op->slot,
            (ull)op->value, (ull)w->page->ready[op->slot].value);
    }
}

void sim_dump(const struct sim *sim) {
    struct kvt_tier_info info;
    printf("  %u tokens a block, idle after %u ms, %u devices\n", sim->config.block_tokens,
           sim->config.idle_after_ms, sim->config.device_count);
    if (!sim->engine) {
        return;
    }
    for (uint32_t i = 0; i < sim->config.device_count; i++) {
        kvt_engine_device_info(sim->engine, i, &info);
        printf("  device %u: %s, %llu of %llu bytes used, %llu live, issuer %s for workers\n", i,
               sim->devices[i].post_behind ? "posts behind" : "posts after", (ull)info.used_bytes,
               (ull)info.budget_bytes, (ull)info.live_bytes,
               kvt_issuer_waits_for_worker(sim->devices[i].issuer) ? "waits" : "does not wait");
    }
    kvt_engine_host_info(sim->engine, &info);
    printf("  host: %llu of %llu bytes used, %llu live\n", (ull)info.used_bytes,
           (ull)info.budget_bytes, (ull)info.live_bytes);
    for (uint32_t i = 0; i < SIM_SESSIONS_MAX; i++) {
        if (sim->sessions[i]) {
            dump_worker(sim->sessions[i]);
        }
    }
}
