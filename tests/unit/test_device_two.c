/* Two devices at once, each with a worker beside it; and that no store of a worker is lost. */
#include "proto/errors.h"
#include "tests/support/act_driver.h"
#include "tests/support/cunit_run.h"
#include "tests/support/device_rig.h"
#include "tiers/device/counter.h"
#include "tiers/host/bell.h"

#include <CUnit/Basic.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MIB (UINT64_C(1) << 20)

struct side {
    struct kvt_rig rig;
    struct kvt_rig_stream stream;
    struct kvt_control_page *page;
    uint8_t *slots;
    uint32_t spin_us; /* of the worker */
    bool dawdles;     /* the worker answers a little later each time */
    uint32_t wrong_pieces;
    uint32_t wrong_events;
    pthread_t worker;
    pthread_t loop;
};

static void *side_work(void *argument) {
    struct side *x = argument;
    const struct kvt_rig_stream *s = &x->stream;
    for (uint32_t i = 0; i < s->pieces; i++) {
        uint32_t slot = i % s->slots;
        kvt_rig_counter_wait(&x->page->ready[slot], KVT_RIG_GENERATION(s, i), x->spin_us);
        x->wrong_pieces +=
            memcmp(x->slots + slot * kvt_rig_slot_bytes(s),
                   x->rig.arena + i % s->distinct * s->piece_bytes, s->piece_bytes) != 0;
        for (volatile uint32_t turn = 0; x->dawdles && turn < i % 1024;) {
            turn = turn + 1;
        }
        kvt_counter_post(&x->page->done[slot], KVT_RIG_GENERATION(s, i));
    }
    kvt_counter_post(&x->page->step, 1);
    return NULL;
}

static void *side_loop(void *argument) {
    struct side *x = argument;
    kvt_rig_open(&x->rig, x->stream.session, x->page);
    kvt_rig_submit(&x->rig, kvt_rig_stream_program(&x->stream));
    for (uint32_t i = 0; i < KVT_RIG_STREAM_OPS(&x->stream); i++) {
        struct kvt_device_event e = kvt_rig_event(&x->rig);
        x->wrong_events += e.kind != KVT_DEVICE_COMPLETION || e.completion.status != KVT_DONE;
    }
    x->wrong_events += kvt_rig_close(&x->rig, x->stream.session) != 0;
    return NULL;
}

static void test_two_devices(void) {
    static struct side sides[2];
    for (unsigned i = 0; i < 2; i++) {
        struct side *x = &sides[i];
        *x = (struct side){.stream = {.session = i,
                                      .extent = 3 + i,
                                      .slots = 2 + i,
                                      .pieces = 300,
                                      .distinct = 5,
                                      .piece_bytes = i ? 3000 : 200000}};
        kvt_rig_start(&x->rig, &(struct kvt_rig_config){.ops = &kvt_cpu_driver_ops,
                                                        .arena_bytes = 2 * MIB,
                                                        .budget_bytes = MIB,
                                                        .copy_threads = 1});
        for (uint64_t b = 0; b < MIB; b++) {
            x->rig.arena[b] = (uint8_t)(b * (3 + i) >> 8 ^ b);
        }
        x->page = kvt_rig_page();
        x->slots = kvt_rig_extent(&x->rig, x->stream.extent, 512 << 10);
    }
    for (unsigned i = 0; i < 2; i++) {
        CU_ASSERT_EQUAL_FATAL(pthread_create(&sides[i].worker, NULL, side_work, &sides[i]), 0);
        CU_ASSERT_EQUAL_FATAL(pthread_create(&sides[i].loop, NULL, side_loop, &sides[i]), 0);
    }
    for (unsigned i = 0; i < 2; i++) {
        pthread_join(sides[i].worker, NULL);
        pthread_join(sides[i].loop, NULL);
        CU_ASSERT_EQUAL(sides[i].wrong_pieces, 0);
        CU_ASSERT_EQUAL(sides[i].wrong_events, 0);
        munmap(sides[i].slots, 512 << 10);
        kvt_rig_page_free(sides[i].page);
        kvt_rig_stop(&sides[i].rig);
    }
}

/* The copy thread sleeps after each piece, and nothing but the worker's store wakes it, which comes
 * at every moment of the way into that sleep. */
static void no_store_is_lost(bool can_sleep) {
    static struct side x;
    memset(&kvt_act, 0, sizeof(kvt_act));
    kvt_act.can_sleep = can_sleep;
    kvt_act.patient = true;
    x = (struct side){.spin_us = 50,
                      .dawdles = true,
                      .stream = {.session = 1,
                                 .extent = 2,
                                 .slots = 1,
                                 .pieces = 30000,
                                 .distinct = 5,
                                 .piece_bytes = 64}};
    kvt_rig_start(&x.rig, &(struct kvt_rig_config){.ops = &kvt_act_driver_ops,
                                                   .arena_bytes = MIB,
                                                   .budget_bytes = MIB,
                                                   .copy_threads = 1});
    x.page = kvt_rig_page();
    x.slots = kvt_rig_extent(&x.rig, 2, 4096);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&x.worker, NULL, side_work, &x), 0);
    side_loop(&x);
    pthread_join(x.worker, NULL);
    CU_ASSERT_EQUAL(x.wrong_pieces, 0);
    CU_ASSERT_EQUAL(x.wrong_events, 0);
    CU_ASSERT_EQUAL(__atomic_load_n(&kvt_act.waits, __ATOMIC_RELAXED) > 0, can_sleep);
    munmap(x.slots, 4096);
    kvt_rig_page_free(x.page);
    kvt_rig_stop(&x.rig);
}

static void test_no_store_is_lost(void) {
    no_store_is_lost(true);
}

/* Then nothing wakes it but the next look, which must come. */
static void test_no_store_is_lost_by_a_driver_that_cannot_sleep(void) {
    no_store_is_lost(false);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"two devices", test_two_devices},
        {"no store is lost", test_no_store_is_lost},
        {"no store is lost by a driver that cannot sleep",
         test_no_store_is_lost_by_a_driver_that_cannot_sleep},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("device_two", tests);
}
