/* The pool: every item once, whatever the threads and the sizes of jobs. */
#include "client/worker/pool.h"

#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "tests/support/cunit_run.h"

#define ITEMS_MAX 1000u

struct job {
    atomic_uint calls[ITEMS_MAX];
    atomic_uint wrong_threads;
    uint32_t threads;
};

static void count_item(void *arg, uint32_t item, uint32_t thread) {
    struct job *job = arg;
    atomic_fetch_add(&job->calls[item], 1);
    if (thread >= job->threads)
        atomic_fetch_add(&job->wrong_threads, 1);
}

static void test_every_item_once(void) {
    static struct job job;
    for (uint32_t threads = 1; threads <= 5; threads += 2) {
        struct kvt_pool *pool;
        CU_ASSERT_EQUAL_FATAL(kvt_pool_open(&pool, threads), 0);
        CU_ASSERT_EQUAL(kvt_pool_threads(pool), threads);
        uint32_t wrong = 0;
        for (uint32_t round = 0; round < 3000; round++) {
            uint32_t items = round % 7 ? round % 13 : round % ITEMS_MAX;
            memset(&job, 0, sizeof(job));
            job.threads = threads;
            kvt_pool_run(pool, items, count_item, &job);
            for (uint32_t i = 0; i < ITEMS_MAX; i++)
                wrong += job.calls[i] != (i < items);
            wrong += job.wrong_threads;
            if (round % 1000 == 0) { /* long enough for the members to fall asleep */
                const struct timespec pause = {0, 5000000};
                clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
            }
        }
        CU_ASSERT_EQUAL(wrong, 0);
        kvt_pool_close(pool);
    }
    kvt_pool_close(NULL);
}

static void test_close_while_idle(void) {
    for (int i = 0; i < 200; i++) {
        struct kvt_pool *pool;
        CU_ASSERT_EQUAL_FATAL(kvt_pool_open(&pool, 3), 0);
        kvt_pool_close(pool);
    }
    CU_ASSERT(kvt_pool_cpu_count() >= 1);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"every item once", test_every_item_once},
        {"close while idle", test_close_while_idle},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("pool", tests);
}
