/* See rope_ref.h. Angles are computed in double: a position of 100,000 leaves f32 two digits. */
#include "kernels/rope_ref.h"

#include <math.h>
#include <stddef.h>

void kvt_rope_frequencies_ref(float base, float scale, const float *factors, uint32_t dim,
                              double *frequencies) {
    for (uint32_t i = 0; i < dim / 2; i++)
        frequencies[i] = pow(base, -2.0 * i / dim) / scale / (factors ? factors[i] : 1.0f);
}

void kvt_rope_table_ref(const double *frequencies, uint32_t dim, uint64_t position, float *table) {
    for (uint32_t i = 0; i < dim / 2; i++) {
        double angle = (double)position * frequencies[i];
        table[2 * i] = (float)cos(angle);
        table[2 * i + 1] = (float)sin(angle);
    }
}

void kvt_rope_ref(float *x, uint32_t heads, uint32_t head_dim, uint32_t dim, const float *table) {
    for (uint32_t head = 0; head < heads; head++) {
        float *pairs = x + (size_t)head * head_dim;
        for (uint32_t i = 0; i < dim; i += 2) {
            float a = pairs[i];
            float b = pairs[i + 1];
            pairs[i] = a * table[i] - b * table[i + 1];
            pairs[i + 1] = a * table[i + 1] + b * table[i];
        }
    }
}
