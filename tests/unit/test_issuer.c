/* The issuer against its contract: gates, order, cuts, posts, fairness. */
#include "tests/unit/issuer_fixture.h"

static void test_fill_posts_when_copied(void) {
    start(false, 8, 1000);
    begin(1);
    add_fill(5, 3, 40, 9);
    submit();
    uint32_t tag = expect_copy(5);
    CU_ASSERT_EQUAL(issue.session, 1);
    CU_ASSERT_EQUAL(issue.stream, 0);
    CU_ASSERT_EQUAL(issue.copy.bytes, 40);
    expect_nothing();
    expect_no_completion();
    kvt_issuer_copied(issuer, tag, true);
    expect_no_completion();
    expect_post(1, 3, 9);
    expect_completion(5, KVT_DONE, 40);
    expect_nothing();
    stop();
}

static void test_fill_posts_behind(void) {
    start(true, 8, 1000);
    begin(1);
    add_fill(5, 3, 150, 9);
    submit();
    uint32_t first = expect_copy(5);
    uint32_t second = expect_copy(5);
    uint32_t post = expect_post(1, 3, 9);
    CU_ASSERT(post != first && post != second);
    kvt_issuer_copied(issuer, second, true);
    expect_no_completion();
    kvt_issuer_copied(issuer, first, true);
    expect_no_completion(); /* the post may still be on its way */
    kvt_issuer_copied(issuer, post, true);
    expect_completion(5, KVT_DONE, 150);
    stop();
}

static void test_empty_fill_only_posts(void) {
    for (int behind = 0; behind < 2; behind++) {
        start(behind != 0, 1, 1000);
        begin(0);
        add_fill(1, 0, 0, 4);
        submit();
        uint32_t tag = expect_post(0, 0, 4);
        if (behind) {
            expect_no_completion();
            kvt_issuer_copied(issuer, tag, true);
        }
        expect_completion(1, KVT_DONE, 0);
        stop();
    }
}

/* Posts have room of their own: copies do not hold them back, nor they copies. */
static void test_posts_inflight(void) {
    start(true, 1, 1000);
    begin(0);
    for (uint16_t n = 0; n < 3; n++) {
        add_fill(n + 1u, n, 0, 4);
    }
    add_fill(4, 3, 10, 4);
    submit();
    uint32_t first = expect_post(0, 0, 4);
    uint32_t copy = expect_copy(4);
    expect_nothing();
    kvt_issuer_copied(issuer, first, true);
    expect_completion(1, KVT_DONE, 0);
    uint32_t second = expect_post(0, 1, 4);
    expect_nothing();
    kvt_issuer_copied(issuer, copy, true);
    kvt_issuer_copied(issuer, second, true);
    kvt_issuer_copied(issuer, expect_post(0, 2, 4), true);
    kvt_issuer_copied(issuer, expect_post(0, 3, 4), true);
    expect_completion(2, KVT_DONE, 0);
    expect_completion(3, KVT_DONE, 0);
    expect_completion(4, KVT_DONE, 10);
    expect_nothing();
    stop();
}

static void test_fill_waits_for_done_exactly(void) {
    start(false, 8, 1000);
    begin(0);
    add_fill(1, 2, 10, 8)->done_wait = 7;
    submit();
    expect_nothing();
    CU_ASSERT_TRUE(kvt_issuer_waits_for_worker(issuer));
    pages[0].done[2].value = 8; /* a lie */
    expect_nothing();
    pages[0].done[3].value = 7; /* another slot */
    expect_nothing();
    pages[0].done[2].value = 7;
    CU_ASSERT_FALSE(kvt_issuer_waits_for_worker(issuer));
    expect_copy(1);
    stop();
}

