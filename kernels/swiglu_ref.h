/* SwiGLU on the CPU: the reference of swiglu's device kernel. */
#ifndef KVT_KERNELS_SWIGLU_REF_H
#define KVT_KERNELS_SWIGLU_REF_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * out = gate * sigmoid(gate) * up, element by element.
 * Shapes: all [count]; out may be gate or up.
 * Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
 */
void kvt_swiglu_ref(const float *gate, const float *up, float *out, size_t count);

#ifdef __cplusplus
}
#endif

#endif
