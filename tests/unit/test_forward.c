/*
 * The forward pass over the seam of kv.h: equal bits whatever the cut; what happens
 * to a step that is aborted, rows that are repeated or cropped, a seam that lies.
 */
#include "client/worker/forward.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/errors.h"
#include "tests/support/cunit_run.h"

#define TOKENS_MAX 1200u

static struct kvt_model *model;
static struct kvt_pool *pool;
static char err[512];

static struct run_kv *open_kv(uint32_t rows, uint32_t rows_max, uint32_t piece_tokens) {
    const struct kvt_model_shape *s = &model->shape;
    const struct run_kv_shape shape = {s->layers, s->kv_heads, s->k_dim,   s->v_dim,  KVT_KV_F16,
                                       rows,      rows_max,    TOKENS_MAX, TOKENS_MAX};
    struct run_kv *kv = NULL;
    CU_ASSERT_EQUAL_FATAL(run_kv_local_open(&kv, &shape, piece_tokens, err, sizeof(err)), 0);
    return kv;
}

static struct kvt_forward *open_forward(const volatile sig_atomic_t *interrupted) {
    struct kvt_forward *forward = NULL;
    CU_ASSERT_EQUAL_FATAL(kvt_forward_open(&forward, model, pool, KVT_KV_F16, interrupted), 0);
    return forward;
}

/* One step of its own; the ids are a function of position and row. */
static int step(struct kvt_forward *forward, struct run_kv *kv, uint32_t rows,
                const uint32_t *counts, const float **logits) {
    static uint32_t ids[4 * TOKENS_MAX];
    uint32_t total = 0;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < counts[r]; i++)
            ids[total++] = (31 * (kv->ops->length(kv, r) + i) + 7 * r) % model->shape.vocabulary;
    const struct kvt_step_tokens tokens = {rows, counts, ids, true};
    int rc = kv->ops->begin(kv, counts, rows, 1);
    return rc < 0 ? rc : kvt_forward_step(forward, kv, &tokens, logits);
}

static void test_cut_leaves_bits_alone(void) {
    static const uint32_t cuts[] = {0, 256, 512, 1024};
    static const uint32_t steps[][2] = {{300, 10}, {300, 250}, {1, 1}, {3, 0}, {1, 200}, {0, 1}};
    size_t bytes = 2 * model->shape.vocabulary * sizeof(float);
    float *first = calloc(6, bytes);
    for (size_t c = 0; c < 4; c++) {
        struct kvt_forward *forward = open_forward(NULL);
        struct run_kv *kv = open_kv(2, 2, cuts[c]);
        for (size_t i = 0; i < 6; i++) {
            const float *logits = NULL;
            CU_ASSERT_EQUAL_FATAL(step(forward, kv, 2, steps[i], &logits), 0);
            for (uint32_t r = 0; r < 2; r++) {
                const float *row = logits + r * model->shape.vocabulary;
                char *at = (char *)first + i * bytes + r * bytes / 2;
                if (steps[i][r] == 0)
                    continue;
                if (c == 0)
                    memcpy(at, row, bytes / 2);
                CU_ASSERT_EQUAL(memcmp(at, row, bytes / 2), 0);
                CU_ASSERT(isfinite(row[0]));
            }
        }
        CU_ASSERT_EQUAL(kv->ops->length(kv, 0), 605);
        CU_ASSERT_EQUAL(kv->ops->length(kv, 1), 462);
        kv->ops->close(kv);
        kvt_forward_close(forward);
    }
    free(first);
}

/* Tokens one by one or at once: the same up to rounding, so positions and masks are right. */
static void test_chunks_agree(void) {
    struct kvt_forward *forward = open_forward(NULL);
    struct run_kv *one = open_kv(1, 1, 0);
    struct run_kv *many = open_kv(1, 1, 0);
    const float *logits = NULL;
    const uint32_t single = 1;
    const uint32_t all = 270;
    float *wanted = malloc(model->shape.vocabulary * sizeof(*wanted));
    for (uint32_t i = 0; i < all; i++)
        CU_ASSERT_EQUAL_FATAL(step(forward, one, 1, &single, &logits), 0);
    memcpy(wanted, logits, model->shape.vocabulary * sizeof(*wanted));
    CU_ASSERT_EQUAL_FATAL(step(forward, many, 1, &all, &logits), 0);
    double worst = 0;
    for (uint32_t i = 0; i < model->shape.vocabulary; i++)
        worst = fabs(logits[i] - wanted[i]) <= worst ? worst : fabs(logits[i] - wanted[i]);
    CU_ASSERT(worst < 2e-3); /* f16 K and V: a different rounding of some of them */
    free(wanted);
    one->ops->close(one);
    many->ops->close(many);
    kvt_forward_close(forward);
}

