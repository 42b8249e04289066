/* Steps against a fake daemon: pieces become pointers, counters are posted, failures are told. */
#include "tests/support/client_rig.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- walking ---------------------------------------------------------------------------------- */

static void test_two_steps(void) {
    const struct kvt_piece *p;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    fake_sync(&fake);
    CU_ASSERT_EQUAL(fake.last_rows, 2);
    CU_ASSERT_EQUAL(kvt_step_left(s), 2);
    CU_ASSERT_EQUAL(kvt_step_length(s, 0), 10);
    CU_ASSERT_EQUAL(kvt_step_length(s, 1), 10);
    CU_ASSERT_EQUAL(kvt_step_length(s, 2), 0);

    memory[3] = 42;
    fake_post(&fake.page->ready[0], 1);
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
    CU_ASSERT_EQUAL(p->streamed, 1);
    CU_ASSERT_EQUAL(p->last, 0);
    CU_ASSERT_EQUAL(p->run_count, 1);
    CU_ASSERT_EQUAL(p->runs[0].row_count, 2);
    CU_ASSERT_EQUAL(p->runs[0].rows[1], 1);
    CU_ASSERT_EQUAL(((const uint8_t *)p->runs[0].k)[3], 42);
    CU_ASSERT_PTR_EQUAL(p->runs[0].v, (uint8_t *)p->runs[0].k + 80);
    CU_ASSERT_EQUAL(fake.page->done[0].value, 0);
    CU_ASSERT_EQUAL(kvt_piece_done(s, p), 0);
    CU_ASSERT_EQUAL(fake.page->done[0].value, 1);
    CU_ASSERT_EQUAL(fake.page->done[0].wake, 1);
    CU_ASSERT_EQUAL(kvt_piece_done(s, p), 0); /* once is enough */
    CU_ASSERT_EQUAL(fake.page->done[0].wake, 1);

    fake_post(&fake.page->ready[1], 1);
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
    memset(p->runs[0].k, 7, 8); /* the appended token */
    CU_ASSERT_EQUAL(memory[256 + 7], 7);
    CU_ASSERT_EQUAL(kvt_piece_done(s, p), 0);

    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_EQUAL(p->streamed, 0);
    CU_ASSERT_PTR_NULL(p->runs[0].v);
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
    CU_ASSERT_EQUAL(kvt_step_piece(s, &p), 0);

    CU_ASSERT_EQUAL(fake.page->step.value, 0);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    CU_ASSERT_EQUAL(fake.page->step.value, 10);
    CU_ASSERT_EQUAL(kvt_step_left(s), 1);
    CU_ASSERT_EQUAL(kvt_step_length(s, 0), 10);
    CU_ASSERT_EQUAL(kvt_step_length(s, 1), 11);
    post_all(2);
    walk(s);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    CU_ASSERT_EQUAL(fake.page->step.value, 11);
    CU_ASSERT_EQUAL(kvt_step_left(s), 0);
    CU_ASSERT_EQUAL(kvt_step_end(s), -KVT_ESTATE);
    end_test();
}

static void test_wait_sleeps(void) {
    const struct kvt_piece *p;
    pthread_t thread;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    struct late l = {.counter = &fake.page->ready[0], .value = 1};
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, post_late, &l), 0);
    uint64_t start_ns = kvt_client_now_ns();
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
    CU_ASSERT(kvt_client_now_ns() - start_ns > 10000000);
    (void)pthread_join(thread, NULL);
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    end_test();
}

static void test_end_before_done(void) {
    const struct kvt_piece *p;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    post_all(1);
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
    CU_ASSERT_EQUAL(kvt_step_end(s), -KVT_ESTATE);
    CU_ASSERT(message_has("step 10 of cache 1 cannot end: 2 streamed pieces"));
    CU_ASSERT_EQUAL(fake.page->step.value, 0);
    CU_ASSERT_EQUAL(kvt_piece_done(s, p), 0);
    walk(s);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    CU_ASSERT_EQUAL(kvt_piece_done(s, p), -KVT_EINVAL); /* a piece of the step before */
    CU_ASSERT_EQUAL(kvt_cache_close(client, cache), -KVT_ESTATE);
    CU_ASSERT(message_has("cache 1 has an open step"));
    CU_ASSERT_EQUAL(kvt_cache_reset(client, cache), -KVT_ESTATE);
    struct kvt_step *second;
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 1, &second), -KVT_ESTATE);
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    end_test();
}

