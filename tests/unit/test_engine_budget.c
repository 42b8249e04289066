/* Budgets: what a request says that gets no memory, what a failed one leaves behind, limits, memory that
 * comes late, and the way everything goes back. Migration: test_engine_migration.c. */
#include "tests/unit/budget_fixture.h"

/* ---- refusals ------------------------------------------------------------------------------------------- */

static void test_device_refusal_names_budget_and_need(void) {
    struct kvth_config c = {.device_budget_bytes = 64u << 10};
    kvth_start(&h, &c);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(LAYERS);
    struct kvt_cache_options o = kvth_options(KVT_MODE_STATIC, 2);
    struct kvt_request r = {
        .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
    REFUSED(kvth_ask(&h, &r), KVT_EQUOTA, "create: device memory", "65536", "budget",
            "raise the device's budget");
    CU_ASSERT_EQUAL(kvth_device_used(&h), 0);
    o = kvth_options(KVT_MODE_OFFLOADED, 1);
    o.piece_tokens = 8 * KVTH_BLOCK;
    REFUSED(kvth_ask(&h, &r), KVT_EQUOTA, "create: device memory", "98304 bytes more", "65536");
    CU_ASSERT_EQUAL(kvth_device_used(&h), 0);
    CU_ASSERT_EQUAL(kvth_host_used(&h), 0);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* A cache is created and steps; returns the budget that the refusal names, 0: there was none. */
static uint64_t budget_wanted(const struct kvth_config *c, uint32_t kind, uint32_t mode,
                              uint32_t tokens, bool beside, bool host) {
    uint64_t wanted = 0;
    kvth_start(&h, c);
    uint32_t s = kvth_attach(&h, kind, 0);
    struct kvth_cache *other = beside ? create(s, 2, KVT_MODE_STATIC, 1) : NULL;
    uint64_t before = kvth_device_used(&h);
    struct kvt_layout layout = kvth_layout(LAYERS - 1);
    struct kvt_cache_options o = kvth_options(mode, 2);
    struct kvt_request r = {
        .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
    const struct kvth_answer *a = kvth_ask(&h, &r);
    if (a->code == 0 && tokens > 0) {
        struct kvth_cache *d = kvth_adopt(&h, s, a->cache, &layout, 2);
        a = step(d, tokens);
    }
    if (a->code != 0) {
        const char *raise =
            strstr(a->text, host ? "raise [host] budget to " : "raise the device's budget to ");
        char in_use[64];
        (void)snprintf(in_use, sizeof(in_use), "(%llu by this worker)",
                       (unsigned long long)(host ? 0 : before));
        REFUSED(a, KVT_EQUOTA, in_use);
        CU_ASSERT_EQUAL(strstr(a->text, "close a cache") != NULL, beside);
        CU_ASSERT_PTR_NOT_NULL_FATAL(raise);
        wanted = strtoull(strstr(raise, "to ") + 3, NULL, 10);
    }
    (void)other;
    kvth_leave(&h, s);
    kvth_stop(&h);
    return wanted;
}

/* What the request had gathered itself is not in use, and the budget that is named suffices. */
static void test_the_budget_that_is_named_suffices(void) {
    static const struct {
        uint32_t kind, mode, tokens;
        bool beside, host;
    } cases[] = {
        {KVT_WORKER_SEGMENT, KVT_MODE_STATIC, 0, false, false},
        {KVT_WORKER_SEGMENT, KVT_MODE_STATIC, 0, true, false},
        {KVT_WORKER_SEGMENT, KVT_MODE_OFFLOADED, 0, true, false},
        {KVT_WORKER_SEGMENT, KVT_MODE_OFFLOADED_STATIC, 0, false, false},
        {KVT_WORKER_SEGMENT, KVT_MODE_OFFLOADED, 3000, false, true},
        {KVT_WORKER_DENSE, KVT_MODE_STATIC, 0, true, false},
        {KVT_WORKER_DENSE, KVT_MODE_DYNAMIC, 3000, false, false},
        {KVT_WORKER_DENSE, KVT_MODE_DYNAMIC, 3000, true, false},
        {KVT_WORKER_DENSE, KVT_MODE_OFFLOADED, 3000, false, false},
        {KVT_WORKER_DENSE, KVT_MODE_OFFLOADED_STATIC, 0, false, true},
    };
    for (uint32_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        for (uint32_t packed = 0; packed < 2; packed++) {
            uint32_t tokens = cases[i].tokens;
            struct kvth_config c = {.extent_bytes = packed ? 64u << 10 : 4096,
                                    .piece_bytes = 8 * KVTH_LAYER_BLOCK};
            uint64_t *budget = cases[i].host ? &c.host_budget_bytes : &c.device_budget_bytes;
            *budget = cases[i].host ? 64u << 10 : cases[i].beside ? 64u << 10 : 32u << 10;
            (void)snprintf(kvth_what, sizeof(kvth_what), "case %u, packed %u", i, packed);
            uint64_t wanted = budget_wanted(&c, cases[i].kind, cases[i].mode, tokens,
                                            cases[i].beside, cases[i].host);
            CU_ASSERT_TRUE(wanted > *budget);
            *budget = cases[i].host ? (wanted + 65535) / 65536 * 65536 : wanted;
            wanted = budget_wanted(&c, cases[i].kind, cases[i].mode, tokens, cases[i].beside,
                                   cases[i].host);
            if (wanted != 0) {
                (void)fprintf(stderr, "\n%s: with %llu it wants %llu\n", kvth_what,
                              (unsigned long long)*budget, (unsigned long long)wanted);
            }
            CU_ASSERT_EQUAL(wanted, 0);
        }
    }
    kvth_what[0] = 0;
}

/* Places that do not divide the configured extent: it is made for whole ones, and no more is named. */
static void test_the_budget_that_is_named_is_the_least(void) {
    enum { SLOTS = 3, SLOT_BYTES = 6 * KVTH_LAYER_BLOCK };
    struct kvth_config c = {.device_budget_bytes = SLOTS * SLOT_BYTES - KVTH_LAYER_BLOCK,
                            .extent_bytes = 64u << 10,
                            .piece_bytes = SLOT_BYTES};
    uint64_t wanted = budget_wanted(&c, KVT_WORKER_SEGMENT, KVT_MODE_OFFLOADED, 0, false, false);
    CU_ASSERT_EQUAL(wanted, SLOTS * SLOT_BYTES);
    c.device_budget_bytes = wanted;
    wanted = budget_wanted(&c, KVT_WORKER_SEGMENT, KVT_MODE_OFFLOADED, 0, false, false);
    CU_ASSERT_EQUAL(wanted, 0);
}

static void test_host_refusal_names_budget_and_need(void) {
    struct kvth_config c = {.host_budget_bytes = 128u << 10};
    kvth_start(&h, &c);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 1);
    kvth_step(&h, a, 1000, 1);
    uint64_t bytes = info_of(a).host_bytes;
    REFUSED(step(a, 2000), KVT_EQUOTA, "step: host memory", "131072 bytes more", "131072",
            "raise [host] budget");
    CU_ASSERT_EQUAL(info_of(a).host_bytes, bytes); /* nothing has changed */
    kvth_check_tables(&h);
    kvth_step(&h, a, 500, 1);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* Memory that comes slowly is no reason to fail: neither host chunks nor an extent of one's own. */
static void test_slow_memory_is_waited_for(void) {
    static const uint32_t modes[] = {KVT_MODE_OFFLOADED_STATIC, KVT_MODE_STATIC};
    for (uint32_t i = 0; i < 2; i++) {
        kvth_start(&h, &(struct kvth_config){0});
        uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
        struct kvt_layout layout = kvth_layout(LAYERS);
        struct kvt_cache_options o = kvth_options(modes[i], 4);
        struct kvt_request r = {
            .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
        h.hold_events = true;
        uint64_t tag = kvth_send(&h, &r);
        for (uint32_t second = 0; second < 100; second++) {
            kvth_tick(&h, 1000);
            CU_ASSERT_PTR_NULL(kvth_answer(&h, tag));
        }
        h.hold_events = false;
        kvth_pump(&h);
        CU_ASSERT_PTR_NOT_NULL_FATAL(kvth_answer(&h, tag));
        CU_ASSERT_EQUAL(kvth_answer(&h, tag)->code, 0);
        kvth_leave(&h, s);
        kvth_stop(&h);
    }
}

static uint64_t growing_bytes(void) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < h.event_count; i++) {
        bytes += h.event[i].kind == KVT_ACTION_HOST_GROW ? h.event[i].bytes : 0;
    }
    return bytes;
}

/* All layers of what a step appends: their chunks come beside each other, and none too many. */
static void test_all_that_is_missing_is_asked_for_at_once(void) {
    enum { CHUNK = 64 << 10, TOKENS = 16 * KVTH_BLOCK };
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 1);
    uint64_t need = (uint64_t)TOKENS * LAYERS * 16;
    CU_ASSERT_EQUAL_FATAL(need, 4 * CHUNK);
    h.hold_events = true;
    uint64_t tag = kvth_step_send(&h, a, NULL, NULL, 0, TOKENS, 1);
    CU_ASSERT_EQUAL(growing_bytes(), need);
    kvth_tick(&h, 1000); /* looks again, and finds that all is on its way */
    CU_ASSERT_EQUAL(growing_bytes(), need);
    h.hold_events = false;
    kvth_pump(&h);
    CU_ASSERT_PTR_NOT_NULL_FATAL(kvth_answer(&h, tag));
    CU_ASSERT_EQUAL(kvth_answer(&h, tag)->code, 0);
    CU_ASSERT_EQUAL(kvth_host_used(&h), need);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* A worker's own limit: beyond it its own layers leave, and nobody else's, though the budget has
 * room and others have more; and what it cannot give itself is refused, naming the limit. */
static void test_a_worker_stays_within_its_limit(void) {
    struct kvth_config c = {.device_worker_max_bytes = 256u << 10,
                            .host_worker_max_bytes = 192u << 10,
                            .extent_bytes = 16u << 10};
    kvth_start(&h, &c);
    uint32_t other = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *b = create(other, LAYERS, KVT_MODE_DYNAMIC, 1);
    kvth_step(&h, b, 3000, 1);
    CU_ASSERT_EQUAL(resident(b), LAYERS);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_DYNAMIC, 1);
    while (resident(a) == LAYERS) {
        kvth_step(&h, a, 500, 1);
    }
    CU_ASSERT_EQUAL(resident(b), LAYERS);
    CU_ASSERT_TRUE(kvth_device_used(&h) < 512u << 10);
    uint32_t at_least = info_of(a).tokens_longest;
    struct kvt_layout layout = kvth_layout(LAYERS);
    struct kvt_cache_options o = kvth_options(KVT_MODE_STATIC, 8);
    struct kvt_request r = {
        .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
    REFUSED(kvth_ask(&h, &r), KVT_EQUOTA, "create: device memory", "of the 262144 that one worker",
            "raise [device NAME] worker_max", "or use an offloaded mode");
    REFUSED(step(a, 4096), KVT_EQUOTA, "step: ", "that one worker may; raise [");
    struct kvth_cache *d = create(s, LAYERS, KVT_MODE_OFFLOADED, 1);
    REFUSED(step(d, 4096), KVT_EQUOTA, "step: host memory", "of the 196608 that one worker",
            "raise [host] worker_max");
    CU_ASSERT_EQUAL(resident(b), LAYERS);
    CU_ASSERT_EQUAL(info_of(a).tokens_longest, at_least);
    kvth_step(&h, a, 1, 1);
    kvth_step(&h, b, 1, 1);
    kvth_leave(&h, s);
    kvth_leave(&h, other);
    kvth_stop(&h);
}

/* Fewer steps than asked for, when there is room for one only. */
static void test_steps_ahead_shrink_to_what_there_is(void) {
    struct kvth_config c = {.host_budget_bytes = 128u << 10};
    kvth_start(&h, &c);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 1);
    kvth_step(&h, a, 1500, 1);
    uint64_t tag = kvth_step_send(&h, a, NULL, NULL, 0, 100, 32);
    kvth_walk_begin(&h, &w, a, NULL, NULL, 0, 100, tag);
    CU_ASSERT_EQUAL(w.steps, 1);
    kvth_walk_all(&h, &w);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* E1: a dense step that does not get its slots leaves everything as it was. */
static void test_refused_step_keeps_the_slots(void) {
    struct kvth_config c = {.device_budget_bytes = 64u << 10, .extent_bytes = 4096};
    kvth_start(&h, &c);
    uint32_t s = kvth_attach(&h, KVT_WORKER_DENSE, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 1);
    kvth_step(&h, a, 1000, 1); /* 3 slots of 4 blocks: 48 KiB */
    REFUSED(step(a, 1000), KVT_EQUOTA, "step: device memory", "65536");
    kvth_step(&h, a, 1, 1);
    kvth_crop(&h, a, 200);
    kvth_step(&h, a, 100, 2);
    /* 5 blocks each fit (60 KiB); the slack that would be taken if there were room does not. */
    kvth_step(&h, a, 1280 - 400, 1);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* E7: a schedule that does not fit the ring. */
static void test_small_ring(void) {
    struct kvth_config c = {.ring_bytes = 2048};
    kvth_start(&h, &c);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 1);
    uint64_t tag = kvth_step_send(&h, a, NULL, NULL, 0, 10, 16);
    kvth_walk_begin(&h, &w, a, NULL, NULL, 0, 10, tag);
    CU_ASSERT_TRUE(w.steps < 16);
    kvth_walk_all(&h, &w);
    struct kvth_cache *b = kvth_fork(&h, a, NULL, 0);
    kvth_check_tables(&h);
    uint64_t host = info_of(a).host_bytes;
    REFUSED(step(b, 2000), KVT_ETOOBIG, "ring", "2048", "[daemon] ring");
    /* Nothing has changed, but for the room that a row had opened for itself. */
    uint64_t after = info_of(a).host_bytes;
    CU_ASSERT_TRUE(after <= host + 2 * LAYERS * KVTH_LAYER_BLOCK);
    for (uint32_t i = 0; i < 5; i++) {
        REFUSED(step(b, 2000), KVT_ETOOBIG, "ring");
    }
    CU_ASSERT_EQUAL(info_of(a).host_bytes, after);
    kvth_check_tables(&h);
    kvth_step(&h, b, 10, 1);
    kvth_step(&h, a, 10, 1);
    kvth_check_tables(&h);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* ---- host memory that is kept --------------------------------------------------------------------------------- */

enum { CHUNK_BYTES = 64 << 10 };

static struct kvt_tier_info host_info(void) {
    struct kvt_tier_info info;
    kvt_engine_host_info(h.engine, &info);
    return info;
}

/* Nobody asks, and it comes; caches come and go, and it stays, and nothing else does. */
static void test_kept_memory_is_there_and_stays(void) {
    struct kvth_config c = {.host_keep_bytes = 10 * CHUNK_BYTES + 1000, /* whole chunks of it */
                            .host_range_bytes = 4 * CHUNK_BYTES};
    kvth_start(&h, &c);
    CU_ASSERT_TRUE(host_info().keep_pending);
    CU_ASSERT_EQUAL(h.event_count, 3); /* 4 + 4 + 2 chunks, in order */
    for (uint32_t i = 0; i < 3; i++) {
        CU_ASSERT_EQUAL(h.event[i].kind, KVT_ACTION_HOST_GROW);
        CU_ASSERT_EQUAL(h.event[i].offset, 4 * i * CHUNK_BYTES);
        CU_ASSERT_EQUAL(h.event[i].bytes, (i < 2 ? 4u : 2u) * CHUNK_BYTES);
    }
    kvth_pump(&h);
    CU_ASSERT_FALSE(host_info().keep_pending);
    CU_ASSERT_EQUAL(host_info().used_bytes, 10 * CHUNK_BYTES);
    CU_ASSERT_EQUAL(host_info().kept_bytes, 10 * CHUNK_BYTES);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 1);
    kvth_step(&h, a, 4096, 1);
    CU_ASSERT_EQUAL(host_info().used_bytes, 10 * CHUNK_BYTES); /* it is what caches use first */
    for (int i = 0; i < 3; i++) {
        kvth_step(&h, a, 4096, 1);
    }
    CU_ASSERT_EQUAL(host_info().used_bytes, 16 * CHUNK_BYTES);
    kvth_leave(&h, s);
    kvth_pump(&h);
    CU_ASSERT_EQUAL(host_info().used_bytes, 10 * CHUNK_BYTES);
    CU_ASSERT_EQUAL(host_info().live_bytes, 0);
    kvth_stop(&h);
}

/* It is asked for as it comes: so many ranges are on their way, and no more. */
static void test_kept_memory_is_asked_for_bit_by_bit(void) {
    struct kvth_config c = {.host_budget_bytes = 4096u * CHUNK_BYTES,
                            .host_keep_bytes = UINT64_MAX};
    kvth_start(&h, &c);
    CU_ASSERT_EQUAL(h.event_count, 32);
    kvth_pump(&h);
    CU_ASSERT_EQUAL(host_info().used_bytes, 4096u * CHUNK_BYTES);
    CU_ASSERT_FALSE(host_info().keep_pending);
    kvth_stop(&h);
}

/* A cache that needs more than there is waits for what comes anyhow, and uses what has come. */
static void test_a_cache_waits_for_kept_memory(void) {
    struct kvth_config c = {.host_keep_bytes = 64 * CHUNK_BYTES};
    kvth_start(&h, &c);
    h.hold_events = true;
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    CU_ASSERT_EQUAL(growing_bytes(), 32 * CHUNK_BYTES);
    struct kvt_layout layout = kvth_layout(LAYERS);
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED_STATIC, 1);
    struct kvt_request r = {
        .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
    uint64_t tag = kvth_send(&h, &r);
    kvth_tick(&h, 60000);
    CU_ASSERT_PTR_NULL(kvth_answer(&h, tag));
    CU_ASSERT_EQUAL(growing_bytes(), 32 * CHUNK_BYTES); /* nothing more was asked for */
    h.hold_events = false;
    kvth_pump(&h);
    CU_ASSERT_PTR_NOT_NULL_FATAL(kvth_answer(&h, tag));
    CU_ASSERT_EQUAL(kvth_answer(&h, tag)->code, 0);
    CU_ASSERT_EQUAL(host_info().used_bytes, 64 * CHUNK_BYTES);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* The machine has none left: no more is asked for, until a cache needs it, and then it stays. */
static void test_kept_memory_that_does_not_come(void) {
    struct kvth_config c = {.host_budget_bytes = 400 * CHUNK_BYTES,
                            .host_keep_bytes = 300 * CHUNK_BYTES};
    kvth_start(&h, &c);
    h.fail_grows = 1; /* the next one: 32 are on their way */
    kvth_pump(&h);
    CU_ASSERT_FALSE(host_info().keep_pending);
    uint64_t had = host_info().used_bytes;
    CU_ASSERT_TRUE(had >= 32 * CHUNK_BYTES);
    CU_ASSERT_TRUE(had < 100 * CHUNK_BYTES);
    kvth_tick(&h, 1000);
    CU_ASSERT_EQUAL(host_info().used_bytes, had);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 1);
    while (host_info().live_bytes <= had) {
        kvth_step(&h, a, 4096, 1);
    }
    uint64_t most = host_info().used_bytes;
    CU_ASSERT_TRUE(most > had);
    kvth_leave(&h, s);
    kvth_pump(&h);
    CU_ASSERT_EQUAL(host_info().used_bytes, most);
    kvth_stop(&h);
}

/* ---- memory that cannot be had for a moment ------------------------------------------------------------------ */

/* E4: the machine had no memory once. */
static void test_growth_fails_once(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 1);
    h.fail_grows = 1;
    REFUSED(step(a, 100), KVT_EQUOTA, "host memory");
    kvth_step(&h, a, 100, 1);
    h.fail_grows = 1;
    REFUSED(step(a, 4000), KVT_EQUOTA, "host memory");
    kvth_step(&h, a, 4000, 1);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

static void test_extent_fails_once(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(LAYERS);
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 1);
    struct kvt_request r = {
        .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
    h.fail_extents = UINT32_MAX;
    REFUSED(kvth_ask(&h, &r), KVT_EQUOTA, "device memory");
    h.fail_extents = 0;
    CU_ASSERT_EQUAL(kvth_device_used(&h), 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 1);
    kvth_step(&h, a, 1000, 1);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* ---- the end of sessions --------------------------------------------------------------------------------------------- */

static uint64_t dead_bytes(void) {
    struct kvt_tier_info info;
    kvt_engine_device_info(h.engine, 0, &info);
    return info.pinned_dead_bytes;
}

/* Host bytes go at hang-up, device bytes only with the process. */
static void test_hangup_then_death(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 2);
    kvth_step(&h, a, 1000, 1);
    kvth_walk_begin(&h, &w, a, NULL, NULL, 0, 1, kvth_step_send(&h, a, NULL, NULL, 0, 1, 4));
    (void)kvth_walk_pieces(&h, &w, 2);
    uint64_t device = kvth_device_used(&h);
    kvt_engine_session_hangup(h.engine, s);
    kvth_pump(&h);
    kvth_tick(&h, 1);
    CU_ASSERT_EQUAL(kvth_host_used(&h), 0);
    CU_ASSERT_EQUAL(kvth_device_used(&h), device);
    CU_ASSERT_EQUAL(dead_bytes(), device);
    kvth_leave(&h, s);
    CU_ASSERT_EQUAL(kvth_device_used(&h), 0);
    kvth_stop(&h);
}

/* Copies that were submitted outlive the process; memory does too. */
static void test_death_with_copies_in_flight(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 2);
    kvth_step(&h, a, 1000, 1);
    kvth_crop(&h, a, 300);
    h.hold_copies = true;
    (void)kvth_step_send(&h, a, NULL, NULL, 0, 300, 1);
    CU_ASSERT_TRUE(h.held_count > 0);
    uint64_t host = kvth_host_used(&h);
    uint64_t device = kvth_device_used(&h);
    kvt_engine_session_dead(h.engine, s);
    kvth_tick(&h, 1);
    CU_ASSERT_EQUAL(kvth_host_used(&h), host);
    CU_ASSERT_EQUAL(kvth_device_used(&h), device);
    kvth_release(&h, false);
    CU_ASSERT_FALSE(h.session[s].open);
    kvth_stop(&h);
}

/* Evicting a stopped worker frees the host; the rest when it answers or dies. */
static void test_evict_stopped(void) {
    for (int dies = 0; dies < 2; dies++) {
        kvth_start(&h, &(struct kvth_config){0});
        uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
        struct kvth_cache *a = create(s, LAYERS, KVT_MODE_OFFLOADED, 2);
        kvth_step(&h, a, 1000, 1);
        kvth_walk_begin(&h, &w, a, NULL, NULL, 0, 1, kvth_step_send(&h, a, NULL, NULL, 0, 1, 4));
        (void)kvth_walk_pieces(&h, &w, 3);
        struct kvt_request r = {.kind = KVT_REQUEST_FORK, .session = s, .cache = a->id};
        uint64_t waiting = kvth_send(&h, &r);
        CU_ASSERT_PTR_NULL(kvth_answer(&h, waiting));
        h.session[s].silent = true;
        uint64_t device = kvth_device_used(&h);
        kvt_engine_session_evict(h.engine, s);
        kvth_pump(&h);
        kvth_tick(&h, 1);
        CU_ASSERT_EQUAL(kvth_host_used(&h), 0);
        CU_ASSERT_EQUAL(kvth_device_used(&h), device);
        CU_ASSERT_EQUAL(dead_bytes(), device);
        REFUSED(kvth_answer(&h, waiting), KVT_EEVICTED, "evicted");
        REFUSED(kvth_ask(&h, &r), KVT_EEVICTED, "evicted");
        CU_ASSERT_NOT_EQUAL(h.session[s].page->failed.value, 0);
        CU_ASSERT_EQUAL(h.session[s].page->failed.aux, KVT_EEVICTED);
        if (!dies) {
            h.session[s].silent = false;
            kvth_pump(&h);
            CU_ASSERT_EQUAL(kvth_device_used(&h), 0);
        }
        kvth_leave(&h, s);
        kvth_stop(&h);
    }
}

/* Who has not given back what the request waits for: the worker itself, or another one. */
static void test_expiry_says_who(void) {
    for (uint32_t alone = 0; alone < 2; alone++) {
        struct kvth_config c = {.device_budget_bytes = 128u << 10, .extent_bytes = 4096};
        kvth_start(&h, &c);
        uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
        uint32_t other = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
        struct kvth_cache *a = create(alone ? s : other, LAYERS, KVT_MODE_STATIC, 1);
        h.session[alone ? s : other].silent = true;
        kvth_close(&h, a);
        struct kvt_layout layout = kvth_layout(LAYERS);
        struct kvt_cache_options o = kvth_options(KVT_MODE_STATIC, 1);
        struct kvt_request r = {
            .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
        uint64_t tag = kvth_send(&h, &r);
        for (uint32_t i = 0; i < 100 && kvth_answer(&h, tag) == NULL; i++) {
            kvth_tick(&h, 100);
        }
        REFUSED(kvth_answer(&h, tag), KVT_EQUOTA, "device memory",
                alone ? "this worker was asked to unmap 90112 of its own (RECLAIM) and has not for"
                      : "other workers gave back none for",
                alone ? "answer RECLAIM, or" : "evict one that hangs");
        h.session[alone ? s : other].silent = false;
        kvth_leave(&h, s);
        kvth_leave(&h, other);
        kvth_stop(&h);
    }
}

int main(void) {
    CU_TestInfo tests[] = {
        {"a device refusal names budget and need", test_device_refusal_names_budget_and_need},
        {"the budget that is named suffices", test_the_budget_that_is_named_suffices},
        {"the budget that is named is the least", test_the_budget_that_is_named_is_the_least},
        {"a host refusal names budget and need", test_host_refusal_names_budget_and_need},
        {"all that is missing is asked for at once", test_all_that_is_missing_is_asked_for_at_once},
        {"slow memory is waited for", test_slow_memory_is_waited_for},
        {"a worker stays within its limit", test_a_worker_stays_within_its_limit},
        {"steps ahead shrink to what there is", test_steps_ahead_shrink_to_what_there_is},
        {"a refused step keeps the slots", test_refused_step_keeps_the_slots},
        {"a small ring", test_small_ring},
        {"kept memory is there and stays", test_kept_memory_is_there_and_stays},
        {"kept memory is asked for bit by bit", test_kept_memory_is_asked_for_bit_by_bit},
        {"a cache waits for kept memory", test_a_cache_waits_for_kept_memory},
        {"kept memory that does not come", test_kept_memory_that_does_not_come},
        {"host growth fails once", test_growth_fails_once},
        {"an extent fails once", test_extent_fails_once},
        {"hang-up, then death", test_hangup_then_death},
        {"death with copies in flight", test_death_with_copies_in_flight},
        {"evicting a stopped worker", test_evict_stopped},
        {"expiry says who", test_expiry_says_who},
        CU_TEST_INFO_NULL};
    return kvt_cunit_run("engine budget", tests);
}
