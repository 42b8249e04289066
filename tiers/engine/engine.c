/* The engine's doors: create, sessions, requests, completions, time, actions. See engine.h and, for
 * what is inside, state.h.
 */
#include "tiers/engine/state.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* Actions of one call, which cannot fail: room for more of them than a call is known to make. */
#define ACTIONS_OF_EXTENTS 16384u
#define ACTIONS_OF_SESSION 256u

/* ---- actions -------------------------------------------------------------------------------------------- */

struct kvt_action *action_push(struct kvt_engine *e, uint32_t kind) {
    struct action_queue *q = &e->queue;
    if (q->count == q->room) {
        uint32_t room = q->room * 2;
        struct kvt_action *grown = malloc(room * sizeof(*grown));
        KVT_ASSERT(grown != NULL);
        for (uint32_t i = 0; i < q->count; i++) {
            grown[i] = q->actions[(q->head + i) % q->room];
        }
        free(q->actions);
        q->actions = grown;
        q->head = 0;
        q->room = room;
    }
    struct kvt_action *a = &q->actions[(q->head + q->count++) % q->room];
    *a = (struct kvt_action){.kind = kind};
    return a;
}

static void answer_keep(struct kvt_engine *e, struct answer_room *room) {
    room->next = e->answers;
    e->answers = room;
}

bool answer_reserve(struct kvt_engine *e) {
    struct answer_room *room = malloc(sizeof(*room));
    bool had = room != NULL;
    if (!had) {
        KVT_ASSERT(e->refusal != NULL); /* the caller has taken what earlier calls said */
        room = e->refusal;
        e->refusal = NULL;
    }
    answer_keep(e, room);
    return had;
}

void answer_drop(struct kvt_engine *e) {
    struct answer_room *room = e->answers;
    KVT_ASSERT(room != NULL);
    e->answers = room->next;
    free(room);
}

/* An answer with its lengths, in the room that was reserved for it. */
struct kvt_answer *answer_push(struct kvt_engine *e, uint32_t session, uint64_t tag, int code,
                               const struct cache *cache) {
    uint32_t rows = cache != NULL ? cache->row_count : 0;
    struct answer_room *room = e->answers;
    KVT_ASSERT(room != NULL);
    KVT_ASSERT(rows <= KVT_ROWS_MAX);
    e->answers = room->next;
    struct kvt_answer *answer = &room->answer;
    uint32_t *lengths = room->lengths;
    *answer = (struct kvt_answer){0};
    for (uint32_t i = 0; i < rows; i++) {
        lengths[i] = cache->rows[i].length;
    }
    answer->tag = tag;
    answer->code = (uint32_t)(code < 0 ? -code : code);
    answer->cache = cache != NULL ? cache->id : 0;
    answer->lengths = lengths;
    answer->length_count = rows;
    answer->committed_step = e->sessions[session].committed;
    struct kvt_action *a = action_push(e, KVT_ACTION_ANSWER);
    a->session = session;
    a->answer = answer;
    return answer;
}

void answer_error(struct kvt_engine *e, uint32_t session, uint64_t tag, int code,
                  const char *format, ...) {
    KVT_ASSERT(code < 0);
    struct kvt_answer *answer = answer_push(e, session, tag, code, NULL);
    va_list arguments;
    va_start(arguments, format);
    kvt_text_format_list(answer->text, sizeof(answer->text), format, arguments);
    va_end(arguments);
}

bool kvt_engine_action(struct kvt_engine *e, struct kvt_action *out) {
    if (e->last_answer != NULL && e->refusal == NULL) {
        e->refusal = (struct answer_room *)e->last_answer;
    } else {
        free(e->last_answer);
    }
    e->last_answer = NULL;
    struct action_queue *q = &e->queue;
    if (q->count == 0) {
        q->head = 0; /* pages of the queue that were never needed stay untouched */
        return false;
    }
    *out = q->actions[q->head];
    q->head = (q->head + 1) % q->room;
    q->count--;
    e->last_answer = out->answer;
    return true;
}

struct cache *cache_find(const struct kvt_engine *e, uint32_t session, uint32_t id) {
    uint32_t index = id & 0xffff;
    if (index >= e->config.caches_max || e->caches[index] == NULL || e->caches[index]->id != id ||
        e->caches[index]->session != session) {
        return NULL;
    }
    return e->caches[index];
}

/* ---- create and free ---------------------------------------------------------------------------------------- */