/* The address of the first piece of a schedule's first step, and what lies there. */
static const uint8_t *first_address(uint64_t ready, uint8_t *byte) {
    const struct kvt_piece *p;
    struct fake_schedule schedule = two_steps();
    schedule.steps_count = 1;
    struct kvt_step *s = begin(&schedule);
    post_all(ready);
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
    const uint8_t *address = p->runs[0].k;
    *byte = *address;
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    return address;
}

/* Whether nothing of this process may touch the address, though nobody else gets it. */
static bool is_reserved(const uint8_t *address) {
    unsigned char in_memory;
    uintptr_t page = (uintptr_t)address / 4096 * 4096;
    int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    bool touchable = read(zero, (void *)(uintptr_t)address, 1) == 1;
    (void)close(zero);
    return mincore((void *)page, 4096, &in_memory) == 0 && !touchable;
}

/* RECLAIM that keeps the address: the memory goes, and other memory comes to the same place. */
static void test_keep_address(void) {
    uint8_t byte;
    begin_test(KVT_SEGMENT);
    memory[0] = 42;
    const uint8_t *address = first_address(1, &byte);
    CU_ASSERT_EQUAL(byte, 42);
    fake_reclaim_keep(&fake, 5, 100);
    CU_ASSERT(fake_reclaimed(&fake, 5, 100, 3000));
    CU_ASSERT(is_reserved(address));
    CU_ASSERT_EQUAL(client->extents.count, 1);
    fake_extent(&fake, 100, EXTENT_BYTES)[0] = 43;
    CU_ASSERT_PTR_EQUAL(first_address(1, &byte), address);
    CU_ASSERT_EQUAL(byte, 43);

    fake_reclaimed_forget(&fake);
    fake_reclaim_keep(&fake, 5, 100);
    CU_ASSERT(fake_reclaimed(&fake, 5, 100, 3000));
    fake_reclaimed_forget(&fake);
    fake_reclaim(&fake, 5, 100); /* the cache was closed */
    CU_ASSERT(fake_reclaimed(&fake, 5, 100, 3000));
    CU_ASSERT_EQUAL(client->extents.count, 0);
    end_test();
}

static void test_moves(void) {
    const struct kvt_piece *p;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    schedule.moves_count = 2;
    schedule.moves_leading = 1;
    schedule.moves[0] = (struct kvt_sched_move){.source_extent = 100,
                                                .target_extent = 100,
                                                .source_offset = 4096,
                                                .target_offset = 8192,
                                                .bytes = 16};
    schedule.moves[1] = (struct kvt_sched_move){.source_extent = 100,
                                                .target_extent = 100,
                                                .source_offset = 8192,
                                                .target_offset = 12288,
                                                .bytes = 16};
    schedule.pieces[0].move_first = 1;
    schedule.pieces[0].move_count = 1;
    memset(memory + 4096, 'a', 16);
    struct kvt_step *s = begin(&schedule);
    CU_ASSERT_EQUAL(memory[8192 + 15], 'a');
    CU_ASSERT_EQUAL(memory[12288], 0);
    memset(memory + 8192, 'b', 16); /* what the fill brings */
    fake_post(&fake.page->ready[0], 1);
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_EQUAL(memory[12288], 0);
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
    CU_ASSERT_EQUAL(memory[12288 + 15], 'b');
    memset(memory + 12288, 'c', 16); /* appended meanwhile: not copied over by a second wait */
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
    CU_ASSERT_EQUAL(memory[12288], 'c');
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    end_test();
}

