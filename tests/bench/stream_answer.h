/* Whoever gives `ready` for `done` in bench_stream_ops: a thread of it, or a process with a context
 * of its own, as the daemon has one. It is told what to do through a box in shared memory, and polls
 * without sleep while it has a job.
 */
#ifndef KVT_TESTS_BENCH_STREAM_ANSWER_H
#define KVT_TESTS_BENCH_STREAM_ANSWER_H

#include "cuda/cuda_api.h"
#include "proto/control_page.h"

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { TEXT_BYTES = 320 };
#define FILL_BYTES (UINT64_C(512) << 10) /* K and V of a layer of the hot path's worker */

enum answer { NOBODY, STORE, STREAM, FILL };

/* ---- what both sides have -------------------------------------------------------------------- */

struct side {
    const struct kvt_cuda_api *api;
    CUdevice device;
    CUcontext context;
    CUstream stream;
    struct kvt_control_page *page;
    CUdeviceptr page_gpu;
    char why[TEXT_BYTES];
};

static int failed(struct side *s, const char *call, CUresult error) {
    char text[KVT_CUDA_TEXT_BYTES];
    (void)snprintf(s->why, sizeof s->why, "%.*s: %s", (int)strcspn(call, "("), call,
                   kvt_cuda_error(s->api, error, text));
    return -1;
}

#define TRY(s_, call_)                         \
    do {                                       \
        CUresult error_ = (s_)->api->call_;    \
        if (error_ != CUDA_SUCCESS) {          \
            return failed(s_, #call_, error_); \
        }                                      \
    } while (0)

static void sleep_us(long us) {
    (void)nanosleep(&(struct timespec){.tv_nsec = us * 1000}, NULL);
}

/* The page may be registered already by this process: then page_gpu is known. */
static int enter(struct side *s) {
    TRY(s, cuDevicePrimaryCtxRetain(&s->context, s->device));
    TRY(s, cuCtxSetCurrent(s->context));
    TRY(s, cuStreamCreate(&s->stream, CU_STREAM_NON_BLOCKING));
    if (s->page_gpu == 0) {
        TRY(s, cuMemHostRegister(s->page, KVT_CONTROL_PAGE_BYTES,
                                 CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP));
        TRY(s, cuMemHostGetDevicePointer(&s->page_gpu, s->page, 0));
    }
    return 0;
}

static uint64_t ready_at(uint32_t slot) {
    return offsetof(struct kvt_control_page, ready) + slot * sizeof(struct kvt_counter);
}

static uint64_t done_at(uint32_t slot) {
    return offsetof(struct kvt_control_page, done) + slot * sizeof(struct kvt_counter);
}

/* ---- who answers ----------------------------------------------------------------------------- */

/* What it is told, and says; shared between processes. */
struct box {
    uint32_t asked;    /* atomic: jobs so far */
    uint32_t answered; /* atomic: of these, ended */
    uint32_t give_up;  /* atomic: this job */
    uint32_t quit;     /* atomic */
    enum answer answer;
    uint32_t ahead;
    uint64_t layers; /* of the job */
    char why[TEXT_BYTES];
};

struct answerer {
    struct side side;
    struct box *box;
    bool entered;
    CUdeviceptr word; /* of its own: the daemon writes one behind each post */
    uint64_t number;
    CUdeviceptr target;
    void *source;
    pthread_t thread;
    pid_t pid;
};

static uint32_t look(const uint32_t *word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static int answerer_enter(struct answerer *a) {
    struct side *s = &a->side;
    void *word;
    if (a->entered) {
        return 0;
    }
    if (s->api == NULL) { /* another process */
        s->api = kvt_cuda_open(s->why);
        if (s->api == NULL || kvt_cuda_find(s->api, NULL, &s->device, s->why) != CUDA_SUCCESS) {
            return -1;
        }
    }
    if (enter(s) != 0) {
        return -1;
    }
    TRY(s, cuMemHostAlloc(&word, 4096, CU_MEMHOSTALLOC_DEVICEMAP));
    TRY(s, cuMemHostGetDevicePointer(&a->word, word, 0));
    TRY(s, cuMemHostAlloc(&a->source, FILL_BYTES, 0));
    TRY(s, cuMemAlloc(&a->target, FILL_BYTES));
    memset(a->source, 1, FILL_BYTES);
    TRY(s, cuMemcpyHtoDAsync(a->target, a->source, FILL_BYTES, s->stream));
    TRY(s, cuStreamSynchronize(s->stream));
    a->entered = true;
    return 0;
}

/* As tiers/device/cuda/streams.c does it. */
static int post(struct answerer *a, uint32_t slot, uint64_t value) {
    struct side *s = &a->side;
    CUstreamBatchMemOpParams ops[2];
    memset(ops, 0, sizeof ops);
    ops[0].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    ops[0].writeValue.address = s->page_gpu + ready_at(slot);
    ops[0].writeValue.value64 = value;
    ops[0].writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;
    ops[1] = ops[0];
    ops[1].writeValue.address = a->word;
    ops[1].writeValue.value64 = ++a->number;
    TRY(s, cuStreamBatchMemOp(s->stream, 2, ops, 0));
    return 0;
}

static int answer(struct answerer *a, uint32_t slot, uint64_t value) {
    struct side *s = &a->side;
    if (a->box->answer == STORE) {
        __atomic_store_n(&s->page->ready[slot].value, value, __ATOMIC_RELEASE);
        return 0;
    }
    if (a->box->answer == FILL) {
        TRY(s, cuMemcpyHtoDAsync(a->target, a->source, FILL_BYTES, s->stream));
    }
    return post(a, slot, value);
}

static bool await_done(struct answerer *a, uint32_t slot, uint64_t value) {
    const uint64_t *done = &a->side.page->done[slot].value;
    for (uint32_t i = 1; !kvt_counter_reached(__atomic_load_n(done, __ATOMIC_ACQUIRE), value);
         i++) {
        if (i % 4096 == 0) {
            if (look(&a->box->give_up) != 0) {
                return false;
            }
            (void)sched_yield();
        }
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
    return true;
}

static void job(struct answerer *a) {
    struct box *b = a->box;
    int rc = b->answer == STORE ? 0 : answerer_enter(a);
    for (uint64_t n = 0; n < b->layers && rc == 0; n++) {
        uint32_t slot = (uint32_t)(n % b->ahead);
        if (n >= b->ahead && !await_done(a, slot, n / b->ahead)) {
            break;
        }
        rc = answer(a, slot, n / b->ahead + 1);
    }
    if (rc == 0 && b->answer != STORE) {
        CUresult error = a->side.api->cuStreamSynchronize(a->side.stream);
        rc = error == CUDA_SUCCESS ? 0 : failed(&a->side, "cuStreamSynchronize", error);
    }
    if (rc != 0) {
        (void)snprintf(b->why, sizeof b->why, "%s", a->side.why);
    }
}

static void *answerer_run(void *argument) {
    struct answerer *a = argument;
    struct box *b = a->box;
    uint32_t seen = 0;
    while (look(&b->quit) == 0) {
        if (look(&b->asked) == seen) {
            sleep_us(20);
            continue;
        }
        seen++;
        job(a);
        __atomic_store_n(&b->answered, seen, __ATOMIC_RELEASE);
    }
    if (a->entered) {
        (void)a->side.api->cuStreamDestroy(a->side.stream);
        (void)a->side.api->cuDevicePrimaryCtxRelease(a->side.device);
    }
    return NULL;
}

#endif