static void test_writeback_waits_for_its_generation(void) {
    start(false, 8, 1000);
    begin(0);
    add(KVT_OP_WRITEBACK, 1, 2, 10)->generation = 7;
    building->copies[0].source.tier = KVT_TIER_GPU;
    building->copies[0].target.tier = KVT_TIER_HOST;
    submit();
    pages[0].done[2].value = 6;
    expect_nothing();
    pages[0].done[2].value = 7;
    uint32_t tag = expect_copy(1);
    CU_ASSERT_EQUAL(issue.stream, 1);
    expect_nothing();
    kvt_issuer_copied(issuer, tag, true);
    expect_completion(1, KVT_DONE, 10);
    expect_nothing();
    stop();
}

static void test_step_is_cyclic(void) {
    start(false, 1, 1000);
    pages[0].step.value = UINT64_MAX - 1;
    begin(0);
    add(KVT_OP_STEP, 1, 0, 0)->step_wait = UINT64_MAX;
    add(KVT_OP_STEP, 2, 0, 0)->step_wait = 1;
    submit();
    expect_nothing();
    expect_no_completion();
    pages[0].step.value = UINT64_MAX;
    expect_nothing();
    expect_completion(1, KVT_DONE, 0);
    expect_no_completion();
    pages[0].step.value = 2; /* further than asked for */
    expect_nothing();
    expect_completion(2, KVT_DONE, 0);
    stop();
}

/* STEP completes although no more copies may be submitted. */
static void test_step_in_spite_of_full_flight(void) {
    start(false, 1, 1000);
    begin(0);
    add(KVT_OP_COPY, 1, 0, 250);
    add(KVT_OP_STEP, 2, 0, 0)->step_wait = 1;
    submit();
    expect_copy(1);
    pages[0].step.value = 1;
    expect_nothing();
    expect_completion(2, KVT_DONE, 0);
    stop();
}

static void test_dependencies(void) {
    start(false, 8, 1000);
    begin(0);
    add(KVT_OP_WRITEBACK, 1, 0, 10)->generation = 1;
    struct kvt_op *fill = add_fill(2, 1, 10, 5);
    dep(fill, 1);
    submit();
    expect_nothing();
    pages[0].done[0].value = 1;
    uint32_t tag = expect_copy(1);
    expect_nothing(); /* submitted is not complete */
    kvt_issuer_copied(issuer, tag, true);
    expect_copy(2);
    stop();
}

static void test_closed_holds_back_none_but_its_slot(void) {
    start(false, 8, 1000);
    begin(0);
    add_fill(1, 0, 10, 5)->done_wait = 4;
    add_fill(2, 0, 10, 6); /* open, but behind 1 in its slot */
    add_fill(3, 1, 10, 5);
    add(KVT_OP_COPY, 4, 0, 10);
    submit();
    expect_copy(3);
    expect_copy(4);
    expect_nothing();
    pages[0].done[0].value = 4;
    expect_copy(1);
    expect_copy(2);
    stop();
}

static void test_smallest_id_first(void) {
    start(false, 8, 1000);
    begin(0);
    add_fill(1, 9, 10, 1);
    add_fill(2, 3, 10, 1);
    add(KVT_OP_COPY, 3, 0, 10);
    add_fill(4, 0, 10, 1);
    submit();
    expect_copy(1);
    expect_copy(2);
    expect_copy(3);
    expect_copy(4);
    stop();
}

static void test_cuts_and_flight(void) {
    start(false, 2, 1000);
    begin(0);
    add_fill(1, 0, 250, 1);
    submit();
    uint32_t first = expect_copy(1);
    CU_ASSERT_EQUAL(issue.copy.bytes, 100);
    CU_ASSERT_EQUAL(issue.copy.source.offset, 100000);
    CU_ASSERT_EQUAL(issue.copy.target.offset, 1000);
    uint32_t second = expect_copy(1);
    CU_ASSERT_EQUAL(issue.copy.source.offset, 100100);
    CU_ASSERT_EQUAL(issue.copy.target.offset, 1100);
    CU_ASSERT_NOT_EQUAL(first, second);
    expect_nothing(); /* two in flight */
    kvt_issuer_copied(issuer, second, true);
    uint32_t third = expect_copy(1);
    CU_ASSERT_EQUAL(issue.copy.bytes, 50);
    CU_ASSERT_EQUAL(issue.copy.source.offset, 100200);
    kvt_issuer_copied(issuer, third, true);
    expect_nothing();
    kvt_issuer_copied(issuer, first, true);
    expect_post(0, 0, 1);
    expect_completion(1, KVT_DONE, 250);
    stop();
}

