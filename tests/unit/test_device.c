/* The device: order of a session's life, events that do not fit, and a driver that is slow, refuses, or
 * is lost, played by act_driver.h. Two devices at once are in test_device_two.c, workers that are
 * processes of their own in test_device_worker.c. */
#include "proto/errors.h"
#include "tests/support/act_driver.h"
#include "tests/support/cunit_run.h"
#include "tests/support/device_rig.h"
#include "tiers/device/counter.h"
#include "tiers/host/bell.h"

#include <CUnit/Basic.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MIB (UINT64_C(1) << 20)

static void pause_us(uint32_t us) {
    struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000L};
    nanosleep(&t, NULL);
}

/* ---- a device with one extent ------------------------------------------------------------------ */

enum { EXTENT = 1, SESSIONS = 8 };
static struct kvt_rig rig;
static uint8_t *extent;
static struct kvt_control_page *pages[SESSIONS];

static void start_config(struct kvt_rig_config config) {
    config.ops = config.ops ? config.ops : &kvt_act_driver_ops;
    config.arena_bytes = config.arena_bytes ? config.arena_bytes : 8 * MIB;
    config.budget_bytes = 16 * MIB;
    config.sessions_max = SESSIONS;
    kvt_rig_start(&rig, &config);
    extent = kvt_rig_extent(&rig, EXTENT, 8 * MIB);
    for (unsigned s = 0; s < SESSIONS; s++) {
        pages[s] = kvt_rig_page();
    }
}

static void start(void) {
    memset(&kvt_act, 0, sizeof(kvt_act));
    kvt_act.can_sleep = true;
    start_config((struct kvt_rig_config){.copy_threads = 1, .spin_us = 10});
}

static void stop(void) {
    kvt_rig_stop(&rig);
    for (unsigned s = 0; s < SESSIONS; s++) {
        kvt_rig_page_free(pages[s]);
    }
    munmap(extent, 8 * MIB);
}

/* A program of `count` fills without gates; generation 1, 2, ... of slot 0. */
static struct kvt_program *fills(uint32_t session, uint64_t first_id, uint32_t count,
                                 uint64_t bytes) {
    struct kvt_program *p = kvt_rig_program(session, count);
    for (uint32_t i = 0; i < count; i++) {
        struct kvt_op *op = kvt_rig_op(p, KVT_OP_FILL, first_id + i, 0, kvt_on_host(0),
                                       kvt_on_device(EXTENT, 0), bytes);
        op->generation = first_id + i;
    }
    return p;
}

/* A fill that waits for a `done` that nobody posts. */
static struct kvt_program *closed_fill(uint32_t session, uint64_t id) {
    struct kvt_program *p = fills(session, id, 1, 100);
    p->ops[0].done_wait = 77;
    return p;
}

static void expect_completion(uint32_t session, uint64_t op, uint32_t status, uint64_t bytes) {
    struct kvt_device_event e = kvt_rig_event(&rig);
    CU_ASSERT_EQUAL_FATAL(e.kind, KVT_DEVICE_COMPLETION);
    CU_ASSERT_EQUAL(e.session, session);
    CU_ASSERT_EQUAL(e.completion.session, session);
    CU_ASSERT_EQUAL(e.completion.op, op);
    CU_ASSERT_EQUAL(e.completion.status, status);
    CU_ASSERT_EQUAL(e.completion.bytes, bytes);
}

static uint64_t ready(uint32_t session) {
    return __atomic_load_n(&pages[session]->ready[0].value, __ATOMIC_ACQUIRE);
}

/* ---- a session's life -------------------------------------------------------------------------- */

