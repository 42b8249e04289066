/*
 * Attention over pieces: against a plain double-precision loop, and bit for bit
 * against itself for every cut, order of work and sharing of prefixes.
 */
#include "kernels/attention_ref.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/half.h"
#include "tests/support/cunit_run.h"

#define ROWS_MAX 4
#define RUNS_MAX 64

static const char *const paths[] = {"generic", "avx2", "avx512"};

/* A step's input: per row K and V of all its tokens, the new ones included. */
struct problem {
    struct kvt_attention_shape shape;
    uint32_t row_count;
    struct kvt_attention_row rows[ROWS_MAX];
    uint32_t row_index[ROWS_MAX];
    void *k[ROWS_MAX];
    void *v[ROWS_MAX];
    float *q;
    uint32_t queries;
};

static uint32_t random_state = 12345;
static float uniform(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return (float)(random_state >> 8) / 8388608.0f - 1.0f;
}

static void *random_plane(enum kvt_kv_dtype dtype, size_t count) {
    float *values = malloc(count * sizeof(*values));
    void *plane = malloc(count * kvt_kv_dtype_bytes(dtype));
    for (size_t i = 0; i < count; i++)
        values[i] = 2 * uniform();
    kvt_cpu_ops_path("generic")->store(dtype, values, plane, count);
    free(values);
    return plane;
}

static struct problem make(struct kvt_attention_shape shape, uint32_t row_count,
                           const uint32_t *lengths, const uint32_t *news) {
    struct problem p = {.shape = shape, .row_count = row_count};
    for (uint32_t r = 0; r < row_count; r++) {
        size_t tokens = lengths[r] + news[r];
        p.rows[r] = (struct kvt_attention_row){lengths[r], news[r], p.queries};
        p.row_index[r] = r;
        p.queries += news[r];
        p.k[r] = random_plane(shape.dtype, tokens * shape.kv_heads * shape.k_dim);
        p.v[r] = random_plane(shape.dtype, tokens * shape.kv_heads * shape.v_dim);
    }
    size_t count = (size_t)p.queries * shape.heads * shape.k_dim;
    p.q = malloc(count * sizeof(float));
    for (size_t i = 0; i < count; i++)
        p.q[i] = 2 * uniform();
    return p;
}

static void drop(struct problem *p) {
    for (uint32_t r = 0; r < p->row_count; r++) {
        free(p->k[r]);
        free(p->v[r]);
    }
    free(p->q);
}

static float element(enum kvt_kv_dtype dtype, const void *plane, size_t index) {
    float value;
    kvt_cpu_ops_path("generic")->load(
        dtype, (const char *)plane + index * kvt_kv_dtype_bytes(dtype), &value, 1);
    return value;
}

/* out [queries][heads][v_dim] by the definition, in double */
static void reference(const struct problem *p, double *out) {
    const struct kvt_attention_shape *s = &p->shape;
    for (uint32_t r = 0; r < p->row_count; r++) {
        for (uint32_t n = 0; n < p->rows[r].query_count; n++) {
            size_t tokens = p->rows[r].length + n + 1;
            double *weights = malloc(tokens * sizeof(*weights));
            for (uint32_t h = 0; h < s->heads; h++) {
                uint32_t kv = h / (s->heads / s->kv_heads);
                size_t at = (size_t)(p->rows[r].query_first + n) * s->heads + h;
                double sum = 0;
                double top = -INFINITY;
                for (size_t t = 0; t < tokens; t++) {
                    double score = 0;
                    for (uint32_t d = 0; d < s->k_dim; d++)
                        score += (double)p->q[at * s->k_dim + d] *
                                 element(s->dtype, p->k[r], (t * s->kv_heads + kv) * s->k_dim + d);
                    weights[t] = score * s->scale;
                    top = weights[t] > top ? weights[t] : top;
                }
                for (size_t t = 0; t < tokens; t++)
                    sum += weights[t] = exp(weights[t] - top);
                for (uint32_t d = 0; d < s->v_dim; d++) {
                    double value = 0;
                    for (size_t t = 0; t < tokens; t++)
                        value += weights[t] *
                                 element(s->dtype, p->v[r], (t * s->kv_heads + kv) * s->v_dim + d);
                    out[at * s->v_dim + d] = value / sum;
                }
            }
            free(weights);
        }
    }
}

/* ------------------------------------------------------------------ orders of work */

static void backwards(void *pool, uint32_t items, kvt_work_fn fn, void *arg) {
    (void)pool;
    for (uint32_t i = items; i-- > 0;)
        fn(arg, i, i % 3);
}

struct share {
    kvt_work_fn fn;
    void *arg;
    uint32_t items, thread;
};