static void test_dense(void) {
    const struct kvt_piece *p;
    struct kvt_step *s;
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
                    .done = 1,
                    .k_offset = 128,
                    .v_offset = 4096,
                    .k_row_bytes = 1024,
                    .v_row_bytes = 512,
                    .token_capacity = 64},
                   {.layer = 1,
                    .reader = 1,
                    .last_reader = 1,
                    .flags = KVT_PIECE_LAST,
                    .extent = 100,
                    .k_row_bytes = 1024,
                    .token_capacity = 64}},
    };
    fake_schedule(&fake, &schedule, 2, 0);
    CU_ASSERT_EQUAL_FATAL(kvt_step_begin(client, cache, NULL, 0, 1, 1, &s), 0);
    fake_post(&fake.page->ready[0], 1);
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
    memset((uint8_t *)p->k + p->k_row_bytes, 9, 8);
    CU_ASSERT_EQUAL(memory[128 + 1024], 9);
    memset((uint8_t *)p->v + p->v_row_bytes, 8, 4);
    CU_ASSERT_EQUAL(memory[4096 + 512], 8);
    const struct kvt_piece *held = p;
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_PTR_NULL(p->v);
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
    CU_ASSERT_EQUAL(kvt_piece_done(s, p), 0);
    CU_ASSERT_EQUAL(fake.page->done[0].value, 0);
    CU_ASSERT_EQUAL(kvt_piece_done(s, held), 0); /* late */
    CU_ASSERT_EQUAL(fake.page->done[0].value, 1);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    end_test();
}

/* ---- failing and aborting --------------------------------------------------------------------- */

static void test_failed_while_waiting(void) {
    const struct kvt_piece *p;
    pthread_t thread;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    struct late l = {.counter = &fake.page->ready[0], .value = 2, .code = KVT_EIO};
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, post_late, &l), 0);
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), -KVT_EFAILED);
    CU_ASSERT(
        message_has("step 10 of cache 1 failed and was not committed: an input/output error"));
    (void)pthread_join(thread, NULL);
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    CU_ASSERT_EQUAL(fake.page->step.value, 11); /* the schedule's last: nothing is used any more */
    fake_sync(&fake);
    CU_ASSERT_EQUAL(fake.abort_first, 0); /* the daemon knew */
    end_test();
}

static void test_failed_at_end(void) {
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    post_all(1);
    walk(s);
    fake_post(&fake.page->failed, 10);
    CU_ASSERT_EQUAL(kvt_step_end(s), -KVT_EFAILED);
    CU_ASSERT_EQUAL(fake.page->step.value, 11);
    CU_ASSERT_EQUAL(kvt_step_left(s), 0);
    /* A later step's failure is none of this one's. */
    schedule.first_step = schedule.steps[0].step = 12;
    schedule.steps[1].step = 13;
    for (int i = 0; i < 6; i++) {
        schedule.pieces[i].flags = KVT_PIECE_LAST;
    }
    s = begin(&schedule);
    walk(s);
    fake_post(&fake.page->failed, 13);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    /* Its extents may have been taken back already, so it is told before one is looked for. */
    const struct kvt_piece *p;
    CU_ASSERT_EQUAL(kvt_step_piece(s, &p), -KVT_EFAILED);
    CU_ASSERT(message_has("step 13 of cache 1 failed"));
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    end_test();
}

static void test_abort(void) {
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    post_all(1);
    walk(s);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    fake_sync(&fake);
    CU_ASSERT_EQUAL(fake.abort_first, 11); /* the first one had been ended */
    CU_ASSERT_FALSE(fake.abort_before_step);
    CU_ASSERT_EQUAL(fake.page->step.value, 11);
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0); /* there is none */
    end_test();
}

static void *hang_up_soon(void *argument) {
    (void)argument;
    fake_sleep_ms(30);
    fake_hangup(&fake);
    return NULL;
}