static void test_classes(void) {
    start(false, 8, 1000);
    begin(0);
    add(KVT_OP_COPY, 1, 0, 10)->traffic = KVT_CLASS_BACKGROUND;
    add_fill(2, 0, 10, 1)->traffic = KVT_CLASS_PREFILL;
    add_fill(3, 1, 10, 1);
    submit();
    begin(1);
    add_fill(7, 0, 10, 1)->traffic = KVT_CLASS_PREFILL;
    submit();
    expect_copy(3);
    expect_copy(7); /* the turn of session 0 has not begun */
    expect_copy(2);
    expect_copy(1);
    stop();
}

/* One session asks in large copies, two in small ones: each gets a third of the bytes. */
static void test_fair_by_bytes(void) {
    start(false, 1, 150);
    uint64_t bytes_of[SESSIONS] = {90, 10, 30, 0};
    for (uint32_t s = 0; s < 3; s++) {
        building = kvt_program_create(s, 5000, 5000, 0);
        for (uint32_t n = 0; n < 5000; n++) {
            add(KVT_OP_COPY, n + 1, 0, bytes_of[s]);
        }
        submit();
    }
    uint64_t got[SESSIONS] = {0};
    uint64_t total = 0;
    while (total < 60000) {
        CU_ASSERT_TRUE_FATAL(kvt_issuer_next(issuer, &issue));
        got[issue.session] += issue.copy.bytes;
        total += issue.copy.bytes;
        kvt_issuer_copied(issuer, issue.tag, true);
    }
    for (uint32_t s = 0; s < 3; s++) {
        CU_ASSERT_TRUE(got[s] > 20000 - 300);
        CU_ASSERT_TRUE(got[s] < 20000 + 300);
    }
    stop();
}

/* A quantum smaller than a cut: turns add up, alone and among others. */
static void test_small_quantum(void) {
    start(false, 8, 7);
    for (uint32_t s = 0; s < 2; s++) {
        begin(s);
        add(KVT_OP_COPY, 1, 0, 300);
        submit();
    }
    uint32_t of[2] = {0};
    for (int n = 0; n < 6; n++) {
        of[expect_copy(1) < 99 ? issue.session : 0]++;
    }
    CU_ASSERT_EQUAL(of[0], 3);
    CU_ASSERT_EQUAL(of[1], 3);
    expect_nothing();
    stop();
}

/* A prompt's copies wait while decoding ones go, but not for ever. */
static void test_prefill_does_not_starve(void) {
    enum { DECODES = 40, PREFILLS = 10 };
    start(false, 1, 1000);
    begin(0);
    for (uint32_t n = 0; n < PREFILLS; n++) {
        add(KVT_OP_COPY, n + 1, 0, 1000)->traffic = KVT_CLASS_PREFILL;
    }
    submit();
    begin(1);
    for (uint32_t n = 0; n < DECODES; n++) {
        add(KVT_OP_COPY, n + 1, 0, 1000)->traffic = KVT_CLASS_DECODE;
    }
    submit();
    uint64_t decoded_bytes = 0;
    uint64_t prefilled_bytes = 0;
    while (decoded_bytes < 16000) {
        CU_ASSERT_TRUE_FATAL(kvt_issuer_next(issuer, &issue));
        bool prefill = issue.session == 0;
        prefilled_bytes += prefill ? issue.copy.bytes : 0;
        decoded_bytes += prefill ? 0 : issue.copy.bytes;
        CU_ASSERT_TRUE(prefilled_bytes == 0 || decoded_bytes >= KVT_ISSUER_PATIENCE * 1000);
        kvt_issuer_copied(issuer, issue.tag, true);
    }
    CU_ASSERT_TRUE(prefilled_bytes >= 16000 / KVT_ISSUER_PATIENCE - 1100);
    CU_ASSERT_TRUE(prefilled_bytes <= 16000 / KVT_ISSUER_PATIENCE);
    stop();
}

