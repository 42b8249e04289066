/* Fuzzes the tokenizer: of a file that carries one, and of any text with it. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "client/worker/chat.h"
#include "client/worker/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char err[256];
    struct kvt_gguf *gguf;
    struct kvt_tokenizer *tokenizer;
    struct kvt_ids ids = {0};

    if (kvt_gguf_parse(&gguf, data, size, "fuzz", err, sizeof(err)))
        return 0;
    if (kvt_tokenizer_open(&tokenizer, gguf, err, sizeof(err)) == 0) {
        (void)!kvt_tokenizer_encode(tokenizer, (const char *)data, size, true, &ids);
        (void)!kvt_chat_encode(gguf, tokenizer, NULL, "a question", &ids, err, sizeof(err));
        for (size_t i = 0; i < ids.count; i++) {
            size_t length;
            (void)kvt_tokenizer_bytes(tokenizer, ids.ids[i], &length);
            if (ids.ids[i] >= kvt_tokenizer_count(tokenizer))
                abort();
        }
        kvt_tokenizer_close(tokenizer);
    }
    free(ids.ids);
    kvt_gguf_close(gguf);
    return 0;
}
