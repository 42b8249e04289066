/* RMSNorm on the CPU: the reference of rmsnorm's device kernel. */
#ifndef KVT_KERNELS_RMSNORM_REF_H
#define KVT_KERNELS_RMSNORM_REF_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * out[i] = x[i] / sqrt(mean(x[i]^2) + epsilon) * weight.
 * Shapes: x, out [rows][dim], may be the same; weight [dim].
 * Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
 */
void kvt_rmsnorm_ref(const float *x, const float *weight, float epsilon, float *out, uint32_t rows,
                     uint32_t dim);

#ifdef __cplusplus
}
#endif

#endif
