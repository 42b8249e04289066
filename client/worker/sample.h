/* Choosing the next token from logits. */
#ifndef KVT_WORKER_SAMPLE_H
#define KVT_WORKER_SAMPLE_H

#include <stddef.h>
#include <stdint.h>

struct kvt_sampler {
    double temperature; /* 0: the likeliest, the first among equals */
    uint32_t top_k;     /* 0: all */
    double top_p;
    uint32_t count;  /* of logits */
    uint32_t *order; /* owns, [count] */
};

__attribute__((warn_unused_result)) int kvt_sampler_open(struct kvt_sampler *sampler,
                                                         double temperature, uint32_t top_k,
                                                         double top_p, uint32_t count);
void kvt_sampler_close(struct kvt_sampler *sampler);

/* `state` is a row's own generator; equal states and logits give equal tokens. */
uint32_t kvt_sampler_choose(struct kvt_sampler *sampler, const float *logits, uint64_t *state);

/* splitmix64: the next number of a generator. */
uint64_t kvt_random_next(uint64_t *state);

#endif
