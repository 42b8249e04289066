/* See prompts.h. */
#include "client/worker/prompts.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/worker/chat.h"
#include "client/worker/fail.h"
#include "client/worker/sample.h"
#include "proto/errors.h"

#define FILE_BYTES_MAX ((size_t)256 << 20)

struct reading {
    const struct kvt_options *options;
    const struct kvt_gguf *gguf;
    const struct kvt_tokenizer *tokenizer;
    uint32_t vocabulary;
    char *err;
    size_t err_size;
};

static int encode(const struct reading *r, const char *text, size_t size, struct kvt_ids *ids) {
    const struct kvt_options *o = r->options;
    int rc = 0;
    if (o->chat)
        return kvt_chat_encode(r->gguf, r->tokenizer, o->system, text, ids, r->err, r->err_size);
    if (kvt_tokenizer_adds_bos(r->tokenizer))
        rc = kvt_ids_add(ids, kvt_tokenizer_bos(r->tokenizer));
    if (rc == 0)
        rc = kvt_tokenizer_encode(r->tokenizer, text, size, o->special, ids);
    return rc ? kvt_fail(rc, r->err, r->err_size, "the prompt: %s", kvt_error_text(rc)) : 0;
}

/* All bytes of a file, with a zero behind them. The caller frees. */
static int read_file(const struct reading *r, const char *path, char **out, size_t *size) {
    FILE *stream = fopen(path, "rb");
    char *bytes = NULL;
    size_t room = 0;
    *size = 0;
    if (!stream)
        goto failed;
    do {
        if (*size + 1 >= room) {
            room = room ? room * 2 : 65536;
            char *grown = room <= FILE_BYTES_MAX ? realloc(bytes, room) : NULL;
            if (!grown) {
                errno = EFBIG;
                goto failed;
            }
            bytes = grown;
        }
        *size += fread(bytes + *size, 1, room - *size - 1, stream);
    } while (!feof(stream) && !ferror(stream));
    if (ferror(stream))
        goto failed;
    fclose(stream);
    bytes[*size] = 0;
    *out = bytes;
    return 0;
failed:
    kvt_fail(-KVT_ESYS, r->err, r->err_size, "--prompt-file %s: cannot be read: %s", path,
             strerror(errno));
    if (stream)
        fclose(stream);
    free(bytes);
    return -KVT_ESYS;
}

static int take_file(const struct reading *r, const char *path, struct kvt_ids *ids) {
    char *text;
    size_t size;
    int rc = read_file(r, path, &text, &size);
    if (rc)
        return rc;
    rc = encode(r, text, size, ids);
    free(text);
    return rc;
}

/* Their form has been checked with the options. */
static int take_list(const struct reading *r, const char *list, struct kvt_ids *ids) {
    for (const char *at = list; *at;) {
        char *end;
        unsigned long long id = strtoull(at, &end, 10);
        if (id >= r->vocabulary)
            return kvt_fail(-KVT_EINVAL, r->err, r->err_size,
                            "--ids: %llu is no token of this model, whose ids are below %" PRIu32,
                            id, r->vocabulary);
        if (kvt_ids_add(ids, (uint32_t)id))
            return kvt_fail(-KVT_ENOMEM, r->err, r->err_size, "--ids: out of memory");
        at = *end ? end + 1 : end;
    }
    return 0;
}

static int take_random(const struct reading *r, struct kvt_ids *ids) {
    uint64_t state = r->options->seed;
    for (uint32_t i = 0; i < r->options->prompt_tokens; i++)
        if (kvt_ids_add(ids, (uint32_t)(kvt_random_next(&state) % r->vocabulary)))
            return kvt_fail(-KVT_ENOMEM, r->err, r->err_size, "--prompt-tokens: out of memory");
    return 0;
}

int kvt_prompts_read(const struct kvt_options *options, const struct kvt_gguf *gguf,
                     const struct kvt_tokenizer *tokenizer, uint32_t vocabulary,
                     struct kvt_ids *prompts, uint32_t *count, char *err, size_t err_size) {
    const struct reading r = {options, gguf, tokenizer, vocabulary, err, err_size};
    int rc = 0;
    *count = 0;
    for (uint32_t i = 0; rc == 0 && i < options->prompts.count; i++)
        rc = encode(&r, options->prompts.items[i], strlen(options->prompts.items[i]),
                    &prompts[(*count)++]);
    for (uint32_t i = 0; rc == 0 && i < options->prompt_files.count; i++)
        rc = take_file(&r, options->prompt_files.items[i], &prompts[(*count)++]);
    for (uint32_t i = 0; rc == 0 && i < options->ids.count; i++)
        rc = take_list(&r, options->ids.items[i], &prompts[(*count)++]);
    if (rc == 0 && *count == 0)
        rc = take_random(&r, &prompts[(*count)++]);
    for (uint32_t i = 0; rc == 0 && i < *count; i++) {
        if (prompts[i].count == 0)
            rc = kvt_fail(-KVT_EINVAL, err, err_size,
                          "prompt %" PRIu32 " has no tokens; give some text", i + 1);
        if (options->prompt_tokens > 0 && prompts[i].count > options->prompt_tokens)
            prompts[i].count = options->prompt_tokens;
    }
    return rc;
}

void kvt_prompts_free(struct kvt_ids *prompts, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        free(prompts[i].ids);
}
