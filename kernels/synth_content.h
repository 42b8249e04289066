/* The bytes that kvtier-synth writes and checks: a hash of (content number of the token, position,
 * layer, plane, word), so that a byte of another place or moment is a wrong byte. One definition for
 * the CPU and the GPU.
 *
 * Read by C and by nvcc.
 */
#ifndef KVT_KERNELS_SYNTH_CONTENT_H
#define KVT_KERNELS_SYNTH_CONTENT_H

#include <stdint.h>

#ifdef __CUDACC__
#define KVT_SYNTH_CALL __host__ __device__ static inline
#else
#define KVT_SYNTH_CALL static inline
#endif

/* plane: 0 K, 1 V. */
KVT_SYNTH_CALL uint64_t kvt_synth_seed(uint64_t id, uint32_t token, uint32_t layer,
                                       uint32_t plane) {
    uint64_t x = id ^ ((uint64_t)token << 32) ^ ((uint64_t)layer << 8) ^ plane;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* Word `i` (8 bytes, little-endian) of a token; the last one of a token may be cut. */
KVT_SYNTH_CALL uint64_t kvt_synth_word(uint64_t seed, uint32_t i) {
    uint64_t x = (seed + i) * 0x9e3779b97f4a7c15ull;
    return x ^ (x >> 32);
}

#endif
