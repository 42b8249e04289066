/* What tells two models apart: 32 bytes that a cache carries, so that none reads another's. */
#ifndef KVT_WORKER_FINGERPRINT_H
#define KVT_WORKER_FINGERPRINT_H

#include <stddef.h>
#include <stdint.h>

#include "client/worker/gguf.h"

#define KVT_FINGERPRINT_BYTES 32

/*
 * Of a file: all metadata and tokenizer, all tensors' descriptions, and a sample of
 * each tensor's bytes (reading gigabytes at every start would cost more than it is
 * worth; models that differ, differ in their samples). `extra` is what else decides
 * about K and V: layers used, their dtype.
 */
void kvt_fingerprint_file(const struct kvt_gguf *gguf, const char *extra,
                          uint8_t out[KVT_FINGERPRINT_BYTES]);

/* Of a text that says everything: shape and seed of a random model. */
void kvt_fingerprint_text(const char *text, uint8_t out[KVT_FINGERPRINT_BYTES]);

#endif
