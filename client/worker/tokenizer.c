/*
 * See tokenizer.h. Text is cut at named tokens, the stretches between them into
 * words, and each word's bytes are merged.
 */
#include "client/worker/tokenizer.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "client/worker/bpe.h"
#include "client/worker/fail.h"
#include "client/worker/pretokenize.h"
#include "client/worker/vocabulary.h"
#include "proto/errors.h"

#define ENDS_MAX 8

struct kvt_tokenizer {
    struct kvt_vocabulary vocabulary;
    bool byte_level; /* else SentencePiece */
    enum kvt_pretokenizer pre;
    bool whole_words_first; /* llama-bpe: a word that is a token is not merged */
    bool space_prefix;
    bool adds_bos;
    uint32_t bos;
    uint32_t ends[ENDS_MAX];
    uint32_t end_count;
    uint32_t byte_ids[256]; /* KVT_TOKEN_NONE where the vocabulary lacks one */
    uint32_t *named;        /* control and user tokens, longest first */
    uint32_t named_count;
};

/* Room for one word's symbols and pairs, grown as needed. */
struct scratch {
    struct kvt_symbol *symbols;
    struct kvt_pair *pairs;
    size_t room;
};

int kvt_ids_add(struct kvt_ids *ids, uint32_t id) {
    if (ids->count == ids->room) {
        size_t room = ids->room ? ids->room * 2 : 256;
        uint32_t *grown = realloc(ids->ids, room * sizeof(*grown));
        if (!grown)
            return -KVT_ENOMEM;
        ids->ids = grown;
        ids->room = room;
    }
    ids->ids[ids->count++] = id;
    return 0;
}

static int scratch_grow(struct scratch *s, size_t count) {
    if (count <= s->room)
        return 0;
    struct kvt_symbol *symbols = realloc(s->symbols, count * sizeof(*symbols));
    if (symbols)
        s->symbols = symbols;
    struct kvt_pair *pairs = realloc(s->pairs, 3 * count * sizeof(*pairs));
    if (pairs)
        s->pairs = pairs;
    if (!symbols || !pairs)
        return -KVT_ENOMEM;
    s->room = count;
    return 0;
}

static int merge_by_rank(const void *arg, const char *word, const struct kvt_symbol *left,
                         const struct kvt_symbol *right, double *rank, uint32_t *id) {
    const struct kvt_tokenizer *t = arg;
    const struct kvt_merge *merge = kvt_vocabulary_merge(&t->vocabulary, left->id, right->id);
    (void)word;
    if (!merge)
        return 0;
    *rank = merge->rank;
    *id = merge->id;
    return 1;
}

static int merge_by_score(const void *arg, const char *word, const struct kvt_symbol *left,
                          const struct kvt_symbol *right, double *rank, uint32_t *id) {
    const struct kvt_tokenizer *t = arg;
    *id = kvt_vocabulary_find(&t->vocabulary, word + left->start, left->size + right->size);
    if (*id == KVT_TOKEN_NONE)
        return 0;
    *rank = -(double)t->vocabulary.tokens[*id].score;
    return 1;
}

/* Ids of a stretch that is no single token: its bytes', where there are any. */
static int add_bytes(const struct kvt_tokenizer *t, const char *bytes, size_t size,
                     struct kvt_ids *ids) {
    int rc = 0;
    for (size_t i = 0; i < size && rc == 0; i++) {
        uint32_t id = t->byte_ids[(unsigned char)bytes[i]];
        if (id != KVT_TOKEN_NONE)
            rc = kvt_ids_add(ids, id);
    }
    return rc;
}

static int encode_word(const struct kvt_tokenizer *t, const char *word, size_t size,
                       struct scratch *s, struct kvt_ids *ids) {
    if (t->whole_words_first) {
        uint32_t id = kvt_vocabulary_find(&t->vocabulary, word, size);
        if (id != KVT_TOKEN_NONE)
            return kvt_ids_add(ids, id);
    }
    int rc = scratch_grow(s, size);
    if (rc)
        return rc;
    size_t count = 0;
    for (size_t i = 0; i < size; count++) {
        size_t length = t->byte_level ? 1 : kvt_utf8_length(word + i, size - i);
        uint32_t id = t->byte_level ? t->byte_ids[(unsigned char)word[i]]
                                    : kvt_vocabulary_find(&t->vocabulary, word + i, length);
        s->symbols[count] = (struct kvt_symbol){id, (uint32_t)i, (uint32_t)length,
                                                (int32_t)count - 1, (int32_t)count + 1};
        i += length;
    }
    s->symbols[count - 1].after = -1;
    kvt_bpe_merge(word, s->symbols, count, s->pairs, t->byte_level ? merge_by_rank : merge_by_score,
                  t);
    for (int32_t i = 0; i >= 0 && rc == 0; i = s->symbols[i].after) {
        const struct kvt_symbol *symbol = &s->symbols[i];
        rc = symbol->id == KVT_TOKEN_NONE ? add_bytes(t, word + symbol->start, symbol->size, ids)
                                          : kvt_ids_add(ids, symbol->id);
    }
    return rc;
}

