/* What kvtier-run uses of BLAS, in plain loops: for the bundle, which OpenBLAS would make too large.
 * Row-major, A not transposed, as client/worker/matmul.c calls it; the compiler vectorises the inner
 * loops.
 */
#include <cblas.h>

#include <stdlib.h>

void openblas_set_num_threads(int threads) {
    (void)threads;
}

static void row_times_transposed(const float *a, const float *b, float *c, int n, int k,
                                 float alpha, int ldb) {
    for (int j = 0; j < n; j++) {
        float sums[8] = {0};
        int i = 0;
        for (; i + 8 <= k; i += 8) {
            for (int s = 0; s < 8; s++) {
                sums[s] += a[i + s] * b[(long)j * ldb + i + s];
            }
        }
        float sum = 0;
        for (; i < k; i++) {
            sum += a[i] * b[(long)j * ldb + i];
        }
        for (int s = 0; s < 8; s++) {
            sum += sums[s];
        }
        c[j] += alpha * sum;
    }
}

static void row_times(const float *a, const float *b, float *c, int n, int k, float alpha,
                      int ldb) {
    for (int i = 0; i < k; i++) {
        float x = alpha * a[i];
        for (int j = 0; j < n; j++) {
            c[j] += x * b[(long)i * ldb + j];
        }
    }
}

void cblas_sgemm(CBLAS_ORDER order, CBLAS_TRANSPOSE transpose_a, CBLAS_TRANSPOSE transpose_b,
                 blasint m, blasint n, blasint k, float alpha, const float *a, blasint lda,
                 const float *b, blasint ldb, float beta, float *c, blasint ldc) {
    if (order != CblasRowMajor || transpose_a != CblasNoTrans) {
        abort(); /* nobody asks for that */
    }
    for (blasint row = 0; row < m; row++) {
        float *out = c + (long)row * ldc;
        for (blasint j = 0; j < n; j++) {
            out[j] = beta == 0 ? 0 : beta * out[j];
        }
        if (transpose_b == CblasTrans) {
            row_times_transposed(a + (long)row * lda, b, out, n, k, alpha, ldb);
        } else {
            row_times(a + (long)row * lda, b, out, n, k, alpha, ldb);
        }
    }
}
