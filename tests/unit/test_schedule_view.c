/* Every index and offset of a schedule, wrong once: an error with a sentence, never a wild pointer. */
#include "client/lib/schedule_view.h"
#include "tests/support/cunit_run.h"
#include "tests/support/fake_daemon.h"

#include <string.h>

#define RING 8192

static const struct kvt_layer_shape layers[2] = {
    {.kind = KVT_KIND_FULL,
     .kv_heads = 2,
     .k_head_dim = 8,
     .v_head_dim = 4,
     .dtype = KVT_DTYPE_F16},
    {.kind = KVT_KIND_FULL,
     .kv_heads = 1,
     .k_head_dim = 4,
     .v_head_dim = 0,
     .dtype = KVT_DTYPE_F32},
};
static const struct kvt_schedule_shape shape = {.worker = KVT_SEGMENT,
                                                .cache = 9,
                                                .layer_count = 2,
                                                .row_count = 2,
                                                .step_row_count = 2,
                                                .layers = layers};
static uint8_t ring[RING] __attribute__((aligned(8)));
static char text[KVT_TEXT_BYTES];

static struct fake_schedule good(void) {
    return (struct fake_schedule){
        .cache = 9,
        .first_step = 40,
        .steps_count = 2,
        .steps = {{.step = 40, .piece_first = 0, .piece_count = 2},
                  {.step = 41, .piece_first = 2, .piece_count = 1}},
        .moves_count = 1,
        .moves = {{.source_extent = 1, .target_extent = 1, .target_offset = 64, .bytes = 64}},
        .pieces_count = 3,
        .pieces = {{.layer = 0,
                    .reader = 0,
                    .last_reader = 1,
                    .flags = KVT_PIECE_STREAMED,
                    .slot = 3,
                    .ready = 7,
                    .done = 7,
                    .run_first = 0,
                    .run_count = 2,
                    .move_count = 1},
                   {.layer = 0, .reader = 1, .last_reader = 1, .run_count = 1},
                   {.layer = 1, .reader = 1, .last_reader = 1}},
        .runs_count = 2,
        .runs = {{.row_first = 0, .row_count = 2, .read_count = 10},
                 {.row_first = 1, .row_count = 1, .token_begin = 10, .append_count = 1}},
        .rows_count = 2,
        .rows = {0, 1},
    };
}

static int open_it(const struct fake_schedule *s, struct kvt_schedule_view *v) {
    memset(ring, 0, sizeof ring);
    uint32_t bytes = fake_schedule_write(s, ring + 16);
    return kvt_schedule_view_open(v, &shape, ring, RING, 16, bytes, text);
}

static void test_good(void) {
    struct fake_schedule s = good();
    struct kvt_schedule_view v;
    struct kvt_sched_step step;
    struct kvt_sched_move move;
    struct kvt_sched_piece piece;
    struct kvt_sched_run run;
    const uint32_t *rows;
    CU_ASSERT_EQUAL_FATAL(open_it(&s, &v), 0);
    CU_ASSERT_EQUAL(kvt_schedule_view_step(&v, 1, &step, text), 0);
    CU_ASSERT_EQUAL(step.step, 41);
    CU_ASSERT_EQUAL(kvt_schedule_view_move(&v, 0, &move, text), 0);
    CU_ASSERT_EQUAL(move.bytes, 64);
    CU_ASSERT_EQUAL(kvt_schedule_view_piece(&v, 0, &piece, text), 0);
    CU_ASSERT_EQUAL(piece.slot, 3);
    CU_ASSERT_EQUAL(kvt_schedule_view_run(&v, 1, &run, &rows, text), 0);
    CU_ASSERT_EQUAL(rows[0], 1);
    /* One beyond each array. */
    CU_ASSERT_EQUAL(kvt_schedule_view_step(&v, 2, &step, text), -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_schedule_view_move(&v, 1, &move, text), -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_schedule_view_piece(&v, 3, &piece, text), -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_schedule_view_run(&v, 2, &run, &rows, text), -KVT_EPROTO);
}

/* Changes one 32-bit word of the header and expects a refusal that says `what`. */
static void header_wrong(size_t offset, uint32_t value, const char *what) {
    struct fake_schedule s = good();
    struct kvt_schedule_view v;
    memset(ring, 0, sizeof ring);
    uint32_t bytes = fake_schedule_write(&s, ring + 16);
    memcpy(ring + 16 + offset, &value, sizeof value);
    text[0] = '\0';
    CU_ASSERT_EQUAL(kvt_schedule_view_open(&v, &shape, ring, RING, 16, bytes, text), -KVT_EPROTO);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, what));
}

#define H(field) offsetof(struct kvt_sched_header, field)

