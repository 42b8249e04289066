/* Dequantizers for avx2. */
#if defined(__x86_64__)
#include "kernels/simd_avx2.h"

#include "client/worker/dequant_impl.h"
#endif
