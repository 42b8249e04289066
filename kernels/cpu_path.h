/* Which of the paths generic, avx2 and avx512 this CPU runs. */
#ifndef KVT_KERNELS_CPU_PATH_H
#define KVT_KERNELS_CPU_PATH_H

enum kvt_cpu_path { KVT_CPU_GENERIC = 0, KVT_CPU_AVX2 = 1, KVT_CPU_AVX512 = 2 };

/* The best one. Any thread; constant for a process. */
static inline enum kvt_cpu_path kvt_cpu_path_best(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return KVT_CPU_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return KVT_CPU_AVX2; /* every CPU with AVX2 has F16C */
#endif
    return KVT_CPU_GENERIC;
}

#endif