/* ---- bytes under way ------------------------------------------------------------------------- */

/* At most 800 bytes, 8 cuts, are under way; a lower class has 200. */
static void start_limited(void) {
    start_config((
        struct kvt_issuer_config){.inflight_max = 64, .inflight_bytes = 800, .quantum_bytes = 100});
}

/* Operation `id` of a session of its own, 2,000 bytes. */
static void submit_copy(uint32_t session, uint64_t id, enum kvt_op_class traffic) {
    begin(session);
    add(KVT_OP_COPY, id, 0, 2000)->traffic = (uint8_t)traffic;
    submit();
}

/* `count` copies of operation `id` go; returns the first tag. */
static uint32_t expect_copies(uint64_t id, uint32_t count) {
    uint32_t first = expect_copy(id);
    while (--count > 0) {
        expect_copy(id);
    }
    return first;
}

static void test_bytes_inflight(void) {
    start_limited();
    submit_copy(0, 1, KVT_CLASS_BACKGROUND);
    uint32_t tag = expect_copies(1, 8);
    expect_nothing();
    kvt_issuer_copied(issuer, tag, true);
    expect_copies(1, 1);
    expect_nothing();
    stop();
}

/* What decodes waits for its gate: a prompt fills a quarter meanwhile, and the link when it is over. */
static void test_lower_class_leaves_room(void) {
    start_limited();
    begin(1);
    add_fill(7, 0, 700, 5)->done_wait = 4;
    submit();
    submit_copy(0, 1, KVT_CLASS_PREFILL);
    uint32_t lower = expect_copies(1, 2);
    expect_nothing();
    kvt_issuer_copied(issuer, lower, true);
    lower = expect_copies(1, 1);
    expect_nothing();
    pages[1].done[0].value = 4;
    uint32_t higher = expect_copies(7, 6); /* all that is left */
    expect_nothing();
    kvt_issuer_copied(issuer, higher, true);
    expect_copies(7, 1); /* its last: all of it is submitted */
    kvt_issuer_copied(issuer, lower, true);
    expect_copies(1, 1);
    expect_nothing();
    stop();
}

/* A prompt and a migration share the quarter; the migration leaves room to the prompt alone too. */
static void test_lower_classes_share(void) {
    for (int decodes = 0; decodes < 2; decodes++) {
        start_limited();
        begin(1);
        add_fill(7, 0, decodes ? 100 : 0, 5)->done_wait = 4; /* an empty one needs no room */
        add(KVT_OP_STEP, 8, 0, 0)->step_wait = 1;
        submit();
        begin(2);
        add_fill(9, 0, 500, 5)->done_wait = 4;
        building->ops[0].traffic = KVT_CLASS_PREFILL;
        submit();
        submit_copy(0, 1, KVT_CLASS_BACKGROUND);
        uint32_t lowest = expect_copies(1, 2);
        expect_nothing();
        pages[2].done[0].value = 4;
        if (decodes) {
            expect_nothing();
            kvt_issuer_copied(issuer, lowest, true);
            expect_copies(9, 1);
        } else {
            expect_copies(9, 5);
            expect_copies(1, 1); /* nothing above it is left */
        }
        expect_nothing();
        stop();
    }
}

/* What is cancelled, or whose session is closed, needs no room any more. */
static void test_room_comes_back(void) {
    for (int close = 0; close < 2; close++) {
        start_limited();
        begin(1);
        add_fill(7, 0, 100, 5)->done_wait = 4;
        submit();
        submit_copy(0, 1, KVT_CLASS_PREFILL);
        expect_copies(1, 2);
        expect_nothing();
        if (close) {
            kvt_issuer_session_close(issuer, 1);
        } else {
            kvt_issuer_cancel(issuer, 1, 7);
        }
        expect_copies(1, 6);
        expect_nothing();
        stop();
    }
}

