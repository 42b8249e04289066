/* Layers between device and host: in mid-life, of idle caches, in which order, and back. */
#include "tests/unit/budget_fixture.h"

/* ---- migration ---------------------------------------------------------------------------------------------------- */

/* A dynamic cache outgrows the device: one layer after the other leaves, a nested set stays. */
static void migrates_in_mid_life(uint32_t kind, uint32_t layers) {
    struct kvth_config c = {.device_budget_bytes = 512u << 10, .extent_bytes = 16u << 10};
    kvth_start(&h, &c);
    uint32_t s = kvth_attach(&h, kind, 0);
    struct kvth_cache *a = create(s, layers, KVT_MODE_DYNAMIC, 1);
    struct kvt_cache_info before = info_of(a);
    uint32_t single = 0;
    for (uint32_t i = 0; i < 70; i++) {
        kvth_step(&h, a, 100, 1);
        struct kvt_cache_info now = info_of(a);
        uint32_t left = 0;
        for (uint32_t l = 0; l < layers; l++) {
            CU_ASSERT_FALSE(before.layers[l] != 'R' && now.layers[l] == 'R');
            left += before.layers[l] == 'R' && now.layers[l] != 'R';
        }
        single += left == 1;
        before = now;
    }
    CU_ASSERT_TRUE(resident(a) < layers);
    CU_ASSERT_TRUE(single > 0);
    CU_ASSERT_TRUE(info_of(a).counters.migrated_bytes > 0);
    kvth_close(&h, a);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

static void test_migrates_in_mid_life(void) {
    migrates_in_mid_life(KVT_WORKER_SEGMENT, 16);
    migrates_in_mid_life(KVT_WORKER_SEGMENT, 5);
    migrates_in_mid_life(KVT_WORKER_DENSE, 16);
    migrates_in_mid_life(KVT_WORKER_DENSE, 5);
}

/* The first step is more than the device holds: layers leave before they were ever there. */
static void test_first_step_larger_than_the_device(void) {
    for (uint32_t kind = KVT_WORKER_SEGMENT; kind <= KVT_WORKER_DENSE; kind++) {
        for (uint32_t rows = 1; rows <= 4; rows++) {
            struct kvth_config c = {.device_budget_bytes = 64u << 10, .extent_bytes = 16u << 10};
            kvth_start(&h, &c);
            uint32_t s = kvth_attach(&h, kind, 0);
            struct kvth_cache *a = create(s, LAYERS, KVT_MODE_DYNAMIC, rows);
            uint32_t first = kind == KVT_WORKER_SEGMENT ? 2000 : 1280;
            uint32_t tokens = first / rows / KVTH_BLOCK * KVTH_BLOCK;
            bool fits = rows * tokens * LAYERS * KVTH_TOKEN <= c.device_budget_bytes;
            kvth_step(&h, a, tokens, 1);
            CU_ASSERT_TRUE(resident(a) < LAYERS || fits);
            kvth_close(&h, a);
            a = create(s, LAYERS, KVT_MODE_DYNAMIC, rows);
            kvth_step(&h, a, 3, 1); /* and grows in one go */
            kvth_step(&h, a, tokens - 3, 1);
            CU_ASSERT_TRUE(resident(a) < LAYERS || fits);
            kvth_repeat(&h, a, 1);
            kvth_step(&h, a, 0, 1);
            kvth_leave(&h, s);
            kvth_stop(&h);
        }
    }
}

/* From 16 resident layers to 15: one moves, and only its bytes. */
static void test_residency_is_nested(void) {
    struct kvth_config c = {.device_budget_bytes = 8u << 20, .extent_bytes = 4096};
    kvth_start(&h, &c);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(16);
    uint8_t sets[17][16];
    for (uint32_t n = 0; n <= 16; n++) {
        struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 1);
        o.resident_layers_max = n;
        struct kvth_cache *a = kvth_create(&h, s, &layout, &o);
        CU_ASSERT_EQUAL(resident(a), n);
        memcpy(sets[n], info_of(a).layers, 16);
        kvth_step(&h, a, 300, 1);
        kvth_close(&h, a);
        for (uint32_t l = 0; n > 0 && l < 16; l++) {
            CU_ASSERT_FALSE(sets[n - 1][l] == 'R' && sets[n][l] != 'R');
        }
    }
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* An idle session gives way, whole, before an active one loses a layer; when it steps again it
 * comes back. */
static void idle_gives_way(uint32_t kind) {
    struct kvth_config c = {.device_budget_bytes = 256u << 10, .extent_bytes = 16u << 10};
    kvth_start(&h, &c);
    uint32_t idle = kvth_attach(&h, kind, 0);
    uint32_t busy = kvth_attach(&h, kind, 0);
    struct kvth_cache *a = create(idle, LAYERS, KVT_MODE_DYNAMIC, 1);
    struct kvth_cache *b = create(busy, LAYERS, KVT_MODE_DYNAMIC, 1);
    kvth_step(&h, a, 2000, 1); /* 128 KiB */
    kvth_step(&h, b, 500, 1);
    kvth_tick(&h, 6000);
    kvth_step(&h, b, 10, 1);                               /* active again */
    uint32_t steps = kind == KVT_WORKER_SEGMENT ? 20 : 11; /* planes grow by copying */
    for (uint32_t i = 0; i < steps; i++) {
        kvth_step(&h, b, 100, 1);
    }
    CU_ASSERT_EQUAL(resident(a), 0);
    CU_ASSERT_EQUAL(info_of(a).layers[0], 'I');
    CU_ASSERT_EQUAL(resident(b), LAYERS);
    struct kvt_session_info info;
    kvth_session_info(&h, idle, &info);
    CU_ASSERT_EQUAL(info.device_bytes, 0);
    kvth_close(&h, b);
    kvth_step(&h, a, 1, 1); /* back */
    CU_ASSERT_EQUAL(resident(a), LAYERS);
    CU_ASSERT_EQUAL(info_of(a).host_bytes, 0);
    kvth_step(&h, a, 100, 2);
    kvth_leave(&h, idle);
    kvth_leave(&h, busy);
    kvth_stop(&h);
}

/* A cache that had to give way gets its layers back, one a step, once there has been room for a
 * while; then it needs no slots any more. */
static void test_layers_come_back(void) {
    struct kvth_config c = {.device_budget_bytes = 256u << 10, .extent_bytes = 16u << 10};
    kvth_start(&h, &c);
    uint32_t here = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    uint32_t other = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(here, LAYERS, KVT_MODE_DYNAMIC, 1);
    struct kvth_cache *b = create(other, LAYERS, KVT_MODE_DYNAMIC, 1);
    kvth_step(&h, a, 2000, 1);
    kvth_step(&h, b, 3000, 1);
    CU_ASSERT_TRUE(resident(a) + resident(b) < 2 * LAYERS);
    kvth_close(&h, b);
    uint32_t left = resident(a);
    kvth_step(&h, a, 1, 1);
    CU_ASSERT_EQUAL(resident(a), left); /* not at once */
    kvth_tick(&h, 6000);
    for (uint32_t i = left; i < LAYERS; i++) {
        kvth_step(&h, a, 1, 1);
        CU_ASSERT_EQUAL(resident(a), i + 1);
    }
    CU_ASSERT_EQUAL(info_of(a).slots, 0);
    CU_ASSERT_EQUAL(info_of(a).host_bytes, 0);
    kvth_step(&h, a, 10, 2);
    kvth_leave(&h, here);
    kvth_leave(&h, other);
    kvth_stop(&h);
}

static void test_idle_gives_way(void) {
    idle_gives_way(KVT_WORKER_SEGMENT);
    idle_gives_way(KVT_WORKER_DENSE);
}

/* Slots of an idle offloaded session go too, and its next STEP gets them back. */
static void test_idle_slots_go_and_come_back(void) {
    struct kvth_config c = {.device_budget_bytes = 96u << 10, .extent_bytes = 4096};
    kvth_start(&h, &c);
    uint32_t idle = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    uint32_t busy = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(idle, LAYERS, KVT_MODE_OFFLOADED, 1);
    kvth_step(&h, a, 600, 1);
    kvth_tick(&h, 6000);
    struct kvt_layout layout = kvth_layout(LAYERS);
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 1);
    o.piece_tokens = 8 * KVTH_BLOCK; /* 3 slots of 32 KiB: all there is */
    struct kvth_cache *b = kvth_create(&h, busy, &layout, &o);
    struct kvt_session_info info;
    kvth_session_info(&h, idle, &info);
    CU_ASSERT_EQUAL(info.device_bytes, 0);
    kvth_step(&h, b, 600, 1);
    REFUSED(step(a, 1), KVT_EQUOTA, "step: device memory", "98304");
    kvth_close(&h, b);
    kvth_step(&h, a, 1, 3);
    kvth_leave(&h, idle);
    kvth_leave(&h, busy);
    kvth_stop(&h);
}

