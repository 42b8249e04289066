/* Parsing of GGUF; see gguf.h. The reader is one cursor that never passes its end. */
#include "client/worker/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "client/worker/dequant.h"
#include "client/worker/fail.h"
#include "proto/errors.h"

#define GGUF_MAGIC        0x46554747u /* "GGUF" */
#define ALIGNMENT_DEFAULT 32u
#define ALIGNMENT_MAX     (1u << 20)
#define STRING_SHOWN_MAX  80

struct kvt_gguf {
    const uint8_t *bytes;
    size_t size_bytes;
    size_t head_bytes;
    bool mapped; /* `bytes` is ours to unmap */
    char *name;
    struct kvt_gguf_pair *pairs;
    uint64_t pair_count;
    struct kvt_gguf_tensor *tensors;
    uint64_t tensor_count;
};

struct reader {
    const uint8_t *bytes;
    size_t size_bytes;
    size_t at;
    const char *name;
    char *err;
    size_t err_size;
};

static void truncated(struct reader *r, const char *what, uint64_t wanted_bytes) {
    (void)kvt_fail(-KVT_EINVAL, r->err, r->err_size,
                   "%s: %s at byte %zu needs %" PRIu64
                   " bytes, but the file has %zu left: it is truncated or damaged; fetch it again",
                   r->name, what, r->at, wanted_bytes, r->size_bytes - r->at);
}

static int malformed(struct reader *r, const char *what, uint64_t value) {
    return kvt_fail(-KVT_EINVAL, r->err, r->err_size,
                    "%s: %s is %" PRIu64
                    " before byte %zu, which no GGUF file has: it is damaged; fetch it again",
                    r->name, what, value, r->at);
}

/* The next bytes, or NULL when there are too few; then the error text is written. */
static const uint8_t *take(struct reader *r, const char *what, uint64_t size_bytes) {
    const uint8_t *bytes = r->bytes + r->at;
    if (size_bytes > r->size_bytes - r->at) {
        truncated(r, what, size_bytes);
        return NULL;
    }
    r->at += (size_t)size_bytes;
    return bytes;
}

static uint64_t little(const uint8_t *bytes, size_t size) {
    uint64_t value = 0;
    for (size_t i = 0; i < size; i++)
        value |= (uint64_t)bytes[i] << (8 * i);
    return value;
}

static int take_u32(struct reader *r, const char *what, uint32_t *out) {
    const uint8_t *bytes = take(r, what, 4);
    if (!bytes)
        return -KVT_EINVAL;
    *out = (uint32_t)little(bytes, 4);
    return 0;
}

static int take_u64(struct reader *r, const char *what, uint64_t *out) {
    const uint8_t *bytes = take(r, what, 8);
    if (!bytes)
        return -KVT_EINVAL;
    *out = little(bytes, 8);
    return 0;
}

static int take_string(struct reader *r, const char *what, struct kvt_gguf_string *out) {
    uint64_t size = 0;
    if (take_u64(r, what, &size))
        return -KVT_EINVAL;
    const uint8_t *bytes = take(r, what, size);
    if (!bytes)
        return -KVT_EINVAL;
    *out = (struct kvt_gguf_string){(const char *)bytes, (size_t)size};
    return 0;
}

/* Bytes of one value of a fixed-size type; 0 for strings, arrays and unknown types. */
static size_t scalar_size(enum kvt_gguf_type type) {
    static const uint8_t sizes[KVT_GGUF_TYPE_COUNT] = {
        [KVT_GGUF_U8] = 1,  [KVT_GGUF_I8] = 1,  [KVT_GGUF_U16] = 2, [KVT_GGUF_I16] = 2,
        [KVT_GGUF_U32] = 4, [KVT_GGUF_I32] = 4, [KVT_GGUF_F32] = 4, [KVT_GGUF_BOOL] = 1,
        [KVT_GGUF_U64] = 8, [KVT_GGUF_I64] = 8, [KVT_GGUF_F64] = 8,
    };
    return (unsigned)type < KVT_GGUF_TYPE_COUNT ? sizes[type] : 0;
}