/* Beside one that always has more a prompt gets its fifth, and that is less than its quarter. */
static void test_patience_within_the_quarter(void) {
    start_limited();
    begin(1);
    for (uint32_t n = 0; n < 50; n++) {
        add(KVT_OP_COPY, n + 1, 0, 1000);
    }
    submit();
    begin(0);
    for (uint32_t n = 0; n < 50; n++) {
        add(KVT_OP_COPY, n + 1, 0, 1000)->traffic = KVT_CLASS_PREFILL;
    }
    submit();
    struct kvt_issue way[8];
    uint32_t lower = 0;
    for (uint32_t n = 0; n < 200; n++) {
        if (n >= 8) {
            kvt_issuer_copied(issuer, way[n % 8].tag, true);
        }
        CU_ASSERT_TRUE_FATAL(kvt_issuer_next(issuer, &way[n % 8]));
        lower += way[n % 8].session == 0;
    }
    CU_ASSERT_EQUAL(lower, 200 / (KVT_ISSUER_PATIENCE + 1));
    lower = 0;
    for (uint32_t n = 0; n < 100; n++) { /* now none of the prompt's comes back */
        struct kvt_issue *one = &way[n % 8];
        if (one->session == 1) {
            kvt_issuer_copied(issuer, one->tag, true);
            CU_ASSERT_TRUE_FATAL(kvt_issuer_next(issuer, one));
        }
    }
    struct kvt_issue *last = NULL;
    for (uint32_t n = 0; n < 8; n++) {
        lower += way[n].session == 0;
        last = way[n].session == 0 ? &way[n] : last;
    }
    CU_ASSERT_EQUAL_FATAL(lower, 2);
    kvt_issuer_copied(issuer, last->tag, true);
    CU_ASSERT_TRUE(kvt_issuer_next(issuer, &issue));
    CU_ASSERT_EQUAL(issue.session, 0); /* it has waited all the while */
    stop();
}

static void test_streams(void) {
    start(false, 8, 1000);
    begin(0);
    for (uint32_t n = 0; n < 4; n++) {
        add(KVT_OP_COPY, n + 1, 0, 10);
        building->copies[n].source.tier = n & 1 ? KVT_TIER_GPU : KVT_TIER_HOST;
        building->copies[n].target.tier = n & 2 ? KVT_TIER_GPU : KVT_TIER_HOST;
    }
    submit();
    for (uint32_t n = 0; n < 4; n++) {
        expect_copy(n + 1);
        CU_ASSERT_EQUAL(issue.stream, n == 1); /* gpu to host */
    }
    stop();
}

/* Ids with gaps, thousands outstanding, completed out of order. */
static void test_many_outstanding(void) {
    start(false, 8, 1000);
    enum { OPS = 5000 };
    building = kvt_program_create(0, OPS + 1, OPS, OPS);
    for (uint32_t n = 0; n < OPS; n++) {
        uint16_t slot = (uint16_t)(n % KVT_SLOTS_MAX);
        add(KVT_OP_WRITEBACK, 7 + 3 * (uint64_t)n, slot, 0)->generation = n + 1;
    }
    struct kvt_op *last = add(KVT_OP_STEP, 100000, 0, 0);
    for (uint32_t n = 0; n < OPS; n++) {
        dep(last, 7 + 3 * (uint64_t)(OPS - 1 - n));
    }
    submit();
    uint32_t completed = 0;
    struct kvt_completion c;
    for (uint32_t n = 0; n < OPS; n++) {
        pages[0].done[n % KVT_SLOTS_MAX].value = n + 1;
        expect_nothing();
        while (kvt_issuer_completion(issuer, &c)) {
            completed++;
        }
    }
    CU_ASSERT_EQUAL(completed, OPS + 1);
    CU_ASSERT_EQUAL(c.op, 100000);
    stop();
}