/* E5: a stopped worker in an open step holds most; another one's own layers are there to give. */
static void test_stopped_worker_holds_nobody_up(void) {
    struct kvth_config c = {.device_budget_bytes = 256u << 10, .extent_bytes = 4096};
    kvth_start(&h, &c);
    uint32_t stopped = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    uint32_t other = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(stopped, LAYERS, KVT_MODE_DYNAMIC, 1);
    struct kvth_cache *b = create(other, LAYERS, KVT_MODE_DYNAMIC, 1);
    kvth_step(&h, a, 2500, 1);
    kvth_step(&h, b, 600, 1);
    static struct kvth_walk open;
    kvth_walk_begin(&h, &open, a, NULL, NULL, 0, 1,
                    kvth_step_send(&h, a, NULL, NULL, 0, 1, 1)); /* and never goes on */
    h.session[stopped].silent = true;
    kvth_step(&h, b, 900, 1);
    kvth_step(&h, b, 900, 1);
    kvth_tick(&h, 60000);
    kvth_step(&h, b, 100, 1);
    kvth_leave(&h, stopped);
    kvth_leave(&h, other);
    kvth_stop(&h);
}

/* E6: a discarded prefetch is still being copied when its layer comes back to the device. */
static void test_promotion_waits_for_what_reads_the_host(void) {
    struct kvth_config c = {.device_budget_bytes = 256u << 10, .extent_bytes = 16u << 10};
    kvth_start(&h, &c);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    uint32_t other = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, LAYERS, KVT_MODE_DYNAMIC, 1);
    struct kvth_cache *big = create(other, LAYERS, KVT_MODE_DYNAMIC, 1);
    kvth_step(&h, a, 1000, 1);
    kvth_tick(&h, 6000);
    kvth_step(&h, big, 4000, 1); /* sends a's layers away */
    CU_ASSERT_EQUAL(resident(a), 0);
    kvth_step(&h, a, 1, 1); /* streams; or comes back as far as there is room */
    kvth_tick(&h, 6000);
    kvth_step(&h, big, 90, 1);
    kvth_close(&h, big);
    CU_ASSERT_TRUE(resident(a) < LAYERS);
    h.hold_copies = true;
    uint64_t tag = kvth_step_send(&h, a, NULL, NULL, 0, 1, 1);
    kvth_release(&h, true);
    kvth_walk_begin(&h, &w, a, NULL, NULL, 0, 1, tag);
    kvth_walk_all(&h, &w);
    kvth_leave(&h, s);
    kvth_leave(&h, other);
    kvth_stop(&h);
}