static int take_array(struct reader *r, struct kvt_gguf_pair *pair) {
    uint32_t type = 0;
    int rc = take_u32(r, "an array's type", &type);
    if (rc == 0)
        rc = take_u64(r, "an array's length", &pair->count);
    if (rc)
        return rc;
    pair->item_type = (enum kvt_gguf_type)type;

    size_t start = r->at;
    size_t item_size = scalar_size(pair->item_type);
    if (type == KVT_GGUF_STRING) {
        /* each string takes at least its 8-byte length: a hostile count ends quickly */
        struct kvt_gguf_string skipped;
        for (uint64_t i = 0; i < pair->count; i++) {
            rc = take_string(r, "a string of an array", &skipped);
            if (rc)
                return rc;
        }
    } else if (item_size > 0) {
        if (pair->count > SIZE_MAX / item_size)
            return malformed(r, "an array's length", pair->count);
        if (!take(r, "an array", pair->count * item_size))
            return -KVT_EINVAL;
    } else {
        return malformed(r, "an array's item type", type);
    }
    pair->data = r->bytes + start;
    pair->size_bytes = r->at - start;
    return 0;
}

static int take_pair(struct reader *r, struct kvt_gguf_pair *pair) {
    uint32_t type = 0;
    int rc = take_string(r, "a metadata key", &pair->key);
    if (rc == 0)
        rc = take_u32(r, "a metadata type", &type);
    if (rc)
        return rc;
    pair->type = (enum kvt_gguf_type)type;
    if (type == KVT_GGUF_ARRAY)
        return take_array(r, pair);

    pair->count = 1;
    if (type == KVT_GGUF_STRING) {
        struct kvt_gguf_string text;
        rc = take_string(r, "a metadata string", &text);
        if (rc == 0) {
            pair->data = (const uint8_t *)text.data;
            pair->size_bytes = text.size;
        }
        return rc;
    }
    pair->size_bytes = scalar_size(pair->type);
    if (pair->size_bytes == 0)
        return malformed(r, "a metadata type", type);
    pair->data = take(r, "a metadata value", pair->size_bytes);
    return pair->data ? 0 : -KVT_EINVAL;
}

/* The shape of a tensor; its offset comes back apart, as data begins behind the last description. */
static int take_tensor(struct reader *r, struct kvt_gguf_tensor *tensor, uint64_t *offset) {
    int rc = take_string(r, "a tensor's name", &tensor->name);
    if (rc == 0)
        rc = take_u32(r, "a tensor's dimension count", &tensor->dim_count);
    if (rc)
        return rc;
    if (tensor->dim_count == 0 || tensor->dim_count > KVT_GGUF_DIMS_MAX)
        return malformed(r, "a tensor's dimension count", tensor->dim_count);

    uint64_t values = 1;
    for (uint32_t i = 0; i < KVT_GGUF_DIMS_MAX; i++) {
        tensor->dims[i] = 1;
        if (i >= tensor->dim_count)
            continue;
        rc = take_u64(r, "a tensor's dimension", &tensor->dims[i]);
        if (rc)
            return rc;
        if (tensor->dims[i] == 0 || tensor->dims[i] > INT64_MAX / values)
            return malformed(r, "a tensor's dimension", tensor->dims[i]);
        values *= tensor->dims[i];
    }
    rc = take_u32(r, "a tensor's type", &tensor->type);
    if (rc == 0)
        rc = take_u64(r, "a tensor's offset", offset);
    if (rc)
        return rc;

    const struct kvt_tensor_traits *traits = kvt_tensor_traits(tensor->type);
    int shown = tensor->name.size < STRING_SHOWN_MAX ? (int)tensor->name.size : STRING_SHOWN_MAX;
    if (!traits)
        return kvt_fail(-KVT_ENOTSUP, r->err, r->err_size,
                        "%s: tensor %.*s has type %s (%" PRIu32 "), which is not supported; use a "
                        "file quantized as " KVT_TENSOR_TYPES_TEXT,
                        r->name, shown, tensor->name.data, kvt_tensor_type_text(tensor->type),
                        tensor->type);
    if (tensor->dims[0] % traits->block_values != 0)
        return kvt_fail(-KVT_EINVAL, r->err, r->err_size,
                        "%s: tensor %.*s has rows of %" PRIu64
                        " values, which is no multiple of the %" PRIu32
                        " in a block of %s: the file is damaged; fetch it again",
                        r->name, shown, tensor->name.data, tensor->dims[0], traits->block_values,
                        traits->name);
    uint64_t blocks = values / traits->block_values;
    if (blocks > SIZE_MAX / traits->block_bytes)
        return malformed(r, "a tensor's size in blocks", blocks);
    tensor->size_bytes = (size_t)(blocks * traits->block_bytes);
    return 0;
}

