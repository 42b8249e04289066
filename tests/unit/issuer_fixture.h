/* What the tests of the issuer share: programs in a few words, and what is expected next. */
#ifndef KVT_TESTS_UNIT_ISSUER_FIXTURE_H
#define KVT_TESTS_UNIT_ISSUER_FIXTURE_H

#include "proto/errors.h"
#include "tiers/engine/engine.h"
#include "tiers/engine/issuer.h"

#include <CUnit/Basic.h>
#include <string.h>

enum { SESSIONS = 4, CUT = 100 };

static struct kvt_issuer *issuer;
static struct kvt_control_page pages[SESSIONS];
static struct kvt_program *building;

static inline void start_config(struct kvt_issuer_config config) {
    config.sessions_max = SESSIONS;
    config.cut_bytes = CUT;
    memset(pages, 0, sizeof(pages));
    CU_ASSERT_EQUAL_FATAL(kvt_issuer_create(&config, &issuer), 0);
    for (uint32_t s = 0; s < SESSIONS; s++) {
        kvt_issuer_session_open(issuer, s, &pages[s]);
    }
}

static inline void start(bool post_behind, uint32_t inflight_max, uint64_t quantum_bytes) {
    start_config((struct kvt_issuer_config){
        .inflight_max = inflight_max, .quantum_bytes = quantum_bytes, .post_behind = post_behind});
}

static inline void stop(void) {
    kvt_issuer_free(issuer);
    issuer = NULL;
}

/* ---- building programs: begin(session); add(...); dep(id); submit() --------------------------- */

static inline void begin(uint32_t session) {
    building = kvt_program_create(session, 64, 64, 64);
    CU_ASSERT_PTR_NOT_NULL_FATAL(building);
}

static inline struct kvt_op *add(enum kvt_op_kind kind, uint64_t id, uint16_t slot,
                                 uint64_t bytes) {
    struct kvt_op *op = &building->ops[building->op_count++];
    *op = (struct kvt_op){.id = id,
                          .kind = (uint8_t)kind,
                          .slot = slot,
                          .copy_first = building->copy_count,
                          .dep_first = building->dep_count};
    if (bytes != 0) {
        op->copy_count = 1;
        building->copies[building->copy_count++] =
            (struct kvt_copy){.source = {.tier = KVT_TIER_HOST, .offset = id * 100000},
                              .target = {.tier = KVT_TIER_GPU, .extent = 7, .offset = id * 1000},
                              .bytes = bytes};
    }
    return op;
}

static inline struct kvt_op *add_fill(uint64_t id, uint16_t slot, uint64_t bytes,
                                      uint64_t generation) {
    struct kvt_op *op = add(KVT_OP_FILL, id, slot, bytes);
    op->generation = generation;
    return op;
}

static inline void dep(struct kvt_op *op, uint64_t id) {
    building->deps[building->dep_count++] = id;
    op->dep_count++;
}

static inline void submit(void) {
    kvt_issuer_submit(issuer, building);
    building = NULL;
}

/* ---- what is expected ------------------------------------------------------------------------ */

static struct kvt_issue issue;

/* The next issue is a copy of operation `id`; returns its tag. */
static inline uint32_t expect_copy(uint64_t id) {
    CU_ASSERT_TRUE_FATAL(kvt_issuer_next(issuer, &issue));
    CU_ASSERT_EQUAL(issue.is_post, 0);
    CU_ASSERT_EQUAL(issue.copy.source.offset / 100000, id);
    return issue.tag;
}

/* Returns its tag, which counts with post_behind. */
static inline uint32_t expect_post(uint32_t session, uint32_t slot, uint64_t value) {
    CU_ASSERT_TRUE_FATAL(kvt_issuer_next(issuer, &issue));
    CU_ASSERT_EQUAL(issue.is_post, 1);
    CU_ASSERT_EQUAL(issue.session, session);
    CU_ASSERT_EQUAL(issue.slot, slot);
    CU_ASSERT_EQUAL(issue.value, value);
    return issue.tag;
}

static inline void expect_nothing(void) {
    CU_ASSERT_FALSE(kvt_issuer_next(issuer, &issue));
}

static inline void expect_completion(uint64_t id, enum kvt_completion_status status,
                                     uint64_t bytes) {
    struct kvt_completion c;
    CU_ASSERT_TRUE_FATAL(kvt_issuer_completion(issuer, &c));
    CU_ASSERT_EQUAL(c.op, id);
    CU_ASSERT_EQUAL(c.status, status);
    CU_ASSERT_EQUAL(c.bytes, bytes);
}

static inline void expect_no_completion(void) {
    struct kvt_completion c;
    CU_ASSERT_FALSE(kvt_issuer_completion(issuer, &c));
}

/* Runs the suite; the status for main. */
static inline int run_suite(const char *name, CU_TestInfo *tests) {
    CU_SuiteInfo suites[] = {
        {name, NULL, NULL, NULL, NULL, tests},
        CU_SUITE_INFO_NULL,
    };
    if (CU_initialize_registry() != CUE_SUCCESS || CU_register_suites(suites) != CUE_SUCCESS) {
        return 1;
    }
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned failures = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failures == 0 ? 0 : 1;
}

#endif
