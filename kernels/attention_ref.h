/*
 * Attention over pieces on the CPU: the reference of attention's device kernel.
 *
 * A layer's K and V come in pieces. Whatever the cut, tokens are reduced in
 * splits of KVT_SPLIT_TOKENS at absolute token positions: a split gives (m, l, o),
 * its largest score, its sum of exponentials and its weighted values, and splits
 * are merged in ascending order by log-sum-exp. The arithmetic of a split depends
 * on nothing but its tokens and the queries of its row in this step, so any cut
 * into whole splits, any number of threads and any sharing of prefixes between
 * rows give the same bits.
 *
 * Queries see the tokens up to their own position (causal). GQA: head h reads
 * KV head h / (heads / kv_heads). All arithmetic is f32.
 *
 * Use, for each layer: begin, then each piece in order, then finish.
 *
 * Source: Dao et al. 2023, Flash-Decoding, https://pytorch.org/blog/flash-decoding/;
 * Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867.
 */
#ifndef KVT_KERNELS_ATTENTION_REF_H
#define KVT_KERNELS_ATTENTION_REF_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVT_SPLIT_TOKENS 256

struct kvt_attention_shape {
    uint32_t heads;
    uint32_t kv_heads; /* divides heads */
    uint32_t k_dim;    /* of a head, elements */
    uint32_t v_dim;
    float scale; /* of the scores, usually 1 / sqrt(k_dim) */
    enum kvt_kv_dtype dtype;
};

/* A row's part in the step. */
struct kvt_attention_row {
    uint64_t length;      /* tokens before the step */
    uint32_t query_count; /* new tokens, at positions length, length + 1, ... */
    uint32_t query_first; /* index of its first query in q and out */
};

/*
 * Tokens of one stretch of memory, read by each of `rows` (indexes into the
 * step's rows). token_begin is a multiple of KVT_SPLIT_TOKENS, and so is the end
 * of a run that is not a row's last. The append_count tokens behind read_count
 * are this step's; they were written before the call.
 * Shapes: k [token][kv_head][k_dim], v [token][kv_head][v_dim], from token_begin.
 */
struct kvt_attention_run {
    const uint32_t *rows;
    uint32_t row_count;
    uint64_t token_begin;
    uint32_t read_count;
    uint32_t append_count;
    const void *k;
    const void *v;
};

/* How work is spread: calls fn(arg, item, thread) for each item below `items`, and returns when
 * all are done. thread < the `threads` given to kvt_attention_open. */
typedef void (*kvt_work_fn)(void *arg, uint32_t item, uint32_t thread);
typedef void (*kvt_parallel_fn)(void *pool, uint32_t items, kvt_work_fn fn, void *arg);

/* c [m][n] = a [m][k] . b, where b is [k][n], or [n][k] if b_transposed; lda and so on are the
 * strides between rows. Must give the same bits for the same shapes. */
typedef void (*kvt_gemm_fn)(int b_transposed, uint32_t m, uint32_t n, uint32_t k, const float *a,
                            uint32_t lda, const float *b, uint32_t ldb, float *c, uint32_t ldc);

struct kvt_attention;

/*
 * Ownership: the caller owns it and closes it. parallel NULL: one thread; gemm NULL: plain loops.
 * ops NULL: the best path.
 * Returns NULL for want of memory.
 */
struct kvt_attention *kvt_attention_open(const struct kvt_attention_shape *shape, uint32_t threads,
                                         kvt_parallel_fn parallel, void *pool, kvt_gemm_fn gemm,
                                         const struct kvt_cpu_ops *ops);
void kvt_attention_close(struct kvt_attention *attention);

/*
 * Begins a layer.
 * Shapes: q, out [queries of all rows][heads][k_dim or v_dim].
 * Ownership: all borrowed until finish. Returns 0, or -1 for want of memory.
 */
int kvt_attention_begin(struct kvt_attention *attention, const struct kvt_attention_row *rows,
                        uint32_t row_count, const float *q, float *out);

/* Attends to a piece. A row's runs come in ascending order, within a piece and over the pieces. */
void kvt_attention_piece(struct kvt_attention *attention, const struct kvt_attention_run *runs,
                         uint32_t run_count);

/* Ends the layer: `out` is what the queries attended to. */
void kvt_attention_finish(struct kvt_attention *attention);

#ifdef __cplusplus
}
#endif

#endif
