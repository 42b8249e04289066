/* The GGUF parser: what it reads, and what it says about files that are wrong. */
#include "client/worker/gguf.h"

#include <stdlib.h>
#include <string.h>

#include "client/worker/dequant.h"
#include "proto/errors.h"
#include "tests/support/cunit_run.h"

/* A file under construction. */
struct file {
    uint8_t bytes[4096];
    size_t size;
};

static void put(struct file *f, uint64_t value, size_t size_bytes) {
    for (size_t i = 0; i < size_bytes; i++)
        f->bytes[f->size++] = (uint8_t)(value >> (8 * i));
}

static void put_text(struct file *f, const char *text) {
    put(f, strlen(text), 8);
    memcpy(f->bytes + f->size, text, strlen(text));
    f->size += strlen(text);
}

static void put_header(struct file *f, uint64_t tensors, uint64_t pairs) {
    memcpy(f->bytes, "GGUF", 4);
    f->size = 4;
    put(f, 3, 4);
    put(f, tensors, 8);
    put(f, pairs, 8);
}

static void put_tensor(struct file *f, const char *name, uint64_t columns, uint32_t type,
                       uint64_t offset) {
    put_text(f, name);
    put(f, 2, 4);
    put(f, columns, 8);
    put(f, 2, 8);
    put(f, type, 4);
    put(f, offset, 8);
}

/* Four pairs and two tensors with all their bytes. */
static void put_sound(struct file *f) {
    put_header(f, 2, 4);
    put_text(f, "general.architecture");
    put(f, KVT_GGUF_STRING, 4);
    put_text(f, "llama");
    put_text(f, "llama.block_count");
    put(f, KVT_GGUF_U32, 4);
    put(f, 7, 4);
    put_text(f, "words");
    put(f, KVT_GGUF_ARRAY, 4);
    put(f, KVT_GGUF_STRING, 4);
    put(f, 2, 8);
    put_text(f, "one");
    put_text(f, "three");
    put_text(f, "scores");
    put(f, KVT_GGUF_ARRAY, 4);
    put(f, KVT_GGUF_F32, 4);
    put(f, 1, 8);
    put(f, 0x3fc00000, 4); /* 1.5 */
    put_tensor(f, "a.weight", 4, KVT_TENSOR_F32, 0);
    put_tensor(f, "b.weight", 32, KVT_TENSOR_Q4_1, 32);
    while (f->size % 32)
        put(f, 0, 1);
    put(f, 0, 8);
    f->size += 32 + 40 - 8;
}

/* Parses an exact-size heap copy, so that a read past the end is seen by ASan. */
static int parse(const struct file *f, size_t size, struct kvt_gguf **gguf, void **copy, char *err,
                 size_t err_size) {
    *copy = malloc(size ? size : 1);
    memcpy(*copy, f->bytes, size);
    return kvt_gguf_parse(gguf, *copy, size, "m.gguf", err, err_size);
}

static void expect_error(const struct file *f, size_t size, int code, const char *part) {
    char err[512] = "";
    struct kvt_gguf *gguf = NULL;
    void *copy;
    int rc = parse(f, size, &gguf, &copy, err, sizeof(err));
    CU_ASSERT_EQUAL(rc, code);
    CU_ASSERT_PTR_NULL(gguf);
    CU_ASSERT_PTR_NOT_NULL(strstr(err, "m.gguf"));
    if (!strstr(err, part)) {
        printf("\n    wanted \"%s\" in \"%s\"\n", part, err);
        CU_FAIL("the text lacks what it should say");
    }
    if (rc == 0)
        kvt_gguf_close(gguf);
    free(copy);
}

