/* See forward.h. */
#include "client/worker/forward.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "client/worker/fail.h"
#include "kernels/attention_ref.h"
#include "kernels/cpu_ops.h"
#include "kernels/rmsnorm_ref.h"
#include "kernels/rope_ref.h"
#include "kernels/swiglu_ref.h"
#include "proto/errors.h"

/* Tokens of one item where work is shared out token by token. */
#define TOKEN_BLOCK 16u

/* Activations of a step's tokens, all [tokens][...]. */
struct activations {
    float *x;         /* residual stream, [width] */
    float *normed;    /* [width] */
    float *q;         /* [heads][k_dim] */
    float *k;         /* [kv_heads][k_dim] */
    float *v;         /* [kv_heads][v_dim] */
    float *mixed;     /* attention's result, [heads][v_dim] */
    float *added;     /* what goes back to the stream, [width] */
    float *gate, *up; /* [hidden] */
    float *turns;     /* RoPE's cos and sin, [rope_dim] */
};

struct kvt_forward {
    const struct kvt_model *model;
    struct kvt_pool *pool;
    const volatile sig_atomic_t *interrupted;
    const struct kvt_cpu_ops *ops;
    enum kvt_kv_dtype dtype;
    struct kvt_matmul *matmul;
    struct kvt_attention *attention;

    float *memory; /* owns the activations */
    struct activations a;
    uint32_t token_room;
    float *logits; /* [row_room][vocabulary], behind it [row_room][width] */
    struct kvt_attention_row *rows;
    uint32_t row_room;

    /* the running step */
    const struct kvt_step_tokens *step;
    uint32_t token_count;
    uint32_t layer;
};

/* ------------------------------------------------------------------ memory */

static uint32_t larger(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

int kvt_forward_open(struct kvt_forward **out, const struct kvt_model *model, struct kvt_pool *pool,
                     enum kvt_kv_dtype dtype, const volatile sig_atomic_t *interrupted) {
    const struct kvt_model_shape *s = &model->shape;
    struct kvt_attention_shape shape = {
        s->heads, s->kv_heads, s->k_dim, s->v_dim, 1.0f / sqrtf((float)s->k_dim), dtype};
    struct kvt_forward *f = calloc(1, sizeof(*f));
    if (!f)
        return -KVT_ENOMEM;
    f->model = model;
    f->pool = pool;
    f->interrupted = interrupted;
    f->ops = kvt_cpu_ops();
    f->dtype = dtype;
    int rc =
        kvt_matmul_open(&f->matmul, pool, larger(larger(s->width, s->hidden), s->heads * s->v_dim));
    f->attention = kvt_attention_open(&shape, kvt_pool_threads(pool), kvt_pool_run, pool,
                                      kvt_matmul_gemm, NULL);
    if (rc || !f->attention) {
        kvt_forward_close(f);
        return -KVT_ENOMEM;
    }
    *out = f;
    return 0;
}

void kvt_forward_close(struct kvt_forward *f) {
    if (!f)
        return;
    kvt_matmul_close(f->matmul);
    kvt_attention_close(f->attention);
    free(f->memory);
    free(f->logits);
    free(f->rows);
    free(f);
}

static int grow_tokens(struct kvt_forward *f, uint32_t tokens) {
    const struct kvt_model_shape *s = &f->model->shape;
    const struct {
        float **at;
        uint32_t width;
    } parts[] = {
        {&f->a.x, s->width},
        {&f->a.normed, s->width},
        {&f->a.q, s->heads * s->k_dim},
        {&f->a.k, s->kv_heads * s->k_dim},
        {&f->a.v, s->kv_heads * s->v_dim},
        {&f->a.mixed, s->heads * s->v_dim},
        {&f->a.added, s->width},
        {&f->a.gate, s->hidden},
        {&f->a.up, s->hidden},
        {&f->a.turns, s->rope_dim},
    };
    size_t total = 0;
    if (tokens <= f->token_room)
        return 0;
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
        total += ((size_t)parts[i].width * tokens + 31) / 32 * 32;
    free(f->memory);
    f->token_room = 0;
    f->memory = aligned_alloc(128, total * sizeof(*f->memory));
    if (!f->memory)
        return -KVT_ENOMEM;
    float *at = f->memory;
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        *parts[i].at = at;
        at += ((size_t)parts[i].width * tokens + 31) / 32 * 32;
    }
    f->token_room = tokens;
    return 0;
}

