/* The prompts of a command line as token ids. */
#ifndef KVT_WORKER_PROMPTS_H
#define KVT_WORKER_PROMPTS_H

#include <stddef.h>
#include <stdint.h>

#include "client/worker/gguf.h"
#include "client/worker/options.h"
#include "client/worker/tokenizer.h"

/*
 * Texts, then files, then lists of ids, each cut after --prompt-tokens.
 * gguf and tokenizer are NULL for a random model.
 * Ownership: the caller frees with kvt_prompts_free, also after an error.
 */
__attribute__((warn_unused_result)) int kvt_prompts_read(const struct kvt_options *options,
                                                         const struct kvt_gguf *gguf,
                                                         const struct kvt_tokenizer *tokenizer,
                                                         uint32_t vocabulary,
                                                         struct kvt_ids *prompts, uint32_t *count,
                                                         char *err, size_t err_size);
void kvt_prompts_free(struct kvt_ids *prompts, uint32_t count);

#endif
