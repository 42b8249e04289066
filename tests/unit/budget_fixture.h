/* What the tests of budgets and of migration share. */
#ifndef KVT_TESTS_UNIT_BUDGET_FIXTURE_H
#define KVT_TESTS_UNIT_BUDGET_FIXTURE_H

#include "tests/support/cunit_run.h"
#include "tests/support/engine_harness.h"

#include <stdlib.h>
#include <string.h>

static struct kvth h;
static struct kvth_walk w;

enum { LAYERS = 4 };

static inline struct kvt_cache_info info_of(const struct kvth_cache *c) {
    struct kvt_cache_info info;
    kvth_cache_info(&h, c, &info);
    return info;
}

static inline uint32_t resident(const struct kvth_cache *c) {
    struct kvt_cache_info info = info_of(c);
    uint32_t count = 0;
    for (uint32_t l = 0; l < info.layer_count; l++) {
        count += info.layers[l] == 'R';
    }
    return count;
}

static inline struct kvth_cache *create(uint32_t session, uint32_t layers, uint32_t mode,
                                        uint32_t rows) {
    struct kvt_layout layout = kvth_layout(layers);
    struct kvt_cache_options o = kvth_options(mode, rows);
    return kvth_create(&h, session, &layout, &o);
}

static inline const struct kvth_answer *step(struct kvth_cache *c, uint32_t tokens) {
    return kvth_answer(&h, kvth_step_send(&h, c, NULL, NULL, 0, tokens, 1));
}

/* The refusal is of that code and its text says all of the words. */
static inline void refused(const struct kvth_answer *a, uint32_t code, const char *const *words) {
    CU_ASSERT_PTR_NOT_NULL_FATAL(a);
    CU_ASSERT_EQUAL(a->code, code);
    for (; *words != NULL; words++) {
        if (strstr(a->text, *words) == NULL) {
            (void)fprintf(stderr, "\n'%s' is not in: %s\n", *words, a->text);
            CU_FAIL("the text does not say it");
        }
    }
}

#define REFUSED(a, code, ...) refused(a, code, (const char *const[]){__VA_ARGS__, NULL})

#endif
