#include "tiers/device/cuda/streams.h"

#include "tiers/engine/assert.h"

#include <string.h>

#define WORD_BYTES 4096 /* a page of its own */

CUresult kvt_cuda_stream_create(const struct kvt_cuda_api *api, struct kvt_cuda_stream *s,
                                const char **call) {
    void *word = NULL;
    memset(s, 0, sizeof(*s));
    *call = "cuStreamCreate";
    CUresult error = api->cuStreamCreate(&s->stream, CU_STREAM_NON_BLOCKING);
    if (error != CUDA_SUCCESS) {
        return error;
    }
    s->api = api;
    *call = "cuMemHostAlloc";
    error = api->cuMemHostAlloc(&word, WORD_BYTES,
                                CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
    if (error == CUDA_SUCCESS) {
        memset(word, 0, WORD_BYTES);
        s->word = word;
        *call = "cuMemHostGetDevicePointer";
        error = api->cuMemHostGetDevicePointer(&s->word_gpu, word, 0);
    }
    if (error != CUDA_SUCCESS) {
        kvt_cuda_stream_free(s);
    }
    return error;
}

void kvt_cuda_stream_free(struct kvt_cuda_stream *s) {
    if (s->api == NULL) {
        return;
    }
    (void)s->api->cuStreamSynchronize(s->stream);
    (void)s->api->cuStreamDestroy(s->stream);
    if (s->word != NULL) {
        (void)s->api->cuMemFreeHost(s->word);
    }
    memset(s, 0, sizeof(*s));
}

static uint64_t number_of(struct kvt_cuda_stream *s, uint32_t tag) {
    KVT_ASSERT(s->submitted - s->completed < KVT_DRIVER_TAGS_MAX);
    uint64_t number = ++s->submitted;
    s->tags[number % KVT_DRIVER_TAGS_MAX] = tag;
    return number;
}

static CUresult submit_batch(struct kvt_cuda_stream *s) {
#if CUDA_VERSION >= 13000
    CUmemcpyAttributes how = {.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM};
    size_t first = 0;
    if (s->api->cuMemcpyBatchAsync != NULL && s->gathered > 1) {
        return s->api->cuMemcpyBatchAsync(s->targets, s->sources, s->sizes, s->gathered, &how,
                                          &first, 1, s->stream);
    }
#endif
    CUresult error = CUDA_SUCCESS;
    for (uint32_t i = 0; i < s->gathered && error == CUDA_SUCCESS; i++) {
        error = s->api->cuMemcpyAsync(s->targets[i], s->sources[i], s->sizes[i], s->stream);
    }
    return error;
}

static CUresult submit(struct kvt_cuda_stream *s) {
    CUresult error = s->gathered > 0 ? submit_batch(s) : CUDA_SUCCESS;
    s->gathered = 0;
    return error;
}

CUresult kvt_cuda_stream_copy(struct kvt_cuda_stream *s, CUdeviceptr target, CUdeviceptr source,
                              uint64_t bytes) {
    CUresult error = s->gathered == KVT_CUDA_BATCH_MAX ? submit(s) : CUDA_SUCCESS;
    s->targets[s->gathered] = target;
    s->sources[s->gathered] = source;
    s->sizes[s->gathered++] = bytes;
    return error;
}

void kvt_cuda_stream_mark(struct kvt_cuda_stream *s, uint32_t tag) {
    (void)number_of(s, tag);
}

CUresult kvt_cuda_stream_flush(struct kvt_cuda_stream *s) {
    CUresult error = submit(s);
    if (error != CUDA_SUCCESS || s->written == s->submitted) {
        return error;
    }
    s->written = s->submitted;
    return s->api->cuStreamWriteValue64(s->stream, s->word_gpu, s->written,
                                        CU_STREAM_WRITE_VALUE_DEFAULT);
}

CUresult kvt_cuda_stream_post(struct kvt_cuda_stream *s, CUdeviceptr address, uint64_t value,
                              uint32_t tag) {
    CUstreamBatchMemOpParams ops[2];
    CUresult error = submit(s);
    if (error != CUDA_SUCCESS) {
        return error;
    }
    memset(ops, 0, sizeof(ops));
    ops[0].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    ops[0].writeValue.address = address;
    ops[0].writeValue.value64 = value;
    ops[0].writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;
    ops[1] = ops[0];
    ops[1].writeValue.address = s->word_gpu;
    s->written = number_of(s, tag);
    ops[1].writeValue.value64 = s->written;
    return s->api->cuStreamBatchMemOp(s->stream, 2, ops, 0);
}

uint32_t kvt_cuda_stream_take(struct kvt_cuda_stream *s, uint32_t *tags, uint32_t max) {
    uint64_t reached = __atomic_load_n(s->word, __ATOMIC_ACQUIRE);
    uint32_t count = 0;
    while (s->completed < reached && s->completed < s->submitted && count < max) {
        s->completed++;
        tags[count++] = s->tags[s->completed % KVT_DRIVER_TAGS_MAX];
    }
    return count;
}
