/*
 * See attention_ref.h. Rows with few new tokens (decode) and with many (prefill)
 * go different ways, chosen by the row's own query count alone:
 *   few   each split of each run gives partial results, in parallel; they are
 *         merged in order afterwards. K and V are read as they are stored.
 *   many  each tile of queries walks through the splits in order and merges as it
 *         goes, in parallel with other tiles; matrix products do the work.
 */
#include "kernels/attention_ref.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define FEW_QUERIES    4u
#define UNITS_MAX      256u
#define TILE_ROWS      256u
#define PARTIAL_FLOATS (1u << 20) /* at least; one unit may need more */

/* A split of a run, whose partial results begin at `partial`. */
struct unit {
    const struct kvt_attention_run *run;
    uint32_t skip;   /* tokens of the run before the split */
    uint32_t tokens; /* of the split that are in the run */
    size_t partial;
};

struct kvt_attention {
    struct kvt_attention_shape shape;
    uint32_t group;       /* heads of one KV head */
    uint32_t tile_tokens; /* queries of one tile, times group: TILE_ROWS or fewer */
    uint32_t tile_rows;
    kvt_parallel_fn parallel;
    void *pool;
    kvt_gemm_fn gemm;
    const struct kvt_cpu_ops *ops;
    uint32_t threads;
    float *scratch; /* [threads][scratch_floats] */
    size_t scratch_floats;

    /* one layer */
    const struct kvt_attention_row *rows;
    uint32_t row_count;
    const float *q;
    float *out; /* not normalised until finish */
    float *top; /* [query][head] largest score so far */
    float *sum; /* [query][head] of exponentials so far; 0: nothing seen yet */
    size_t accumulator_room;
    uint64_t query_total;

    /* one piece */
    const struct kvt_attention_run *runs;
    uint32_t run_count;
    struct unit units[UNITS_MAX];
    uint32_t unit_count;
    float *partial;
    size_t partial_room;
};

/* ------------------------------------------------------------------ small parts */

static void serial(void *pool, uint32_t items, kvt_work_fn fn, void *arg) {
    (void)pool;
    for (uint32_t i = 0; i < items; i++)
        fn(arg, i, 0);
}

static void plain_gemm(int b_transposed, uint32_t m, uint32_t n, uint32_t k, const float *a,
                       uint32_t lda, const float *b, uint32_t ldb, float *c, uint32_t ldc) {
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; j < n; j++) {
            float sum = 0;
            for (size_t x = 0; x < k; x++)
                sum += a[i * lda + x] * (b_transposed ? b[j * ldb + x] : b[x * ldb + j]);
            c[i * ldc + j] = sum;
        }
    }
}

static bool is_few(const struct kvt_attention_row *row) {
    return row->query_count > 0 && row->query_count <= FEW_QUERIES;
}

/* Tokens of a split at `begin` that the query at `position` sees, of `tokens` that are there. */
static uint32_t visible(uint64_t begin, uint32_t tokens, uint64_t position) {
    if (position < begin)
        return 0;
    return position - begin + 1 < tokens ? (uint32_t)(position - begin + 1) : tokens;
}

/* Queries [first, first + count) of a row for one KV head, scaled: [count][group][k_dim]. */
static void gather(const struct kvt_attention *a, const struct kvt_attention_row *row,
                   uint32_t first, uint32_t count, uint32_t kv_head, float *to) {
    size_t width = (size_t)a->group * a->shape.k_dim;
    for (size_t j = 0; j < count; j++) {
        const float *from =
            a->q + ((row->query_first + first + j) * a->shape.heads + (size_t)kv_head * a->group) *
                       a->shape.k_dim;
        for (size_t d = 0; d < width; d++)
            to[j * width + d] = from[d] * a->shape.scale;
    }
}

/* One split's (top, sum, out) of one query and head into its accumulators. */
static void merge(struct kvt_attention *a, size_t query, uint32_t head, float top, float sum,
                  const float *out) {
    size_t at = query * a->shape.heads + head;
    float *to = a->out + at * a->shape.v_dim;
    if (sum == 0)
        return;
    if (a->sum[at] == 0) {
        a->top[at] = top;
        a->sum[at] = sum;
        memcpy(to, out, a->shape.v_dim * sizeof(*to));
        return;
    }
    float higher = top > a->top[at] ? top : a->top[at];
    float old_scale = expf(a->top[at] - higher);
    float new_scale = expf(top - higher);
    a->top[at] = higher;
    a->sum[at] = a->sum[at] * old_scale + sum * new_scale;
    a->ops->merge(to, old_scale, out, new_scale, a->shape.v_dim);
}

/*
 * Scores of `count` queries from position `first` on, [count][group][stride], to
 * weights in place; the tokens that a query does not see get weight 0.
 */
