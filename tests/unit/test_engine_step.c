/* The life of schedules: order of requests, k steps ahead, abort at every point, what a failed copy
 * or a lie does, slots of static caches, hostile arguments, counters. */
#include "tests/support/cunit_run.h"
#include "tests/support/engine_harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct kvth h;
static struct kvth_walk w;

enum { LAYERS = 4 };

static struct kvt_cache_info info_of(const struct kvth_cache *c) {
    struct kvt_cache_info info;
    kvth_cache_info(&h, c, &info);
    return info;
}

static struct kvth_cache *create(uint32_t session, uint32_t mode, uint32_t rows) {
    struct kvt_layout layout = kvth_layout(LAYERS);
    struct kvt_cache_options o = kvth_options(mode, rows);
    return kvth_create(&h, session, &layout, &o);
}

static void open_walk(struct kvth_walk *walk, struct kvth_cache *c, uint32_t tokens,
                      uint32_t steps) {
    uint64_t tag = kvth_step_send(&h, c, NULL, NULL, 0, tokens, steps);
    kvth_walk_begin(&h, walk, c, NULL, NULL, 0, tokens, tag);
}

/* ---- order ---------------------------------------------------------------------------------------------- */

/* What is asked while a schedule is open waits for it, in order; another cache does not. */
static void test_requests_wait_their_turn(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, KVT_MODE_OFFLOADED, 2);
    struct kvth_cache *other = create(s, KVT_MODE_OFFLOADED, 1);
    kvth_step(&h, a, 300, 1);
    kvth_step(&h, other, 10, 1);
    open_walk(&w, a, 1, 3);
    struct kvt_request fork = {.kind = KVT_REQUEST_FORK, .session = s, .cache = a->id};
    struct kvt_request close = {.kind = KVT_REQUEST_CLOSE, .session = s, .cache = a->id};
    struct kvt_request step = {
        .kind = KVT_REQUEST_STEP, .session = s, .cache = a->id, .tokens = 1, .steps = 1};
    uint64_t forked = kvth_send(&h, &fork);
    struct kvth_cache *twin = kvth_fork(&h, other, NULL, 0); /* at once */
    CU_ASSERT_PTR_NOT_NULL(twin);
    uint64_t stepped = kvth_send(&h, &step);
    uint64_t closed = kvth_send(&h, &close);
    uint64_t late = kvth_send(&h, &fork);
    for (uint32_t i = 0; i < 3; i++) {
        CU_ASSERT_PTR_NULL(kvth_answer(&h, forked));
        (void)kvth_walk_pieces(&h, &w, UINT32_MAX);
        kvth_walk_post(&h, &w);
    }
    const struct kvth_answer *answer = kvth_answer(&h, forked);
    CU_ASSERT_PTR_NOT_NULL_FATAL(answer);
    CU_ASSERT_EQUAL(answer->code, 0);
    CU_ASSERT_EQUAL(answer->lengths[0], 303); /* all of it is in the fork */
    CU_ASSERT_PTR_NULL(kvth_answer(&h, closed));
    CU_ASSERT_PTR_NULL(kvth_answer(&h, late));
    kvth_walk_begin(&h, &w, a, NULL, NULL, 0, 1, stepped);
    kvth_walk_all(&h, &w);
    answer = kvth_answer(&h, closed);
    CU_ASSERT_PTR_NOT_NULL_FATAL(answer);
    CU_ASSERT_EQUAL(answer->code, 0);
    answer = kvth_answer(&h, late); /* behind the close */
    CU_ASSERT_PTR_NOT_NULL_FATAL(answer);
    CU_ASSERT_EQUAL(answer->code, KVT_ENOENT);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* ABORT goes past what waits. */
