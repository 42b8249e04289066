/* Against a fake daemon: a layer at a time, settling, edits of rows, statistics, creating. */
#include "tests/support/client_rig.h"

/* ---- acquire, settle, the other calls ----------------------------------------------------------- */

static uint32_t last_body(void) {
    uint32_t body;
    FAKE_SET(&fake, body = fake.last_body);
    return body;
}

static void test_acquire(void) {
    const struct kvt_piece *const *pieces;
    uint32_t count;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    schedule.steps_count = 1;
    fake_schedule(&fake, &schedule, 2, 10);
    post_all(1);
    CU_ASSERT_EQUAL(kvt_acquire(client, cache, 1, 1, &pieces, &count), -KVT_ESTATE);
    CU_ASSERT_EQUAL_FATAL(kvt_acquire(client, cache, 0, 1, &pieces, &count), 0);
    CU_ASSERT_EQUAL(last_body(), KVT__REQUEST__BODY_ACQUIRE);
    CU_ASSERT_EQUAL(count, 2);
    CU_ASSERT_EQUAL(pieces[1]->last, 1);
    CU_ASSERT_EQUAL(kvt_acquire(client, cache, 1, 1, &pieces, &count), -KVT_ESTATE);
    CU_ASSERT(message_has("layer 0 is to be committed first"));
    CU_ASSERT_EQUAL(kvt_commit(client, cache, 1), -KVT_ESTATE);
    CU_ASSERT_EQUAL(fake.page->done[1].value, 0);
    CU_ASSERT_EQUAL(kvt_commit(client, cache, 0), 0);
    CU_ASSERT_EQUAL(fake.page->done[1].value, 1);
    CU_ASSERT_EQUAL(kvt_acquire(client, cache, 1, 1, &pieces, &count), 0);
    CU_ASSERT_EQUAL(count, 1);
    CU_ASSERT_EQUAL(fake.page->step.value, 0);
    CU_ASSERT_EQUAL(kvt_commit(client, cache, 1), 0);
    CU_ASSERT_EQUAL(fake.page->step.value, 10);
    CU_ASSERT_EQUAL(kvt_acquire_abort(client, cache), 0); /* there is none */

    /* It failed when it was written back: the next one says so, and opens nothing. */
    __atomic_store_n(&fake.page->failed.aux, KVT_EIO, __ATOMIC_SEQ_CST);
    fake_post(&fake.page->failed, 10);
    FAKE_SET(&fake, fake.last_body = 0);
    CU_ASSERT_EQUAL(kvt_acquire(client, cache, 0, 1, &pieces, &count), -KVT_EFAILED);
    CU_ASSERT(message_has("1 new tokens of row 0 and those of 1 more rows are not there"));
    CU_ASSERT_EQUAL(last_body(), 0);

    /* A layer whose pieces need one slot after the other cannot be held as a whole. */
    schedule.pieces[1].slot = 0;
    schedule.pieces[1].ready = schedule.pieces[1].done = 2;
    fake_schedule(&fake, &schedule, 2, 10);
    CU_ASSERT_EQUAL(kvt_acquire(client, cache, 0, 1, &pieces, &count), -KVT_ENOTSUP);
    CU_ASSERT(message_has("more pieces than there are slots"));
    fake_sync(&fake);
    CU_ASSERT_EQUAL(fake.abort_first, 10); /* the step was given up */
    end_test();
}

/* A layer that a later one reads keeps its slot until that one is committed. */
static void test_acquire_held(void) {
    const struct kvt_piece *const *pieces;
    uint32_t count;
    begin_test(KVT_DENSE);
    struct fake_schedule schedule = {
        .cache = 1,
        .first_step = 1,
        .steps_count = 1,
        .steps = {{.step = 1, .piece_count = 2}},
        .pieces_count = 2,
        .pieces = {{.last_reader = 1,
                    .flags = KVT_PIECE_STREAMED | KVT_PIECE_LAST,
                    .extent = 100,
                    .ready = 1,
                    .done = 1},
                   {.layer = 1,
                    .reader = 1,
                    .last_reader = 1,
                    .flags = KVT_PIECE_STREAMED | KVT_PIECE_LAST,
                    .slot = 1,
                    .extent = 100,
                    .ready = 1,
                    .done = 1}},
    };
    fake_schedule(&fake, &schedule, 2, 0);
    post_all(1);
    CU_ASSERT_EQUAL_FATAL(kvt_acquire(client, cache, 0, 1, &pieces, &count), 0);
    CU_ASSERT_EQUAL(kvt_commit(client, cache, 0), 0);
    CU_ASSERT_EQUAL(fake.page->done[0].value, 0);
    CU_ASSERT_EQUAL_FATAL(kvt_acquire(client, cache, 1, 1, &pieces, &count), 0);
    CU_ASSERT_EQUAL(kvt_commit(client, cache, 1), 0);
    CU_ASSERT_EQUAL(fake.page->done[0].value, 1);
    CU_ASSERT_EQUAL(fake.page->done[1].value, 1);
    end_test();
}