static void weigh(const struct kvt_attention *a, float *scores, size_t stride, uint32_t count,
                  uint64_t first, uint64_t begin, uint32_t tokens, float *tops, float *sums) {
    for (uint32_t j = 0; j < count; j++) {
        uint32_t seen = visible(begin, tokens, first + j);
        for (uint32_t g = 0; g < a->group; g++) {
            size_t i = (size_t)j * a->group + g;
            float *row = scores + i * stride;
            tops[i] = 0;
            sums[i] = 0;
            if (seen > 0)
                tops[i] = a->ops->softmax(row, seen, &sums[i]);
            memset(row + seen, 0, (tokens - seen) * sizeof(*row));
        }
    }
}

/* ------------------------------------------------------------------ rows with few queries */

/* Floats of one row's partial results for one KV head: tops, sums, values. */
static size_t partial_floats(const struct kvt_attention *a, const struct kvt_attention_row *row) {
    return (size_t)row->query_count * a->group * (2 + a->shape.v_dim);
}

static void few_item(void *arg, uint32_t item, uint32_t thread) {
    struct kvt_attention *a = arg;
    const struct kvt_attention_shape *s = &a->shape;
    const struct unit *unit = &a->units[item / s->kv_heads];
    const struct kvt_attention_run *run = unit->run;
    uint32_t kv_head = item % s->kv_heads;
    uint64_t begin = run->token_begin + unit->skip;
    size_t bytes = kvt_kv_dtype_bytes(s->dtype);
    size_t k_stride = (size_t)s->kv_heads * s->k_dim;
    size_t v_stride = (size_t)s->kv_heads * s->v_dim;
    const char *k =
        (const char *)run->k + (unit->skip * k_stride + (size_t)kv_head * s->k_dim) * bytes;
    const char *v =
        (const char *)run->v + (unit->skip * v_stride + (size_t)kv_head * s->v_dim) * bytes;
    float *q = a->scratch + thread * a->scratch_floats;
    float *scores = q + (size_t)FEW_QUERIES * a->group * s->k_dim;
    float *partial = a->partial + unit->partial;

    for (uint32_t i = 0; i < run->row_count; i++) {
        const struct kvt_attention_row *row = &a->rows[run->rows[i]];
        if (!is_few(row))
            continue;
        uint32_t queries = row->query_count * a->group;
        float *tops = partial + kv_head * partial_floats(a, row);
        float *sums = tops + queries;
        uint32_t tokens = visible(begin, unit->tokens, row->length + row->query_count - 1);
        partial += s->kv_heads * partial_floats(a, row);
        if (tokens == 0) {
            memset(sums, 0, queries * sizeof(*sums));
            continue;
        }
        gather(a, row, 0, row->query_count, kv_head, q);
        a->ops->scores(s->dtype, q, queries, s->k_dim, k, k_stride, tokens, scores,
                       KVT_SPLIT_TOKENS);
        weigh(a, scores, KVT_SPLIT_TOKENS, row->query_count, row->length, begin, tokens, tops,
              sums);
        a->ops->values(s->dtype, scores, KVT_SPLIT_TOKENS, queries, s->v_dim, v, v_stride, tokens,
                       sums + queries);
    }
}

static void few_merge(struct kvt_attention *a, const struct unit *unit) {
    const float *partial = a->partial + unit->partial;
    for (uint32_t i = 0; i < unit->run->row_count; i++) {
        const struct kvt_attention_row *row = &a->rows[unit->run->rows[i]];
        if (!is_few(row))
            continue;
        uint32_t queries = row->query_count * a->group;
        for (uint32_t kv_head = 0; kv_head < a->shape.kv_heads; kv_head++) {
            const float *tops = partial;
            const float *sums = tops + queries;
            const float *values = sums + queries;
            for (uint32_t n = 0; n < queries; n++)
                merge(a, row->query_first + n / a->group, kv_head * a->group + n % a->group,
                      tops[n], sums[n], values + (size_t)n * a->shape.v_dim);
            partial += partial_floats(a, row);
        }
    }
}

/* Computes and merges the units that were gathered. */
static void few_flush(struct kvt_attention *a) {
    if (a->unit_count > 0)
        a->parallel(a->pool, a->unit_count * a->shape.kv_heads, few_item, a);
    for (uint32_t i = 0; i < a->unit_count; i++)
        few_merge(a, &a->units[i]);
    a->unit_count = 0;
}

static void few_run(struct kvt_attention *a, const struct kvt_attention_run *run, size_t *used) {
    size_t need = 0;
    for (uint32_t i = 0; i < run->row_count; i++)
        if (is_few(&a->rows[run->rows[i]]))
            need += a->shape.kv_heads * partial_floats(a, &a->rows[run->rows[i]]);
    uint32_t tokens = run->read_count + run->append_count;
    for (uint32_t skip = 0; need > 0 && skip < tokens; skip += KVT_SPLIT_TOKENS) {
        if (a->unit_count == UNITS_MAX || *used + need > a->partial_room) {
            few_flush(a);
            *used = 0;
        }
        uint32_t left = tokens - skip;
        a->units[a->unit_count++] =
            (struct unit){run, skip, left < KVT_SPLIT_TOKENS ? left : KVT_SPLIT_TOKENS, *used};
        *used += need;
    }
}