static void test_abort_overtakes(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, KVT_MODE_OFFLOADED, 2);
    kvth_step(&h, a, 300, 1);
    open_walk(&w, a, 4, 8);
    struct kvt_request fork = {.kind = KVT_REQUEST_FORK, .session = s, .cache = a->id};
    uint64_t forked = kvth_send(&h, &fork);
    (void)kvth_walk_pieces(&h, &w, UINT32_MAX);
    kvth_walk_post(&h, &w);
    (void)kvth_walk_pieces(&h, &w, 2);
    CU_ASSERT_PTR_NULL(kvth_answer(&h, forked));
    kvth_walk_abort(&h, &w);
    CU_ASSERT_PTR_NOT_NULL_FATAL(kvth_answer(&h, forked));
    CU_ASSERT_EQUAL(kvth_answer(&h, forked)->lengths[1], 304); /* one step was committed */
    CU_ASSERT_EQUAL(h.session[s].page->failed.value, w.first_step + 1);
    CU_ASSERT_EQUAL(h.session[s].page->failed.aux, KVT_EABORTED);
    kvth_step(&h, a, 4, 8);
    CU_ASSERT_EQUAL(h.session[s].page->failed.value, 0);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* Abort behind every piece of every step: nothing that was not committed is ever seen. */
static void abort_everywhere(uint32_t kind, uint32_t mode, uint32_t residents) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, kind, 0);
    struct kvt_layout layout = kvth_layout(LAYERS);
    struct kvt_cache_options o = kvth_options(mode, 2);
    o.resident_layers_max = residents;
    struct kvth_cache *a = kvth_create(&h, s, &layout, &o);
    kvth_step(&h, a, 250, 1);
    for (uint32_t good = 0; good < 3; good++) {
        uint32_t pieces = 1;
        for (uint32_t n = 0; n <= pieces; n++) {
            struct kvth_cache *b = n % 2 == 0 ? kvth_fork(&h, a, NULL, 0) : NULL; /* shared tails */
            open_walk(&w, a, 3, 3);
            for (uint32_t i = 0; i < good; i++) {
                (void)kvth_walk_pieces(&h, &w, UINT32_MAX);
                kvth_walk_post(&h, &w);
            }
            pieces = h.pieces;
            (void)kvth_walk_pieces(&h, &w, n);
            kvth_walk_abort(&h, &w);
            kvth_step(&h, a, 1, 1);
            kvth_check_tables(&h);
            if (b != NULL) {
                kvth_step(&h, b, 1, 1);
                kvth_close(&h, b);
            }
        }
    }
    kvth_leave(&h, s);
    kvth_stop(&h);
}

static void test_abort_everywhere(void) {
    for (uint32_t kind = KVT_WORKER_SEGMENT; kind <= KVT_WORKER_DENSE; kind++) {
        abort_everywhere(kind, KVT_MODE_OFFLOADED, UINT32_MAX);
        abort_everywhere(kind, KVT_MODE_OFFLOADED, 2);
        abort_everywhere(kind, KVT_MODE_DYNAMIC, UINT32_MAX);
        abort_everywhere(kind, KVT_MODE_STATIC, UINT32_MAX);
        abort_everywhere(kind, KVT_MODE_OFFLOADED_STATIC, UINT32_MAX);
    }
}

static void test_abort_of_nothing(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, KVT_MODE_OFFLOADED, 1);
    struct kvt_request abort = {.kind = KVT_REQUEST_ABORT, .session = s, .first_step = 0};
    CU_ASSERT_EQUAL(kvth_ask(&h, &abort)->code, 0);
    abort.first_step = UINT64_MAX;
    CU_ASSERT_EQUAL(kvth_ask(&h, &abort)->code, 0);
    open_walk(&w, a, 5, 2);
    CU_ASSERT_EQUAL(kvth_ask(&h, &abort)->code, 0); /* no step of it */
    kvth_walk_all(&h, &w);
    open_walk(&w, a, 5, 2);
    abort.first_step = 0;
    uint64_t first = kvth_send(&h, &abort);
    CU_ASSERT_PTR_NULL(kvth_answer(&h, first));
    CU_ASSERT_EQUAL(kvth_ask(&h, &abort)->code, KVT_ESTATE);
    h.session[s].page->step.value = w.first_step + 1;
    kvth_pump(&h);
    CU_ASSERT_PTR_NOT_NULL_FATAL(kvth_answer(&h, first));
    CU_ASSERT_EQUAL(kvth_answer(&h, first)->lengths[0], 10);
    kvth_step(&h, a, 5, 2);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* ---- failures and lies -------------------------------------------------------------------------------------- */

