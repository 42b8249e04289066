// See synth_gpu.h. Compiled to an image that kvtier-synth carries and loads by the driver API.
#include "kernels/synth_gpu.h"

#include "kernels/synth_content.h"

// Words of a token: the last one may be cut.
__device__ static uint32_t words_of(uint32_t token_bytes) {
    return (token_bytes + 7) / 8;
}

__device__ static uint32_t bytes_of_word(uint32_t token_bytes, uint32_t word) {
    uint32_t left = token_bytes - word * 8;
    return left < 8 ? left : 8;
}

__device__ static uint64_t load(const uint8_t *p, uint32_t bytes) {
    uint64_t x = 0;
    if (bytes == 8 && ((uintptr_t)p & 7) == 0) {
        return *(const uint64_t *)p;
    }
    for (uint32_t i = 0; i < bytes; i++) {
        x |= (uint64_t)p[i] << (8 * i);
    }
    return x;
}

__device__ static void store(uint8_t *p, uint32_t bytes, uint64_t x) {
    if (bytes == 8 && ((uintptr_t)p & 7) == 0) {
        *(uint64_t *)p = x;
        return;
    }
    for (uint32_t i = 0; i < bytes; i++) {
        p[i] = (uint8_t)(x >> (8 * i));
    }
}

__device__ static void complain(struct kvt_synth_gpu_errors *e, const struct kvt_synth_gpu_job *j,
                                uint32_t token, uint32_t word, uint64_t expected, uint64_t found) {
    if (atomicAdd((unsigned long long *)&e->count, 1ull) == 0) {
        e->expected = expected;
        e->found = found;
        e->token = j->first + token;
        e->layer = j->layer;
        e->plane = j->plane_index;
        e->offset = word * 8;
    }
}

// A word of the job: where it is, and what it must be. Bytes beyond the token's last one are 0.
struct place {
    uint32_t token; // counted from the job's first
    uint32_t word;
    uint32_t bytes;
    uint8_t *at;
    uint64_t value;
};

__device__ static struct place place_of(const struct kvt_synth_gpu_job *j, uint64_t index) {
    struct place p;
    uint32_t words = words_of(j->token_bytes);
    p.token = (uint32_t)(index / words);
    p.word = (uint32_t)(index % words);
    p.bytes = bytes_of_word(j->token_bytes, p.word);
    p.at = j->plane + (uint64_t)p.token * j->token_bytes + p.word * 8;
    uint64_t seed = kvt_synth_seed(j->ids[p.token], j->first + p.token, j->layer, j->plane_index);
    p.value = kvt_synth_word(seed, p.word) & (~0ull >> (64 - 8 * p.bytes));
    return p;
}

// One thread, one word: neighbours in a warp meet neighbouring words.
__device__ static uint64_t first_word(void) {
    return (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
}

__device__ static uint64_t stride(void) {
    return (uint64_t)gridDim.x * blockDim.x;
}

extern "C" __global__ void __launch_bounds__(KVT_SYNTH_GPU_THREADS)
    kvt_synth_gpu_check(struct kvt_synth_gpu_job j) {
    uint64_t all = (uint64_t)j.count * words_of(j.token_bytes);
    for (uint64_t i = first_word(); i < all; i += stride()) {
        struct place p = place_of(&j, i);
        uint64_t found = load(p.at, p.bytes);
        if (found != p.value) {
            complain(j.errors, &j, p.token, p.word, p.value, found);
        }
    }
}

extern "C" __global__ void __launch_bounds__(KVT_SYNTH_GPU_THREADS)
    kvt_synth_gpu_write(struct kvt_synth_gpu_job j) {
    uint64_t all = (uint64_t)j.count * words_of(j.token_bytes);
    for (uint64_t i = first_word(); i < all; i += stride()) {
        struct place p = place_of(&j, i);
        store(p.at, p.bytes, p.value);
    }
}

extern "C" __global__ void kvt_synth_gpu_spin(struct kvt_synth_gpu_job j) {
    uint64_t begin;
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - begin < (uint64_t)j.count * 1000);
}
