/* How a worker's steps compare with the link, on a clock of the test's own. */
#include "daemon/pace.h"
#include "tests/support/cunit_run.h"

#include <CUnit/Basic.h>
#include <math.h>

#define MS  UINT64_C(1000000)
#define MIB (UINT64_C(1) << 20)

static const struct kvt_link thousand = {1000 * MIB, 500 * MIB};
static struct kvt_pace pace;
static uint64_t now_ns;

static void start(void) {
    pace = (struct kvt_pace){0};
    now_ns = 77 * MS;
}

static void steps(uint32_t count, uint64_t each_ns, uint64_t to_bytes, uint64_t from_bytes) {
    for (uint32_t i = 0; i < count; i++) {
        now_ns += each_ns;
        kvt_pace_committed(&pace, now_ns, pace.to_total + to_bytes, pace.from_total + from_bytes);
    }
}

static bool near(double a, double b) {
    return fabs(a - b) < 0.005 * b;
}

static void test_link_ns(void) {
    CU_ASSERT_EQUAL(kvt_link_ns(1000 * MIB, 1000 * MIB), 1000 * MS);
    CU_ASSERT_EQUAL(kvt_link_ns(1000 * MIB, 0), 0);
    CU_ASSERT_EQUAL(kvt_link_ns(UINT64_MAX / 2, UINT64_MAX / 2), 1000 * MS); /* no overflow */
    CU_ASSERT_EQUAL(kvt_link_step_ns(&thousand, 10 * MIB, MIB), 10 * MS);
    CU_ASSERT_EQUAL(kvt_link_step_ns(&thousand, 10 * MIB, 10 * MIB),
                    20 * MS); /* beside each other */
}

static void test_a_step_needs_two_commits(void) {
    start();
    CU_ASSERT_EQUAL(kvt_pace_of_ceiling(&pace, &thousand), 0);
    steps(1, 5 * MS, 900 * MIB, 0); /* whatever was done before it */
    CU_ASSERT_EQUAL(pace.step_ns, 0);
    CU_ASSERT_EQUAL(kvt_pace_of_ceiling(&pace, &thousand), 0);
    steps(1, 20 * MS, 10 * MIB, 0);
    CU_ASSERT_EQUAL(pace.step_ns, 20 * MS);
    CU_ASSERT_TRUE(near(kvt_pace_of_ceiling(&pace, &thousand), 0.5));
}

static void test_recent_steps_count(void) {
    start();
    steps(50, 100 * MS, 1 * MIB, 0); /* a prompt: it computes */
    CU_ASSERT_TRUE(near(kvt_pace_of_ceiling(&pace, &thousand), 0.01));
    steps(1, 20 * MS, 15 * MIB, 0); /* an eighth: 2.75 MiB in 90 ms */
    CU_ASSERT_TRUE(near(kvt_pace_of_ceiling(&pace, &thousand), 2.75 / 90));
    steps(80, 20 * MS, 15 * MIB, 0);
    CU_ASSERT_TRUE(near(kvt_pace_of_ceiling(&pace, &thousand), 0.75));
    CU_ASSERT_TRUE(near((double)pace.step_ns, (double)(20 * MS)));
    steps(80, 20 * MS, 5 * MIB, 9 * MIB); /* away from the device is the slower one */
    CU_ASSERT_TRUE(near(kvt_pace_of_ceiling(&pace, &thousand), 0.9));
    steps(400, 20 * MS, 0, 0); /* everything is resident now */
    CU_ASSERT_EQUAL(kvt_pace_of_ceiling(&pace, &thousand), 0);
    CU_ASSERT_EQUAL(kvt_pace_of_ceiling(&pace, &(struct kvt_link){0}), 0);
}

static void test_a_pause_begins_anew(void) {
    start();
    steps(10, 20 * MS, 10 * MIB, 0);
    steps(1, 3000 * MS, 10 * MIB, 0);
    CU_ASSERT_EQUAL(pace.step_ns, 0);
    CU_ASSERT_EQUAL(kvt_pace_of_ceiling(&pace, &thousand), 0);
    steps(1, 40 * MS, 10 * MIB, 0);
    CU_ASSERT_EQUAL(pace.step_ns, 40 * MS);
    CU_ASSERT_TRUE(near(kvt_pace_of_ceiling(&pace, &thousand), 0.25));
}

int main(void) {
    CU_TestInfo tests[] = {
        {"time over a link", test_link_ns},
        {"a step needs two commits", test_a_step_needs_two_commits},
        {"recent steps count", test_recent_steps_count},
        {"a pause begins anew", test_a_pause_begins_anew},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("pace", tests);
}
