/* Requests that a hostile or broken worker may send, past the daemon's own checks: limits, products
 * that do not fit, zero rows, numbers of nobody. Each is refused with a reason or does what it says;
 * nothing is left behind, and it takes no time. */
#include "tests/support/cunit_run.h"
#include "tests/support/engine_harness.h"

#include <stdlib.h>
#include <string.h>

static struct kvth h;

static uint64_t random_state = 7;

static uint32_t below(uint32_t limit) {
    random_state = random_state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)(((random_state >> 33) * limit) >> 31);
}

/* Mostly an edge. */
static uint32_t number(void) {
    static const uint32_t edges[] = {0,          1,          2,          3,          255,
                                     256,        257,        1023,       1024,       1025,
                                     65535,      65536,      1048576,    1048577,    0x3fffffff,
                                     0x40000000, 0x7fffff00, 0x7fffffff, 0x80000000, UINT32_MAX};
    return below(4) == 0 ? below(5000) : edges[below(sizeof(edges) / sizeof(edges[0]))];
}

static void expect_refusal(const struct kvth_answer *a) {
    CU_ASSERT_NOT_EQUAL(a->code, 0);
    CU_ASSERT_NOT_EQUAL(a->text[0], 0);
    CU_ASSERT_TRUE(memchr(a->text, 0, sizeof(a->text)) != NULL);
}

/* ---- CREATE ------------------------------------------------------------------------------------------------ */

static void close_answer(uint32_t session, const struct kvth_answer *a) {
    if (a->code == 0) {
        struct kvt_request r = {.kind = KVT_REQUEST_CLOSE, .session = session, .cache = a->cache};
        CU_ASSERT_EQUAL(kvth_ask(&h, &r)->code, 0);
    } else {
        expect_refusal(a);
    }
}