/* Copies fail, one after the other: the step fails, and the next one has the right bytes. */
static void test_copies_fail(void) {
    for (uint32_t kind = KVT_WORKER_SEGMENT; kind <= KVT_WORKER_DENSE; kind++) {
        kvth_start(&h, &(struct kvth_config){0});
        uint32_t s = kvth_attach(&h, kind, 0);
        struct kvth_cache *a = create(s, KVT_MODE_OFFLOADED, 2);
        kvth_step(&h, a, 300, 1);
        struct kvth_cache *b = kvth_fork(&h, a, NULL, 0);
        kvth_crop(&h, a, 290); /* the guess is read, not used */
        uint32_t failed = 0;
        for (uint32_t n = 1; n < 12; n++) {
            struct kvth_cache *c = n % 2 ? a : b;
            h.hold_copies = true;
            uint64_t tag = kvth_step_send(&h, c, NULL, NULL, 0, 2, 1);
            bool any = h.held_count > 0;
            kvth_release(&h, false);
            const struct kvth_answer *answer = kvth_answer(&h, tag);
            CU_ASSERT_PTR_NOT_NULL_FATAL(answer);
            CU_ASSERT_EQUAL_FATAL(answer->code, 0);
            CU_ASSERT_EQUAL_FATAL(h.session[s].page->failed.value, any ? answer->first_step : 0);
            if (any) { /* the worker has seen `failed`, and stops */
                h.session[s].page->step.value = answer->first_step;
                kvth_pump(&h);
                failed++;
            } else {
                kvth_walk_begin(&h, &w, c, NULL, NULL, 0, 2, tag);
                kvth_walk_all(&h, &w);
            }
            kvth_step(&h, c, 0, 1); /* reads everything */
            kvth_step(&h, n % 2 ? b : a, 1, 1);
            kvth_step(&h, c, 1, 1); /* so that the guess is not of the next one */
        }
        CU_ASSERT_TRUE(failed > 3);
        CU_ASSERT_TRUE(info_of(a).counters.steps_failed > 0);
        kvth_leave(&h, s);
        kvth_stop(&h);
    }
}

/* Two rows of different lengths share a tail; the shorter one's tokens are appended in place, the
 * other one's copy fails: the longer row has its tokens still, on the device too. */
static void test_in_place_beside_a_copy_that_fails(void) {
    for (uint32_t abort = 0; abort < 2; abort++) {
        kvth_start(&h, &(struct kvth_config){0});
        uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
        struct kvt_layout layout = kvth_layout(LAYERS);
        struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED, 1);
        o.resident_layers_max = 2; /* layer 0 is resident */
        struct kvth_cache *c = kvth_create(&h, s, &layout, &o);
        kvth_step(&h, c, 300, 1);
        kvth_repeat(&h, c, 2);
        uint32_t lengths[] = {300, 290};
        struct kvt_request crop = {
            .kind = KVT_REQUEST_CROP, .session = s, .cache = c->id, .values = lengths, .count = 2};
        CU_ASSERT_EQUAL_FATAL(kvth_ask(&h, &crop)->code, 0);
        c->rows[1].count = 290;
        h.hold_copies = true;
        open_walk(&w, c, 20, 1);
        CU_ASSERT_EQUAL(info_of(c).layers[0], 'R');
        (void)kvth_walk_pieces(&h, &w, 1); /* layer 0: both rows append */
        if (abort) {
            struct kvt_request r = {
                .kind = KVT_REQUEST_ABORT, .session = s, .first_step = w.first_step};
            CU_ASSERT_PTR_NULL(kvth_answer(&h, kvth_send(&h, &r)));
        }
        kvth_release(&h, false);
        h.session[s].page->step.value = w.first_step;
        kvth_pump(&h);
        CU_ASSERT_NOT_EQUAL(h.session[s].page->failed.value, 0);
        kvth_step(&h, c, 0, 1); /* reads everything */
        kvth_step(&h, c, 20, 1);
        kvth_leave(&h, s);
        kvth_stop(&h);
    }
}

