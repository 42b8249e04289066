/*
 * Text to token ids and back, from the tokenizer that a GGUF file carries:
 * byte-level byte pairs ("gpt2" kind: merges in an order) or SentencePiece
 * byte pairs ("llama" kind: pieces with scores).
 *
 * Thread: a tokenizer is constant once open; any thread may use it.
 */
#ifndef KVT_WORKER_TOKENIZER_H
#define KVT_WORKER_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "client/worker/gguf.h"

#define KVT_TOKEN_NONE UINT32_MAX

struct kvt_tokenizer;

/* A growing list of ids; zero it before use, free() ids after. */
struct kvt_ids {
    uint32_t *ids;
    size_t count;
    size_t room;
};

/* Ownership: the tokenizer borrows nothing; the file may be closed. */
__attribute__((warn_unused_result)) int kvt_tokenizer_open(struct kvt_tokenizer **out,
                                                           const struct kvt_gguf *gguf, char *err,
                                                           size_t err_size);
void kvt_tokenizer_close(struct kvt_tokenizer *tokenizer);

/*
 * Appends the ids of `text`. With `special`, names of control tokens in the text
 * ("<|im_end|>") become those tokens; without, they are text like any other, which
 * is what text from outside must be. A byte that the vocabulary lacks (some have
 * only the bytes that UTF-8 uses) is dropped, as the models' own tokenizers do.
 * Errors: -KVT_ENOMEM; then what was appended stays.
 */
__attribute__((warn_unused_result)) int kvt_tokenizer_encode(const struct kvt_tokenizer *tokenizer,
                                                             const char *text, size_t size,
                                                             bool special, struct kvt_ids *ids);

/* The bytes of one token, borrowed; a control token has none. Not terminated. */
const char *kvt_tokenizer_bytes(const struct kvt_tokenizer *tokenizer, uint32_t id, size_t *size);

/* The id of a control token by its name, or KVT_TOKEN_NONE. */
uint32_t kvt_tokenizer_control(const struct kvt_tokenizer *tokenizer, const char *name);

uint32_t kvt_tokenizer_count(const struct kvt_tokenizer *tokenizer);
/* Ids from the file, or KVT_TOKEN_NONE. */
uint32_t kvt_tokenizer_bos(const struct kvt_tokenizer *tokenizer);
/* Whether the model expects `bos` before everything. */
bool kvt_tokenizer_adds_bos(const struct kvt_tokenizer *tokenizer);
/* Whether generation ends at this token: end of text, of turn, of message. */
bool kvt_tokenizer_ends(const struct kvt_tokenizer *tokenizer, uint32_t id);

__attribute__((warn_unused_result)) int kvt_ids_add(struct kvt_ids *ids, uint32_t id);

#endif
