/* The loops of cpu_ops.h for avx2. */
#if defined(__x86_64__)
#include "kernels/simd_avx2.h"

#include "kernels/cpu_ops_impl.h"
#endif
