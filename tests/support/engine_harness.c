#include "tests/support/engine_harness.h"
#include "tiers/engine/state.h"

#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 4096u

char kvth_what[128];

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    (void)vfprintf(stderr, format, arguments);
    va_end(arguments);
    (void)fprintf(stderr, "\n%s\n", kvth_what);
    CU_FAIL_FATAL("the harness found something wrong; see above");
    abort();
}

void kvth_checked(struct kvth *h, const char *after) {
    char text[KVT_TEXT_BYTES];
    if (!h->unchecked && kvt_engine_check(h->engine, text, sizeof(text)) != 0) {
        die("after %s: %s", after, text);
    }
}

/* ---- memory ------------------------------------------------------------------------------------------ */

static struct kvth_extent *extent_seek(struct kvth *h, uint32_t id) {
    for (uint32_t i = 0; i < KVTH_EXTENTS; i++) {
        if (h->extent[i].id == id) {
            return &h->extent[i];
        }
    }
    return NULL;
}

static struct kvth_extent *extent_of(struct kvth *h, uint32_t id) {
    struct kvth_extent *x = extent_seek(h, id);
    if (x == NULL) {
        die("extent %#x does not exist", id);
    }
    return x;
}

uint8_t *kvth_device_memory(struct kvth *h, uint32_t session, uint32_t extent, uint64_t offset,
                            uint64_t bytes) {
    struct kvth_extent *x = extent_of(h, extent);
    if (x->session != session) {
        die("extent %#x belongs to session %u, not %u", extent, x->session, session);
    }
    if (offset > x->bytes || bytes > x->bytes - offset) {
        die("extent %#x: [%llu, +%llu) is outside its %llu bytes", extent,
            (unsigned long long)offset, (unsigned long long)bytes, (unsigned long long)x->bytes);
    }
    return x->memory + offset;
}

static uint8_t *place(struct kvth *h, uint32_t session, const struct kvt_place *p, uint64_t bytes) {
    if (p->tier == KVT_TIER_GPU) {
        return kvth_device_memory(h, session, p->extent, p->offset, bytes);
    }
    if (p->offset > h->config.host_budget_bytes ||
        bytes > h->config.host_budget_bytes - p->offset) {
        die("host [%llu, +%llu) is outside the arena", (unsigned long long)p->offset,
            (unsigned long long)bytes);
    }
    for (uint64_t at = p->offset / PAGE; at <= (p->offset + bytes - 1) / PAGE; at++) {
        if (!h->arena_ready[at]) {
            die("host [%llu, +%llu) is not there", (unsigned long long)p->offset,
                (unsigned long long)bytes);
        }
    }
    return h->arena + p->offset;
}

/* ---- actions ------------------------------------------------------------------------------------------- */

static void store(struct kvt_counter *c, uint64_t value) {
    c->value = value;
    c->wake++;
}

static void remember(struct kvth *h, const struct kvt_answer *a) {
    struct kvth_answer *to = &h->answer[a->tag % KVTH_ANSWERS];
    if (to->tag == a->tag) {
        die("request %llu was answered twice", (unsigned long long)a->tag);
    }
    struct kvt_tier_info info;
    kvt_engine_device_info(h->engine, 0, &info);
    *to = (struct kvth_answer){.tag = a->tag,
                               .live_bytes = info.live_bytes,
                               .code = a->code,
                               .cache = a->cache,
                               .slots = a->slots,
                               .slot_bytes = a->slot_bytes,
                               .resident_layers = a->resident_layers,
                               .first_step = a->first_step,
                               .steps = a->steps,
                               .ring_offset = a->ring_offset,
                               .ring_bytes = a->ring_bytes,
                               .length_count = a->length_count};
    memcpy(to->text, a->text, sizeof(to->text));
    if (a->length_count > 0) {
        memcpy(to->lengths, a->lengths, a->length_count * sizeof(to->lengths[0]));
    }
}

static void later(struct kvth *h, const struct kvt_action *a, int code) {
    if (h->event_count == KVTH_EVENTS) {
        die("too many events");
    }
    h->event[h->event_count++] = (struct kvth_event){.kind = a->kind,
                                                     .session = a->session,
                                                     .extent = a->extent,
                                                     .offset = a->offset,
                                                     .bytes = a->bytes,
                                                     .code = code};
}

