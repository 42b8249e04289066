/* The planner: which layers stay, what it promises, and that CREATE and STEP do what it said. */
#include "tests/support/cunit_run.h"
#include "tests/support/engine_harness.h"
#include "tiers/engine/state.h"

#include <string.h>

static struct kvth h;

/* ---- the order ------------------------------------------------------------------------------------------- */

static void test_order_is_a_permutation(void) {
    static bool seen[KVT_LAYERS_MAX];
    static uint32_t order[KVT_LAYERS_MAX];
    for (uint32_t layers = 1; layers <= KVT_LAYERS_MAX; layers += layers < 70 ? 1 : 53) {
        struct kvt_layout layout = kvth_layout(layers);
        for (uint32_t l = 0; l + 3 < layers; l += 5) {
            layout.layers[l].last_reader = l + 3;
        }
        plan_priority(layers, layout.layers, order);
        memset(seen, 0, sizeof(seen));
        bool shared = true;
        for (uint32_t i = 0; i < layers; i++) {
            CU_ASSERT_TRUE_FATAL(order[i] < layers);
            CU_ASSERT_FALSE_FATAL(seen[order[i]]);
            seen[order[i]] = true;
            /* those that later layers read come first */
            bool now = layout.layers[order[i]].last_reader > order[i];
            CU_ASSERT_TRUE(shared || !now);
            shared = now;
        }
    }
}

/* Every prefix of the order is spread evenly: no gap is more than twice another and one. */
static void test_order_is_spread(void) {
    uint32_t order[64];
    struct kvt_layout layout = kvth_layout(64);
    plan_priority(64, layout.layers, order);
    for (uint32_t n = 2; n <= 64; n++) {
        bool in[65] = {false};
        uint32_t gap = 0, widest = 0;
        for (uint32_t i = 0; i < n; i++) {
            in[order[i]] = true;
        }
        for (uint32_t l = 0; l < 64; l++) {
            gap = in[l] ? 0 : gap + 1;
            widest = gap > widest ? gap : widest;
        }
        CU_ASSERT_TRUE(widest <= 2 * (64 / n));
    }
}

/* ---- plans -------------------------------------------------------------------------------------------------- */

static int plan(struct kvt_plan *out, const struct kvt_layout *layout,
                const struct kvt_cache_options *o, uint32_t kind, uint32_t tokens, uint64_t budget,
                char *text) {
    struct kvt_plan_request r = {.layout = layout,
                                 .options = o,
                                 .tokens = tokens,
                                 .worker_kind = kind,
                                 .device_budget_bytes = budget};
    return kvt_engine_plan(h.engine, &r, out, text, KVT_TEXT_BYTES);
}

/* A smaller budget never keeps more, sets are nested, and nothing exceeds it. */
static void test_budget_decides_residency(void) {
    static struct kvt_plan p, before;
    char text[KVT_TEXT_BYTES];
    struct kvt_layout layout = kvth_layout(8);
    kvth_start(&h, &(struct kvth_config){.device_budget_bytes = 1u << 20});
    for (uint32_t kind = KVT_WORKER_SEGMENT; kind <= KVT_WORKER_DENSE; kind++) {
        struct kvt_cache_options o = kvth_options(KVT_MODE_DYNAMIC, 1);
        memset(&before, 0, sizeof(before));
        for (uint64_t budget = 16u << 10; budget <= 192u << 10; budget += 4096) {
            int rc = plan(&p, &layout, &o, kind, 1000, budget, text);
            if (rc != 0) {
                CU_ASSERT_EQUAL(rc, -KVT_EQUOTA);
                CU_ASSERT_EQUAL(before.device_bytes, 0);
                continue;
            }
            CU_ASSERT_TRUE(p.device_bytes <= budget);
            CU_ASSERT_TRUE(p.resident_layers >= before.resident_layers);
            uint32_t count = 0;
            for (uint32_t l = 0; l < 8; l++) {
                CU_ASSERT_FALSE(before.layers[l] == 'R' && p.layers[l] != 'R');
                count += p.layers[l] == 'R';
            }
            CU_ASSERT_EQUAL(count, p.resident_layers);
            CU_ASSERT_EQUAL(p.to_device_bytes_per_step, (8 - count) * 1000u * KVTH_TOKEN);
            CU_ASSERT_EQUAL(p.from_device_bytes_per_step, (8 - count) * (uint64_t)KVTH_TOKEN);
            CU_ASSERT_TRUE(count == 8 ? p.slots == 0 : p.slots >= 3);
            before = p;
        }
        CU_ASSERT_EQUAL(before.resident_layers, 8);
    }
    kvth_stop(&h);
}