static void one_piece(void) {
    memset(rig.arena, 0x3c, 4096);
    kvt_rig_open(&rig, 2, pages[2]);
    struct kvt_program *p = kvt_rig_program(2, 3);
    kvt_rig_op(p, KVT_OP_FILL, 1, 0, kvt_on_host(0), kvt_on_device(EXTENT, 512), 4096)->generation =
        1;
    kvt_rig_op(p, KVT_OP_WRITEBACK, 2, 0, kvt_on_device(EXTENT, 4096), kvt_on_host(8192), 100)
        ->generation = 1;
    kvt_rig_op(p, KVT_OP_STEP, 3, 0, kvt_on_host(0), kvt_on_host(0), 0)->step_wait = 1;
    kvt_rig_submit(&rig, p);
    expect_completion(2, 1, KVT_DONE, 4096);
    CU_ASSERT_EQUAL(ready(2), 1);
    CU_ASSERT_EQUAL(memcmp(extent + 512, rig.arena, 4096), 0);
    pause_us(2000); /* long enough for the copy thread to fall asleep */
    memset(extent + 4096, 0xc3, 100);
    kvt_counter_post(&pages[2]->done[0], 1);
    expect_completion(2, 2, KVT_DONE, 100);
    CU_ASSERT_EQUAL(rig.arena[8192 + 99], 0xc3);
    pause_us(2000);
    kvt_counter_post(&pages[2]->step, 1);
    expect_completion(2, 3, KVT_DONE, 0);
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 2), 0);
}

static void test_one_piece(void) {
    start();
    one_piece();
    CU_ASSERT_EQUAL(kvt_act.pages, 0);
    stop();
    CU_ASSERT_EQUAL(kvt_act.closed, 1);
}

static void test_one_piece_with_a_driver_that_cannot_sleep(void) {
    memset(&kvt_act, 0, sizeof(kvt_act));
    start_config((struct kvt_rig_config){.copy_threads = 1, .spin_us = 10});
    one_piece();
    CU_ASSERT_EQUAL(kvt_act.waits, 0);
    stop();
}

static void test_commands_wait_for_the_page(void) {
    start();
    kvt_act.page_delay_us = 20000;
    kvt_rig_open(&rig, 3, pages[3]);
    kvt_rig_submit(&rig, fills(3, 1, 2, 100));
    kvt_rig_submit(&rig, closed_fill(3, 3));
    kvt_rig_command(
        &rig, &(struct kvt_device_command){.kind = KVT_DEVICE_CANCEL, .session = 3, .value = 3});
    kvt_rig_submit(&rig, fills(3, 4, 1, 100));
    CU_ASSERT_EQUAL(ready(3), 0);      /* or the machine stood still for 20 ms */
    for (unsigned i = 0; i < 4; i++) { /* the cancelled one is the first to be complete */
        uint64_t op = i == 0 ? 3 : i < 3 ? i : 4;
        expect_completion(3, op, op == 3 ? KVT_CANCELLED : KVT_DONE, op == 3 ? 0 : 100);
    }
    CU_ASSERT_EQUAL(ready(3), 4);
    /* Opened and closed at once: the page comes and goes. */
    kvt_rig_open(&rig, 4, pages[4]);
    kvt_rig_submit(&rig, closed_fill(4, 1));
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 4), 1);
    CU_ASSERT_EQUAL(kvt_act.pages, 1);
    stop();
    CU_ASSERT_EQUAL(kvt_act.pages, 0);
}

/* More commands than are held for pages that are being registered: those of a session that is open
 * wait with them, and none is lost or reordered. */
static void test_many_commands_wait_for_the_page(void) {
    enum { COMMANDS = 3000 };
    start();
    kvt_act.page_delay_us = 5000;
    kvt_rig_open(&rig, 5, pages[5]);
    for (uint32_t i = 1; i <= COMMANDS; i++) {
        kvt_rig_submit(&rig, fills(5, i, 1, 8));
    }
    for (uint32_t i = 1; i <= COMMANDS; i++) {
        expect_completion(5, i, KVT_DONE, 8);
    }
    stop();
}

