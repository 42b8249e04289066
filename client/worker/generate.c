/* See generate.h. */
#include "client/worker/generate.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/worker/fail.h"
#include "proto/errors.h"

/* What one generation needs beside its parameters. */
struct run {
    struct kvt_generate *g;
    uint32_t row_count;
    uint32_t *counts; /* new tokens of the step, by row */
    uint32_t *ids;    /* the step's tokens, row after row */
    uint32_t *next;   /* the token that each row appends next */
    uint64_t *random; /* each row's generator */
    bool *ended;
    struct timespec start;
};

static double seconds_since(const struct timespec *start) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)(now.tv_sec - start->tv_sec) + (double)(now.tv_nsec - start->tv_nsec) * 1e-9;
}

static void progress(const struct run *r, bool decode, uint64_t tokens, uint64_t of) {
    const struct kvt_generate_watch *w = &r->g->watch;
    if (w->progress)
        w->progress(w->arg, decode, tokens, of, seconds_since(&r->start));
}

/* Chooses a row's next token, and ends the row if that ends its text. */
static int choose(struct run *r, uint32_t row, const float *logits) {
    struct kvt_generate *g = r->g;
    uint32_t id = kvt_sampler_choose(g->sampler, logits, &r->random[row]);
    if (g->tokenizer && kvt_tokenizer_ends(g->tokenizer, id)) {
        r->ended[row] = true;
        return 0;
    }
    r->next[row] = id;
    int rc = kvt_ids_add(&g->rows[row], id);
    if (rc == 0 && g->watch.token)
        rc = g->watch.token(g->watch.arg, row, id);
    if (g->rows[row].count == g->tokens_max)
        r->ended[row] = true;
    return rc;
}

static int hand_out_logits(const struct run *r, uint32_t row_count, const float *logits) {
    const struct kvt_generate *g = r->g;
    int rc = 0;
    for (uint32_t row = 0; g->watch.logits && row < row_count && rc == 0; row++)
        if (r->counts[row] > 0)
            rc = g->watch.logits(g->watch.arg, logits + (size_t)row * g->vocabulary, g->vocabulary);
    return rc;
}

/* ------------------------------------------------------------------ prefill */

/* The next chunk of every prompt; returns how many tokens that is. */
static uint32_t take_chunk(struct run *r, const uint32_t *done, bool *ends_one) {
    const struct kvt_generate *g = r->g;
    uint32_t total = 0;
    *ends_one = false;
    for (uint32_t p = 0; p < g->prompt_count; p++) {
        uint32_t left = (uint32_t)g->prompts[p].count - done[p];
        r->counts[p] = left < g->chunk ? left : g->chunk;
        memcpy(r->ids + total, g->prompts[p].ids + done[p], r->counts[p] * sizeof(*r->ids));
        total += r->counts[p];
        *ends_one = *ends_one || (left > 0 && left <= g->chunk);
    }
    return total;
}

static int prefill(struct run *r, uint32_t *done) {
    struct kvt_generate *g = r->g;
    uint64_t all = 0;
    bool ends_one;
    uint32_t total;
    for (uint32_t p = 0; p < g->prompt_count; p++)
        all += g->prompts[p].count;
    progress(r, false, 0, all);
    while ((total = take_chunk(r, done, &ends_one)) > 0) {
        struct kvt_step_tokens tokens = {g->prompt_count, r->counts, r->ids,
                                         ends_one || g->watch.logits};
        const float *logits = NULL;
        int rc = g->kv->ops->begin(g->kv, r->counts, g->prompt_count, 1);
        rc = rc < 0 ? rc : kvt_forward_step(g->forward, g->kv, &tokens, &logits);
        if (rc == 0 && logits)
            rc = hand_out_logits(r, g->prompt_count, logits);
        for (uint32_t p = 0; rc == 0 && p < g->prompt_count; p++) {
            done[p] += r->counts[p];
            /* every continuation of a prompt that is complete chooses for itself */
            for (uint32_t i = 0; r->counts[p] > 0 && done[p] == g->prompts[p].count &&
                                 g->tokens_max > 0 && i < g->repeat && rc == 0;
                 i++)
                rc = choose(r, p * g->repeat + i, logits + (size_t)p * g->vocabulary);
        }
        if (rc)
            return rc;
        g->prompt_tokens += total;
        g->prompt_seconds = seconds_since(&r->start);
        progress(r, false, g->prompt_tokens, all);
    }
    return 0;
}

/* ------------------------------------------------------------------ decode */

