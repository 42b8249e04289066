/* What a worker's stream pays a layer for waits and posts: GPU time a layer, by events, of a kernel
 * of about 50 us alone and with the stream operations that libkvtier enqueues around it, one by one
 * and in other forms; then the same with somebody who answers each `done` with a later `ready`.
 *
 *     bench_stream_ops [--json] [--kernel write|spin|both] [--kernel-us N] [--layers N]
 *                      [--repeats N] [--rounds N]
 *
 * A run is so many layers behind a kernel that lasts until they are enqueued, so the host's time is
 * not in it. Cases take turns in rounds; what is told is each case over the kernel alone in its
 * round, the median of the rounds. Exit 77: there is no GPU to use. It needs no daemon.
 *
 * The kernels are kvtier-synth's: `write` writes memory, so that a barrier finds something to wait
 * for; `spin` looks at the GPU's clock, which may tick in steps of 1 us and then hides gaps below.
 *
 * Who answers is a thread, which stores or has a stream of its own in the same context; or a
 * process with its own context, as the daemon is one. `ahead`: ready of layer n is given when done
 * of layer n - ahead was seen.
 */
#include "tests/bench/stats.h"

#include <stdio.h>

#if KVT_WITH_CUDA

#include "kernels/synth_gpu.h"
#include "tests/bench/stream_answer.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LAYERS_MAX = 256, REPEATS_MAX = 1000, ROUNDS_MAX = 99 };
enum { LEAD_US = 1500, DEADLINE_S = 10, TOKEN_BYTES = 4096, BLOCKS_PER_SM = 8 };
#define WRITTEN_BYTES (UINT64_C(256) << 20) /* at most, by the kernel */

/* ---- the cases ------------------------------------------------------------------------------- */

enum where { NOWHERE, HOST, DEVICE };

struct variant {
    const char *name;
    enum where wait;
    enum where write;
    unsigned wait_flags;
    unsigned write_flags;
    bool first_version; /* of the write's call */
    bool small_kernel;  /* writes, instead of the stream */
    bool batch;         /* done of a layer and the wait of the next one together */
    enum answer answer;
    bool process; /* another one answers */
    uint32_t ahead;
};

#define NO_BARRIER CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER

static const struct variant variants[] = {
    {.name = "kernel alone"},
    {.name = "write, host page", .write = HOST},
    {.name = "write, host page, no barrier", .write = HOST, .write_flags = NO_BARRIER},
    {.name = "write, host page, no barrier, the call's first version",
     .write = HOST,
     .write_flags = NO_BARRIER,
     .first_version = true},
    {.name = "write, device memory", .write = DEVICE},
    {.name = "a small kernel writes to the host page", .small_kernel = true},
    {.name = "wait (met), host page", .wait = HOST},
    {.name = "wait (met) with FLUSH, host page",
     .wait = HOST,
     .wait_flags = CU_STREAM_WAIT_VALUE_FLUSH},
    {.name = "wait (met), device memory", .wait = DEVICE},
    {.name = "wait (met) and write, host page: as now", .wait = HOST, .write = HOST},
    {.name = "the same, no barrier", .wait = HOST, .write = HOST, .write_flags = NO_BARRIER},
    {.name = "the same with FLUSH",
     .wait = HOST,
     .write = HOST,
     .wait_flags = CU_STREAM_WAIT_VALUE_FLUSH},
    {.name = "wait (met) in device memory, write to the host page", .wait = DEVICE, .write = HOST},
    {.name = "wait (met) and write, device memory", .wait = DEVICE, .write = DEVICE},
    {.name = "wait (met), and a small kernel writes", .wait = HOST, .small_kernel = true},
    {.name = "one batch: write, next wait (met), host page",
     .wait = HOST,
     .write = HOST,
     .batch = true},
    {.name = "one batch: write to the host page, next wait (met) in device memory",
     .wait = DEVICE,
     .write = HOST,
     .batch = true},
#define ANSWERED(name_, answer_, process_, ahead_)                                          \
    {                                                                                       \
        .name = name_, .wait = HOST, .write = HOST, .answer = answer_, .process = process_, \
        .ahead = ahead_                                                                     \
    }
    ANSWERED("answered by a thread's store, 1 ahead", STORE, false, 1),
    ANSWERED("answered by a thread's store, 3 ahead", STORE, false, 3),
    ANSWERED("answered by another stream, 1 ahead", STREAM, false, 1),
    ANSWERED("answered by another stream, 3 ahead", STREAM, false, 3),
    ANSWERED("answered by a process's stream, 1 ahead", STREAM, true, 1),
    ANSWERED("answered by a process's stream, 3 ahead", STREAM, true, 3),
    ANSWERED("answered by a process's copy of 512 KiB and stream, 1 ahead", FILL, true, 1),
    ANSWERED("answered by a process's copy of 512 KiB and stream, 3 ahead", FILL, true, 3),
    {.name = "one batch, answered by a process's copy and stream, 3 ahead",
     .wait = HOST,
     .write = HOST,
     .batch = true,
     .answer = FILL,
     .process = true,
     .ahead = 3},
};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

