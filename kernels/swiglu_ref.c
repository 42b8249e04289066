/* See swiglu_ref.h. */
#include "kernels/swiglu_ref.h"

#include "kernels/cpu_ops.h"

void kvt_swiglu_ref(const float *gate, const float *up, float *out, size_t count) {
    kvt_cpu_ops()->swiglu(gate, up, out, count);
}