static void test_watched(void) {
    start(false, 8, 1000);
    begin(2);
    add(KVT_OP_WRITEBACK, 1, 5, 10)->generation = 1;
    dep(add_fill(2, 6, 10, 5), 1);
    building->ops[1].done_wait = 4; /* behind a dependency: not what opens it next */
    add(KVT_OP_STEP, 3, 0, 0)->step_wait = 1;
    submit();
    const struct kvt_counter *watched[8];
    CU_ASSERT_EQUAL_FATAL(kvt_issuer_watched(issuer, watched, 8), 2);
    CU_ASSERT_PTR_EQUAL(watched[0], &pages[2].done[5]);
    CU_ASSERT_PTR_EQUAL(watched[1], &pages[2].step);
    CU_ASSERT_EQUAL(kvt_issuer_watched(issuer, watched, 1), 1);
    pages[2].done[5].value = 1;
    CU_ASSERT_EQUAL_FATAL(kvt_issuer_watched(issuer, watched, 8), 1);
    kvt_issuer_copied(issuer, expect_copy(1), true);
    CU_ASSERT_EQUAL_FATAL(kvt_issuer_watched(issuer, watched, 8), 2);
    CU_ASSERT_PTR_EQUAL(watched[0], &pages[2].done[6]);
    stop();
}

#ifdef KVT_MUTANTS
static void test_rules_left_out(void) {
    start(false, 8, 1000);
    kvt_issuer_break_rules(issuer, 1u << KVT_BREAK_FILL_IGNORES_DONE |
                                       1u << KVT_BREAK_POST_BEFORE_COPY |
                                       1u << KVT_BREAK_WRITEBACK_IGNORES_DONE |
                                       1u << KVT_BREAK_COMMIT_IGNORES_STEP);
    begin(0);
    add_fill(1, 0, 150, 8)->done_wait = 7;
    add(KVT_OP_WRITEBACK, 2, 1, 10)->generation = 3;
    add(KVT_OP_STEP, 3, 0, 0)->step_wait = 1;
    submit();
    expect_post(0, 0, 8);
    expect_completion(3, KVT_DONE, 0);
    uint32_t first = expect_copy(1);
    kvt_issuer_copied(issuer, expect_copy(1), true);
    kvt_issuer_copied(issuer, first, true);
    expect_completion(1, KVT_DONE, 150);
    expect_copy(2);
    stop();
}
#endif

int main(void) {
    static CU_TestInfo tests[] = {
        {"a fill posts when it is copied", test_fill_posts_when_copied},
        {"a fill posts behind its last copy", test_fill_posts_behind},
        {"an empty fill only posts", test_empty_fill_only_posts},
        {"posts in flight", test_posts_inflight},
        {"a fill waits for done exactly", test_fill_waits_for_done_exactly},
        {"a write-back waits for its generation", test_writeback_waits_for_its_generation},
        {"steps compare cyclically", test_step_is_cyclic},
        {"a step needs no room in flight", test_step_in_spite_of_full_flight},
        {"dependencies", test_dependencies},
        {"a closed one holds back its slot only", test_closed_holds_back_none_but_its_slot},
        {"smallest id first", test_smallest_id_first},
        {"cuts and flight", test_cuts_and_flight},
        {"classes", test_classes},
        {"fair by bytes", test_fair_by_bytes},
        {"a quantum smaller than a cut", test_small_quantum},
        {"prefill does not starve", test_prefill_does_not_starve},
        {"bytes in flight", test_bytes_inflight},
        {"a lower class leaves room", test_lower_class_leaves_room},
        {"lower classes share their part", test_lower_classes_share},
        {"room comes back", test_room_comes_back},
        {"patience within the quarter", test_patience_within_the_quarter},
        {"streams", test_streams},
        {"many outstanding", test_many_outstanding},
        {"watched counters", test_watched},
#ifdef KVT_MUTANTS
        {"rules left out", test_rules_left_out},
#endif
        CU_TEST_INFO_NULL,
    };
    return run_suite("issuer", tests);
}