static void test_header(void) {
    header_wrong(H(magic), 1, "magic");
    header_wrong(H(version), 2, "version 2");
    header_wrong(H(bytes), 71, "71 bytes");
    header_wrong(H(bytes), RING, "bytes");
    header_wrong(H(cache), 8, "cache 8");
    header_wrong(H(steps_count), 0, "0 steps");
    header_wrong(H(steps_count), 65, "65 steps");
    header_wrong(H(moves_leading), 2, "2 leading moves of 1");
    header_wrong(H(moves_count), 0x10000000, "moves");
    header_wrong(H(pieces_count), UINT32_MAX, "pieces");
    header_wrong(H(runs_count), 1000000, "runs");
    header_wrong(H(rows_count), UINT32_MAX, "rows");
    header_wrong(H(steps_offset), 0, "steps");
    header_wrong(H(steps_offset), UINT32_MAX - 7, "steps");
    header_wrong(H(pieces_offset), 76, "pieces");
    header_wrong(H(rows_offset), 74, "rows");
}

static void test_place_in_ring(void) {
    struct fake_schedule s = good();
    struct kvt_schedule_view v;
    uint32_t bytes = fake_schedule_write(&s, ring + 16);
    CU_ASSERT_EQUAL(kvt_schedule_view_open(&v, &shape, ring, RING, RING - 8, bytes, text),
                    -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_schedule_view_open(&v, &shape, ring, RING, UINT64_MAX - 7, 100, text),
                    -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_schedule_view_open(&v, &shape, ring, RING, 16, UINT64_MAX, text),
                    -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_schedule_view_open(&v, &shape, ring, RING, 17, bytes, text), -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_schedule_view_open(&v, &shape, ring, RING, 16, 71, text), -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_schedule_view_open(&v, &shape, ring, RING, 16, bytes - 1, text),
                    -KVT_EPROTO);
}

static int step_of(const struct fake_schedule *s) {
    struct kvt_schedule_view v;
    struct kvt_sched_step out;
    int rc = open_it(s, &v);
    return rc != 0 ? rc : kvt_schedule_view_step(&v, 0, &out, text);
}

static void test_steps(void) {
    struct fake_schedule s = good();
    s.steps[0].step = 39;
    CU_ASSERT_EQUAL(step_of(&s), -KVT_EPROTO);
    s = good();
    s.steps[0].piece_first = 4;
    CU_ASSERT_EQUAL(step_of(&s), -KVT_EPROTO);
    s = good();
    s.steps[0].piece_count = UINT32_MAX;
    CU_ASSERT_EQUAL(step_of(&s), -KVT_EPROTO);
}

static int piece_of(const struct fake_schedule *s) {
    struct kvt_schedule_view v;
    struct kvt_sched_piece out;
    int rc = open_it(s, &v);
    return rc != 0 ? rc : kvt_schedule_view_piece(&v, 0, &out, text);
}

static void test_pieces(void) {
#define PIECE_WRONG(field, value)                   \
    do {                                            \
        struct fake_schedule s = good();            \
        s.pieces[0].field = value;                  \
        CU_ASSERT_EQUAL(piece_of(&s), -KVT_EPROTO); \
    } while (0)
    PIECE_WRONG(layer, 2);
    PIECE_WRONG(layer, 1); /* above its reader */
    PIECE_WRONG(last_reader, 2);
    PIECE_WRONG(reader, 2);
    PIECE_WRONG(slot, KVT_SLOTS_MAX);
    PIECE_WRONG(ready, KVT_POISON);
    PIECE_WRONG(done, UINT64_MAX);
    PIECE_WRONG(run_first, 3);
    PIECE_WRONG(run_count, 3);
    PIECE_WRONG(run_count, UINT32_MAX);
    PIECE_WRONG(move_first, 2);
    PIECE_WRONG(move_count, 2);
    struct fake_schedule s = good();
    s.pieces[0].slot = KVT_SLOTS_MAX; /* means nothing without STREAMED */
    s.pieces[0].flags = 0;
    CU_ASSERT_EQUAL(piece_of(&s), 0);
}

static int run_of(const struct fake_schedule *s, uint32_t index) {
    struct kvt_schedule_view v;
    struct kvt_sched_run out;
    const uint32_t *rows;
    int rc = open_it(s, &v);
    return rc != 0 ? rc : kvt_schedule_view_run(&v, index, &out, &rows, text);
}