static bool config_is_valid(const struct kvt_engine_config *c) {
    bool valid = c->device_count >= 1 && c->device_count <= KVT_DEVICES_MAX &&
                 c->block_tokens >= KVT_BLOCK_TOKENS_MIN &&
                 c->block_tokens <= KVT_BLOCK_TOKENS_MAX &&
                 (c->block_tokens & (c->block_tokens - 1)) == 0 && c->sessions_max >= 1 &&
                 c->sessions_max <= 65536 && c->caches_max >= 1 && c->caches_max <= 65536 &&
                 c->host_chunk_bytes >= 4096 && c->host_chunk_bytes % 4096 == 0;
    for (uint32_t i = 0; valid && i < c->device_count; i++) {
        valid = c->devices[i].granule_bytes > 0 && c->devices[i].piece_bytes > 0;
    }
    return valid;
}

static void limit_default(uint64_t *limit, uint64_t budget) {
    if (*limit == 0 || *limit > budget) {
        *limit = budget;
    }
}

int kvt_engine_create(const struct kvt_engine_config *config, struct kvt_engine **out) {
    if (!config_is_valid(config)) {
        return -KVT_EINVAL;
    }
    struct kvt_engine *e = calloc(1, sizeof(*e));
    if (e == NULL) {
        return -KVT_ENOMEM;
    }
    e->config = *config;
    limit_default(&e->config.host_worker_max_bytes, config->host_budget_bytes);
    e->host.chunk_bytes = config->host_chunk_bytes;
    e->host.chunk_count = (uint32_t)(config->host_budget_bytes / config->host_chunk_bytes);
    e->host.chunks = calloc(e->host.chunk_count + 1, 1);
    uint64_t keep = config->host_keep_bytes / config->host_chunk_bytes;
    e->host.keep_chunks = keep < e->host.chunk_count ? (uint32_t)keep : e->host.chunk_count;
    e->sessions = calloc(config->sessions_max, sizeof(*e->sessions));
    e->caches = calloc(config->caches_max, sizeof(struct cache *));
    e->cache_generation = calloc(config->caches_max, sizeof(*e->cache_generation));
    e->extents = calloc(EXTENTS_MAX, sizeof(*e->extents));
    e->extent_generation = calloc(EXTENTS_MAX, sizeof(*e->extent_generation));
    e->extent_top = 1;
    uint32_t sessions = config->sessions_max < 256 ? config->sessions_max : 256;
    e->queue.room = ACTIONS_OF_EXTENTS + sessions * ACTIONS_OF_SESSION;
    e->queue.actions = malloc(e->queue.room * sizeof(*e->queue.actions));
    e->refusal = malloc(sizeof(*e->refusal));
    kvt_ranges_init(&e->host.space);
    for (uint32_t i = 0; i < config->device_count; i++) {
        e->devices[i].config = config->devices[i];
        limit_default(&e->devices[i].config.worker_max_bytes, config->devices[i].budget_bytes);
    }
    uint64_t budgets = config->host_budget_bytes;
    for (uint32_t i = 0; i < config->device_count; i++) {
        budgets += config->devices[i].budget_bytes;
    }
    e->block_limit = budgets / 65536 + 65536; /* real models' blocks are larger than 64 KiB */
    if (e->host.chunks == NULL || e->sessions == NULL || e->caches == NULL ||
        e->cache_generation == NULL || e->extents == NULL || e->extent_generation == NULL ||
        e->queue.actions == NULL || e->refusal == NULL) {
        kvt_engine_free(e);
        return -KVT_ENOMEM;
    }
    host_keep(e);
    *out = e;
    return 0;
}

static void session_forget(struct kvt_engine *e, struct session *s) {
    pieces_free(&s->guess.pieces);
    free(s->ops.records);
    kvt_counters_add(&e->ended, &s->counters);
    *s = (struct session){0};
}

static void session_empty(struct kvt_engine *e, struct session *s);

void kvt_engine_free(struct kvt_engine *e) {
    if (e == NULL) {
        return;
    }
    for (uint32_t i = 0; e->sessions != NULL && i < e->config.sessions_max; i++) {
        if (e->sessions[i].in_use) {
            e->sessions[i].hung = true;
            session_empty(e, &e->sessions[i]);
            session_forget(e, &e->sessions[i]);
        }
    }
    struct kvt_action a;
    while (kvt_engine_action(e, &a)) {
        kvt_program_free(a.program);
    }
    for (uint32_t i = 0; e->extents != NULL && i < e->extent_top; i++) {
        kvt_ranges_destroy(&e->extents[i].space);
    }
    kvt_ranges_destroy(&e->host.space);
    while (e->answers != NULL) {
        answer_drop(e);
    }
    free(e->refusal);
    free(e->queue.actions);
    free(e->host.chunks);
    free(e->sessions);
    free(e->caches);
    free(e->cache_generation);
    free(e->extents);
    free(e->extent_generation);
    free(e);
}

/* ---- progress ------------------------------------------------------------------------------------------------- */

