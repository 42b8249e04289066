/*
 * kvtier-run: the reference worker. It loads a model, asks kvtierd for the memory
 * of K and V (or keeps them itself, --local), and generates text.
 */
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/kvtier.h"
#include "client/worker/fail.h"
#include "client/worker/fingerprint.h"
#include "client/worker/forward.h"
#include "client/worker/generate.h"
#include "client/worker/gguf.h"
#include "client/worker/kv.h"
#include "client/worker/model.h"
#include "client/worker/options.h"
#include "client/worker/pool.h"
#include "client/worker/prompts.h"
#include "client/worker/report.h"
#include "client/worker/sample.h"
#include "client/worker/tokenizer.h"
#include "proto/errors.h"

#define STATUS_FAILED      1
#define STATUS_USAGE       2
#define STATUS_INTERRUPTED 130

/* After so many deaths of the daemon something else is wrong. */
#define STARTS_OVER_MAX 10u

/* So long may the step take that is under way; then nobody waits for the daemon any more. */
#define INTERRUPT_S 1u

/*
 * Signals. Before anything is generated, and behind the report, one ends the process
 * at once. In between the first one ends the step in an orderly way, after INTERRUPT_S
 * also the wait for a daemon that does not answer, and the second one ends the process.
 */
static volatile sig_atomic_t interrupted;
static volatile sig_atomic_t may_leave = 1;
static struct run_kv *volatile running; /* not NULL while may_leave is 0 */
static pthread_t main_thread;

static void leave_now(void) {
    static const char text[] = "\nkvtier-run: interrupted\n";
    ssize_t n = write(STDERR_FILENO, text, sizeof(text) - 1);
    (void)n;
    _exit(STATUS_INTERRUPTED);
}

static void on_signal(int signal_number) {
    if (!pthread_equal(pthread_self(), main_thread)) {
        /* what follows must not run while the main thread closes things */
        (void)pthread_kill(main_thread, signal_number);
    } else if (may_leave || (interrupted && signal_number != SIGALRM)) {
        leave_now();
    } else if (signal_number == SIGALRM) {
        running->ops->interrupt(running);
    } else {
        interrupted = 1;
        (void)alarm(INTERRUPT_S);
    }
}

static void watch_signals(void) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    main_thread = pthread_self();
    sigemptyset(&action.sa_mask);
    sigaddset(&action.sa_mask, SIGINT);
    sigaddset(&action.sa_mask, SIGTERM);
    sigaddset(&action.sa_mask, SIGALRM);
    (void)sigaction(SIGINT, &action, NULL);
    (void)sigaction(SIGTERM, &action, NULL);
    (void)sigaction(SIGALRM, &action, NULL);
}

static void begin_orderly(struct run_kv *kv) {
    running = kv;
    may_leave = 0;
}

/* Everything that lives as long as the program; ended in reverse order. */
struct program {
    struct kvt_options options;
    struct kvt_gguf *gguf;
    struct kvt_tokenizer *tokenizer;
    struct kvt_model *model;
    struct kvt_ids prompts[KVT_PROMPTS_MAX];
    uint32_t prompt_count;
    struct kvt_pool *pool;
    struct kvt_forward *forward;
    struct run_kv *kv;
    struct kvt_sampler sampler;
    struct kvt_report report;
    struct kvt_generate generate;
    char err[1024];
};

static enum kvt_kv_dtype dtype_of(const char *name) {
    return strcmp(name, "f32") == 0    ? KVT_KV_F32
           : strcmp(name, "bf16") == 0 ? KVT_KV_BF16
                                       : KVT_KV_F16;
}

static int load(struct program *p) {
    const struct kvt_options *o = &p->options;
    int rc;
    if (o->random) {
        rc = kvt_model_random(&p->model, o->random, o->layers, o->seed, p->err, sizeof(p->err));
        if (rc == 0 && p->model->shares_layers)
            fprintf(stderr,
                    "kvtier-run: %s: its %" PRIu32 " layers share one set of weights, to fit this "
                    "machine's memory\n",
                    o->random, p->model->shape.layers);
        return rc;
    }
    rc = kvt_gguf_open(&p->gguf, o->model, p->err, sizeof(p->err));
    if (rc == 0)
        rc = kvt_model_load(&p->model, p->gguf, o->layers, p->err, sizeof(p->err));
    /* with ids alone a model without a tokenizer that we know is fine */
    if (rc == 0 && kvt_tokenizer_open(&p->tokenizer, p->gguf, p->err, sizeof(p->err)) &&
        o->prompts.count + o->prompt_files.count > 0)
        rc = -KVT_ENOTSUP;
    if (rc == 0 && p->tokenizer && kvt_tokenizer_count(p->tokenizer) > p->model->shape.vocabulary)
        rc = kvt_fail(-KVT_EINVAL, p->err, sizeof(p->err),
                      "%s: has %" PRIu32 " tokens but embeddings for %" PRIu32
                      " only; convert the model again",
                      o->model, kvt_tokenizer_count(p->tokenizer), p->model->shape.vocabulary);
    return rc;
}