static void test_settle(void) {
    pthread_t thread;
    begin_test(KVT_SEGMENT);
    CU_ASSERT_EQUAL(kvt_cache_settle(client, cache, 0), 0); /* nothing was ended */
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    post_all(1);
    walk(s);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    CU_ASSERT_EQUAL(kvt_cache_settle(client, cache, 20), -KVT_ETIMEDOUT);
    CU_ASSERT(message_has("step 10 of cache 1 is not committed after 20 ms"));
    struct late l = {.counter = &fake.page->committed, .value = 10};
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, post_late, &l), 0);
    CU_ASSERT_EQUAL(kvt_cache_settle(client, cache, 10000), 0);
    (void)pthread_join(thread, NULL);
    post_all(2);
    walk(s);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    fake_post(&fake.page->failed, 11);
    CU_ASSERT_EQUAL(kvt_cache_settle(client, cache, 10000), -KVT_EFAILED);
    CU_ASSERT_EQUAL(kvt_cache_settle(client, cache, 10000), 0); /* told once */
    end_test();
}

static void end_two_steps(void) {
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    post_all(1);
    walk(s);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    post_all(2);
    walk(s);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
}

static void *fail_late(void *argument) {
    uint64_t first = *(const uint64_t *)argument;
    fake_sleep_ms(30);
    __atomic_store_n(&fake.page->failed.aux, KVT_EIO, __ATOMIC_SEQ_CST);
    fake_post(&fake.page->failed, first);
    return NULL;
}

/* Steps that were ended and fail when they are written back: the next begin waits, tells it once and
 * sends nothing. */
static void lost(uint64_t first, const char *what) {
    struct kvt_step *s = NULL;
    pthread_t thread;
    begin_test(KVT_SEGMENT);
    end_two_steps();
    FAKE_SET(&fake, fake.last_body = 0);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, fail_late, &first), 0);
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 2, &s), -KVT_EFAILED);
    (void)pthread_join(thread, NULL);
    CU_ASSERT(message_has(what));
    CU_ASSERT_PTR_NULL(s);
    CU_ASSERT_EQUAL(last_body(), 0);
    struct fake_schedule schedule = two_steps();
    schedule.first_step = schedule.steps[0].step = 12;
    schedule.steps[1].step = 13;
    s = begin(&schedule);
    CU_ASSERT_EQUAL(kvt_step_length(s, 1), 10); /* go on from there */
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    CU_ASSERT_EQUAL(kvt_cache_settle(client, cache, 1000), 0);
    end_test();
}

static void test_lost(void) {
    lost(11, "step 11 of cache 1 failed when written back (an input/output error): 1 new tokens of "
             "row 1 are not there");
    lost(10, "steps 10 to 11 of cache 1 failed when written back (an input/output error): 2 new "
             "tokens of row 1 are not there");
}

