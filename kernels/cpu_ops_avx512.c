/* The loops of cpu_ops.h for avx512. */
#if defined(__x86_64__)
#include "kernels/simd_avx512.h"

#include "kernels/cpu_ops_impl.h"
#endif
