/*
 * tokenizer_tool MODEL [special]: texts on stdin, each behind its length as four
 * little-endian bytes; for each a line of ids on stdout, with " !" at its end if
 * they do not give the text back. Exit 3 with the reason on
 * stderr if the model has no usable tokenizer.
 * tests/python/test_tokenizer.py drives it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/worker/tokenizer.h"

static bool same(const struct kvt_tokenizer *tokenizer, const struct kvt_ids *ids, const char *text,
                 size_t size) {
    size_t at = 0;
    for (size_t i = 0; i < ids->count; i++) {
        size_t length;
        const char *bytes = kvt_tokenizer_bytes(tokenizer, ids->ids[i], &length);
        if (length > size - at || memcmp(bytes, text + at, length) != 0)
            return false;
        at += length;
    }
    return at == size;
}

int main(int argc, char **argv) {
    char err[512] = "";
    struct kvt_gguf *gguf;
    struct kvt_tokenizer *tokenizer;
    unsigned char head[4];

    if (argc < 2)
        return 2;
    if (kvt_gguf_open(&gguf, argv[1], err, sizeof(err)) ||
        kvt_tokenizer_open(&tokenizer, gguf, err, sizeof(err))) {
        fprintf(stderr, "%s\n", err);
        return 3;
    }
    kvt_gguf_close(gguf);
    while (fread(head, 4, 1, stdin) == 1) {
        size_t size = head[0] | (size_t)head[1] << 8 | (size_t)head[2] << 16;
        char *text = malloc(size ? size : 1);
        struct kvt_ids ids = {0};
        if (!text || fread(text, 1, size, stdin) != size ||
            kvt_tokenizer_encode(tokenizer, text, size, argc > 2, &ids))
            return 1;
        for (size_t i = 0; i < ids.count; i++)
            printf(i ? " %u" : "%u", ids.ids[i]);
        puts(same(tokenizer, &ids, text, size) ? "" : " !");
        free(ids.ids);
        free(text);
    }
    kvt_tokenizer_close(tokenizer);
    return 0;
}
