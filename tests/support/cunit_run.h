/* main() of a CUnit binary: one suite, its cases listed, exit 1 when one failed. With ONLY=WORD in
 * the environment only cases with WORD in their names run: for a debugger. */
#ifndef KVT_TESTS_CUNIT_RUN_H
#define KVT_TESTS_CUNIT_RUN_H

#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A case that waits for a known bug to be fixed: said, and not run unless KNOWN is set. */
static inline int kvt_cunit_waits(const char *bug) {
    if (!getenv("KNOWN"))
        (void)printf("waits for %s; ", bug);
    return !getenv("KNOWN");
}

static inline int kvt_cunit_run(const char *suite_name, CU_TestInfo *tests) {
    CU_SuiteInfo suites[] = {{suite_name, NULL, NULL, NULL, NULL, tests}, CU_SUITE_INFO_NULL};
    if (CU_initialize_registry() != CUE_SUCCESS || CU_register_suites(suites) != CUE_SUCCESS)
        return 1;
    const char *only = getenv("ONLY");
    for (CU_pTest t = CU_get_suite(suite_name)->pTest; only && t; t = t->pNext)
        CU_set_test_active(t, strstr(t->pName, only) ? CU_TRUE : CU_FALSE);
    CU_set_fail_on_inactive(CU_FALSE);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}

#endif
