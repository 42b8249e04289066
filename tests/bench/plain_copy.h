/* The peer of streamed bytes: a plain memcpy of pieces into slots by threads, each of which does its
 * part of each piece.
 */
#ifndef KVT_TESTS_BENCH_PLAIN_COPY_H
#define KVT_TESTS_BENCH_PLAIN_COPY_H

#include "tests/bench/stats.h"

#include <pthread.h>
#include <stdint.h>
#include <string.h>

#define KVT_BENCH_THREADS_MAX 16

struct kvt_plain_copy {
    const uint8_t *source; /* `distinct` pieces, taken in turn */
    uint8_t *target;       /* `slots` pieces, filled in turn */
    uint64_t piece_bytes;
    uint32_t pieces;
    uint32_t distinct;
    uint32_t slots;
    uint32_t threads;
};

struct kvt_plain_part {
    const struct kvt_plain_copy *copy;
    uint32_t thread;
};

static inline void *kvt_plain_part_main(void *argument) {
    const struct kvt_plain_part *part = argument;
    const struct kvt_plain_copy *c = part->copy;
    uint64_t bytes = c->piece_bytes / c->threads;
    for (uint32_t i = 0; i < c->pieces; i++) {
        memcpy(c->target + i % c->slots * c->piece_bytes + part->thread * bytes,
               c->source + i % c->distinct * c->piece_bytes + part->thread * bytes, bytes);
    }
    return NULL;
}

/* GB/s. */
static inline double kvt_plain_copy_run(const struct kvt_plain_copy *c) {
    pthread_t threads[KVT_BENCH_THREADS_MAX];
    struct kvt_plain_part parts[KVT_BENCH_THREADS_MAX];
    double begin = kvt_bench_now_s();
    for (uint32_t i = 0; i < c->threads; i++) {
        parts[i] = (struct kvt_plain_part){c, i};
        if (pthread_create(&threads[i], NULL, kvt_plain_part_main, &parts[i]) != 0) {
            abort();
        }
    }
    for (uint32_t i = 0; i < c->threads; i++) {
        pthread_join(threads[i], NULL);
    }
    return (double)c->pieces * (double)c->piece_bytes / (kvt_bench_now_s() - begin) / 1e9;
}

#endif
