/* See sample.h. Ties are broken by the smaller id, so that the order is total. */
#include "client/worker/sample.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "proto/errors.h"

uint64_t kvt_random_next(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int kvt_sampler_open(struct kvt_sampler *s, double temperature, uint32_t top_k, double top_p,
                     uint32_t count) {
    *s = (struct kvt_sampler){temperature, top_k, top_p, count, NULL};
    s->order = malloc(count * sizeof(*s->order));
    return s->order ? 0 : -KVT_ENOMEM;
}

void kvt_sampler_close(struct kvt_sampler *s) {
    free(s->order);
    s->order = NULL;
}

static bool before(const float *logits, uint32_t a, uint32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
}

static uint32_t likeliest(const float *logits, uint32_t count) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < count; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

static int compare(const void *a, const void *b, void *logits) {
    uint32_t left = *(const uint32_t *)a;
    uint32_t right = *(const uint32_t *)b;
    return left == right ? 0 : before(logits, left, right) ? -1 : 1;
}

/* Sinks the entry at `at` in a heap whose top is the least likely. */
static void sink(const float *logits, uint32_t *heap, uint32_t count, uint32_t at) {
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= count)
            return;
        if (child + 1 < count && before(logits, heap[child], heap[child + 1]))
            child++;
        if (!before(logits, heap[at], heap[child]))
            return;
        uint32_t swap = heap[at];
        heap[at] = heap[child];
        heap[child] = swap;
        at = child;
    }
}

/* The `keep` likeliest into order, unordered. */
static void select_likeliest(const float *logits, uint32_t count, uint32_t *order, uint32_t keep) {
    for (uint32_t i = 0; i < keep; i++)
        order[i] = i;
    if (keep == count)
        return;
    for (uint32_t i = keep / 2 + 1; i-- > 0;)
        sink(logits, order, keep, i);
    for (uint32_t i = keep; i < count; i++) {
        if (before(logits, i, order[0])) {
            order[0] = i;
            sink(logits, order, keep, 0);
        }
    }
}

uint32_t kvt_sampler_choose(struct kvt_sampler *s, const float *logits, uint64_t *state) {
    if (s->temperature <= 0)
        return likeliest(logits, s->count);
    uint32_t keep = s->top_k > 0 && s->top_k < s->count ? s->top_k : s->count;
    select_likeliest(logits, s->count, s->order, keep);
    qsort_r(s->order, keep, sizeof(*s->order), compare, (void *)(uintptr_t)logits);

    double top = logits[s->order[0]];
    double total = 0;
    for (uint32_t i = 0; i < keep; i++)
        total += exp((logits[s->order[i]] - top) / s->temperature);
    /* top_p: the shortest head of the list that has that share, at least one token */
    double share = 0;
    uint32_t kept = 0;
    while (kept < keep && (kept == 0 || share < s->top_p * total))
        share += exp((logits[s->order[kept++]] - top) / s->temperature);

    double point = (double)(kvt_random_next(state) >> 11) * 0x1p-53 * share;
    for (uint32_t i = 0; i + 1 < kept; i++) {
        point -= exp((logits[s->order[i]] - top) / s->temperature);
        if (point < 0)
            return s->order[i];
    }
    return s->order[kept - 1];
}
