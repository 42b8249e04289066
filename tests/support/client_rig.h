/* A client attached to a fake daemon, with one cache and one schedule: what test_client_step.c and
 * test_client_calls.c share. */
#ifndef KVT_TESTS_CLIENT_RIG_H
#define KVT_TESTS_CLIENT_RIG_H

#include "client/kvtier.h"
#include "client/lib/client.h"
#include "tests/support/cunit_run.h"
#include "tests/support/fake_daemon.h"

#include <stdlib.h>
#include <string.h>

#define EXTENT_BYTES 65536

static struct fake_daemon fake;
static struct kvt_client *client;
static uint32_t cache;
static uint8_t *memory; /* extent 100 */

/* K 8 bytes, V 4 bytes a token; layer 1 has no V. */
static const struct kvt_layer_shape layers[2] = {
    {.kind = KVT_KIND_FULL,
     .kv_heads = 1,
     .k_head_dim = 4,
     .v_head_dim = 2,
     .dtype = KVT_DTYPE_F16},
    {.kind = KVT_KIND_FULL,
     .kv_heads = 1,
     .k_head_dim = 4,
     .v_head_dim = 0,
     .dtype = KVT_DTYPE_F16},
};

static inline void begin_test(int worker) {
    struct kvt_attach_options a = {.worker = worker};
    struct kvt_cache_create_options o = {.layers = layers,
                                         .layer_count = 2,
                                         .mode = KVT_OFFLOADED,
                                         .rows = 2,
                                         .resident_layers_max = -1};
    fake_start(&fake);
    a.runtime_dir = fake.dir;
    CU_ASSERT_EQUAL_FATAL(kvt_attach(&a, &client), 0);
    CU_ASSERT_EQUAL_FATAL(kvt_cache_create(client, &o, &cache), 0);
    fake_sync(&fake);
    memory = fake_extent(&fake, 100, EXTENT_BYTES);
}

static inline void end_test(void) {
    kvt_detach(client);
    fake_stop(&fake);
}

static inline bool message_has(const char *what) {
    bool has = strstr(kvt_error_message(client), what) != NULL;
    if (!has) {
        (void)printf("\n    message: %s\n", kvt_error_message(client));
    }
    return has;
}

/* Two equal steps; layer 0 streamed in two pieces, layer 1 resident. Both rows share the first ten
 * tokens; row 1 appends one. */
static inline struct fake_schedule two_steps(void) {
    struct fake_schedule s = {
        .cache = 1,
        .first_step = 10,
        .steps_count = 2,
        .steps = {{.step = 10, .piece_first = 0, .piece_count = 3},
                  {.step = 11, .piece_first = 3, .piece_count = 3}},
        .pieces_count = 6,
        .runs_count = 3,
        .runs = {{.row_first = 0, .row_count = 2, .read_count = 10, .k_offset = 0, .v_offset = 80},
                 {.row_first = 1,
                  .row_count = 1,
                  .token_begin = 10,
                  .append_count = 1,
                  .k_offset = 256,
                  .v_offset = 264},
                 {.row_first = 0, .row_count = 2, .read_count = 10, .k_offset = 512}},
        .rows_count = 2,
        .rows = {0, 1},
    };
    for (uint32_t i = 0; i < 6; i += 3) {
        uint64_t generation = 1 + i / 3;
        s.pieces[i] = (struct kvt_sched_piece){.flags = KVT_PIECE_STREAMED,
                                               .slot = 0,
                                               .extent = 100,
                                               .run_first = 0,
                                               .run_count = 1,
                                               .ready = generation,
                                               .done = generation};
        s.pieces[i + 1] = (struct kvt_sched_piece){.flags = KVT_PIECE_STREAMED | KVT_PIECE_LAST,
                                                   .slot = 1,
                                                   .extent = 100,
                                                   .run_first = 1,
                                                   .run_count = 1,
                                                   .ready = generation,
                                                   .done = generation};
        s.pieces[i + 2] = (struct kvt_sched_piece){.layer = 1,
                                                   .reader = 1,
                                                   .last_reader = 1,
                                                   .flags = KVT_PIECE_LAST,
                                                   .extent = 100,
                                                   .run_first = 2,
                                                   .run_count = 1};
    }
    return s;
}

static inline struct kvt_step *begin(const struct fake_schedule *schedule) {
    static const struct kvt_step_row rows[2] = {{0, 0}, {1, 1}};
    struct kvt_step *s = NULL;
    fake_schedule(&fake, schedule, 2, 10);
    CU_ASSERT_EQUAL_FATAL(kvt_step_begin(client, cache, rows, 2, 0, 2, &s), 0);
    return s;
}

static inline void post_all(uint64_t generation) {
    fake_post(&fake.page->ready[0], generation);
    fake_post(&fake.page->ready[1], generation);
}

static inline void walk(struct kvt_step *s) {
    const struct kvt_piece *p;
    int rc;
    while ((rc = kvt_step_piece(s, &p)) == 1) {
        CU_ASSERT_EQUAL(kvt_piece_wait(s, p), 0);
        CU_ASSERT_EQUAL(kvt_piece_done(s, p), 0);
    }
    CU_ASSERT_EQUAL(rc, 0);
}

struct late {
    struct kvt_counter *counter;
    uint64_t value;
    uint32_t code; /* not 0: `failed` is set first */
};

static inline void *post_late(void *argument) {
    struct late *l = argument;
    fake_sleep_ms(30);
    if (l->code != 0) {
        __atomic_store_n(&fake.page->failed.aux, l->code, __ATOMIC_SEQ_CST);
        fake_post(&fake.page->failed, 10);
    }
    fake_post(l->counter, l->value);
    return NULL;
}

#endif