static void extent_make(struct kvth *h, const struct kvt_action *a) {
    if (h->fail_extents > 0) {
        h->fail_extents--;
        later(h, a, -KVT_ENOMEM);
        return;
    }
    for (uint32_t i = 0; i < KVTH_EXTENTS; i++) {
        if (h->extent[i].id == 0) {
            h->extent[i] = (struct kvth_extent){.id = a->extent,
                                                .session = a->session,
                                                .bytes = a->bytes,
                                                .memory = calloc(1, a->bytes)};
            CU_ASSERT_PTR_NOT_NULL_FATAL(h->extent[i].memory);
            later(h, a, 0);
            return;
        }
    }
    die("too many extents");
}

static void session_freed(struct kvth *h, uint32_t session) {
    struct kvth_session *s = &h->session[session];
    for (uint32_t i = 0; i < KVTH_EXTENTS; i++) {
        if (h->extent[i].id != 0 && h->extent[i].session == session) {
            die("session %u is freed and has extent %#x", session, h->extent[i].id);
        }
    }
    free(s->page);
    free(s->ring);
    *s = (struct kvth_session){0};
}

static void carry_out(struct kvth *h, const struct kvt_action *a) {
    struct kvth_session *s = &h->session[a->session];
    switch (a->kind) {
    case KVT_ACTION_ANSWER:
        remember(h, a->answer);
        break;
    case KVT_ACTION_PROGRAM:
        kvt_issuer_submit(h->issuer[a->device], a->program);
        break;
    case KVT_ACTION_CANCEL:
        kvt_issuer_cancel(h->issuer[a->device], a->session, a->value);
        break;
    case KVT_ACTION_SESSION_OPEN:
        kvt_issuer_session_open(h->issuer[a->device], a->session, s->page);
        break;
    case KVT_ACTION_SESSION_CLOSE:
        kvt_issuer_session_close(h->issuer[a->device], a->session);
        break;
    case KVT_ACTION_SESSION_FREED:
        session_freed(h, a->session);
        break;
    case KVT_ACTION_EXTENT_CREATE:
        extent_make(h, a);
        break;
    case KVT_ACTION_EXTENT_SEND:
        extent_of(h, a->extent)->sent = true;
        break;
    case KVT_ACTION_EXTENT_RECLAIM:
        if (extent_seek(h, a->extent) != NULL) { /* or it has no memory: its addresses are over */
            extent_of(h, a->extent)->reclaim_asked = true;
        }
        break;
    case KVT_ACTION_EXTENT_DESTROY: {
        struct kvth_extent *x = extent_of(h, a->extent);
        free(x->memory);
        *x = (struct kvth_extent){0};
        later(h, a, 0);
        break;
    }
    case KVT_ACTION_HOST_GROW:
    case KVT_ACTION_HOST_SHRINK: {
        bool grow = a->kind == KVT_ACTION_HOST_GROW;
        int code = grow && h->fail_grows > 0 ? -KVT_ENOMEM : 0;
        h->fail_grows -= code != 0;
        memset(h->arena + a->offset, grow ? 0xee : 0xdd, a->bytes);
        memset(h->arena_ready + a->offset / PAGE, grow && code == 0, a->bytes / PAGE);
        later(h, a, code);
        break;
    }
    case KVT_ACTION_POST_READY:
        store(&s->page->ready[a->slot], a->value);
        break;
    case KVT_ACTION_POST_COMMITTED:
        store(&s->page->committed, a->value);
        break;
    case KVT_ACTION_POST_FAILED:
        s->page->failed.aux = a->code;
        store(&s->page->failed, a->value);
        break;
    default:
        die("action %u is unknown", a->kind);
    }
}

static void act(struct kvth *h, const char *after) {
    struct kvt_action a;
    kvth_checked(h, after);
    while (kvt_engine_action(h->engine, &a)) {
        carry_out(h, &a);
    }
}

/* ---- completions ------------------------------------------------------------------------------------------ */

static void event_take(struct kvth *h, uint32_t at) {
    struct kvth_event ev = h->event[at];
    h->event_count--;
    memmove(&h->event[at], &h->event[at + 1], (h->event_count - at) * sizeof(ev));
    switch (ev.kind) {
    case KVT_ACTION_EXTENT_CREATE:
        kvt_engine_extent_created(h->engine, ev.extent, ev.code);
        break;
    case KVT_ACTION_EXTENT_DESTROY:
        kvt_engine_extent_destroyed(h->engine, ev.extent);
        break;
    case KVT_ACTION_HOST_GROW:
        kvt_engine_host_grown(h->engine, ev.offset, ev.bytes, ev.code);
        break;
    default:
        kvt_engine_host_shrunk(h->engine, ev.offset, ev.bytes);
    }
    act(h, "an event");
}

