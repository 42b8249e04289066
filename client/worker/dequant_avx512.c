/* Dequantizers for avx512. */
#if defined(__x86_64__)
#include "kernels/simd_avx512.h"

#include "client/worker/dequant_impl.h"
#endif
