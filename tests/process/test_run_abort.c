/*
 * A step that is given up, with a real daemon: by Ctrl-C or by an error of the worker, at each of its
 * pieces in turn, in the prompt, in generation, and in the midst of a schedule of several steps. The
 * cache keeps its last committed length, and going on gives the bits of a generation without it.
 *
 * test: timeout_s=120
 */
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/kvtier.h"
#include "client/worker/forward.h"
#include "proto/errors.h"
#include "tests/support/cunit_run.h"

#define PROMPT_TOKENS 700u
#define CHUNK         100u
#define DECODE_STEPS  24u
#define AHEAD         8u
#define CHUNKS        (PROMPT_TOKENS / CHUNK)
#define STEPS         (CHUNKS + DECODE_STEPS)
#define ROWS          2u

static struct kvt_model *model;
static struct kvt_pool *pool;
static char err[512];
static uint32_t given_up; /* steps, in one generation */
static float *wanted;     /* [STEPS][ROWS][vocabulary]: of a generation that nothing disturbs */

/* ---- the daemon ----------------------------------------------------------------------------------- */

static char runtime_dir[256];
static pid_t daemon_pid;

static void daemon_start(const char *budget) {
    char program[512];
    char set[64];
    const char *bin = getenv("KVT_BIN");
    const char *dir = getenv("KVT_TEST_DIR");
    (void)snprintf(program, sizeof program, "%s/kvtierd", bin ? bin : "build/release/bin");
    (void)snprintf(runtime_dir, sizeof runtime_dir, "%s/run", dir ? dir : "/tmp");
    (void)snprintf(set, sizeof set, "device.cpu0.budget=%s", budget);
    daemon_pid = fork();
    CU_ASSERT_FATAL(daemon_pid >= 0);
    if (daemon_pid == 0) {
        int null = open("/dev/null", O_RDWR);
        (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
        (void)dup2(null, STDOUT_FILENO);
        (void)dup2(null, STDERR_FILENO);
        (void)execl(program, program, "--config", "/dev/null", "--runtime-dir", runtime_dir,
                    "--set", set, "--set", "host.budget=64MiB", "--set", "host.chunk=1MiB",
                    (char *)NULL);
        _exit(127);
    }
}

static void daemon_stop(void) {
    int status = 0;
    CU_ASSERT_EQUAL(kill(daemon_pid, SIGTERM), 0);
    CU_ASSERT_EQUAL(waitpid(daemon_pid, &status, 0), daemon_pid);
    CU_ASSERT_EQUAL(status, 0);
}

/* ---- a cache that disturbs its worker -------------------------------------------------------------- */

enum how { CTRL_C, WAIT_FAILS, DONE_FAILS, HOW_COUNT };

static struct {
    struct run_kv base;
    struct run_kv *kv;
    enum how how;
    uint32_t piece; /* at this piece of a step, from 0; UINT32_MAX: never */
    uint32_t seen;
} disturber;
static volatile sig_atomic_t interrupted;

static bool strikes(enum how how) {
    return disturber.how == how && disturber.seen == disturber.piece;
}

static int worker_error(void) {
    (void)snprintf(disturber.base.why, sizeof disturber.base.why, "the worker's own error");
    return -KVT_EIO;
}

static int passed_on(int rc) {
    if (rc < 0)
        memcpy(disturber.base.why, disturber.kv->why, sizeof disturber.base.why);
    return rc;
}

static int disturb_begin(struct run_kv *kv, const uint32_t *counts, uint32_t rows, uint32_t steps) {
    (void)kv;
    return passed_on(disturber.kv->ops->begin(disturber.kv, counts, rows, steps));
}

static int disturb_next(struct run_kv *kv, struct run_kv_piece *piece) {
    (void)kv;
    interrupted |= strikes(CTRL_C);
    return passed_on(disturber.kv->ops->next(disturber.kv, piece));
}

static int disturb_wait(struct run_kv *kv, const struct run_kv_piece *piece) {
    (void)kv;
    int rc = disturber.kv->ops->wait(disturber.kv, piece);
    return strikes(WAIT_FAILS) ? worker_error() : passed_on(rc);
}

static int disturb_done(struct run_kv *kv, const struct run_kv_piece *piece) {
    (void)kv;
    if (strikes(DONE_FAILS))
        return worker_error();
    disturber.seen++;
    return passed_on(disturber.kv->ops->done(disturber.kv, piece));
}

static int disturb_end(struct run_kv *kv) {
    (void)kv;
    return passed_on(disturber.kv->ops->end(disturber.kv));
}

static void disturb_abort(struct run_kv *kv) {
    (void)kv;
    disturber.kv->ops->abort(disturber.kv);
}

static uint32_t disturb_length(const struct run_kv *kv, uint32_t row) {
    (void)kv;
    return disturber.kv->ops->length(disturber.kv, row);
}

static const struct run_kv_ops disturb_ops = {.begin = disturb_begin,
                                              .next = disturb_next,
                                              .wait = disturb_wait,
                                              .done = disturb_done,
                                              .end = disturb_end,
                                              .abort = disturb_abort,
                                              .length = disturb_length};

/* ---- a generation ------------------------------------------------------------------------------------ */

static struct run_kv *open_kv(bool local, int mode, uint32_t piece_tokens) {
    const struct kvt_model_shape *s = &model->shape;
    const struct run_kv_shape shape = {.layers = s->layers,
                                       .kv_heads = s->kv_heads,
                                       .k_dim = s->k_dim,
                                       .v_dim = s->v_dim,
                                       .dtype = KVT_KV_F16,
                                       .rows = 1,
                                       .rows_max = ROWS,
                                       .tokens_max = PROMPT_TOKENS + DECODE_STEPS + CHUNK,
                                       .append_max = CHUNK};
    const struct run_kv_kvtier_options options = {.runtime_dir = runtime_dir,
                                                  .mode = mode,
                                                  .piece_tokens = piece_tokens,
                                                  .resident_layers = -1};
    struct run_kv *kv = NULL;
    int rc = local ? run_kv_local_open(&kv, &shape, piece_tokens, err, sizeof err)
                   : run_kv_kvtier_open(&kv, &shape, &options, err, sizeof err);
    if (rc != 0)
        (void)printf("\n    %s\n", err);
    CU_ASSERT_EQUAL_FATAL(rc, 0);
    return kv;
}

/* Step `step` of a generation: a chunk of the prompt, or a token of each row. */
static struct kvt_step_tokens tokens_of(uint32_t step, uint32_t *counts, uint32_t *ids) {
    bool prompt = step < CHUNKS;
    uint32_t rows = prompt ? 1 : ROWS;
    uint32_t total = 0;
    for (uint32_t r = 0; r < rows; r++) {
        counts[r] = prompt ? CHUNK : 1;
        for (uint32_t i = 0; i < counts[r]; i++)
            ids[total++] = (31 * step + 7 * i + 3 * r) % model->shape.vocabulary;
    }
    return (struct kvt_step_tokens){rows, counts, ids, true};
}

static uint32_t length_at(uint32_t step) {
    return step <= CHUNKS ? step * CHUNK : PROMPT_TOKENS + step - CHUNKS;
}

static int begin(uint32_t step, uint32_t ahead) {
    uint32_t counts[ROWS];
    uint32_t ids[CHUNK];
    struct kvt_step_tokens tokens = tokens_of(step, counts, ids);
    return disturb_begin(NULL, counts, tokens.row_count, ahead);
}

static int run_step(struct kvt_forward *forward, uint32_t step, const float **logits) {
    uint32_t counts[ROWS];
    uint32_t ids[CHUNK];
    struct kvt_step_tokens tokens = tokens_of(step, counts, ids);
    disturber.seen = 0;
    interrupted = 0;
    return kvt_forward_step(forward, &disturber.base, &tokens, logits);
}

static float *wanted_at(uint32_t step) {
    return wanted + (size_t)step * ROWS * model->shape.vocabulary;
}

static size_t logits_bytes(uint32_t step) {
    return (step < CHUNKS ? 1 : ROWS) * (size_t)model->shape.vocabulary * sizeof(float);
}

static void expect_length(uint32_t step) {
    for (uint32_t r = 0; r < (step <= CHUNKS ? 1 : ROWS); r++)
        CU_ASSERT_EQUAL(disturber.kv->ops->length(disturber.kv, r), length_at(step));
}

static void reference(struct kvt_forward *forward) {
    wanted = calloc(STEPS * ROWS * (size_t)model->shape.vocabulary, sizeof *wanted);
    CU_ASSERT_PTR_NOT_NULL_FATAL(wanted);
    disturber.kv = open_kv(true, 0, 0);
    disturber.piece = UINT32_MAX;
    for (uint32_t step = 0; step < STEPS; step++) {
        const float *logits = NULL;
        if (step == CHUNKS)
            CU_ASSERT_EQUAL_FATAL(disturber.kv->ops->repeat(disturber.kv, ROWS), 0);
        CU_ASSERT_EQUAL_FATAL(begin(step, 1), 1);
        CU_ASSERT_EQUAL_FATAL(run_step(forward, step, &logits), 0);
        memcpy(wanted_at(step), logits, logits_bytes(step));
    }
    disturber.kv->ops->close(disturber.kv);
}

/* Opens the schedule of `step` if none is open; *left counts what is open. */
static void open_schedule(uint32_t step, uint32_t ahead, uint32_t *left) {
    if (*left > 0)
        return;
    uint32_t steps = step < CHUNKS ? 1 : STEPS - step < ahead ? STEPS - step : ahead;
    int rc = begin(step, steps);
    if (rc <= 0)
        (void)printf("\n    step %u: %s\n", step, disturber.base.why);
    CU_ASSERT_FATAL(rc > 0 && (uint32_t)rc <= steps);
    *left = (uint32_t)rc;
    expect_length(step);
}

/*
 * Steps are given up and then done. With `ahead` 1 each of them, in each of the ways; with more every
 * third one, in one of the ways: there it lies in the midst of its schedule. The piece differs.
 */
static void generate(struct kvt_forward *forward, uint32_t ahead) {
    uint32_t pieces = model->shape.layers; /* of the last step that was done */
    uint32_t left = 0;
    uint32_t turn = 0;
    for (uint32_t step = 0; step < STEPS; step++) {
        const float *logits = NULL;
        uint32_t ways = ahead == 1 ? HOW_COUNT : step % 3 == 1;
        if (step == CHUNKS)
            CU_ASSERT_EQUAL_FATAL(disturber.kv->ops->repeat(disturber.kv, ROWS), 0);
        for (uint32_t way = 0; way < ways; way++, turn++) {
            open_schedule(step, ahead, &left);
            disturber.how = (enum how)(turn % HOW_COUNT);
            /* at the last layer it would be too late for Ctrl-C: the step ends */
            disturber.piece = turn / HOW_COUNT % (pieces - pieces / model->shape.layers);
            int rc = run_step(forward, step, &logits);
            CU_ASSERT_EQUAL_FATAL(rc, disturber.how == CTRL_C ? -KVT_EABORTED : -KVT_EIO);
            left = 0;
            given_up++;
            expect_length(step);
        }
        open_schedule(step, ahead, &left);
        disturber.piece = UINT32_MAX;
        int rc = run_step(forward, step, &logits);
        if (rc != 0)
            (void)printf("\n    step %u: %s\n", step, disturber.base.why);
        CU_ASSERT_EQUAL_FATAL(rc, 0);
        CU_ASSERT_EQUAL(memcmp(wanted_at(step), logits, logits_bytes(step)), 0);
        pieces = disturber.seen;
        left--;
        expect_length(step + 1);
    }
}

static void in_modes(const char *budget, const int *modes, size_t mode_count) {
    struct kvt_forward *forward = NULL;
    CU_ASSERT_EQUAL_FATAL(kvt_forward_open(&forward, model, pool, KVT_KV_F16, &interrupted), 0);
    disturber.base.ops = &disturb_ops;
    if (!wanted)
        reference(forward);
    daemon_start(budget);
    for (size_t i = 0; i < mode_count; i++)
        for (uint32_t piece_tokens = 0; piece_tokens <= 256; piece_tokens += 256)
            for (uint32_t ahead = 1; ahead <= AHEAD; ahead += AHEAD - 1) {
                given_up = 0;
                disturber.kv = open_kv(false, modes[i], piece_tokens);
                generate(forward, ahead);
                disturber.kv->ops->close(disturber.kv);
                CU_ASSERT(given_up >= (ahead == 1 ? HOW_COUNT * STEPS : STEPS / 3));
            }
    kvt_forward_close(forward);
    daemon_stop();
}

static void test_room_for_all(void) {
    static const int modes[] = {KVT_DYNAMIC, KVT_STATIC, KVT_OFFLOADED, KVT_OFFLOADED_STATIC};
    in_modes("32MiB", modes, 4);
}

/* Dynamic caches move to the host meanwhile. */
static void test_small_device(void) {
    static const int modes[] = {KVT_DYNAMIC, KVT_OFFLOADED, KVT_OFFLOADED_STATIC};
    in_modes("448KiB", modes, 3);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"given up, with room for all", test_room_for_all},
        {"given up, on a small device", test_small_device},
        CU_TEST_INFO_NULL,
    };
    if (kvt_model_random(&model, "tiny", 0, 1, err, sizeof err) || kvt_pool_open(&pool, 2))
        return 1;
    int status = kvt_cunit_run("run_abort", tests);
    kvt_pool_close(pool);
    kvt_model_close(model);
    free(wanted);
    return status;
}