/* ---- options --------------------------------------------------------------------------------- */

struct options {
    bool json;
    bool write;
    bool spin;
    long kernel_us;
    long layers;
    long repeats;
    long rounds;
};

static bool number(const char *name, int argc, char **argv, int *at, long most, long *out) {
    if (strcmp(argv[*at], name) != 0 || *at + 1 == argc) {
        return false;
    }
    char *end;
    *out = strtol(argv[++*at], &end, 10);
    return *end == '\0' && *out >= 1 && *out <= most;
}

static bool kernel(int argc, char **argv, int *at, struct options *o) {
    if (strcmp(argv[*at], "--kernel") != 0 || *at + 1 == argc) {
        return false;
    }
    const char *which = argv[++*at];
    bool both = strcmp(which, "both") == 0;
    o->write = both || strcmp(which, "write") == 0;
    o->spin = both || strcmp(which, "spin") == 0;
    return o->write || o->spin;
}

static bool parse(int argc, char **argv, struct options *o) {
    *o = (struct options){
        .write = true, .spin = true, .kernel_us = 50, .layers = 64, .repeats = 12, .rounds = 9};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--json") == 0) {
            o->json = true;
        } else if (!kernel(argc, argv, &i, o) &&
                   !number("--kernel-us", argc, argv, &i, 10000, &o->kernel_us) &&
                   !number("--layers", argc, argv, &i, LAYERS_MAX, &o->layers) &&
                   !number("--repeats", argc, argv, &i, REPEATS_MAX, &o->repeats) &&
                   !number("--rounds", argc, argv, &i, ROUNDS_MAX, &o->rounds)) {
            fprintf(stderr, "bench_stream_ops: '%s': see the top of its source\n", argv[i]);
            return false;
        }
    }
    return true;
}

/* ---- the worker's side ----------------------------------------------------------------------- */

struct result {
    double us[ROUNDS_MAX];
    double over[ROUNDS_MAX];
    double host_us[ROUNDS_MAX];
    int count;
    char why_not[TEXT_BYTES]; /* it cannot be measured */
};

struct bench {
    struct side side;
    const struct options *o;
    struct answerer thread;
    struct answerer process;
    CUmodule module;
    CUfunction write;
    CUfunction spin;
    CUevent begin;
    CUevent end;
    CUdeviceptr memory;
    CUdeviceptr ids;
    CUdeviceptr words; /* in device memory, laid out as the page */
    CUresult (*write_first)(CUstream, CUdeviceptr, cuuint64_t, unsigned int);
    bool flushes;
    uint32_t blocks_max;
    bool spins;     /* the kernel that is measured */
    uint32_t count; /* its: tokens, or microseconds */
    char gpu[80];
    char no_process[TEXT_BYTES]; /* why none can answer */
};

extern const char kvt_synth_gpu_image[];

