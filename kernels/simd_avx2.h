/* Vectors of f32 for the kernels, path for AVX2 with FMA and F16C; see simd_generic.h. */
#ifndef KVT_KERNELS_SIMD_H
#define KVT_KERNELS_SIMD_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define KVT_TARGET     __attribute__((target("avx2,fma,f16c")))
#define KVT_PATH(name) name##_avx2
#define KVT_PATH_NAME  "avx2"
#define VF_N           8

typedef __m256 vf;

#define VF_INLINE static inline __attribute__((always_inline, unused)) KVT_TARGET

VF_INLINE vf vf_set1(float x) {
    return _mm256_set1_ps(x);
}
VF_INLINE vf vf_load(const float *p) {
    return _mm256_loadu_ps(p);
}
VF_INLINE void vf_store(float *p, vf v) {
    _mm256_storeu_ps(p, v);
}
VF_INLINE vf vf_fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
VF_INLINE vf vf_max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}
VF_INLINE float vf_sum(vf v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
VF_INLINE float vf_top(vf v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
VF_INLINE vf vf_round(vf v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
VF_INLINE vf vf_scale2(vf v, vf n) {
    __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return v * _mm256_castsi256_ps(_mm256_slli_epi32(power, 23));
}
VF_INLINE vf vf_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
VF_INLINE vf vf_load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
VF_INLINE void vf_store_f16(uint16_t *p, vf v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
VF_INLINE void vf_store_bf16(uint16_t *p, vf v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}
VF_INLINE vf vf_load_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
VF_INLINE vf vf_load_low(const uint8_t *p) {
    __m128i low = _mm_and_si128(_mm_loadl_epi64((const __m128i *)p), _mm_set1_epi8(15));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low));
}
VF_INLINE vf vf_load_high(const uint8_t *p) {
    __m128i high = _mm_srli_epi16(_mm_loadl_epi64((const __m128i *)p), 4);
    high = _mm_and_si128(high, _mm_set1_epi8(15));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high));
}
VF_INLINE float vf_f16_scalar(uint16_t half) {
    return _cvtsh_ss(half);
}

#endif