/* A worker that posts what it likes harms itself: the other one's bytes stay right. */
static void test_lies(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t liar = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    uint32_t honest = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(liar, KVT_MODE_OFFLOADED, 2);
    struct kvth_cache *b = create(honest, KVT_MODE_OFFLOADED, 2);
    static const uint64_t lies[] = {0, 1, 5, UINT64_MAX, UINT64_C(1) << 62, UINT64_C(1) << 63};
    kvth_step(&h, b, 500, 1);
    for (uint32_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        struct kvt_control_page *page = h.session[liar].page;
        uint64_t tag = kvth_step_send(&h, a, NULL, NULL, 0, 200, 4);
        if (kvth_answer(&h, tag) == NULL) {
            break; /* its own schedule does not end: it stays with it */
        }
        for (uint32_t slot = 0; slot < KVT_SLOTS_MAX; slot++) {
            page->done[slot].value = lies[i];
            page->ready[slot].value = lies[i];
        }
        page->step.value = lies[i];
        page->committed.value = page->failed.value = lies[i];
        kvth_pump(&h);
        kvth_step(&h, b, 3, 2);
    }
    kvth_tick(&h, 60000);
    kvth_step(&h, b, 3, 2);
    kvth_leave(&h, liar);
    kvth_step(&h, b, 3, 2);
    kvth_leave(&h, honest);
    kvth_stop(&h);
}

/* ---- static caches ---------------------------------------------------------------------------------------------- */

static void piece_addresses(uint64_t *out) {
    const struct kvt_sched_piece *p =
        (const void *)((const uint8_t *)w.head + w.head->pieces_offset);
    for (uint32_t l = 0; l < LAYERS; l++) {
        out[2 * l] = (uint64_t)p[l].extent << 32 | p[l].slot;
        out[2 * l + 1] = p[l].k_offset;
    }
}

/* Addresses of a static cache are those of CREATE, whatever happens to rows. */
static void test_static_keeps_addresses(void) {
    static const uint32_t modes[] = {KVT_MODE_STATIC, KVT_MODE_OFFLOADED_STATIC};
    static const uint32_t turned[] = {2, 0, 1};
    for (uint32_t m = 0; m < 2; m++) {
        uint64_t first[2 * LAYERS], now[2 * LAYERS];
        kvth_start(&h, &(struct kvth_config){0});
        uint32_t s = kvth_attach(&h, KVT_WORKER_DENSE, 0);
        struct kvth_cache *a = create(s, modes[m], 3);
        open_walk(&w, a, 20, 1);
        piece_addresses(first);
        kvth_walk_all(&h, &w);
        for (uint32_t i = 0; i < 12; i++) {
            if (i % 3 == 1) {
                kvth_rows(&h, a, KVT_REQUEST_REORDER, turned, 3);
            } else if (i % 3 == 2) {
                kvth_crop(&h, a, 300 + i);
            }
            open_walk(&w, a, i == 4 ? 600 : 2, 1);
            piece_addresses(now);
            CU_ASSERT_EQUAL(memcmp(first, now, sizeof(now)), 0);
            kvth_walk_all(&h, &w);
            if (i == 7) { /* moves stand when the step is aborted */
                kvth_rows(&h, a, KVT_REQUEST_REORDER, turned, 3);
                open_walk(&w, a, 2, 1);
                kvth_walk_abort(&h, &w);
            }
        }
        kvth_leave(&h, s);
        kvth_stop(&h);
    }
}

