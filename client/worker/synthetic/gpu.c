#include "client/worker/synthetic/gpu.h"

#include "client/kvtier.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if KVT_WITH_CUDA

#include "cuda/cuda_api.h"
#include "kernels/synth_gpu.h"

#define MARKS_MAX     128 /* a schedule has at most 64 steps */
#define AGAIN_MAX     100
#define PIECE_BYTES   (UINT64_C(16) << 20)
#define PINNED_BYTES  (UINT64_C(512) << 20)
#define BLOCKS_PER_SM 8

/* A launch, or (f NULL) the copy of content numbers that a step begins with. */
struct noted {
    CUfunction f;
    struct kvt_synth_gpu_job job;
    CUdeviceptr target;
    const void *source;
    uint64_t bytes;
};

struct kvt_synth_gpu {
    const struct kvt_cuda_api *api;
    CUdevice device;
    CUcontext context;
    CUstream stream;
    CUmodule module;
    CUfunction check;
    CUfunction write;
    CUfunction spin;
    uint32_t blocks_max;
    struct kvt_synth_gpu_errors *errors; /* pinned */
    CUdeviceptr errors_gpu;
    CUevent marks[MARKS_MAX];
    uint32_t mark_count;
    bool timed;
    double begin_us;
    uint64_t moved_bytes;
    struct kvt_synth_samples times;
    bool noting;
    struct noted *noted;
    uint32_t noted_count;
    uint32_t noted_capacity;
};

/* The image that the build put in; see mk/build.mk. */
extern const char kvt_synth_gpu_image[];

static struct kvt_synth_gpu *opened; /* for kvt_synth_row_forget */

static int failed(const struct kvt_synth_gpu *g, const char *call, CUresult error) {
    char text[KVT_CUDA_TEXT_BYTES];
    (void)fprintf(stderr, "kvtier-synth: gpu: %s: %s\n", call, kvt_cuda_error(g->api, error, text));
    return -KVT_EDEVICE;
}

