/* The issuer against its contract: what fails, is cancelled or closed, and what depends on it. */
#include "tests/unit/issuer_fixture.h"

/* Nothing copies on what a failed copy should have brought; what is submitted later knows. */
static void test_dependency_on_what_failed(void) {
    start(false, 8, 1000);
    begin(0);
    add(KVT_OP_COPY, 1, 0, 10);
    dep(add_fill(2, 1, 10, 5), 1);
    dep(add(KVT_OP_WRITEBACK, 3, 2, 10), 1);
    dep(add_fill(4, 3, 10, 5), 3);
    dep(add(KVT_OP_STEP, 5, 0, 0), 1);
    submit();
    kvt_issuer_copied(issuer, expect_copy(1), false);
    expect_nothing();
    expect_completion(1, KVT_FAILED, 0);
    expect_completion(2, KVT_CANCELLED, 0);
    expect_completion(3, KVT_CANCELLED, 0);
    expect_completion(4, KVT_CANCELLED, 0);
    expect_completion(5, KVT_DONE, 0);
    begin(0);
    dep(add_fill(6, 1, 10, 5), 1);
    submit();
    expect_copy(6);
    stop();
}

/* A fill that failed brought nothing that others wait for but its slot. */
static void test_dependency_on_a_fill_that_failed(void) {
    start(false, 8, 1000);
    begin(0);
    add_fill(1, 0, 10, 5);
    dep(add_fill(2, 0, 10, 6), 1);
    submit();
    kvt_issuer_copied(issuer, expect_copy(1), false);
    expect_copy(2);
    stop();
}

/* A dependency that was cancelled is complete; one that is not submitted yet is not. */
static void test_dependency_on_what_did_not_happen(void) {
    start(false, 8, 1000);
    begin(0);
    add(KVT_OP_WRITEBACK, 2, 0, 10)->generation = 99;
    dep(add_fill(3, 1, 10, 5), 2);
    submit();
    expect_nothing();
    kvt_issuer_cancel(issuer, 0, 4);
    expect_nothing();
    kvt_issuer_cancel(issuer, 0, 3); /* cancels the fill, not the write-back */
    expect_completion(3, KVT_CANCELLED, 0);
    begin(0);
    dep(add_fill(10, 1, 10, 5), 2);
    dep(add_fill(11, 2, 10, 5), 20);
    submit();
    expect_nothing();
    kvt_issuer_cancel(issuer, 0, 11);
    expect_completion(11, KVT_CANCELLED, 0);
    expect_nothing();
    pages[0].done[0].value = 99;
    kvt_issuer_copied(issuer, expect_copy(2), true);
    expect_copy(10);
    begin(0);
    dep(add_fill(12, 2, 10, 5), 11);
    submit();
    expect_copy(12);
    stop();
}

static void test_cancel_carries_on_what_was_begun(void) {
    start(false, 1, 1000);
    begin(0);
    add_fill(1, 0, 150, 1);
    add_fill(2, 0, 10, 2);
    add_fill(3, 1, 10, 1);
    add(KVT_OP_STEP, 4, 0, 0)->step_wait = 1;
    submit();
    uint32_t tag = expect_copy(1);
    kvt_issuer_cancel(issuer, 0, 1);
    expect_completion(2, KVT_CANCELLED, 0);
    expect_completion(3, KVT_CANCELLED, 0);
    expect_completion(4, KVT_CANCELLED, 0);
    kvt_issuer_copied(issuer, tag, true);
    kvt_issuer_copied(issuer, expect_copy(1), true);
    expect_post(0, 0, 1);
    expect_completion(1, KVT_DONE, 150);
    expect_nothing();
    expect_no_completion();
    stop();
}

static void test_failed_fill_does_not_post(void) {
    for (int behind = 0; behind < 2; behind++) {
        start(behind != 0, 2, 1000);
        begin(0);
        add_fill(1, 0, 350, 1);
        add_fill(2, 0, 10, 2);
        submit();
        uint32_t first = expect_copy(1);
        uint32_t second = expect_copy(1);
        kvt_issuer_copied(issuer, first, false);
        expect_no_completion(); /* one is still in flight */
        kvt_issuer_copied(issuer, expect_copy(2), true);
        uint32_t post = expect_post(0, 0, 2);
        if (behind) {
            kvt_issuer_copied(issuer, post, true);
        }
        kvt_issuer_copied(issuer, second, true);
        expect_completion(2, KVT_DONE, 10);
        expect_completion(1, KVT_FAILED, 100);
        expect_nothing();
        stop();
    }
}

/* The failure comes between the last copy's submission and the post. */
static void test_post_is_taken_back(void) {
    start(true, 2, 1000);
    begin(0);
    add_fill(1, 0, 50, 1);
    submit();
    kvt_issuer_copied(issuer, expect_copy(1), false);
    expect_nothing();
    expect_completion(1, KVT_FAILED, 0);
    stop();
}

