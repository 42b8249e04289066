/* Posting, waiting and poisoning of counters, between threads. */
#include "client/lib/counter.h"
#include "tests/support/cunit_run.h"
#include "tests/support/fake_daemon.h"

#include <pthread.h>
#include <string.h>

static struct kvt_counter ping;
static struct kvt_counter pong;
static int stop_code;

static int stop(void *argument) {
    (void)argument;
    return __atomic_load_n(&stop_code, __ATOMIC_ACQUIRE);
}

static void reset(void) {
    memset(&ping, 0, sizeof ping);
    memset(&pong, 0, sizeof pong);
    __atomic_store_n(&stop_code, 0, __ATOMIC_RELEASE);
}

#define ROUNDS 3000

static void *answer(void *argument) {
    struct kvt_client_spin spin = {0};
    (void)argument;
    for (uint64_t i = 1; i <= ROUNDS; i++) {
        (void)kvt_client_counter_wait(&ping, i, &spin, stop, NULL);
        kvt_client_counter_post(&pong, i);
    }
    return NULL;
}

/* A wake-up that is lost would cost a tenth of a second each: the test's time limit sees many. */
static void test_ping_pong(void) {
    pthread_t thread;
    struct kvt_client_spin spin = {.average_ns = KVT_CLIENT_SPIN_LONG_NS};
    reset();
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, answer, NULL), 0);
    uint64_t start_ns = kvt_client_now_ns();
    for (uint64_t i = 1; i <= ROUNDS; i++) {
        kvt_client_counter_post(&ping, i);
        CU_ASSERT_EQUAL(kvt_client_counter_wait(&pong, i, &spin, stop, NULL), 0);
    }
    CU_ASSERT(kvt_client_now_ns() - start_ns < UINT64_C(30000000000));
    (void)pthread_join(thread, NULL);
    CU_ASSERT_EQUAL(ping.wake, ROUNDS);
    CU_ASSERT_EQUAL(ping.waiters, 0);
}

static void *stop_soon(void *argument) {
    (void)argument;
    fake_sleep_ms(20);
    __atomic_store_n(&stop_code, -KVT_EFAILED, __ATOMIC_RELEASE);
    return NULL;
}

/* Nobody posts: `stop` is asked all the same. */
static void test_stop(void) {
    pthread_t thread;
    struct kvt_client_spin spin = {0};
    reset();
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, stop_soon, NULL), 0);
    CU_ASSERT_EQUAL(kvt_client_counter_wait(&pong, 1, &spin, stop, NULL), -KVT_EFAILED);
    (void)pthread_join(thread, NULL);
}

/* A value that is there already still asks `stop`: poison reaches every wanted value. */
static void test_reached_and_stopped(void) {
    struct kvt_client_spin spin = {0};
    reset();
    kvt_client_counter_post(&ping, 5);
    CU_ASSERT_EQUAL(kvt_client_counter_wait(&ping, 5, &spin, stop, NULL), 0);
    CU_ASSERT_EQUAL(kvt_client_counter_wait(&ping, 3, &spin, stop, NULL), 0);
    __atomic_store_n(&stop_code, -KVT_EGONE, __ATOMIC_RELEASE);
    CU_ASSERT_EQUAL(kvt_client_counter_wait(&ping, 5, &spin, stop, NULL), -KVT_EGONE);
}

static void *poison_soon(void *argument) {
    fake_sleep_ms(20);
    __atomic_store_n(&stop_code, -KVT_EGONE, __ATOMIC_RELEASE);
    kvt_client_page_poison(argument);
    return NULL;
}

static void test_poison(void) {
    static struct kvt_control_page page;
    pthread_t thread;
    struct kvt_client_spin spin = {0};
    reset();
    memset(&page, 0, sizeof page);
    page.ready[63].value = 7;
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, poison_soon, &page), 0);
    uint64_t start_ns = kvt_client_now_ns();
    CU_ASSERT_EQUAL(kvt_client_counter_wait(&page.ready[63], 100, &spin, stop, NULL), -KVT_EGONE);
    CU_ASSERT(kvt_client_now_ns() - start_ns < UINT64_C(5000000000));
    (void)pthread_join(thread, NULL);
    CU_ASSERT_EQUAL(page.ready[63].value, 7 + KVT_POISON);
    CU_ASSERT_EQUAL(page.done[0].value, KVT_POISON);
    CU_ASSERT_EQUAL(page.step.value, KVT_POISON);
    CU_ASSERT_EQUAL(page.committed.value, KVT_POISON);
    CU_ASSERT_EQUAL(page.failed.value, KVT_POISON);
    /* Again and again: added once only, or the cyclic comparison would turn over. */
    kvt_client_page_poison(&page);
    CU_ASSERT_EQUAL(page.ready[63].value, 7 + KVT_POISON);
    /* A late post of the dying daemon is poisoned anew. */
    page.ready[63].value = 8;
    kvt_client_page_poison(&page);
    CU_ASSERT_EQUAL(page.ready[63].value, 8 + KVT_POISON);
    /* The worker's own posts do not undo it. */
    kvt_client_counter_post(&page.done[0], 9);
    CU_ASSERT_EQUAL(page.done[0].value, KVT_POISON);
}

int main(void) {
    CU_TestInfo tests[] = {{"ping-pong", test_ping_pong},
                           {"stop", test_stop},
                           {"reached and stopped", test_reached_and_stopped},
                           {"poison", test_poison},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("client counters", tests);
}