static void test_page_refused(void) {
    start();
    kvt_act.page_refused = true;
    kvt_rig_open(&rig, 1, pages[1]);
    kvt_rig_submit(&rig, fills(1, 1, 1, 100));
    kvt_rig_submit(&rig, fills(1, 2, 1, 0)); /* would only post */
    bool failed = false;
    uint32_t completed = 0;
    while (!failed || completed < 2) {
        struct kvt_device_event e = kvt_rig_event(&rig);
        CU_ASSERT_EQUAL(e.session, 1);
        if (e.kind == KVT_DEVICE_SESSION_FAILED) {
            CU_ASSERT_EQUAL(e.code, -KVT_EDEVICE);
            CU_ASSERT_STRING_EQUAL(e.text, "no page today");
            failed = true;
        } else {
            CU_ASSERT_EQUAL_FATAL(e.kind, KVT_DEVICE_COMPLETION);
            CU_ASSERT_EQUAL(e.completion.status, e.completion.op == 1 ? KVT_FAILED : KVT_DONE);
            completed++;
        }
    }
    CU_ASSERT_EQUAL(ready(1), 0);
    kvt_act.page_refused = false;
    one_piece(); /* others go on */
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 1), 0);
    kvt_rig_open(&rig, 1, pages[1]); /* and its index can be used again */
    kvt_rig_submit(&rig, fills(1, 1, 1, 100));
    expect_completion(1, 1, KVT_DONE, 100);
    CU_ASSERT_EQUAL(kvt_act.pages, 1);
    stop();
    CU_ASSERT_EQUAL(kvt_act.pages, 0);
}

/* DRAINED comes behind the last completion, every time. */
static void test_drained_comes_last(void) {
    start();
    for (unsigned round = 0; round < 2000; round++) {
        kvt_rig_open(&rig, 6, pages[6]);
        kvt_rig_submit(&rig, fills(6, 1, 3, 8));
        kvt_rig_submit(&rig, closed_fill(6, 4));
        if (kvt_rig_close(&rig, 6) != 4) {
            CU_FAIL("a completion came after DRAINED");
            break;
        }
    }
    struct kvt_device_event e;
    CU_ASSERT_FALSE(kvt_device_event(rig.device, &e));
    stop();
}

/* ---- queues that are full ---------------------------------------------------------------------- */

static void test_events_that_do_not_fit(void) {
    enum { FILLS = 20000 }; /* several times what the queue holds */
    start();
    kvt_rig_open(&rig, 0, pages[0]);
    kvt_rig_submit(&rig, fills(0, 1, FILLS, 8));
    kvt_rig_submit(&rig, closed_fill(0, FILLS + 1));
    /* The loop takes nothing, and the copy thread goes on to the end. */
    kvt_rig_counter_wait(&pages[0]->ready[0], FILLS, 0);
    kvt_rig_open(&rig, 1, pages[1]);
    kvt_rig_submit(&rig, fills(1, 1, 1, 8));
    kvt_rig_counter_wait(&pages[1]->ready[0], 1, 0);
    /* Then everything is there, once and in order. */
    for (uint32_t i = 1; i <= FILLS; i++) {
        expect_completion(0, i, KVT_DONE, 8);
    }
    expect_completion(1, 1, KVT_DONE, 8);
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 0), 1);
    stop();
}

static void test_control_events_that_do_not_fit(void) {
    enum { ROUNDS = 300 }; /* two events each: more than the queue holds */
    start();
    for (uint32_t i = 0; i < ROUNDS; i++) {
        kvt_rig_command(&rig, &(struct kvt_device_command){
                                  .kind = KVT_DEVICE_EXTENT_CREATE, .extent = 2, .bytes = 4096});
        kvt_rig_command(&rig, &(struct kvt_device_command){.kind = KVT_DEVICE_EXTENT_DESTROY,
                                                           .extent = 2});
    }
    kvt_rig_open(&rig, 7, pages[7]); /* its page has to wait behind them */
    kvt_rig_submit(&rig, fills(7, 1, 1, 8));
    pause_us(20000);
    uint32_t created = 0;
    uint32_t destroyed = 0;
    uint32_t completed = 0;
    while (created + destroyed + completed < 2 * ROUNDS + 1) {
        struct kvt_device_event e = kvt_rig_event(&rig);
        if (e.kind == KVT_DEVICE_EXTENT_CREATED) {
            CU_ASSERT_EQUAL(e.code, 0);
            close(e.exported.fd);
            CU_ASSERT_EQUAL(created, destroyed);
            created++;
        } else if (e.kind == KVT_DEVICE_EXTENT_DESTROYED) {
            destroyed++;
        } else {
            CU_ASSERT_EQUAL_FATAL(e.kind, KVT_DEVICE_COMPLETION);
            completed++;
        }
    }
    CU_ASSERT_EQUAL(created, ROUNDS);
    CU_ASSERT_EQUAL(destroyed, ROUNDS);
    stop();
}