static void test_daemon_dies_while_waiting(void) {
    const struct kvt_piece *p;
    pthread_t thread;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, hang_up_soon, NULL), 0);
    uint64_t start_ns = kvt_client_now_ns();
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), -KVT_EGONE);
    CU_ASSERT(kvt_client_now_ns() - start_ns < UINT64_C(1000000000));
    (void)pthread_join(thread, NULL);
    /* Poisoned, the last counter too: what is posted now changes nothing. */
    CU_ASSERT(fake_await(&fake.page->done[63], KVT_POISON, 2000));
    CU_ASSERT_EQUAL(kvt_piece_done(s, p), 0);
    CU_ASSERT_EQUAL(fake.page->done[0].value, KVT_POISON);
    CU_ASSERT_EQUAL(kvt_step_end(s), -KVT_EGONE);
    CU_ASSERT_EQUAL(fake.page->step.value, KVT_POISON);
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 1, &s), -KVT_EGONE);
    end_test();
}

static void test_abort_of_gone(void) {
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    fake_hangup(&fake);
    CU_ASSERT(fake_await(&fake.page->done[63], KVT_POISON, 2000));
    CU_ASSERT_EQUAL(kvt_step_abort(s), -KVT_EGONE);
    CU_ASSERT_EQUAL(fake.page->step.value, KVT_POISON);
    end_test();
}

static void test_quota(void) {
    struct kvt_step *s = NULL;
    begin_test(KVT_SEGMENT);
    FAKE_SET(&fake, fake.step_code = KVT_EQUOTA);
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 1, &s), -KVT_EQUOTA);
    CU_ASSERT(message_has("device: 2 GiB needed, 1 GiB in the budget"));
    CU_ASSERT_PTR_NULL(s);
    end_test();
}

static void test_arguments(void) {
    struct kvt_step *s = NULL;
    struct kvt_step_row row = {0, 1};
    begin_test(KVT_SEGMENT);
    CU_ASSERT_EQUAL(kvt_step_begin(client, 77, NULL, 0, 1, 1, &s), -KVT_ENOENT);
    CU_ASSERT(message_has("cache 77 is not a cache of this client"));
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 0, &s), -KVT_EINVAL);
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, &row, 0, 1, 1, &s), -KVT_EINVAL);
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, &row, 5000, 1, 1, &s), -KVT_EINVAL);
    CU_ASSERT(message_has("5000 rows; accepted is 1 to 1024"));
    end_test();
}

/* ---- schedules that are wrong ----------------------------------------------------------------- */

/* Its leading moves cannot be done, or nobody knows which they are: the daemon's truth is not in the
 * memory, so the session is over. */
static void wrong_at_begin(int worker, const struct fake_schedule *schedule, const char *what) {
    struct kvt_step *s = NULL;
    begin_test(worker);
    fake_schedule(&fake, schedule, 2, 10);
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 2, &s), -KVT_EPROTO);
    CU_ASSERT(message_has(what));
    CU_ASSERT_PTR_NULL(s);
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 2, &s), -KVT_EGONE);
    CU_ASSERT(message_has("the daemon sent what this library does not understand"));
    CU_ASSERT_EQUAL(kvt_cache_reset(client, cache), -KVT_EGONE);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EGONE);
    fake_sync(&fake);
    CU_ASSERT_EQUAL(fake.abort_first, 0); /* the hang-up says it */
    end_test();
}

static void test_wrong_schedules(void) {
    const struct kvt_piece *p;
    struct fake_schedule schedule = two_steps();
    schedule.cache = 2;
    wrong_at_begin(KVT_SEGMENT, &schedule, "it is for cache 2");
    schedule = two_steps();
    schedule.steps_count = 0;
    wrong_at_begin(KVT_SEGMENT, &schedule, "the reply grants 0 steps from number 10");

    begin_test(KVT_SEGMENT);
    struct kvt_step *s = NULL;
    schedule = two_steps();
    schedule.steps[0].piece_count = 7;
    fake_schedule(&fake, &schedule, 2, 10);
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 2, &s), -KVT_EPROTO);
    CU_ASSERT(message_has("pieces 0 and 7 more; there are 6"));
    fake_sync(&fake);
    CU_ASSERT_EQUAL(fake.abort_first, 10); /* the daemon is not left with an open schedule */

    schedule = two_steps();
    schedule.runs[0].k_offset = EXTENT_BYTES - 78;
    s = begin(&schedule);
    CU_ASSERT_EQUAL(kvt_step_piece(s, &p), -KVT_EPROTO);
    CU_ASSERT(message_has("a run's K of layer 0: 80 bytes at offset 65458"));
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    end_test();
}

