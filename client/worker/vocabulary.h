/* The words of a tokenizer: bytes by id, id by bytes, and the merges between ids. */
#ifndef KVT_WORKER_VOCABULARY_H
#define KVT_WORKER_VOCABULARY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "client/worker/gguf.h"

/* As numbered in tokenizer.ggml.token_type. */
enum kvt_token_type {
    KVT_TOKEN_NORMAL = 1,
    KVT_TOKEN_UNKNOWN = 2,
    KVT_TOKEN_CONTROL = 3,
    KVT_TOKEN_USER = 4, /* found in any text before merging */
    KVT_TOKEN_UNUSED = 5,
    KVT_TOKEN_BYTE = 6, /* "<0x0A>" in SentencePiece vocabularies */
};

struct kvt_token {
    uint32_t start, size; /* in `bytes`: what it stands for; of a control token, its name */
    uint8_t type;
    float score;
};

struct kvt_merge {
    uint64_t pair; /* left << 32 | right; UINT64_MAX: free */
    uint32_t rank, id;
};

struct kvt_vocabulary {
    struct kvt_token *tokens;
    uint32_t count;
    char *bytes;
    uint32_t *table; /* open addressing by the bytes of tokens that merges may reach */
    size_t table_size;
    struct kvt_merge *merges; /* open addressing by the pair */
    size_t merges_size;
};

/* `byte_level`: names spell bytes in GPT-2's alphabet; else SentencePiece, U+2581 for a space. */
__attribute__((warn_unused_result)) int kvt_vocabulary_open(struct kvt_vocabulary *vocabulary,
                                                            const struct kvt_gguf *gguf,
                                                            bool byte_level, char *err,
                                                            size_t err_size);
void kvt_vocabulary_close(struct kvt_vocabulary *vocabulary);

/* UINT32_MAX if no token has these bytes. */
uint32_t kvt_vocabulary_find(const struct kvt_vocabulary *vocabulary, const char *bytes,
                             size_t size);
/* NULL if the two do not merge. */
const struct kvt_merge *kvt_vocabulary_merge(const struct kvt_vocabulary *vocabulary, uint32_t left,
                                             uint32_t right);

#endif