static int encode_stretch(const struct kvt_tokenizer *t, const char *text, size_t size,
                          struct scratch *s, struct kvt_ids *ids) {
    int rc = 0;
    if (size == 0)
        return 0;
    if (!t->byte_level) {
        char *spaced = malloc(size + 1);
        if (!spaced)
            return -KVT_ENOMEM;
        spaced[0] = ' ';
        memcpy(spaced + 1, text, size);
        rc = encode_word(t, spaced + !t->space_prefix, size + t->space_prefix, s, ids);
        free(spaced);
        return rc;
    }
    struct kvt_words words = {t->pre, text, size, 0, 0};
    size_t start = 0;
    size_t length;
    while (rc == 0 && (length = kvt_words_next(&words, &start)) > 0)
        rc = encode_word(t, text + start, length, s, ids);
    return rc;
}

/* The longest named token at text[0], or KVT_TOKEN_NONE. */
static uint32_t named_at(const struct kvt_tokenizer *t, const char *text, size_t size,
                         bool special) {
    const struct kvt_vocabulary *v = &t->vocabulary;
    for (uint32_t i = 0; i < t->named_count; i++) {
        const struct kvt_token *token = &v->tokens[t->named[i]];
        if (token->size <= size && (special || token->type == KVT_TOKEN_USER) &&
            v->bytes[token->start] == text[0] &&
            memcmp(v->bytes + token->start, text, token->size) == 0)
            return t->named[i];
    }
    return KVT_TOKEN_NONE;
}

int kvt_tokenizer_encode(const struct kvt_tokenizer *t, const char *text, size_t size, bool special,
                         struct kvt_ids *ids) {
    bool first_of_named[256] = {0};
    struct scratch s = {0};
    size_t start = 0;
    int rc = 0;

    if (size > INT32_MAX - 1)
        return -KVT_ETOOBIG;
    for (uint32_t i = 0; i < t->named_count; i++)
        first_of_named[(unsigned char)
                           t->vocabulary.bytes[t->vocabulary.tokens[t->named[i]].start]] = true;
    for (size_t i = 0; i < size && rc == 0;) {
        uint32_t id = first_of_named[(unsigned char)text[i]]
                          ? named_at(t, text + i, size - i, special)
                          : KVT_TOKEN_NONE;
        if (id == KVT_TOKEN_NONE) {
            i++;
            continue;
        }
        rc = encode_stretch(t, text + start, i - start, &s, ids);
        if (rc == 0)
            rc = kvt_ids_add(ids, id);
        i += t->vocabulary.tokens[id].size;
        start = i;
    }
    if (rc == 0)
        rc = encode_stretch(t, text + start, size - start, &s, ids);
    free(s.symbols);
    free(s.pairs);
    return rc;
}

/* ------------------------------------------------------------------ opening */

static int longer_first(const void *a, const void *b, void *arg) {
    const struct kvt_vocabulary *v = arg;
    uint32_t left = v->tokens[*(const uint32_t *)a].size;
    uint32_t right = v->tokens[*(const uint32_t *)b].size;
    return left > right ? -1 : left < right;
}

static int collect_named(struct kvt_tokenizer *t) {
    struct kvt_vocabulary *v = &t->vocabulary;
    t->named = malloc(v->count * sizeof(*t->named));
    if (!t->named)
        return -KVT_ENOMEM;
    for (uint32_t id = 0; id < v->count; id++) {
        const struct kvt_token *token = &v->tokens[id];
        if (token->size > 0 && (token->type == KVT_TOKEN_CONTROL || token->type == KVT_TOKEN_USER))
            t->named[t->named_count++] = id;
    }
    qsort_r(t->named, t->named_count, sizeof(*t->named), longer_first, v);
    return 0;
}

static void collect_bytes(struct kvt_tokenizer *t) {
    struct kvt_vocabulary *v = &t->vocabulary;
    for (int byte = 0; byte < 256; byte++) {
        char c = (char)byte;
        t->byte_ids[byte] = t->byte_level ? kvt_vocabulary_find(v, &c, 1) : KVT_TOKEN_NONE;
    }
    for (uint32_t id = 0; id < v->count; id++)
        if (v->tokens[id].type == KVT_TOKEN_BYTE && v->tokens[id].size == 1)
            t->byte_ids[(unsigned char)v->bytes[v->tokens[id].start]] = id;
}

static void add_end(struct kvt_tokenizer *t, uint32_t id) {
    if (id < t->vocabulary.count && t->end_count < ENDS_MAX)
        t->ends[t->end_count++] = id;
}

static void collect_ends(struct kvt_tokenizer *t, const struct kvt_gguf *gguf) {
    static const char *const names[] = {"<|im_end|>", "<|eot_id|>", "<|endoftext|>",
                                        "<|end_of_text|>", "<|eom_id|>"};
    uint32_t id;
    if (kvt_gguf_u32(gguf, "tokenizer.ggml.eos_token_id", &id) == 0)
        add_end(t, id);
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        add_end(t, kvt_tokenizer_control(t, names[i]));
}

