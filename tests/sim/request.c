/* What a worker asks for: requests at random, most of them sensible, some of them not. */
#include "tests/sim/sim.h"

#include <string.h>

/* ---- CREATE ---------------------------------------------------------------------------------- */

static void random_layers(struct sim *sim, struct sim_cache *c) {
    struct sim_random *r = &sim->random;
    static const uint32_t dtypes[] = {KVT_F32, KVT_F16, KVT_BF16, KVT_FP8_E4M3, KVT_INT8};
    bool mla = sim_chance(r, 150);
    bool shared = sim_chance(r, 300);
    bool varied = sim_chance(r, 400);
    c->layer_count = (uint32_t)sim_between(r, 1, SIM_LAYERS_MAX);
    for (uint32_t l = 0; l < c->layer_count; l++) {
        struct kvt_layer_layout *layer = &c->layers[l];
        if (l > 0 && !varied) {
            *layer = c->layers[0];
        } else {
            *layer = (struct kvt_layer_layout){
                .kind = KVT_LAYER_FULL,
                .kv_heads = (uint32_t)sim_between(r, 1, 2),
                .k_head_dim = (uint32_t)sim_between(r, 1, 6),
                .v_head_dim = mla ? 0 : (uint32_t)sim_between(r, 1, 6),
                .dtype = dtypes[sim_below(r, 5)],
            };
        }
        layer->last_reader = l;
        if (shared && sim_chance(r, 400)) {
            layer->last_reader = (uint32_t)sim_between(r, l, c->layer_count - 1);
        }
    }
    if (shared && sim_chance(r, 400)) {
        c->layers[0].last_reader = c->layer_count - 1; /* held while all others pass */
    }
}

static void create(struct sim *sim, struct sim_request *q) {
    struct sim_random *r = &sim->random;
    static const uint32_t modes[] = {KVT_MODE_DYNAMIC,   KVT_MODE_DYNAMIC,
                                     KVT_MODE_DYNAMIC,   KVT_MODE_OFFLOADED,
                                     KVT_MODE_OFFLOADED, KVT_MODE_OFFLOADED,
                                     KVT_MODE_STATIC,    KVT_MODE_OFFLOADED_STATIC};
    struct sim_cache *c = &q->blank;
    q->kind = KVT_REQUEST_CREATE;
    random_layers(sim, c);
    c->mode =
        modes[sim->static_ones && sim_chance(r, 800) ? sim_between(r, 6, 7) : sim_below(r, 8)];
    bool is_static = c->mode == KVT_MODE_STATIC || c->mode == KVT_MODE_OFFLOADED_STATIC;
    c->row_count = (uint32_t)(sim_chance(r, 400) ? 1 : sim_between(r, 1, 4));
    if (is_static || sim_chance(r, 150)) {
        c->tokens_max = (uint32_t)sim_between(r, 100, 1200);
    }
    c->append_max =
        (uint32_t)(sim_chance(r, 800) ? sim_between(r, 200, 700) : sim_between(r, 1, 8));
    if (sim_fault(sim, SIM_INVALID)) {
        switch (sim_below(r, 3)) {
        case 0:
            c->mode = (uint32_t)sim_between(r, 5, 99);
            break;
        case 1:
            c->row_count = 0;
            break;
        default:
            c->append_max = 0;
        }
    }
}

static void create_options(struct sim *sim, const struct sim_request *q,
                           struct kvt_cache_options *o) {
    struct sim_random *r = &sim->random;
    const struct sim_cache *c = &q->blank;
    static const uint32_t pieces[] = {0, 0, 256, 256, 512, 300, 1024, 1};
    *o = (struct kvt_cache_options){
        .mode = c->mode,
        .rows = c->row_count,
        .tokens_max = c->tokens_max,
        .append_max = c->append_max,
        .piece_tokens = pieces[sim_below(r, 8)],
        .resident_layers_max =
            sim_chance(r, 600) ? UINT32_MAX : (uint32_t)sim_between(r, 0, c->layer_count),
        .name = "sim",
    };
    sim->layout = (struct kvt_layout){.layer_count = c->layer_count};
    memcpy(sim->layout.layers, c->layers, c->layer_count * sizeof(c->layers[0]));
}

/* ---- STEP, ACQUIRE, ABORT -------------------------------------------------------------------- */

static uint32_t room_of(const struct sim_cache *c, uint32_t row) {
    uint32_t most = c->tokens_max != 0 ? c->tokens_max : SIM_TOKENS_MAX;
    return most > c->rows[row].length ? most - c->rows[row].length : 0;
}