/* Calls are made in a row until one fails; that one is named. */
#define TRY(call_)                            \
    do {                                      \
        CUresult error_ = g->api->call_;      \
        if (error_ != CUDA_SUCCESS) {         \
            return failed(g, #call_, error_); \
        }                                     \
    } while (0)

/* ---- open and close --------------------------------------------------------------------------- */

static void row_forget(uint64_t ids) {
    if (opened != NULL && ids != 0) {
        (void)opened->api->cuMemFree((CUdeviceptr)ids);
    }
}

static int load(struct kvt_synth_gpu *g) {
    TRY(cuModuleLoadData(&g->module, kvt_synth_gpu_image));
    TRY(cuModuleGetFunction(&g->check, g->module, "kvt_synth_gpu_check"));
    TRY(cuModuleGetFunction(&g->write, g->module, "kvt_synth_gpu_write"));
    TRY(cuModuleGetFunction(&g->spin, g->module, "kvt_synth_gpu_spin"));
    return 0;
}

static int note(struct kvt_synth_gpu *g, struct noted n) {
    if (!g->noting) {
        return 0;
    }
    if (g->noted_count == g->noted_capacity) {
        uint32_t capacity = g->noted_capacity == 0 ? 256 : 2 * g->noted_capacity;
        struct noted *noted = realloc(g->noted, capacity * sizeof *noted);
        if (noted == NULL) {
            return -KVT_ENOMEM;
        }
        g->noted = noted;
        g->noted_capacity = capacity;
    }
    g->noted[g->noted_count++] = n;
    return 0;
}

static int launch(struct kvt_synth_gpu *g, CUfunction f, const struct kvt_synth_gpu_job *job) {
    struct kvt_synth_gpu_job j = *job;
    void *parameters[] = {&j};
    uint64_t words = (uint64_t)j.count * ((j.token_bytes + 7) / 8);
    uint64_t blocks = (words + KVT_SYNTH_GPU_THREADS - 1) / KVT_SYNTH_GPU_THREADS;
    blocks = blocks < g->blocks_max ? blocks : g->blocks_max;
    bool spins = f == g->spin;
    j.errors = (struct kvt_synth_gpu_errors *)(uintptr_t)g->errors_gpu;
    TRY(cuLaunchKernel(f, spins || blocks == 0 ? 1 : (unsigned)blocks, 1, 1,
                       spins ? 1 : KVT_SYNTH_GPU_THREADS, 1, 1, 0, g->stream, parameters, NULL));
    return note(g, (struct noted){.f = f, .job = j});
}

/* A kernel's first launch loads it, and would stall behind a wait: so once here, for nothing. */
static int warm_up(struct kvt_synth_gpu *g) {
    struct kvt_synth_gpu_job nothing = {.token_bytes = 8};
    int rc = launch(g, g->check, &nothing);
    if (rc == 0) {
        rc = launch(g, g->write, &nothing);
    }
    if (rc == 0) {
        rc = launch(g, g->spin, &nothing);
    }
    if (rc == 0) {
        TRY(cuStreamSynchronize(g->stream));
    }
    return rc;
}

static int furnish(struct kvt_synth_gpu *g) {
    int processors = 1;
    void *errors;
    TRY(cuDevicePrimaryCtxRetain(&g->context, g->device));
    TRY(cuCtxSetCurrent(g->context));
    TRY(cuDeviceGetAttribute(&processors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, g->device));
    TRY(cuStreamCreate(&g->stream, CU_STREAM_NON_BLOCKING));
    TRY(cuMemHostAlloc(&errors, sizeof *g->errors, CU_MEMHOSTALLOC_DEVICEMAP));
    memset(errors, 0, sizeof *g->errors);
    g->errors = errors;
    TRY(cuMemHostGetDevicePointer(&g->errors_gpu, errors, 0));
    for (uint32_t i = 0; i < MARKS_MAX; i++) {
        TRY(cuEventCreate(&g->marks[i], CU_EVENT_DEFAULT));
    }
    g->blocks_max = (uint32_t)processors * BLOCKS_PER_SM;
    int rc = load(g);
    return rc == 0 ? warm_up(g) : rc;
}

int kvt_synth_gpu_open(const uint8_t *uuid, struct kvt_synth_gpu **out) {
    char text[KVT_CUDA_TEXT_BYTES];
    struct kvt_synth_gpu *g = calloc(1, sizeof *g);
    if (g == NULL) {
        return -KVT_ENOMEM;
    }
    g->api = kvt_cuda_open(text);
    if (g->api == NULL || kvt_cuda_find(g->api, uuid, &g->device, text) != CUDA_SUCCESS) {
        (void)fprintf(stderr, "kvtier-synth: gpu: %s\n", text);
        free(g);
        return -KVT_ENOTSUP;
    }
    int rc = furnish(g);
    if (rc != 0) {
        kvt_synth_gpu_close(g);
        return rc;
    }
    opened = g;
    kvt_synth_row_forget = row_forget;
    *out = g;
    return 0;
}

void kvt_synth_gpu_close(struct kvt_synth_gpu *g) {
    if (g == NULL) {
        return;
    }
    if (g->stream != NULL) {
        (void)g->api->cuStreamSynchronize(g->stream);
        (void)g->api->cuStreamDestroy(g->stream);
    }
    for (uint32_t i = 0; i < MARKS_MAX && g->marks[i] != NULL; i++) {
        (void)g->api->cuEventDestroy(g->marks[i]);
    }
    if (g->errors != NULL) {
        (void)g->api->cuMemFreeHost(g->errors);
    }
    if (g->context != NULL) {
        (void)g->api->cuDevicePrimaryCtxRelease(g->device);
    }
    opened = NULL;
    kvt_synth_row_forget = NULL;
    kvt_synth_samples_free(&g->times);
    free(g->noted);
    free(g);
}

void *kvt_synth_gpu_stream(struct kvt_synth_gpu *g) {
    return g->stream;
}

/* ---- rows ------------------------------------------------------------------------------------- */

static int reserve(struct kvt_synth_gpu *g, struct kvt_synth_row *r, uint32_t tokens_max) {
    uint32_t capacity = r->count > tokens_max ? 2 * r->count : tokens_max;
    CUdeviceptr ids;
    if (r->count <= r->gpu_capacity) {
        return 0;
    }
    TRY(cuStreamSynchronize(g->stream)); /* kernels read the old ones */
    row_forget(r->gpu_ids);
    r->gpu_ids = 0;
    r->gpu_count = 0;
    r->gpu_capacity = 0;
    TRY(cuMemAlloc(&ids, capacity * sizeof *r->ids));
    r->gpu_ids = ids;
    r->gpu_capacity = capacity;
    return 0;
}

int kvt_synth_gpu_row(struct kvt_synth_gpu *g, struct kvt_synth_row *r, uint32_t tokens_max) {
    int rc = reserve(g, r, tokens_max);
    if (rc != 0 || r->gpu_count >= r->count) {
        return rc;
    }
    struct noted n = {.target = r->gpu_ids + r->gpu_count * sizeof *r->ids,
                      .source = r->ids + r->gpu_count,
                      .bytes = (r->count - r->gpu_count) * sizeof *r->ids};
    TRY(cuMemcpyHtoDAsync(n.target, n.source, n.bytes, g->stream));
    r->gpu_count = r->count;
    return note(g, n);
}

/* ---- kernels ---------------------------------------------------------------------------------- */

static int launch_job(struct kvt_synth_gpu *g, CUfunction f, const struct kvt_synth_row *r,
                      uint32_t first, uint32_t count, uint32_t layer, enum kvt_synth_plane plane,
                      uint32_t token_bytes, uintptr_t at) {
    struct kvt_synth_gpu_job j = {.ids = (const uint64_t *)(uintptr_t)(r->gpu_ids +
                                                                       first * sizeof *r->ids),
                                  .plane = (uint8_t *)at,
                                  .first = first,
                                  .count = count,
                                  .layer = layer,
                                  .plane_index = plane,
                                  .token_bytes = token_bytes};
    return count == 0 || token_bytes == 0 ? 0 : launch(g, f, &j);
}

int kvt_synth_gpu_check(struct kvt_synth_gpu *g, const struct kvt_synth_row *r, uint32_t first,
                        uint32_t count, uint32_t layer, enum kvt_synth_plane plane,
                        uint32_t token_bytes, const void *at) {
    return launch_job(g, g->check, r, first, count, layer, plane, token_bytes, (uintptr_t)at);
}

int kvt_synth_gpu_write(struct kvt_synth_gpu *g, const struct kvt_synth_row *r, uint32_t first,
                        uint32_t count, uint32_t layer, enum kvt_synth_plane plane,
                        uint32_t token_bytes, void *at) {
    return launch_job(g, g->write, r, first, count, layer, plane, token_bytes, (uintptr_t)at);
}

int kvt_synth_gpu_spin(struct kvt_synth_gpu *g, uint32_t us) {
    struct kvt_synth_gpu_job j = {.count = us, .token_bytes = 8};
    return launch(g, g->spin, &j);
}

/* ---- time ------------------------------------------------------------------------------------- */

int kvt_synth_gpu_mark(struct kvt_synth_gpu *g) {
    if (g->mark_count == MARKS_MAX) {
        return 0; /* more steps than a schedule can have: not timed */
    }
    TRY(cuEventRecord(g->marks[g->mark_count], g->stream));
    g->mark_count++;
    return 0;
}

void kvt_synth_gpu_began(struct kvt_synth_gpu *g, double begin_us, uint64_t moved_bytes) {
    g->begin_us = begin_us;
    g->moved_bytes = moved_bytes;
}

int kvt_synth_gpu_time(struct kvt_synth_gpu *g) {
    g->timed = true;
    g->mark_count = 0;
    kvt_synth_samples_forget(&g->times);
    return kvt_synth_gpu_mark(g);
}

void kvt_synth_gpu_time_end(struct kvt_synth_gpu *g) {
    g->timed = false;
}

/* The stream is idle, as it is behind each schedule: the last mark becomes the first of what comes. */
static int read_marks(struct kvt_synth_gpu *g) {
    for (uint32_t i = 1; i < g->mark_count; i++) {
        float ms = 0;
        TRY(cuEventElapsedTime(&ms, g->marks[i - 1], g->marks[i]));
        if (g->timed) {
            struct kvt_synth_sample sample = {.us = 1000.0 * (double)ms, .first = i == 1};
            sample.begin_us = sample.first ? g->begin_us : 0;
            sample.moved_bytes = sample.first ? g->moved_bytes : 0;
            kvt_synth_samples_keep_sample(&g->times, sample);
        }
    }
    if (g->mark_count > 1) {
        CUevent last = g->marks[g->mark_count - 1];
        g->marks[g->mark_count - 1] = g->marks[0];
        g->marks[0] = last;
        g->mark_count = 1;
    }
    return 0;
}

struct kvt_synth_samples *kvt_synth_gpu_times(struct kvt_synth_gpu *g) {
    return &g->times;
}

int kvt_synth_gpu_sync(struct kvt_synth_gpu *g, struct kvt_synth_gpu_found *out) {
    memset(out, 0, sizeof *out);
    TRY(cuStreamSynchronize(g->stream));
    const struct kvt_synth_gpu_errors e = *g->errors;
    memset(g->errors, 0, sizeof *g->errors);
    out->wrong = e.count;
    if (e.count > 0) {
        (void)snprintf(out->text, sizeof out->text,
                       "layer %u token %u %s offset %u: expected %016" PRIx64 ", found %016" PRIx64
                       ", and %" PRIu64 " words more",
                       e.layer, e.token, e.plane == KVT_SYNTH_K ? "K" : "V", e.offset, e.expected,
                       e.found, e.count - 1);
    }
    return read_marks(g);
}

void kvt_synth_gpu_note(struct kvt_synth_gpu *g, bool noting) {
    g->noting = noting;
    g->noted_count = 0;
}

static int launch_noted(struct kvt_synth_gpu *g) {
    int rc = 0;
    for (uint32_t i = 0; i < g->noted_count && rc == 0; i++) {
        const struct noted *n = &g->noted[i];
        if (n->f != NULL) {
            rc = launch(g, n->f, &n->job);
        } else {
            TRY(cuMemcpyHtoDAsync(n->target, n->source, n->bytes, g->stream));
        }
    }
    return rc;
}

int kvt_synth_gpu_again(struct kvt_synth_gpu *g, uint32_t times, double *us) {
    CUevent *marks = &g->marks[MARKS_MAX - AGAIN_MAX - 1]; /* the schedule is a short one */
    struct kvt_synth_samples samples = {0};
    struct kvt_synth_summary t;
    float ms;
    g->noting = false;
    TRY(cuStreamSynchronize(g->stream));
    TRY(cuEventRecord(marks[0], g->stream));
    for (uint32_t i = 1; i <= times; i++) {
        int rc = launch_noted(g);
        if (rc != 0) {
            return rc;
        }
        TRY(cuEventRecord(marks[i], g->stream));
    }
    TRY(cuStreamSynchronize(g->stream));
    for (uint32_t i = 1; i <= times; i++) {
        CUresult error = g->api->cuEventElapsedTime(&ms, marks[i - 1], marks[i]);
        if (error != CUDA_SUCCESS) {
            kvt_synth_samples_free(&samples);
            return failed(g, "cuEventElapsedTime", error);
        }
        kvt_synth_samples_keep(&samples, 1000.0 * (double)ms);
    }
    kvt_synth_samples_sum_up(&samples, &t);
    kvt_synth_samples_free(&samples);
    *us = t.p50_us;
    return 0;
}

static int bus(struct kvt_synth_gpu *g, const uint8_t *host, CUdeviceptr device, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += PIECE_BYTES) {
        uint64_t left = bytes - at;
        TRY(cuMemcpyHtoDAsync(device + at % (4 * PIECE_BYTES), host + at % PINNED_BYTES,
                              left < PIECE_BYTES ? left : PIECE_BYTES, g->stream));
    }
    return 0;
}