static int mode_of(const char *name) {
    return strcmp(name, "static") == 0             ? KVT_STATIC
           : strcmp(name, "offloaded") == 0        ? KVT_OFFLOADED
           : strcmp(name, "offloaded-static") == 0 ? KVT_OFFLOADED_STATIC
                                                   : KVT_DYNAMIC;
}

static int open_kvtier(struct program *p, const struct run_kv_shape *shape) {
    const struct kvt_options *o = &p->options;
    uint8_t fingerprint[KVT_FINGERPRINT_BYTES];
    char text[256];
    snprintf(text, sizeof(text), "%s, seed %" PRIu64 ", %" PRIu32 " layers, %s",
             o->random ? o->random : "", o->random ? o->seed : 0, p->model->shape.layers,
             o->kv_dtype);
    if (p->gguf)
        kvt_fingerprint_file(p->gguf, text, fingerprint);
    else
        kvt_fingerprint_text(text, fingerprint);
    /* the file's name, cut to what the protocol takes */
    const char *slash = o->random ? NULL : strrchr(o->model, '/');
    snprintf(text, 64, "%s", o->random ? o->random : slash ? slash + 1 : o->model);
    const struct run_kv_kvtier_options kvtier = {
        .runtime_dir = o->runtime_dir,
        .device = o->has_device ? o->device : NULL,
        .mode = mode_of(o->mode),
        .piece_tokens = o->piece_tokens,
        .resident_layers = o->resident_layers,
        .fingerprint = fingerprint,
        .name = text,
        .worker = o->name ? o->name : "kvtier-run",
    };
    return run_kv_kvtier_open(&p->kv, shape, &kvtier, p->err, sizeof(p->err));
}

/* The cache that the prompts and what shall be generated need. */
static int open_kv(struct program *p) {
    const struct kvt_options *o = &p->options;
    const struct kvt_model_shape *s = &p->model->shape;
    uint32_t context = o->context ? o->context : s->context;
    uint64_t longest = 0;
    for (uint32_t i = 0; i < p->prompt_count; i++)
        longest = p->prompts[i].count > longest ? p->prompts[i].count : longest;
    uint64_t wanted = longest + (o->generate > 0 ? o->generate - 1 : 0);
    if (wanted > context)
        return kvt_fail(-KVT_EINVAL, p->err, sizeof(p->err),
                        "a prompt of %" PRIu64 " tokens and %" PRIu32 " to generate do not fit in "
                        "a context of %" PRIu32 "; shorten them (--prompt-tokens, -n) or raise "
                        "--context",
                        longest, o->generate, context);
    struct run_kv_shape shape = {
        .layers = s->layers,
        .kv_heads = s->kv_heads,
        .k_dim = s->k_dim,
        .v_dim = s->v_dim,
        .dtype = dtype_of(o->kv_dtype),
        .rows = p->prompt_count,
        .rows_max = p->prompt_count * o->rows,
        .tokens_max = (uint32_t)wanted,
        .append_max = longest < o->chunk ? (uint32_t)longest : o->chunk,
    };
    if (!o->local)
        return open_kvtier(p, &shape);
    return run_kv_local_open(&p->kv, &shape, o->piece_tokens, p->err, sizeof(p->err));
}

static int prepare(struct program *p) {
    const struct kvt_options *o = &p->options;
    int rc = load(p);
    /* beyond it a model is on ground that it does not know; random weights know none */
    if (rc == 0 && !o->random && o->context > p->model->shape.context)
        fprintf(stderr,
                "kvtier-run: --context %" PRIu32 " is more than the %" PRIu32 " tokens that this "
                "model was made for; the text may be nonsense beyond them\n",
                o->context, p->model->shape.context);
    if (rc == 0)
        rc = kvt_prompts_read(o, p->gguf, p->tokenizer, p->model->shape.vocabulary, p->prompts,
                              &p->prompt_count, p->err, sizeof(p->err));
    if (rc == 0)
        rc = kvt_report_open(&p->report, o, p->tokenizer, p->prompt_count * o->rows, p->err,
                             sizeof(p->err));
    if (rc == 0)
        rc = open_kv(p);
    if (rc)
        return rc;
    rc = kvt_pool_open(&p->pool, o->threads ? o->threads : kvt_pool_cpu_count());
    if (rc == 0)
        rc = kvt_forward_open(&p->forward, p->model, p->pool, dtype_of(o->kv_dtype), &interrupted);
    if (rc == 0)
        rc = kvt_sampler_open(&p->sampler, o->temperature, o->top_k, o->top_p,
                              p->model->shape.vocabulary);
    return rc ? kvt_fail(rc, p->err, sizeof(p->err), "starting: %s", kvt_error_text(rc)) : 0;
}

