/* What a device knows of its link: measured when it is asked to, then seen in copies. */
#include "proto/errors.h"
#include "tests/support/act_driver.h"
#include "tests/support/cunit_run.h"
#include "tests/support/device_rig.h"

#include <CUnit/Basic.h>
#include <string.h>
#include <sys/mman.h>

#define MIB (UINT64_C(1) << 20)
#define TIB (UINT64_C(1) << 40)

enum { EXTENT = 1 };
static struct kvt_rig rig;
static struct kvt_device_event event;

static void start(const struct kvt_driver_ops *ops) {
    memset(&kvt_act, 0, sizeof(kvt_act));
    kvt_act.can_sleep = true;
    kvt_rig_start(&rig, &(struct kvt_rig_config){
                            .ops = ops, .arena_bytes = 8 * MIB, .budget_bytes = 16 * MIB});
}

static void measure(void) {
    kvt_rig_command(&rig, &(struct kvt_device_command){.kind = KVT_DEVICE_MEASURE});
    event = kvt_rig_event(&rig);
    CU_ASSERT_EQUAL_FATAL(event.kind, KVT_DEVICE_MEASURED);
}

static struct kvt_link link_now(void) {
    struct kvt_link link;
    kvt_device_link(rig.device, &link);
    return link;
}

/* Four copies of 4 MiB each way. */
static void copy_both_ways(void) {
    uint8_t *extent = kvt_rig_extent(&rig, EXTENT, 8 * MIB);
    struct kvt_control_page *page = kvt_rig_page();
    struct kvt_program *p = kvt_rig_program(0, 8);
    for (uint32_t i = 0; i < 8; i++) {
        bool to = i % 2 == 0;
        kvt_rig_op(p, KVT_OP_COPY, i + 1, 0, to ? kvt_on_host(0) : kvt_on_device(EXTENT, 4 * MIB),
                   to ? kvt_on_device(EXTENT, 0) : kvt_on_host(4 * MIB), 4 * MIB);
    }
    kvt_rig_open(&rig, 0, page);
    kvt_rig_submit(&rig, p);
    for (uint32_t i = 0; i < 8; i++) {
        CU_ASSERT_EQUAL(kvt_rig_event(&rig).kind, KVT_DEVICE_COMPLETION);
    }
    CU_ASSERT_EQUAL(kvt_rig_close(&rig, 0), 0);
    kvt_rig_page_free(page);
    munmap(extent, 8 * MIB);
}

static void test_copies_tell(void) {
    start(&kvt_act_driver_ops);
    CU_ASSERT_EQUAL(link_now().to_bytes_per_s, 0);
    CU_ASSERT_EQUAL(link_now().from_bytes_per_s, 0);
    copy_both_ways();
    CU_ASSERT_TRUE(link_now().to_bytes_per_s > MIB);
    CU_ASSERT_TRUE(link_now().to_bytes_per_s < 1024 * TIB);
    CU_ASSERT_TRUE(link_now().from_bytes_per_s > MIB);
    CU_ASSERT_EQUAL(kvt_act.measured, 0); /* nobody asked */
    kvt_rig_stop(&rig);
}

static void test_measured_then_seen(void) {
    start(&kvt_act_driver_ops);
    kvt_act.link = (struct kvt_link){.to_bytes_per_s = 1000 * TIB, .from_bytes_per_s = 7};
    measure();
    CU_ASSERT_EQUAL(event.code, 0);
    CU_ASSERT_EQUAL(event.link.to_bytes_per_s, 1000 * TIB);
    CU_ASSERT_EQUAL(event.link.from_bytes_per_s, 7);
    CU_ASSERT_EQUAL(kvt_act.measured, 1);
    CU_ASSERT_EQUAL(link_now().to_bytes_per_s, 1000 * TIB);
    CU_ASSERT_EQUAL(link_now().from_bytes_per_s, 7);
    copy_both_ways();
    CU_ASSERT_EQUAL(link_now().to_bytes_per_s, 1000 * TIB); /* no copy was faster */
    CU_ASSERT_TRUE(link_now().from_bytes_per_s > MIB);
    kvt_rig_stop(&rig);
}

/* Told, and nothing else: the device works. */
static void test_it_fails(void) {
    start(&kvt_act_driver_ops);
    kvt_act.unmeasured = true;
    measure();
    CU_ASSERT_EQUAL(event.code, -KVT_ESYS);
    CU_ASSERT_STRING_EQUAL(event.text, "no clock today");
    CU_ASSERT_EQUAL(link_now().to_bytes_per_s, 0);
    copy_both_ways();
    CU_ASSERT_TRUE(link_now().to_bytes_per_s > MIB);
    kvt_rig_stop(&rig);
}

static void test_a_driver_that_does_not_measure(void) {
    struct kvt_driver_ops ops = kvt_act_driver_ops;
    ops.measure = NULL;
    start(&ops);
    measure();
    CU_ASSERT_EQUAL(event.code, 0);
    CU_ASSERT_EQUAL(event.link.to_bytes_per_s, 0);
    CU_ASSERT_EQUAL(link_now().to_bytes_per_s, 0);
    kvt_rig_stop(&rig);
}

static void test_the_cpu_device(void) {
    start(&kvt_cpu_driver_ops);
    measure();
    CU_ASSERT_EQUAL(event.code, 0);
    CU_ASSERT_TRUE(event.link.to_bytes_per_s > MIB);
    CU_ASSERT_EQUAL(event.link.to_bytes_per_s, link_now().to_bytes_per_s);
    CU_ASSERT_EQUAL(event.link.from_bytes_per_s, link_now().from_bytes_per_s);
    copy_both_ways(); /* the extent that it measured with is gone */
    kvt_rig_stop(&rig);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"copies tell", test_copies_tell},
        {"measured, then seen", test_measured_then_seen},
        {"it fails", test_it_fails},
        {"a driver that does not measure", test_a_driver_that_does_not_measure},
        {"the cpu device", test_the_cpu_device},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("device link", tests);
}
