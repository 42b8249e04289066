/* Control messages: bounded unpacking, and every field's range. */
#include "daemon/request.h"
#include "tests/support/cunit_run.h"

#include <stdlib.h>
#include <string.h>

static struct kvt_arena arena;
static struct kvt_request_buffers buffers;
static struct kvt_request request;
static char text[KVT_TEXT_BYTES];

static int read_body(Kvt__Request *m, Kvt__Request__BodyCase body) {
    m->body_case = body;
    text[0] = '\0';
    return kvt_request_read(m, &buffers, &request, text);
}

/* Refused, and the sentence has these words. */
static void refused(Kvt__Request *m, Kvt__Request__BodyCase body, const char *words) {
    CU_ASSERT_EQUAL(read_body(m, body), -KVT_EINVAL);
    bool found = strstr(text, words) != NULL;
    CU_ASSERT(found);
    if (!found) {
        printf("\n    is: %s\n    wanted: %s\n", text, words);
    }
}

static void test_unpack(void) {
    int code = 0;
    CU_ASSERT_PTR_NULL(kvt_request_unpack(&arena, (const uint8_t *)"\xff\xff", 2, &code));
    CU_ASSERT_EQUAL(code, -KVT_EPROTO);
    Kvt__Request m = KVT__REQUEST__INIT;
    Kvt__Ping ping = KVT__PING__INIT;
    uint8_t bytes[64];
    m.sequence = 5;
    m.session = 6;
    m.body_case = KVT__REQUEST__BODY_PING;
    m.ping = &ping;
    size_t size = kvt__request__pack(&m, bytes);
    for (int i = 0; i < 3; i++) {
        Kvt__Request *out = kvt_request_unpack(&arena, bytes, size, &code);
        CU_ASSERT_PTR_NOT_NULL_FATAL(out);
        CU_ASSERT_EQUAL(out->sequence, 5);
        CU_ASSERT_EQUAL(out->body_case, KVT__REQUEST__BODY_PING);
    }
    /* Cut short anywhere it is no message, or one without a body. */
    for (size_t cut = 0; cut < size; cut++) {
        const Kvt__Request *out = kvt_request_unpack(&arena, bytes, cut, &code);
        CU_ASSERT(out == NULL || out->body_case == KVT__REQUEST__BODY__NOT_SET);
    }
}

/* 64 KiB of the smallest layers would unpack to several MiB: the arena ends it. */
static void test_arena(void) {
    enum { LAYERS = 32000 };
    static uint8_t bytes[2 * LAYERS + 16];
    size_t at = 0;
    size_t options = 2 * LAYERS;
    size_t create = options + 4; /* tag and length of the options */
    bytes[at++] = 11 << 3 | 2;
    bytes[at++] = (uint8_t)((create & 0x7f) | 0x80);
    bytes[at++] = (uint8_t)((create >> 7 & 0x7f) | 0x80);
    bytes[at++] = (uint8_t)(create >> 14);
    bytes[at++] = 1 << 3 | 2;
    bytes[at++] = (uint8_t)((options & 0x7f) | 0x80);
    bytes[at++] = (uint8_t)((options >> 7 & 0x7f) | 0x80);
    bytes[at++] = (uint8_t)(options >> 14);
    for (int i = 0; i < LAYERS; i++) {
        bytes[at++] = 1 << 3 | 2;
        bytes[at++] = 0;
    }
    int code = 0;
    CU_ASSERT(at <= KVT_MESSAGE_BYTES_MAX);
    CU_ASSERT_PTR_NULL(kvt_request_unpack(&arena, bytes, at, &code));
    CU_ASSERT_EQUAL(code, -KVT_ETOOBIG);
    CU_ASSERT(arena.used <= arena.size);
    /* The next message has the whole arena again. */
    CU_ASSERT_PTR_NOT_NULL(kvt_request_unpack(&arena, (const uint8_t *)"", 0, &code));
    CU_ASSERT_PTR_NULL(kvt_arena_alloc(&arena, SIZE_MAX));
    CU_ASSERT_PTR_NULL(kvt_arena_alloc(&arena, arena.size + 1));
    kvt_arena_reset(&arena);
    CU_ASSERT_PTR_NOT_NULL(kvt_arena_alloc(&arena, arena.size));
    CU_ASSERT_PTR_NULL(kvt_arena_alloc(&arena, 1));
}

/* A CREATE that is right; tests change one field of it. */
static struct {
    Kvt__Request m;
    Kvt__Create create;
    Kvt__CacheOptions options;
    Kvt__Layer layer;
    Kvt__Layer *layers[2];
} c;

