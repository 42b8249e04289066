/* See bpe.h: symbols in a linked list, candidate pairs in a binary heap. */
#include "client/worker/bpe.h"

#include <stdbool.h>

static bool less(const struct kvt_pair *a, const struct kvt_pair *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->left < b->left;
}

static void heap_push(struct kvt_pair *heap, size_t *count, struct kvt_pair pair) {
    size_t at = (*count)++;
    while (at > 0 && less(&pair, &heap[(at - 1) / 2])) {
        heap[at] = heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap[at] = pair;
}

static struct kvt_pair heap_pop(struct kvt_pair *heap, size_t *count) {
    struct kvt_pair top = heap[0];
    struct kvt_pair last = heap[--(*count)];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= *count)
            break;
        if (child + 1 < *count && less(&heap[child + 1], &heap[child]))
            child++;
        if (!less(&heap[child], &last))
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = last;
    return top;
}

struct merging {
    const char *word;
    struct kvt_symbol *symbols;
    struct kvt_pair *heap;
    size_t heap_count;
    kvt_merge_fn merge;
    const void *arg;
};

static void offer(struct merging *m, int32_t left, int32_t right) {
    struct kvt_pair pair = {0, left, right, 0, 0};
    if (left < 0 || right < 0)
        return;
    pair.size = m->symbols[left].size + m->symbols[right].size;
    if (m->merge(m->arg, m->word, &m->symbols[left], &m->symbols[right], &pair.rank, &pair.id))
        heap_push(m->heap, &m->heap_count, pair);
}

void kvt_bpe_merge(const char *word, struct kvt_symbol *symbols, size_t count,
                   struct kvt_pair *heap, kvt_merge_fn merge, const void *arg) {
    struct merging m = {word, symbols, heap, 0, merge, arg};
    for (size_t i = 1; i < count; i++)
        offer(&m, (int32_t)i - 1, (int32_t)i);
    while (m.heap_count > 0) {
        struct kvt_pair pair = heap_pop(heap, &m.heap_count);
        struct kvt_symbol *left = &symbols[pair.left];
        struct kvt_symbol *right = &symbols[pair.right];
        /* stale: one of the two was merged with another since */
        if (left->size == 0 || right->size == 0 || left->size + right->size != pair.size)
            continue;
        left->id = pair.id;
        left->size = pair.size;
        right->size = 0;
        left->after = right->after;
        if (left->after >= 0)
            symbols[left->after].before = pair.left;
        offer(&m, left->before, pair.left);
        offer(&m, pair.left, left->after);
    }
}