static int launch(struct bench *b, CUfunction f, CUdeviceptr plane, uint32_t count,
                  uint32_t bytes) {
    struct kvt_synth_gpu_job j = {.ids = (const uint64_t *)(uintptr_t)b->ids,
                                  .plane = (uint8_t *)(uintptr_t)plane,
                                  .count = count,
                                  .token_bytes = bytes};
    void *parameters[] = {&j};
    bool spins = f == b->spin;
    uint64_t blocks =
        ((uint64_t)count * ((bytes + 7) / 8) + KVT_SYNTH_GPU_THREADS - 1) / KVT_SYNTH_GPU_THREADS;
    blocks = spins || blocks == 0 ? 1 : blocks < b->blocks_max ? blocks : b->blocks_max;
    TRY(&b->side, cuLaunchKernel(f, (unsigned)blocks, 1, 1, spins ? 1 : KVT_SYNTH_GPU_THREADS, 1, 1,
                                 0, b->side.stream, parameters, NULL));
    return 0;
}

static int open_bench(struct bench *b) {
    struct side *s = &b->side;
    int flushes = 0;
    int first = 0;
    int processors = 1;
    TRY(s, cuDeviceGetName(b->gpu, sizeof b->gpu, s->device));
    TRY(s, cuDeviceGetAttribute(&processors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, s->device));
    TRY(s, cuDeviceGetAttribute(&flushes, CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES, s->device));
#if CUDA_VERSION >= 12000
    TRY(s, cuDeviceGetAttribute(&first, CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS_V1,
                                s->device));
#endif
    if (first != 0) {
        void *symbol = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL), "cuStreamWriteValue64");
        memcpy(&b->write_first, &symbol, sizeof symbol);
    }
    b->flushes = flushes != 0;
    b->blocks_max = (uint32_t)processors * BLOCKS_PER_SM;
    if (enter(s) != 0) {
        return -1;
    }
    TRY(s, cuModuleLoadData(&b->module, kvt_synth_gpu_image));
    TRY(s, cuModuleGetFunction(&b->write, b->module, "kvt_synth_gpu_write"));
    TRY(s, cuModuleGetFunction(&b->spin, b->module, "kvt_synth_gpu_spin"));
    TRY(s, cuEventCreate(&b->begin, CU_EVENT_DEFAULT));
    TRY(s, cuEventCreate(&b->end, CU_EVENT_DEFAULT));
    TRY(s, cuMemAlloc(&b->memory, WRITTEN_BYTES));
    TRY(s, cuMemAlloc(&b->ids, WRITTEN_BYTES / TOKEN_BYTES * sizeof(uint64_t)));
    TRY(s, cuMemAlloc(&b->words, KVT_CONTROL_PAGE_BYTES));
    TRY(s, cuMemsetD8Async(b->ids, 1, WRITTEN_BYTES / TOKEN_BYTES * sizeof(uint64_t), s->stream));
    TRY(s, cuMemsetD8Async(b->words, 0, KVT_CONTROL_PAGE_BYTES, s->stream));
    /* A kernel's first launch would stall behind a wait: once here, for nothing. */
    int rc = launch(b, b->write, b->memory, 1, TOKEN_BYTES);
    rc = rc == 0 ? launch(b, b->spin, 0, 1, 8) : rc;
    TRY(s, cuStreamSynchronize(s->stream));
    return rc;
}

static int measured_kernel(struct bench *b) {
    return b->spins ? launch(b, b->spin, 0, b->count, 8)
                    : launch(b, b->write, b->memory, b->count, TOKEN_BYTES);
}

static CUdeviceptr on(const struct bench *b, enum where where) {
    return where == HOST ? b->side.page_gpu : b->words;
}

/* A wait that nobody answers is met: for 0. */
static uint32_t slot_of(const struct variant *v, uint64_t n) {
    return v->ahead > 0 ? (uint32_t)(n % v->ahead) : 0;
}

static CUstreamBatchMemOpParams wait_of(const struct bench *b, const struct variant *v,
                                        uint64_t n) {
    CUstreamBatchMemOpParams op;
    memset(&op, 0, sizeof op);
    op.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_64;
    op.waitValue.address = on(b, v->wait) + ready_at(slot_of(v, n));
    op.waitValue.value64 = v->ahead > 0 ? n / v->ahead + 1 : 0;
    op.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ | v->wait_flags;
    return op;
}