/* ---- static caches of idle sessions ------------------------------------------------------------------------ */

static uint64_t device_bytes(uint32_t session) {
    struct kvt_session_info info;
    kvth_session_info(&h, session, &info);
    return info.device_bytes;
}

/* Two sessions whose static caches do not fit together; the first is away, the second is active. */
static void away(uint32_t kind, uint32_t mode, uint32_t *idle, uint32_t *busy,
                 struct kvth_cache **a, struct kvth_cache **b) {
    struct kvth_config c = {.device_budget_bytes = 112u << 10, .extent_bytes = 16u << 10};
    kvth_start(&h, &c);
    h.keeps_addresses = true;
    *idle = kvth_attach(&h, kind, 0);
    *busy = kvth_attach(&h, kind, 0);
    *a = create(*idle, LAYERS, mode, 1);
    kvth_step(&h, *a, 700, 1);
    CU_ASSERT(device_bytes(*idle) > 0);
    kvth_tick(&h, 6000);
    *b = create(*busy, LAYERS, mode, 1);
    kvth_step(&h, *b, 500, 1);
    CU_ASSERT_EQUAL(resident(*a), 0);
    CU_ASSERT_EQUAL(info_of(*a).device_bytes, 0);
    CU_ASSERT_EQUAL(device_bytes(*idle), 0);
    CU_ASSERT(device_bytes(*busy) > 56u << 10);
}

static void the_end(uint32_t idle, uint32_t busy) {
    struct kvt_tier_info info;
    kvth_leave(&h, idle);
    kvth_leave(&h, busy);
    kvt_engine_device_info(h.engine, 0, &info);
    CU_ASSERT_EQUAL(info.used_bytes, 0);
    kvth_stop(&h);
}