/* ------------------------------------------------------------------ rows with many queries */

/* The parts of a thread's scratch. */
struct tile {
    float *q, *k, *v, *scores, *values, *tops, *sums;
};

static struct tile tile_of(const struct kvt_attention *a, uint32_t thread) {
    const struct kvt_attention_shape *s = &a->shape;
    struct tile t;
    t.q = a->scratch + thread * a->scratch_floats;
    t.k = t.q + (size_t)a->tile_rows * s->k_dim;
    t.v = t.k + (size_t)KVT_SPLIT_TOKENS * s->k_dim;
    t.scores = t.v + (size_t)KVT_SPLIT_TOKENS * s->v_dim;
    t.values = t.scores + (size_t)a->tile_rows * KVT_SPLIT_TOKENS;
    t.tops = t.values + (size_t)a->tile_rows * s->v_dim;
    t.sums = t.tops + a->tile_rows;
    return t;
}

static bool reads(const struct kvt_attention_run *run, uint32_t row) {
    for (uint32_t i = 0; i < run->row_count; i++)
        if (run->rows[i] == row)
            return true;
    return false;
}

/* Queries [first, first + count) of a row, one KV head, one split of a run. */
static void tile_split(struct kvt_attention *a, const struct tile *t,
                       const struct kvt_attention_row *row, uint32_t first, uint32_t count,
                       uint32_t kv_head, const struct kvt_attention_run *run, uint32_t skip,
                       uint32_t tokens) {
    const struct kvt_attention_shape *s = &a->shape;
    uint64_t begin = run->token_begin + skip;
    size_t bytes = kvt_kv_dtype_bytes(s->dtype);
    uint32_t queries = count * a->group;

    for (size_t i = 0; i < tokens; i++) {
        size_t at = (skip + i) * s->kv_heads + kv_head;
        a->ops->load(s->dtype, (const char *)run->k + at * s->k_dim * bytes, t->k + i * s->k_dim,
                     s->k_dim);
        a->ops->load(s->dtype, (const char *)run->v + at * s->v_dim * bytes, t->v + i * s->v_dim,
                     s->v_dim);
    }
    a->gemm(1, queries, tokens, s->k_dim, t->q, s->k_dim, t->k, s->k_dim, t->scores,
            KVT_SPLIT_TOKENS);
    weigh(a, t->scores, KVT_SPLIT_TOKENS, count, row->length + first, begin, tokens, t->tops,
          t->sums);
    a->gemm(0, queries, s->v_dim, tokens, t->scores, KVT_SPLIT_TOKENS, t->v, s->v_dim, t->values,
            s->v_dim);
    for (uint32_t n = 0; n < queries; n++)
        merge(a, row->query_first + first + n / a->group, kv_head * a->group + n % a->group,
              t->tops[n], t->sums[n], t->values + (size_t)n * s->v_dim);
}

static uint32_t tile_count(const struct kvt_attention *a, const struct kvt_attention_row *row) {
    return row->query_count > FEW_QUERIES ? (row->query_count + a->tile_tokens - 1) / a->tile_tokens
                                          : 0;
}

static void many_item(void *arg, uint32_t item, uint32_t thread) {
    struct kvt_attention *a = arg;
    uint32_t kv_head = item % a->shape.kv_heads;
    uint32_t index = item / a->shape.kv_heads; /* of the tile, over all rows */
    uint32_t row_index = 0;
    while (index >= tile_count(a, &a->rows[row_index]))
        index -= tile_count(a, &a->rows[row_index++]);

    const struct kvt_attention_row *row = &a->rows[row_index];
    uint32_t first = index * a->tile_tokens;
    uint32_t count = row->query_count - first;
    count = count < a->tile_tokens ? count : a->tile_tokens;
    uint64_t last = row->length + first + count - 1;
    struct tile t = tile_of(a, thread);
    gather(a, row, first, count, kv_head, t.q);

    for (uint32_t i = 0; i < a->run_count; i++) {
        const struct kvt_attention_run *run = &a->runs[i];
        uint32_t tokens = run->read_count + run->append_count;
        if (!reads(run, row_index))
            continue;
        for (uint32_t skip = 0; skip < tokens; skip += KVT_SPLIT_TOKENS) {
            uint32_t left = tokens - skip < KVT_SPLIT_TOKENS ? tokens - skip : KVT_SPLIT_TOKENS;
            left = visible(run->token_begin + skip, left, last);
            if (left == 0)
                break;
            tile_split(a, &t, row, first, count, kv_head, run, skip, left);
        }
    }
}