static uint32_t room_least(const struct sim_cache *c) {
    uint32_t least = SIM_TOKENS_MAX;
    for (uint32_t i = 0; i < c->row_count; i++) {
        least = room_of(c, i) < least ? room_of(c, i) : least;
    }
    return least;
}

/* Row lists: some rows in some order (segment), or all (dense). */
static void step_rows(struct sim *sim, const struct sim_worker *w, const struct sim_cache *c,
                      struct sim_request *q, uint32_t n) {
    struct sim_random *r = &sim->random;
    for (uint32_t i = 0; i < c->row_count; i++) {
        q->rows[i] = i;
        q->values[i] = sim_chance(r, 200) ? 0 : (uint32_t)sim_between(r, 1, n);
    }
    q->count = c->row_count;
    if (w->kind == KVT_WORKER_DENSE) {
        return;
    }
    for (uint32_t i = c->row_count - 1; i > 0; i--) {
        uint32_t j = (uint32_t)sim_below(r, i + 1);
        uint32_t row = q->rows[i];
        q->rows[i] = q->rows[j];
        q->rows[j] = row;
    }
    q->count = (uint32_t)sim_between(r, 1, c->row_count);
}

static void step(struct sim *sim, const struct sim_worker *w, const struct sim_cache *c,
                 struct sim_request *q) {
    struct sim_random *r = &sim->random;
    uint32_t room = room_least(c);
    uint32_t most = c->append_max < room ? c->append_max : room;
    q->kind = KVT_REQUEST_STEP;
    q->steps = 1;
    if (most > 8 && sim_chance(r, 350)) {
        q->tokens = (uint32_t)sim_between(r, 1, most < 600 ? most : 600);
    } else {
        q->tokens = most == 0 ? 0 : (uint32_t)sim_between(r, 1, most < 3 ? most : 3);
        uint64_t steps = q->tokens == 0 ? 1 : room / q->tokens;
        q->steps = (uint32_t)sim_between(r, 1, steps < 8 ? steps : 8);
    }
    if (q->tokens > 0 && sim_chance(r, 400)) {
        step_rows(sim, w, c, q, q->tokens);
        q->tokens = 0;
    } else if (q->steps == 1 && sim_chance(r, 150)) {
        q->kind = KVT_REQUEST_ACQUIRE;
        q->layer = sim_chance(r, 900) ? 0 : (uint32_t)sim_below(r, c->layer_count);
    }
    if (sim_fault(sim, SIM_INVALID)) {
        switch (sim_below(r, 4)) {
        case 0:
            q->steps = sim_chance(r, 500) ? 0 : 1000;
            break;
        case 1:
            q->count = 1;
            q->rows[0] = (uint32_t)sim_random_next(r) | 64;
            break;
        case 2:
            q->tokens = c->append_max + 1;
            break;
        default:
            q->cache ^= 1u << sim_below(r, 32);
        }
    }
}

static void abort_step(struct sim *sim, struct sim_worker *w, struct sim_request *q) {
    struct sim_schedule *s = &w->schedule;
    uint64_t first = s->header.first_step + s->enqueue_step;
    q->kind = KVT_REQUEST_ABORT;
    q->first_step = first + (s->begun ? sim_below(&sim->random, w->last_step - first + 1) : 0);
    s->abort_from = q->first_step;
    s->aborted = true;
}

/* ---- edits ----------------------------------------------------------------------------------- */

static void random_map(struct sim *sim, const struct sim_cache *c, struct sim_request *q,
                       uint32_t count) {
    q->count = count;
    for (uint32_t i = 0; i < count; i++) {
        q->rows[i] = (uint32_t)sim_below(&sim->random, c->row_count);
    }
    if (sim_fault(sim, SIM_INVALID) && count > 0) {
        q->rows[sim_below(&sim->random, count)] =
            c->row_count + (uint32_t)sim_below(&sim->random, 9);
    }
}

static void crop(struct sim *sim, const struct sim_cache *c, struct sim_request *q) {
    struct sim_random *r = &sim->random;
    q->kind = KVT_REQUEST_CROP;
    q->count = sim_chance(r, 400) ? 1 : c->row_count;
    for (uint32_t i = 0; i < q->count; i++) {
        uint32_t length = c->rows[i].length;
        uint32_t off =
            (uint32_t)(sim_chance(r, 500) ? sim_between(r, 0, 5) : sim_between(r, 0, 400));
        q->values[i] = off > length ? 0 : length - off;
        if (sim_chance(r, 100)) {
            q->values[i] = (uint32_t)sim_random_next(r); /* longer than the row: nothing happens */
        }
    }
    if (sim_fault(sim, SIM_INVALID)) {
        q->count = c->row_count + 1;
    }
}