static bool reclaim_one(struct kvth *h) {
    for (uint32_t i = 0; i < KVTH_EXTENTS; i++) {
        struct kvth_extent *x = &h->extent[i];
        if (x->id != 0 && x->reclaim_asked && !h->session[x->session].silent) {
            x->reclaim_asked = false;
            kvt_engine_extent_reclaimed(h->engine, x->session, x->id);
            act(h, "RECLAIMED");
            return true;
        }
    }
    return false;
}

static void copy(struct kvth *h, const struct kvt_issue *i, bool *ok) {
    *ok = h->fail_copies == 0;
    h->fail_copies -= !*ok;
    const struct kvt_copy *c = &i->copy;
    const uint8_t *from = place(h, i->session, &c->source, c->bytes);
    uint8_t *to = place(h, i->session, &c->target, c->bytes);
    if (*ok) {
        memcpy(to, from, c->bytes);
    } else {
        memset(to, 0xbb, c->bytes); /* torn */
    }
    h->copied_to_bytes += c->target.tier == KVT_TIER_GPU ? c->bytes : 0;
    h->copied_from_bytes += c->source.tier == KVT_TIER_GPU ? c->bytes : 0;
}

static bool issue_one(struct kvth *h, uint32_t device) {
    struct kvt_issue i;
    struct kvt_completion done;
    uint32_t session;
    if (kvt_issuer_next(h->issuer[device], &i)) {
        bool ok;
        if (i.is_post) {
            store(&h->session[i.session].page->ready[i.slot], i.value);
        } else if (h->hold_copies) {
            if (h->held_count == KVTH_HELD) {
                die("too many held copies");
            }
            h->held[h->held_count].issue = i;
            h->held[h->held_count++].device = device;
        } else {
            copy(h, &i, &ok);
            kvt_issuer_copied(h->issuer[device], i.tag, ok);
        }
        return true;
    }
    if (kvt_issuer_completion(h->issuer[device], &done)) {
        kvt_engine_completion(h->engine, &done);
        act(h, "a completion");
        return true;
    }
    if (kvt_issuer_session_drained(h->issuer[device], &session)) {
        kvt_engine_session_drained(h->engine, session);
        act(h, "drained");
        return true;
    }
    return false;
}

void kvth_pump(struct kvth *h) {
    for (uint32_t rounds = 0;; rounds++) {
        bool moved = false;
        if (rounds > 500000) {
            die("it goes on for ever");
        }
        for (uint32_t d = 0; d < h->config.device_count && !moved; d++) {
            moved = issue_one(h, d);
        }
        if (!moved && h->event_count > 0 && !h->hold_events) {
            event_take(h, 0);
            moved = true;
        }
        if (!moved && !reclaim_one(h)) {
            return;
        }
    }
}

void kvth_release(struct kvth *h, bool ok) {
    h->hold_copies = false;
    while (h->held_count > 0) {
        struct kvt_issue i = h->held[--h->held_count].issue; /* the last one first */
        bool copied;
        h->fail_copies += !ok;
        copy(h, &i, &copied);
        kvt_issuer_copied(h->issuer[h->held[h->held_count].device], i.tag, copied);
    }
    kvth_pump(h);
}

void kvth_tick(struct kvth *h, uint64_t ms) {
    h->now_ms += ms;
    kvt_engine_tick(h->engine, h->now_ms);
    act(h, "a tick");
    kvth_pump(h);
}

/* ---- start and stop ------------------------------------------------------------------------------------------ */