static void test_command_queue_full(void) {
    start();
    kvt_rig_open(&rig, 0, pages[0]);
    kvt_rig_submit(&rig, fills(0, 1, 1, 8));
    expect_completion(0, 1, KVT_DONE, 8);
    __atomic_store_n(&kvt_act.hold, true, __ATOMIC_RELEASE);
    struct kvt_device_command c = {
        .kind = KVT_DEVICE_EXTENT_CREATE, .extent = 2, .bytes = UINT64_C(1) << 40};
    uint32_t accepted = 0;
    while (kvt_device_command(rig.device, &c) == 0 && accepted < 100000) {
        accepted++;
    }
    CU_ASSERT_EQUAL(kvt_device_command(rig.device, &c), -KVT_EBUSY);
    CU_ASSERT_TRUE(accepted < 100000);
    /* A control thread that hangs in the driver holds back no copy of an open session. */
    kvt_rig_submit(&rig, fills(0, 2, 1, 8));
    expect_completion(0, 2, KVT_DONE, 8);
    __atomic_store_n(&kvt_act.hold, false, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < accepted; i++) {
        CU_ASSERT_EQUAL(kvt_rig_event(&rig).code, -KVT_EQUOTA);
    }
    stop();
}

/* ---- control ----------------------------------------------------------------------------------- */

static void test_extents_and_host_memory(void) {
    start();
    kvt_rig_command(&rig, &(struct kvt_device_command){
                              .kind = KVT_DEVICE_EXTENT_CREATE, .extent = 9, .bytes = 64 * MIB});
    struct kvt_device_event e = kvt_rig_event(&rig);
    CU_ASSERT_EQUAL(e.kind, KVT_DEVICE_EXTENT_CREATED);
    CU_ASSERT_EQUAL(e.extent, 9);
    CU_ASSERT_EQUAL(e.code, -KVT_EQUOTA);
    CU_ASSERT_EQUAL(e.exported.fd, -1);
    CU_ASSERT_PTR_NOT_NULL(strstr(e.text, "64 MiB"));
    CU_ASSERT_EQUAL(kvt_device_host_removed(rig.device, MIB, MIB, e.text), 0);
    kvt_rig_open(&rig, 0, pages[0]);
    struct kvt_program *p = fills(0, 1, 3, 100);
    p->copies[1].source.offset = MIB; /* is gone */
    kvt_rig_submit(&rig, p);
    bool seen[4] = {false};
    for (unsigned i = 0; i < 3; i++) {
        e = kvt_rig_event(&rig);
        CU_ASSERT_EQUAL_FATAL(e.kind, KVT_DEVICE_COMPLETION);
        CU_ASSERT_EQUAL(e.completion.status, e.completion.op == 2 ? KVT_FAILED : KVT_DONE);
        seen[e.completion.op] = true;
    }
    CU_ASSERT_TRUE(seen[1] && seen[2] && seen[3]);
    stop();
}

static void test_info_and_limits(void) {
    start();
    CU_ASSERT_STRING_EQUAL(kvt_device_info(rig.device)->name, "cpu");
    stop();
    char text[KVT_TEXT_BYTES];
    struct kvt_device *d = NULL;
    struct kvt_device_config c = {.ops = &kvt_act_driver_ops,
                                  .driver = {.budget_bytes = MIB},
                                  .issuer = {.sessions_max = 1,
                                             .inflight_max = KVT_DRIVER_INFLIGHT_MAX + 1,
                                             .cut_bytes = 1,
                                             .quantum_bytes = 1}};
    CU_ASSERT_EQUAL(kvt_device_start(&c, &d, text), -KVT_ECONFIG);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "257"));
    c.issuer.inflight_max = 1;
    c.driver.budget_bytes = UINT64_MAX / 2;
    CU_ASSERT_EQUAL(kvt_device_start(&c, &d, text), -KVT_ECONFIG);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "this machine has"));
    CU_ASSERT_PTR_NULL(d);
    kvt_device_stop(NULL);
}

