/* Tables: fork, reorder, repeat, select, crop, reset against a model of which rows share which
 * blocks, copy-on-write, what is stored once. After every call kvt_engine_check has walked
 * everything; bytes are compared by the harness's workers. */
#include "tests/support/cunit_run.h"
#include "tests/support/engine_harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct kvth h;
static struct kvth_walk w;

static const struct kvth_config roomy = {.device_budget_bytes = 8u << 20,
                                         .host_budget_bytes = 16u << 20};

static uint64_t host_bytes(const struct kvth_cache *c) {
    struct kvt_cache_info info;
    kvth_cache_info(&h, c, &info);
    return info.host_bytes;
}

static uint64_t device_bytes(const struct kvth_cache *c) {
    struct kvt_cache_info info;
    kvth_cache_info(&h, c, &info);
    return info.device_bytes;
}

static struct kvt_counters counters(const struct kvth_cache *c) {
    struct kvt_cache_info info;
    kvth_cache_info(&h, c, &info);
    return info.counters;
}

/* ---- edits, one by one --------------------------------------------------------------------------------- */

static void test_fork_shares_all(void) {
    kvth_start(&h, &roomy);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(2);
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 2);
    struct kvth_cache *a = kvth_create(&h, s, &layout, &o);
    kvth_step(&h, a, 1000, 1);
    uint64_t before = host_bytes(a);
    struct kvth_cache *b = kvth_fork(&h, a, NULL, 0);
    static const uint32_t twice[] = {1, 1, 0};
    struct kvth_cache *c = kvth_fork(&h, b, twice, 3);
    CU_ASSERT_EQUAL(host_bytes(a), before);
    CU_ASSERT_EQUAL(kvth_blocks(&h, s), 8);
    kvth_check_tables(&h);
    kvth_step(&h, c, 10, 2);
    kvth_check_tables(&h);
    kvth_step(&h, a, 300, 1);
    kvth_check_tables(&h);
    kvth_close(&h, a);
    kvth_step(&h, b, 1, 3);
    kvth_check_tables(&h);
    kvth_close(&h, b);
    kvth_close(&h, c);
    CU_ASSERT_EQUAL(kvth_host_used(&h), 0);
    CU_ASSERT_EQUAL(kvth_device_used(&h), 0);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

static void test_forty_rows_store_the_prompt_once(void) {
    static const uint32_t modes[] = {KVT_MODE_OFFLOADED, KVT_MODE_DYNAMIC};
    for (int i = 0; i < 2; i++) {
        kvth_start(&h, &roomy);
        uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
        struct kvt_layout layout = kvth_layout(2);
        struct kvt_cache_options o = kvth_options(modes[i], 1);
        struct kvth_cache *c = kvth_create(&h, s, &layout, &o);
        kvth_step(&h, c, 1000, 1);
        uint64_t host = host_bytes(c);
        uint64_t device = device_bytes(c);
        CU_ASSERT_TRUE(modes[i] == KVT_MODE_DYNAMIC ? host == 0 && device > 0 : host > 0);
        kvth_repeat(&h, c, 40);
        CU_ASSERT_EQUAL(host_bytes(c), host);
        CU_ASSERT_EQUAL(device_bytes(c), device);
        CU_ASSERT_EQUAL(kvth_blocks(&h, s), 4);
        struct kvt_counters before = counters(c);
        kvth_step(&h, c, 1, 1);
        struct kvt_counters after = counters(c);
        kvth_check_tables(&h);
        CU_ASSERT_EQUAL(kvth_blocks(&h, s), 3 + 40); /* each has a tail of its own */
        uint64_t layers = 2;
        if (modes[i] == KVT_MODE_OFFLOADED) {
            CU_ASSERT_EQUAL(after.from_device_bytes - before.from_device_bytes,
                            layers * 40 * KVTH_TOKEN);
            /* The tail of 232 tokens is 40 blocks by now; the prompt crosses once. The worker that
             * guessed one step ahead had the tail once. */
            CU_ASSERT_EQUAL(after.to_device_bytes - before.to_device_bytes,
                            layers * (768 + 40 * 232) * KVTH_TOKEN);
        } else {
            CU_ASSERT_EQUAL(after.to_device_bytes, 0);
            CU_ASSERT_EQUAL(h.leading_moves, layers * 2 * 39); /* the last one keeps the tail */
        }
        kvth_step(&h, c, 1, 20);
        kvth_check_tables(&h);
        kvth_close(&h, c);
        kvth_leave(&h, s);
        kvth_stop(&h);
    }
}