static const uint32_t KINDS[] = {KVT_WORKER_SEGMENT, KVT_WORKER_DENSE};

static void test_static_comes_back(void) {
    for (uint32_t i = 0; i < 2; i++) {
        struct kvth_cache *a;
        struct kvth_cache *b;
        uint32_t idle, busy;
        away(KINDS[i], KVT_MODE_STATIC, &idle, &busy, &a, &b);
        kvth_tick(&h, 12001);
        kvth_step(&h, a, 100, 2); /* every byte is compared */
        CU_ASSERT_EQUAL(resident(a), LAYERS);
        CU_ASSERT_EQUAL(resident(b), 0);
        CU_ASSERT_EQUAL(info_of(a).host_bytes, 0);
        the_end(idle, busy);
    }
}

/* The other one is active: refused with all that is needed, and nothing has changed. */
static void test_static_stays_away(void) {
    for (uint32_t i = 0; i < 2; i++) {
        struct kvth_cache *a;
        struct kvth_cache *b;
        uint32_t idle, busy;
        char need[64];
        away(KINDS[i], KVT_MODE_STATIC, &idle, &busy, &a, &b);
        (void)snprintf(need, sizeof(need), " %llu bytes more are needed",
                       (unsigned long long)device_bytes(busy)); /* the two are alike */
        const char *words[] = {need, "(0 by this worker)", "use an offloaded mode", NULL};
        refused(step(a, 1), KVT_EQUOTA, words);
        CU_ASSERT_EQUAL(device_bytes(idle), 0);
        kvth_step(&h, b, 10, 1);
        kvth_close(&h, b);
        kvth_step(&h, a, 10, 1);
        CU_ASSERT_EQUAL(resident(a), LAYERS);
        the_end(idle, busy);
    }
}

/* A copy back fails, or the memory itself does: the step says so, and the next one has it all. */
static void test_static_comes_back_at_second_try(void) {
    for (uint32_t i = 0; i < 2; i++) {
        const char *words[] = {"was idle", "cannot come back", "try again", NULL};
        const char *none[] = {"there is less memory than the budget says", NULL};
        struct kvth_cache *a;
        struct kvth_cache *b;
        uint32_t idle, busy;
        away(KINDS[i], KVT_MODE_STATIC, &idle, &busy, &a, &b);
        kvth_close(&h, b);
        h.fail_extents = 1;
        refused(step(a, 1), KVT_EQUOTA, none);
        h.fail_copies = 1;
        refused(step(a, 1), KVT_EIO, words);
        kvth_step(&h, a, 10, 2);
        the_end(idle, busy);
    }
}

/* Without its memory it can be closed by a worker that goes on, and its worker can be evicted or die. */
static void test_static_ends_while_away(void) {
    for (uint32_t way = 0; way < 6; way++) {
        struct kvth_cache *a;
        struct kvth_cache *b;
        uint32_t idle, busy;
        away(KINDS[way % 2], KVT_MODE_STATIC, &idle, &busy, &a, &b);
        if (way / 2 == 0) {
            kvth_close(&h, a);
            kvth_step(&h, create(idle, 1, KVT_MODE_DYNAMIC, 1), 20, 1);
        } else if (way / 2 == 1) {
            kvt_engine_session_evict(h.engine, idle);
        }
        the_end(idle, busy);
    }
}

/* A wrong STEP is wrong also while the cache is away, and brings nothing back. */
static void test_wrong_step_while_away(void) {
    for (uint32_t i = 0; i < 2; i++) {
        struct kvth_cache *a;
        struct kvth_cache *b;
        uint32_t idle, busy;
        const uint32_t rows[] = {1023, 0};
        const uint32_t tokens[] = {1, 1};
        const char *words[] = {"step:", NULL};
        away(KINDS[i], KVT_MODE_STATIC, &idle, &busy, &a, &b);
        struct kvth_cache *c = create(busy, 1, KVT_MODE_DYNAMIC, 1);
        kvth_step(&h, c, 1, 1);
        refused(kvth_answer(&h, kvth_step_send(&h, a, rows, tokens, 1, 0, 1)), KVT_EINVAL, words);
        refused(kvth_answer(&h, kvth_step_send(&h, a, rows, tokens, 2, 0, 1)), KVT_EINVAL, words);
        CU_ASSERT_EQUAL(device_bytes(idle), 0);
        the_end(idle, busy);
    }
}

