/* The synthetic worker's model: a checker that cannot tell wrong from right would pass everything. */
#include "client/worker/synthetic/model.h"
#include "tests/support/cunit_run.h"

#include <string.h>

#define TOKENS 300
#define BYTES  1036 /* a token: more than one chunk of the generator, and not whole words */

static struct kvt_synth_random randomness = {12345};
static uint8_t plane[TOKENS * BYTES];

static void test_bytes(void) {
    struct kvt_synth_cache c;
    uint8_t expected;
    kvt_synth_cache_init(&c, 1, 2);
    struct kvt_synth_row *r = &c.rows[0];
    kvt_synth_row_append(r, TOKENS, &randomness);
    kvt_synth_row_append(&c.rows[1], TOKENS, &randomness);
    kvt_synth_bytes(r, 0, TOKENS, 3, KVT_SYNTH_K, BYTES, plane);
    CU_ASSERT_EQUAL(kvt_synth_compare(r, 0, TOKENS, 3, KVT_SYNTH_K, BYTES, plane, &expected), -1);
    CU_ASSERT_EQUAL(kvt_synth_compare(r, 7, 3, 3, KVT_SYNTH_K, BYTES, plane + 7 * BYTES, &expected),
                    -1);
    /* The same content number elsewhere in the row has other bytes. */
    c.rows[1].ids[1] = r->ids[0];
    CU_ASSERT(kvt_synth_compare(&c.rows[1], 1, 1, 3, KVT_SYNTH_K, BYTES, plane, &expected) >= 0);
    /* Another layer, plane, row, or the neighbour's place: wrong within the first bytes. */
    CU_ASSERT(kvt_synth_compare(r, 0, 1, 4, KVT_SYNTH_K, BYTES, plane, &expected) >= 0);
    CU_ASSERT(kvt_synth_compare(r, 0, 1, 3, KVT_SYNTH_V, BYTES, plane, &expected) >= 0);
    CU_ASSERT(kvt_synth_compare(&c.rows[1], 0, 1, 3, KVT_SYNTH_K, BYTES, plane, &expected) >= 0);
    CU_ASSERT(kvt_synth_compare(r, 1, 1, 3, KVT_SYNTH_K, BYTES, plane, &expected) >= 0);
    kvt_synth_cache_free(&c);
}

/* Each single byte that is changed is found, where it is. */
static void test_each_byte(void) {
    struct kvt_synth_cache c;
    kvt_synth_cache_init(&c, 1, 1);
    kvt_synth_row_append(&c.rows[0], 2, &randomness);
    kvt_synth_bytes(&c.rows[0], 0, 2, 0, KVT_SYNTH_V, BYTES, plane);
    for (int64_t i = 0; i < 2 * BYTES; i++) {
        uint8_t expected = 0;
        uint8_t right = plane[i];
        plane[i] ^= 1;
        CU_ASSERT_EQUAL(
            kvt_synth_compare(&c.rows[0], 0, 2, 0, KVT_SYNTH_V, BYTES, plane, &expected), i);
        CU_ASSERT_EQUAL(expected, right);
        plane[i] = right;
    }
    kvt_synth_cache_free(&c);
}

static void test_rows(void) {
    struct kvt_synth_cache c;
    struct kvt_synth_cache copy;
    uint32_t order[3] = {1, 1, 0};
    kvt_synth_cache_init(&c, 1, 2);
    kvt_synth_row_append(&c.rows[0], 5, &randomness);
    kvt_synth_row_append(&c.rows[1], 9, &randomness);
    uint64_t first = c.rows[1].ids[0];
    CU_ASSERT_EQUAL(kvt_synth_cache_longest(&c), 9);
    kvt_synth_cache_copy(&copy, &c, 2);
    kvt_synth_cache_take_rows(&copy, order, 3);
    CU_ASSERT_EQUAL(copy.id, 2);
    CU_ASSERT_EQUAL(copy.row_count, 3);
    CU_ASSERT_EQUAL(copy.rows[0].ids[0], first);
    CU_ASSERT_EQUAL(copy.rows[1].ids[0], first);
    CU_ASSERT_EQUAL(copy.rows[2].count, 5);
    kvt_synth_row_append(&copy.rows[0], 1, &randomness); /* copies go their own ways */
    kvt_synth_row_append(&copy.rows[1], 1, &randomness);
    CU_ASSERT_NOT_EQUAL(copy.rows[0].ids[9], copy.rows[1].ids[9]);
    kvt_synth_row_crop(&copy.rows[0], 3);
    CU_ASSERT_EQUAL(copy.rows[0].count, 3);
    kvt_synth_row_crop(&copy.rows[0], 30);
    CU_ASSERT_EQUAL(copy.rows[0].count, 3);
    CU_ASSERT_EQUAL(c.rows[1].count, 9);
    kvt_synth_cache_free(&c);
    kvt_synth_cache_free(&copy);
}

static void test_random(void) {
    uint32_t seen[10] = {0};
    uint32_t percent = 0;
    for (int i = 0; i < 10000; i++) {
        uint32_t n = kvt_synth_random_below(&randomness, 10);
        CU_ASSERT_FATAL(n < 10);
        seen[n]++;
        percent += kvt_synth_random_percent(&randomness, 25);
        CU_ASSERT_FALSE(kvt_synth_random_percent(&randomness, 0));
        CU_ASSERT(kvt_synth_random_percent(&randomness, 100));
    }
    for (int i = 0; i < 10; i++) {
        CU_ASSERT(seen[i] > 800 && seen[i] < 1200);
    }
    CU_ASSERT(percent > 2200 && percent < 2800);
}

int main(void) {
    CU_TestInfo tests[] = {{"bytes", test_bytes},
                           {"each byte", test_each_byte},
                           {"rows", test_rows},
                           {"random", test_random},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("synthetic model", tests);
}
