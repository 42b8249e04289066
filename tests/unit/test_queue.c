/* The queue between two threads: bounds, order, wrap-around, and a million messages under load. */
#include "proto/errors.h"
#include "tests/support/cunit_run.h"
#include "tiers/host/queue.h"

#include <CUnit/Basic.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>

struct message {
    uint64_t number;
    uint64_t twice; /* 2 * number: shows a message that is torn */
    uint8_t rest[24];
};

static void test_refuses_when_full_and_when_empty(void) {
    struct kvt_queue *q = NULL;
    uint32_t out = 77;
    CU_ASSERT_EQUAL_FATAL(kvt_queue_create(sizeof(uint32_t), 3, &q), 0); /* rounded up to 4 */
    CU_ASSERT_FALSE(kvt_queue_has_message(q));
    CU_ASSERT_FALSE(kvt_queue_pop(q, &out));
    CU_ASSERT_EQUAL(out, 77);
    for (uint32_t i = 0; i < 4; i++) {
        CU_ASSERT_TRUE(kvt_queue_has_room(q));
        CU_ASSERT_TRUE(kvt_queue_push(q, &i));
    }
    uint32_t extra = 99;
    CU_ASSERT_FALSE(kvt_queue_has_room(q));
    CU_ASSERT_FALSE(kvt_queue_push(q, &extra));
    for (uint32_t i = 0; i < 4; i++) {
        CU_ASSERT_TRUE(kvt_queue_has_message(q));
        CU_ASSERT_TRUE(kvt_queue_pop(q, &out));
        CU_ASSERT_EQUAL(out, i);
    }
    CU_ASSERT_FALSE(kvt_queue_pop(q, &out));
    kvt_queue_free(q);
    kvt_queue_free(NULL);
}

static void test_keeps_order_around_the_ring(void) {
    struct kvt_queue *q = NULL;
    uint32_t pushed = 0;
    uint32_t popped = 0;
    CU_ASSERT_EQUAL_FATAL(kvt_queue_create(sizeof(uint32_t), 8, &q), 0);
    for (uint32_t round = 0; round < 1000; round++) {
        for (uint32_t i = 0; i < round % 9; i++) {
            pushed += kvt_queue_push(q, &pushed);
        }
        uint32_t out;
        for (uint32_t i = 0; i < round % 7; i++) {
            if (kvt_queue_pop(q, &out)) {
                CU_ASSERT_EQUAL(out, popped);
                popped++;
            }
        }
        CU_ASSERT_TRUE(pushed - popped <= 8);
    }
    CU_ASSERT_TRUE(popped > 1000);
    kvt_queue_free(q);
}

enum { MESSAGES = 300000 };

static void *push_all(void *argument) {
    for (uint64_t i = 0; i < MESSAGES; i++) {
        struct message m = {.number = i, .twice = 2 * i};
        while (!kvt_queue_push(argument, &m)) {
            sched_yield();
        }
    }
    return NULL;
}

static void test_two_threads(void) {
    struct kvt_queue *q = NULL;
    pthread_t thread;
    CU_ASSERT_EQUAL_FATAL(kvt_queue_create(sizeof(struct message), 16, &q), 0);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, push_all, q), 0);
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < MESSAGES; i++) {
        struct message m;
        while (!kvt_queue_pop(q, &m)) {
            sched_yield();
        }
        wrong += m.number != i || m.twice != 2 * i;
    }
    CU_ASSERT_EQUAL(wrong, 0);
    pthread_join(thread, NULL);
    CU_ASSERT_FALSE(kvt_queue_has_message(q));
    kvt_queue_free(q);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"refuses when full and when empty", test_refuses_when_full_and_when_empty},
        {"keeps order around the ring", test_keeps_order_around_the_ring},
        {"two threads", test_two_threads},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("queue", tests);
}