static void test_wrong_leading_move(void) {
    struct fake_schedule schedule = two_steps();
    schedule.moves_count = schedule.moves_leading = 2;
    schedule.moves[0] = (struct kvt_sched_move){.source_extent = 100,
                                                .target_extent = 100,
                                                .source_offset = 4096,
                                                .target_offset = 8192,
                                                .bytes = 16};
    schedule.moves[1] = (struct kvt_sched_move){
        .source_extent = 100, .target_extent = 100, .source_offset = EXTENT_BYTES, .bytes = 8};
    wrong_at_begin(KVT_SEGMENT, &schedule, "a move of 8 bytes");
}

/* ---- extents ---------------------------------------------------------------------------------- */

static void *send_extent_late(void *argument) {
    (void)argument;
    fake_sleep_ms(50);
    (void)fake_extent(&fake, 200, 4096);
    return NULL;
}

/* The packet that brings an extent may come behind the reply that names it. */
static void test_extent_comes_late(void) {
    const struct kvt_piece *p;
    pthread_t thread;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    schedule.pieces[0].extent = 200;
    struct kvt_step *s = begin(&schedule);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, send_extent_late, NULL), 0);
    CU_ASSERT_EQUAL(kvt_step_piece(s, &p), 1);
    (void)pthread_join(thread, NULL);
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    end_test();
}

static void *fail_then_send_extent(void *argument) {
    (void)argument;
    fake_sleep_ms(30);
    __atomic_store_n(&fake.page->failed.aux, KVT_EIO, __ATOMIC_SEQ_CST);
    fake_post(&fake.page->failed, 10);
    fake_sleep_ms(30);
    (void)fake_extent(&fake, 200, 4096);
    return NULL;
}

/* The daemon takes the targets of leading moves for the truth, so they are done before the failure
 * is told. */
static void test_leading_moves_of_failed(void) {
    pthread_t thread;
    struct kvt_step *s = NULL;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    schedule.moves_count = schedule.moves_leading = 2;
    schedule.moves[0] = (struct kvt_sched_move){
        .source_extent = 100, .target_extent = 200, .target_offset = 1024, .bytes = 16};
    schedule.moves[1] = (struct kvt_sched_move){.source_extent = 100,
                                                .target_extent = 100,
                                                .source_offset = 4096,
                                                .target_offset = 8192,
                                                .bytes = 16};
    memset(memory, 'l', 16);
    memset(memory + 4096, 'a', 16);
    fake_schedule(&fake, &schedule, 2, 10);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, fail_then_send_extent, NULL), 0);
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 2, &s), -KVT_EFAILED);
    CU_ASSERT(message_has("step 10 of cache 1 failed and was not committed: an input/output"));
    CU_ASSERT_PTR_NULL(s);
    CU_ASSERT_EQUAL(fake.page->step.value, 11);
    (void)pthread_join(thread, NULL);
    CU_ASSERT_EQUAL(fake.extents[1].memory[1024 + 15], 'l');
    CU_ASSERT_EQUAL(memory[8192 + 15], 'a');
    fake_sync(&fake);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), 0); /* the session goes on */
    end_test();
}

static void *evict_soon(void *argument) {
    (void)argument;
    fake_sleep_ms(30);
    __atomic_store_n(&fake.page->failed.aux, KVT_EEVICTED, __ATOMIC_SEQ_CST);
    fake_post(&fake.page->failed, 10);
    return NULL;
}

