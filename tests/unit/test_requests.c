/* A session's requests: none is carried out twice, none is lost to a reply that was. And peers of
 * the front that are remembered as bad. */
#include "daemon/front/front.h"
#include "daemon/requests.h"
#include "tests/support/cunit_run.h"

#include <string.h>

static struct kvt_requests table;
static const struct kvt_identity one = {.life = 1, .bytes = {1, 2, 3, 4, 5}};
static const struct kvt_identity two = {.life = 2, .bytes = {5, 4, 3, 2, 1}};

static enum kvt_admission admit(uint64_t sequence, const struct kvt_identity *from,
                                const struct kvt_kept_reply **kept) {
    return kvt_requests_admit(&table, sequence, 13, from, kept);
}

static void test_repeat(void) {
    const struct kvt_kept_reply *kept = NULL;
    struct kvt_pending p;
    CU_ASSERT_EQUAL(admit(10, &one, &kept), KVT_ADMIT_NEW);
    /* The front died, the client asks again over a new connection. */
    CU_ASSERT_EQUAL(admit(10, &two, &kept), KVT_ADMIT_WAITING);
    CU_ASSERT(kvt_requests_take(&table, 10, &p));
    CU_ASSERT_EQUAL(p.identity.life, 2);
    CU_ASSERT_EQUAL(p.identity.bytes[0], 5);
    CU_ASSERT_EQUAL(p.body, 13);
    CU_ASSERT(!kvt_requests_take(&table, 10, &p));
    kvt_requests_keep(&table, 10, (const uint8_t *)"abc", 3);
    CU_ASSERT_EQUAL(admit(10, &one, &kept), KVT_ADMIT_REPEAT);
    CU_ASSERT_PTR_NOT_NULL_FATAL(kept);
    CU_ASSERT_EQUAL(kept->size, 3);
    CU_ASSERT_EQUAL(memcmp(kept->bytes, "abc", 3), 0);
    CU_ASSERT_EQUAL(admit(9, &one, &kept), KVT_ADMIT_STALE);
    CU_ASSERT_EQUAL(admit(11, &one, &kept), KVT_ADMIT_NEW);
    kvt_requests_clear(&table);
}

static void test_first_may_be_zero(void) {
    const struct kvt_kept_reply *kept = NULL;
    struct kvt_pending p;
    CU_ASSERT_EQUAL(admit(0, &one, &kept), KVT_ADMIT_NEW);
    CU_ASSERT(kvt_requests_take(&table, 0, &p));
    kvt_requests_keep(&table, 0, (const uint8_t *)"z", 1);
    CU_ASSERT_EQUAL(admit(0, &one, &kept), KVT_ADMIT_REPEAT);
    kvt_requests_clear(&table);
}

static void test_bounds(void) {
    const struct kvt_kept_reply *kept = NULL;
    struct kvt_pending p;
    for (uint64_t i = 1; i <= KVT_REQUESTS_MAX; i++) {
        CU_ASSERT_EQUAL(admit(i, &one, &kept), KVT_ADMIT_NEW);
    }
    CU_ASSERT_EQUAL(admit(1000, &one, &kept), KVT_ADMIT_FULL);
    CU_ASSERT_EQUAL(admit(7, &one, &kept), KVT_ADMIT_WAITING);
    for (uint64_t i = 1; i <= KVT_REQUESTS_MAX; i++) {
        CU_ASSERT(kvt_requests_take(&table, i, &p));
        kvt_requests_keep(&table, i, (const uint8_t *)&i, sizeof(i));
    }
    /* The last few are kept, older ones are not carried out again either. */
    CU_ASSERT_EQUAL(admit(KVT_REQUESTS_MAX, &one, &kept), KVT_ADMIT_REPEAT);
    CU_ASSERT_EQUAL(admit(KVT_REQUESTS_MAX - KVT_REPLIES_KEPT + 1, &one, &kept), KVT_ADMIT_REPEAT);
    CU_ASSERT_EQUAL(admit(KVT_REQUESTS_MAX - KVT_REPLIES_KEPT, &one, &kept), KVT_ADMIT_STALE);
    /* What was refused because the table was full was not noted. */
    CU_ASSERT_EQUAL(admit(1000, &one, &kept), KVT_ADMIT_NEW);
    kvt_requests_clear(&table);
}

static void test_bad_peers(void) {
    struct kvt_bad_peers bad = {.count = 0};
    uint8_t identity[KVT_FRONT_IDENTITY_BYTES] = {0};
    CU_ASSERT(!kvt_bad_peers_has(&bad, identity));
    for (int i = 0; i < KVT_BAD_PEERS_MAX; i++) {
        identity[1] = (uint8_t)i;
        kvt_bad_peers_add(&bad, identity);
        kvt_bad_peers_add(&bad, identity);
    }
    CU_ASSERT_EQUAL(bad.count, KVT_BAD_PEERS_MAX);
    identity[1] = 0;
    CU_ASSERT(kvt_bad_peers_has(&bad, identity));
    identity[1] = 200;
    kvt_bad_peers_add(&bad, identity);
    CU_ASSERT(kvt_bad_peers_has(&bad, identity));
    identity[1] = 0; /* the oldest made room */
    CU_ASSERT(!kvt_bad_peers_has(&bad, identity));
    CU_ASSERT_EQUAL(bad.count, KVT_BAD_PEERS_MAX);
}

static void test_own_use(void) {
    CU_ASSERT(kvt_front_memory_used() > (1u << 20));
    CU_ASSERT(kvt_front_fds_used() >= 3);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"a repeat gets the same reply", test_repeat},
        {"a sequence may begin with 0", test_first_may_be_zero},
        {"both tables are bounded", test_bounds},
        {"bad peers are remembered, the oldest forgotten", test_bad_peers},
        {"the front knows what it uses", test_own_use},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("requests", tests);
}
