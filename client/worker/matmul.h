/*
 * Products of activations (f32) with weights in any tensor type.
 *
 * Few rows of activations (decode): every weight row is dequantized into the
 * cache once and multiplied with each of them. Many (prefill): panels of weight
 * rows are dequantized and multiplied by OpenBLAS, single-threaded inside each of
 * our threads. So the result depends on the shapes, never on the thread count.
 */
#ifndef KVT_WORKER_MATMUL_H
#define KVT_WORKER_MATMUL_H

#include <stddef.h>
#include <stdint.h>

#include "client/worker/pool.h"

/* Rows of activations up to which the first way is taken. */
#define KVT_MATMUL_FEW 8

/* A matrix [rows][columns] as it lies in the file. */
struct kvt_weight {
    uint32_t type; /* enum kvt_tensor_type */
    uint32_t rows, columns;
    size_t row_bytes;
    const uint8_t *data; /* borrowed */
};

/* y [count][rows] = x [count][columns] . weight^T */
struct kvt_product {
    const struct kvt_weight *weight;
    const float *x;
    float *y;
};

struct kvt_matmul;

/* Room for weights of up to columns_max columns. -KVT_ENOMEM. */
__attribute__((warn_unused_result)) int kvt_matmul_open(struct kvt_matmul **out,
                                                        struct kvt_pool *pool,
                                                        uint32_t columns_max);
void kvt_matmul_close(struct kvt_matmul *matmul);

/* All products, with `count` rows of activations each. At most KVT_PRODUCTS_MAX. */
#define KVT_PRODUCTS_MAX 4
void kvt_matmul_run(struct kvt_matmul *matmul, const struct kvt_product *products,
                    uint32_t product_count, uint32_t count);

/* One row of a weight as f32. */
void kvt_weight_row(const struct kvt_weight *weight, uint32_t row, float *out);

/* OpenBLAS' sgemm with the parameters of kvt_gemm_fn (kernels/attention_ref.h). */
void kvt_matmul_gemm(int b_transposed, uint32_t m, uint32_t n, uint32_t k, const float *a,
                     uint32_t lda, const float *b, uint32_t ldb, float *c, uint32_t ldc);

#endif
