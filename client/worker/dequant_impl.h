/* The dequantizers on the vector names of kernels/simd_*.h; included once a path. */
#include "client/worker/dequant_paths.h"

#define F16_AT(p) vf_f16_scalar((uint16_t)((p)[0] | (uint16_t)((p)[1] << 8)))

static KVT_TARGET void dequant_f32(const void *blocks, float *out, size_t count) {
    memcpy(out, blocks, count * sizeof(*out));
}

static KVT_TARGET void dequant_f16(const void *blocks, float *out, size_t count) {
    const uint16_t *in = blocks;
    size_t i = 0;
    for (; i + VF_N <= count; i += VF_N)
        vf_store(out + i, vf_load_f16(in + i));
    for (; i < count; i++)
        out[i] = vf_f16_scalar(in[i]);
}

static KVT_TARGET void dequant_bf16(const void *blocks, float *out, size_t count) {
    const uint16_t *in = blocks;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)in[i] << 16;
        memcpy(&out[i], &bits, sizeof(bits));
    }
}

/* { f16 d; i8 q[32] }: d * q */
static KVT_TARGET void dequant_q8_0(const void *blocks, float *out, size_t count) {
    const uint8_t *in = blocks;
    for (size_t at = 0; at < count; at += 32, in += 34) {
        vf d = vf_set1(F16_AT(in));
        for (size_t i = 0; i < 32; i += VF_N)
            vf_store(out + at + i, d * vf_load_i8((const int8_t *)in + 2 + i));
    }
}

/* { f16 d; u8 q[16] }: d * (q - 8), the low nibbles first */
static KVT_TARGET void dequant_q4_0(const void *blocks, float *out, size_t count) {
    const uint8_t *in = blocks;
    vf eight = vf_set1(8);
    for (size_t at = 0; at < count; at += 32, in += 18) {
        vf d = vf_set1(F16_AT(in));
        for (size_t i = 0; i < 16; i += VF_N) {
            vf_store(out + at + i, d * (vf_load_low(in + 2 + i) - eight));
            vf_store(out + at + 16 + i, d * (vf_load_high(in + 2 + i) - eight));
        }
    }
}

/* { f16 d, m; u8 q[16] }: d * q + m */
static KVT_TARGET void dequant_q4_1(const void *blocks, float *out, size_t count) {
    const uint8_t *in = blocks;
    for (size_t at = 0; at < count; at += 32, in += 20) {
        vf d = vf_set1(F16_AT(in));
        vf m = vf_set1(F16_AT(in + 2));
        for (size_t i = 0; i < 16; i += VF_N) {
            vf_store(out + at + i, vf_fma(d, vf_load_low(in + 4 + i), m));
            vf_store(out + at + 16 + i, vf_fma(d, vf_load_high(in + 4 + i), m));
        }
    }
}

/* Scale and minimum j (6 bits each) of a Q4_K block's 12 packed bytes. */
static inline KVT_TARGET void q4_k_scale(const uint8_t *packed, size_t j, uint8_t *scale,
                                         uint8_t *minimum) {
    if (j < 4) {
        *scale = packed[j] & 63;
        *minimum = packed[j + 4] & 63;
    } else {
        *scale = (uint8_t)((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4);
        *minimum = (uint8_t)((packed[j + 4] >> 4) | (packed[j] >> 6) << 4);
    }
}

/* { f16 d, dmin; u8 scales[12]; u8 q[128] }: (d * scale) * q - (dmin * minimum), 8 x 32 values */
static KVT_TARGET void dequant_q4_k(const void *blocks, float *out, size_t count) {
    const uint8_t *in = blocks;
    for (size_t at = 0; at < count; at += 256, in += 144) {
        float d = F16_AT(in);
        float dmin = F16_AT(in + 2);
        for (size_t j = 0; j < 8; j++) {
            uint8_t scale;
            uint8_t minimum;
            q4_k_scale(in + 4, j, &scale, &minimum);
            const uint8_t *q = in + 16 + j / 2 * 32;
            vf factor = vf_set1(d * (float)scale);
            vf offset = vf_set1(-(dmin * (float)minimum));
            for (size_t i = 0; i < 32; i += VF_N) {
                vf value = j % 2 ? vf_load_high(q + i) : vf_load_low(q + i);
                vf_store(out + at + j * 32 + i, vf_fma(factor, value, offset));
            }
        }
    }
}

/* { u8 low[128]; u8 high[64]; i8 scales[16]; f16 d }: (d * scale) * (q - 32), 16 x 16 values */
static KVT_TARGET void dequant_q6_k(const void *blocks, float *out, size_t count) {
    const uint8_t *in = blocks;
    for (size_t at = 0; at < count; at += 256, in += 210) {
        float d = F16_AT(in + 208);
        for (size_t j = 0; j < 8; j++) { /* 32 values each: half j / 4, quarter j % 4 of it */
            const uint8_t *low = in + j / 4 * 64 + j % 2 * 32;
            const uint8_t *high = in + 128 + j / 4 * 32;
            const int8_t *scales = (const int8_t *)in + 192 + j * 2;
            unsigned low_shift = j % 4 / 2 * 4;
            unsigned high_shift = (unsigned)(j % 4) * 2;
            int8_t q[32];
            for (size_t i = 0; i < 32; i++)
                q[i] =
                    (int8_t)(((low[i] >> low_shift) & 15) | (((high[i] >> high_shift) & 3) << 4)) -
                    32;
            for (size_t i = 0; i < 32; i += VF_N)
                vf_store(out + at + j * 32 + i,
                         vf_set1(d * (float)scales[i / 16]) * vf_load_i8(q + i));
        }
    }
}

const kvt_dequant_fn KVT_PATH(kvt_dequant_table)[KVT_TENSOR_TYPES_END] = {
    [KVT_TENSOR_F32] = dequant_f32,   [KVT_TENSOR_F16] = dequant_f16,
    [KVT_TENSOR_BF16] = dequant_bf16, [KVT_TENSOR_Q8_0] = dequant_q8_0,
    [KVT_TENSOR_Q4_0] = dequant_q4_0, [KVT_TENSOR_Q4_1] = dequant_q4_1,
    [KVT_TENSOR_Q4_K] = dequant_q4_k, [KVT_TENSOR_Q6_K] = dequant_q6_k,
};