/* A block that was once full is never written again, shared or not. */
static void test_once_full_blocks_are_copied(void) {
    static const uint32_t modes[] = {KVT_MODE_OFFLOADED, KVT_MODE_DYNAMIC};
    for (uint32_t i = 0; i < 4; i++) {
        kvth_start(&h, &roomy);
        uint32_t s = kvth_attach(&h, i < 2 ? KVT_WORKER_SEGMENT : KVT_WORKER_DENSE, 0);
        struct kvt_layout layout = kvth_layout(3);
        struct kvt_cache_options o = kvth_options(modes[i % 2], 2);
        struct kvth_cache *c = kvth_create(&h, s, &layout, &o);
        kvth_step(&h, c, 600, 1);
        kvth_crop(&h, c, 500); /* into block 1, which was full */
        kvth_check_tables(&h);
        struct kvt_counters before = counters(c);
        kvth_step(&h, c, 5, 1);
        kvth_check_tables(&h);
        struct kvt_counters after = counters(c);
        uint64_t copied = after.copied_on_write_bytes - before.copied_on_write_bytes;
        CU_ASSERT_EQUAL(copied, i % 2 == 0 ? 3 * 2 * (500 - 256) * KVTH_TOKEN : 0);
        kvth_step(&h, c, 5, 1); /* its own now */
        CU_ASSERT_EQUAL(counters(c).copied_on_write_bytes, after.copied_on_write_bytes);
        kvth_close(&h, c);
        kvth_leave(&h, s);
        kvth_stop(&h);
    }
}

static void test_tail_on_a_block_boundary_is_not_copied(void) {
    kvth_start(&h, &roomy);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(2);
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 1);
    struct kvth_cache *a = kvth_create(&h, s, &layout, &o);
    kvth_step(&h, a, 512, 1);
    struct kvth_cache *b = kvth_fork(&h, a, NULL, 0);
    kvth_step(&h, a, 3, 1);
    kvth_step(&h, b, 3, 1);
    kvth_check_tables(&h);
    CU_ASSERT_EQUAL(counters(a).copied_on_write_bytes, 0);
    CU_ASSERT_EQUAL(counters(b).copied_on_write_bytes, 0);
    CU_ASSERT_EQUAL(kvth_blocks(&h, s), 4);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

static void test_reset_crop_select_free(void) {
    kvth_start(&h, &roomy);
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(2);
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 3);
    struct kvth_cache *c = kvth_create(&h, s, &layout, &o);
    kvth_step(&h, c, 1200, 1);
    CU_ASSERT_EQUAL(kvth_blocks(&h, s), 15);
    static const uint32_t one[] = {2};
    kvth_rows(&h, c, KVT_REQUEST_SELECT, one, 1);
    CU_ASSERT_EQUAL(kvth_blocks(&h, s), 5);
    kvth_crop(&h, c, 257);
    CU_ASSERT_EQUAL(kvth_blocks(&h, s), 2);
    kvth_crop(&h, c, 5000); /* no longer than it is */
    CU_ASSERT_EQUAL(kvth_blocks(&h, s), 2);
    kvth_step(&h, c, 100, 2);
    kvth_reset(&h, c);
    CU_ASSERT_EQUAL(kvth_blocks(&h, s), 0);
    kvth_check_tables(&h);
    kvth_step(&h, c, 700, 2);
    kvth_check_tables(&h);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* Many caches and rows share one prompt; the dense worker's rows are copied on the device, each
 * distinct block crosses once. */
/* Rows whose tables take more than half of what there may be: their order can still be changed. */
static void test_full_tables_are_reordered(void) {
    enum { ROWS = 200, TOKENS = 1 << 19 };
    static uint32_t order[ROWS];
    kvth_start(&h, &roomy);
    h.unchecked = true;
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvt_layout layout = kvth_layout(1);
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 1);
    o.append_max = TOKENS;
    o.piece_tokens = 8192;
    struct kvth_cache *a = kvth_create(&h, s, &layout, &o);
    kvth_step(&h, a, TOKENS, 1);
    kvth_repeat(&h, a, ROWS);
    for (uint32_t i = 0; i < ROWS; i++) {
        order[i] = ROWS - 1 - i;
    }
    kvth_rows(&h, a, KVT_REQUEST_REORDER, order, ROWS);
    order[0] = order[1]; /* one row is dropped, one copied */
    kvth_rows(&h, a, KVT_REQUEST_REORDER, order, ROWS);
    kvth_rows(&h, a, KVT_REQUEST_SELECT, order, ROWS - 1);
    kvth_check_tables(&h);
    struct kvt_request r = {.kind = KVT_REQUEST_REPEAT, .session = s, .cache = a->id, .times = 2};
    CU_ASSERT_EQUAL(kvth_ask(&h, &r)->code, KVT_EBUSY); /* that is too much */
    kvth_leave(&h, s);
    kvth_stop(&h);
}