static const struct kvth_answer *ask_for_static(uint32_t session) {
    struct kvt_layout layout = kvth_layout(LAYERS);
    struct kvt_cache_options o = kvth_options(KVT_MODE_STATIC, 1);
    struct kvt_request r = {
        .kind = KVT_REQUEST_CREATE, .session = session, .layout = &layout, .options = &o};
    return kvth_ask(&h, &r);
}

/* What is away must fit beside what is made: else neither could ever step again. */
static void test_create_beside_what_is_away(void) {
    struct kvth_cache *a;
    struct kvth_cache *b;
    uint32_t idle, busy;
    const char *words[] = {"create: device memory", NULL};
    away(KVT_WORKER_SEGMENT, KVT_MODE_STATIC, &idle, &busy, &a, &b);
    kvth_close(&h, b);
    refused(ask_for_static(idle), KVT_EQUOTA, words);
    kvth_step(&h, a, 10, 1);
    the_end(idle, busy);
}

/* A cache that needs nothing of what is away goes on without it. */
static void test_dynamic_beside_what_is_away(void) {
    struct kvth_config c = {.device_budget_bytes = 112u << 10, .extent_bytes = 16u << 10};
    kvth_start(&h, &c);
    h.keeps_addresses = true;
    uint32_t idle = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    uint32_t busy = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(idle, LAYERS, KVT_MODE_STATIC, 1);
    struct kvth_cache *d = create(idle, 1, KVT_MODE_DYNAMIC, 1);
    kvth_step(&h, a, 700, 1);
    kvth_step(&h, d, 20, 1);
    kvth_tick(&h, 6000);
    struct kvth_cache *b = create(busy, LAYERS, KVT_MODE_STATIC, 1);
    kvth_step(&h, b, 100, 1);
    CU_ASSERT_EQUAL(resident(a), 0);
    kvth_step(&h, d, 20, 2);
    CU_ASSERT_EQUAL(resident(a), 0);
    CU_ASSERT_EQUAL(resident(b), LAYERS);
    the_end(idle, busy);
}

/* The host cannot take all of it: nothing leaves, since nothing would be won. */
static void test_host_too_small_for_a_static_one(void) {
    for (uint32_t i = 0; i < 2; i++) {
        struct kvth_config c = {.device_budget_bytes = 112u << 10,
                                .host_budget_bytes = 64u << 10,
                                .extent_bytes = 16u << 10};
        const char *words[] = {"create: device memory", NULL};
        kvth_start(&h, &c);
        h.keeps_addresses = true;
        uint32_t idle = kvth_attach(&h, KINDS[i], 0);
        uint32_t busy = kvth_attach(&h, KINDS[i], 0);
        struct kvth_cache *a = create(idle, LAYERS, KVT_MODE_STATIC, 1);
        kvth_step(&h, a, 700, 1);
        kvth_tick(&h, 6000);
        refused(ask_for_static(busy), KVT_EQUOTA, words);
        CU_ASSERT_EQUAL(resident(a), LAYERS);
        CU_ASSERT_EQUAL(info_of(a).host_bytes, 0);
        kvth_step(&h, a, 10, 1);
        the_end(idle, busy);
    }
}

int main(void) {
    CU_TestInfo tests[] = {
        {"migration in mid-life", test_migrates_in_mid_life},
        {"first step larger than the device", test_first_step_larger_than_the_device},
        {"residency is nested", test_residency_is_nested},
        {"an idle session gives way", test_idle_gives_way},
        {"layers come back", test_layers_come_back},
        {"idle slots go and come back", test_idle_slots_go_and_come_back},
        {"a stopped worker holds nobody up", test_stopped_worker_holds_nobody_up},
        {"promotion waits for what reads the host", test_promotion_waits_for_what_reads_the_host},
        {"a static cache comes back", test_static_comes_back},
        {"a static cache stays away", test_static_stays_away},
        {"a static cache comes back at the second try", test_static_comes_back_at_second_try},
        {"a static cache ends while it is away", test_static_ends_while_away},
        {"a wrong step while it is away", test_wrong_step_while_away},
        {"a create beside what is away", test_create_beside_what_is_away},
        {"a dynamic cache beside what is away", test_dynamic_beside_what_is_away},
        {"the host is too small for a static one", test_host_too_small_for_a_static_one},
        CU_TEST_INFO_NULL};
    return kvt_cunit_run("engine migration", tests);
}