/* A step given up leaves the length as it was, and going on gives what it gives without it. */
static void test_abort_and_go_on(void) {
    volatile sig_atomic_t interrupted = 0;
    struct kvt_forward *forward = open_forward(&interrupted);
    struct run_kv *kv = open_kv(1, 1, 256);
    struct run_kv *calm = open_kv(1, 1, 256);
    const uint32_t first = 300;
    const uint32_t second = 20;
    const float *logits = NULL;
    float *wanted = malloc(model->shape.vocabulary * sizeof(*wanted));
    CU_ASSERT_EQUAL(step(forward, calm, 1, &first, &logits), 0);
    CU_ASSERT_EQUAL(step(forward, calm, 1, &second, &logits), 0);
    memcpy(wanted, logits, model->shape.vocabulary * sizeof(*wanted));

    CU_ASSERT_EQUAL(step(forward, kv, 1, &first, &logits), 0);
    interrupted = 1;
    CU_ASSERT_EQUAL(step(forward, kv, 1, &second, &logits), -KVT_EABORTED);
    CU_ASSERT_STRING_EQUAL(kv->why, "interrupted");
    CU_ASSERT_EQUAL(kv->ops->length(kv, 0), first);
    interrupted = 0;
    CU_ASSERT_EQUAL(step(forward, kv, 1, &second, &logits), 0);
    CU_ASSERT_EQUAL(memcmp(wanted, logits, model->shape.vocabulary * sizeof(*wanted)), 0);
    free(wanted);
    kv->ops->close(kv);
    calm->ops->close(calm);
    kvt_forward_close(forward);
}

static void test_repeat_and_crop(void) {
    struct kvt_forward *forward = open_forward(NULL);
    struct run_kv *kv = open_kv(1, 3, 0);
    const uint32_t prompt = 260;
    const uint32_t ones[] = {1, 1, 1};
    const float *logits = NULL;
    CU_ASSERT_EQUAL(step(forward, kv, 1, &prompt, &logits), 0);
    CU_ASSERT_EQUAL(kv->ops->repeat(kv, 4), -KVT_EINVAL);
    CU_ASSERT_EQUAL(kv->ops->repeat(kv, 3), 0);
    CU_ASSERT_EQUAL(kv->ops->length(kv, 2), prompt);
    /* ids differ by row: what one row appends is not seen by another */
    CU_ASSERT_EQUAL(step(forward, kv, 3, ones, &logits), 0);
    size_t bytes = model->shape.vocabulary * sizeof(float);
    float *before = malloc(3 * bytes);
    memcpy(before, logits, 3 * bytes);
    CU_ASSERT_NOT_EQUAL(memcmp(before, (char *)before + bytes, bytes), 0);
    for (uint32_t r = 0; r < 3; r++)
        CU_ASSERT_EQUAL(kv->ops->crop(kv, r, prompt), 0);
    CU_ASSERT_EQUAL(kv->ops->crop(kv, 0, prompt + 1), -KVT_EINVAL);
    CU_ASSERT_EQUAL(step(forward, kv, 3, ones, &logits), 0);
    CU_ASSERT_EQUAL(memcmp(before, logits, 3 * bytes), 0);
    free(before);
    kv->ops->close(kv);
    kvt_forward_close(forward);
}

static void test_errors(void) {
    struct kvt_forward *forward = open_forward(NULL);
    struct run_kv *kv = open_kv(1, 1, 0);
    const float *logits = NULL;
    uint32_t count = TOKENS_MAX + 1;
    CU_ASSERT_EQUAL(kv->ops->begin(kv, &count, 1, 1), -KVT_EQUOTA);
    CU_ASSERT_PTR_NOT_NULL(strstr(kv->why, "row 0 would hold 1201 tokens"));
    count = 1;
    CU_ASSERT_EQUAL(kv->ops->begin(kv, &count, 1, TOKENS_MAX + 1), -KVT_EQUOTA);
    CU_ASSERT_EQUAL(kv->ops->begin(kv, &count, 1, 1), 1);
    uint32_t id = model->shape.vocabulary;
    const struct kvt_step_tokens tokens = {1, &count, &id, true};
    CU_ASSERT_EQUAL(kvt_forward_step(forward, kv, &tokens, &logits), -KVT_EINVAL);
    CU_ASSERT_PTR_NOT_NULL(strstr(kv->why, "is not in the vocabulary"));
    CU_ASSERT_EQUAL(kv->ops->length(kv, 0), 0);
    kv->ops->close(kv);
    kvt_forward_close(forward);
}