/* A streamed layer of a static cache has the slot of its index, in every step. */
static void test_offloaded_static_restarts_slots(void) {
    for (uint32_t layers = 1; layers <= 9; layers++) {
        kvth_start(&h, &(struct kvth_config){0});
        uint32_t s = kvth_attach(&h, KVT_WORKER_DENSE, 0);
        struct kvt_layout layout = kvth_layout(layers);
        struct kvt_cache_options o = kvth_options(KVT_MODE_OFFLOADED_STATIC, 1);
        o.tokens_max = 512;
        struct kvth_cache *a = kvth_create(&h, s, &layout, &o);
        for (uint32_t i = 0; i < 6; i++) {
            open_walk(&w, a, 5, 1 + i % 3);
            const struct kvt_sched_piece *p =
                (const void *)((const uint8_t *)w.head + w.head->pieces_offset);
            uint32_t slots = 0;
            for (uint32_t n = 0; n < w.head->pieces_count; n++) {
                slots = p[n].slot + 1 > slots ? p[n].slot + 1 : slots;
            }
            for (uint32_t n = 0; n < w.head->pieces_count; n++) {
                CU_ASSERT_EQUAL(p[n].slot, p[n].layer % slots);
            }
            CU_ASSERT_TRUE(layers <= slots || layers % slots != 1);
            kvth_walk_all(&h, &w);
        }
        kvth_leave(&h, s);
        kvth_stop(&h);
    }
}

/* ---- k steps ahead, ACQUIRE ---------------------------------------------------------------------------------------- */

static void test_steps_ahead_stop_at_capacity(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, KVT_MODE_OFFLOADED_STATIC, 2); /* 1024 tokens */
    kvth_step(&h, a, 1000, 1);
    open_walk(&w, a, 5, 64);
    CU_ASSERT_EQUAL(w.steps, 4);
    kvth_walk_all(&h, &w);
    const struct kvth_answer *answer = kvth_answer(&h, kvth_step_send(&h, a, NULL, NULL, 0, 5, 64));
    CU_ASSERT_PTR_NOT_NULL_FATAL(answer);
    CU_ASSERT_EQUAL(answer->code, KVT_EQUOTA);
    CU_ASSERT_PTR_NOT_NULL(strstr(answer->text, "1020 tokens and appends 5; its capacity is 1024"));
    kvth_step(&h, a, 4, 1);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