static void test_stop_in_the_middle(void) {
    start();
    kvt_act.page_delay_us = 1000;
    for (uint32_t s = 0; s < SESSIONS; s++) {
        kvt_rig_open(&rig, s, pages[s]);
        kvt_rig_submit(&rig, fills(s, 1, 100, 100000));
        kvt_rig_submit(&rig, closed_fill(s, 101));
        kvt_rig_command(&rig, &(struct kvt_device_command){.kind = KVT_DEVICE_EXTENT_CREATE,
                                                           .extent = 10 + s,
                                                           .bytes = 4096});
    }
    kvt_rig_command(&rig, &(struct kvt_device_command){.kind = KVT_DEVICE_SESSION_CLOSE});
    pause_us(3000); /* some pages are there, some are not; events were never taken */
    stop();
    CU_ASSERT_EQUAL(kvt_act.pages, 0);
}

static void test_sleeps_when_idle(void) {
    start();
    one_piece();
    pause_us(5000);
    uint32_t before = __atomic_load_n(&kvt_act.waits, __ATOMIC_RELAXED);
    pause_us(100000);
    CU_ASSERT_TRUE(__atomic_load_n(&kvt_act.waits, __ATOMIC_RELAXED) - before <= 1);
    stop();
}

/* ---- a driver that fails ----------------------------------------------------------------------- */

static void test_copies_refused(void) {
    start();
    kvt_rig_open(&rig, 0, pages[0]);
    kvt_act.copy_refused = 1;
    kvt_rig_submit(&rig, fills(0, 1, 1, 100));
    expect_completion(0, 1, KVT_FAILED, 0);
    CU_ASSERT_EQUAL(ready(0), 0); /* a fill that failed posts nothing */
    kvt_rig_submit(&rig, fills(0, 2, 1, 100));
    expect_completion(0, 2, KVT_DONE, 100);
    CU_ASSERT_EQUAL(ready(0), 2);
    stop();
}

/* Fills that only wait for their post are complete without it: LOST says it all. */
static void lose(bool *how, const char *what, uint32_t failed_min) {
    start();
    kvt_rig_open(&rig, 0, pages[0]);
    kvt_rig_open(&rig, 1, pages[1]);
    kvt_rig_submit(&rig, closed_fill(1, 1));
    kvt_rig_submit(&rig, fills(0, 1, 1, 100));
    expect_completion(0, 1, KVT_DONE, 100);
    __atomic_store_n(how, true, __ATOMIC_RELAXED);
    kvt_rig_submit(&rig, fills(0, 2, 20, 300000));
    uint32_t completions = 0;
    uint32_t failed = 0;
    bool lost = false;
    while (completions < 20 || !lost) {
        struct kvt_device_event e = kvt_rig_event(&rig);
        if (e.kind == KVT_DEVICE_LOST) {
            CU_ASSERT_FALSE(lost);
            CU_ASSERT_EQUAL(e.code, -KVT_EDEVICE);
            CU_ASSERT_PTR_NOT_NULL(strstr(e.text, what));
            lost = true;
        } else {
            CU_ASSERT_EQUAL_FATAL(e.kind, KVT_DEVICE_COMPLETION);
            completions++;
            failed += e.completion.status == KVT_FAILED;
        }
    }
    CU_ASSERT_TRUE(failed >= failed_min);
    CU_ASSERT_EQUAL(ready(0), 1);
    /* Sessions still end. */
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 0), 0);
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 1), 1);
    CU_ASSERT_EQUAL(kvt_act.pages, 0);
    stop();
}

static void test_lost_in_copy(void) {
    lose(&kvt_act.copy_lost, "submitting a copy", 20);
}

static void test_lost_in_post(void) {
    lose(&kvt_act.post_lost, "posting", 12);
}

static void test_lost_in_poll(void) {
    lose(&kvt_act.poll_lost, "copying", 20);
}

/* ---- a driver that posts behind copies ---------------------------------------------------------- */

static void start_behind(void) {
    memset(&kvt_act, 0, sizeof(kvt_act));
    kvt_act.post_behind = true;
    start_config((struct kvt_rig_config){.copy_threads = 1, .inflight_max = 2, .spin_us = 10});
}

static void hold_posts(bool held) {
    __atomic_store_n(&kvt_act.posts_held, held, __ATOMIC_RELEASE);
}

static void expect_no_event(uint32_t us) {
    struct kvt_device_event e;
    pause_us(us);
    CU_ASSERT_FALSE(kvt_device_event(rig.device, &e));
}

