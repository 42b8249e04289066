/* The loops of cpu_ops.h on the vector names of simd_*.h; included once a path. */
#include <math.h>
#include <string.h>

#include "kernels/cpu_ops.h"
#include "kernels/half.h"

/* Cephes' expf, good to about one unit in the last place; below -87 it stays near 1e-38. */
VF_INLINE vf vf_exp(vf x) {
    x = vf_max(x, vf_set1(-87.3f));
    vf n = vf_round(x * vf_set1(1.44269504f));
    vf r = vf_fma(n, vf_set1(-0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
    p = vf_fma(p * r, r, r + vf_set1(1.0f));
    return vf_scale2(p, n);
}

/* VF_N elements of any dtype; with a constant dtype this is one load. */
VF_INLINE vf vf_load_kv(enum kvt_kv_dtype dtype, const void *base, size_t index) {
    if (dtype == KVT_KV_F16)
        return vf_load_f16((const uint16_t *)base + index);
    if (dtype == KVT_KV_BF16)
        return vf_load_bf16((const uint16_t *)base + index);
    return vf_load((const float *)base + index);
}

VF_INLINE float load_one(enum kvt_kv_dtype dtype, const void *base, size_t index) {
    if (dtype == KVT_KV_F16)
        return vf_f16_scalar(((const uint16_t *)base)[index]);
    if (dtype == KVT_KV_BF16)
        return kvt_f32_of_bf16(((const uint16_t *)base)[index]);
    return ((const float *)base)[index];
}

static KVT_TARGET void op_load(enum kvt_kv_dtype dtype, const void *from, float *to, size_t count) {
    size_t i = 0;
    if (dtype == KVT_KV_F16)
        for (; i + VF_N <= count; i += VF_N)
            vf_store(to + i, vf_load_kv(KVT_KV_F16, from, i));
    else if (dtype == KVT_KV_BF16)
        for (; i + VF_N <= count; i += VF_N)
            vf_store(to + i, vf_load_kv(KVT_KV_BF16, from, i));
    for (; i < count; i++)
        to[i] = load_one(dtype, from, i);
}

static KVT_TARGET void op_store(enum kvt_kv_dtype dtype, const float *from, void *to,
                                size_t count) {
    uint16_t *half = to;
    size_t i = 0;
    if (dtype == KVT_KV_F32) {
        memcpy(to, from, count * sizeof(*from));
        return;
    }
    for (; i + VF_N <= count; i += VF_N) {
        if (dtype == KVT_KV_F16)
            vf_store_f16(half + i, vf_load(from + i));
        else
            vf_store_bf16(half + i, vf_load(from + i));
    }
    for (; i < count; i++)
        half[i] = dtype == KVT_KV_F16 ? kvt_f16_of_f32(from[i]) : kvt_bf16_of_f32(from[i]);
}

static KVT_TARGET float op_dot(const float *a, const float *b, size_t count) {
    vf sum[4] = {vf_set1(0), vf_set1(0), vf_set1(0), vf_set1(0)};
    size_t i = 0;
    for (; i + 4 * VF_N <= count; i += 4 * VF_N)
        for (int k = 0; k < 4; k++)
            sum[k] = vf_fma(vf_load(a + i + (size_t)k * VF_N), vf_load(b + i + (size_t)k * VF_N),
                            sum[k]);
    for (; i + VF_N <= count; i += VF_N)
        sum[0] = vf_fma(vf_load(a + i), vf_load(b + i), sum[0]);
    float total = vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < count; i++)
        total += a[i] * b[i];
    return total;
}

VF_INLINE void scores_of(enum kvt_kv_dtype dtype, const float *q, uint32_t queries, uint32_t dim,
                         const void *k, size_t k_stride, uint32_t tokens, float *scores,
                         size_t stride) {
    for (uint32_t t = 0; t < tokens; t++) {
        size_t row = t * k_stride;
        for (uint32_t i = 0; i < queries; i++) {
            const float *query = q + (size_t)i * dim;
            vf even = vf_set1(0);
            vf odd = vf_set1(0);
            uint32_t d = 0;
            for (; d + 2 * VF_N <= dim; d += 2 * VF_N) {
                even = vf_fma(vf_load(query + d), vf_load_kv(dtype, k, row + d), even);
                odd = vf_fma(vf_load(query + d + VF_N), vf_load_kv(dtype, k, row + d + VF_N), odd);
            }
            for (; d + VF_N <= dim; d += VF_N)
                even = vf_fma(vf_load(query + d), vf_load_kv(dtype, k, row + d), even);
            float sum = vf_sum(even + odd);
            for (; d < dim; d++)
                sum += query[d] * load_one(dtype, k, row + d);
            scores[i * stride + t] = sum;
        }
    }
}

/* The common head dims and dtypes get loops of their own, unrolled by the compiler. */
static KVT_TARGET void op_scores(enum kvt_kv_dtype dtype, const float *q, uint32_t queries,
                                 uint32_t dim, const void *k, size_t k_stride, uint32_t tokens,
                                 float *scores, size_t stride) {
    if (dtype == KVT_KV_F16 && dim == 64)
        scores_of(KVT_KV_F16, q, queries, 64, k, k_stride, tokens, scores, stride);
    else if (dtype == KVT_KV_F16 && dim == 128)
        scores_of(KVT_KV_F16, q, queries, 128, k, k_stride, tokens, scores, stride);
    else if (dtype == KVT_KV_F16)
        scores_of(KVT_KV_F16, q, queries, dim, k, k_stride, tokens, scores, stride);
    else if (dtype == KVT_KV_BF16)
        scores_of(KVT_KV_BF16, q, queries, dim, k, k_stride, tokens, scores, stride);
    else
        scores_of(KVT_KV_F32, q, queries, dim, k, k_stride, tokens, scores, stride);
}

/* `lanes` vectors of up to four queries' sums stay in registers over all tokens. */
VF_INLINE void values_of(enum kvt_kv_dtype dtype, const float *weights, size_t stride,
                         uint32_t queries, uint32_t dim, uint32_t d, const uint32_t lanes,
                         const void *v, size_t v_stride, uint32_t tokens, float *out) {
    vf sum[4][4];
    for (uint32_t i = 0; i < queries; i++)
        for (uint32_t j = 0; j < lanes; j++)
            sum[i][j] = vf_set1(0);
    for (uint32_t t = 0; t < tokens; t++) {
        vf value[4];
        for (uint32_t j = 0; j < lanes; j++)
            value[j] = vf_load_kv(dtype, v, t * v_stride + d + j * VF_N);
        for (uint32_t i = 0; i < queries; i++) {
            vf weight = vf_set1(weights[i * stride + t]);
            for (uint32_t j = 0; j < lanes; j++)
                sum[i][j] = vf_fma(weight, value[j], sum[i][j]);
        }
    }
    for (uint32_t i = 0; i < queries; i++)
        for (uint32_t j = 0; j < lanes; j++)
            vf_store(out + (size_t)i * dim + d + j * VF_N, sum[i][j]);
}

#define VALUES_LANES (VF_N == 16 ? 4 : 2)

VF_INLINE void values_all(enum kvt_kv_dtype dtype, const float *weights, size_t stride,
                          uint32_t queries, uint32_t dim, const void *v, size_t v_stride,
                          uint32_t tokens, float *out) {
    uint32_t d = 0;
    for (; d + VALUES_LANES * VF_N <= dim; d += VALUES_LANES * VF_N)
        values_of(dtype, weights, stride, queries, dim, d, VALUES_LANES, v, v_stride, tokens, out);
    for (; d + VF_N <= dim; d += VF_N)
        values_of(dtype, weights, stride, queries, dim, d, 1, v, v_stride, tokens, out);
    for (; d < dim; d++) {
        for (uint32_t i = 0; i < queries; i++) {
            float sum = 0;
            for (uint32_t t = 0; t < tokens; t++)
                sum += weights[i * stride + t] * load_one(dtype, v, t * v_stride + d);
            out[(size_t)i * dim + d] = sum;
        }
    }
}

VF_INLINE void values_typed(enum kvt_kv_dtype dtype, const float *weights, size_t stride,
                            uint32_t queries, uint32_t dim, const void *v, size_t v_stride,
                            uint32_t tokens, float *out) {
    switch (queries) {
    case 1:
        values_all(dtype, weights, stride, 1, dim, v, v_stride, tokens, out);
        break;
    case 2:
        values_all(dtype, weights, stride, 2, dim, v, v_stride, tokens, out);
        break;
    case 3:
        values_all(dtype, weights, stride, 3, dim, v, v_stride, tokens, out);
        break;
    default:
        values_all(dtype, weights, stride, 4, dim, v, v_stride, tokens, out);
        break;
    }
}

static KVT_TARGET void op_values(enum kvt_kv_dtype dtype, const float *weights, size_t stride,
                                 uint32_t queries, uint32_t dim, const void *v, size_t v_stride,
                                 uint32_t tokens, float *out) {
    for (uint32_t i = 0; i < queries; i += 4) {
        uint32_t few = queries - i < 4 ? queries - i : 4;
        const float *w = weights + i * stride;
        float *to = out + (size_t)i * dim;
        if (dtype == KVT_KV_F16)
            values_typed(KVT_KV_F16, w, stride, few, dim, v, v_stride, tokens, to);
        else if (dtype == KVT_KV_BF16)
            values_typed(KVT_KV_BF16, w, stride, few, dim, v, v_stride, tokens, to);
        else
            values_typed(KVT_KV_F32, w, stride, few, dim, v, v_stride, tokens, to);
    }
}

static KVT_TARGET float op_softmax(float *x, size_t count, float *sum) {
    vf tops = vf_set1(x[0]);
    size_t i = 0;
    for (; i + VF_N <= count; i += VF_N)
        tops = vf_max(tops, vf_load(x + i));
    float top = vf_top(tops);
    for (; i < count; i++)
        top = x[i] > top ? x[i] : top;

    vf sums = vf_set1(0);
    for (i = 0; i + VF_N <= count; i += VF_N) {
        vf e = vf_exp(vf_load(x + i) - vf_set1(top));
        vf_store(x + i, e);
        sums = sums + e;
    }
    float total = vf_sum(sums);
    if (i < count) { /* the rest goes through the same vectors, padded */
        float rest[VF_N];
        for (size_t k = 0; k < VF_N; k++)
            rest[k] = i + k < count ? x[i + k] : top;
        vf_store(rest, vf_exp(vf_load(rest) - vf_set1(top)));
        for (size_t k = 0; i + k < count; k++) {
            x[i + k] = rest[k];
            total += rest[k];
        }
    }
    *sum = total;
    return top;
}

static KVT_TARGET void op_merge(float *to, float to_scale, const float *from, float from_scale,
                                size_t count) {
    size_t i = 0;
    for (; i + VF_N <= count; i += VF_N)
        vf_store(to + i, vf_fma(vf_load(to + i), vf_set1(to_scale),
                                vf_load(from + i) * vf_set1(from_scale)));
    for (; i < count; i++)
        to[i] = to[i] * to_scale + from[i] * from_scale;
}

static KVT_TARGET void op_rmsnorm(const float *x, const float *weight, float epsilon, float *out,
                                  size_t count) {
    float scale = 1.0f / sqrtf(op_dot(x, x, count) / (float)count + epsilon);
    size_t i = 0;
    for (; i + VF_N <= count; i += VF_N)
        vf_store(out + i, vf_load(x + i) * vf_set1(scale) * vf_load(weight + i));
    for (; i < count; i++)
        out[i] = x[i] * scale * weight[i];
}

static KVT_TARGET void op_swiglu(const float *gate, const float *up, float *out, size_t count) {
    vf one = vf_set1(1);
    size_t i = 0;
    for (; i + VF_N <= count; i += VF_N) {
        vf g = vf_load(gate + i);
        /* exp's argument is kept below where f32 ends; the quotient is 0 there anyway */
        vf e = vf_exp(vf_set1(0) - vf_max(g, vf_set1(-87.3f)));
        vf_store(out + i, g / (one + e) * vf_load(up + i));
    }
    for (; i < count; i++) {
        float g = gate[i] > -87.3f ? gate[i] : -87.3f;
        out[i] = gate[i] / (1.0f + expf(-g)) * up[i];
    }
}

const struct kvt_cpu_ops KVT_PATH(kvt_cpu_ops_table) = {
    .load = op_load,
    .store = op_store,
    .dot = op_dot,
    .scores = op_scores,
    .values = op_values,
    .softmax = op_softmax,
    .merge = op_merge,
    .rmsnorm = op_rmsnorm,
    .swiglu = op_swiglu,
    .name = KVT_PATH_NAME,
};
