/* Shapes of models that kvtierctl plan and kvtier-run --random know by name: one list for both.
 * X(name, tied, layers, width, hidden, heads, kv_heads, k_dim, v_dim, turned, vocabulary, context,
 *   eps, base): `tied` if the output is the embedding, `turned` the elements of a head that RoPE turns.
 */
#ifndef KVT_CLIENT_SHAPES_H
#define KVT_CLIENT_SHAPES_H

// clang-format off
#define KVT_SHAPES(X)                                                                             \
    X("tiny", true, 3, 64, 128, 4, 2, 32, 32, 32, 512, 131072, 1e-5f, 10000)                      \
    X("smollm2-135m", true, 30, 576, 1536, 9, 3, 64, 64, 64, 49152, 8192, 1e-5f, 100000)          \
    X("smollm2-1.7b", true, 24, 2048, 8192, 32, 32, 64, 64, 64, 49152, 8192, 1e-5f, 130000)       \
    X("llama-3.2-1b", true, 16, 2048, 8192, 32, 8, 64, 64, 64, 128256, 131072, 1e-5f, 500000)     \
    X("qwen2.5-7b", false, 28, 3584, 18944, 28, 4, 128, 128, 128, 152064, 131072, 1e-6f, 1000000) \
    X("llama-3-8b", false, 32, 4096, 14336, 32, 8, 128, 128, 128, 128256, 131072, 1e-5f, 500000)  \
    X("llama-3-70b", false, 80, 8192, 28672, 64, 8, 128, 128, 128, 128256, 131072, 1e-5f, 500000)
// clang-format on

/* "tiny, smollm2-135m, ..." */
#define KVT_SHAPES_NAME(name, ...) ", " name
#define KVT_SHAPE_NAMES            (&("" KVT_SHAPES(KVT_SHAPES_NAME))[2])

#endif