void kvth_start(struct kvth *h, const struct kvth_config *c) {
    memset(h, 0, sizeof(*h));
    uint64_t host = c->host_budget_bytes != 0 ? c->host_budget_bytes : 4u << 20;
    struct kvt_engine_config config = {.device_count = c->devices != 0 ? c->devices : 1,
                                       .host_budget_bytes = host,
                                       .host_worker_max_bytes = c->host_worker_max_bytes,
                                       .host_chunk_bytes = 64u << 10,
                                       .host_keep_bytes = c->host_keep_bytes,
                                       .host_range_bytes = c->host_range_bytes,
                                       .block_tokens = KVTH_BLOCK,
                                       .sessions_max = KVTH_SESSIONS,
                                       .caches_max = KVTH_CACHES,
                                       .idle_after_ms = 5000,
                                       .reclaim_deadline_ms = 2000,
                                       .poison_host = true};
    struct kvt_issuer_config issuer = {.sessions_max = KVTH_SESSIONS,
                                       .inflight_max = 64,
                                       .cut_bytes = 3000, /* odd cuts */
                                       .quantum_bytes = 4096};
    for (uint32_t d = 0; d < config.device_count; d++) {
        config.devices[d] = (struct kvt_engine_device){
            .budget_bytes = c->device_budget_bytes != 0 ? c->device_budget_bytes : 1u << 20,
            .worker_max_bytes = c->device_worker_max_bytes,
            .granule_bytes = 4096,
            .extent_bytes = c->extent_bytes != 0 ? c->extent_bytes : 64u << 10,
            .piece_bytes = c->piece_bytes != 0 ? c->piece_bytes : KVTH_LAYER_BLOCK};
        CU_ASSERT_EQUAL_FATAL(kvt_issuer_create(&issuer, &h->issuer[d]), 0);
    }
    h->config = config;
    CU_ASSERT_EQUAL_FATAL(kvt_engine_create(&config, &h->engine), 0);
    const char *rules = getenv("KVTH_BREAK"); /* VARIANT=mutant: leave these rules out */
    if (rules != NULL) {
        kvt_engine_break_rules(h->engine, strtoull(rules, NULL, 0));
        for (uint32_t d = 0; d < config.device_count; d++) {
            kvt_issuer_break_rules(h->issuer[d], strtoull(rules, NULL, 0));
        }
    }
    h->arena = malloc(host);
    h->arena_ready = calloc(host / PAGE + 1, 1);
    h->answer = calloc(KVTH_ANSWERS, sizeof(*h->answer));
    CU_ASSERT_PTR_NOT_NULL_FATAL(h->arena);
    CU_ASSERT_PTR_NOT_NULL_FATAL(h->arena_ready);
    CU_ASSERT_PTR_NOT_NULL_FATAL(h->answer);
    h->ring_bytes = c->ring_bytes != 0 ? c->ring_bytes : 256u << 10;
    act(h, "the start");
}

static void cache_forget(struct kvth_cache *c) {
    for (uint32_t i = 0; i < c->row_count; i++) {
        free(c->rows[i].id);
        free(c->rows[i].block);
    }
    free(c->rows);
    memset(c, 0, sizeof(*c));
}

void kvth_stop(struct kvth *h) {
    kvth_pump(h);
    for (uint32_t i = 0; i < KVTH_SESSIONS; i++) {
        CU_ASSERT_FALSE(h->session[i].open);
    }
    for (uint32_t d = 0; d < h->config.device_count; d++) {
        struct kvt_tier_info info;
        kvt_engine_device_info(h->engine, d, &info);
        CU_ASSERT_EQUAL(info.used_bytes, 0);
        CU_ASSERT_EQUAL(info.live_bytes, 0);
        kvt_issuer_free(h->issuer[d]);
    }
    struct kvt_tier_info host;
    kvt_engine_host_info(h->engine, &host);
    CU_ASSERT_EQUAL(host.used_bytes, host.kept_bytes);
    for (uint32_t i = 0; i < KVTH_CACHES; i++) {
        cache_forget(&h->cache[i]);
    }
    kvt_engine_free(h->engine);
    free(h->arena);
    free(h->arena_ready);
    free(h->answer);
    free(h->model_full);
}

uint32_t kvth_attach(struct kvth *h, uint32_t kind, uint32_t device) {
    uint8_t *ring = calloc(1, h->ring_bytes);
    struct kvt_control_page *page = calloc(1, sizeof(*page));
    CU_ASSERT_PTR_NOT_NULL_FATAL(ring);
    CU_ASSERT_PTR_NOT_NULL_FATAL(page);
    struct kvt_session_options o = {.device = device,
                                    .worker_kind = kind,
                                    .keeps_addresses = h->keeps_addresses,
                                    .ring = ring,
                                    .ring_bytes = h->ring_bytes};
    int index = kvt_engine_session_open(h->engine, &o);
    if (index < 0) {
        die("session_open: %d", index);
    }
    h->session[index] = (struct kvth_session){.open = true,
                                              .kind = kind,
                                              .device = device,
                                              .page = page,
                                              .ring = ring,
                                              .ring_bytes = h->ring_bytes};
    act(h, "session_open");
    return (uint32_t)index;
}