static void edit(struct sim *sim, const struct sim_cache *c, struct sim_request *q,
                 bool fork_allowed) {
    struct sim_random *r = &sim->random;
    uint64_t which = sim_below(r, 100);
    if (which < 25 && fork_allowed) {
        q->kind = KVT_REQUEST_FORK;
        random_map(sim, c, q, sim_chance(r, 600) ? 0 : (uint32_t)sim_between(r, 1, 4));
    } else if (which < 40) {
        q->kind = KVT_REQUEST_REORDER;
        random_map(sim, c, q, c->row_count);
    } else if (which < 50) {
        q->kind = KVT_REQUEST_SELECT;
        random_map(sim, c, q, (uint32_t)sim_between(r, 1, 4));
    } else if (which < 60) {
        q->kind = KVT_REQUEST_REPEAT;
        q->times = (uint32_t)sim_between(r, 1, c->row_count < 3 ? 2 : 1);
        q->times = sim_fault(sim, SIM_INVALID) ? 0 : q->times;
    } else if (which < 85) {
        crop(sim, c, q);
    } else if (which < 92) {
        q->kind = KVT_REQUEST_RESET;
    } else {
        q->kind = KVT_REQUEST_CLOSE;
    }
}

/* ---- sending --------------------------------------------------------------------------------- */

/* A plan fits into the budgets that it was made for. */
static void plan(struct sim *sim, const struct sim_worker *w,
                 const struct kvt_cache_options *options) {
    struct kvt_plan_request request = {.layout = &sim->layout,
                                       .options = options,
                                       .tokens = (uint32_t)sim_between(&sim->random, 0, 2000),
                                       .worker_kind = w->kind,
                                       .device = w->device};
    struct kvt_plan plan;
    char text[KVT_TEXT_BYTES] = "";
    int rc = kvt_engine_plan(sim->engine, &request, &plan, text, sizeof(text));
    sim_hash(sim, (uint64_t)rc);
    if (rc != 0 && text[0] == 0) {
        sim_fail(sim, "a plan is refused, code %d, without a text", rc);
    }
    if (rc == 0 && (plan.device_bytes > sim->config.devices[w->device].budget_bytes ||
                    plan.host_bytes > sim->config.host_budget_bytes ||
                    plan.resident_layers > sim->layout.layer_count || plan.slots > KVT_SLOTS_MAX)) {
        sim_fail(sim, "a plan takes %llu bytes of the device, %llu of the host, %u slots",
                 (unsigned long long)plan.device_bytes, (unsigned long long)plan.host_bytes,
                 plan.slots);
    }
}

static void send(struct sim *sim, struct sim_worker *w, struct sim_request *q) {
    struct kvt_cache_options options;
    q->tag = sim->tag_next++;
    q->sent_us = sim->now_us;
    if (w->request_count == 0) {
        w->progress_us = w->turn_us = sim->now_us;
    }
    w->requests[w->request_count++] = *q;
    if (q->kind == KVT_REQUEST_CREATE) {
        create_options(sim, q, &options);
    }
    if (q->kind == KVT_REQUEST_CREATE && sim_chance(&sim->random, 200)) {
        plan(sim, w, &options);
    }
    struct kvt_request request = {
        .kind = q->kind,
        .session = w->session,
        .tag = q->tag,
        .cache = q->cache,
        .layout = q->kind == KVT_REQUEST_CREATE ? &sim->layout : NULL,
        .options = q->kind == KVT_REQUEST_CREATE ? &options : NULL,
        .rows = q->rows,
        .values = q->values,
        .count = q->count,
        .tokens = q->tokens,
        .steps = q->steps,
        .times = q->times,
        .layer = q->layer,
        .first_step = q->first_step,
    };
    sim->stats.requests++;
    sim_hash(sim, q->tag ^ (uint64_t)q->kind << 32 ^ (uint64_t)q->cache << 40);
    sim_trace(sim, "session %u: request %llu kind %u cache %u count %u tokens %u steps %u",
              w->session, (unsigned long long)q->tag, q->kind, q->cache, q->count, q->tokens,
              q->steps);
    sim_clock(sim);
    kvt_engine_request(sim->engine, &request);
    sim_actions(sim);
}

static struct sim_cache *any_cache(struct sim *sim, struct sim_worker *w, uint32_t *count) {
    struct sim_cache *caches[SIM_CACHES_MAX];
    *count = 0;
    for (uint32_t i = 0; i < SIM_CACHES_MAX; i++) {
        if (w->caches[i].id != 0) {
            caches[(*count)++] = &w->caches[i];
        }
    }
    return *count == 0 ? NULL : caches[sim_below(&sim->random, *count)];
}