static void test_dense_rows_cross_once(void) {
    kvth_start(&h, &roomy);
    uint32_t s = kvth_attach(&h, KVT_WORKER_DENSE, 0);
    struct kvt_layout layout = kvth_layout(4);
    struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 1);
    struct kvth_cache *c = kvth_create(&h, s, &layout, &o);
    kvth_step(&h, c, 1000, 1);
    kvth_repeat(&h, c, 8);
    kvth_step(&h, c, 1, 1);
    struct kvt_counters before = counters(c);
    kvth_step(&h, c, 1, 1);
    struct kvt_counters after = counters(c);
    CU_ASSERT_EQUAL(after.to_device_bytes - before.to_device_bytes,
                    4u * (768 + 8 * 233) * KVTH_TOKEN);
    CU_ASSERT_EQUAL(after.from_device_bytes - before.from_device_bytes, 4u * 8 * KVTH_TOKEN);
    kvth_check_tables(&h);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* ---- at random ---------------------------------------------------------------------------------------------- */

static uint64_t random_state;

static uint32_t below(uint32_t limit) {
    random_state = random_state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)(((random_state >> 33) * limit) >> 31);
}

static struct kvth_cache *any_cache(uint32_t session) {
    struct kvth_cache *found = NULL;
    uint32_t seen = 0;
    for (uint32_t i = 0; i < KVTH_CACHES; i++) {
        struct kvth_cache *c = &h.cache[i];
        if (c->id != 0 && c->session == session && below(++seen) == 0) {
            found = c;
        }
    }
    return found;
}

static uint32_t cache_count(void) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < KVTH_CACHES; i++) {
        count += h.cache[i].id != 0;
    }
    return count;
}

static uint32_t longest(const struct kvth_cache *c) {
    uint32_t most = 0;
    for (uint32_t i = 0; i < c->row_count; i++) {
        most = c->rows[i].count > most ? c->rows[i].count : most;
    }
    return most;
}

static void random_step(struct kvth_cache *c, bool dense, uint32_t limit) {
    uint32_t rows[KVT_ROWS_MAX];
    uint32_t tokens[KVT_ROWS_MAX];
    uint32_t count = 0;
    uint32_t steps = 1 + below(4);
    for (uint32_t i = 0; i < c->row_count; i++) {
        uint32_t room = (limit - c->rows[i].count) / steps;
        uint32_t n = below(8) == 0 ? below(300) : below(4);
        if (dense || below(4) != 0) {
            rows[count] = i;
            tokens[count++] = n < room ? n : room;
        }
    }
    if (count == 0) {
        return;
    }
    uint64_t tag = kvth_step_send(&h, c, rows, tokens, count, 0, steps);
    kvth_walk_begin(&h, &w, c, rows, tokens, count, 0, tag);
    if (below(10) == 0) {
        for (uint32_t good = below(w.steps); good > 0; good--) {
            (void)kvth_walk_pieces(&h, &w, UINT32_MAX);
            kvth_walk_post(&h, &w);
        }
        (void)kvth_walk_pieces(&h, &w, below(6));
        kvth_walk_abort(&h, &w);
    } else {
        kvth_walk_all(&h, &w);
    }
}

