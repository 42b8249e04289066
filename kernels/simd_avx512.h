/* Vectors of f32 for the kernels, path for AVX-512 (F, BW, DQ, VL); see simd_generic.h. */
#ifndef KVT_KERNELS_SIMD_H
#define KVT_KERNELS_SIMD_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define KVT_TARGET     __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define KVT_PATH(name) name##_avx512
#define KVT_PATH_NAME  "avx512"
#define VF_N           16

typedef __m512 vf;

#define VF_INLINE static inline __attribute__((always_inline, unused)) KVT_TARGET

VF_INLINE vf vf_set1(float x) {
    return _mm512_set1_ps(x);
}
VF_INLINE vf vf_load(const float *p) {
    return _mm512_loadu_ps(p);
}
VF_INLINE void vf_store(float *p, vf v) {
    _mm512_storeu_ps(p, v);
}
VF_INLINE vf vf_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
VF_INLINE vf vf_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
VF_INLINE float vf_sum(vf v) {
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
VF_INLINE float vf_top(vf v) {
    __m256 y = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
VF_INLINE vf vf_round(vf v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
VF_INLINE vf vf_scale2(vf v, vf n) {
    return _mm512_scalef_ps(v, n);
}
VF_INLINE vf vf_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
VF_INLINE vf vf_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
VF_INLINE void vf_store_f16(uint16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
VF_INLINE void vf_store_bf16(uint16_t *p, vf v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(high));
}
VF_INLINE vf vf_load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
VF_INLINE vf vf_load_low(const uint8_t *p) {
    __m128i low = _mm_and_si128(_mm_loadu_si128((const __m128i *)p), _mm_set1_epi8(15));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(low));
}
VF_INLINE vf vf_load_high(const uint8_t *p) {
    __m128i high = _mm_srli_epi16(_mm_loadu_si128((const __m128i *)p), 4);
    high = _mm_and_si128(high, _mm_set1_epi8(15));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(high));
}
VF_INLINE float vf_f16_scalar(uint16_t half) {
    return _cvtsh_ss(half);
}

#endif