static int place_tensor(struct reader *r, struct kvt_gguf_tensor *tensor, uint64_t offset,
                        uint32_t alignment) {
    size_t data_size = r->size_bytes - r->at;
    int shown = tensor->name.size < STRING_SHOWN_MAX ? (int)tensor->name.size : STRING_SHOWN_MAX;
    if (offset % alignment != 0)
        return kvt_fail(-KVT_EINVAL, r->err, r->err_size,
                        "%s: tensor %.*s lies at offset %" PRIu64
                        ", which is not aligned to %" PRIu32
                        ": the file is damaged; fetch it again",
                        r->name, shown, tensor->name.data, offset, alignment);
    if (offset > data_size || tensor->size_bytes > data_size - offset)
        return kvt_fail(-KVT_EINVAL, r->err, r->err_size,
                        "%s: tensor %.*s needs %zu bytes at offset %" PRIu64
                        " of the data, but the file has only %zu bytes of data: it is truncated; "
                        "fetch it again",
                        r->name, shown, tensor->name.data, tensor->size_bytes, offset, data_size);
    tensor->data = r->bytes + r->at + offset;
    return 0;
}

/* A table of `count` entries, each of which takes at least `least_bytes` of the file. */
static int table_alloc(struct reader *r, const char *what, uint64_t count, size_t least_bytes,
                       size_t entry_bytes, void **out) {
    if (count > (r->size_bytes - r->at) / least_bytes)
        return kvt_fail(-KVT_EINVAL, r->err, r->err_size,
                        "%s: says it holds %" PRIu64
                        " %s, more than its %zu bytes can: it is truncated or damaged; fetch it "
                        "again",
                        r->name, count, what, r->size_bytes);
    *out = calloc(count ? (size_t)count : 1, entry_bytes);
    if (!*out)
        return kvt_fail(-KVT_ENOMEM, r->err, r->err_size, "%s: out of memory for %" PRIu64 " %s",
                        r->name, count, what);
    return 0;
}

static int parse_header(struct reader *r, struct kvt_gguf *gguf) {
    uint32_t magic = 0;
    uint32_t version = 0;
    int rc = take_u32(r, "the magic number", &magic);
    if (rc)
        return rc;
    if (magic != GGUF_MAGIC)
        return kvt_fail(-KVT_EINVAL, r->err, r->err_size,
                        "%s: is not a GGUF file (it does not begin with \"GGUF\"); give the path "
                        "of a .gguf model",
                        r->name);
    rc = take_u32(r, "the version", &version);
    if (rc)
        return rc;
    if (version != 2 && version != 3)
        return kvt_fail(-KVT_ENOTSUP, r->err, r->err_size,
                        "%s: is GGUF version %" PRIu32
                        "; versions 2 and 3 (little endian) are supported; convert the model again",
                        r->name, version);
    rc = take_u64(r, "the tensor count", &gguf->tensor_count);
    if (rc == 0)
        rc = take_u64(r, "the metadata count", &gguf->pair_count);
    return rc;
}

static int parse_tensors(struct reader *r, struct kvt_gguf *gguf) {
    uint64_t *offsets = NULL;
    void *table = NULL;
    int rc = table_alloc(r, "tensors", gguf->tensor_count, 32, sizeof(*gguf->tensors), &table);
    if (rc)
        return rc;
    gguf->tensors = table;
    rc = table_alloc(r, "tensors", gguf->tensor_count, 32, sizeof(*offsets), &table);
    if (rc)
        return rc;
    offsets = table;

    for (uint64_t i = 0; i < gguf->tensor_count && rc == 0; i++)
        rc = take_tensor(r, &gguf->tensors[i], &offsets[i]);
    if (rc)
        goto out;

    gguf->head_bytes = r->at;
    uint32_t alignment = ALIGNMENT_DEFAULT;
    rc = kvt_gguf_u32(gguf, "general.alignment", &alignment);
    if (rc == -KVT_ENOENT)
        rc = 0;
    if (rc || alignment < 8 || alignment > ALIGNMENT_MAX || (alignment & (alignment - 1)) != 0) {
        rc = malformed(r, "general.alignment", alignment);
        goto out;
    }
    size_t padding = (alignment - r->at % alignment) % alignment;
    if (gguf->tensor_count > 0 && !take(r, "the padding before the tensors", padding))
        rc = -KVT_EINVAL;
    for (uint64_t i = 0; i < gguf->tensor_count && rc == 0; i++)
        rc = place_tensor(r, &gguf->tensors[i], offsets[i], alignment);
out:
    free(offsets);
    return rc;
}