/* ------------------------------------------------------------------ the calls */

struct kvt_attention *kvt_attention_open(const struct kvt_attention_shape *shape, uint32_t threads,
                                         kvt_parallel_fn parallel, void *pool, kvt_gemm_fn gemm,
                                         const struct kvt_cpu_ops *ops) {
    struct kvt_attention *a = calloc(1, sizeof(*a));
    if (!a)
        return NULL;
    a->shape = *shape;
    a->threads = parallel ? threads : 1;
    a->parallel = parallel ? parallel : serial;
    a->pool = pool;
    a->gemm = gemm ? gemm : plain_gemm;
    a->ops = ops ? ops : kvt_cpu_ops();
    a->group = shape->heads / shape->kv_heads;
    a->tile_tokens = 1;
    while (a->tile_tokens * 2 * a->group <= TILE_ROWS)
        a->tile_tokens *= 2;
    a->tile_rows = a->tile_tokens * a->group;

    size_t many = (size_t)a->tile_rows * (shape->k_dim + shape->v_dim + KVT_SPLIT_TOKENS + 2) +
                  (size_t)KVT_SPLIT_TOKENS * (shape->k_dim + shape->v_dim);
    size_t few = (size_t)FEW_QUERIES * a->group * (shape->k_dim + KVT_SPLIT_TOKENS);
    a->scratch_floats = ((many > few ? many : few) + 31) / 32 * 32; /* no shared cache lines */
    a->scratch = aligned_alloc(128, a->threads * a->scratch_floats * sizeof(float));
    if (!a->scratch) {
        kvt_attention_close(a);
        return NULL;
    }
    return a;
}

void kvt_attention_close(struct kvt_attention *a) {
    if (!a)
        return;
    free(a->scratch);
    free(a->top);
    free(a->sum);
    free(a->partial);
    free(a);
}

/* Room for the accumulators, and for the partial results of one unit at least. */
static int grow(struct kvt_attention *a) {
    size_t accumulators = a->query_total * a->shape.heads;
    size_t unit = 0;
    for (uint32_t i = 0; i < a->row_count; i++)
        if (is_few(&a->rows[i]))
            unit += a->shape.kv_heads * partial_floats(a, &a->rows[i]);
    if (accumulators > a->accumulator_room) {
        free(a->top);
        free(a->sum);
        a->top = malloc(accumulators * sizeof(*a->top));
        a->sum = malloc(accumulators * sizeof(*a->sum));
        a->accumulator_room = a->top && a->sum ? accumulators : 0;
        if (a->accumulator_room == 0)
            return -1;
    }
    if (unit > 0 && unit < PARTIAL_FLOATS)
        unit = PARTIAL_FLOATS;
    if (unit > a->partial_room) {
        free(a->partial);
        a->partial = malloc(unit * sizeof(*a->partial));
        a->partial_room = a->partial ? unit : 0;
        if (!a->partial)
            return -1;
    }
    return 0;
}

int kvt_attention_begin(struct kvt_attention *a, const struct kvt_attention_row *rows,
                        uint32_t row_count, const float *q, float *out) {
    a->rows = rows;
    a->row_count = row_count;
    a->q = q;
    a->out = out;
    a->query_total = 0;
    for (uint32_t i = 0; i < row_count; i++) {
        uint64_t end = (uint64_t)rows[i].query_first + rows[i].query_count;
        a->query_total = end > a->query_total ? end : a->query_total;
    }
    if (grow(a))
        return -1;
    memset(a->sum, 0, a->query_total * a->shape.heads * sizeof(*a->sum));
    memset(out, 0, a->query_total * a->shape.heads * a->shape.v_dim * sizeof(*out));
    return 0;
}

void kvt_attention_piece(struct kvt_attention *a, const struct kvt_attention_run *runs,
                         uint32_t run_count) {
    size_t used = 0;
    uint32_t tiles = 0;
    a->runs = runs;
    a->run_count = run_count;
    for (uint32_t i = 0; i < run_count; i++)
        few_run(a, &runs[i], &used);
    few_flush(a);
    for (uint32_t i = 0; i < a->row_count; i++)
        tiles += tile_count(a, &a->rows[i]);
    if (tiles > 0)
        a->parallel(a->pool, tiles * a->shape.kv_heads, many_item, a);
}

void kvt_attention_finish(struct kvt_attention *a) {
    size_t count = a->query_total * a->shape.heads;
    for (size_t i = 0; i < count; i++) {
        float *out = a->out + i * a->shape.v_dim;
        float scale = a->sum[i] > 0 ? 1.0f / a->sum[i] : 0;
        for (uint32_t d = 0; d < a->shape.v_dim; d++)
            out[d] *= scale;
    }
}