static int grow_rows(struct kvt_forward *f, uint32_t rows) {
    const struct kvt_model_shape *s = &f->model->shape;
    if (rows <= f->row_room)
        return 0;
    free(f->rows);
    free(f->logits);
    f->rows = calloc(rows, sizeof(*f->rows));
    f->logits = calloc((size_t)rows * 2 * (s->vocabulary + (size_t)s->width), sizeof(*f->logits));
    f->row_room = f->rows && f->logits ? rows : 0;
    return f->row_room ? 0 : -KVT_ENOMEM;
}

/* ------------------------------------------------------------------ token by token */

static void block_of(const struct kvt_forward *f, uint32_t item, uint32_t *first, uint32_t *count) {
    *first = item * TOKEN_BLOCK;
    *count = f->token_count - *first < TOKEN_BLOCK ? f->token_count - *first : TOKEN_BLOCK;
}

static void each_block(struct kvt_forward *f, kvt_work_fn fn) {
    kvt_pool_run(f->pool, (f->token_count + TOKEN_BLOCK - 1) / TOKEN_BLOCK, fn, f);
}

/* x += added, if there is something to add; normed = norm(x) */
static void add_and_norm(struct kvt_forward *f, uint32_t first, uint32_t count, const float *added,
                         const float *weight) {
    uint32_t width = f->model->shape.width;
    float *x = f->a.x + (size_t)first * width;
    if (added)
        f->ops->merge(x, 1, added + (size_t)first * width, 1, (size_t)count * width);
    kvt_rmsnorm_ref(x, weight, f->model->shape.norm_epsilon, f->a.normed + (size_t)first * width,
                    count, width);
}

static void attention_norm_item(void *arg, uint32_t item, uint32_t thread) {
    struct kvt_forward *f = arg;
    uint32_t first;
    uint32_t count;
    (void)thread;
    block_of(f, item, &first, &count);
    add_and_norm(f, first, count, f->layer > 0 ? f->a.added : NULL,
                 f->model->layers[f->layer].attention_norm);
}

static void feed_norm_item(void *arg, uint32_t item, uint32_t thread) {
    struct kvt_forward *f = arg;
    uint32_t first;
    uint32_t count;
    (void)thread;
    block_of(f, item, &first, &count);
    add_and_norm(f, first, count, f->a.added, f->model->layers[f->layer].feed_norm);
}

static void rope_item(void *arg, uint32_t item, uint32_t thread) {
    struct kvt_forward *f = arg;
    const struct kvt_model_shape *s = &f->model->shape;
    uint32_t first;
    uint32_t count;
    (void)thread;
    block_of(f, item, &first, &count);
    for (size_t t = first; t < first + count; t++) {
        const float *turn = f->a.turns + t * s->rope_dim;
        kvt_rope_ref(f->a.q + t * s->heads * s->k_dim, s->heads, s->k_dim, s->rope_dim, turn);
        kvt_rope_ref(f->a.k + t * s->kv_heads * s->k_dim, s->kv_heads, s->k_dim, s->rope_dim, turn);
    }
}

static void swiglu_item(void *arg, uint32_t item, uint32_t thread) {
    struct kvt_forward *f = arg;
    uint32_t first;
    uint32_t count;
    (void)thread;
    block_of(f, item, &first, &count);
    size_t at = (size_t)first * f->model->shape.hidden;
    kvt_swiglu_ref(f->a.gate + at, f->a.up + at, f->a.gate + at,
                   (size_t)count * f->model->shape.hidden);
}

