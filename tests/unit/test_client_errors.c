/* kvtier.h, which stands alone, and proto/errors.h have the same codes; every code has a text. */
#include "client/kvtier.h"
/* In this order: the list of the protocol must not redefine the one above. */
#include "proto/errors.h"
#include "proto/layout.h"
#include "tests/support/cunit_run.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

/* The enum is kvtier.h's here, the numbers are the protocol's. */
#define AGREE(name, number, text) static_assert(KVT_##name == (number), #name);
KVT_ERRORS(AGREE)

#define COUNT(name, number, text) +1
enum { PROTOCOL_COUNT = 0 KVT_ERRORS(COUNT) };

static_assert((int)KVT_SEGMENT == (int)KVT_WORKER_SEGMENT, "worker");
static_assert((int)KVT_DENSE == (int)KVT_WORKER_DENSE, "worker");
static_assert((int)KVT_DTYPE_F32 == (int)KVT_F32, "dtype");
static_assert((int)KVT_DTYPE_F16 == (int)KVT_F16, "dtype");
static_assert((int)KVT_DTYPE_BF16 == (int)KVT_BF16, "dtype");
static_assert((int)KVT_KIND_FULL == (int)KVT_LAYER_FULL, "kind");
static_assert((int)KVT_DYNAMIC == (int)KVT_MODE_DYNAMIC, "mode");
static_assert((int)KVT_STATIC == (int)KVT_MODE_STATIC, "mode");
static_assert((int)KVT_OFFLOADED == (int)KVT_MODE_OFFLOADED, "mode");
static_assert((int)KVT_OFFLOADED_STATIC == (int)KVT_MODE_OFFLOADED_STATIC, "mode");
static_assert(sizeof((struct kvt_cache_stat){0}.layers) > KVT_LAYERS_MAX, "room for every layer");

static void test_texts(void) {
    CU_ASSERT_STRING_EQUAL(kvt_error_text(0), "success");
    CU_ASSERT_STRING_EQUAL(kvt_error_name(0), "KVT_OK");
    for (int code = 1; code <= PROTOCOL_COUNT; code++) {
        CU_ASSERT_STRING_NOT_EQUAL(kvt_error_text(code), "unknown error");
        CU_ASSERT_STRING_EQUAL(kvt_error_text(code), kvt_error_text(-code));
        CU_ASSERT_EQUAL(strncmp(kvt_error_name(-code), "KVT_E", 5), 0);
        CU_ASSERT_STRING_NOT_EQUAL(kvt_error_name(code), "KVT_E?");
    }
    CU_ASSERT_STRING_EQUAL(kvt_error_text(PROTOCOL_COUNT + 1), "unknown error");
    CU_ASSERT_STRING_EQUAL(kvt_error_name(-PROTOCOL_COUNT - 1), "KVT_E?");
    CU_ASSERT_STRING_EQUAL(kvt_error_text(INT32_MIN), "unknown error");
}

static void test_version(void) {
    char version[32];
    (void)snprintf(version, sizeof version, "%d.%d.%d", KVTIER_VERSION_MAJOR, KVTIER_VERSION_MINOR,
                   KVTIER_VERSION_PATCH);
    CU_ASSERT_STRING_EQUAL(kvt_version(), version);
}

static void test_no_client(void) {
    CU_ASSERT_PTR_NOT_NULL(strstr(kvt_error_message(NULL), "out of memory"));
    kvt_detach(NULL);
    CU_ASSERT_EQUAL(kvt_step_abort(NULL), 0);
}

int main(void) {
    CU_TestInfo tests[] = {{"texts", test_texts},
                           {"version", test_version},
                           {"no client", test_no_client},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("client errors", tests);
}
