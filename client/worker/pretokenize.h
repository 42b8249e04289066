/*
 * Cuts text into the words inside which byte-pair merges happen.
 *
 * The patterns are those of the models' own tokenizers, written out by hand:
 *   gpt-2      's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 *   smollm     every \p{N} alone; between them as gpt-2
 *   llama-bpe  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
 *              ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
 * Bytes that are not UTF-8 count as one symbol each, so nothing is lost.
 */
#ifndef KVT_WORKER_PRETOKENIZE_H
#define KVT_WORKER_PRETOKENIZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum kvt_pretokenizer { KVT_PRE_GPT2, KVT_PRE_SMOLLM, KVT_PRE_LLAMA3 };

/* By its name in the file (tokenizer.ggml.pre); false for one that is not known. */
bool kvt_pretokenizer_of(const char *name, size_t size, enum kvt_pretokenizer *out);

struct kvt_words {
    enum kvt_pretokenizer kind;
    const char *text;
    size_t size;
    size_t at;
    size_t stretch_end; /* smollm: where the next number begins */
};

/* The next word's length in bytes, its start in *start; 0 at the end of the text. */
size_t kvt_words_next(struct kvt_words *words, size_t *start);

/* Length in bytes of the UTF-8 character at text[0]; 1 where there is none. size > 0. */
size_t kvt_utf8_length(const char *text, size_t size);

#endif
