/* The measured speed of a link, on a clock of the test's own. */
#include "tests/support/cunit_run.h"
#include "tiers/device/speed.h"

#include <CUnit/Basic.h>

#define MIB (UINT64_C(1) << 20)
#define US  UINT64_C(1000)
#define MS  (1000 * US)

static struct kvt_speed speed;
static uint64_t now_ns;

static void start(uint64_t bytes_per_s) {
    speed = (struct kvt_speed){0};
    now_ns = 5 * MS;
    kvt_speed_start(&speed, bytes_per_s);
}

/* One copy alone. */
static void copy(uint64_t bytes, uint64_t took_ns) {
    uint32_t sample = kvt_speed_begin(&speed, now_ns);
    now_ns += took_ns;
    kvt_speed_end(&speed, sample, bytes, now_ns);
    now_ns += 100 * US; /* idle time is not the link's */
}

static void test_the_first_sample_is_the_speed(void) {
    start(0);
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 0);
    copy(MIB / 2, 500 * US); /* too little to say anything */
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 0);
    copy(MIB / 2, 500 * US);
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 1000 * MIB);
}

static void test_it_goes_on_from_what_was_measured(void) {
    start(1000 * MIB);
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 1000 * MIB);
    copy(9 * MIB, 1 * MS); /* 9000 MiB/s: an eighth of the way */
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 2000 * MIB);
    for (int i = 0; i < 100; i++) {
        copy(9 * MIB, 1 * MS);
    }
    CU_ASSERT_TRUE(kvt_speed_get(&speed) > 8990 * MIB);
    CU_ASSERT_TRUE(kvt_speed_get(&speed) <= 9000 * MIB);
}

/* Small copies, each handed over on its own, and a copy thread that comes late. */
static void test_a_slower_sample_says_nothing(void) {
    start(10000 * MIB);
    for (int i = 0; i < 1000; i++) {
        copy(KVT_SPEED_BYTES_MIN, 40 * US);
    }
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 10000 * MIB);
    copy(16 * MIB, 500 * MS);
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 10000 * MIB);
    copy(0, 500 * MS); /* one that failed */
    copy(18 * MIB, 1 * MS);
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 10000 * MIB); /* that time was counted with it */
    copy(18 * MIB, 1 * MS);
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 11000 * MIB);
}

/* Copies beside each other: the time is counted once. */
static void test_several_in_flight(void) {
    start(0);
    uint32_t one = kvt_speed_begin(&speed, 0);
    uint32_t two = kvt_speed_begin(&speed, 0);
    kvt_speed_end(&speed, one, 4 * MIB, 4 * MS);
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 0); /* the sample goes on */
    kvt_speed_end(&speed, two, 4 * MIB, 4 * MS);
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 2000 * MIB);
}

/* A long stream is cut into samples, and no sample gets bytes whose time is in the one before: two
 * that are handed back at once, and a thousand with always one more under way. */
static void test_copies_across_the_end_of_a_sample(void) {
    start(0);
    uint32_t one = kvt_speed_begin(&speed, 0);
    uint32_t two = kvt_speed_begin(&speed, 0);
    kvt_speed_end(&speed, one, 64 * MIB, 64 * MS);
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 1000 * MIB);
    kvt_speed_end(&speed, two, 64 * MIB, 64 * MS + 1);
    CU_ASSERT_EQUAL(kvt_speed_get(&speed), 1000 * MIB);
    start(0);
    one = kvt_speed_begin(&speed, 0);
    for (uint64_t i = 1; i <= 1000; i++) {
        two = kvt_speed_begin(&speed, i * MS); /* a millisecond for each MiB of it */
        kvt_speed_end(&speed, one, MIB, i * MS);
        one = two;
    }
    CU_ASSERT_TRUE(kvt_speed_get(&speed) <= 1000 * MIB);
    CU_ASSERT_TRUE(kvt_speed_get(&speed) > 950 * MIB);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"the first sample is the speed", test_the_first_sample_is_the_speed},
        {"it goes on from what was measured", test_it_goes_on_from_what_was_measured},
        {"a slower sample says nothing", test_a_slower_sample_says_nothing},
        {"several in flight", test_several_in_flight},
        {"copies across the end of a sample", test_copies_across_the_end_of_a_sample},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("speed", tests);
}