/*
 * The daemon is gone, and K and V with it: attach to the next one and generate from
 * the beginning. It comes out the same; what was shown already is not shown again.
 */
static int start_over(struct program *p) {
    fprintf(stderr, "%skvtier-run: %s; attaching again and starting over\n",
            p->report.bar_shown ? "\n" : "", p->err);
    may_leave = 1; /* from here on; before, it is seen below */
    if (interrupted)
        return -KVT_EGONE;
    p->kv->ops->close(p->kv);
    p->kv = NULL;
    int rc = open_kv(p);
    if (rc)
        return rc;
    begin_orderly(p->kv);
    kvt_generate_free(&p->generate);
    kvt_report_start_over(&p->report);
    p->generate.kv = p->kv;
    p->generate.prompt_tokens = 0;
    p->generate.decode_tokens = 0;
    return kvt_generate(&p->generate, p->err, sizeof(p->err));
}

static int run(struct program *p) {
    const struct kvt_options *o = &p->options;
    p->generate = (struct kvt_generate){
        .forward = p->forward,
        .kv = p->kv,
        .sampler = &p->sampler,
        .tokenizer = o->ignore_end ? NULL : p->tokenizer,
        .vocabulary = p->model->shape.vocabulary,
        .prompts = p->prompts,
        .prompt_count = p->prompt_count,
        .repeat = o->rows,
        .chunk = o->chunk,
        .tokens_max = o->generate,
        .steps_ahead = o->steps_ahead,
        .seed = o->seed,
        .marks_last = o->json,
        .watch = kvt_report_watch(&p->report),
    };
    begin_orderly(p->kv);
    int rc = kvt_generate(&p->generate, p->err, sizeof(p->err));
    /* no kv: the next daemon did not come */
    for (uint32_t i = 0; rc == -KVT_EGONE && p->kv && !interrupted && i < STARTS_OVER_MAX; i++)
        rc = start_over(p);
    if (rc == -KVT_EGONE && interrupted)
        rc = kvt_fail(-KVT_EABORTED, p->err, sizeof(p->err),
                      "interrupted; the daemon did not answer any more");
    if (rc == 0 || rc == -KVT_EABORTED)
        kvt_report_finish(&p->report, &p->generate, kvt_pool_threads(p->pool));
    return rc;
}

static void end(struct program *p) {
    kvt_generate_free(&p->generate);
    kvt_sampler_close(&p->sampler);
    if (p->kv)
        p->kv->ops->close(p->kv);
    kvt_forward_close(p->forward);
    kvt_pool_close(p->pool);
    kvt_prompts_free(p->prompts, p->prompt_count);
    kvt_model_close(p->model);
    kvt_tokenizer_close(p->tokenizer);
    kvt_gguf_close(p->gguf);
}

int main(int argc, char **argv) {
    static struct program program;
    struct program *p = &program;
    int rc = 0;
    if (kvt_options_parse(&p->options, argc, argv, p->err, sizeof(p->err))) {
        fprintf(stderr, "kvtier-run: %s\n", p->err);
        return STATUS_USAGE;
    }
    if (p->options.help) {
        kvt_options_help();
    } else if (p->options.version) {
        printf("kvtier-run %s\n", KVT_VERSION);
    } else {
        watch_signals();
        rc = prepare(p);
        if (rc == 0)
            rc = run(p);
    }
    int written = kvt_report_close(&p->report);
    may_leave = 1;
    if (written)
        fprintf(stderr, "%skvtier-run: %s\n", p->report.bar_shown ? "\n" : "", p->report.why);
    else if (rc)
        fprintf(stderr, "%skvtier-run: %s\n", p->report.bar_shown ? "\n" : "", p->err);
    end(p);
    return rc == -KVT_EABORTED ? STATUS_INTERRUPTED : rc || written ? STATUS_FAILED : 0;
}
