/*
 * Rotary position embedding on the CPU: the reference of rope's device kernel.
 *
 * Neighbours (2i, 2i + 1) are a pair, which is how GGUF files of the Llama family
 * order Q and K ("NORM" in llama.cpp).
 * Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.
 */
#ifndef KVT_KERNELS_ROPE_REF_H
#define KVT_KERNELS_ROPE_REF_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Rotation of pair i: base^(-2i / dim) / scale / factors[i] radians a token.
 * `factors` is NULL or dim / 2 long (Llama 3's long-context scaling, from the file).
 */
void kvt_rope_frequencies_ref(float base, float scale, const float *factors, uint32_t dim,
                              double *frequencies);

/* cos and sin of one position: [dim / 2] pairs (cos, sin). */
void kvt_rope_table_ref(const double *frequencies, uint32_t dim, uint64_t position, float *table);

/*
 * Turns the first `dim` elements of each head of one token, in place.
 * Shapes: x [heads][head_dim], dim <= head_dim.
 */
void kvt_rope_ref(float *x, uint32_t heads, uint32_t head_dim, uint32_t dim, const float *table);

#ifdef __cplusplus
}
#endif

#endif
