/*
 * GGUF files: metadata and tensors of a model, read in place.
 *
 * The parser believes nothing: every count, length and offset is checked
 * against the bytes that are there before it is used, so a truncated or
 * hostile file is a clear error and never a crash. Strings and arrays point
 * into the file; nothing is copied but the two index tables.
 *
 * Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
 */
#ifndef KVT_WORKER_GGUF_H
#define KVT_WORKER_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KVT_GGUF_DIMS_MAX 4

/* Types of metadata values, as numbered in the file. */
enum kvt_gguf_type {
    KVT_GGUF_U8 = 0,
    KVT_GGUF_I8 = 1,
    KVT_GGUF_U16 = 2,
    KVT_GGUF_I16 = 3,
    KVT_GGUF_U32 = 4,
    KVT_GGUF_I32 = 5,
    KVT_GGUF_F32 = 6,
    KVT_GGUF_BOOL = 7,
    KVT_GGUF_STRING = 8,
    KVT_GGUF_ARRAY = 9,
    KVT_GGUF_U64 = 10,
    KVT_GGUF_I64 = 11,
    KVT_GGUF_F64 = 12,
    KVT_GGUF_TYPE_COUNT = 13
};

/* Bytes inside the file; not terminated by a zero. */
struct kvt_gguf_string {
    const char *data;
    size_t size;
};

struct kvt_gguf_pair {
    struct kvt_gguf_string key;
    enum kvt_gguf_type type;
    enum kvt_gguf_type item_type; /* of an array */
    uint64_t count;               /* items of an array, else 1 */
    const uint8_t *data;          /* little endian, unaligned */
    size_t size_bytes;
};

struct kvt_gguf_tensor {
    struct kvt_gguf_string name;
    uint32_t type; /* enum kvt_tensor_type, see dequant.h */
    uint32_t dim_count;
    uint64_t dims[KVT_GGUF_DIMS_MAX]; /* fastest first; unused ones are 1 */
    const uint8_t *data;
    size_t size_bytes;
};

struct kvt_gguf;

/*
 * Maps and parses a file.
 * Ownership: the caller owns *out and closes it; all that it returns is borrowed until then.
 * Errors: -KVT_EINVAL malformed, -KVT_ENOTSUP a type this worker does not read, -KVT_ENOMEM,
 * -KVT_ESYS if the file cannot be opened.
 */
__attribute__((warn_unused_result)) int kvt_gguf_open(struct kvt_gguf **out, const char *path,
                                                      char *err, size_t err_size);

/* The same for bytes in memory, borrowed until close; `name` stands in the error texts. */
__attribute__((warn_unused_result)) int kvt_gguf_parse(struct kvt_gguf **out, const void *bytes,
                                                       size_t size_bytes, const char *name,
                                                       char *err, size_t err_size);

void kvt_gguf_close(struct kvt_gguf *gguf);

/* The name given at open or parse. */
const char *kvt_gguf_name(const struct kvt_gguf *gguf);

/* Everything before the tensors' bytes: metadata, tokenizer and the tensors' descriptions. */
struct kvt_gguf_string kvt_gguf_head(const struct kvt_gguf *gguf);

/* Index access, for listings and fuzzing; NULL behind the end. */
const struct kvt_gguf_pair *kvt_gguf_pair_at(const struct kvt_gguf *gguf, uint64_t index);
const struct kvt_gguf_tensor *kvt_gguf_tensor_at(const struct kvt_gguf *gguf, uint64_t index);

/* NULL if there is none of that name. */
const struct kvt_gguf_pair *kvt_gguf_find(const struct kvt_gguf *gguf, const char *key);
const struct kvt_gguf_tensor *kvt_gguf_tensor_find(const struct kvt_gguf *gguf, const char *name);

/*
 * Scalars by key. 0: *out is written; -KVT_ENOENT: no such key; -KVT_EINVAL: it holds
 * another type, or a number that does not fit. Any integer type is taken.
 */
__attribute__((warn_unused_result)) int kvt_gguf_u32(const struct kvt_gguf *gguf, const char *key,
                                                     uint32_t *out);
__attribute__((warn_unused_result)) int kvt_gguf_f32(const struct kvt_gguf *gguf, const char *key,
                                                     float *out);
__attribute__((warn_unused_result)) int kvt_gguf_bool(const struct kvt_gguf *gguf, const char *key,
                                                      bool *out);
__attribute__((warn_unused_result)) int kvt_gguf_text(const struct kvt_gguf *gguf, const char *key,
                                                      struct kvt_gguf_string *out);

/*
 * Walks an array of strings: start with *cursor = 0; 1 while there is one more,
 * 0 at the end.
 */
int kvt_gguf_next_string(const struct kvt_gguf_pair *array, size_t *cursor,
                         struct kvt_gguf_string *out);

/* Item `index` of an array of any integer or float type, as that C type. */
__attribute__((warn_unused_result)) int kvt_gguf_item_i64(const struct kvt_gguf_pair *array,
                                                          uint64_t index, int64_t *out);
__attribute__((warn_unused_result)) int kvt_gguf_item_f32(const struct kvt_gguf_pair *array,
                                                          uint64_t index, float *out);

#endif