static void test_refusal_names_budget_and_need(void) {
    static struct kvt_plan p;
    char text[KVT_TEXT_BYTES];
    struct kvt_layout layout = kvth_layout(8);
    struct kvt_cache_options o = kvth_options(KVT_MODE_STATIC, 1);
    kvth_start(&h, &(struct kvth_config){.host_budget_bytes = 64u << 10});
    CU_ASSERT_EQUAL(plan(&p, &layout, &o, KVT_WORKER_SEGMENT, 1000, 65536, text), -KVT_EQUOTA);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "device memory: 163840 bytes needed, 65536"));
    CU_ASSERT_EQUAL(p.lacks.tier, KVT_TIER_GPU);
    CU_ASSERT_EQUAL(p.lacks.need_bytes, 163840);
    CU_ASSERT_EQUAL(p.lacks.available_bytes, 65536);
    CU_ASSERT_EQUAL(p.lacks.worker_max_bytes, 0);
    o = kvth_options(KVT_MODE_OFFLOADED, 1);
    CU_ASSERT_EQUAL(plan(&p, &layout, &o, KVT_WORKER_SEGMENT, 1000, 65536, text), -KVT_EQUOTA);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "host memory: 131072 bytes needed, 65536"));
    CU_ASSERT_EQUAL(p.lacks.tier, KVT_TIER_HOST);
    CU_ASSERT_EQUAL(p.lacks.need_bytes, 131072);
    CU_ASSERT_EQUAL(p.lacks.available_bytes, 65536);
    CU_ASSERT_EQUAL(p.lacks.worker_max_bytes, 0);
    kvth_stop(&h);
}

/* The least that would do, and what helps: a shorter context where tokens are resident, smaller
 * pieces where slots are what is large. */
static void test_refusal_names_the_least(void) {
    static struct kvt_plan p;
    static struct kvt_plan fits;
    char text[KVT_TEXT_BYTES];
    struct kvt_layout layout = kvth_layout(8);
    struct kvt_cache_options o = kvth_options(KVT_MODE_DYNAMIC, 1);
    kvth_start(&h, &(struct kvth_config){.piece_bytes = 64 * KVTH_LAYER_BLOCK});
    CU_ASSERT_EQUAL(plan(&p, &layout, &o, KVT_WORKER_SEGMENT, 5, 12, text), -KVT_EQUOTA);
    CU_ASSERT_EQUAL(p.lacks.need_bytes, 8 * KVTH_LAYER_BLOCK); /* all resident */
    CU_ASSERT_TRUE(p.lacks.by_tokens);
    CU_ASSERT_EQUAL(p.lacks.piece_tokens, 0);
    CU_ASSERT_EQUAL(plan(&p, &layout, &o, KVT_WORKER_SEGMENT, 5, 8 * KVTH_LAYER_BLOCK, text), 0);
    /* 32 blocks in each of 8 layers; three slots of 64 blocks, or of one. */
    uint32_t tokens = 32 * KVTH_BLOCK;
    CU_ASSERT_EQUAL(plan(&p, &layout, &o, KVT_WORKER_SEGMENT, tokens, 4096, text), -KVT_EQUOTA);
    CU_ASSERT_EQUAL(p.lacks.need_bytes, 3 * 64 * KVTH_LAYER_BLOCK);
    CU_ASSERT_FALSE(p.lacks.by_tokens);
    CU_ASSERT_EQUAL(p.lacks.piece_tokens, KVTH_BLOCK);
    CU_ASSERT_EQUAL(p.lacks.piece_need_bytes, 3 * KVTH_LAYER_BLOCK);
    o.piece_tokens = p.lacks.piece_tokens;
    CU_ASSERT_EQUAL(
        plan(&fits, &layout, &o, KVT_WORKER_SEGMENT, tokens, p.lacks.piece_need_bytes, text), 0);
    CU_ASSERT_EQUAL(plan(&p, &layout, &o, KVT_WORKER_SEGMENT, tokens, p.lacks.piece_need_bytes - 1,
                         text),
                    -KVT_EQUOTA);
    CU_ASSERT_EQUAL(p.lacks.piece_tokens, 0);
    kvth_stop(&h);
}

