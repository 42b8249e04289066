/* Streams are threads that do one thing after the other; copies, and events. */
#include "tests/fake_cuda/fake_cuda.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { QUEUE_MAX = 1020 };

/* ---- streams ------------------------------------------------------------------------------------- */

static uint64_t copies; /* atomic */

enum kind { COPY, FILL, WAIT, WRITE, RECORD, KERNEL };

struct op {
    enum kind kind;
    uint64_t target;
    uint64_t source;
    uint64_t bytes;
    uint64_t value;
    CUevent event;
    void (*kernel)(struct kvt_synth_gpu_job *job);
    struct kvt_synth_gpu_job job;
    void *staged; /* pageable source */
};

struct CUstream_st {
    CUcontext context;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct op *ops; /* ring of QUEUE_MAX */
    uint64_t begun; /* taken from the ring */
    uint64_t ended;
    uint64_t submitted;
    bool stop;
};

struct CUevent_st {
    uint64_t recorded; /* atomic: times asked for */
    uint64_t done;     /* atomic */
    uint64_t ns;
};

static uint64_t now_ns(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void wait_for(const uint64_t *word, uint64_t value) {
    (void)__atomic_add_fetch(&fake_waiting, 1, __ATOMIC_SEQ_CST);
    for (int spin = 0; (int64_t)(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) < 0; spin++) {
        if (spin > 50) {
            fake_pause_us(20);
        }
    }
    (void)__atomic_sub_fetch(&fake_waiting, 1, __ATOMIC_SEQ_CST);
}

static void copy(const struct op *o) {
    uint64_t gib_s = fake_setting("FAKE_CUDA_GIB_S", 0);
    uint64_t begin = now_ns();
    memmove((void *)(uintptr_t)o->target, (const void *)(uintptr_t)o->source, o->bytes);
    if (gib_s > 0) {
        uint64_t ns = o->bytes / gib_s;
        while (now_ns() - begin < ns) {
            fake_pause_us(5);
        }
    }
    uint64_t after = fake_setting("FAKE_CUDA_FAIL_AFTER", UINT64_MAX);
    if (__atomic_add_fetch(&copies, 1, __ATOMIC_SEQ_CST) >= after) {
        __atomic_store_n(&fake_lost, true, __ATOMIC_RELEASE);
    }
    free(o->staged);
}

static void carry_out(struct op *o) {
    if (__atomic_load_n(&fake_lost, __ATOMIC_ACQUIRE)) {
        return; /* nothing is done any more */
    }
    switch (o->kind) {
    case COPY:
        copy(o);
        break;
    case FILL:
        memset((void *)(uintptr_t)o->target, (int)o->value, o->bytes);
        break;
    case WAIT:
        wait_for((const uint64_t *)(uintptr_t)o->target, o->value);
        break;
    case WRITE:
        __atomic_store_n((uint64_t *)(uintptr_t)o->target, o->value, __ATOMIC_SEQ_CST);
        break;
    case RECORD:
        o->event->ns = now_ns();
        (void)__atomic_add_fetch(&o->event->done, 1, __ATOMIC_SEQ_CST);
        break;
    case KERNEL:
        o->kernel(&o->job);
        break;
    }
}

static void *run(void *argument) {
    CUstream s = argument;
    (void)pthread_mutex_lock(&s->lock);
    for (;;) {
        while (s->begun == s->submitted && !s->stop) {
            (void)pthread_cond_wait(&s->changed, &s->lock);
        }
        if (s->begun == s->submitted) {
            break;
        }
        struct op *o = &s->ops[s->begun % QUEUE_MAX];
        s->begun++;
        (void)pthread_mutex_unlock(&s->lock);
        carry_out(o);
        (void)pthread_mutex_lock(&s->lock);
        s->ended++;
        (void)pthread_cond_broadcast(&s->changed);
    }
    (void)pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* The queue is full behind a wait: the caller waits. */
static CUresult submit(CUstream s, const struct op *o) {
    NEED_CONTEXT();
    fake_must(s != NULL, "the fake has no default stream");
    if (s->context != fake_context()) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    (void)pthread_mutex_lock(&s->lock);
    while (s->submitted - s->ended == QUEUE_MAX) {
        (void)pthread_cond_wait(&s->changed, &s->lock);
    }
    s->ops[s->submitted++ % QUEUE_MAX] = *o;
    (void)pthread_cond_broadcast(&s->changed);
    (void)pthread_mutex_unlock(&s->lock);
    return CUDA_SUCCESS;
}

CUresult fake_submit_kernel(CUstream s, void (*kernel)(struct kvt_synth_gpu_job *job),
                            const struct kvt_synth_gpu_job *job) {
    return submit(s, &(struct op){.kind = KERNEL, .kernel = kernel, .job = *job});
}

EXPORT CUresult cuStreamCreate(CUstream *out, unsigned int flags) {
    (void)flags;
    NEED_CONTEXT();
    CUstream s = calloc(1, sizeof *s);
    fake_must(s != NULL, "no memory");
    s->ops = calloc(QUEUE_MAX, sizeof *s->ops);
    s->context = fake_context();
    (void)pthread_mutex_init(&s->lock, NULL);
    (void)pthread_cond_init(&s->changed, NULL);
    fake_must(s->ops != NULL && pthread_create(&s->thread, NULL, run, s) == 0, "no thread");
    *out = s;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamDestroy(CUstream s) {
    (void)pthread_mutex_lock(&s->lock);
    s->stop = true;
    (void)pthread_cond_broadcast(&s->changed);
    (void)pthread_mutex_unlock(&s->lock);
    (void)pthread_join(s->thread, NULL);
    free(s->ops);
    free(s);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamGetCtx(CUstream s, CUcontext *context) {
    if (s == NULL) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    *context = s->context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamQuery(CUstream s) {
    NEED_CONTEXT();
    (void)pthread_mutex_lock(&s->lock);
    bool idle = s->ended == s->submitted;
    (void)pthread_mutex_unlock(&s->lock);
    return idle ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

EXPORT CUresult cuStreamSynchronize(CUstream s) {
    NEED_CONTEXT();
    (void)pthread_mutex_lock(&s->lock);
    uint64_t until = s->submitted;
    while (s->ended < until) {
        (void)pthread_cond_wait(&s->changed, &s->lock);
    }
    (void)pthread_mutex_unlock(&s->lock);
    return fake_here();
}

/* Counters lie in pinned host memory, or on a GPU. */
static bool is_counter(CUdeviceptr address) {
    return fake_inside(address, 8, true) || fake_inside(address, 8, false);
}

EXPORT CUresult cuStreamWaitValue64(CUstream s, CUdeviceptr address, cuuint64_t value,
                                    unsigned int flags) {
    fake_must((flags & ~(unsigned)CU_STREAM_WAIT_VALUE_FLUSH) == CU_STREAM_WAIT_VALUE_GEQ,
              "only GEQ is played");
    if (!is_counter(address)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return submit(s, &(struct op){.kind = WAIT, .target = address, .value = value});
}

EXPORT CUresult cuStreamWriteValue64(CUstream s, CUdeviceptr address, cuuint64_t value,
                                     unsigned int flags) {
    /* As cuda.h says of this version of the call: there is no write without a barrier. */
    if (flags != CU_STREAM_WRITE_VALUE_DEFAULT || !is_counter(address)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return submit(s, &(struct op){.kind = WRITE, .target = address, .value = value});
}

EXPORT CUresult cuStreamBatchMemOp(CUstream s, unsigned int count, CUstreamBatchMemOpParams *ops,
                                   unsigned int flags) {
    CUresult error = CUDA_SUCCESS;
    (void)flags;
    for (unsigned int i = 0; i < count && error == CUDA_SUCCESS; i++) {
        bool waits = ops[i].operation == CU_STREAM_MEM_OP_WAIT_VALUE_64;
        fake_must(waits || ops[i].operation == CU_STREAM_MEM_OP_WRITE_VALUE_64,
                  "only waits and writes are played");
        error = waits ? cuStreamWaitValue64(s, ops[i].waitValue.address, ops[i].waitValue.value64,
                                            ops[i].waitValue.flags)
                      : cuStreamWriteValue64(s, ops[i].writeValue.address,
                                             ops[i].writeValue.value64, ops[i].writeValue.flags);
    }
    return error;
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t bytes,
                                CUstream s) {
    if (!fake_inside(address, bytes, false)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return submit(s, &(struct op){.kind = FILL, .target = address, .value = value, .bytes = bytes});
}

EXPORT CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t bytes,
                                  CUstream s) {
    if (!fake_inside(target, bytes, false) || !fake_host_is_fine(source, bytes)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    struct op o = {.kind = COPY, .target = target, .source = (uintptr_t)source, .bytes = bytes};
    if (!fake_inside((uintptr_t)source, 1, true)) {
        o.staged = malloc(bytes);
        fake_must(o.staged != NULL, "no memory");
        memcpy(o.staged, source, bytes);
        o.source = (uintptr_t)o.staged;
    }
    return submit(s, &o);
}

EXPORT CUresult cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t bytes, CUstream s) {
    if (!fake_inside(source, bytes, false) || !fake_host_is_fine(target, bytes)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return submit(
        s,
        &(struct op){.kind = COPY, .target = (uintptr_t)target, .source = source, .bytes = bytes});
}

EXPORT CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes,
                                  CUstream s) {
    if (!fake_inside(target, bytes, false) || !fake_inside(source, bytes, false)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return submit(s,
                  &(struct op){.kind = COPY, .target = target, .source = source, .bytes = bytes});
}

/* With one address space for all: each side is in GPU memory, or in host memory. */
EXPORT CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream s) {
    bool to_gpu = fake_inside(target, 1, false);
    bool from_gpu = fake_inside(source, 1, false);
    if (to_gpu && from_gpu) {
        return cuMemcpyDtoDAsync(target, source, bytes, s);
    }
    return to_gpu ? cuMemcpyHtoDAsync(target, (const void *)(uintptr_t)source, bytes, s)
                  : cuMemcpyDtoHAsync((void *)(uintptr_t)target, source, bytes, s);
}

#if CUDA_VERSION >= 13000
/* The last first: nobody may count on their order. */
EXPORT CUresult cuMemcpyBatchAsync(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes,
                                   size_t count, CUmemcpyAttributes *attributes, size_t *firsts,
                                   size_t attribute_count, CUstream s) {
    CUresult error = attribute_count == 1 && firsts[0] == 0 &&
                             attributes[0].srcAccessOrder == CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
                         ? CUDA_SUCCESS
                         : CUDA_ERROR_INVALID_VALUE;
    while (count-- > 0 && error == CUDA_SUCCESS) {
        error = cuMemcpyAsync(targets[count], sources[count], sizes[count], s);
    }
    return error;
}
#endif

/* ---- events -------------------------------------------------------------------------------------- */

EXPORT CUresult cuEventCreate(CUevent *out, unsigned int flags) {
    (void)flags;
    *out = calloc(1, sizeof **out);
    return *out != NULL ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuEventDestroy(CUevent event) {
    free(event);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream s) {
    (void)__atomic_add_fetch(&event->recorded, 1, __ATOMIC_SEQ_CST);
    return submit(s, &(struct op){.kind = RECORD, .event = event});
}

EXPORT CUresult cuEventSynchronize(CUevent event) {
    while (fake_here() == CUDA_SUCCESS && __atomic_load_n(&event->done, __ATOMIC_ACQUIRE) <
                                              __atomic_load_n(&event->recorded, __ATOMIC_ACQUIRE)) {
        fake_pause_us(20);
    }
    return fake_here();
}

EXPORT CUresult cuEventElapsedTime(float *ms, CUevent begin, CUevent end) {
    *ms = (float)((double)(end->ns - begin->ns) / 1e6);
    return CUDA_SUCCESS;
}