static int time_bus(struct kvt_synth_gpu *g, const uint8_t *host, CUdeviceptr device,
                    uint64_t bytes, double *seconds) {
    float ms = 0;
    uint32_t begin = MARKS_MAX - 2; /* no schedule is open: these are free */
    int rc = bus(g, host, device, bytes < PINNED_BYTES ? bytes : PINNED_BYTES); /* wakes the link */
    if (rc != 0) {
        return rc;
    }
    TRY(cuEventRecord(g->marks[begin], g->stream));
    rc = bus(g, host, device, bytes);
    if (rc != 0) {
        return rc;
    }
    TRY(cuEventRecord(g->marks[begin + 1], g->stream));
    TRY(cuStreamSynchronize(g->stream));
    TRY(cuEventElapsedTime(&ms, g->marks[begin], g->marks[begin + 1]));
    *seconds = (double)ms / 1000.0;
    return 0;
}

int kvt_synth_gpu_limit(struct kvt_synth_gpu *g, uint64_t bytes, double *seconds) {
    void *host = NULL;
    CUdeviceptr device = 0;
    TRY(cuMemHostAlloc(&host, PINNED_BYTES, 0));
    CUresult error = g->api->cuMemAlloc(&device, 4 * PIECE_BYTES);
    int rc = error == CUDA_SUCCESS ? time_bus(g, host, device, bytes, seconds)
                                   : failed(g, "cuMemAlloc", error);
    if (error == CUDA_SUCCESS) {
        (void)g->api->cuMemFree(device);
    }
    (void)g->api->cuMemFreeHost(host);
    return rc;
}

