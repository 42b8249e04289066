/* See vocabulary.h. Two hash tables with linear probing, at most half full, built once. */
#include "client/worker/vocabulary.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "client/worker/fail.h"
#include "client/worker/pretokenize.h"
#include "proto/errors.h"

#define TOKENS_MAX (1u << 24)
#define NONE       UINT32_MAX

static uint64_t hash_bytes(const char *bytes, size_t size) {
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ (unsigned char)bytes[i]) * 0x100000001b3u;
    return hash ^ hash >> 29;
}

static uint64_t hash_pair(uint64_t pair) {
    pair *= 0x9e3779b97f4a7c15u;
    return pair ^ pair >> 31;
}

static size_t table_size_for(uint64_t count) {
    size_t size = 64;
    while (size < count * 2)
        size *= 2;
    return size;
}

/*
 * GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes are
 * U+0100 and up, in order. -1 for a code that stands for no byte.
 */
static int byte_of_code(uint32_t code) {
    if ((code >= 33 && code <= 126) || (code >= 161 && code <= 172) || (code >= 174 && code <= 255))
        return (int)code;
    if (code < 256 || code >= 256 + 68)
        return -1;
    uint32_t n = code - 256;
    if (n < 33)
        return (int)n; /* 0 to 32 */
    if (n < 67)
        return (int)(n - 33 + 127); /* 127 to 160 */
    return 173;
}

/* Spells a name of the byte alphabet as bytes; false if a character stands for none. */
static bool spell_byte_level(const struct kvt_gguf_string *name, char *out, size_t *size) {
    size_t count = 0;
    for (size_t i = 0; i < name->size;) {
        const unsigned char *p = (const unsigned char *)name->data + i;
        size_t length = kvt_utf8_length(name->data + i, name->size - i);
        uint32_t code = length == 1 ? p[0] : length == 2 ? (p[0] & 0x1fu) << 6 | (p[1] & 0x3fu) : 0;
        int byte = length > 2 || (length == 1 && p[0] >= 0x80) ? -1 : byte_of_code(code);
        if (byte < 0)
            return false;
        out[count++] = (char)byte;
        i += length;
    }
    *size = count;
    return true;
}

static void spell_sentencepiece(const struct kvt_gguf_string *name, uint8_t type, char *out,
                                size_t *size) {
    if (type == KVT_TOKEN_BYTE && name->size == 6 && memcmp(name->data, "<0x", 3) == 0) {
        char digits[3] = {name->data[3], name->data[4], 0};
        out[0] = (char)strtoul(digits, NULL, 16);
        *size = 1;
        return;
    }
    size_t count = 0;
    for (size_t i = 0; i < name->size;) {
        if (name->size - i >= 3 && memcmp(name->data + i, "\xe2\x96\x81", 3) == 0) {
            out[count++] = ' ';
            i += 3;
        } else {
            out[count++] = name->data[i++];
        }
    }
    *size = count;
}

/* Whether merging may produce this token: else it is found by name only. */
static bool reachable(const struct kvt_token *token) {
    return token->type == KVT_TOKEN_NORMAL || token->type == KVT_TOKEN_UNUSED;
}

static void table_add(struct kvt_vocabulary *v, uint32_t id) {
    const struct kvt_token *token = &v->tokens[id];
    size_t at = hash_bytes(v->bytes + token->start, token->size) & (v->table_size - 1);
    while (v->table[at] != NONE)
        at = (at + 1) & (v->table_size - 1);
    v->table[at] = id;
}

uint32_t kvt_vocabulary_find(const struct kvt_vocabulary *v, const char *bytes, size_t size) {
    size_t at = hash_bytes(bytes, size) & (v->table_size - 1);
    for (; v->table[at] != NONE; at = (at + 1) & (v->table_size - 1)) {
        const struct kvt_token *token = &v->tokens[v->table[at]];
        if (token->size == size && memcmp(v->bytes + token->start, bytes, size) == 0)
            return v->table[at];
    }
    return NONE;
}