/* Sizes that do not fit 64 bits are too large, not small. */
static void test_overflow(void) {
    static struct kvt_plan p;
    char text[KVT_TEXT_BYTES];
    struct kvt_layout layout = kvth_layout(2);
    layout.layers[0].kv_heads = layout.layers[1].kv_heads = 1024;
    layout.layers[0].k_head_dim = layout.layers[1].k_head_dim = 4096;
    layout.layers[0].v_head_dim = layout.layers[1].v_head_dim = 4096;
    kvth_start(&h, &(struct kvth_config){0});
    static const uint32_t modes[] = {KVT_MODE_DYNAMIC, KVT_MODE_STATIC, KVT_MODE_OFFLOADED,
                                     KVT_MODE_OFFLOADED_STATIC};
    static const uint32_t rows[] = {1024, 1023, 65536, UINT32_MAX};
    for (uint32_t m = 0; m < 4; m++) {
        for (uint32_t i = 0; i < 4; i++) {
            struct kvt_cache_options o = kvth_options(modes[m], rows[i]);
            o.tokens_max = 1u << 30;
            for (uint32_t kind = KVT_WORKER_SEGMENT; kind <= KVT_WORKER_DENSE; kind++) {
                int rc = plan(&p, &layout, &o, kind, 1u << 30, UINT64_C(1) << 60, text);
                CU_ASSERT_TRUE(rc == -KVT_EQUOTA || rc == -KVT_EINVAL);
            }
        }
    }
    kvth_stop(&h);
}

/* ---- promises ------------------------------------------------------------------------------------------------ */

/* What is planned is what happens: slots, resident layers, bytes of a step. */
static void promise(uint32_t kind, uint32_t mode, uint32_t resident, uint32_t tokens) {
    static struct kvt_plan p;
    char text[KVT_TEXT_BYTES];
    struct kvt_layout layout = kvth_layout(6);
    struct kvt_cache_options o = kvth_options(mode, 2);
    struct kvt_cache_info info;
    layout.layers[1].last_reader = 3;
    o.resident_layers_max = resident;
    kvth_start(&h, &(struct kvth_config){.device_budget_bytes = 1u << 20});
    CU_ASSERT_EQUAL_FATAL(plan(&p, &layout, &o, kind, tokens, 0, text), 0);
    uint32_t s = kvth_attach(&h, kind, 0);
    struct kvth_cache *c = kvth_create(&h, s, &layout, &o);
    kvth_step(&h, c, tokens, 1);
    kvth_step(&h, c, 1, 1); /* reads `tokens`, appends one */
    kvth_cache_info(&h, c, &info);
    CU_ASSERT_EQUAL(memcmp(p.layers, info.layers, 6), 0);
    CU_ASSERT_EQUAL(info.need_to_device_bytes, p.to_device_bytes_per_step);
    CU_ASSERT_EQUAL(info.need_from_device_bytes, p.from_device_bytes_per_step);
    CU_ASSERT_TRUE(kvth_device_used(&h) <= p.device_bytes + (128u << 10)); /* whole extents */
    kvth_leave(&h, s);
    kvth_stop(&h);
}

static void test_promises(void) {
    static const uint32_t tokens[] = {1, 255, 256, 700};
    for (uint32_t kind = KVT_WORKER_SEGMENT; kind <= KVT_WORKER_DENSE; kind++) {
        for (uint32_t i = 0; i < 4; i++) {
            promise(kind, KVT_MODE_DYNAMIC, UINT32_MAX, tokens[i]);
            promise(kind, KVT_MODE_OFFLOADED, UINT32_MAX, tokens[i]);
            promise(kind, KVT_MODE_OFFLOADED, 2, tokens[i]);
            promise(kind, KVT_MODE_OFFLOADED_STATIC, UINT32_MAX, tokens[i]);
            promise(kind, KVT_MODE_STATIC, UINT32_MAX, tokens[i]);
        }
    }
}

int main(void) {
    CU_TestInfo tests[] = {{"the order is a permutation", test_order_is_a_permutation},
                           {"the order is spread", test_order_is_spread},
                           {"the budget decides residency", test_budget_decides_residency},
                           {"a refusal names budget and need", test_refusal_names_budget_and_need},
                           {"a refusal names the least", test_refusal_names_the_least},
                           {"overflow", test_overflow},
                           {"promises", test_promises},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("plan", tests);
}
