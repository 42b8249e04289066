/* The GPU's part of kvtier-synth: kernels that write tokens' bytes, and that compare what a piece
 * offers with what it must be. Launched by the driver API with one parameter, a job by value.
 *
 *   kvt_synth_gpu_write   writes the bytes
 *   kvt_synth_gpu_check   compares them, counts words that differ and keeps the first it meets
 *   kvt_synth_gpu_spin    keeps one block busy for `count` microseconds: attention that takes time
 *
 * Any grid of blocks of KVT_SYNTH_GPU_THREADS: each thread goes on in strides.
 *
 * Shapes: plane [count][token_bytes], contiguous; ids [count]. Read by C and by nvcc.
 */
#ifndef KVT_KERNELS_SYNTH_GPU_H
#define KVT_KERNELS_SYNTH_GPU_H

#include <stdint.h>

#define KVT_SYNTH_GPU_THREADS 256

struct kvt_synth_gpu_errors {
    uint64_t count; /* words that differ */
    /* of the first one: */
    uint64_t expected;
    uint64_t found;
    uint32_t token; /* absolute position */
    uint32_t layer;
    uint32_t plane;
    uint32_t offset; /* bytes, of the word in the token */
};

struct kvt_synth_gpu_job {
    const uint64_t *ids; /* content numbers of the tokens from `first` on */
    uint8_t *plane;      /* bytes of token `first` */
    struct kvt_synth_gpu_errors *errors;
    uint32_t first; /* absolute position */
    uint32_t count;
    uint32_t layer;
    uint32_t plane_index; /* 0: K, 1: V */
    uint32_t token_bytes;
    uint32_t reserved;
};

#endif