/* Requests that make a cache and are not answered: they will need an entry. */
static uint32_t creating(const struct sim_worker *w) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < w->request_count; i++) {
        count +=
            w->requests[i].kind == KVT_REQUEST_CREATE || w->requests[i].kind == KVT_REQUEST_FORK;
    }
    return count;
}

/* Grows rows, which the model must have room for: not two at once. */
static bool repeating(const struct sim_worker *w) {
    for (uint32_t i = 0; i < w->request_count; i++) {
        if (w->requests[i].kind == KVT_REQUEST_REPEAT) {
            return true;
        }
    }
    return false;
}

void sim_request_close(struct sim *sim, struct sim_worker *w) {
    uint32_t count;
    struct sim_cache *c = any_cache(sim, w, &count);
    if (c) {
        struct sim_request q = {.kind = KVT_REQUEST_CLOSE, .cache = c->id};
        send(sim, w, &q);
    }
}

void sim_request_abort(struct sim *sim, struct sim_worker *w) {
    struct sim_request q = {.cache = w->schedule.cache->id};
    abort_step(sim, w, &q);
    send(sim, w, &q);
}

/* One cache, its prompt, then equal steps. */
static void request_steady(struct sim *sim, struct sim_worker *w) {
    struct sim_random *r = &sim->random;
    struct sim_request q = {0};
    uint32_t count;
    struct sim_cache *c = any_cache(sim, w, &count);
    if (w->request_count > 0 || w->schedule.open) {
        return;
    }
    if (!c) {
        create(sim, &q);
    } else {
        uint32_t room = room_least(c);
        uint32_t prompt = (uint32_t)sim_between(r, 1, 700);
        q = (struct sim_request){.kind = KVT_REQUEST_STEP, .cache = c->id, .steps = 1};
        if (c->steady_tokens == 0) {
            c->steady_tokens = (uint32_t)sim_between(r, 1, 3);
            c->steady_steps = (uint32_t)sim_between(r, 1, 8);
            q.tokens = prompt < c->append_max ? prompt : c->append_max;
            q.tokens = q.tokens < room / 2 ? q.tokens : room / 2;
        } else {
            q.tokens = c->steady_tokens;
            q.steps = c->steady_steps;
        }
        if (q.tokens == 0 || q.tokens > c->append_max || q.tokens > room) {
            return;
        }
        sim->steps_left -= sim->steps_left > 0;
        if (++w->steady_requests == 2) {
            w->prompt_op_last = sim->ops[w->session].last_id;
        } else if (w->steady_requests == 3) {
            w->vain_before = sim_counters(sim, w).prefetch_discarded_bytes;
            w->crossed_before = w->crossed_bytes - w->to_bytes;
        }
    }
    send(sim, w, &q);
}

void sim_request_random(struct sim *sim, struct sim_worker *w) {
    struct sim_random *r = &sim->random;
    if (sim->world == SIM_STEADY) {
        request_steady(sim, w);
        return;
    }
    struct sim_request q = {0};
    uint32_t count;
    struct sim_cache *c = any_cache(sim, w, &count);
    bool room = count + creating(w) < SIM_CACHES_MAX;
    if ((!c || sim_chance(r, count < 3 ? 60 : 10)) && room) {
        create(sim, &q);
    } else if (!c) {
        return;
    } else {
        q.cache = c->id;
        bool full = room_least(c) == 0 && sim_chance(r, 900);
        if (sim->world == SIM_PLAIN && full) {
            q.kind = KVT_REQUEST_CLOSE;
        } else if (sim->world == SIM_ROUGH && (full || sim_chance(r, 250))) {
            edit(sim, c, &q, room);
        } else {
            step(sim, w, c, &q);
            sim->steps_left -= sim->steps_left > 0;
        }
        if (repeating(w) && q.kind == KVT_REQUEST_REPEAT) {
            return;
        }
        if (q.kind == KVT_REQUEST_ACQUIRE && (w->request_count > 0 || w->schedule.open)) {
            return;
        }
    }
    send(sim, w, &q);
}

/* ACQUIRE of a further layer, while the step is open: the same schedule again. */
void sim_request_acquire(struct sim *sim, struct sim_worker *w) {
    const struct sim_schedule *s = &w->schedule;
    struct sim_request q = {.kind = KVT_REQUEST_ACQUIRE,
                            .cache = s->cache->id,
                            .tokens = s->append[0],
                            .layer = (uint32_t)sim_below(&sim->random, s->cache->layer_count)};
    send(sim, w, &q);
}