static CUstreamBatchMemOpParams write_of(const struct bench *b, const struct variant *v,
                                         uint64_t n) {
    CUstreamBatchMemOpParams op;
    memset(&op, 0, sizeof op);
    op.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    op.writeValue.address = on(b, v->write) + done_at(slot_of(v, n));
    op.writeValue.value64 = v->ahead > 0 ? n / v->ahead + 1 : n + 1;
    op.writeValue.flags = v->write_flags;
    return op;
}

static int enqueue_wait(struct bench *b, const struct variant *v, uint64_t n) {
    CUstreamBatchMemOpParams w = wait_of(b, v, n);
    TRY(&b->side, cuStreamWaitValue64(b->side.stream, w.waitValue.address, w.waitValue.value64,
                                      w.waitValue.flags));
    return 0;
}

static int enqueue_write(struct bench *b, const struct variant *v, uint64_t n) {
    CUstreamBatchMemOpParams w = write_of(b, v, n);
    if (v->first_version) {
        CUresult error = b->write_first(b->side.stream, w.writeValue.address, w.writeValue.value64,
                                        w.writeValue.flags);
        return error == CUDA_SUCCESS ? 0 : failed(&b->side, "cuStreamWriteValue64", error);
    }
    TRY(&b->side, cuStreamWriteValue64(b->side.stream, w.writeValue.address, w.writeValue.value64,
                                       w.writeValue.flags));
    return 0;
}

static int enqueue_both(struct bench *b, const struct variant *v, uint64_t n) {
    CUstreamBatchMemOpParams ops[2] = {write_of(b, v, n), wait_of(b, v, n + 1)};
    TRY(&b->side, cuStreamBatchMemOp(b->side.stream, 2, ops, 0));
    return 0;
}

static int enqueue_layer(struct bench *b, const struct variant *v, uint64_t n, bool first,
                         bool last) {
    int rc = v->wait != NOWHERE && (!v->batch || first) ? enqueue_wait(b, v, n) : 0;
    rc = rc == 0 ? measured_kernel(b) : rc;
    if (rc == 0 && v->batch && !last) {
        rc = enqueue_both(b, v, n);
    } else if (rc == 0 && v->write != NOWHERE) {
        rc = enqueue_write(b, v, n);
    } else if (rc == 0 && v->small_kernel) {
        rc = launch(b, b->write, b->side.page_gpu + done_at(0), 1, 8);
    }
    return rc;
}

/* Waits for the stream. One that nobody answers is let go, and that is a failure. */
static int finish(struct bench *b) {
    double deadline_s = kvt_bench_now_s() + DEADLINE_S;
    bool stuck = false;
    for (;;) {
        CUresult error = b->side.api->cuStreamQuery(b->side.stream);
        if (error != CUDA_SUCCESS && error != CUDA_ERROR_NOT_READY) {
            (void)failed(&b->side, "cuStreamQuery", error);
            fprintf(stderr, "bench_stream_ops: the GPU failed: %s\n", b->side.why);
            exit(1);
        }
        if (error == CUDA_SUCCESS) {
            break;
        }
        if (kvt_bench_now_s() > deadline_s) {
            if (stuck) {
                fprintf(stderr, "bench_stream_ops: the stream does not end\n");
                exit(1);
            }
            stuck = true;
            deadline_s += DEADLINE_S;
            for (uint32_t i = 0; i < KVT_SLOTS_MAX; i++) {
                __atomic_store_n(&b->side.page->ready[i].value, KVT_POISON, __ATOMIC_SEQ_CST);
            }
        }
        sleep_us(100);
    }
    if (stuck) {
        (void)snprintf(b->side.why, sizeof b->side.why, "not answered within %d s", DEADLINE_S);
    }
    return stuck ? -1 : 0;
}

