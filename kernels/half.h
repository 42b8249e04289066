/*
 * f16 and bf16 to f32 and back, in plain C: the reference for every faster path.
 *
 * Rounding is to nearest even; NaN stays NaN (its payload may change), too
 * large becomes infinity, subnormals are kept.
 */
#ifndef KVT_KERNELS_HALF_H
#define KVT_KERNELS_HALF_H

#include <stdint.h>
#include <string.h>

static inline float kvt_f32_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline uint32_t kvt_bits_of_f32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float kvt_f32_of_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 0x1fu;
    uint32_t mantissa = half & 0x3ffu;

    if (exponent == 0) {
        float value = (float)mantissa * 0x1p-24f; /* exact: zero and subnormals */
        return kvt_f32_of_bits(kvt_bits_of_f32(value) | sign);
    }
    if (exponent == 31)
        return kvt_f32_of_bits(sign | 0x7f800000u | mantissa << 13);
    return kvt_f32_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

static inline uint16_t kvt_f16_of_f32(float value) {
    uint32_t bits = kvt_bits_of_f32(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;

    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) /* 65520 and up round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: let f32 addition do the rounding */
        float rounded = kvt_f32_of_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (kvt_bits_of_f32(rounded) - 0x3f000000u));
    }
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((magnitude - 0x38000000u) >> 13));
}

static inline float kvt_f32_of_bf16(uint16_t half) {
    return kvt_f32_of_bits((uint32_t)half << 16);
}

static inline uint16_t kvt_bf16_of_f32(float value) {
    uint32_t bits = kvt_bits_of_f32(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#endif
