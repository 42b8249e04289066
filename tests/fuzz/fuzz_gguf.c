/* Fuzzes the GGUF parser, and every accessor on what it took for sound. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "client/worker/gguf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void touch_pair(const struct kvt_gguf *gguf, const struct kvt_gguf_pair *pair) {
    struct kvt_gguf_string text;
    int64_t whole;
    float real;
    size_t cursor = 0;
    unsigned sum = 0;

    while (kvt_gguf_next_string(pair, &cursor, &text))
        for (size_t i = 0; i < text.size; i++)
            sum += (unsigned char)text.data[i];
    if (pair->count > 0) {
        (void)!kvt_gguf_item_i64(pair, pair->count - 1, &whole);
        (void)!kvt_gguf_item_f32(pair, pair->count - 1, &real);
    }
    /* by key, as the worker asks */
    char key[64];
    if (pair->key.size < sizeof(key)) {
        uint32_t number;
        _Bool truth;
        for (size_t i = 0; i < pair->key.size; i++)
            key[i] = pair->key.data[i];
        key[pair->key.size] = 0;
        (void)!kvt_gguf_u32(gguf, key, &number);
        (void)!kvt_gguf_f32(gguf, key, &real);
        (void)!kvt_gguf_bool(gguf, key, &truth);
        (void)!kvt_gguf_text(gguf, key, &text);
    }
    *(volatile unsigned *)&sum = sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char err[256];
    struct kvt_gguf *gguf;

    if (kvt_gguf_parse(&gguf, data, size, "fuzz", err, sizeof(err)))
        return 0;
    for (uint64_t i = 0; kvt_gguf_pair_at(gguf, i); i++)
        touch_pair(gguf, kvt_gguf_pair_at(gguf, i));
    unsigned sum = 0;
    for (uint64_t i = 0; kvt_gguf_tensor_at(gguf, i); i++) {
        const struct kvt_gguf_tensor *tensor = kvt_gguf_tensor_at(gguf, i);
        for (size_t k = 0; k < tensor->size_bytes; k += 4096)
            sum += tensor->data[k];
        sum += tensor->data[tensor->size_bytes - 1];
    }
    *(volatile unsigned *)&sum = sum;
    kvt_gguf_close(gguf);
    return 0;
}