/* Nothing of an evicted session matters, and its extents do not come. */
static void test_leading_moves_of_evicted(void) {
    pthread_t thread;
    struct kvt_step *s = NULL;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    schedule.moves_count = schedule.moves_leading = 2;
    schedule.moves[0] = schedule.moves[1] = (struct kvt_sched_move){
        .source_extent = 100, .target_extent = 200, .target_offset = 1024, .bytes = 16};
    fake_schedule(&fake, &schedule, 2, 10);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, evict_soon, NULL), 0);
    CU_ASSERT_EQUAL(kvt_step_begin(client, cache, NULL, 0, 1, 2, &s), -KVT_EEVICTED);
    (void)pthread_join(thread, NULL);
    end_test();
}

static void test_reclaim(void) {
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    post_all(1);
    walk(s);
    fake_reclaim(&fake, 5, 100);
    CU_ASSERT_FALSE(fake_reclaimed(&fake, 5, 100, 100)); /* the open step uses it */
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    CU_ASSERT(fake_reclaimed(&fake, 5, 100, 3000));
    CU_ASSERT_EQUAL(client->extents.count, 0);
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    end_test();
}

/* A file shorter than the extent it is said to be must not become a SIGBUS. */
static void test_short_extent(void) {
    const struct kvt_piece *p;
    begin_test(KVT_SEGMENT);
    fake_send_extent(&fake, 300, EXTENT_BYTES + 1, fake.extents[0].fd, 5);
    struct fake_schedule schedule = two_steps();
    schedule.pieces[0].extent = 300;
    struct kvt_step *s = begin(&schedule);
    CU_ASSERT_EQUAL(kvt_step_piece(s, &p), -KVT_EPROTO);
    CU_ASSERT(message_has("extent 300: it cannot be mapped"));
    CU_ASSERT_EQUAL(kvt_step_abort(s), 0);
    end_test();
}

/* ---- interrupted ------------------------------------------------------------------------------ */

static void interrupt_client(int signal_number) {
    (void)signal_number;
    kvt_interrupt(client);
}

static void interrupt_soon(void) {
    struct sigaction action = {.sa_handler = interrupt_client};
    struct itimerval soon = {.it_value = {.tv_usec = 30000}};
    CU_ASSERT_EQUAL_FATAL(sigaction(SIGALRM, &action, NULL), 0);
    CU_ASSERT_EQUAL_FATAL(setitimer(ITIMER_REAL, &soon, NULL), 0);
}

/* The daemon lives and does nothing: a signal handler ends each kind of wait. */
static void test_interrupt_piece_wait(void) {
    const struct kvt_piece *p;
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(s, &p), 1);
    interrupt_soon();
    CU_ASSERT_EQUAL(kvt_piece_wait(s, p), -KVT_EGONE);
    CU_ASSERT(message_has("session 5: it was interrupted; its caches are gone"));
    CU_ASSERT_EQUAL(kvt_step_abort(s), -KVT_EGONE);
    end_test();
}

static void test_interrupt_settle(void) {
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    struct kvt_step *s = begin(&schedule);
    post_all(1);
    walk(s);
    CU_ASSERT_EQUAL(kvt_step_end(s), 0);
    interrupt_soon();
    CU_ASSERT_EQUAL(kvt_cache_settle(client, cache, -1), -KVT_EGONE);
    end_test();
}

static void test_interrupt_request(void) {
    begin_test(KVT_SEGMENT);
    FAKE_SET(&fake, fake.ignore = 100);
    interrupt_soon();
    uint64_t start_ns = kvt_client_now_ns();
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EGONE);
    CU_ASSERT(kvt_client_now_ns() - start_ns < UINT64_C(10000000000));
    CU_ASSERT(message_has("it was interrupted"));
    kvt_interrupt(NULL);
    end_test();
}

/* ---- fork -------------------------------------------------------------------------------------- */

static struct kvt_step *forked_step;
static const struct kvt_piece *forked_piece;

static int piece_wait(void) {
    return kvt_piece_wait(forked_step, forked_piece);
}
static int piece_done(void) {
    return kvt_piece_done(forked_step, forked_piece);
}
static int step_piece(void) {
    const struct kvt_piece *p;
    return kvt_step_piece(forked_step, &p);
}
static int step_end(void) {
    return kvt_step_end(forked_step);
}
static int step_abort(void) {
    return kvt_step_abort(forked_step);
}
static int acquire(void) {
    const struct kvt_piece *const *pieces;
    uint32_t count;
    return kvt_acquire(client, cache, 0, 1, &pieces, &count);
}
static int commit(void) {
    return kvt_commit(client, cache, 0);
}
static int settle(void) {
    return kvt_cache_settle(client, cache, 0);
}
static int stat(void) {
    struct kvt_cache_stat s;
    return kvt_cache_stat(client, cache, &s);
}

