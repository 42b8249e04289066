/* Packets of the attach socket and of the front's pair: what is believed, and what is said to the
 * one whose packet is not right. */
#include "daemon/packet.h"
#include "proto/front.h"
#include "proto/layout.h"
#include "tests/support/cunit_run.h"

#include <stdbool.h>
#include <string.h>

static struct kvt_attach_hello hello(void) {
    struct kvt_attach_hello h = {
        .head = kvt_attach_head_make(KVT_ATTACH_HELLO, sizeof(h)),
        .protocol_major = KVT_PROTOCOL_MAJOR,
        .protocol_minor = KVT_PROTOCOL_MINOR,
        .role = KVT_ROLE_WORKER,
        .worker_kind = KVT_WORKER_SEGMENT,
        .name = "w",
    };
    return h;
}

static struct kvt_attach_refuse no;

static int check(const struct kvt_attach_hello *h, size_t size) {
    struct kvt_attach_hello out;
    memset(&no, 0xee, sizeof(no));
    return kvt_hello_check(h, size, &out, &no);
}

/* Refused with the code, and the text has these words. */
static void refused(const struct kvt_attach_hello *h, size_t size, int code, const char *words) {
    int rc = check(h, size);
    CU_ASSERT_EQUAL(rc, -code);
    CU_ASSERT_EQUAL(no.code, (uint32_t)code);
    CU_ASSERT_EQUAL(no.head.magic, KVT_ATTACH_MAGIC);
    CU_ASSERT_EQUAL(no.head.type, KVT_ATTACH_REFUSE);
    CU_ASSERT_EQUAL(no.head.bytes, sizeof(no));
    CU_ASSERT_EQUAL(no.protocol_major, KVT_PROTOCOL_MAJOR);
    CU_ASSERT_PTR_NOT_NULL(memchr(no.text, '\0', sizeof(no.text)));
    CU_ASSERT_PTR_NOT_NULL(strstr(no.text, words));
}

static void test_good(void) {
    struct kvt_attach_hello h = hello();
    struct kvt_attach_hello out;
    CU_ASSERT_EQUAL(kvt_hello_check(&h, sizeof(h), &out, &no), 0);
    CU_ASSERT_STRING_EQUAL(out.name, "w");
    h.protocol_minor = 99; /* a later minor version is welcome */
    h.features = UINT64_MAX;
    CU_ASSERT_EQUAL(check(&h, sizeof(h)), 0);
    h.worker_kind = KVT_WORKER_DENSE;
    CU_ASSERT_EQUAL(check(&h, sizeof(h)), 0);
    h.role = KVT_ROLE_CONTROL;
    h.worker_kind = 0;
    CU_ASSERT_EQUAL(check(&h, sizeof(h)), 0);
}

static void test_version(void) {
    struct kvt_attach_hello h = hello();
    h.protocol_major = 7;
    h.protocol_minor = 3;
    refused(&h, sizeof(h), KVT_EVERSION, "speaks protocol 1.0, the client speaks 7.3");
    /* A HELLO of another major version may have another size. */
    h.head.bytes = 24;
    refused(&h, 24, KVT_EVERSION, "speaks protocol 1.0, the client speaks 7.3");
    struct {
        struct kvt_attach_hello h;
        char more[64];
    } longer = {.h = h};
    refused(&longer.h, sizeof(longer), KVT_EVERSION, "7.3");
}

static void test_bad(void) {
    struct kvt_attach_hello h = hello();
    refused(&h, 0, KVT_EPROTO, "0 bytes");
    refused(&h, 23, KVT_EPROTO, "23 bytes");
    refused(&h, sizeof(h) - 1, KVT_EPROTO, "127 bytes");
    h.head.bytes--;
    refused(&h, sizeof(h), KVT_EPROTO, "says 127");
    h = hello();
    h.head.magic++;
    refused(&h, sizeof(h), KVT_EPROTO, "no HELLO");
    h = hello();
    h.head.type = KVT_ATTACH_RECLAIMED;
    refused(&h, sizeof(h), KVT_EPROTO, "no HELLO");
    h = hello();
    h.role = 3;
    refused(&h, sizeof(h), KVT_EINVAL, "role is 3");
    h = hello();
    h.worker_kind = 0;
    refused(&h, sizeof(h), KVT_EINVAL, "worker_kind is 0");
    h = hello();
    h.role = KVT_ROLE_CONTROL;
    refused(&h, sizeof(h), KVT_EINVAL, "worker_kind is 1");
    h = hello();
    h.extent_kind = 3;
    refused(&h, sizeof(h), KVT_EINVAL, "extent_kind is 3");
    h = hello();
    memset(h.name, 'n', sizeof(h.name));
    refused(&h, sizeof(h), KVT_EINVAL, "no closing NUL");
}