/* Caches and host memory of a session that the issuer holds nothing of any more. */
static void session_empty(struct kvt_engine *e, struct session *s) {
    uint32_t session = session_index(e, s);
    if (s->schedule.phase != PHASE_NONE) {
        if (s->schedule.answer_abort) {
            answer_drop(e);
        }
        schedule_close(e, s, true);
    }
    s->guess.active = false;
    compact_forget(e, s);
    s->migration = (struct migration){0};
    s->ops.base = s->ops.next;
    s->ops.outstanding = s->ops.guesses = s->ops.migrates = 0;
    queue_drop(e, s);
    for (uint32_t i = 0; i < e->config.caches_max; i++) {
        if (e->caches[i] != NULL && e->caches[i]->session == session) {
            settle_undo(e, e->caches[i]);
            cache_destroy(e, e->caches[i]);
        }
    }
    slots_free(e, s);
    if (s->settling) {
        s->settling = false;
        e->settling_count--;
    }
    s->emptied = true;
    e->sweep_due = true;
    e->host.sweep_due = true;
    e->epoch++;
}

/* An evicted worker may wait for a fill that will not come: it goes on, and sees why. */
static void evicted_wake(struct kvt_engine *e, struct session *s) {
    struct kvt_action *a = action_push(e, KVT_ACTION_POST_FAILED);
    a->session = session_index(e, s);
    a->value = s->schedule.phase != PHASE_NONE ? s->schedule.first_step + s->schedule.committed
                                               : s->step_next;
    a->code = KVT_EEVICTED;
    for (uint32_t i = 0; i < s->slot_count; i++) {
        a = action_push(e, KVT_ACTION_POST_READY);
        a->session = session_index(e, s);
        a->slot = i;
        a->value = s->slots[i].generation;
    }
}

static void hung_progress(struct kvt_engine *e, struct session *s) {
    uint32_t session = session_index(e, s);
    if (!s->draining) {
        s->draining = true;
        struct kvt_action *a = action_push(e, KVT_ACTION_SESSION_CLOSE);
        a->device = s->device;
        a->session = session;
    }
    if (!s->emptied && (s->drained || KVT_BROKEN(e->rules, KVT_BREAK_FREE_BEFORE_DRAIN))) {
        if (s->evicted && !s->dead) {
            evicted_wake(e, s);
        }
        session_empty(e, s);
    }
    if (s->emptied && s->drained && s->dead && s->extent_count == 0 && s->extents_creating == 0) {
        session_forget(e, s);
        action_push(e, KVT_ACTION_SESSION_FREED)->session = session;
    }
}

/* Layers that another session waits for leave between two schedules; their full blocks before. */
static void wanted_progress(struct kvt_engine *e, struct session *s) {
    struct family *f;
    for (uint32_t at = 0; e->wanted_count > 0 && (f = session_family(e, s, &at)) != NULL;) {
        if (f->demote_wanted == 0) {
            continue;
        }
        if (s->schedule.phase != PHASE_NONE) {
            demote_early(e, s, f);
            continue;
        }
        f->demote_wanted = 0;
        e->wanted_count--;
        e->epoch++;
        (void)demote_layer(e, s, f); /* or goes on with what has begun */
    }
}

static void session_progress(struct kvt_engine *e, struct session *s) {
    if (s->hung) {
        hung_progress(e, s);
        return;
    }
    step_progress(e, s);
    wanted_progress(e, s);
    migrate_progress(e, s);
    demote_progress(e, s);
    queue_progress(e, s);
}

/* Lets everything go on that can, and gives back what became empty. */
static void progress(struct kvt_engine *e) {
    uint64_t epoch;
    do {
        epoch = e->epoch;
        for (uint32_t i = 0; i < e->config.sessions_max; i++) {
            if (e->sessions[i].in_use) {
                session_progress(e, &e->sessions[i]);
            }
        }
        if (epoch == e->epoch) {
            extents_sweep(e);
        }
    } while (epoch != e->epoch);
    host_sweep(e);
}

/* ---- sessions -------------------------------------------------------------------------------------------------- */

int kvt_engine_session_open(struct kvt_engine *e, const struct kvt_session_options *o) {
    KVT_ASSERT(o->device < e->config.device_count);
    KVT_ASSERT(o->worker_kind == KVT_WORKER_SEGMENT || o->worker_kind == KVT_WORKER_DENSE);
    KVT_ASSERT(o->ring_bytes % 8 == 0);
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        struct session *s = &e->sessions[i];
        if (s->in_use) {
            continue;
        }
        *s = (struct session){.in_use = true,
                              .tenant = o->tenant,
                              .device = o->device,
                              .worker_kind = o->worker_kind,
                              .keeps_addresses = o->keeps_addresses,
                              .ring = o->ring,
                              .ring_bytes = o->ring_bytes,
                              .step_next = 1,
                              .last_step_ms = e->now_ms};
        s->ops.base = s->ops.next = 1;
        struct kvt_action *a = action_push(e, KVT_ACTION_SESSION_OPEN);
        a->device = o->device;
        a->session = i;
        return (int)i;
    }
    return -KVT_EBUSY;
}

