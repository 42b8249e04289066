/*
 * Vectors of f32 for the kernels, path for any machine: four lanes by the
 * compiler's vector extension, halves by kernels/half.h.
 *
 * simd_avx2.h and simd_avx512.h offer the same names. A kernel written on them
 * lies in an *_impl.h that three small .c files include, one a path; which one
 * runs is chosen once, by the CPU. Lanes are reduced in a fixed order, so one
 * path always gives the same bits.
 */
#ifndef KVT_KERNELS_SIMD_H
#define KVT_KERNELS_SIMD_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/half.h"

#define KVT_TARGET
#define KVT_PATH(name) name##_generic
#define KVT_PATH_NAME  "generic"
#define VF_N           4

typedef float vf __attribute__((vector_size(16)));

#define VF_INLINE static inline __attribute__((always_inline, unused)) KVT_TARGET

VF_INLINE vf vf_set1(float x) {
    return (vf){x, x, x, x};
}
VF_INLINE vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof(v));
    return v;
}
VF_INLINE void vf_store(float *p, vf v) {
    memcpy(p, &v, sizeof(v));
}
VF_INLINE vf vf_fma(vf a, vf b, vf c) {
    return a * b + c;
}
VF_INLINE vf vf_max(vf a, vf b) {
    for (int i = 0; i < VF_N; i++)
        a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
VF_INLINE float vf_sum(vf v) {
    return (v[0] + v[2]) + (v[1] + v[3]);
}
VF_INLINE float vf_top(vf v) {
    float a = v[0] > v[1] ? v[0] : v[1];
    float b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}
VF_INLINE vf vf_round(vf v) {
    for (int i = 0; i < VF_N; i++)
        v[i] = rintf(v[i]);
    return v;
}
/* v * 2^n for whole n from -126 to 127 */
VF_INLINE vf vf_scale2(vf v, vf n) {
    for (int i = 0; i < VF_N; i++)
        v[i] *= kvt_f32_of_bits((uint32_t)((int32_t)n[i] + 127) << 23);
    return v;
}
VF_INLINE vf vf_load_f16(const uint16_t *p) {
    return (vf){kvt_f32_of_f16(p[0]), kvt_f32_of_f16(p[1]), kvt_f32_of_f16(p[2]),
                kvt_f32_of_f16(p[3])};
}
VF_INLINE vf vf_load_bf16(const uint16_t *p) {
    return (vf){kvt_f32_of_bf16(p[0]), kvt_f32_of_bf16(p[1]), kvt_f32_of_bf16(p[2]),
                kvt_f32_of_bf16(p[3])};
}
VF_INLINE void vf_store_f16(uint16_t *p, vf v) {
    for (int i = 0; i < VF_N; i++)
        p[i] = kvt_f16_of_f32(v[i]);
}
VF_INLINE void vf_store_bf16(uint16_t *p, vf v) {
    for (int i = 0; i < VF_N; i++)
        p[i] = kvt_bf16_of_f32(v[i]);
}
VF_INLINE vf vf_load_i8(const int8_t *p) {
    return (vf){p[0], p[1], p[2], p[3]};
}
/* the low or high nibbles of VF_N bytes */
VF_INLINE vf vf_load_low(const uint8_t *p) {
    return (vf){p[0] & 15, p[1] & 15, p[2] & 15, p[3] & 15};
}
VF_INLINE vf vf_load_high(const uint8_t *p) {
    return (vf){p[0] >> 4, p[1] >> 4, p[2] >> 4, p[3] >> 4};
}
VF_INLINE float vf_f16_scalar(uint16_t half) {
    return kvt_f32_of_f16(half);
}

#endif