static void test_reclaimed(void) {
    struct kvt_attach_reclaim r = {
        .head = kvt_attach_head_make(KVT_ATTACH_RECLAIMED, sizeof(r)), .session = 3, .extent = 9};
    struct kvt_attach_reclaim out = {.session = 0};
    CU_ASSERT_EQUAL(kvt_reclaimed_check(&r, sizeof(r), &out), 0);
    CU_ASSERT_EQUAL(out.extent, 9);
    CU_ASSERT_EQUAL(kvt_reclaimed_check(&r, sizeof(r) - 1, &out), -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_reclaimed_check(&r, sizeof(r) + 1, &out), -KVT_EPROTO);
    CU_ASSERT_EQUAL(kvt_reclaimed_check(&r, 0, &out), -KVT_EPROTO);
    r.head.type = KVT_ATTACH_RECLAIM;
    CU_ASSERT_EQUAL(kvt_reclaimed_check(&r, sizeof(r), &out), -KVT_EPROTO);
    r.head.type = KVT_ATTACH_RECLAIMED;
    r.head.bytes = 0;
    CU_ASSERT_EQUAL(kvt_reclaimed_check(&r, sizeof(r), &out), -KVT_EPROTO);
    r.head.bytes = sizeof(r);
    r.head.magic = 0;
    CU_ASSERT_EQUAL(kvt_reclaimed_check(&r, sizeof(r), &out), -KVT_EPROTO);
}

static void test_front(void) {
    struct kvt_front_head h = {.magic = KVT_FRONT_MAGIC, .type = KVT_FRONT_MESSAGE, .bytes = 1};
    size_t head = sizeof(h);
    CU_ASSERT(kvt_front_packet_ok(&h, head + 1));
    CU_ASSERT(!kvt_front_packet_ok(&h, head));
    CU_ASSERT(!kvt_front_packet_ok(&h, head + 2));
    CU_ASSERT(!kvt_front_packet_ok(&h, head - 1));
    CU_ASSERT(!kvt_front_packet_ok(&h, 0));
    h.bytes = KVT_MESSAGE_BYTES_MAX;
    CU_ASSERT(kvt_front_packet_ok(&h, head + KVT_MESSAGE_BYTES_MAX));
    h.bytes = KVT_MESSAGE_BYTES_MAX + 1;
    CU_ASSERT(!kvt_front_packet_ok(&h, head + KVT_MESSAGE_BYTES_MAX + 1));
    h.bytes = 0;
    CU_ASSERT(!kvt_front_packet_ok(&h, head));
    h.type = KVT_FRONT_READY;
    CU_ASSERT(kvt_front_packet_ok(&h, head));
    h.bytes = 1;
    CU_ASSERT(!kvt_front_packet_ok(&h, head + 1));
    h.bytes = 0;
    h.type = 3;
    CU_ASSERT(!kvt_front_packet_ok(&h, head));
    h.type = KVT_FRONT_READY;
    h.reserved[2] = 1;
    CU_ASSERT(!kvt_front_packet_ok(&h, head));
    h.reserved[2] = 0;
    h.magic = 0;
    CU_ASSERT(!kvt_front_packet_ok(&h, head));
}

int main(void) {
    CU_TestInfo tests[] = {
        {"a good HELLO", test_good},
        {"another major version names both", test_version},
        {"a bad HELLO", test_bad},
        {"RECLAIMED", test_reclaimed},
        {"packets of the front", test_front},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("packet", tests);
}