/* `rows_most`: a dense worker's static cache has memory for the rows that it was created with. */
static void random_edit(struct kvth_cache *c, uint32_t rows_most) {
    uint32_t map[KVT_ROWS_MAX];
    uint32_t kept = 1 + below(c->row_count);
    for (uint32_t i = 0; i < c->row_count; i++) {
        map[i] = below(c->row_count);
    }
    switch (below(7)) {
    case 0:
        if (cache_count() < 5) {
            (void)kvth_fork(&h, c, below(2) ? NULL : map, kept);
        }
        break;
    case 1:
        kvth_rows(&h, c, KVT_REQUEST_REORDER, map, c->row_count);
        break;
    case 2:
        if (2 * c->row_count <= rows_most) {
            kvth_repeat(&h, c, 2);
        }
        break;
    case 3:
        kvth_rows(&h, c, KVT_REQUEST_SELECT, map, kept);
        break;
    case 4:
        for (uint32_t i = 0; i < c->row_count; i++) { /* mostly a little */
            uint32_t back = below(below(3) == 0 ? longest(c) + 2 : 12);
            map[i] = c->rows[i].count > back ? c->rows[i].count - back : below(3);
        }
        if (below(2) == 0) {
            kvth_crop_rows(&h, c, map);
        } else {
            kvth_crop(&h, c, map[0]);
        }
        break;
    case 5:
        if (below(4) == 0) {
            kvth_reset(&h, c);
        }
        break;
    default:
        if (cache_count() > 2) {
            kvth_close(&h, c);
        }
    }
}

static void random_run(uint64_t seed, uint32_t kind, uint32_t mode, uint32_t resident) {
    bool fixed =
        kind == KVT_WORKER_DENSE && (mode == KVT_MODE_STATIC || mode == KVT_MODE_OFFLOADED_STATIC);
    random_state = seed;
    kvth_start(&h, &roomy);
    uint32_t s = kvth_attach(&h, kind, 0);
    struct kvt_layout layout = kvth_layout(3);
    layout.layers[0].last_reader = seed % 3 == 0 ? 2 : 0; /* read again, two layers later */
    layout.layers[1].v_head_dim = seed % 4 == 0 ? 0 : 4;
    struct kvt_cache_options o = kvth_options(mode, 1 + below(4));
    o.resident_layers_max = resident;
    (void)kvth_create(&h, s, &layout, &o);
    for (uint32_t i = 0; i < 60; i++) {
        struct kvth_cache *c = any_cache(s);
        if (below(2) == 0) {
            random_step(c, kind == KVT_WORKER_DENSE, 1024);
        } else {
            random_edit(c, fixed ? c->row_count : 8);
        }
        kvth_check_tables(&h);
    }
    while (cache_count() > 0) {
        kvth_close(&h, any_cache(s));
    }
    CU_ASSERT_EQUAL(kvth_host_used(&h), 0);
    CU_ASSERT_EQUAL(kvth_device_used(&h), 0);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

static void test_at_random(void) {
    static const struct {
        uint32_t mode;
        uint32_t resident;
    } modes[] = {{KVT_MODE_OFFLOADED, UINT32_MAX},
                 {KVT_MODE_OFFLOADED, 1},
                 {KVT_MODE_DYNAMIC, UINT32_MAX},
                 {KVT_MODE_DYNAMIC, 2},
                 {KVT_MODE_OFFLOADED_STATIC, UINT32_MAX},
                 {KVT_MODE_OFFLOADED_STATIC, 1},
                 {KVT_MODE_STATIC, UINT32_MAX}};
    const char *only = getenv("SEED");
    uint64_t first = only != NULL ? strtoull(only, NULL, 10) : 1;
    uint64_t last = only != NULL      ? first
                    : getenv("SEEDS") ? strtoull(getenv("SEEDS"), NULL, 10)
                                      : 8;
    for (uint64_t seed = first; seed <= last; seed++) {
        for (uint32_t m = 0; m < sizeof(modes) / sizeof(modes[0]); m++) {
            (void)snprintf(kvth_what, sizeof(kvth_what), "SEED=%llu mode %u resident %u",
                           (unsigned long long)seed, modes[m].mode, modes[m].resident);
            random_run(seed, KVT_WORKER_SEGMENT, modes[m].mode, modes[m].resident);
            random_run(seed, KVT_WORKER_DENSE, modes[m].mode, modes[m].resident);
        }
    }
}

int main(void) {
    CU_TestInfo tests[] = {
        {"a fork shares all", test_fork_shares_all},
        {"forty rows store the prompt once", test_forty_rows_store_the_prompt_once},
        {"once full blocks are copied", test_once_full_blocks_are_copied},
        {"a tail on a block boundary is not copied", test_tail_on_a_block_boundary_is_not_copied},
        {"reset, crop and select free", test_reset_crop_select_free},
        {"full tables are reordered", test_full_tables_are_reordered},
        {"dense rows cross once", test_dense_rows_cross_once},
        {"at random", test_at_random},
        CU_TEST_INFO_NULL};
    return kvt_cunit_run("engine tables", tests);
}