/* Which kind of tokenizer, and how it cuts words. */
static int choose_kind(struct kvt_tokenizer *t, const struct kvt_gguf *gguf, char *err,
                       size_t err_size) {
    const char *name = kvt_gguf_name(gguf);
    struct kvt_gguf_string model;
    struct kvt_gguf_string pre = {"default", 7};
    if (kvt_gguf_text(gguf, "tokenizer.ggml.model", &model))
        return kvt_fail(-KVT_ENOTSUP, err, err_size,
                        "%s: carries no tokenizer (tokenizer.ggml.model); use a file that does, "
                        "or --ids",
                        name);
    if (model.size == 5 && memcmp(model.data, "llama", 5) == 0) {
        t->space_prefix = true;
        t->adds_bos = true;
        return 0;
    }
    if (model.size != 4 || memcmp(model.data, "gpt2", 4) != 0)
        return kvt_fail(-KVT_ENOTSUP, err, err_size,
                        "%s: its tokenizer is of kind \"%.*s\"; supported are \"gpt2\" and "
                        "\"llama\"; use another model, or --ids",
                        name, model.size < 40 ? (int)model.size : 40, model.data);
    t->byte_level = true;
    (void)!kvt_gguf_text(gguf, "tokenizer.ggml.pre", &pre);
    if (!kvt_pretokenizer_of(pre.data, pre.size, &t->pre))
        return kvt_fail(-KVT_ENOTSUP, err, err_size,
                        "%s: cuts words by the rules of \"%.*s\"; supported are gpt-2, smollm and "
                        "llama-bpe; use another model, or --ids",
                        name, pre.size < 40 ? (int)pre.size : 40, pre.data);
    t->whole_words_first = t->pre == KVT_PRE_LLAMA3;
    t->adds_bos = t->pre == KVT_PRE_LLAMA3;
    return 0;
}

int kvt_tokenizer_open(struct kvt_tokenizer **out, const struct kvt_gguf *gguf, char *err,
                       size_t err_size) {
    struct kvt_tokenizer *t = calloc(1, sizeof(*t));
    if (!t)
        return kvt_fail(-KVT_ENOMEM, err, err_size, "out of memory for the tokenizer");
    int rc = choose_kind(t, gguf, err, err_size);
    if (rc == 0)
        rc = kvt_vocabulary_open(&t->vocabulary, gguf, t->byte_level, err, err_size);
    if (rc)
        goto undo;
    rc = collect_named(t);
    if (rc) {
        (void)kvt_fail(rc, err, err_size, "out of memory for the tokenizer");
        goto undo;
    }
    collect_bytes(t);
    collect_ends(t, gguf);
    t->bos = KVT_TOKEN_NONE;
    (void)!kvt_gguf_u32(gguf, "tokenizer.ggml.bos_token_id", &t->bos);
    (void)!kvt_gguf_bool(gguf, "tokenizer.ggml.add_bos_token", &t->adds_bos);
    (void)!kvt_gguf_bool(gguf, "tokenizer.ggml.add_space_prefix", &t->space_prefix);
    if (t->bos >= t->vocabulary.count)
        t->bos = KVT_TOKEN_NONE;
    t->adds_bos = t->adds_bos && t->bos != KVT_TOKEN_NONE;
    *out = t;
    return 0;
undo:
    kvt_tokenizer_close(t);
    return rc;
}

void kvt_tokenizer_close(struct kvt_tokenizer *t) {
    if (!t)
        return;
    kvt_vocabulary_close(&t->vocabulary);
    free(t->named);
    free(t);
}

/* ------------------------------------------------------------------ asking */

const char *kvt_tokenizer_bytes(const struct kvt_tokenizer *t, uint32_t id, size_t *size) {
    *size = 0;
    if (id >= t->vocabulary.count || t->vocabulary.tokens[id].type == KVT_TOKEN_CONTROL)
        return "";
    *size = t->vocabulary.tokens[id].size;
    return t->vocabulary.bytes + t->vocabulary.tokens[id].start;
}

uint32_t kvt_tokenizer_control(const struct kvt_tokenizer *t, const char *name) {
    for (uint32_t i = 0; i < t->named_count; i++) {
        const struct kvt_token *token = &t->vocabulary.tokens[t->named[i]];
        if (token->type == KVT_TOKEN_CONTROL && token->size == strlen(name) &&
            memcmp(t->vocabulary.bytes + token->start, name, token->size) == 0)
            return t->named[i];
    }
    return KVT_TOKEN_NONE;
}

uint32_t kvt_tokenizer_count(const struct kvt_tokenizer *t) {
    return t->vocabulary.count;
}

uint32_t kvt_tokenizer_bos(const struct kvt_tokenizer *t) {
    return t->bos;
}

bool kvt_tokenizer_adds_bos(const struct kvt_tokenizer *t) {
    return t->adds_bos;
}

bool kvt_tokenizer_ends(const struct kvt_tokenizer *t, uint32_t id) {
    for (uint32_t i = 0; i < t->end_count; i++)
        if (t->ends[i] == id)
            return true;
    return false;
}