/* Layers [first, first + layers). *us: GPU time a layer; *host_us: to enqueue one. */
static int run(struct bench *b, const struct variant *v, uint64_t first, double *us,
               double *host_us) {
    struct side *s = &b->side;
    uint64_t layers = (uint64_t)b->o->layers;
    char why[TEXT_BYTES];
    float ms = 0;
    int rc = launch(b, b->spin, 0, LEAD_US, 8);
    if (rc != 0) {
        return rc;
    }
    TRY(s, cuEventRecord(b->begin, s->stream));
    double begin_s = kvt_bench_now_s();
    for (uint64_t i = 0; i < layers && rc == 0; i++) {
        rc = enqueue_layer(b, v, first + i, i == 0, i + 1 == layers);
    }
    *host_us = (kvt_bench_now_s() - begin_s) * 1e6 / (double)layers;
    if (rc != 0) { /* the first failure is the one to tell */
        memcpy(why, s->why, sizeof why);
        (void)finish(b);
        memcpy(s->why, why, sizeof why);
        return rc;
    }
    TRY(s, cuEventRecord(b->end, s->stream));
    if (finish(b) != 0) {
        return -1;
    }
    TRY(s, cuEventElapsedTime(&ms, b->begin, b->end));
    *us = 1000.0 * (double)ms / (double)layers;
    return 0;
}

/* ---- a case in a round ----------------------------------------------------------------------- */

static void ask(struct bench *b, const struct variant *v, struct answerer *a, uint64_t layers) {
    for (uint32_t i = 0; i < KVT_SLOTS_MAX; i++) {
        __atomic_store_n(&b->side.page->ready[i].value, 0, __ATOMIC_SEQ_CST);
        __atomic_store_n(&b->side.page->done[i].value, 0, __ATOMIC_SEQ_CST);
    }
    a->box->answer = v->answer;
    a->box->ahead = v->ahead;
    a->box->layers = layers;
    a->box->why[0] = '\0';
    __atomic_store_n(&a->box->give_up, 0, __ATOMIC_SEQ_CST);
    (void)__atomic_add_fetch(&a->box->asked, 1, __ATOMIC_SEQ_CST);
}

static int asked(struct bench *b, struct answerer *a, int rc) {
    double deadline_s = kvt_bench_now_s() + 6 * DEADLINE_S; /* it may have to open libcuda */
    if (rc != 0) {
        __atomic_store_n(&a->box->give_up, 1, __ATOMIC_SEQ_CST);
    }
    while (look(&a->box->answered) != look(&a->box->asked)) {
        if (kvt_bench_now_s() > deadline_s) {
            fprintf(stderr, "bench_stream_ops: who answers does not end\n");
            exit(1);
        }
        sleep_us(100);
    }
    if (a->box->why[0] != '\0') {
        memcpy(b->side.why, a->box->why, sizeof b->side.why);
        return -1;
    }
    return rc;
}

static const char *why_not(const struct bench *b, const struct variant *v) {
    return v->process && b->no_process[0] != '\0'       ? b->no_process
           : v->first_version && b->write_first == NULL ? "this driver does not offer it"
           : (v->wait_flags & CU_STREAM_WAIT_VALUE_FLUSH) != 0 && !b->flushes
               ? "this GPU cannot (CAN_FLUSH_REMOTE_WRITES is 0)"
               : NULL;
}

/* The first run warms up. */
static int measure(struct bench *b, const struct variant *v, double *us, double *host_us) {
    static double times[REPEATS_MAX];
    static double host[REPEATS_MAX];
    struct answerer *a = v->process ? &b->process : &b->thread;
    int rc = 0;
    if (v->answer != NOBODY) {
        ask(b, v, a, (uint64_t)(b->o->repeats + 1) * (uint64_t)b->o->layers);
    }
    for (long i = 0; i <= b->o->repeats && rc == 0; i++) {
        double t = 0;
        double h = 0;
        rc = run(b, v, (uint64_t)(i * b->o->layers), &t, &h);
        times[i > 0 ? i - 1 : 0] = t;
        host[i > 0 ? i - 1 : 0] = h;
    }
    if (v->answer != NOBODY) {
        rc = asked(b, a, rc);
    }
    *us = kvt_median_interval(times, (int)b->o->repeats).median;
    *host_us = kvt_median_interval(host, (int)b->o->repeats).median;
    return rc;
}

