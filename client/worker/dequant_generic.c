/* Dequantizers for any machine. */
#include "kernels/simd_generic.h"

#include "client/worker/dequant_impl.h"