static void test_acquire(void) {
    kvth_start(&h, &(struct kvth_config){0});
    uint32_t s = kvth_attach(&h, KVT_WORKER_SEGMENT, 0);
    struct kvth_cache *a = create(s, KVT_MODE_OFFLOADED, 1);
    kvth_step(&h, a, 300, 1);
    struct kvt_request r = {
        .kind = KVT_REQUEST_ACQUIRE, .session = s, .cache = a->id, .layer = 0, .tokens = 2};
    uint64_t first = kvth_send(&h, &r);
    kvth_walk_begin(&h, &w, a, NULL, NULL, 0, 2, first);
    for (uint32_t l = 1; l < LAYERS; l++) {
        r.layer = l;
        const struct kvth_answer *again = kvth_ask(&h, &r); /* of the same step */
        CU_ASSERT_EQUAL(again->code, 0);
        CU_ASSERT_EQUAL(again->first_step, w.first_step);
    }
    kvth_walk_all(&h, &w);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

/* ---- counters --------------------------------------------------------------------------------------------------------- */

/* Towards the device: what is not resident, each distinct block once; away: what was appended. */
static void bytes_are_the_minimum(uint32_t kind, uint32_t mode, uint32_t residents) {
    kvth_start(&h, &(struct kvth_config){.device_budget_bytes = 4u << 20});
    uint32_t s = kvth_attach(&h, kind, 0);
    struct kvt_layout layout = kvth_layout(LAYERS);
    struct kvt_cache_options o = kvth_options(mode, 2);
    o.resident_layers_max = residents;
    struct kvth_cache *a = kvth_create(&h, s, &layout, &o);
    kvth_step(&h, a, 700, 1);
    uint64_t streamed = 0;
    for (uint32_t l = 0; l < LAYERS; l++) {
        streamed += info_of(a).layers[l] != 'R';
    }
    uint64_t discarded = 0;
    uint64_t to = 0, from = streamed * 2 * 700 * KVTH_TOKEN;
    for (uint32_t i = 0; i < 40; i++) {
        uint32_t steps = 1 + i % 4;
        open_walk(&w, a, 1, steps);
        for (uint32_t n = 0; n < w.steps; n++) {
            to += streamed * 2 * (a->rows[0].count + n) * KVTH_TOKEN;
            from += streamed * 2 * KVTH_TOKEN;
        }
        kvth_walk_all(&h, &w);
        struct kvt_cache_info info = info_of(a);
        CU_ASSERT_EQUAL_FATAL(info.counters.to_device_bytes, to);
        CU_ASSERT_EQUAL_FATAL(info.counters.from_device_bytes, from);
        CU_ASSERT_EQUAL(info.need_to_device_bytes,
                        streamed * 2 * (a->rows[0].count - 1) * KVTH_TOKEN);
        CU_ASSERT_EQUAL(info.need_from_device_bytes, streamed * 2 * KVTH_TOKEN);
        /* Planes of dense rows that grow move, and what was prefetched for the old ones is lost. */
        discarded = info.counters.prefetch_discarded_bytes;
        CU_ASSERT_TRUE(discarded == 0 || kind == KVT_WORKER_DENSE);
    }
    /* What the driver really copied: no more than that and the guess that is not used yet. */
    CU_ASSERT_EQUAL(h.copied_from_bytes, from);
    CU_ASSERT_TRUE(h.copied_to_bytes >= to);
    CU_ASSERT_TRUE(h.copied_to_bytes <=
                   to + discarded + streamed * 2 * a->rows[0].count * KVTH_TOKEN);
    kvth_leave(&h, s);
    kvth_stop(&h);
}

static void test_bytes_are_the_minimum(void) {
    for (uint32_t kind = KVT_WORKER_SEGMENT; kind <= KVT_WORKER_DENSE; kind++) {
        bytes_are_the_minimum(kind, KVT_MODE_DYNAMIC, UINT32_MAX);
        bytes_are_the_minimum(kind, KVT_MODE_DYNAMIC, 1);
        bytes_are_the_minimum(kind, KVT_MODE_OFFLOADED, UINT32_MAX);
        bytes_are_the_minimum(kind, KVT_MODE_OFFLOADED, 3);
        bytes_are_the_minimum(kind, KVT_MODE_OFFLOADED_STATIC, UINT32_MAX);
        bytes_are_the_minimum(kind, KVT_MODE_STATIC, UINT32_MAX);
    }
}

int main(void) {
    CU_TestInfo tests[] = {
        {"requests wait their turn", test_requests_wait_their_turn},
        {"ABORT overtakes", test_abort_overtakes},
        {"abort everywhere", test_abort_everywhere},
        {"abort of nothing", test_abort_of_nothing},
        {"copies fail", test_copies_fail},
        {"in place beside a copy that fails", test_in_place_beside_a_copy_that_fails},
        {"lies", test_lies},
        {"a static cache keeps its addresses", test_static_keeps_addresses},
        {"offloaded-static restarts its slots", test_offloaded_static_restarts_slots},
        {"steps ahead stop at the capacity", test_steps_ahead_stop_at_capacity},
        {"ACQUIRE", test_acquire},
        {"bytes are the minimum", test_bytes_are_the_minimum},
        CU_TEST_INFO_NULL};
    return kvt_cunit_run("engine step", tests);
}