const struct kvt_merge *kvt_vocabulary_merge(const struct kvt_vocabulary *v, uint32_t left,
                                             uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right;
    if (v->merges_size == 0 || left == NONE || right == NONE)
        return NULL;
    size_t at = hash_pair(pair) & (v->merges_size - 1);
    for (; v->merges[at].pair != UINT64_MAX; at = (at + 1) & (v->merges_size - 1))
        if (v->merges[at].pair == pair)
            return &v->merges[at];
    return NULL;
}

static int take_tokens(struct kvt_vocabulary *v, const struct kvt_gguf *gguf, bool byte_level,
                       char *err, size_t err_size) {
    const char *name = kvt_gguf_name(gguf);
    const struct kvt_gguf_pair *names = kvt_gguf_find(gguf, "tokenizer.ggml.tokens");
    const struct kvt_gguf_pair *types = kvt_gguf_find(gguf, "tokenizer.ggml.token_type");
    const struct kvt_gguf_pair *scores = kvt_gguf_find(gguf, "tokenizer.ggml.scores");
    if (!names || names->type != KVT_GGUF_ARRAY || names->item_type != KVT_GGUF_STRING ||
        names->count == 0 || names->count > TOKENS_MAX || names->size_bytes > UINT32_MAX)
        return kvt_fail(-KVT_EINVAL, err, err_size,
                        "%s: has no usable vocabulary (tokenizer.ggml.tokens); use a file that "
                        "carries its tokenizer, or --ids",
                        name);
    v->count = (uint32_t)names->count;
    v->tokens = calloc(v->count, sizeof(*v->tokens));
    v->bytes = malloc(names->size_bytes);
    v->table_size = table_size_for(v->count);
    v->table = malloc(v->table_size * sizeof(*v->table));
    if (!v->tokens || !v->bytes || !v->table)
        return kvt_fail(-KVT_ENOMEM, err, err_size, "%s: out of memory for %" PRIu32 " tokens",
                        name, v->count);
    memset(v->table, 0xff, v->table_size * sizeof(*v->table));

    size_t cursor = 0;
    size_t end = 0;
    struct kvt_gguf_string text;
    for (uint32_t id = 0; id < v->count && kvt_gguf_next_string(names, &cursor, &text); id++) {
        struct kvt_token *token = &v->tokens[id];
        int64_t type = KVT_TOKEN_NORMAL;
        size_t size;
        if (types && kvt_gguf_item_i64(types, id, &type))
            return kvt_fail(-KVT_EINVAL, err, err_size,
                            "%s: tokenizer.ggml.token_type has no number for token %" PRIu32
                            "; convert the model again",
                            name, id);
        if (scores && kvt_gguf_item_f32(scores, id, &token->score))
            token->score = 0;
        token->type = type >= 1 && type <= 6 ? (uint8_t)type : KVT_TOKEN_NORMAL;
        token->start = (uint32_t)end;
        if (token->type == KVT_TOKEN_CONTROL || token->type == KVT_TOKEN_USER) {
            memcpy(v->bytes + end, text.data, text.size);
            size = text.size;
        } else if (!byte_level) {
            spell_sentencepiece(&text, token->type, v->bytes + end, &size);
        } else if (!spell_byte_level(&text, v->bytes + end, &size)) {
            memcpy(v->bytes + end, text.data, text.size);
            size = text.size;
            token->type = KVT_TOKEN_UNKNOWN; /* merging bytes cannot reach it */
        }
        token->size = (uint32_t)size;
        end += size;
        if (reachable(token) && size > 0 &&
            kvt_vocabulary_find(v, v->bytes + token->start, size) == NONE)
            table_add(v, id);
    }
    return 0;
}