static void test_runs(void) {
#define RUN_WRONG(index, field, value)                   \
    do {                                                 \
        struct fake_schedule s = good();                 \
        s.runs[index].field = value;                     \
        CU_ASSERT_EQUAL(run_of(&s, index), -KVT_EPROTO); \
    } while (0)
    RUN_WRONG(0, row_first, 1);
    RUN_WRONG(0, row_first, UINT32_MAX);
    RUN_WRONG(0, row_count, 0);
    RUN_WRONG(0, row_count, UINT32_MAX);
    RUN_WRONG(0, append_count, 1); /* two rows at once */
    RUN_WRONG(1, token_begin, UINT32_MAX);
    RUN_WRONG(1, append_count, KVT_TOKENS_MAX);
    struct fake_schedule s = good();
    s.rows[1] = 2;
    CU_ASSERT_EQUAL(run_of(&s, 0), -KVT_EPROTO);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "row is 2; the cache has 2"));
}

/* Layer 0: K 32 bytes a token, V 16. Layer 1: K 16, no V. */
static void test_run_fits(void) {
    struct fake_schedule s = good();
    struct kvt_schedule_view v;
    struct kvt_sched_piece p = s.pieces[0];
    struct kvt_sched_run r = {.row_count = 1, .read_count = 3, .append_count = 1};
    CU_ASSERT_EQUAL_FATAL(open_it(&s, &v), 0);
    r.v_offset = 128;
    CU_ASSERT_EQUAL(kvt_schedule_run_fits(&v, &p, &r, 192, text), 0);
    CU_ASSERT_EQUAL(kvt_schedule_run_fits(&v, &p, &r, 191, text), -KVT_EPROTO);
    r.k_offset = 66;
    CU_ASSERT_EQUAL(kvt_schedule_run_fits(&v, &p, &r, 192, text), -KVT_EPROTO);
    r.k_offset = 1; /* not a whole element */
    CU_ASSERT_EQUAL(kvt_schedule_run_fits(&v, &p, &r, 4096, text), -KVT_EPROTO);
    r.k_offset = UINT64_MAX - 1;
    CU_ASSERT_EQUAL(kvt_schedule_run_fits(&v, &p, &r, 4096, text), -KVT_EPROTO);
    r.k_offset = 0;
    r.v_offset = UINT64_MAX; /* no V: it does not matter */
    p.layer = 1;
    CU_ASSERT_EQUAL(kvt_schedule_run_fits(&v, &p, &r, 64, text), 0);
}

static void test_planes_fit(void) {
    struct fake_schedule s = good();
    struct kvt_schedule_view v;
    struct kvt_sched_piece p = {
        .token_capacity = 4, .k_row_bytes = 128, .v_offset = 256, .v_row_bytes = 64};
    CU_ASSERT_EQUAL_FATAL(open_it(&s, &v), 0);
    CU_ASSERT_EQUAL(kvt_schedule_planes_fit(&v, &p, 384, text), 0);
    CU_ASSERT_EQUAL(kvt_schedule_planes_fit(&v, &p, 383, text), -KVT_EPROTO);
    p.k_row_bytes = 127; /* rows would overlap */
    CU_ASSERT_EQUAL(kvt_schedule_planes_fit(&v, &p, 384, text), -KVT_EPROTO);
    p.k_row_bytes = UINT64_MAX;
    CU_ASSERT_EQUAL(kvt_schedule_planes_fit(&v, &p, 384, text), -KVT_EPROTO);
    p.k_row_bytes = 128;
    p.token_capacity = UINT32_MAX;
    CU_ASSERT_EQUAL(kvt_schedule_planes_fit(&v, &p, 384, text), -KVT_EPROTO);
}

static void test_move_fits(void) {
    struct kvt_sched_move m = {
        .source_extent = 1, .target_extent = 1, .target_offset = 64, .bytes = 64};
    CU_ASSERT_EQUAL(kvt_schedule_move_fits(&m, 128, 128, text), 0);
    CU_ASSERT_EQUAL(kvt_schedule_move_fits(&m, 128, 127, text), -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_schedule_move_fits(&m, 63, 128, text), -KVT_EPROTO);
    m.target_offset = 63; /* overlaps */
    CU_ASSERT_EQUAL(kvt_schedule_move_fits(&m, 128, 128, text), -KVT_EPROTO);
    m.target_extent = 2;
    CU_ASSERT_EQUAL(kvt_schedule_move_fits(&m, 128, 128, text), 0);
    m.source_offset = UINT64_MAX;
    CU_ASSERT_EQUAL(kvt_schedule_move_fits(&m, 128, 128, text), -KVT_EPROTO);
}

int main(void) {
    CU_TestInfo tests[] = {{"a good one", test_good},
                           {"header", test_header},
                           {"place in the ring", test_place_in_ring},
                           {"steps", test_steps},
                           {"pieces", test_pieces},
                           {"runs", test_runs},
                           {"runs against extents", test_run_fits},
                           {"planes against extents", test_planes_fit},
                           {"moves against extents", test_move_fits},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("schedule view", tests);
}
