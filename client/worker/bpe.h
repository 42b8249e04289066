/*
 * Merging of byte pairs inside one word: the pair of least rank first, the
 * leftmost among equals, until none is left. n bytes take O(n log n).
 */
#ifndef KVT_WORKER_BPE_H
#define KVT_WORKER_BPE_H

#include <stddef.h>
#include <stdint.h>

/* A stretch of the word that is one token (or none, KVT_TOKEN_NONE) by now. */
struct kvt_symbol {
    uint32_t id;
    uint32_t start, size;  /* bytes */
    int32_t before, after; /* neighbours' indexes, -1 at the ends */
};

/* Rank and id of two neighbours merged; 0 if they do not merge. */
typedef int (*kvt_merge_fn)(const void *arg, const char *word, const struct kvt_symbol *left,
                            const struct kvt_symbol *right, double *rank, uint32_t *id);

/*
 * Merges in place. Symbols that were merged into their left neighbour get size 0.
 * `heap` has room for 3 * count entries of kvt_pair.
 */
struct kvt_pair {
    double rank;
    int32_t left, right;
    uint32_t id;
    uint32_t size; /* of both, to notice that one has changed */
};
void kvt_bpe_merge(const char *word, struct kvt_symbol *symbols, size_t count,
                   struct kvt_pair *heap, kvt_merge_fn merge, const void *arg);

#endif
