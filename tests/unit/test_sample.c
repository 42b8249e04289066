/* Sampling: greedy, top-k, top-p, temperature, seeds. */
#include "client/worker/sample.h"

#include <math.h>
#include <string.h>

#include "tests/support/cunit_run.h"

#define COUNT  6u
#define ROUNDS 20000u

static const float logits[COUNT] = {0, 2, -1, 3, 3, 1};

static void draw(double temperature, uint32_t top_k, double top_p, double *shares) {
    struct kvt_sampler sampler;
    uint64_t state = 42;
    CU_ASSERT_EQUAL_FATAL(kvt_sampler_open(&sampler, temperature, top_k, top_p, COUNT), 0);
    memset(shares, 0, COUNT * sizeof(*shares));
    for (uint32_t i = 0; i < ROUNDS; i++)
        shares[kvt_sampler_choose(&sampler, logits, &state)] += 1.0 / ROUNDS;
    kvt_sampler_close(&sampler);
}

static void test_greedy_takes_the_first_best(void) {
    double shares[COUNT];
    draw(0, 0, 1, shares);
    CU_ASSERT_DOUBLE_EQUAL(shares[3], 1, 1e-9);
}

static void test_shares_are_the_softmax(void) {
    double shares[COUNT];
    double sum = 0;
    for (uint32_t i = 0; i < COUNT; i++)
        sum += exp(logits[i] / 1.5);
    draw(1.5, 0, 1, shares);
    for (uint32_t i = 0; i < COUNT; i++)
        CU_ASSERT_DOUBLE_EQUAL(shares[i], exp(logits[i] / 1.5) / sum, 0.015);
}

static void test_top_k(void) {
    double shares[COUNT];
    draw(1, 3, 1, shares);
    CU_ASSERT(shares[3] > 0.3 && shares[4] > 0.3 && shares[1] > 0.1);
    CU_ASSERT_DOUBLE_EQUAL(shares[3] + shares[4] + shares[1], 1, 1e-9);
    draw(1, 1, 1, shares);
    CU_ASSERT_DOUBLE_EQUAL(shares[3], 1, 1e-9);
    draw(1, 100, 1, shares); /* more than there are */
    CU_ASSERT(shares[2] > 0);
}

static void test_top_p(void) {
    double shares[COUNT];
    /* the two best have 0.37 each */
    draw(1, 0, 0.5, shares);
    CU_ASSERT_DOUBLE_EQUAL(shares[3] + shares[4], 1, 1e-9);
    draw(1, 0, 0, shares);
    CU_ASSERT_DOUBLE_EQUAL(shares[3], 1, 1e-9);
}

static void test_seeds(void) {
    struct kvt_sampler sampler;
    uint64_t a = 1;
    uint64_t b = 1;
    uint64_t c = 2;
    uint32_t differ = 0;
    CU_ASSERT_EQUAL_FATAL(kvt_sampler_open(&sampler, 1, 0, 1, COUNT), 0);
    for (int i = 0; i < 100; i++) {
        uint32_t first = kvt_sampler_choose(&sampler, logits, &a);
        CU_ASSERT_EQUAL(first, kvt_sampler_choose(&sampler, logits, &b));
        differ += first != kvt_sampler_choose(&sampler, logits, &c);
    }
    CU_ASSERT(differ > 10);
    kvt_sampler_close(&sampler);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"greedy takes the first best", test_greedy_takes_the_first_best},
        {"shares are the softmax", test_shares_are_the_softmax},
        {"top-k", test_top_k},
        {"top-p", test_top_p},
        {"seeds", test_seeds},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("sample", tests);
}
