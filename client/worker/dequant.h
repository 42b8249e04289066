/*
 * Tensor types of GGUF and their values as f32.
 *
 * A row is a whole number of blocks. Dequantizers follow the `gguf` package's
 * order of operations; where a type's products are exact in f32 (all but
 * Q6_K's last one, which both round once) every path gives the same bits.
 */
#ifndef KVT_WORKER_DEQUANT_H
#define KVT_WORKER_DEQUANT_H

#include <stddef.h>
#include <stdint.h>

/* As numbered in the file. */
enum kvt_tensor_type {
    KVT_TENSOR_F32 = 0,
    KVT_TENSOR_F16 = 1,
    KVT_TENSOR_Q4_0 = 2,
    KVT_TENSOR_Q4_1 = 3,
    KVT_TENSOR_Q8_0 = 8,
    KVT_TENSOR_Q4_K = 12,
    KVT_TENSOR_Q6_K = 14,
    KVT_TENSOR_BF16 = 30,
    KVT_TENSOR_TYPES_END = 31
};

#define KVT_TENSOR_TYPES_TEXT "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K"

/* blocks: `count` values, a multiple of the block, to out[count] */
typedef void (*kvt_dequant_fn)(const void *blocks, float *out, size_t count);

struct kvt_tensor_traits {
    const char *name;
    uint32_t block_values;
    uint32_t block_bytes;
};

/* NULL for a type that is not supported. */
const struct kvt_tensor_traits *kvt_tensor_traits(uint32_t type);

/* The name of any type that GGUF knows, "unknown" for others: for error texts. */
const char *kvt_tensor_type_text(uint32_t type);

/* The fastest dequantizer of a supported type on this machine. Any thread. */
kvt_dequant_fn kvt_dequant(uint32_t type);

/* That of a named path, "generic", "avx2" or "avx512"; NULL where the CPU lacks it. For tests. */
kvt_dequant_fn kvt_dequant_path(uint32_t type, const char *path);

#endif
