/*
 * The forward pass of a Llama model over K and V that someone else holds.
 *
 * A step takes n new tokens of each row (n may differ, or be 0) through all
 * layers: their K and V are written where the pieces say, then attended to. For
 * equal chunks, rows and machine the logits have the same bits, whatever holds K
 * and V, however it is cut, and however many threads compute.
 *
 * Thread: one; it drives the pool.
 */
#ifndef KVT_WORKER_FORWARD_H
#define KVT_WORKER_FORWARD_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "client/worker/kv.h"
#include "client/worker/model.h"
#include "client/worker/pool.h"

struct kvt_forward;

struct kvt_step_tokens {
    uint32_t row_count;
    const uint32_t *counts; /* [row_count] new tokens of each row */
    const uint32_t *ids;    /* all rows' new tokens, row after row */
    bool wants_logits;
};

/* Ownership: borrows model and pool. `interrupted` is looked at between layers; NULL: never. */
__attribute__((warn_unused_result)) int kvt_forward_open(struct kvt_forward **out,
                                                         const struct kvt_model *model,
                                                         struct kvt_pool *pool,
                                                         enum kvt_kv_dtype dtype,
                                                         const volatile sig_atomic_t *interrupted);
void kvt_forward_close(struct kvt_forward *forward);

/*
 * Runs the current step of `kv`, whose begin had the same counts, and ends it; on
 * an error it is aborted and the sentence is in kv->why. -KVT_EABORTED: interrupted.
 * logits [row_count][vocabulary], of each row's last new token; borrowed until the
 * next step; rows without new tokens have none. NULL if they were not wanted.
 */
__attribute__((warn_unused_result)) int kvt_forward_step(struct kvt_forward *forward,
                                                         struct run_kv *kv,
                                                         const struct kvt_step_tokens *tokens,
                                                         const float **logits);

#endif