/* What the call returned in a child, which is then ended as a careful child would be; or its status,
 * above 255, when a signal ended it. */
static int in_child(int (*call)(void)) {
    int status = -1;
    pid_t child = fork();
    if (child == 0) {
        (void)alarm(20);
        kvt_interrupt(client); /* nor does it end its parent's session */
        int rc = call();
        bool told = strstr(kvt_error_message(client), "cannot be used in a child") != NULL;
        kvt_detach(client);
        _exit(told ? -rc : 100);
    }
    CU_ASSERT_EQUAL(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + status;
}

/* A child has neither control page nor ring: it is told so, and the parent goes on. */
static void test_fork(void) {
    static int (*const calls[])(void) = {piece_wait, piece_done, step_piece, step_end, step_abort,
                                         acquire,    commit,     settle,     stat};
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    forked_step = begin(&schedule);
    post_all(1);
    CU_ASSERT_EQUAL_FATAL(kvt_step_piece(forked_step, &forked_piece), 1);
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        CU_ASSERT_EQUAL(in_child(calls[i]), KVT_ESTATE);
    }
    fake_sync(&fake);
    CU_ASSERT_EQUAL(fake.abort_first, 0);
    CU_ASSERT_EQUAL(fake.page->done[0].value, 0);
    CU_ASSERT_EQUAL(kvt_piece_wait(forked_step, forked_piece), 0);
    CU_ASSERT_EQUAL(kvt_piece_done(forked_step, forked_piece), 0);
    walk(forked_step);
    CU_ASSERT_EQUAL(kvt_step_end(forked_step), 0);
    fake_sync(&fake); /* what was seen may be overwritten now */
    CU_ASSERT_EQUAL(kvt_step_abort(forked_step), 0);
    end_test();
}

/* A kernel without pages that a child gets empty: by its id. */
static void test_fork_without_mark(void) {
    begin_test(KVT_SEGMENT);
    struct fake_schedule schedule = two_steps();
    kvt_client_process_free(&client->process);
    forked_step = begin(&schedule);
    CU_ASSERT_EQUAL(in_child(step_piece), KVT_ESTATE);
    CU_ASSERT_EQUAL(kvt_step_abort(forked_step), 0);
    end_test();
}

int main(void) {
    CU_TestInfo tests[] = {{"two steps", test_two_steps},
                           {"a wait sleeps", test_wait_sleeps},
                           {"end before done", test_end_before_done},
                           {"moves", test_moves},
                           {"dense", test_dense},
                           {"failed while waiting", test_failed_while_waiting},
                           {"failed at the end", test_failed_at_end},
                           {"abort", test_abort},
                           {"the daemon dies", test_daemon_dies_while_waiting},
                           {"abort when the daemon is gone", test_abort_of_gone},
                           {"quota", test_quota},
                           {"arguments", test_arguments},
                           {"wrong schedules", test_wrong_schedules},
                           {"a wrong leading move", test_wrong_leading_move},
                           {"an extent comes late", test_extent_comes_late},
                           {"leading moves of a failed step", test_leading_moves_of_failed},
                           {"leading moves of an evicted worker", test_leading_moves_of_evicted},
                           {"RECLAIM", test_reclaim},
                           {"RECLAIM that keeps the address", test_keep_address},
                           {"a short extent", test_short_extent},
                           {"interrupt a wait for a piece", test_interrupt_piece_wait},
                           {"interrupt settle", test_interrupt_settle},
                           {"interrupt a request", test_interrupt_request},
                           {"fork", test_fork},
                           {"fork without a mark", test_fork_without_mark},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("client steps", tests);
}
