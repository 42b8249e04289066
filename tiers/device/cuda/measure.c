/* Measuring a GPU's copies; see measure.h. A direction's first copy warms it up, and the best of some
 * more counts. Each is as large as the copies that are made later at most. */
#include "tiers/device/cuda/measure.h"

#include "proto/errors.h"

#include <stdio.h>

enum { TURNS = 5 };
#define PIECE_BYTES_MAX (UINT64_C(16) << 20)
#define PIECE_BYTES_MIN (UINT64_C(2) << 20)
/* On a slow link no turn begins after so long: some milliseconds were promised. */
#define ENOUGH_MS 20.0F

struct measuring {
    const struct kvt_cuda_api *api;
    CUstream stream;
    uint64_t bytes;
    CUdeviceptr gpu;
    void *host; /* pinned: it has the same address for the GPU */
    CUevent begin;
    CUevent end;
    const char *call; /* the last one */
};

static CUresult copy(struct measuring *m, bool to, float *ms) {
    CUdeviceptr host = (CUdeviceptr)(uintptr_t)m->host;
    m->call = "cuEventRecord";
    CUresult error = m->api->cuEventRecord(m->begin, m->stream);
    if (error == CUDA_SUCCESS) {
        m->call = "cuMemcpyAsync";
        error = m->api->cuMemcpyAsync(to ? m->gpu : host, to ? host : m->gpu, m->bytes, m->stream);
    }
    if (error == CUDA_SUCCESS) {
        m->call = "cuEventRecord";
        error = m->api->cuEventRecord(m->end, m->stream);
    }
    if (error == CUDA_SUCCESS) {
        m->call = "cuStreamSynchronize";
        error = m->api->cuStreamSynchronize(m->stream);
    }
    if (error == CUDA_SUCCESS) {
        m->call = "cuEventElapsedTime";
        error = m->api->cuEventElapsedTime(ms, m->begin, m->end);
    }
    return error;
}

static CUresult direction(struct measuring *m, bool to, uint64_t *bytes_per_s) {
    float best_ms = 0;
    float sum_ms = 0;
    float ms = 0;
    CUresult error = copy(m, to, &ms);
    for (int turn = 0; turn < TURNS && error == CUDA_SUCCESS && sum_ms < ENOUGH_MS; turn++) {
        error = copy(m, to, &ms);
        sum_ms += ms;
        best_ms = best_ms == 0 || ms < best_ms ? ms : best_ms;
    }
    if (error == CUDA_SUCCESS && best_ms > 0) {
        *bytes_per_s = (uint64_t)((double)m->bytes * 1e3 / (double)best_ms);
    }
    return error;
}

static CUresult prepare(struct measuring *m) {
    m->call = "cuMemAlloc";
    CUresult error = m->api->cuMemAlloc(&m->gpu, m->bytes);
    if (error == CUDA_SUCCESS) {
        m->call = "cuMemHostAlloc";
        error = m->api->cuMemHostAlloc(&m->host, m->bytes, CU_MEMHOSTALLOC_PORTABLE);
    }
    if (error == CUDA_SUCCESS) {
        m->call = "cuEventCreate";
        error = m->api->cuEventCreate(&m->begin, CU_EVENT_DEFAULT);
    }
    if (error == CUDA_SUCCESS) {
        error = m->api->cuEventCreate(&m->end, CU_EVENT_DEFAULT);
    }
    return error;
}

/* The stream has ended what it was given, or the GPU is lost. */
static void clear(struct measuring *m) {
    if (m->end != NULL) {
        (void)m->api->cuEventDestroy(m->end);
    }
    if (m->begin != NULL) {
        (void)m->api->cuEventDestroy(m->begin);
    }
    if (m->host != NULL) {
        (void)m->api->cuMemFreeHost(m->host);
    }
    if (m->gpu != 0) {
        (void)m->api->cuMemFree(m->gpu);
    }
}

int kvt_cuda_measure(const struct kvt_cuda_api *api, CUstream stream, uint64_t bytes_max,
                     struct kvt_link *out, char *text) {
    struct measuring m = {.api = api, .stream = stream};
    struct kvt_link link = {0};
    char reason[KVT_CUDA_TEXT_BYTES];
    m.bytes = bytes_max < PIECE_BYTES_MAX ? bytes_max : PIECE_BYTES_MAX;
    if (m.bytes < PIECE_BYTES_MIN) {
        *out = link;
        return 0;
    }
    CUresult error = prepare(&m);
    if (error == CUDA_SUCCESS) {
        error = direction(&m, true, &link.to_bytes_per_s);
    }
    if (error == CUDA_SUCCESS) {
        error = direction(&m, false, &link.from_bytes_per_s);
    }
    if (error != CUDA_SUCCESS) {
        snprintf(text, KVT_TEXT_BYTES, "device cuda: measuring: %s: %s", m.call,
                 kvt_cuda_error(api, error, reason));
    }
    clear(&m);
    if (error != CUDA_SUCCESS) {
        return error == CUDA_ERROR_OUT_OF_MEMORY ? -KVT_EQUOTA : -KVT_EDEVICE;
    }
    *out = link;
    return 0;
}