static void test_sound_file(void) {
    struct file f = {0};
    char err[512] = "";
    struct kvt_gguf *gguf;
    void *copy;
    uint32_t layers = 0;
    float score = 0;
    struct kvt_gguf_string text;
    size_t cursor = 0;

    put_sound(&f);
    CU_ASSERT_EQUAL_FATAL(parse(&f, f.size, &gguf, &copy, err, sizeof(err)), 0);
    CU_ASSERT_EQUAL(kvt_gguf_u32(gguf, "llama.block_count", &layers), 0);
    CU_ASSERT_EQUAL(layers, 7);
    CU_ASSERT_EQUAL(kvt_gguf_u32(gguf, "general.architecture", &layers), -KVT_EINVAL);
    CU_ASSERT_EQUAL(kvt_gguf_u32(gguf, "llama.block", &layers), -KVT_ENOENT);
    CU_ASSERT_EQUAL(kvt_gguf_text(gguf, "general.architecture", &text), 0);
    CU_ASSERT(text.size == 5 && memcmp(text.data, "llama", 5) == 0);

    const struct kvt_gguf_pair *words = kvt_gguf_find(gguf, "words");
    CU_ASSERT_PTR_NOT_NULL_FATAL(words);
    CU_ASSERT_EQUAL(kvt_gguf_next_string(words, &cursor, &text), 1);
    CU_ASSERT(text.size == 3 && memcmp(text.data, "one", 3) == 0);
    CU_ASSERT_EQUAL(kvt_gguf_next_string(words, &cursor, &text), 1);
    CU_ASSERT(text.size == 5 && memcmp(text.data, "three", 5) == 0);
    CU_ASSERT_EQUAL(kvt_gguf_next_string(words, &cursor, &text), 0);
    const struct kvt_gguf_pair *scores = kvt_gguf_find(gguf, "scores");
    CU_ASSERT_PTR_NOT_NULL_FATAL(scores);
    CU_ASSERT_EQUAL(kvt_gguf_item_f32(scores, 0, &score), 0);
    CU_ASSERT_EQUAL(score, 1.5f);
    CU_ASSERT_EQUAL(kvt_gguf_item_f32(scores, 1, &score), -KVT_EINVAL);

    const struct kvt_gguf_tensor *b = kvt_gguf_tensor_find(gguf, "b.weight");
    CU_ASSERT_PTR_NOT_NULL_FATAL(b);
    CU_ASSERT_EQUAL(b->dims[0], 32);
    CU_ASSERT_EQUAL(b->dims[1], 2);
    CU_ASSERT_EQUAL(b->size_bytes, 40);
    CU_ASSERT_PTR_EQUAL(b->data + 40, (uint8_t *)copy + f.size);
    CU_ASSERT_PTR_NULL(kvt_gguf_tensor_find(gguf, "c.weight"));
    kvt_gguf_close(gguf);
    free(copy);
}

/* Every proper prefix of a sound file is an error that says so. */
static void test_truncated_everywhere(void) {
    struct file f = {0};
    put_sound(&f);
    for (size_t size = 0; size < f.size; size++)
        expect_error(&f, size, -KVT_EINVAL, "truncated");
}

static void test_not_gguf(void) {
    struct file f = {"PK\3\4 something else", 20};
    expect_error(&f, f.size, -KVT_EINVAL, "is not a GGUF file");
    put_header(&f, 0, 0);
    f.bytes[4] = 1;
    expect_error(&f, f.size, -KVT_ENOTSUP, "version 1");
}

static void test_hostile_counts(void) {
    struct file f = {0};
    put_header(&f, UINT64_MAX, 0);
    expect_error(&f, f.size, -KVT_EINVAL, "tensors, more than");
    put_header(&f, 0, UINT64_MAX / 13);
    expect_error(&f, f.size, -KVT_EINVAL, "metadata entries, more than");

    put_header(&f, 0, 1);
    put(&f, UINT64_MAX - 4, 8); /* a key's length */
    f.size += 16;
    expect_error(&f, f.size, -KVT_EINVAL, "truncated");

    put_header(&f, 0, 1);
    put_text(&f, "key");
    put(&f, KVT_GGUF_ARRAY, 4);
    put(&f, KVT_GGUF_U64, 4);
    put(&f, UINT64_MAX / 8 + 2, 8); /* times 8 wraps round to 8 */
    f.size += 16;
    expect_error(&f, f.size, -KVT_EINVAL, "an array");

    put_header(&f, 0, 1);
    put_text(&f, "key");
    put(&f, KVT_GGUF_ARRAY, 4);
    put(&f, KVT_GGUF_ARRAY, 4); /* arrays of arrays could nest without end */
    put(&f, 1, 8);
    expect_error(&f, f.size, -KVT_EINVAL, "item type");

    put_header(&f, 0, 1);
    put_text(&f, "key");
    put(&f, 99, 4);
    expect_error(&f, f.size, -KVT_EINVAL, "metadata type is 99");
}