#else /* built without CUDA: it cannot be opened, and so nothing else is called */

int kvt_synth_gpu_open(const uint8_t *uuid, struct kvt_synth_gpu **out) {
    (void)uuid;
    (void)out;
    (void)fprintf(stderr, "kvtier-synth: gpu: this program was built without CUDA; install nvcc "
                          "and build it again\n");
    return -KVT_ENOTSUP;
}

void kvt_synth_gpu_close(struct kvt_synth_gpu *g) {
    (void)g;
}

void *kvt_synth_gpu_stream(struct kvt_synth_gpu *g) {
    (void)g;
    return NULL;
}

int kvt_synth_gpu_row(struct kvt_synth_gpu *g, struct kvt_synth_row *r, uint32_t tokens_max) {
    (void)g;
    (void)r;
    (void)tokens_max;
    return -KVT_ENOTSUP;
}

int kvt_synth_gpu_check(struct kvt_synth_gpu *g, const struct kvt_synth_row *r, uint32_t first,
                        uint32_t count, uint32_t layer, enum kvt_synth_plane plane,
                        uint32_t token_bytes, const void *at) {
    (void)g, (void)r, (void)first, (void)count, (void)layer, (void)plane, (void)token_bytes;
    (void)at;
    return -KVT_ENOTSUP;
}

