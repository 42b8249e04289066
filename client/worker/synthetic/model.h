/* What a cache must hold, as the worker remembers it: for each row the list of its tokens' content
 * numbers, random and never used twice. The bytes of a token's K and V in a layer follow from the
 * content number, the layer, the plane and the token's position. So a byte of another token, row,
 * layer, cache, worker or moment is a wrong byte.
 */
#ifndef KVT_SYNTH_MODEL_H
#define KVT_SYNTH_MODEL_H

#include <stdbool.h>
#include <stdint.h>

enum kvt_synth_plane { KVT_SYNTH_K = 0, KVT_SYNTH_V = 1 };

struct kvt_synth_row {
    uint64_t *ids;
    uint32_t count;
    uint32_t capacity;
    /* gpu.c: the same on the GPU; 0: not there. The first gpu_count are right. */
    uint64_t gpu_ids;
    uint32_t gpu_count;
    uint32_t gpu_capacity;
};

struct kvt_synth_cache {
    uint32_t id; /* the daemon's */
    uint32_t row_count;
    struct kvt_synth_row *rows;
    bool lost; /* the daemon has said that ended steps were not written back */
};

/* Random numbers: xorshift64*, seeded. */
struct kvt_synth_random {
    uint64_t state;
};
uint64_t kvt_synth_random_next(struct kvt_synth_random *r);
/* 0 .. limit - 1; limit is above 0. */
uint32_t kvt_synth_random_below(struct kvt_synth_random *r, uint32_t limit);
/* True in `percent` of 100 cases. */
bool kvt_synth_random_percent(struct kvt_synth_random *r, int64_t percent);

/* Frees gpu_ids; NULL: there is no GPU. Nothing enqueued reads them any more. */
extern void (*kvt_synth_row_forget)(uint64_t gpu_ids);

/* Memory that runs out ends the program: it is a test. */
void kvt_synth_cache_init(struct kvt_synth_cache *c, uint32_t id, uint32_t rows);
void kvt_synth_cache_free(struct kvt_synth_cache *c);
void kvt_synth_cache_copy(struct kvt_synth_cache *to, const struct kvt_synth_cache *from,
                          uint32_t id);
uint32_t kvt_synth_cache_longest(const struct kvt_synth_cache *c);
/* New row i is a copy of the former row rows[i]; `count` rows afterwards. */
void kvt_synth_cache_take_rows(struct kvt_synth_cache *c, const uint32_t *rows, uint32_t count);

/* Appends `count` fresh tokens. */
void kvt_synth_row_append(struct kvt_synth_row *r, uint32_t count, struct kvt_synth_random *random);
void kvt_synth_row_crop(struct kvt_synth_row *r, uint32_t count);

/* The bytes of tokens [first, first + count) of a row in one plane of one layer. */
void kvt_synth_bytes(const struct kvt_synth_row *r, uint32_t first, uint32_t count, uint32_t layer,
                     enum kvt_synth_plane plane, uint32_t token_bytes, uint8_t *out);
/* Compares: -1 all right, or the offset of the first wrong byte. `expected` gets its value. */
int64_t kvt_synth_compare(const struct kvt_synth_row *r, uint32_t first, uint32_t count,
                          uint32_t layer, enum kvt_synth_plane plane, uint32_t token_bytes,
                          const uint8_t *found, uint8_t *expected);

#endif
