/*
 * Chat templates: the two forms that Llama-family models use, recognised from
 * the Jinja text in the file by their marks.
 *   ChatML   <|im_start|>role\n ... <|im_end|>\n     (SmolLM2 and others)
 *   Llama 3  <|start_header_id|>role<|end_header_id|>\n\n ... <|eot_id|>
 */
#ifndef KVT_WORKER_CHAT_H
#define KVT_WORKER_CHAT_H

#include "client/worker/gguf.h"
#include "client/worker/tokenizer.h"

/*
 * Appends a conversation's ids up to where the assistant's turn begins. `system`
 * may be NULL: then the template's own default, if it has one. The texts are
 * never read for control tokens.
 * Errors: -KVT_ENOTSUP no template, or one of another form; -KVT_ENOMEM.
 */
__attribute__((warn_unused_result)) int kvt_chat_encode(const struct kvt_gguf *gguf,
                                                        const struct kvt_tokenizer *tokenizer,
                                                        const char *system, const char *user,
                                                        struct kvt_ids *ids, char *err,
                                                        size_t err_size);

#endif