static void one_round(struct bench *b, struct result *results) {
    double alone_us = 0;
    for (int i = 0; i < VARIANTS; i++) {
        struct result *r = &results[i];
        double us;
        double host_us;
        const char *why = why_not(b, &variants[i]);
        if (why != NULL) {
            (void)snprintf(r->why_not, sizeof r->why_not, "%s", why);
        }
        if (r->why_not[0] != '\0') {
            continue;
        }
        if (measure(b, &variants[i], &us, &host_us) != 0) {
            memcpy(r->why_not, b->side.why, sizeof r->why_not);
            continue;
        }
        alone_us = i == 0 ? us : alone_us;
        r->us[r->count] = us;
        r->over[r->count] = us - alone_us;
        r->host_us[r->count++] = host_us;
    }
}

/* So many tokens are written in kernel_us. */
static int calibrate(struct bench *b) {
    uint32_t most = WRITTEN_BYTES / TOKEN_BYTES;
    double us = 0;
    double host_us;
    b->count = b->spins ? (uint32_t)b->o->kernel_us : 256;
    for (int i = 0; i < 12 && !b->spins; i++) {
        if (run(b, &variants[0], 0, &us, &host_us) != 0) {
            return -1;
        }
        double factor = (double)b->o->kernel_us / (us > 0.1 ? us : 0.1);
        double count = b->count * (factor > 4 ? 4 : factor);
        b->count = count < 1 ? 1 : count > most ? most : (uint32_t)count;
    }
    return 0;
}

/* ---- what is told ---------------------------------------------------------------------------- */

static void tell_json(const struct result *r, const char *kind, const char *name,
                      const struct kvt_interval t[3]) {
    printf("{\"kernel\": \"%s\", \"case\": \"%s\", ", kind, name);
    if (r->why_not[0] != '\0') {
        printf("\"why_not\": \"%s\"}", r->why_not);
        return;
    }
    printf("\"us\": %.3f, \"over_us\": %.3f, \"low\": %.3f, \"high\": %.3f, \"host_us\": %.3f}",
           t[0].median, t[1].median, t[1].low, t[1].high, t[2].median);
}

static void tell_line(const struct result *r, const char *name, const struct kvt_interval t[3]) {
    if (r->why_not[0] != '\0') {
        printf("  %-68s not measured: %s\n", name, r->why_not);
        return;
    }
    printf("  %-68s %7.2f [%.2f, %.2f] %6.2f\n", name, t[1].median, t[1].low, t[1].high,
           t[2].median);
}

static void tell(const struct bench *b, struct result *results, bool first) {
    const char *kind = b->spins ? "spin" : "write";
    if (!b->o->json) {
        printf("%s, kernel '%s', %.2f us alone. Over that, us a layer: median of %ld rounds, its "
               "interval; host time\n",
               b->gpu, kind, kvt_median_interval(results[0].us, results[0].count).median,
               b->o->rounds);
    }
    for (int i = 0; i < VARIANTS; i++) {
        struct result *r = &results[i];
        struct kvt_interval t[3] = {{0}};
        if (r->count > 0) {
            t[0] = kvt_median_interval(r->us, r->count);
            t[1] = kvt_median_interval(r->over, r->count);
            t[2] = kvt_median_interval(r->host_us, r->count);
        }
        if (!b->o->json) {
            tell_line(r, variants[i].name, t);
            continue;
        }
        printf("%s", first && i == 0 ? "" : ", ");
        tell_json(r, kind, variants[i].name, t);
    }
    (void)fflush(stdout);
}

/* Both open what they need, which takes its time. */
static int wake_answerers(struct bench *b) {
    struct variant nothing = {.answer = STREAM, .ahead = 1};
    ask(b, &nothing, &b->thread, 0);
    if (asked(b, &b->thread, 0) != 0) {
        return -1;
    }
    ask(b, &nothing, &b->process, 0);
    if (asked(b, &b->process, 0) != 0) {
        memcpy(b->no_process, b->side.why, sizeof b->no_process);
    }
    return 0;
}