int kvt_gguf_parse(struct kvt_gguf **out, const void *bytes, size_t size_bytes, const char *name,
                   char *err, size_t err_size) {
    struct reader r = {bytes, size_bytes, 0, name, err, err_size};
    struct kvt_gguf *gguf = calloc(1, sizeof(*gguf));
    char *name_copy = strdup(name);
    void *table = NULL;
    int rc;

    if (!gguf || !name_copy) {
        free(gguf);
        free(name_copy);
        return kvt_fail(-KVT_ENOMEM, err, err_size, "%s: out of memory", name);
    }
    gguf->bytes = bytes;
    gguf->size_bytes = size_bytes;
    gguf->name = name_copy;
    rc = parse_header(&r, gguf);
    if (rc)
        goto undo;
    rc = table_alloc(&r, "metadata entries", gguf->pair_count, 13, sizeof(*gguf->pairs), &table);
    if (rc)
        goto undo;
    gguf->pairs = table;
    for (uint64_t i = 0; i < gguf->pair_count && rc == 0; i++)
        rc = take_pair(&r, &gguf->pairs[i]);
    if (rc == 0)
        rc = parse_tensors(&r, gguf);
    if (rc)
        goto undo;
    *out = gguf;
    return 0;
undo:
    kvt_gguf_close(gguf);
    return rc;
}

int kvt_gguf_open(struct kvt_gguf **out, const char *path, char *err, size_t err_size) {
    struct stat st;
    void *bytes;
    int rc;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return kvt_fail(-KVT_ESYS, err, err_size,
                        "%s: cannot open the model: %s; give the path of a readable .gguf file",
                        path, strerror(errno));
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        rc = kvt_fail(-KVT_EINVAL, err, err_size,
                      "%s: is not a regular file; give the path of a .gguf model", path);
        goto out;
    }
    if (st.st_size == 0) {
        rc = kvt_fail(-KVT_EINVAL, err, err_size, "%s: is empty; fetch the model again", path);
        goto out;
    }
    bytes = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (bytes == MAP_FAILED) {
        rc = kvt_fail(-KVT_ESYS, err, err_size, "%s: cannot map %lld bytes: %s", path,
                      (long long)st.st_size, strerror(errno));
        goto out;
    }
    rc = kvt_gguf_parse(out, bytes, (size_t)st.st_size, path, err, err_size);
    if (rc == 0)
        (*out)->mapped = true;
    else
        (void)munmap(bytes, (size_t)st.st_size);
out:
    (void)close(fd);
    return rc;
}

void kvt_gguf_close(struct kvt_gguf *gguf) {
    if (!gguf)
        return;
    if (gguf->mapped)
        (void)munmap((void *)(uintptr_t)gguf->bytes, gguf->size_bytes);
    free(gguf->pairs);
    free(gguf->tensors);
    free(gguf->name);
    free(gguf);
}

const char *kvt_gguf_name(const struct kvt_gguf *gguf) {
    return gguf->name;
}

struct kvt_gguf_string kvt_gguf_head(const struct kvt_gguf *gguf) {
    return (struct kvt_gguf_string){(const char *)gguf->bytes, gguf->head_bytes};
}

const struct kvt_gguf_pair *kvt_gguf_pair_at(const struct kvt_gguf *gguf, uint64_t index) {
    return index < gguf->pair_count ? &gguf->pairs[index] : NULL;
}

const struct kvt_gguf_tensor *kvt_gguf_tensor_at(const struct kvt_gguf *gguf, uint64_t index) {
    return index < gguf->tensor_count ? &gguf->tensors[index] : NULL;
}

static bool same(const struct kvt_gguf_string *a, const char *b) {
    return a->size == strlen(b) && memcmp(a->data, b, a->size) == 0;
}

const struct kvt_gguf_pair *kvt_gguf_find(const struct kvt_gguf *gguf, const char *key) {
    for (uint64_t i = 0; i < gguf->pair_count; i++)
        if (same(&gguf->pairs[i].key, key))
            return &gguf->pairs[i];
    return NULL;
}

const struct kvt_gguf_tensor *kvt_gguf_tensor_find(const struct kvt_gguf *gguf, const char *name) {
    for (uint64_t i = 0; i < gguf->tensor_count; i++)
        if (same(&gguf->tensors[i].name, name))
            return &gguf->tensors[i];
    return NULL;
}