static void test_post_behind(void) {
    start_behind();
    one_piece();
    kvt_rig_open(&rig, 0, pages[0]);
    kvt_rig_submit(&rig, fills(0, 1, 50, 3000)); /* far more than there are tags */
    for (uint32_t i = 1; i <= 50; i++) {
        expect_completion(0, i, KVT_DONE, 3000);
    }
    CU_ASSERT_EQUAL(ready(0), 50);
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 0), 0);
    stop();
}

/* The engine may let the page go once the fill is complete: so it is not before its post is done. */
static void test_fill_waits_for_its_post(void) {
    start_behind();
    hold_posts(true);
    kvt_rig_open(&rig, 0, pages[0]);
    kvt_rig_submit(&rig, fills(0, 1, 1, 100));
    expect_no_event(20000);
    CU_ASSERT_EQUAL(ready(0), 0);
    kvt_rig_command(&rig, &(struct kvt_device_command){.kind = KVT_DEVICE_SESSION_CLOSE});
    expect_no_event(20000); /* nor is the session drained */
    CU_ASSERT_EQUAL(kvt_act.pages, 1);
    hold_posts(false);
    expect_completion(0, 1, KVT_DONE, 100);
    CU_ASSERT_EQUAL(kvt_rig_event(&rig).kind, KVT_DEVICE_DRAINED);
    CU_ASSERT_EQUAL(ready(0), 1);
    CU_ASSERT_EQUAL(kvt_act.pages, 0);
    stop();
}

static void test_lost_with_posts_in_flight(void) {
    start_behind();
    hold_posts(true);
    kvt_rig_open(&rig, 0, pages[0]);
    kvt_rig_submit(&rig, fills(0, 1, 2, 100));
    expect_no_event(20000);
    __atomic_store_n(&kvt_act.poll_lost, true, __ATOMIC_RELAXED);
    uint32_t failed = 0;
    bool lost = false;
    while (failed < 2 || !lost) {
        struct kvt_device_event e = kvt_rig_event(&rig);
        lost |= e.kind == KVT_DEVICE_LOST;
        failed += e.kind == KVT_DEVICE_COMPLETION && e.completion.status == KVT_FAILED;
    }
    CU_ASSERT_EQUAL(ready(0), 0);
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 0), 0);
    stop();
}

static void test_page_refused_with_posts_behind(void) {
    start_behind();
    kvt_act.page_refused = true;
    kvt_rig_open(&rig, 0, pages[0]);
    kvt_rig_submit(&rig, fills(0, 1, 1, 0)); /* an empty fill only posts */
    bool failed = false;
    bool said = false;
    while (!failed || !said) {
        struct kvt_device_event e = kvt_rig_event(&rig);
        said |= e.kind == KVT_DEVICE_SESSION_FAILED;
        failed |= e.kind == KVT_DEVICE_COMPLETION && e.completion.status == KVT_FAILED;
    }
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 0), 0);
    stop();
}

int main(void) {
    CU_TestInfo tests[] = {
        {"one piece", test_one_piece},
        {"one piece with a driver that cannot sleep",
         test_one_piece_with_a_driver_that_cannot_sleep},
        {"commands wait for the page", test_commands_wait_for_the_page},
        {"many commands wait for the page", test_many_commands_wait_for_the_page},
        {"page refused", test_page_refused},
        {"drained comes last", test_drained_comes_last},
        {"events that do not fit", test_events_that_do_not_fit},
        {"control events that do not fit", test_control_events_that_do_not_fit},
        {"command queue full", test_command_queue_full},
        {"extents and host memory", test_extents_and_host_memory},
        {"info and limits", test_info_and_limits},
        {"stop in the middle", test_stop_in_the_middle},
        {"sleeps when idle", test_sleeps_when_idle},
        {"copies refused", test_copies_refused},
        {"lost in copy", test_lost_in_copy},
        {"lost in post", test_lost_in_post},
        {"lost in poll", test_lost_in_poll},
        {"post behind", test_post_behind},
        {"a fill waits for its post", test_fill_waits_for_its_post},
        {"lost with posts in flight", test_lost_with_posts_in_flight},
        {"page refused with posts behind", test_page_refused_with_posts_behind},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("device", tests);
}