/* A begin on another cache clears `failed`: the loss is told by its own cache, and by its copies. */
static void test_lost_elsewhere(void) {
    uint32_t forked = 0;
    uint64_t first = 11;
    struct kvt_step *s = NULL;
    begin_test(KVT_SEGMENT);
    FAKE_SET(&fake, fake.length_count = 2);
    CU_ASSERT_EQUAL(kvt_cache_fork(client, cache, NULL, 0, &forked), 0);
    end_two_steps();
    (void)fail_late(&first);
    struct fake_schedule schedule = two_steps();
    schedule.cache = forked;
    fake_schedule(&fake, &schedule, 2, 10);
    CU_ASSERT_EQUAL_FATAL(kvt_step_begin(client, forked, NULL, 0, 1, 2, &s), 0);
    CU_ASSERT_EQUAL(kvt_client_counter_read(&fake.page->failed), 0);
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    CU_ASSERT_EQUAL(kvt_cache_fork(client, cache, NULL, 0, &forked), 0); /* the same number */
    kvt_client_settle_look(client);
    CU_ASSERT_EQUAL(client->caches[2]->lost.first, 11);
    CU_ASSERT_EQUAL(kvt_cache_settle(client, cache, 1000), -KVT_EFAILED);
    CU_ASSERT(message_has("step 11 of cache 1 failed when written back"));
    CU_ASSERT_EQUAL(kvt_cache_settle(client, cache, 1000), 0);
    end_test();
}

/* Of a cache that is emptied nothing is missing. */
static void test_lost_and_reset(void) {
    uint64_t first = 10;
    begin_test(KVT_SEGMENT);
    FAKE_SET(&fake, fake.length_count = 2);
    end_two_steps();
    (void)fail_late(&first);
    CU_ASSERT_EQUAL(kvt_cache_reset(client, cache), 0);
    CU_ASSERT_EQUAL(kvt_cache_settle(client, cache, 1000), 0);
    end_test();
}

static void test_never_written_back(void) {
    struct kvt_step *s = NULL;
    begin_test(KVT_SEGMENT);
    end_two_steps();
    client->request_timeout_ms = 50;
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 2, &s), -KVT_ETIMEDOUT);
    CU_ASSERT(message_has("step 11 of cache 1 was not written back within 50 ms"));
    fake_post(&fake.page->committed, 11);
    struct fake_schedule schedule = two_steps();
    s = begin(&schedule);
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    end_test();
}

/* Says ten times that it still works on the request. */
static bool works_long(struct fake_daemon *f, const Kvt__Request *q, Kvt__Reply *r) {
    if (f->repeats < 10) {
        r->working = true;
        return true;
    }
    return fake_answer(f, q, r);
}

/* The timeout is for a daemon that says nothing, not for one that waits for memory. */
static void test_a_long_request(void) {
    begin_test(KVT_SEGMENT);
    client->request_timeout_ms = 80;
    FAKE_SET(&fake, fake.answer = works_long);
    CU_ASSERT_EQUAL(kvt_cache_reset(client, cache), 0);
    FAKE_SET(&fake, fake.answer = NULL);
    end_test();
}

static bool works_for_ever(struct fake_daemon *f, const Kvt__Request *q, Kvt__Reply *r) {
    (void)f;
    (void)q;
    r->working = true;
    return true;
}

/* A worker that leaves does not wait for what the daemon cannot do. */
static void test_leaving_ends(void) {
    begin_test(KVT_SEGMENT);
    FAKE_SET(&fake, fake.answer = works_for_ever);
    client->request_timeout_ms = 200;
    end_test();
}

static void test_edits(void) {
    struct kvt_cache_stat stat;
    uint32_t rows[2] = {1, 0};
    uint32_t forked = 0;
    begin_test(KVT_SEGMENT);
    FAKE_SET(&fake, fake.length_count = 2);
    CU_ASSERT_EQUAL(kvt_cache_reorder(client, cache, rows, 2), 0);
    CU_ASSERT_EQUAL(last_body(), KVT__REQUEST__BODY_REORDER);
    CU_ASSERT_EQUAL(kvt_cache_select(client, cache, rows, 2), 0);
    CU_ASSERT_EQUAL(last_body(), KVT__REQUEST__BODY_SELECT);
    CU_ASSERT_EQUAL(kvt_cache_repeat(client, cache, 2), 0);
    CU_ASSERT_EQUAL(last_body(), KVT__REQUEST__BODY_REPEAT);
    CU_ASSERT_EQUAL(kvt_cache_crop(client, cache, rows, 2), 0);
    CU_ASSERT_EQUAL(last_body(), KVT__REQUEST__BODY_CROP);
    CU_ASSERT_EQUAL(kvt_cache_reset(client, cache), 0);
    CU_ASSERT_EQUAL(last_body(), KVT__REQUEST__BODY_RESET);
    CU_ASSERT_EQUAL(kvt_cache_fork(client, cache, rows, 2, &forked), 0);
    CU_ASSERT_EQUAL(forked, 2);
    CU_ASSERT_EQUAL(kvt_cache_stat(client, cache, &stat), 0);
    CU_ASSERT_EQUAL(stat.to_device_bytes, 4711);
    CU_ASSERT_EQUAL(stat.layer_count, 3);
    CU_ASSERT_STRING_EQUAL(stat.layers, "RSI");
    CU_ASSERT_EQUAL(kvt_cache_close(client, cache), 0);
    CU_ASSERT_EQUAL(kvt_cache_close(client, cache), -KVT_ENOENT);
    CU_ASSERT_EQUAL(kvt_cache_stat(client, forked, &stat), -KVT_ENOENT); /* the fake lists one */
    CU_ASSERT_EQUAL(kvt_cache_reorder(client, forked, NULL, 2), -KVT_EINVAL);
    CU_ASSERT_EQUAL(kvt_cache_crop(client, forked, rows, 0), -KVT_EINVAL);
    end_test();
}

