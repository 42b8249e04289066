/* See pretokenize.h. Each alternative of a pattern is a few lines that return a length or 0. */
#include "client/worker/pretokenize.h"

#include <string.h>

struct code_range {
    uint32_t first, last;
};
#include "client/worker/unicode_tables.h"

enum class { CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE, CLASS_OTHER, CLASS_END };

/* A character: its class, its bytes, and itself if it is ASCII (else 0). */
struct character {
    enum class class;
    size_t size;
    char ascii;
};

static bool in_ranges(const struct code_range *ranges, size_t count, uint32_t code) {
    size_t low = 0;
    while (low < count) {
        size_t middle = low + (count - low) / 2;
        if (code > ranges[middle].last)
            low = middle + 1;
        else
            count = middle;
    }
    return code >= ranges[low].first && code <= ranges[low].last;
}

static bool is_space(uint32_t code) {
    return (code >= 9 && code <= 13) || code == 0x20 || code == 0x85 || code == 0xa0 ||
           code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 ||
           code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000;
}

static enum class class_of(uint32_t code) {
    if (is_space(code)) return CLASS_SPACE;
    if (code < 128){if ((code | 32) >= 'a' && (code | 32) <= 'z') return CLASS_LETTER;
                    return code >= '0' && code <= '9' ? CLASS_NUMBER : CLASS_OTHER;}
if (in_ranges(letters, sizeof(letters) / sizeof(letters[0]) - 1, code)) return CLASS_LETTER;
if (in_ranges(numbers, sizeof(numbers) / sizeof(numbers[0]) - 1, code))
    return CLASS_NUMBER;
return CLASS_OTHER;
}

size_t kvt_utf8_length(const char *text, size_t size) {
    unsigned char lead = (unsigned char)text[0];
    size_t length = lead < 0x80 ? 1 : lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if ((lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || length > size)
        return 1;
    for (size_t i = 1; i < length; i++)
        if (((unsigned char)text[i] & 0xc0) != 0x80)
            return 1;
    return length;
}

static struct character at(const struct kvt_words *w, size_t end, size_t index) {
    if (index >= end)
        return (struct character){CLASS_END, 0, 0};
    const unsigned char *p = (const unsigned char *)w->text + index;
    size_t size = kvt_utf8_length(w->text + index, end - index);
    if (size == 1) {
        if (p[0] >= 0x80)
            return (struct character){CLASS_OTHER, 1, 0};
        return (struct character){class_of(p[0]), 1, (char)p[0]};
    }
    uint32_t code = p[0] & (0x7fu >> size);
    for (size_t i = 1; i < size; i++)
        code = code << 6 | (p[i] & 0x3fu);
    return (struct character){class_of(code), size, 0};
}

/* Bytes of the run of `class` from `index` on, at most `characters_max` characters. */
static size_t run(const struct kvt_words *w, size_t end, size_t index, enum class class,
                  size_t characters_max) {
    size_t start = index;
    for (size_t n = 0; n < characters_max; n++) {
        struct character c = at(w, end, index);
        if (c.class != class)
            break;
        index += c.size;
    }
    return index - start;
}

static size_t contraction(const struct kvt_words *w, size_t end, bool fold) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    const char *p = w->text + w->at;
    size_t left = end - w->at;
    if (left < 2 || p[0] != '\'')
        return 0;
    for (size_t i = 0; i < sizeof(endings) / sizeof(endings[0]); i++) {
        size_t length = strlen(endings[i]);
        size_t k = 0;
        while (k < length && k + 1 < left && (fold ? p[k + 1] | 32 : p[k + 1]) == endings[i][k])
            k++;
        if (k == length)
            return length + 1;
    }
    return 0;
}

/* \s+(?!\S)|\s+ : the last space of a run is left to the word behind it */
static size_t spaces(const struct kvt_words *w, size_t end) {
    size_t length = 0;
    size_t last = 0;
    struct character c;
    while ((c = at(w, end, w->at + length)).class == CLASS_SPACE) {
        last = c.size;
        length += c.size;
    }
    return c.class == CLASS_END || length == last ? length : length - last;
}

static size_t gpt2_next(const struct kvt_words *w, size_t end) {
    size_t length = contraction(w, end, false);
    if (length)
        return length;
    size_t space = w->text[w->at] == ' ';
    struct character c = at(w, end, w->at + space);
    if (c.class != CLASS_SPACE && c.class != CLASS_END)
        return space + run(w, end, w->at + space, c.class, SIZE_MAX);
    return spaces(w, end);
}

/* \s*[\r\n]+ : up to the last line end of a run of spaces */
static size_t line_ends(const struct kvt_words *w, size_t end) {
    size_t length = 0;
    size_t matched = 0;
    struct character c;
    while ((c = at(w, end, w->at + length)).class == CLASS_SPACE) {
        length += c.size;
        if (c.ascii == '\r' || c.ascii == '\n')
            matched = length;
    }
    return matched;
}

static size_t llama3_next(const struct kvt_words *w, size_t end) {
    size_t length = contraction(w, end, true);
    if (length)
        return length;
    struct character first = at(w, end, w->at);
    bool line_end = first.ascii == '\r' || first.ascii == '\n';
    if (first.class == CLASS_LETTER)
        return run(w, end, w->at, CLASS_LETTER, SIZE_MAX);
    if (first.class != CLASS_NUMBER && !line_end) {
        length = run(w, end, w->at + first.size, CLASS_LETTER, SIZE_MAX);
        if (length)
            return first.size + length;
    }
    if (first.class == CLASS_NUMBER)
        return run(w, end, w->at, CLASS_NUMBER, 3);
    size_t space = first.ascii == ' ';
    length = run(w, end, w->at + space, CLASS_OTHER, SIZE_MAX);
    if (length) {
        length += space;
        while (w->at + length < end &&
               (w->text[w->at + length] == '\r' || w->text[w->at + length] == '\n'))
            length++;
        return length;
    }
    length = line_ends(w, end);
    return length ? length : spaces(w, end);
}

static size_t smollm_next(struct kvt_words *w) {
    struct character c = at(w, w->size, w->at);
    if (c.class == CLASS_NUMBER)
        return c.size;
    if (w->stretch_end <= w->at) {
        w->stretch_end = w->at;
        while ((c = at(w, w->size, w->stretch_end)).class != CLASS_NUMBER && c.class != CLASS_END)
            w->stretch_end += c.size;
    }
    return gpt2_next(w, w->stretch_end);
}

size_t kvt_words_next(struct kvt_words *words, size_t *start) {
    size_t length;
    if (words->at >= words->size)
        return 0;
    *start = words->at;
    switch (words->kind) {
    case KVT_PRE_SMOLLM:
        length = smollm_next(words);
        break;
    case KVT_PRE_LLAMA3:
        length = llama3_next(words, words->size);
        break;
    default:
        length = gpt2_next(words, words->size);
        break;
    }
    words->at += length;
    return length;
}

bool kvt_pretokenizer_of(const char *name, size_t size, enum kvt_pretokenizer *out) {
    static const struct {
        const char *name;
        enum kvt_pretokenizer kind;
    } known[] = {
        {"gpt-2", KVT_PRE_GPT2},       {"default", KVT_PRE_GPT2},    {"smollm", KVT_PRE_SMOLLM},
        {"llama-bpe", KVT_PRE_LLAMA3}, {"llama-v3", KVT_PRE_LLAMA3}, {"llama3", KVT_PRE_LLAMA3},
    };
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (size == strlen(known[i].name) && memcmp(name, known[i].name, size) == 0) {
            *out = known[i].kind;
            return true;
        }
    }
    return false;
}
