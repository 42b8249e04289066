/* The loops of cpu_ops.h for any machine. */
#include "kernels/simd_generic.h"

#include "kernels/cpu_ops_impl.h"
