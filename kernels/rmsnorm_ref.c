/* See rmsnorm_ref.h. */
#include "kernels/rmsnorm_ref.h"

#include "kernels/cpu_ops.h"

void kvt_rmsnorm_ref(const float *x, const float *weight, float epsilon, float *out, uint32_t rows,
                     uint32_t dim) {
    const struct kvt_cpu_ops *ops = kvt_cpu_ops();
    for (size_t i = 0; i < rows; i++)
        ops->rmsnorm(x + i * dim, weight, epsilon, out + i * dim, dim);
}