static void test_close_and_drain(void) {
    start(false, 2, 1000);
    begin(0);
    add_fill(1, 0, 50, 1);
    add_fill(2, 1, 300, 1);
    add_fill(3, 2, 10, 1);
    submit();
    uint32_t first = expect_copy(1);
    uint32_t second = expect_copy(2);
    begin(1);
    add_fill(1, 0, 50, 1);
    submit();
    kvt_issuer_session_close(issuer, 0);
    uint32_t session = 99;
    expect_completion(3, KVT_CANCELLED, 0);
    CU_ASSERT_FALSE(kvt_issuer_session_drained(issuer, &session));
    kvt_issuer_copied(issuer, second, true);
    expect_completion(2, KVT_FAILED, 100);
    uint32_t other = expect_copy(1); /* of session 1, which goes on */
    CU_ASSERT_EQUAL(issue.session, 1);
    kvt_issuer_copied(issuer, first, true);
    CU_ASSERT_FALSE(kvt_issuer_session_drained(issuer, &session)); /* not collected yet */
    expect_completion(1, KVT_FAILED, 50);                          /* it would have had to post */
    CU_ASSERT_TRUE(kvt_issuer_session_drained(issuer, &session));
    CU_ASSERT_EQUAL(session, 0);
    CU_ASSERT_FALSE(kvt_issuer_session_drained(issuer, &session));
    kvt_issuer_copied(issuer, other, true);
    expect_post(1, 0, 1);
    kvt_issuer_session_open(issuer, 0, &pages[0]); /* the index is free again, ids start anew */
    begin(0);
    add_fill(1, 0, 50, 1);
    submit();
    expect_completion(1, KVT_DONE, 50);
    expect_copy(1);
    CU_ASSERT_EQUAL(issue.session, 0);
    stop();
}

/* What a session could have submitted is forgotten with it. */
static void test_close_forgets_candidates(void) {
    start(false, 1, 7);
    for (uint32_t s = 0; s < SESSIONS; s++) {
        begin(s);
        add(KVT_OP_COPY, 1, 0, s == 1 ? 7 : 20);
        submit();
    }
    uint32_t tag = expect_copy(1);
    CU_ASSERT_EQUAL(issue.session, 1);
    uint32_t session = 99;
    kvt_issuer_session_close(issuer, 0);
    expect_completion(1, KVT_CANCELLED, 0);
    CU_ASSERT_TRUE(kvt_issuer_session_drained(issuer, &session));
    for (uint32_t n = 0; n < 2; n++) {
        kvt_issuer_copied(issuer, tag, true);
        tag = expect_copy(1);
        CU_ASSERT(issue.session >= 2);
    }
    kvt_issuer_copied(issuer, tag, true);
    expect_nothing();
    stop();
}

static void test_close_drops_posts(void) {
    start(true, 4, 1000);
    for (uint32_t s = 0; s < 2; s++) {
        begin(s);
        add_fill(1, 0, 0, 1);
        add_fill(2, 1, 0, 1);
        submit();
    }
    uint32_t tag = expect_post(0, 0, 1);
    kvt_issuer_session_close(issuer, 0);
    expect_post(1, 0, 1);
    expect_post(1, 1, 1);
    expect_nothing();
    expect_completion(2, KVT_FAILED, 0);
    uint32_t session;
    CU_ASSERT_FALSE(kvt_issuer_session_drained(issuer, &session)); /* a post is on its way */
    kvt_issuer_copied(issuer, tag, true);
    expect_completion(1, KVT_DONE, 0);
    CU_ASSERT_TRUE(kvt_issuer_session_drained(issuer, &session));
    stop();
}

/* Freed with operations queued, in flight, due to post and uncollected: nothing leaks (ASan). */
static void test_free_at_any_time(void) {
    start(true, 8, 1000);
    begin(0);
    add_fill(1, 0, 0, 1);
    add_fill(2, 1, 250, 1);
    add_fill(3, 2, 10, 1)->done_wait = 5;
    submit();
    begin(1);
    add_fill(1, 0, 50, 1);
    submit();
    CU_ASSERT_TRUE(kvt_issuer_next(issuer, &issue));
    CU_ASSERT_TRUE(kvt_issuer_next(issuer, &issue));
    kvt_issuer_session_close(issuer, 1);
    stop();
}

int main(void) {
    static CU_TestInfo tests[] = {
        {"dependencies that failed", test_dependency_on_what_failed},
        {"fills that failed", test_dependency_on_a_fill_that_failed},
        {"dependencies that did not happen", test_dependency_on_what_did_not_happen},
        {"cancel carries on what was begun", test_cancel_carries_on_what_was_begun},
        {"a failed fill does not post", test_failed_fill_does_not_post},
        {"a post is taken back", test_post_is_taken_back},
        {"close and drain", test_close_and_drain},
        {"close forgets candidates", test_close_forgets_candidates},
        {"close drops posts", test_close_drops_posts},
        {"free at any time", test_free_at_any_time},
        CU_TEST_INFO_NULL,
    };
    return run_suite("issuer-end", tests);
}