static void *share_main(void *arg) {
    struct share *share = arg;
    for (uint32_t i = share->thread; i < share->items; i += 3)
        share->fn(share->arg, i, share->thread);
    return NULL;
}

static void three_threads(void *pool, uint32_t items, kvt_work_fn fn, void *arg) {
    pthread_t threads[3];
    struct share shares[3];
    (void)pool;
    for (uint32_t i = 0; i < 3; i++) {
        shares[i] = (struct share){fn, arg, items, i};
        pthread_create(&threads[i], NULL, share_main, &shares[i]);
    }
    for (uint32_t i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
}

/* ------------------------------------------------------------------ running it */

/* One run a row and piece, pieces of piece_tokens; rows are in every piece that they reach. */
static void attend(const struct problem *p, uint32_t piece_tokens, kvt_parallel_fn parallel,
                   const char *path, float *out) {
    const struct kvt_attention_shape *s = &p->shape;
    size_t bytes = kvt_kv_dtype_bytes(s->dtype);
    struct kvt_attention *a =
        kvt_attention_open(s, 3, parallel, NULL, NULL, kvt_cpu_ops_path(path));
    uint64_t longest = 0;
    CU_ASSERT_PTR_NOT_NULL_FATAL(a);
    for (uint32_t r = 0; r < p->row_count; r++) {
        uint64_t end = p->rows[r].length + p->rows[r].query_count;
        longest = end > longest ? end : longest;
    }
    CU_ASSERT_EQUAL_FATAL(kvt_attention_begin(a, p->rows, p->row_count, p->q, out), 0);
    for (uint64_t begin = 0; begin < longest; begin += piece_tokens) {
        struct kvt_attention_run runs[ROWS_MAX];
        uint32_t count = 0;
        for (uint32_t r = 0; r < p->row_count; r++) {
            uint64_t length = p->rows[r].length;
            uint64_t total = length + p->rows[r].query_count;
            uint64_t end = begin + piece_tokens < total ? begin + piece_tokens : total;
            if (end <= begin)
                continue;
            uint64_t read = length > end ? end : length > begin ? length : begin;
            runs[count++] = (struct kvt_attention_run){
                &p->row_index[r],
                1,
                begin,
                (uint32_t)(read - begin),
                (uint32_t)(end - read),
                (char *)p->k[r] + begin * s->kv_heads * s->k_dim * bytes,
                (char *)p->v[r] + begin * s->kv_heads * s->v_dim * bytes};
        }
        kvt_attention_piece(a, runs, count);
    }
    kvt_attention_finish(a);
    kvt_attention_close(a);
}

static struct kvt_attention_shape shape_of(uint32_t heads, uint32_t kv_heads, uint32_t k_dim,
                                           uint32_t v_dim, enum kvt_kv_dtype dtype) {
    return (struct kvt_attention_shape){heads, kv_heads, k_dim, v_dim, 1.0f / sqrtf((float)k_dim),
                                        dtype};
}

static void test_against_definition(void) {
    static const struct {
        uint32_t heads, kv_heads, k_dim, v_dim;
        enum kvt_kv_dtype dtype;
        uint32_t lengths[3], news[3];
    } cases[] = {
        {3, 1, 64, 64, KVT_KV_F16, {0, 255, 600}, {1, 1, 4}},
        {4, 2, 128, 128, KVT_KV_F16, {256, 0, 257}, {1, 3, 0}},
        {6, 2, 80, 48, KVT_KV_BF16, {300, 511, 10}, {2, 1, 5}},
        {2, 2, 20, 7, KVT_KV_F32, {100, 512, 1}, {1, 1, 290}},
        {9, 3, 64, 64, KVT_KV_F16, {0, 400, 256}, {100, 10, 1}},
        {8, 1, 16, 16, KVT_KV_F16, {513, 255, 0}, {40, 6, 5}},
    };
    for (size_t c = 0; c < sizeof(cases) / sizeof(cases[0]); c++) {
        struct problem p = make(shape_of(cases[c].heads, cases[c].kv_heads, cases[c].k_dim,
                                         cases[c].v_dim, cases[c].dtype),
                                3, cases[c].lengths, cases[c].news);
        size_t count = (size_t)p.queries * p.shape.heads * p.shape.v_dim;
        double *wanted = malloc(count * sizeof(*wanted));
        float *out = malloc(count * sizeof(*out));
        reference(&p, wanted);
        for (size_t i = 0; i < 3; i++) {
            if (!kvt_cpu_ops_path(paths[i]))
                continue;
            double worst = 0;
            attend(&p, 512, NULL, paths[i], out);
            for (size_t k = 0; k < count; k++)
                worst = fabs(out[k] - wanted[k]) <= worst ? worst : fabs(out[k] - wanted[k]);
            /* f32 sums of some hundred terms near 1, the scores' error goes through exp */
            CU_ASSERT(worst < 2e-5);
            if (!(worst < 2e-5))
                printf("\n    case %zu, %s: off by %g\n", c, paths[i], worst);
        }
        free(wanted);
        free(out);
        drop(&p);
    }
}

/* Any cut into whole splits, any order of the work, any number of threads: the same bits. */
static void test_cut_and_threads_leave_bits_alone(void) {
    static const uint32_t cuts[] = {256, 768, 4096};
    static const kvt_parallel_fn orders[] = {NULL, backwards, three_threads};
    static const uint32_t lengths[][3] = {{1300, 255, 0}, {1024, 700, 256}};
    static const uint32_t news[][3] = {{1, 1, 1}, {70, 4, 20}};
    for (size_t c = 0; c < 2; c++) {
        struct problem p = make(shape_of(6, 2, 32, 16, KVT_KV_F16), 3, lengths[c], news[c]);
        size_t bytes = (size_t)p.queries * p.shape.heads * p.shape.v_dim * sizeof(float);
        float *first = malloc(bytes);
        float *out = malloc(bytes);
        for (size_t i = 0; i < 3; i++) {
            if (!kvt_cpu_ops_path(paths[i]))
                continue;
            attend(&p, 4096, NULL, paths[i], first);
            for (size_t cut = 0; cut < 3; cut++) {
                for (size_t order = 0; order < 3; order++) {
                    attend(&p, cuts[cut], orders[order], paths[i], out);
                    CU_ASSERT_EQUAL(memcmp(out, first, bytes), 0);
                }
            }
        }
        free(first);
        free(out);
        drop(&p);
    }
}

/* Rows that share a prefix as one run get the bits that they get with copies of their own. */
static void test_shared_prefix_leaves_bits_alone(void) {
    static const uint32_t lengths[] = {800, 790, 768};
    static const uint32_t news[] = {1, 3, 20};
    struct problem p = make(shape_of(4, 2, 32, 32, KVT_KV_F16), 3, lengths, news);
    const uint32_t all[] = {0, 1, 2};
    size_t token_bytes = 2 * 32 * 2;
    size_t bytes = (size_t)p.queries * 4 * 32 * sizeof(float);
    float *apart = malloc(bytes);
    float *shared = malloc(bytes);
    for (uint32_t r = 1; r < 3; r++) {
        memcpy(p.k[r], p.k[0], 768 * token_bytes);
        memcpy(p.v[r], p.v[0], 768 * token_bytes);
    }
    attend(&p, 512, NULL, "generic", apart);

    struct kvt_attention *a =
        kvt_attention_open(&p.shape, 1, NULL, NULL, NULL, kvt_cpu_ops_path("generic"));
    struct kvt_attention_run runs[4] = {{all, 3, 0, 768, 0, p.k[0], p.v[0]}};
    CU_ASSERT_EQUAL_FATAL(kvt_attention_begin(a, p.rows, 3, p.q, shared), 0);
    for (uint32_t r = 0; r < 3; r++)
        runs[r + 1] = (struct kvt_attention_run){&all[r],
                                                 1,
                                                 768,
                                                 lengths[r] - 768,
                                                 news[r],
                                                 (char *)p.k[r] + 768 * token_bytes,
                                                 (char *)p.v[r] + 768 * token_bytes};
    kvt_attention_piece(a, runs, 4);
    kvt_attention_finish(a);
    kvt_attention_close(a);
    CU_ASSERT_EQUAL(memcmp(apart, shared, bytes), 0);
    free(apart);
    free(shared);
    drop(&p);
}

/* More splits than are computed at a time, and scores that would overflow exp. */
static void test_long_and_large(void) {
    uint32_t length = 256 * 300 + 17;
    uint32_t one = 1;
    struct problem p = make(shape_of(2, 1, 4, 4, KVT_KV_F32), 1, &length, &one);
    float out[8];
    float other[8];
    double wanted[8];
    for (size_t i = 0; i < 8; i++)
        p.q[i] *= 300;
    reference(&p, wanted);
    attend(&p, 1u << 20, NULL, "generic", out);
    attend(&p, 256 * 7, NULL, "generic", other);
    CU_ASSERT_EQUAL(memcmp(out, other, sizeof(out)), 0);
    for (size_t i = 0; i < 8; i++)
        CU_ASSERT_DOUBLE_EQUAL(out[i], wanted[i], 1e-3);
    drop(&p);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"against the definition", test_against_definition},
        {"cut and threads leave the bits alone", test_cut_and_threads_leave_bits_alone},
        {"a shared prefix leaves the bits alone", test_shared_prefix_leaves_bits_alone},
        {"long rows and large scores", test_long_and_large},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("attention", tests);
}