/* Embeddings and RoPE's angles of all new tokens; `rows` for attention. */
static int set_up(struct kvt_forward *f, struct run_kv *kv, const struct kvt_step_tokens *step) {
    const struct kvt_model_shape *s = &f->model->shape;
    uint64_t total = 0;
    for (uint32_t r = 0; r < step->row_count; r++)
        total += step->counts[r];
    if (total == 0 || total > UINT32_MAX / larger(s->hidden, s->heads * s->k_dim))
        return kvt_fail(-KVT_EINVAL, kv->why, sizeof(kv->why),
                        "a step of %" PRIu64 " tokens is not possible; lower --chunk", total);
    if (grow_tokens(f, (uint32_t)total) || grow_rows(f, step->row_count))
        return kvt_fail(-KVT_ENOMEM, kv->why, sizeof(kv->why),
                        "out of memory for a step of %" PRIu64 " tokens; lower --chunk", total);
    f->step = step;
    f->token_count = 0;
    for (uint32_t r = 0; r < step->row_count; r++) {
        uint64_t length = kv->ops->length(kv, r);
        f->rows[r] = (struct kvt_attention_row){length, step->counts[r], f->token_count};
        for (uint32_t i = 0; i < step->counts[r]; i++, f->token_count++) {
            uint32_t id = step->ids[f->token_count];
            if (id >= s->vocabulary)
                return kvt_fail(-KVT_EINVAL, kv->why, sizeof(kv->why),
                                "token %" PRIu32 " is not in the vocabulary of %" PRIu32, id,
                                s->vocabulary);
            kvt_weight_row(&f->model->embedding, id, f->a.x + (size_t)f->token_count * s->width);
            kvt_rope_table_ref(f->model->rope_frequencies, s->rope_dim, length + i,
                               f->a.turns + (size_t)f->token_count * s->rope_dim);
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ a layer */

/* Writes the new tokens' K and V where the piece wants them. */
static int append(struct kvt_forward *f, struct run_kv *kv, const struct run_kv_piece *piece) {
    const struct kvt_model_shape *s = &f->model->shape;
    size_t k_width = (size_t)s->kv_heads * s->k_dim;
    size_t v_width = (size_t)s->kv_heads * s->v_dim;
    size_t bytes = kvt_kv_dtype_bytes(f->dtype);
    for (uint32_t i = 0; i < piece->run_count; i++) {
        const struct kvt_attention_run *run = &piece->runs[i];
        if (run->append_count == 0)
            continue;
        const struct kvt_attention_row *row = &f->rows[run->rows[0]];
        uint64_t index = run->token_begin + run->read_count - row->length;
        if (run->row_count != 1 || index + run->append_count > row->query_count)
            return kvt_fail(-KVT_EPROTO, kv->why, sizeof(kv->why),
                            "kv: layer %" PRIu32 " appends tokens that the step does not have",
                            piece->layer);
        size_t first = row->query_first + (size_t)index;
        f->ops->store(f->dtype, f->a.k + first * k_width, run_kv_append_k(run, k_width * bytes),
                      run->append_count * k_width);
        f->ops->store(f->dtype, f->a.v + first * v_width, run_kv_append_v(run, v_width * bytes),
                      run->append_count * v_width);
    }
    return 0;
}

/*
 * Attends to the layer's pieces; *piece is the first of them, and afterwards the
 * first of the next layer. *more says whether there is one.
 */
static int attend(struct kvt_forward *f, struct run_kv *kv, struct run_kv_piece *piece, int *more) {
    if (kvt_attention_begin(f->attention, f->rows, f->step->row_count, f->a.q, f->a.mixed))
        return kvt_fail(-KVT_ENOMEM, kv->why, sizeof(kv->why), "out of memory for attention");
    while (*more && piece->layer == f->layer) {
        int rc = kv->ops->wait(kv, piece);
        if (rc == 0)
            rc = append(f, kv, piece);
        if (rc)
            return rc;
        kvt_attention_piece(f->attention, piece->runs, piece->run_count);
        rc = kv->ops->done(kv, piece);
        if (rc)
            return rc;
        rc = kv->ops->next(kv, piece);
        if (rc < 0)
            return rc;
        *more = rc;
    }
    kvt_attention_finish(f->attention);
    return 0;
}

static int run_layer(struct kvt_forward *f, struct run_kv *kv, struct run_kv_piece *piece,
                     int *more) {
    const struct kvt_model_layer *l = &f->model->layers[f->layer];
    struct activations *a = &f->a;
    const struct kvt_product in[] = {
        {&l->q, a->normed, a->q}, {&l->k, a->normed, a->k}, {&l->v, a->normed, a->v}};
    const struct kvt_product out[] = {{&l->out, a->mixed, a->added}};
    const struct kvt_product feed[] = {{&l->gate, a->normed, a->gate}, {&l->up, a->normed, a->up}};
    const struct kvt_product down[] = {{&l->down, a->gate, a->added}};

    each_block(f, attention_norm_item);
    kvt_matmul_run(f->matmul, in, 3, f->token_count);
    each_block(f, rope_item);
    int rc = attend(f, kv, piece, more);
    if (rc)
        return rc;
    kvt_matmul_run(f->matmul, out, 1, f->token_count);
    each_block(f, feed_norm_item);
    kvt_matmul_run(f->matmul, feed, 2, f->token_count);
    each_block(f, swiglu_item);
    kvt_matmul_run(f->matmul, down, 1, f->token_count);
    return 0;
}

/* Logits of each row's last token; rows without one are left out of the product. */
static void run_output(struct kvt_forward *f) {
    const struct kvt_model_shape *s = &f->model->shape;
    uint32_t rows = f->step->row_count;
    float *last = f->logits + (size_t)f->row_room * s->vocabulary;
    float *packed = last + (size_t)f->row_room * s->width;
    uint32_t count = 0;
    for (uint32_t r = 0; r < rows; r++) {
        if (f->rows[r].query_count == 0)
            continue;
        size_t token = f->rows[r].query_first + f->rows[r].query_count - 1;
        float *x = f->a.x + token * s->width;
        f->ops->merge(x, 1, f->a.added + token * s->width, 1, s->width);
        kvt_rmsnorm_ref(x, f->model->output_norm, s->norm_epsilon, last + (size_t)count * s->width,
                        1, s->width);
        count++;
    }
    bool all = count == rows;
    const struct kvt_product out = {&f->model->output, last, all ? f->logits : packed};
    kvt_matmul_run(f->matmul, &out, 1, count);
    for (uint32_t r = 0, i = 0; !all && r < rows; r++)
        if (f->rows[r].query_count > 0)
            memcpy(f->logits + (size_t)r * s->vocabulary, packed + (size_t)i++ * s->vocabulary,
                   s->vocabulary * sizeof(float));
}

static int run_step(struct kvt_forward *f, struct run_kv *kv) {
    struct run_kv_piece piece = {0};
    int more = kv->ops->next(kv, &piece);
    if (more < 0)
        return more;
    for (f->layer = 0; f->layer < f->model->shape.layers; f->layer++) {
        if (f->interrupted && *f->interrupted)
            return kvt_fail(-KVT_EABORTED, kv->why, sizeof(kv->why), "interrupted");
        if (!more || piece.layer != f->layer)
            return kvt_fail(-KVT_EPROTO, kv->why, sizeof(kv->why),
                            "kv: the schedule has no piece of layer %" PRIu32, f->layer);
        int rc = run_layer(f, kv, &piece, &more);
        if (rc)
            return rc;
    }
    if (more)
        return kvt_fail(-KVT_EPROTO, kv->why, sizeof(kv->why),
                        "kv: the schedule goes on behind the last layer");
    return 0;
}

int kvt_forward_step(struct kvt_forward *f, struct run_kv *kv, const struct kvt_step_tokens *tokens,
                     const float **logits) {
    int rc = set_up(f, kv, tokens);
    if (rc == 0)
        rc = run_step(f, kv);
    if (rc == 0 && tokens->wants_logits)
        run_output(f);
    if (rc == 0)
        rc = kv->ops->end(kv);
    if (rc) {
        kv->ops->abort(kv);
        return rc;
    }
    *logits = tokens->wants_logits ? f->logits : NULL;
    return 0;
}
