/* main() of a CUnit binary: one suite, its cases listed, exit 1 when one failed. */
#ifndef KVT_TESTS_CUNIT_RUN_H
#define KVT_TESTS_CUNIT_RUN_H

#include <CUnit/Basic.h>

static inline int kvt_cunit_run(const char *suite_name, CU_TestInfo *tests) {
    CU_SuiteInfo suites[] = {{suite_name, NULL, NULL, NULL, NULL, tests}, CU_SUITE_INFO_NULL};
    if (CU_initialize_registry() != CUE_SUCCESS || CU_register_suites(suites) != CUE_SUCCESS)
        return 1;
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}

#endif