/* A little-endian integer of `type`; false if it is none or does not fit int64. */
static bool to_i64(enum kvt_gguf_type type, const uint8_t *bytes, int64_t *out) {
    size_t size = scalar_size(type);
    uint64_t raw = little(bytes, size);
    switch (type) {
    case KVT_GGUF_U8:
    case KVT_GGUF_U16:
    case KVT_GGUF_U32:
        *out = (int64_t)raw;
        return true;
    case KVT_GGUF_I8:
        *out = (int8_t)raw;
        return true;
    case KVT_GGUF_I16:
        *out = (int16_t)raw;
        return true;
    case KVT_GGUF_I32:
        *out = (int32_t)raw;
        return true;
    case KVT_GGUF_I64:
        *out = (int64_t)raw;
        return true;
    case KVT_GGUF_U64:
        if (raw > INT64_MAX)
            return false;
        *out = (int64_t)raw;
        return true;
    default:
        return false;
    }
}

static bool to_f32(enum kvt_gguf_type type, const uint8_t *bytes, float *out) {
    if (type == KVT_GGUF_F32) {
        uint32_t raw = (uint32_t)little(bytes, 4);
        memcpy(out, &raw, sizeof(*out));
        return true;
    }
    if (type == KVT_GGUF_F64) {
        uint64_t raw = little(bytes, 8);
        double value;
        memcpy(&value, &raw, sizeof(value));
        *out = (float)value;
        return true;
    }
    return false;
}

int kvt_gguf_u32(const struct kvt_gguf *gguf, const char *key, uint32_t *out) {
    const struct kvt_gguf_pair *pair = kvt_gguf_find(gguf, key);
    int64_t value;
    if (!pair)
        return -KVT_ENOENT;
    if (!to_i64(pair->type, pair->data, &value) || value < 0 || value > UINT32_MAX)
        return -KVT_EINVAL;
    *out = (uint32_t)value;
    return 0;
}

int kvt_gguf_f32(const struct kvt_gguf *gguf, const char *key, float *out) {
    const struct kvt_gguf_pair *pair = kvt_gguf_find(gguf, key);
    if (!pair)
        return -KVT_ENOENT;
    return to_f32(pair->type, pair->data, out) ? 0 : -KVT_EINVAL;
}

int kvt_gguf_bool(const struct kvt_gguf *gguf, const char *key, bool *out) {
    const struct kvt_gguf_pair *pair = kvt_gguf_find(gguf, key);
    if (!pair)
        return -KVT_ENOENT;
    if (pair->type != KVT_GGUF_BOOL)
        return -KVT_EINVAL;
    *out = pair->data[0] != 0;
    return 0;
}

int kvt_gguf_text(const struct kvt_gguf *gguf, const char *key, struct kvt_gguf_string *out) {
    const struct kvt_gguf_pair *pair = kvt_gguf_find(gguf, key);
    if (!pair)
        return -KVT_ENOENT;
    if (pair->type != KVT_GGUF_STRING)
        return -KVT_EINVAL;
    *out = (struct kvt_gguf_string){(const char *)pair->data, pair->size_bytes};
    return 0;
}

int kvt_gguf_next_string(const struct kvt_gguf_pair *array, size_t *cursor,
                         struct kvt_gguf_string *out) {
    if (array->type != KVT_GGUF_ARRAY || array->item_type != KVT_GGUF_STRING ||
        *cursor >= array->size_bytes)
        return 0;
    /* lengths were checked when the file was parsed */
    out->size = (size_t)little(array->data + *cursor, 8);
    out->data = (const char *)array->data + *cursor + 8;
    *cursor += 8 + out->size;
    return 1;
}

int kvt_gguf_item_i64(const struct kvt_gguf_pair *array, uint64_t index, int64_t *out) {
    if (array->type != KVT_GGUF_ARRAY || index >= array->count)
        return -KVT_EINVAL;
    size_t size = scalar_size(array->item_type);
    return size && to_i64(array->item_type, array->data + index * size, out) ? 0 : -KVT_EINVAL;
}

int kvt_gguf_item_f32(const struct kvt_gguf_pair *array, uint64_t index, float *out) {
    if (array->type != KVT_GGUF_ARRAY || index >= array->count)
        return -KVT_EINVAL;
    size_t size = scalar_size(array->item_type);
    return size && to_f32(array->item_type, array->data + index * size, out) ? 0 : -KVT_EINVAL;
}