static Kvt__CacheOptions seen;
static uint32_t seen_repeat[4];
static uint32_t seen_last_reader[4];

static bool remember_create(struct fake_daemon *f, const Kvt__Request *q, Kvt__Reply *r) {
    if (q->body_case == KVT__REQUEST__BODY_CREATE) {
        seen = *q->create->options;
        for (size_t i = 0; i < seen.n_layers && i < 4; i++) {
            seen_repeat[i] = seen.layers[i]->repeat;
            seen_last_reader[i] = seen.layers[i]->last_reader_plus_1;
        }
    }
    return fake_answer(f, q, r);
}

static void test_create(void) {
    struct kvt_layer_shape four[4] = {layers[0], layers[0], layers[0], layers[1]};
    struct kvt_cache_create_options o = {
        .layers = four, .layer_count = 4, .mode = KVT_DYNAMIC, .resident_layers_max = -1};
    uint32_t id;
    begin_test(KVT_SEGMENT);
    FAKE_SET(&fake, fake.answer = remember_create);
    four[0].last_reader = 2;
    CU_ASSERT_EQUAL(kvt_cache_create(client, &o, &id), 0);
    fake_sync(&fake);
    CU_ASSERT_EQUAL(seen.n_layers, 3); /* neighbours that are alike go as one */
    CU_ASSERT_EQUAL(seen_repeat[0], 1);
    CU_ASSERT_EQUAL(seen_last_reader[0], 3);
    CU_ASSERT_EQUAL(seen_repeat[1], 2);
    CU_ASSERT_EQUAL(seen_last_reader[1], 0);
    CU_ASSERT_EQUAL(seen.rows, 1);
    CU_ASSERT_EQUAL(seen.append_max, 1);
    CU_ASSERT_EQUAL(seen.resident_layers_max_plus_1, 0);
    o.resident_layers_max = 0;
    fake_sync(&fake); /* what was seen may be overwritten now */
    CU_ASSERT_EQUAL(kvt_cache_create(client, &o, &id), 0);
    fake_sync(&fake);
    CU_ASSERT_EQUAL(seen.resident_layers_max_plus_1, 1);
    o.resident_layers_max = 1025;
    CU_ASSERT_EQUAL(kvt_cache_create(client, &o, &id), -KVT_EINVAL);
    o.resident_layers_max = -1;
    four[2].dtype = 9;
    CU_ASSERT_EQUAL(kvt_cache_create(client, &o, &id), -KVT_EINVAL);
    CU_ASSERT(message_has("CREATE: layer 2: dtype is 9; accepted is"));
    o.layer_count = 0;
    CU_ASSERT_EQUAL(kvt_cache_create(client, &o, &id), -KVT_EINVAL);
    end_test();
}

int main(void) {
    CU_TestInfo tests[] = {{"acquire", test_acquire},
                           {"acquire of a held layer", test_acquire_held},
                           {"settle", test_settle},
                           {"a long request", test_a_long_request},
                           {"leaving ends", test_leaving_ends},
                           {"edits", test_edits},
                           {"lost steps", test_lost},
                           {"lost steps of another cache", test_lost_elsewhere},
                           {"lost steps and RESET", test_lost_and_reset},
                           {"a step that is never written back", test_never_written_back},
                           {"create", test_create},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("client calls", tests);
}