/* One step: a token of each row that has not ended. 1: a row has ended with it. */
static int decode_step(struct run *r) {
    struct kvt_generate *g = r->g;
    uint32_t total = 0;
    const float *logits = NULL;
    bool one_ended = false;
    for (uint32_t row = 0; row < r->row_count; row++)
        if (r->counts[row] > 0)
            r->ids[total++] = r->next[row];
    struct kvt_step_tokens tokens = {r->row_count, r->counts, r->ids, true};
    int rc = kvt_forward_step(g->forward, g->kv, &tokens, &logits);
    if (rc == 0)
        rc = hand_out_logits(r, r->row_count, logits);
    for (uint32_t row = 0; row < r->row_count && rc == 0; row++) {
        if (r->counts[row] == 0)
            continue;
        rc = choose(r, row, logits + (size_t)row * g->vocabulary);
        one_ended = one_ended || r->ended[row];
    }
    g->decode_tokens += total;
    g->decode_seconds = seconds_since(&r->start);
    return rc ? rc : one_ended;
}

/* Steps for which all rows that go on need a token each; the last step of all may stand alone. */
static uint32_t steps_wanted(const struct run *r) {
    const struct kvt_generate *g = r->g;
    uint32_t steps = g->steps_ahead;
    uint32_t longest = 0;
    for (uint32_t row = 0; row < r->row_count; row++) {
        uint32_t left = g->tokens_max - (uint32_t)g->rows[row].count;
        if (r->counts[row] == 0)
            continue;
        steps = left < steps ? left : steps;
        longest = left > longest ? left : longest;
    }
    if (g->marks_last && longest == 1)
        g->kv->ops->mark(g->kv);
    else if (g->marks_last && steps == longest)
        steps--;
    return steps;
}

static int decode(struct run *r) {
    struct kvt_generate *g = r->g;
    uint64_t all = (uint64_t)r->row_count * (g->tokens_max > 0 ? g->tokens_max - 1 : 0);
    for (;;) {
        uint32_t going = 0;
        for (uint32_t row = 0; row < r->row_count; row++) {
            r->counts[row] = !r->ended[row];
            going += r->counts[row];
        }
        if (going == 0)
            return 0;
        int steps = g->kv->ops->begin(g->kv, r->counts, r->row_count, steps_wanted(r));
        int rc = steps < 0 ? steps : 0;
        for (int i = 0; rc == 0 && i < steps; i++) {
            rc = decode_step(r);
            progress(r, true, g->decode_tokens, all);
            /* a row has ended before the others: the steps behind would be other ones */
            if (rc == 1 && i + 1 < steps)
                g->kv->ops->abort(g->kv);
        }
        if (rc < 0)
            return rc;
    }
}

/* ------------------------------------------------------------------ all of it */

static int allocate(struct run *r) {
    struct kvt_generate *g = r->g;
    size_t ids = (size_t)g->prompt_count * g->chunk;
    r->row_count = g->prompt_count * g->repeat;
    r->counts = calloc(r->row_count, sizeof(*r->counts));
    r->ids = calloc(ids > r->row_count ? ids : r->row_count, sizeof(*r->ids));
    r->next = calloc(r->row_count, sizeof(*r->next));
    r->random = calloc(r->row_count, sizeof(*r->random));
    r->ended = calloc(r->row_count, sizeof(*r->ended));
    g->rows = calloc(r->row_count, sizeof(*g->rows));
    if (!r->counts || !r->ids || !r->next || !r->random || !r->ended || !g->rows)
        return -KVT_ENOMEM;
    uint64_t seed = g->seed;
    for (uint32_t row = 0; row < r->row_count; row++)
        r->random[row] = kvt_random_next(&seed);
    return 0;
}

int kvt_generate(struct kvt_generate *g, char *err, size_t err_size) {
    struct run r = {.g = g};
    uint32_t *done = calloc(g->prompt_count, sizeof(*done));
    g->kv->why[0] = 0;
    int rc = allocate(&r);
    if (rc || !done) {
        rc = kvt_fail(-KVT_ENOMEM, err, err_size, "out of memory");
        goto out;
    }
    clock_gettime(CLOCK_MONOTONIC, &r.start);
    rc = prefill(&r, done);
    if (rc == 0 && g->repeat > 1)
        rc = g->kv->ops->repeat(g->kv, g->repeat);
    clock_gettime(CLOCK_MONOTONIC, &r.start);
    if (rc == 0 && g->tokens_max > 0)
        rc = decode(&r);
    if (rc)
        kvt_fail(rc, err, err_size, "%s", g->kv->why[0] ? g->kv->why : kvt_error_text(rc));
out:
    free(done);
    free(r.counts);
    free(r.ids);
    free(r.next);
    free(r.random);
    free(r.ended);
    return rc;
}

void kvt_generate_free(struct kvt_generate *g) {
    for (uint32_t row = 0; g->rows && row < g->prompt_count * g->repeat; row++)
        free(g->rows[row].ids);
    free(g->rows);
    g->rows = NULL;
}