void kvth_leave(struct kvth *h, uint32_t session) {
    kvt_engine_session_hangup(h->engine, session);
    act(h, "hang-up");
    kvth_pump(h);
    kvt_engine_session_dead(h->engine, session);
    act(h, "death");
    kvth_pump(h);
    if (h->hold_events || h->held_count > 0) { /* memory outlives the process until these are in */
        h->hold_events = false;
        kvth_release(h, true);
    }
    CU_ASSERT_FALSE(h->session[session].open);
    for (uint32_t i = 0; i < KVTH_CACHES; i++) {
        if (h->cache[i].id != 0 && h->cache[i].session == session) {
            cache_forget(&h->cache[i]);
        }
    }
}

/* ---- requests -------------------------------------------------------------------------------------------------- */

uint64_t kvth_send(struct kvth *h, struct kvt_request *r) {
    r->tag = ++h->tag;
    kvt_engine_request(h->engine, r);
    act(h, "a request");
    kvth_pump(h);
    return r->tag;
}

const struct kvth_answer *kvth_answer(struct kvth *h, uint64_t tag) {
    const struct kvth_answer *a = &h->answer[tag % KVTH_ANSWERS];
    return a->tag == tag ? a : NULL;
}

const struct kvth_answer *kvth_ask(struct kvth *h, struct kvt_request *r) {
    const struct kvth_answer *a = kvth_answer(h, kvth_send(h, r));
    if (a == NULL) {
        die("request of kind %u: no answer", r->kind);
    }
    return a;
}

struct kvt_layout kvth_layout(uint32_t layers) {
    struct kvt_layout layout = {.layer_count = layers};
    for (uint32_t l = 0; l < layers; l++) {
        layout.layers[l] = (struct kvt_layer_layout){.kind = KVT_LAYER_FULL,
                                                     .kv_heads = 1,
                                                     .k_head_dim = 4,
                                                     .v_head_dim = 4,
                                                     .dtype = KVT_F16,
                                                     .last_reader = l};
    }
    return layout;
}

struct kvt_cache_options kvth_options(uint32_t mode, uint32_t rows) {
    bool is_static = mode == KVT_MODE_STATIC || mode == KVT_MODE_OFFLOADED_STATIC;
    return (struct kvt_cache_options){.mode = mode,
                                      .rows = rows,
                                      .append_max = 4096,
                                      .tokens_max = is_static ? 1024 : 0,
                                      .resident_layers_max = UINT32_MAX};
}

/* ---- what is looked at --------------------------------------------------------------------------------------------- */

void kvth_cache_info(struct kvth *h, const struct kvth_cache *c, struct kvt_cache_info *out) {
    uint32_t at = c->id & 0xffff;
    CU_ASSERT_TRUE_FATAL(kvt_engine_cache_info(h->engine, &at, out));
    CU_ASSERT_EQUAL_FATAL(out->cache, c->id);
}

void kvth_session_info(struct kvth *h, uint32_t session, struct kvt_session_info *out) {
    uint32_t at = session;
    CU_ASSERT_TRUE_FATAL(kvt_engine_session_info(h->engine, &at, out));
    CU_ASSERT_EQUAL_FATAL(out->session, session);
}

uint64_t kvth_device_used(struct kvth *h) {
    struct kvt_tier_info info;
    kvt_engine_device_info(h->engine, 0, &info);
    return info.used_bytes;
}

uint64_t kvth_host_used(struct kvth *h) {
    struct kvt_tier_info info;
    kvt_engine_host_info(h->engine, &info);
    return info.used_bytes;
}

uint32_t kvth_blocks(struct kvth *h, uint32_t session) {
    uint32_t at = 0;
    uint32_t count = 0;
    const struct family *f;
    while ((f = session_family(h->engine, &h->engine->sessions[session], &at)) != NULL) {
        for (const struct group *g = f->groups; g != NULL; g = g->next) {
            for (uint32_t i = 0; i < g->block_count; i++) {
                count += g->blocks[i].refs > 0;
            }
        }
    }
    return count;
}
