/* See fingerprint.h. Two XXH3 hashes of 128 bits with different seeds. */
#include "client/worker/fingerprint.h"

#include <string.h>
#include <xxhash.h>

#define SAMPLE_BYTES ((size_t)4096)

static void finish(XXH3_state_t *const states[2], uint8_t out[KVT_FINGERPRINT_BYTES]) {
    for (size_t i = 0; i < 2; i++) {
        XXH128_canonical_t bytes;
        XXH128_canonicalFromHash(&bytes, XXH3_128bits_digest(states[i]));
        memcpy(out + i * sizeof(bytes), &bytes, sizeof(bytes));
    }
}

static void update(XXH3_state_t *const states[2], const void *bytes, size_t size) {
    for (size_t i = 0; i < 2; i++)
        (void)XXH3_128bits_update(states[i], bytes, size);
}

/* The first, middle and last bytes of a tensor. */
static void sample(XXH3_state_t *const states[2], const struct kvt_gguf_tensor *tensor) {
    size_t size = tensor->size_bytes;
    size_t part = size < SAMPLE_BYTES ? size : SAMPLE_BYTES;
    update(states, tensor->data, part);
    update(states, tensor->data + (size - part) / 2, part);
    update(states, tensor->data + size - part, part);
}

static void hash(const struct kvt_gguf *gguf, const char *text,
                 uint8_t out[KVT_FINGERPRINT_BYTES]) {
    XXH3_state_t *states[2] = {XXH3_createState(), XXH3_createState()};
    memset(out, 0, KVT_FINGERPRINT_BYTES);
    if (states[0] && states[1]) {
        for (size_t i = 0; i < 2; i++)
            (void)XXH3_128bits_reset_withSeed(states[i], i + 1);
        update(states, text, strlen(text) + 1);
        if (gguf) {
            struct kvt_gguf_string head = kvt_gguf_head(gguf);
            update(states, head.data, head.size);
            for (uint64_t i = 0; kvt_gguf_tensor_at(gguf, i); i++)
                sample(states, kvt_gguf_tensor_at(gguf, i));
        }
        finish(states, out);
    }
    XXH3_freeState(states[0]);
    XXH3_freeState(states[1]);
}

void kvt_fingerprint_file(const struct kvt_gguf *gguf, const char *extra,
                          uint8_t out[KVT_FINGERPRINT_BYTES]) {
    hash(gguf, extra, out);
}

void kvt_fingerprint_text(const char *text, uint8_t out[KVT_FINGERPRINT_BYTES]) {
    hash(NULL, text, out);
}