static void good_create(void) {
    c.m = (Kvt__Request)KVT__REQUEST__INIT;
    c.create = (Kvt__Create)KVT__CREATE__INIT;
    c.options = (Kvt__CacheOptions)KVT__CACHE_OPTIONS__INIT;
    c.layer = (Kvt__Layer)KVT__LAYER__INIT;
    c.m.create = &c.create;
    c.create.options = &c.options;
    c.options.mode = KVT_MODE_DYNAMIC;
    c.options.rows = 1;
    c.options.append_max = 1;
    c.options.layers = c.layers;
    c.options.n_layers = 1;
    c.layers[0] = &c.layer;
    c.layers[1] = &c.layer;
    c.layer.kind = KVT_LAYER_FULL;
    c.layer.kv_heads = 8;
    c.layer.k_head_dim = 128;
    c.layer.v_head_dim = 128;
    c.layer.dtype = KVT_F16;
    c.layer.repeat = 32;
}

#define CREATE KVT__REQUEST__BODY_CREATE

static void test_create(void) {
    uint8_t fingerprint[KVT_FINGERPRINT_BYTES] = {1, 2, 3};
    good_create();
    c.options.fingerprint.data = fingerprint;
    c.options.fingerprint.len = sizeof(fingerprint);
    c.options.name = (char *)"chat";
    CU_ASSERT_EQUAL(read_body(&c.m, CREATE), 0);
    CU_ASSERT_EQUAL(request.kind, KVT_REQUEST_CREATE);
    CU_ASSERT_EQUAL(request.layout->layer_count, 32);
    CU_ASSERT_EQUAL(request.layout->layers[31].last_reader, 31);
    CU_ASSERT_EQUAL(request.options->resident_layers_max, UINT32_MAX);
    CU_ASSERT_EQUAL(request.options->fingerprint[2], 3);
    CU_ASSERT_STRING_EQUAL(request.options->name, "chat");
    c.options.mode = KVT_MODE_OFFLOADED;
    CU_ASSERT_EQUAL(read_body(&c.m, CREATE), 0);
    CU_ASSERT_EQUAL(request.options->resident_layers_max, 0);
    c.options.resident_layers_max_plus_1 = 6;
    CU_ASSERT_EQUAL(read_body(&c.m, CREATE), 0);
    CU_ASSERT_EQUAL(request.options->resident_layers_max, 5);
    c.layer.repeat = 1;
    c.options.n_layers = 2;
    c.layer.last_reader_plus_1 = 2;
    CU_ASSERT_EQUAL(read_body(&c.m, CREATE), 0);
    CU_ASSERT_EQUAL(request.layout->layers[0].last_reader, 1);
}

static void test_create_bad(void) {
    good_create();
    c.create.options = NULL;
    refused(&c.m, CREATE, "options are missing");
#define BAD(change, words) \
    good_create();         \
    c.change;              \
    refused(&c.m, CREATE, words)
    BAD(options.mode = 0, "mode is 0");
    BAD(options.mode = 5, "mode is 5");
    BAD(options.codec = 1, "codec is 1");
    BAD(options.rows = 0, "rows is 0");
    BAD(options.rows = 1025, "rows is 1025");
    BAD(options.append_max = 0, "append_max is 0");
    BAD(options.append_max = 1048577, "append_max is 1048577");
    BAD(options.tokens_max = UINT32_MAX, "tokens_max is 4294967295");
    BAD(options.mode = KVT_MODE_STATIC, "tokens_max is 0; accepted is 1");
    BAD(options.piece_tokens = 100, "piece_tokens is 100");
    BAD(options.resident_layers_max_plus_1 = 1026, "resident_layers_max_plus_1 is 1026");
    BAD(options.fingerprint.len = 31, "fingerprint is 31");
    BAD(options.n_layers = 0, "0 layers");
    BAD(layer.repeat = 1025, "more than 1024 layers");
    BAD(layer.repeat = UINT32_MAX, "more than 1024 layers");
    BAD(layer.kind = 6, "kind is 6");
    BAD(layer.kv_heads = 0, "kv_heads is 0");
    BAD(layer.dtype = 9, "dtype is 9");
    BAD(layer.last_reader_plus_1 = 1, "last_reader is 0");
    BAD(layer.last_reader_plus_1 = 33, "last_reader is 32");
    char name[KVT_NAME_BYTES + 1];
    memset(name, 'n', KVT_NAME_BYTES);
    name[KVT_NAME_BYTES] = '\0';
    BAD(options.name = name, "name is 64");
}