int kvt_synth_gpu_write(struct kvt_synth_gpu *g, const struct kvt_synth_row *r, uint32_t first,
                        uint32_t count, uint32_t layer, enum kvt_synth_plane plane,
                        uint32_t token_bytes, void *at) {
    return kvt_synth_gpu_check(g, r, first, count, layer, plane, token_bytes, at);
}

int kvt_synth_gpu_spin(struct kvt_synth_gpu *g, uint32_t us) {
    (void)g;
    (void)us;
    return -KVT_ENOTSUP;
}

int kvt_synth_gpu_mark(struct kvt_synth_gpu *g) {
    (void)g;
    return -KVT_ENOTSUP;
}

void kvt_synth_gpu_began(struct kvt_synth_gpu *g, double begin_us, uint64_t moved_bytes) {
    (void)g;
    (void)begin_us;
    (void)moved_bytes;
}

int kvt_synth_gpu_time(struct kvt_synth_gpu *g) {
    (void)g;
    return -KVT_ENOTSUP;
}

int kvt_synth_gpu_sync(struct kvt_synth_gpu *g, struct kvt_synth_gpu_found *out) {
    (void)g;
    (void)out;
    return -KVT_ENOTSUP;
}

void kvt_synth_gpu_note(struct kvt_synth_gpu *g, bool noting) {
    (void)g;
    (void)noting;
}

int kvt_synth_gpu_again(struct kvt_synth_gpu *g, uint32_t times, double *us) {
    (void)g;
    (void)times;
    (void)us;
    return -KVT_ENOTSUP;
}

int kvt_synth_gpu_limit(struct kvt_synth_gpu *g, uint64_t bytes, double *seconds) {
    (void)g;
    (void)bytes;
    (void)seconds;
    return -KVT_ENOTSUP;
}

void kvt_synth_gpu_time_end(struct kvt_synth_gpu *g) {
    (void)g;
}

struct kvt_synth_samples *kvt_synth_gpu_times(struct kvt_synth_gpu *g) {
    (void)g;
    return NULL;
}

#endif
