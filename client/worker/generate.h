/*
 * From prompts to continuations: prefill in chunks, then decode, for several rows.
 *
 * Prompts are prefilled side by side, a chunk of each in every step; then each row
 * is repeated, so that continuations of one prompt share it. A row that has ended
 * appends nothing more.
 */
#ifndef KVT_WORKER_GENERATE_H
#define KVT_WORKER_GENERATE_H

#include <stdbool.h>
#include <stdint.h>

#include "client/worker/forward.h"
#include "client/worker/kv.h"
#include "client/worker/sample.h"
#include "client/worker/tokenizer.h"

/* What the caller sees while it goes on; any may be NULL. */
struct kvt_generate_watch {
    void *arg;
    /* not 0: stop with that error */
    int (*token)(void *arg, uint32_t row, uint32_t id);
    /* tokens of all rows so far; of is what there will be at most */
    void (*progress)(void *arg, bool decode, uint64_t tokens, uint64_t of, double seconds);
    /* of the last token of one row in one step; not 0: stop with that error */
    int (*logits)(void *arg, const float *logits, uint32_t count);
};

struct kvt_generate {
    struct kvt_forward *forward;
    struct run_kv *kv;
    struct kvt_sampler *sampler;
    const struct kvt_tokenizer *tokenizer; /* NULL: no token ends a text */
    uint32_t vocabulary;
    const struct kvt_ids *prompts;
    uint32_t prompt_count;
    uint32_t repeat; /* rows of each prompt */
    uint32_t chunk;
    uint32_t tokens_max; /* to generate, of each row */
    uint32_t steps_ahead;
    uint64_t seed;
    bool marks_last; /* the last step is a schedule of its own, and told to kv */
    struct kvt_generate_watch watch;

    /* results */
    struct kvt_ids *rows; /* [prompt_count * repeat], owned: kvt_generate_free */
    uint64_t prompt_tokens, decode_tokens;
    double prompt_seconds, decode_seconds;
};

/*
 * On an error the rows hold what was generated before, and the text says why;
 * -KVT_EABORTED: interrupted.
 */
__attribute__((warn_unused_result)) int kvt_generate(struct kvt_generate *generate, char *err,
                                                     size_t err_size);
void kvt_generate_free(struct kvt_generate *generate);

#endif