void kvt_engine_session_hangup(struct kvt_engine *e, uint32_t session) {
    struct session *s = &e->sessions[session];
    if (s->in_use) {
        s->hung = true;
        progress(e);
    }
}

void kvt_engine_session_dead(struct kvt_engine *e, uint32_t session) {
    struct session *s = &e->sessions[session];
    if (s->in_use) {
        s->hung = true;
        s->dead = true;
        e->sweep_due = true;
        progress(e);
    }
}

void kvt_engine_session_evict(struct kvt_engine *e, uint32_t session) {
    struct session *s = &e->sessions[session];
    if (s->in_use && !s->hung) {
        s->hung = true;
        s->evicted = true;
        progress(e);
    }
}

void kvt_engine_session_drained(struct kvt_engine *e, uint32_t session) {
    struct session *s = &e->sessions[session];
    KVT_ASSERT(s->in_use);
    KVT_ASSERT(s->draining);
    s->drained = true;
    progress(e);
}

void kvt_engine_device_lost(struct kvt_engine *e, uint32_t device) {
    e->devices[device].lost = true;
    e->epoch++; /* requests that wait for its memory fail */
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        struct session *s = &e->sessions[i];
        if (s->in_use && s->device == device) {
            step_fail(e, s, 0, KVT_EDEVICE);
        }
    }
    progress(e);
}

/* ---- requests, completions, time ----------------------------------------------------------------------------------- */

void kvt_engine_request(struct kvt_engine *e, const struct kvt_request *r) {
    KVT_ASSERT(r->session < e->config.sessions_max);
    KVT_ASSERT(e->sessions[r->session].in_use);
    request_enter(e, r);
    progress(e);
}

void kvt_engine_completion(struct kvt_engine *e, const struct kvt_completion *c) {
    KVT_ASSERT(c->session < e->config.sessions_max);
    struct session *s = &e->sessions[c->session];
    if (!s->in_use || s->emptied) {
        return;
    }
    struct op_record *r = ops_find(&s->ops, c->op);
    KVT_ASSERT(r != NULL);
    ops_complete(&s->ops, r, c->status);
    if (r->role == ROLE_MIGRATE) {
        migrate_completion(e, s, r);
    } else {
        step_completion(e, s, r);
    }
    ops_trim(&s->ops);
    if (ops_drained(&s->ops) || s->schedule.phase != PHASE_OPEN) {
        e->epoch += s->queue_count > 0;
        progress(e);
    }
}

void kvt_engine_extent_created(struct kvt_engine *e, uint32_t extent, int code) {
    extent_created(e, extent, code);
    progress(e);
}

void kvt_engine_extent_destroyed(struct kvt_engine *e, uint32_t extent) {
    extent_destroyed(e, extent);
    progress(e);
}

void kvt_engine_extent_reclaimed(struct kvt_engine *e, uint32_t session, uint32_t extent) {
    extent_reclaimed(e, session, extent);
    progress(e);
}

void kvt_engine_host_grown(struct kvt_engine *e, uint64_t offset, uint64_t bytes, int code) {
    host_grown(e, offset, bytes, code);
    progress(e);
}

void kvt_engine_host_shrunk(struct kvt_engine *e, uint64_t offset, uint64_t bytes) {
    host_shrunk(e, offset, bytes);
    progress(e);
}

void kvt_engine_tick(struct kvt_engine *e, uint64_t now_ms) {
    KVT_ASSERT(now_ms >= e->now_ms);
    e->now_ms = now_ms;
    e->epoch++; /* what waits for others' memory looks again */
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        struct session *s = &e->sessions[i];
        if (s->in_use && !s->hung) {
            queue_expire(e, s);
        }
    }
    progress(e);
}

uint64_t kvt_engine_deadline_ms(const struct kvt_engine *e) {
    uint64_t deadline = UINT64_MAX;
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        const struct session *s = &e->sessions[i];
        for (uint32_t j = 0; s->in_use && !s->hung && j < s->queue_count; j++) {
            const struct pending *p = &s->queue[j];
            uint64_t at = pending_deadline_ms(e, s, p);
            at = at < e->now_ms + 100 ? at : e->now_ms + 100; /* somebody else may be asked */
            deadline = p->started && at < deadline ? at : deadline;
        }
    }
    return deadline;
}

void kvt_engine_break_rules(struct kvt_engine *e, uint64_t rules) {
    e->rules = rules;
}
