/*
 * Vector loops that the CPU references share, one table a path; the path is
 * chosen once, by the CPU (see simd_generic.h). All results are in f32.
 *
 * The order of every sum is fixed by the counts alone, never by an address or a
 * thread: one machine gives the same bits each time. Paths may differ in the
 * last bits.
 */
#ifndef KVT_KERNELS_CPU_OPS_H
#define KVT_KERNELS_CPU_OPS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How K and V are stored; numbers as in the protocol's enum kvt_dtype. */
enum kvt_kv_dtype { KVT_KV_F32 = 1, KVT_KV_F16 = 2, KVT_KV_BF16 = 3 };

/* Bytes of one element. */
static inline size_t kvt_kv_dtype_bytes(enum kvt_kv_dtype dtype) {
    return dtype == KVT_KV_F32 ? 4 : 2;
}

struct kvt_cpu_ops {
    const char *name;
    void (*load)(enum kvt_kv_dtype dtype, const void *from, float *to, size_t count);
    void (*store)(enum kvt_kv_dtype dtype, const float *from, void *to, size_t count);
    float (*dot)(const float *a, const float *b, size_t count);
    /* scores[i][t] = q[i] . k[t]; q [queries][dim], a row of scores has `stride` elements,
     * tokens of k are `k_stride` elements apart */
    void (*scores)(enum kvt_kv_dtype dtype, const float *q, uint32_t queries, uint32_t dim,
                   const void *k, size_t k_stride, uint32_t tokens, float *scores, size_t stride);
    /* out[i] = sum over t of weights[i][t] * v[t], t ascending; out [queries][dim] */
    void (*values)(enum kvt_kv_dtype dtype, const float *weights, size_t stride, uint32_t queries,
                   uint32_t dim, const void *v, size_t v_stride, uint32_t tokens, float *out);
    /* x = exp(x - top) in place, top the largest; returns top, their sum in *sum. count > 0 */
    float (*softmax)(float *x, size_t count, float *sum);
    /* to = to * to_scale + from * from_scale */
    void (*merge)(float *to, float to_scale, const float *from, float from_scale, size_t count);
    /* out = x / sqrt(mean(x^2) + epsilon) * weight */
    void (*rmsnorm)(const float *x, const float *weight, float epsilon, float *out, size_t count);
    /* out = gate / (1 + exp(-gate)) * up */
    void (*swiglu)(const float *gate, const float *up, float *out, size_t count);
};

/* One table a path; the x86 ones exist on x86 only. */
extern const struct kvt_cpu_ops kvt_cpu_ops_table_generic;
extern const struct kvt_cpu_ops kvt_cpu_ops_table_avx2;
extern const struct kvt_cpu_ops kvt_cpu_ops_table_avx512;

/* The best path of this CPU. Any thread. */
const struct kvt_cpu_ops *kvt_cpu_ops(void);

/* A path by name, "generic", "avx2" or "avx512"; NULL where the CPU lacks it. For tests. */
const struct kvt_cpu_ops *kvt_cpu_ops_path(const char *name);

#ifdef __cplusplus
}
#endif

#endif
