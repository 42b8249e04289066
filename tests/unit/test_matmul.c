/* Products with weights of every type, against double sums; equal bits for any thread count. */
#include "client/worker/matmul.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "client/worker/dequant.h"
#include "tests/support/cunit_run.h"

static uint32_t random_state = 9;
static uint32_t random_bits(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

/* Random bytes; halves and floats in them get small exponents, so that every value is finite. */
static struct kvt_weight random_weight(uint32_t type, uint32_t rows, uint32_t columns) {
    const struct kvt_tensor_traits *traits = kvt_tensor_traits(type);
    size_t row_bytes = (size_t)columns / traits->block_values * traits->block_bytes;
    uint8_t *data = malloc(rows * row_bytes);
    for (size_t i = 0; i < rows * row_bytes; i++)
        data[i] = (uint8_t)random_bits();
    for (size_t i = 0; i < rows * row_bytes; i += traits->block_bytes) {
        if (type == KVT_TENSOR_F32 || type == KVT_TENSOR_BF16)
            data[i + traits->block_bytes - 1] = (uint8_t)(0x3e | (random_bits() & 0x80));
        else if (type == KVT_TENSOR_Q6_K)
            data[i + 209] = 0x20;
        else
            data[i + 1] = 0x20;
        if (type == KVT_TENSOR_Q4_1 || type == KVT_TENSOR_Q4_K)
            data[i + 3] = 0xa4;
    }
    return (struct kvt_weight){type, rows, columns, row_bytes, data};
}

static void test_every_type(void) {
    static const uint32_t types[] = {KVT_TENSOR_F32,  KVT_TENSOR_F16,  KVT_TENSOR_BF16,
                                     KVT_TENSOR_Q8_0, KVT_TENSOR_Q4_0, KVT_TENSOR_Q4_1,
                                     KVT_TENSOR_Q4_K, KVT_TENSOR_Q6_K};
    static const uint32_t counts[] = {1, 3, 8, 9, 40};
    enum { ROWS = 77, OTHER_ROWS = 300, COLUMNS = 512, COUNT_MAX = 40 };
    float *x = malloc(COUNT_MAX * COLUMNS * sizeof(*x));
    float *y = malloc(COUNT_MAX * ROWS * sizeof(*y));
    float *other = malloc(COUNT_MAX * OTHER_ROWS * sizeof(*other));
    float *first = malloc(COUNT_MAX * ROWS * sizeof(*first));
    float row[COLUMNS];
    for (size_t i = 0; i < COUNT_MAX * COLUMNS; i++)
        x[i] = (float)random_bits() / (1 << 23) - 1;

    for (size_t t = 0; t < sizeof(types) / sizeof(types[0]); t++) {
        struct kvt_weight w = random_weight(types[t], ROWS, COLUMNS);
        struct kvt_weight w2 = random_weight(KVT_TENSOR_Q8_0, OTHER_ROWS, COLUMNS);
        const struct kvt_product products[] = {{&w2, x, other}, {&w, x, y}};
        for (uint32_t threads = 1; threads <= 3; threads++) {
            struct kvt_pool *pool;
            struct kvt_matmul *matmul;
            CU_ASSERT_EQUAL_FATAL(kvt_pool_open(&pool, threads), 0);
            CU_ASSERT_EQUAL_FATAL(kvt_matmul_open(&matmul, pool, COLUMNS), 0);
            for (size_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++) {
                double worst = 0;
                size_t bytes = counts[c] * ROWS * sizeof(*y);
                memset(y, 0xff, bytes);
                kvt_matmul_run(matmul, products, 2, counts[c]);
                for (uint32_t n = 0; n < ROWS; n++) {
                    kvt_weight_row(&w, n, row);
                    for (uint32_t m = 0; m < counts[c]; m++) {
                        double sum = 0;
                        double size = 0;
                        for (size_t k = 0; k < COLUMNS; k++) {
                            sum += (double)row[k] * x[m * COLUMNS + k];
                            size += fabs((double)row[k] * x[m * COLUMNS + k]);
                        }
                        double off = fabs(y[m * ROWS + n] - sum) / size;
                        worst = off <= worst ? worst : off; /* keeps a NaN, as fmax would not */
                    }
                }
                /* each of 512 products and sums rounds once, by 2^-24 at most */
                CU_ASSERT(worst < 3e-6);
                if (threads == 1 && counts[c] == 40)
                    memcpy(first, y, bytes);
                if (counts[c] == 40)
                    CU_ASSERT_EQUAL(memcmp(first, y, bytes), 0);
            }
            kvt_matmul_close(matmul);
            kvt_pool_close(pool);
        }
        free((void *)(uintptr_t)w.data);
        free((void *)(uintptr_t)w2.data);
    }
    free(x);
    free(y);
    free(other);
    free(first);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"every type", test_every_type},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("matmul", tests);
}
