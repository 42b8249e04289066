#include "client/worker/synthetic/model.h"

#include "kernels/synth_content.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void (*kvt_synth_row_forget)(uint64_t gpu_ids);

#define WORDS 64 /* generated at a time */

uint64_t kvt_synth_random_next(struct kvt_synth_random *r) {
    uint64_t x = r->state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    r->state = x;
    return x * UINT64_C(0x2545f4914f6cdd1d);
}

uint32_t kvt_synth_random_below(struct kvt_synth_random *r, uint32_t limit) {
    return (uint32_t)(((kvt_synth_random_next(r) >> 32) * limit) >> 32);
}

bool kvt_synth_random_percent(struct kvt_synth_random *r, int64_t percent) {
    return kvt_synth_random_below(r, 100) < percent;
}

static void *must(void *p) {
    if (p == NULL) {
        (void)fprintf(stderr, "kvtier-synth: out of memory\n");
        abort();
    }
    return p;
}

void kvt_synth_cache_init(struct kvt_synth_cache *c, uint32_t id, uint32_t rows) {
    c->id = id;
    c->lost = false;
    c->row_count = rows;
    c->rows = must(calloc(rows, sizeof *c->rows));
}

void kvt_synth_cache_free(struct kvt_synth_cache *c) {
    for (uint32_t i = 0; i < c->row_count; i++) {
        free(c->rows[i].ids);
        if (kvt_synth_row_forget != NULL) {
            kvt_synth_row_forget(c->rows[i].gpu_ids);
        }
    }
    free(c->rows);
    memset(c, 0, sizeof *c);
}

static void row_reserve(struct kvt_synth_row *r, uint32_t count) {
    if (count > r->capacity) {
        r->capacity = count > 2 * r->capacity ? count : 2 * r->capacity;
        r->ids = must(realloc(r->ids, r->capacity * sizeof *r->ids));
    }
}

static void row_copy(struct kvt_synth_row *to, const struct kvt_synth_row *from) {
    row_reserve(to, from->count);
    if (from->count > 0) {
        memcpy(to->ids, from->ids, from->count * sizeof *to->ids);
    }
    to->count = from->count;
}

void kvt_synth_cache_copy(struct kvt_synth_cache *to, const struct kvt_synth_cache *from,
                          uint32_t id) {
    kvt_synth_cache_init(to, id, from->row_count);
    to->lost = from->lost;
    for (uint32_t i = 0; i < from->row_count; i++) {
        row_copy(&to->rows[i], &from->rows[i]);
    }
}

uint32_t kvt_synth_cache_longest(const struct kvt_synth_cache *c) {
    uint32_t longest = 0;
    for (uint32_t i = 0; i < c->row_count; i++) {
        longest = c->rows[i].count > longest ? c->rows[i].count : longest;
    }
    return longest;
}

void kvt_synth_cache_take_rows(struct kvt_synth_cache *c, const uint32_t *rows, uint32_t count) {
    struct kvt_synth_cache after;
    kvt_synth_cache_init(&after, c->id, count);
    after.lost = c->lost;
    for (uint32_t i = 0; i < count; i++) {
        row_copy(&after.rows[i], &c->rows[rows[i]]);
    }
    kvt_synth_cache_free(c);
    *c = after;
}

void kvt_synth_row_append(struct kvt_synth_row *r, uint32_t count,
                          struct kvt_synth_random *random) {
    row_reserve(r, r->count + count);
    for (uint32_t i = 0; i < count; i++) {
        r->ids[r->count++] = kvt_synth_random_next(random);
    }
}

void kvt_synth_row_crop(struct kvt_synth_row *r, uint32_t count) {
    r->count = count < r->count ? count : r->count;
    r->gpu_count = r->count < r->gpu_count ? r->count : r->gpu_count;
}

/* ---- bytes ------------------------------------------------------------------------------------ */

static uint64_t token_seed(const struct kvt_synth_row *r, uint32_t token, uint32_t layer,
                           enum kvt_synth_plane plane) {
    return kvt_synth_seed(r->ids[token], token, layer, plane);
}

/* Words [first, first + count) of a token. */
static void generate(uint64_t seed, uint32_t first, uint32_t count, uint64_t *out) {
    for (uint32_t i = 0; i < count; i++) {
        out[i] = kvt_synth_word(seed, first + i);
    }
}

void kvt_synth_bytes(const struct kvt_synth_row *r, uint32_t first, uint32_t count, uint32_t layer,
                     enum kvt_synth_plane plane, uint32_t token_bytes, uint8_t *out) {
    uint64_t words[WORDS];
    for (uint32_t t = 0; t < count; t++) {
        uint64_t seed = token_seed(r, first + t, layer, plane);
        for (uint32_t at = 0; at < token_bytes; at += sizeof words) {
            uint32_t bytes = token_bytes - at < sizeof words ? token_bytes - at : sizeof words;
            generate(seed, at / 8, (bytes + 7) / 8, words);
            memcpy(out + at, words, bytes);
        }
        out += token_bytes;
    }
}

/* The first byte that differs in one token; -1: none. */
static int64_t compare_token(uint64_t seed, uint32_t token_bytes, const uint8_t *found,
                             uint8_t *expected) {
    uint64_t words[WORDS];
    for (uint32_t at = 0; at < token_bytes; at += sizeof words) {
        uint32_t bytes = token_bytes - at < sizeof words ? token_bytes - at : sizeof words;
        generate(seed, at / 8, (bytes + 7) / 8, words);
        if (memcmp(found + at, words, bytes) == 0) {
            continue;
        }
        const uint8_t *right = (const uint8_t *)words;
        for (uint32_t i = 0; i < bytes; i++) {
            if (found[at + i] != right[i]) {
                *expected = right[i];
                return at + i;
            }
        }
    }
    return -1;
}

int64_t kvt_synth_compare(const struct kvt_synth_row *r, uint32_t first, uint32_t count,
                          uint32_t layer, enum kvt_synth_plane plane, uint32_t token_bytes,
                          const uint8_t *found, uint8_t *expected) {
    for (uint32_t t = 0; t < count; t++) {
        int64_t at = compare_token(token_seed(r, first + t, layer, plane), token_bytes,
                                   found + (uint64_t)t * token_bytes, expected);
        if (at >= 0) {
            return (int64_t)((uint64_t)t * token_bytes) + at;
        }
    }
    return -1;
}