static void test_step(void) {
    Kvt__Request m = KVT__REQUEST__INIT;
    Kvt__Step step = KVT__STEP__INIT;
    static Kvt__StepRow row = KVT__STEP_ROW__INIT;
    static Kvt__StepRow *rows[KVT_ROWS_MAX + 1];
    for (int i = 0; i <= KVT_ROWS_MAX; i++) {
        rows[i] = &row;
    }
    m.step = &step;
    step.rows = rows;
    refused(&m, KVT__REQUEST__BODY_STEP, "steps is 0");
    step.steps = 65;
    refused(&m, KVT__REQUEST__BODY_STEP, "steps is 65");
    step.steps = 64;
    step.cache = 9;
    step.n_rows = 2;
    row.row = 1023;
    row.tokens = 7;
    CU_ASSERT_EQUAL(read_body(&m, KVT__REQUEST__BODY_STEP), 0);
    CU_ASSERT_EQUAL(request.count, 2);
    CU_ASSERT_EQUAL(request.rows[1], 1023);
    CU_ASSERT_EQUAL(request.values[1], 7);
    CU_ASSERT_EQUAL(request.cache, 9);
    row.row = 1024;
    refused(&m, KVT__REQUEST__BODY_STEP, "row is 1024");
    row.row = 0;
    row.tokens = KVT_APPEND_MAX + 1;
    refused(&m, KVT__REQUEST__BODY_STEP, "tokens of a row");
    row.tokens = 0;
    step.n_rows = KVT_ROWS_MAX + 1;
    refused(&m, KVT__REQUEST__BODY_STEP, "rows is 1025");
    step.n_rows = 0;
    step.tokens = KVT_APPEND_MAX + 1;
    refused(&m, KVT__REQUEST__BODY_STEP, "tokens is 1048577");
}

static void test_rows(void) {
    Kvt__Request m = KVT__REQUEST__INIT;
    Kvt__Fork fork = KVT__FORK__INIT;
    Kvt__Rows rows = KVT__ROWS__INIT;
    Kvt__Crop crop = KVT__CROP__INIT;
    Kvt__Repeat repeat = KVT__REPEAT__INIT;
    Kvt__Acquire acquire = KVT__ACQUIRE__INIT;
    static uint32_t numbers[KVT_ROWS_MAX + 1];
    m.fork = &fork;
    CU_ASSERT_EQUAL(read_body(&m, KVT__REQUEST__BODY_FORK), 0); /* all rows */
    fork.rows = numbers;
    fork.n_rows = KVT_ROWS_MAX;
    CU_ASSERT_EQUAL(read_body(&m, KVT__REQUEST__BODY_FORK), 0);
    fork.n_rows++;
    refused(&m, KVT__REQUEST__BODY_FORK, "fork: rows is 1025");
    m.reorder = &rows;
    refused(&m, KVT__REQUEST__BODY_REORDER, "reorder: rows is 0");
    refused(&m, KVT__REQUEST__BODY_SELECT, "select: rows is 0");
    rows.rows = numbers;
    rows.n_rows = 3;
    numbers[2] = 1024;
    refused(&m, KVT__REQUEST__BODY_SELECT, "select: rows is 1024");
    numbers[2] = 2;
    CU_ASSERT_EQUAL(read_body(&m, KVT__REQUEST__BODY_REORDER), 0);
    CU_ASSERT_EQUAL(request.kind, KVT_REQUEST_REORDER);
    CU_ASSERT_EQUAL(request.count, 3);
    m.crop = &crop;
    refused(&m, KVT__REQUEST__BODY_CROP, "crop: lengths is 0");
    crop.lengths = numbers;
    crop.n_lengths = 1;
    CU_ASSERT_EQUAL(read_body(&m, KVT__REQUEST__BODY_CROP), 0);
    numbers[0] = UINT32_MAX;
    refused(&m, KVT__REQUEST__BODY_CROP, "crop: length is 4294967295");
    m.repeat = &repeat;
    refused(&m, KVT__REQUEST__BODY_REPEAT, "times is 0");
    repeat.times = 1025;
    refused(&m, KVT__REQUEST__BODY_REPEAT, "times is 1025");
    m.acquire = &acquire;
    acquire.layer = 1024;
    refused(&m, KVT__REQUEST__BODY_ACQUIRE, "layer is 1024");
    acquire.layer = 0;
    acquire.tokens = KVT_APPEND_MAX + 1;
    refused(&m, KVT__REQUEST__BODY_ACQUIRE, "tokens is 1048577");
}

static void test_no_body(void) {
    Kvt__Request m = KVT__REQUEST__INIT;
    CU_ASSERT_EQUAL(read_body(&m, KVT__REQUEST__BODY__NOT_SET), -KVT_ENOTSUP);
    CU_ASSERT_EQUAL(read_body(&m, KVT__REQUEST__BODY_PING), -KVT_ENOTSUP);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"unpacking", test_unpack}, {"unpacking is bounded", test_arena},
        {"CREATE", test_create},    {"CREATE out of range", test_create_bad},
        {"STEP", test_step},        {"lists of rows", test_rows},
        {"no body", test_no_body},  CU_TEST_INFO_NULL,
    };
    if (kvt_arena_init(&arena, KVT_ARENA_BYTES) != 0) {
        return 1;
    }
    int status = kvt_cunit_run("request", tests);
    kvt_arena_destroy(&arena);
    return status;
}
