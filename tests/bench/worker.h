/* What the benchmarks that attach as a worker share: a step walked without computing anything. */
#ifndef KVT_TESTS_BENCH_WORKER_H
#define KVT_TESTS_BENCH_WORKER_H

#include "client/kvtier.h"

#include <stdio.h>
#include <stdlib.h>

/* Ends the benchmark if a call has failed. */
static inline void kvt_bench_must(struct kvt_client *c, int rc) {
    if (rc < 0) {
        fprintf(stderr, "bench: %s: %s\n", kvt_error_name(rc), kvt_error_message(c));
        exit(1);
    }
}

/* The steps that are left of a schedule: each piece is waited for and given back. */
static inline void kvt_bench_walk(struct kvt_client *c, struct kvt_step *step) {
    const struct kvt_piece *piece;
    for (uint32_t left = kvt_step_left(step); left > 0; left--) {
        int rc;
        while ((rc = kvt_step_piece(step, &piece)) == 1) {
            kvt_bench_must(c, kvt_piece_wait(step, piece));
            kvt_bench_must(c, kvt_piece_done(step, piece));
        }
        kvt_bench_must(c, rc);
        kvt_bench_must(c, kvt_step_end(step));
    }
}

#endif