/* rows * tokens * bytes of a token is 2^64, or a little more. */
static void test_products_that_wrap(void) {
    static const uint32_t modes[] = {KVT_MODE_DYNAMIC, KVT_MODE_STATIC, KVT_MODE_OFFLOADED,
                                     KVT_MODE_OFFLOADED_STATIC};
    static const uint32_t tokens[] = {1u << 30, (1u << 30) + 256, 0x7fffff00, 1u << 20};
    kvth_start(&h, &(struct kvth_config){0});
    for (uint32_t kind = KVT_WORKER_SEGMENT; kind <= KVT_WORKER_DENSE; kind++) {
        uint32_t s = kvth_attach(&h, kind, 0);
        struct kvt_layout layout = kvth_layout(2);
        layout.layers[0].kv_heads = 1024;
        layout.layers[0].k_head_dim = layout.layers[0].v_head_dim = 4096; /* 2^24 bytes a token */
        for (uint32_t i = 0; i < 4 * 4 * 4; i++) {
            struct kvt_cache_options o = kvth_options(modes[i % 4], 1024 - i / 4 % 2);
            o.tokens_max = tokens[i / 8 % 4];
            o.append_max = KVT_APPEND_MAX;
            o.resident_layers_max = i / 32 == 0 ? UINT32_MAX : 1;
            struct kvt_request r = {
                .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
            const struct kvth_answer *a = kvth_ask(&h, &r);
            if (a->code == 0) { /* dynamic modes take nothing yet, or three slots */
                struct kvt_request step = {.kind = KVT_REQUEST_STEP,
                                           .session = s,
                                           .cache = a->cache,
                                           .tokens = KVT_APPEND_MAX,
                                           .steps = KVT_STEPS_AHEAD_MAX};
                expect_refusal(kvth_ask(&h, &step));
                a = kvth_answer(&h, step.tag - 1);
            }
            close_answer(s, a);
            CU_ASSERT_EQUAL(kvth_host_used(&h), 0);
        }
        kvth_leave(&h, s);
    }
    kvth_stop(&h);
}

/* Tiny layers: what grows is tables, and these are bounded too. */
static void test_tables_are_bounded(void) {
    kvth_start(&h, &(struct kvth_config){.device_budget_bytes = 1u << 20});
    h.unchecked = true;
    for (uint32_t kind = KVT_WORKER_SEGMENT; kind <= KVT_WORKER_DENSE; kind++) {
        uint32_t s = kvth_attach(&h, kind, 0);
        struct kvt_layout layout = kvth_layout(1);
        layout.layers[0].k_head_dim = 1;
        layout.layers[0].v_head_dim = 0;
        layout.layers[0].dtype = KVT_INT8;
        for (uint32_t mode = KVT_MODE_DYNAMIC; mode <= KVT_MODE_OFFLOADED_STATIC; mode++) {
            struct kvt_cache_options o = kvth_options(mode, KVT_ROWS_MAX);
            o.append_max = KVT_APPEND_MAX;
            o.tokens_max = KVT_TOKENS_MAX;
            struct kvt_request r = {
                .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
            const struct kvth_answer *a = kvth_ask(&h, &r);
            if (a->code == 0) {
                struct kvt_request step = {.kind = KVT_REQUEST_STEP,
                                           .session = s,
                                           .cache = a->cache,
                                           .tokens = KVT_APPEND_MAX,
                                           .steps = KVT_STEPS_AHEAD_MAX};
                expect_refusal(kvth_ask(&h, &step));
                a = kvth_answer(&h, step.tag - 1);
            }
            close_answer(s, a);
        }
        kvth_leave(&h, s);
    }
    kvth_stop(&h);
}

static void test_create_at_random(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s[2] = {kvth_attach(&h, KVT_WORKER_SEGMENT, 0), kvth_attach(&h, KVT_WORKER_DENSE, 0)};
    static struct kvt_layout layout;
    uint32_t made = 0;
    for (uint32_t i = 0; i < 3000; i++) {
        layout = kvth_layout(1 + below(5));
        struct kvt_layer_layout *l = &layout.layers[below(layout.layer_count)];
        switch (below(9)) {
        case 0:
            layout.layer_count = below(2) ? 0 : number();
            break;
        case 1:
            l->kind = number();
            break;
        case 2:
            l->kv_heads = number();
            break;
        case 3:
            l->k_head_dim = number();
            break;
        case 4:
            l->v_head_dim = number();
            break;
        case 5:
            l->dtype = number();
            break;
        case 6:
            l->last_reader = number();
            break;
        default:
            break;
        }
        struct kvt_cache_options o = kvth_options(1 + below(4), 1);
        if (below(2) == 0) {
            o = (struct kvt_cache_options){.mode = below(8) ? 1 + below(4) : number(),
                                           .codec = below(8) ? 0 : number(),
                                           .rows = below(2) ? 1 + below(4) : number(),
                                           .tokens_max = number(),
                                           .append_max = number(),
                                           .piece_tokens = number(),
                                           .resident_layers_max = number()};
        }
        memset(o.name, 'x', sizeof(o.name)); /* without an end */
        uint32_t who = below(2);
        struct kvt_request r = {
            .kind = KVT_REQUEST_CREATE, .session = s[who], .layout = &layout, .options = &o};
        const struct kvth_answer *a = kvth_ask(&h, &r);
        made += a->code == 0;
        close_answer(s[who], a);
    }
    CU_ASSERT_TRUE(made > 100);
    CU_ASSERT_EQUAL(kvth_device_used(&h), 0);
    CU_ASSERT_EQUAL(kvth_host_used(&h), 0);
    kvth_leave(&h, s[0]);
    kvth_leave(&h, s[1]);
    kvth_stop(&h);
}

/* ---- the others --------------------------------------------------------------------------------------------- */

static void test_counts_and_numbers(void) {
    static uint32_t rows[2 * KVT_ROWS_MAX];
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    uint32_t other = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(2);
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 3);
    struct kvth_cache *c = kvth_create(&h, s, &layout, &o);
    kvth_step(&h, c, 300, 1);
    static const uint32_t kinds[] = {KVT_REQUEST_FORK, KVT_REQUEST_REORDER, KVT_REQUEST_SELECT,
                                     KVT_REQUEST_CROP, KVT_REQUEST_STEP};
    static const uint32_t counts[] = {
        0, 1, 2, 3, 4, KVT_ROWS_MAX, KVT_ROWS_MAX + 1, 2 * KVT_ROWS_MAX};
    uint64_t host = kvth_host_used(&h);
    for (uint32_t k = 0; k < 5; k++) {
        for (uint32_t n = 0; n < 8; n++) {
            for (uint32_t i = 0; i < counts[n]; i++) {
                /* no such rows; no row is as long */
                bool three = i == counts[n] / 2 && kinds[k] != KVT_REQUEST_CROP;
                rows[i] = three ? 3 : UINT32_MAX;
            }
            struct kvt_request r = {.kind = kinds[k],
                                    .session = s,
                                    .cache = c->id,
                                    .rows = rows,
                                    .values = rows,
                                    .count = counts[n],
                                    .tokens = UINT32_MAX,
                                    .steps = 1};
            const struct kvth_answer *a = kvth_ask(&h, &r);
            bool all = counts[n] == 0 && kinds[k] == KVT_REQUEST_FORK;
            bool longer = kinds[k] == KVT_REQUEST_CROP && (counts[n] == 1 || counts[n] == 3);
            if (all || longer) {
                CU_ASSERT_EQUAL(a->code, 0);
            } else {
                expect_refusal(a);
            }
            r.session = other; /* somebody else's cache */
            CU_ASSERT_EQUAL(kvth_ask(&h, &r)->code, KVT_ENOENT);
            r.session = s;
            r.cache += 1u << 16; /* a later life of the entry */
            CU_ASSERT_EQUAL(kvth_ask(&h, &r)->code, KVT_ENOENT);
            r.cache = 0;
            CU_ASSERT_EQUAL(kvth_ask(&h, &r)->code, KVT_ENOENT);
        }
    }
    static const uint32_t times[] = {0, 342, 1024, 0x55555556, 0xaaaaaaab, UINT32_MAX};
    for (uint32_t i = 0; i < 6; i++) {
        struct kvt_request r = {
            .kind = KVT_REQUEST_REPEAT, .session = s, .cache = c->id, .times = times[i]};
        expect_refusal(kvth_ask(&h, &r));
    }
    static const uint32_t steps[] = {0, 65, UINT32_MAX};
    for (uint32_t i = 0; i < 3; i++) {
        struct kvt_request r = {
            .kind = KVT_REQUEST_STEP, .session = s, .cache = c->id, .tokens = 1, .steps = steps[i]};
        expect_refusal(kvth_ask(&h, &r));
    }
    CU_ASSERT_EQUAL(kvth_host_used(&h), host);
    kvth_step(&h, c, 300, 1);
    kvth_leave(&h, s);
    kvth_leave(&h, other);
    kvth_stop(&h);
}

/* Steps of no tokens, of no rows' tokens, and of empty rows. */
static void test_steps_of_nothing(void) {
    for (uint32_t kind = KVT_WORKER_SEGMENT; kind <= KVT_WORKER_DENSE; kind++) {
        for (uint32_t mode = KVT_MODE_DYNAMIC; mode <= KVT_MODE_OFFLOADED_STATIC; mode++) {
            kvth_start(&h, &(struct kvth_config){0});
            uint32_t s = kvth_attach(&h, kind, 0);
            struct kvt_layout layout = kvth_layout(2);
            struct kvt_cache_options o = kvth_options(mode, 3);
            struct kvth_cache *c = kvth_create(&h, s, &layout, &o);
            kvth_step(&h, c, 0, 1);
            kvth_step(&h, c, 0, 64);
            kvth_reset(&h, c);
            kvth_crop(&h, c, 0);
            struct kvth_cache *empty = kvth_fork(&h, c, NULL, 0);
            kvth_step(&h, c, 100, 1);
            kvth_step(&h, c, 0, 3);
            kvth_step(&h, empty, 0, 2);
            kvth_step(&h, empty, 1, 2);
            kvth_check_tables(&h);
            kvth_leave(&h, s);
            kvth_stop(&h);
        }
    }
}

/* Layers that wait for one last reader: a dense worker holds each in a slot of its own. */
static void test_held_layers(void) {
    static const uint32_t counts[] = {61, 62, 65, 1024};
    kvth_start(&h, &(struct kvth_config){.host_budget_bytes = 64u << 20});
    uint32_t s = kvth_attach(&h, KVT_WORKER_DENSE, 0);
    for (uint32_t i = 0; i < 4; i++) {
        for (uint32_t mode = KVT_MODE_DYNAMIC; mode <= KVT_MODE_OFFLOADED_STATIC; mode++) {
            struct kvt_layout layout = kvth_layout(counts[i]);
            for (uint32_t l = 0; l < counts[i]; l++) {
                layout.layers[l].last_reader = counts[i] - 1;
            }
            struct kvt_cache_options o = kvth_options(mode, 1);
            o.tokens_max = o.tokens_max != 0 ? 256 : 0;
            struct kvt_request r = {
                .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
            bool fits = counts[i] == 61 || mode == KVT_MODE_STATIC;
            struct kvt_plan_request plan = {.layout = &layout,
                                            .options = &o,
                                            .tokens = 1,
                                            .worker_kind = KVT_WORKER_DENSE,
                                            .device_budget_bytes = 1u << 30};
            struct kvt_plan planned;
            char text[KVT_TEXT_BYTES];
            int rc = kvt_engine_plan(h.engine, &plan, &planned, text, sizeof(text));
            CU_ASSERT_EQUAL(rc, fits ? 0 : -KVT_ENOTSUP);
            const struct kvth_answer *a = counts[i] < 1024 || !fits ? kvth_ask(&h, &r) : NULL;
            if (a != NULL && a->code == 0) {
                CU_ASSERT_TRUE(fits);
                struct kvth_cache *c = kvth_adopt(&h, s, a->cache, &layout, 1);
                kvth_step(&h, c, 3, 2);
                kvth_close(&h, c);
            } else if (a != NULL) {
                expect_refusal(a);
                CU_ASSERT_EQUAL(a->code, KVT_ENOTSUP);
                CU_ASSERT_PTR_NOT_NULL(strstr(a->text, "a dense worker may have 60"));
            }
        }
    }
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* Half a million listings of layers: more than the ring holds, refused before it is laid out. */
static void test_rereads_beyond_the_ring(void) {
    kvth_start(&h, &(struct kvth_config){.host_budget_bytes = 64u << 20});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(KVT_LAYERS_MAX);
    for (uint32_t l = 0; l < KVT_LAYERS_MAX; l++) {
        layout.layers[l].last_reader = KVT_LAYERS_MAX - 1;
    }
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 1);
    struct kvth_cache *c = kvth_create(&h, s, &layout, &o);
    struct kvt_request r = {.kind = KVT_REQUEST_STEP,
                            .session = s,
                            .cache = c->id,
                            .tokens = 1,
                            .steps = KVT_STEPS_AHEAD_MAX};
    const struct kvth_answer *a = kvth_ask(&h, &r);
    CU_ASSERT_EQUAL(a->code, KVT_ETOOBIG);
    CU_ASSERT_PTR_NOT_NULL(strstr(a->text, "ring_size"));
    kvth_check_tables(&h);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* More caches one after the other than an index has generations: none is number 0. */
static void test_numbers_come_round(void) {
    kvth_start(&h, &(struct kvth_config){0});
    h.unchecked = true;
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(1);
    struct kvt_cache_options o = kvth_options(KVT_MODE_DYNAMIC, 1);
    uint32_t zeros = 0;
    for (uint32_t i = 0; i < 65600; i++) {
        struct kvt_request r = {
            .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
        const struct kvth_answer *a = kvth_ask(&h, &r);
        zeros += a->code == 0 && a->cache == 0;
        struct kvt_request close = {.kind = KVT_REQUEST_CLOSE, .session = s, .cache = a->cache};
        zeros += kvth_ask(&h, &close)->code != 0;
    }
    CU_ASSERT_EQUAL(zeros, 0);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* As many caches, sessions and waiting requests as there may be; one more is refused. */
static void test_tables_fill(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(1);
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 1);
    struct kvth_cache *c = kvth_create(&h, s, &layout, &o);
    kvth_step(&h, c, 10, 1);
    for (uint32_t i = 1; i < KVTH_CACHES; i++) {
        (void)kvth_fork(&h, c, NULL, 0);
    }
    struct kvt_request fork = {.kind = KVT_REQUEST_FORK, .session = s, .cache = c->id};
    CU_ASSERT_EQUAL(kvth_ask(&h, &fork)->code, KVT_EBUSY);
    struct kvt_request create = {
        .kind = KVT_REQUEST_CREATE, .session = s, .layout = &layout, .options = &o};
    expect_refusal(kvth_ask(&h, &create));
    kvth_check_tables(&h);
    uint64_t tag = kvth_step_send(&h, c, NULL, NULL, 0, 1, 1);
    static struct kvth_walk w;
    kvth_walk_begin(&h, &w, c, NULL, NULL, 0, 1, tag);
    struct kvt_request reset = {.kind = KVT_REQUEST_RESET, .session = s, .cache = c->id};
    for (uint32_t i = 0; i < KVT_REQUESTS_MAX; i++) {
        CU_ASSERT_PTR_NULL(kvth_answer(&h, kvth_send(&h, &reset)));
    }
    CU_ASSERT_EQUAL(kvth_ask(&h, &reset)->code, KVT_EBUSY);
    kvth_walk_all(&h, &w);
    CU_ASSERT_EQUAL(kvth_answer(&h, reset.tag - 1)->code, 0);
    kvth_leave(&h, s);
    for (uint32_t i = 0; i < KVTH_SESSIONS; i++) {
        CU_ASSERT_EQUAL(kvth_attach(&h, KVT_WORKER_DENSE, 0), i);
    }
    struct kvt_session_options more = {.worker_kind = KVT_WORKER_DENSE};
    CU_ASSERT_EQUAL(kvt_engine_session_open(h.engine, &more), -KVT_EBUSY);
    for (uint32_t i = 0; i < KVTH_SESSIONS; i++) {
        kvth_leave(&h, i);
    }
    kvth_stop(&h);
}

int main(void) {
    CU_TestInfo tests[] = {{"products that wrap", test_products_that_wrap},
                           {"tables are bounded", test_tables_are_bounded},
                           {"CREATE at random", test_create_at_random},
                           {"counts and numbers", test_counts_and_numbers},
                           {"steps of nothing", test_steps_of_nothing},
                           {"held layers", test_held_layers},
                           {"re-reads beyond the ring", test_rereads_beyond_the_ring},
                           {"numbers come round", test_numbers_come_round},
                           {"tables fill", test_tables_fill},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("engine, hostile requests", tests);
}