static int bench(struct bench *b) {
    static struct result results[VARIANTS];
    bool first = true;
    if (wake_answerers(b) != 0) {
        return -1;
    }
    if (b->o->json) {
        printf("{\"bench\": \"stream_ops\", \"gpu\": \"%s\", \"layers\": %ld, \"rounds\": %ld, "
               "\"repeats\": %ld, \"cases\": [",
               b->gpu, b->o->layers, b->o->rounds, b->o->repeats);
    }
    for (int k = 0; k < 2; k++) {
        b->spins = k == 1;
        if (!(b->spins ? b->o->spin : b->o->write)) {
            continue;
        }
        memset(results, 0, sizeof results);
        if (calibrate(b) != 0) {
            return -1;
        }
        for (long i = 0; i < b->o->rounds; i++) {
            one_round(b, results);
        }
        if (results[0].count == 0) {
            return -1;
        }
        tell(b, results, first);
        first = false;
    }
    if (b->o->json) {
        printf("]}\n");
    }
    return 0;
}

/* ---- start and end --------------------------------------------------------------------------- */

static void close_bench(struct bench *b) {
    const struct kvt_cuda_api *api = b->side.api;
    if (b->side.stream != NULL) {
        (void)api->cuStreamDestroy(b->side.stream);
        (void)api->cuMemHostUnregister(b->side.page);
    }
    if (b->begin != NULL && b->end != NULL) {
        (void)api->cuEventDestroy(b->begin);
        (void)api->cuEventDestroy(b->end);
    }
    (void)api->cuDevicePrimaryCtxRelease(b->side.device);
}

/* Before this process opens libcuda: a child could not use it any more. */
static int fork_answerer(struct answerer *a) {
    pid_t parent = getpid();
    a->pid = fork();
    if (a->pid == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() == parent) {
            (void)answerer_run(a);
        }
        _exit(0);
    }
    return a->pid > 0 ? 0 : -1;
}

static void end_answerer(struct answerer *a) {
    __atomic_store_n(&a->box->quit, 1, __ATOMIC_SEQ_CST);
    if (a->pid == 0) {
        (void)pthread_join(a->thread, NULL);
        return;
    }
    for (int i = 0; i < 5000 && waitpid(a->pid, NULL, WNOHANG) == 0; i++) {
        sleep_us(1000);
        if (i == 4999) {
            (void)kill(a->pid, SIGKILL);
            (void)waitpid(a->pid, NULL, 0);
        }
    }
}

static int with_gpu(struct bench *b) {
    char text[KVT_CUDA_TEXT_BYTES] = "";
    struct side *s = &b->side;
    s->api = kvt_cuda_open(text);
    if (s->api == NULL || kvt_cuda_find(s->api, NULL, &s->device, text) != CUDA_SUCCESS ||
        kvt_cuda_check_stream_values(s->api, s->device, text) != CUDA_SUCCESS) {
        printf("SKIP bench_stream_ops: %s\n", text);
        return 77;
    }
    int rc = open_bench(b);
    if (rc == 0) {
        b->thread.side = *s;
        rc = pthread_create(&b->thread.thread, NULL, answerer_run, &b->thread) == 0 ? 0 : -1;
    }
    if (rc == 0) {
        rc = bench(b);
        end_answerer(&b->thread);
    }
    if (rc != 0) {
        fprintf(stderr, "bench_stream_ops: %s\n", s->why);
    }
    close_bench(b);
    return rc == 0 ? 0 : 1;
}

int main(int argc, char **argv) {
    static struct bench b;
    struct options o;
    if (!parse(argc, argv, &o)) {
        return 2;
    }
    size_t bytes = KVT_CONTROL_PAGE_BYTES + 2 * sizeof(struct box);
    uint8_t *shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) {
        perror("bench_stream_ops: mmap");
        return 1;
    }
    b.o = &o;
    b.side.page = b.process.side.page = (struct kvt_control_page *)shared;
    b.thread.box = (struct box *)(shared + KVT_CONTROL_PAGE_BYTES);
    b.process.box = b.thread.box + 1;
    if (fork_answerer(&b.process) != 0) {
        perror("bench_stream_ops: fork");
        return 1;
    }
    int status = with_gpu(&b);
    end_answerer(&b.process);
    return status;
}

#else

int main(void) {
    printf("SKIP bench_stream_ops: built without CUDA: install nvcc and build it again\n");
    return 77;
}

#endif