static void test_hostile_tensors(void) {
    struct file f = {0};
    put_header(&f, 1, 0);
    put_tensor(&f, "huge", UINT64_MAX / 2 + 1, KVT_TENSOR_F32, 0); /* times 2 wraps to 0 */
    expect_error(&f, f.size, -KVT_EINVAL, "dimension");

    put_header(&f, 1, 0);
    put_tensor(&f, "wide", (uint64_t)1 << 61, KVT_TENSOR_F32, 0); /* bytes wrap round */
    expect_error(&f, f.size + 64, -KVT_EINVAL, "size in blocks");

    put_header(&f, 1, 0);
    put_tensor(&f, "odd", 33, KVT_TENSOR_Q4_0, 0);
    expect_error(&f, f.size, -KVT_EINVAL, "no multiple of the 32 in a block of Q4_0");

    put_header(&f, 1, 0);
    put_tensor(&f, "far", 4, KVT_TENSOR_F32, UINT64_MAX - 31);
    expect_error(&f, f.size + 128, -KVT_EINVAL, "tensor far needs 32 bytes");

    put_header(&f, 1, 0);
    put_tensor(&f, "crooked", 4, KVT_TENSOR_F32, 8);
    expect_error(&f, f.size + 128, -KVT_EINVAL, "not aligned");
}

static void test_unsupported_type(void) {
    struct file f = {0};
    put_header(&f, 1, 0);
    put_tensor(&f, "blk.0.ffn_up.weight", 256, 13, 0);
    expect_error(&f, f.size, -KVT_ENOTSUP, "tensor blk.0.ffn_up.weight has type Q5_K (13)");
    put_header(&f, 1, 0);
    put_tensor(&f, "x", 256, 4000000000u, 0);
    expect_error(&f, f.size, -KVT_ENOTSUP, "type unknown (4000000000)");
}

static void test_bad_alignment(void) {
    static const uint32_t bad[] = {0, 4, 24, 1u << 21};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct file f = {0};
        put_header(&f, 0, 1);
        put_text(&f, "general.alignment");
        put(&f, KVT_GGUF_U32, 4);
        put(&f, bad[i], 4);
        expect_error(&f, f.size, -KVT_EINVAL, "general.alignment");
    }
}

static void test_open_errors(void) {
    char err[512] = "";
    struct kvt_gguf *gguf;
    CU_ASSERT_EQUAL(kvt_gguf_open(&gguf, "no-such-file.gguf", err, sizeof(err)), -KVT_ESYS);
    CU_ASSERT_PTR_NOT_NULL(strstr(err, "no-such-file.gguf: cannot open the model"));
    CU_ASSERT_EQUAL(kvt_gguf_open(&gguf, "/", err, sizeof(err)), -KVT_EINVAL);
    CU_ASSERT_PTR_NOT_NULL(strstr(err, "not a regular file"));
    CU_ASSERT_EQUAL(kvt_gguf_open(&gguf, "/dev/null", err, sizeof(err)), -KVT_EINVAL);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"a sound file", test_sound_file},
        {"truncated everywhere", test_truncated_everywhere},
        {"not GGUF", test_not_gguf},
        {"hostile counts", test_hostile_counts},
        {"hostile tensors", test_hostile_tensors},
        {"unsupported type", test_unsupported_type},
        {"bad alignment", test_bad_alignment},
        {"errors of open", test_open_errors},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("gguf", tests);
}