/* One merge, "left right" in the byte alphabet, whose three tokens must exist. */
static bool take_merge(struct kvt_vocabulary *v, const struct kvt_gguf_string *text, char *scratch,
                       uint32_t rank) {
    const char *space = text->size > 1 ? memchr(text->data + 1, ' ', text->size - 1) : NULL;
    size_t left_size;
    size_t right_size;
    if (!space)
        return false;
    struct kvt_gguf_string left = {text->data, (size_t)(space - text->data)};
    struct kvt_gguf_string right = {space + 1, text->size - left.size - 1};
    if (!spell_byte_level(&left, scratch, &left_size) ||
        !spell_byte_level(&right, scratch + left_size, &right_size))
        return false;
    uint32_t left_id = kvt_vocabulary_find(v, scratch, left_size);
    uint32_t right_id = kvt_vocabulary_find(v, scratch + left_size, right_size);
    uint32_t id = kvt_vocabulary_find(v, scratch, left_size + right_size);
    if (left_id == NONE || right_id == NONE || id == NONE)
        return false;
    uint64_t pair = (uint64_t)left_id << 32 | right_id;
    size_t at = hash_pair(pair) & (v->merges_size - 1);
    while (v->merges[at].pair != UINT64_MAX) {
        if (v->merges[at].pair == pair)
            return true; /* the first one counts */
        at = (at + 1) & (v->merges_size - 1);
    }
    v->merges[at] = (struct kvt_merge){pair, rank, id};
    return true;
}

static int take_merges(struct kvt_vocabulary *v, const struct kvt_gguf *gguf, char *err,
                       size_t err_size) {
    const char *name = kvt_gguf_name(gguf);
    const struct kvt_gguf_pair *merges = kvt_gguf_find(gguf, "tokenizer.ggml.merges");
    if (!merges || merges->type != KVT_GGUF_ARRAY || merges->item_type != KVT_GGUF_STRING ||
        merges->count > TOKENS_MAX)
        return kvt_fail(-KVT_EINVAL, err, err_size,
                        "%s: has no usable merges (tokenizer.ggml.merges); convert the model again",
                        name);
    v->merges_size = table_size_for(merges->count);
    v->merges = malloc(v->merges_size * sizeof(*v->merges));
    char *scratch = malloc(merges->size_bytes + 1);
    int rc = 0;
    if (!v->merges || !scratch) {
        rc = kvt_fail(-KVT_ENOMEM, err, err_size, "%s: out of memory for the merges", name);
        goto out;
    }
    memset(v->merges, 0xff, v->merges_size * sizeof(*v->merges));
    size_t cursor = 0;
    struct kvt_gguf_string text;
    for (uint32_t rank = 0; kvt_gguf_next_string(merges, &cursor, &text); rank++) {
        if (!take_merge(v, &text, scratch, rank)) {
            rc = kvt_fail(-KVT_EINVAL, err, err_size,
                          "%s: merge %" PRIu32 " (\"%.*s\") names a token that is not in the "
                          "vocabulary; convert the model again",
                          name, rank, text.size < 60 ? (int)text.size : 60, text.data);
            break;
        }
    }
out:
    free(scratch);
    return rc;
}

int kvt_vocabulary_open(struct kvt_vocabulary *vocabulary, const struct kvt_gguf *gguf,
                        bool byte_level, char *err, size_t err_size) {
    *vocabulary = (struct kvt_vocabulary){0};
    int rc = take_tokens(vocabulary, gguf, byte_level, err, err_size);
    if (rc == 0 && byte_level)
        rc = take_merges(vocabulary, gguf, err, err_size);
    if (rc)
        kvt_vocabulary_close(vocabulary);
    return rc;
}

void kvt_vocabulary_close(struct kvt_vocabulary *vocabulary) {
    free(vocabulary->tokens);
    free(vocabulary->bytes);
    free(vocabulary->table);
    free(vocabulary->merges);
    *vocabulary = (struct kvt_vocabulary){0};
}
