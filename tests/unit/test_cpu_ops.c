/* The vector loops of every path against plain C, and the small references on them. */
#include "kernels/cpu_ops.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/half.h"
#include "kernels/rmsnorm_ref.h"
#include "kernels/rope_ref.h"
#include "kernels/swiglu_ref.h"
#include "tests/support/cunit_run.h"

static const char *const paths[] = {"generic", "avx2", "avx512"};
#define FOR_EACH_PATH(ops)                     \
    for (size_t path_ = 0; path_ < 3; path_++) \
        for (const struct kvt_cpu_ops *ops = kvt_cpu_ops_path(paths[path_]); ops; ops = NULL)

static uint32_t random_state = 1;
static uint32_t random_bits(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return random_state ^ random_state >> 16;
}

static bool same_or_both_nan(float a, float b) {
    return isnan(a) ? isnan(b) : kvt_bits_of_f32(a) == kvt_bits_of_f32(b);
}

/* All 65,536 halves; the tail loop is used too, as the counts are odd. */
static void test_load_every_half(void) {
    static uint16_t halves[65536];
    static float values[65536];
    for (uint32_t i = 0; i < 65536; i++)
        halves[i] = (uint16_t)i;
    FOR_EACH_PATH(ops) {
        uint32_t wrong = 0;
        ops->load(KVT_KV_F16, halves, values, 65535);
        for (uint32_t i = 0; i < 65535; i++)
            wrong += !same_or_both_nan(values[i], kvt_f32_of_f16((uint16_t)i));
        ops->load(KVT_KV_BF16, halves, values, 65535);
        for (uint32_t i = 0; i < 65535; i++)
            wrong += !same_or_both_nan(values[i], kvt_f32_of_bits(i << 16));
        CU_ASSERT_EQUAL(wrong, 0);
    }
    /* the plain one itself, where an answer is known */
    CU_ASSERT_EQUAL(kvt_f32_of_f16(0x3c00), 1.0f);
    CU_ASSERT_EQUAL(kvt_f32_of_f16(0xc500), -5.0f);
    CU_ASSERT_EQUAL(kvt_f32_of_f16(0x0001), 0x1p-24f);
    CU_ASSERT_EQUAL(kvt_f32_of_f16(0x7bff), 65504.0f);
    CU_ASSERT_EQUAL(kvt_f32_of_f16(0xfc00), -INFINITY);
}

static void test_store_rounds_to_even(void) {
    CU_ASSERT_EQUAL(kvt_f16_of_f32(1.0f + 0x1p-11f), 0x3c00); /* half way, to even */
    CU_ASSERT_EQUAL(kvt_f16_of_f32(1.0f + 3 * 0x1p-11f), 0x3c02);
    CU_ASSERT_EQUAL(kvt_f16_of_f32(65519.0f), 0x7bff);
    CU_ASSERT_EQUAL(kvt_f16_of_f32(65520.0f), 0x7c00);
    CU_ASSERT_EQUAL(kvt_f16_of_f32(-0x1p-25f), 0x8000);
    CU_ASSERT_EQUAL(kvt_f16_of_f32(3 * 0x1p-25f), 2);
    CU_ASSERT_EQUAL(kvt_bf16_of_f32(1.0f + 0x1p-8f), 0x3f80);
    CU_ASSERT_EQUAL(kvt_bf16_of_f32(1.0f + 3 * 0x1p-8f), 0x3f82);
    enum { COUNT = 1 << 17 };
    float *values = malloc(COUNT * sizeof(*values));
    uint16_t *halves = malloc(COUNT * sizeof(*halves));
    for (size_t i = 0; i < COUNT; i++) /* half of them where f16 has something to round */
        values[i] =
            kvt_f32_of_bits(i % 2 ? random_bits() : (random_bits() & 0x8fffffffu) | 0x30000000u);
    FOR_EACH_PATH(ops) {
        uint32_t wrong = 0;
        for (int dtype = KVT_KV_F16; dtype <= KVT_KV_BF16; dtype++) {
            ops->store((enum kvt_kv_dtype)dtype, values, halves, COUNT);
            for (size_t i = 0; i < COUNT; i++) {
                uint16_t wanted =
                    dtype == KVT_KV_F16 ? kvt_f16_of_f32(values[i]) : kvt_bf16_of_f32(values[i]);
                wrong += halves[i] != wanted && !isnan(values[i]);
            }
        }
        CU_ASSERT_EQUAL(wrong, 0);
    }
    free(values);
    free(halves);
}

