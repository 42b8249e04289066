/* Names, block sizes and the choice of a path; the dequantizers lie in dequant_impl.h. */
#include "client/worker/dequant.h"

#include "client/worker/dequant_paths.h"
#include "kernels/cpu_path.h"

static const struct kvt_tensor_traits traits_table[KVT_TENSOR_TYPES_END] = {
    [KVT_TENSOR_F32] = {"F32", 1, 4},       [KVT_TENSOR_F16] = {"F16", 1, 2},
    [KVT_TENSOR_BF16] = {"BF16", 1, 2},     [KVT_TENSOR_Q8_0] = {"Q8_0", 32, 34},
    [KVT_TENSOR_Q4_0] = {"Q4_0", 32, 18},   [KVT_TENSOR_Q4_1] = {"Q4_1", 32, 20},
    [KVT_TENSOR_Q4_K] = {"Q4_K", 256, 144}, [KVT_TENSOR_Q6_K] = {"Q6_K", 256, 210},
};

const struct kvt_tensor_traits *kvt_tensor_traits(uint32_t type) {
    return type < KVT_TENSOR_TYPES_END && traits_table[type].name ? &traits_table[type] : NULL;
}

const char *kvt_tensor_type_text(uint32_t type) {
    static const char *const others[] = {
        [6] = "Q5_0",   [7] = "Q5_1",    [9] = "Q8_1",     [10] = "Q2_K",   [11] = "Q3_K",
        [13] = "Q5_K",  [15] = "Q8_K",   [16] = "IQ2_XXS", [17] = "IQ2_XS", [18] = "IQ3_XXS",
        [19] = "IQ1_S", [20] = "IQ4_NL", [21] = "IQ3_S",   [22] = "IQ2_S",  [23] = "IQ4_XS",
        [24] = "I8",    [25] = "I16",    [26] = "I32",     [27] = "I64",    [28] = "F64",
        [29] = "IQ1_M", [34] = "TQ1_0",  [35] = "TQ2_0",   [39] = "MXFP4",
    };
    const struct kvt_tensor_traits *traits = kvt_tensor_traits(type);
    if (traits)
        return traits->name;
    return type < sizeof(others) / sizeof(others[0]) && others[type] ? others[type] : "unknown";
}

static kvt_dequant_fn dequant_of(uint32_t type, enum kvt_cpu_path path) {
    if (!kvt_tensor_traits(type))
        return NULL;
#if defined(__x86_64__)
    if (path == KVT_CPU_AVX512)
        return kvt_dequant_table_avx512[type];
    if (path == KVT_CPU_AVX2)
        return kvt_dequant_table_avx2[type];
#else
    (void)path;
#endif
    return kvt_dequant_table_generic[type];
}

kvt_dequant_fn kvt_dequant(uint32_t type) {
    return dequant_of(type, kvt_cpu_path_best());
}

kvt_dequant_fn kvt_dequant_path(uint32_t type, const char *path) {
    static const char *const names[] = {"generic", "avx2", "avx512"};
    for (int i = 0; i <= (int)kvt_cpu_path_best(); i++)
        if (strcmp(names[i], path) == 0)
            return dequant_of(type, (enum kvt_cpu_path)i);
    return NULL;
}