/* A seam that leaves a layer out, or appends more than there is: an error, no crash. */
static struct run_kv *honest;
static int lie; /* 1: skips a layer, 2: appends too much, 3: goes on behind the last layer */

static int lying_begin(struct run_kv *kv, const uint32_t *counts, uint32_t rows, uint32_t steps) {
    (void)kv;
    return honest->ops->begin(honest, counts, rows, steps);
}

static int lying_next(struct run_kv *kv, struct run_kv_piece *piece) {
    static struct kvt_attention_run run;
    (void)kv;
    int rc = honest->ops->next(honest, piece);
    if (rc == 1 && lie == 1 && piece->layer == 1)
        rc = honest->ops->next(honest, piece);
    if (rc == 1 && lie == 2) {
        run = piece->runs[0];
        run.append_count++;
        piece->runs = &run;
    }
    if (rc == 0 && lie == 3) {
        piece->layer = model->shape.layers;
        return 1;
    }
    return rc;
}

static int lying_nothing(struct run_kv *kv, const struct run_kv_piece *piece) {
    (void)kv;
    (void)piece;
    return 0;
}

static void lying_abort(struct run_kv *kv) {
    (void)kv;
    honest->ops->abort(honest);
}

static uint32_t lying_length(const struct run_kv *kv, uint32_t row) {
    (void)kv;
    return honest->ops->length(honest, row);
}

static void test_lying_seam(void) {
    static const struct run_kv_ops ops = {.begin = lying_begin,
                                          .next = lying_next,
                                          .wait = lying_nothing,
                                          .done = lying_nothing,
                                          .abort = lying_abort,
                                          .length = lying_length};
    static const char *const says[] = {"", "no piece of layer 1", "does not have",
                                       "goes on behind the last layer"};
    struct run_kv liar = {.ops = &ops};
    struct kvt_forward *forward = open_forward(NULL);
    honest = open_kv(1, 1, 0);
    for (lie = 1; lie <= 3; lie++) {
        const uint32_t count = 3;
        const float *logits = NULL;
        CU_ASSERT_EQUAL(step(forward, &liar, 1, &count, &logits), -KVT_EPROTO);
        CU_ASSERT_PTR_NOT_NULL(strstr(liar.why, says[lie]));
    }
    honest->ops->close(honest);
    kvt_forward_close(forward);
}

/* 73 GB of weights: one set for all layers, unless the machine could hold twice that. */
static void test_layers_share_what_does_not_fit(void) {
    uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    struct kvt_model *large = NULL;
    if (memory / 2 > (uint64_t)70 << 30)
        return;
    CU_ASSERT_EQUAL_FATAL(kvt_model_random(&large, "smollm2-1.7b", 1024, 1, err, sizeof(err)), 0);
    CU_ASSERT(large->shares_layers);
    CU_ASSERT(kvt_model_bytes(large) < (uint64_t)1 << 30);
    CU_ASSERT_PTR_EQUAL(large->layers[1023].down.data, large->layers[0].down.data);
    CU_ASSERT_PTR_NOT_EQUAL(large->layers[1023].feed_norm, large->layers[0].feed_norm);
    CU_ASSERT(!model->shares_layers);
    kvt_model_close(large);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"the cut leaves the bits alone", test_cut_leaves_bits_alone},
        {"chunks agree", test_chunks_agree},
        {"abort and go on", test_abort_and_go_on},
        {"repeat and crop", test_repeat_and_crop},
        {"errors", test_errors},
        {"a lying seam", test_lying_seam},
        {"layers share what does not fit", test_layers_share_what_does_not_fit},
        CU_TEST_INFO_NULL,
    };
    if (kvt_model_random(&model, "tiny", 0, 1, err, sizeof(err)) || kvt_pool_open(&pool, 2))
        return 1;
    int status = kvt_cunit_run("forward", tests);
    kvt_pool_close(pool);
    kvt_model_close(model);
    return status;
}