static void test_softmax(void) {
    float x[77];
    FOR_EACH_PATH(ops) {
        for (size_t count = 1; count <= 77; count++) {
            double wanted[77];
            double total = 0;
            float top = -INFINITY;
            float sum;
            for (size_t i = 0; i < count; i++) {
                x[i] = (float)(random_bits() % 4000) / 100.0f - 30.0f;
                top = x[i] > top ? x[i] : top;
            }
            for (size_t i = 0; i < count; i++)
                total += wanted[i] = exp((double)(x[i] - top));
            CU_ASSERT_EQUAL(ops->softmax(x, count, &sum), top);
            CU_ASSERT_DOUBLE_EQUAL(sum, total, 1e-6 * total);
            for (size_t i = 0; i < count; i++)
                CU_ASSERT_DOUBLE_EQUAL(x[i], wanted[i], 4e-7 * wanted[i]);
        }
        x[0] = 0;
        x[1] = -1e30f; /* far below what f32 holds */
        float sum;
        (void)ops->softmax(x, 2, &sum);
        CU_ASSERT(x[1] >= 0 && x[1] < 1e-37f);
    }
}

static void test_rmsnorm(void) {
    float x[37];
    float weight[37];
    float out[37];
    double square = 0;
    for (size_t i = 0; i < 37; i++) {
        x[i] = (float)(random_bits() % 100) - 40.0f;
        weight[i] = (float)(random_bits() % 100) / 50.0f;
        square += (double)x[i] * x[i];
    }
    double scale = 1 / sqrt(square / 37 + 1e-5);
    FOR_EACH_PATH(ops) {
        ops->rmsnorm(x, weight, 1e-5f, out, 37);
        for (size_t i = 0; i < 37; i++)
            CU_ASSERT_DOUBLE_EQUAL(out[i], x[i] * scale * weight[i], 1e-6);
    }
    kvt_rmsnorm_ref(x, weight, 1e-5f, x, 1, 37);
    CU_ASSERT_DOUBLE_EQUAL(x[36], out[36], 1e-6);
}

static void test_swiglu(void) {
    float gate[37];
    float up[37];
    float out[37];
    for (size_t i = 0; i < 37; i++) {
        gate[i] = (float)i * 6 - 108; /* into the range where exp(-gate) leaves f32 */
        up[i] = (float)(random_bits() % 100) / 10.0f;
    }
    FOR_EACH_PATH(ops) {
        ops->swiglu(gate, up, out, 37);
        for (size_t i = 0; i < 37; i++) {
            double wanted = gate[i] / (1 + exp(-(double)gate[i])) * up[i];
            CU_ASSERT_DOUBLE_EQUAL(out[i], wanted, 2e-6 * fabs(wanted) + 1e-30);
        }
    }
    kvt_swiglu_ref(gate, up, gate, 37);
    CU_ASSERT_EQUAL(gate[18], 0.0f);
}

static void test_rope(void) {
    double frequencies[4];
    float factors[4] = {1, 1, 2, 8};
    float table[8];
    float x[20];
    kvt_rope_frequencies_ref(10000, 2, factors, 8, frequencies);
    CU_ASSERT_DOUBLE_EQUAL(frequencies[0], 0.5, 1e-12);
    CU_ASSERT_DOUBLE_EQUAL(frequencies[1], 0.05, 1e-9);
    CU_ASSERT_DOUBLE_EQUAL(frequencies[3], 1e-3 / 2 / 8, 1e-12);
    kvt_rope_table_ref(frequencies, 8, 3, table);
    for (size_t i = 0; i < 20; i++)
        x[i] = (float)i;
    kvt_rope_ref(x, 2, 10, 8, table); /* dims 8 and 9 of each head stay */
    CU_ASSERT_DOUBLE_EQUAL(x[0], 0 * cos(1.5) - 1 * sin(1.5), 1e-6);
    CU_ASSERT_DOUBLE_EQUAL(x[1], 0 * sin(1.5) + 1 * cos(1.5), 1e-6);
    CU_ASSERT_DOUBLE_EQUAL(x[12], 12 * cos(0.15) - 13 * sin(0.15), 1e-5);
    CU_ASSERT_EQUAL(x[8], 8.0f);
    CU_ASSERT_EQUAL(x[19], 19.0f);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"load every half", test_load_every_half},
        {"store rounds to even", test_store_rounds_to_even},
        {"softmax", test_softmax},
        {"rmsnorm", test_rmsnorm},
        {"swiglu", test_swiglu},
        {"rope", test_rope},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("cpu_ops", tests);
}
