/* A CUDA stream of copies and posts, and how it is known what has come back.
 *
 * Behind what is submitted the stream itself writes a growing number into a word of pinned memory. So
 * looking for completions is a load: no call that could stall behind another thread's call into the
 * driver, no event to create or query. What is submitted in one go shares a number's write, and a
 * fill's last copy that of the post behind it: each write costs the copy engine a pause. For the same
 * reason copies are gathered and submitted as one batch, where the driver can: alone each costs some
 * 3 us between it and the next.
 *
 * Thread: all calls from one, with the context current, except create and free.
 */
#ifndef KVT_DEVICE_CUDA_STREAMS_H
#define KVT_DEVICE_CUDA_STREAMS_H

#include "cuda/cuda_api.h"
#include "tiers/device/device.h"

#include <stdbool.h>

#define KVT_CUDA_BATCH_MAX 64

struct kvt_cuda_stream {
    const struct kvt_cuda_api *api;
    CUstream stream;
    uint64_t *word;                     /* pinned, written by the GPU */
    CUdeviceptr word_gpu;               /* the same, as the GPU sees it */
    uint64_t submitted;                 /* numbers handed out */
    uint64_t written;                   /* of these, covered by a write that is enqueued */
    uint64_t completed;                 /* and taken back */
    uint32_t tags[KVT_DRIVER_TAGS_MAX]; /* by number modulo size */
    uint32_t gathered;                  /* copies that are not submitted yet */
    CUdeviceptr targets[KVT_CUDA_BATCH_MAX];
    CUdeviceptr sources[KVT_CUDA_BATCH_MAX];
    size_t sizes[KVT_CUDA_BATCH_MAX];
};

/* A failure leaves nothing behind; *call is what failed. */
CUresult kvt_cuda_stream_create(const struct kvt_cuda_api *api, struct kvt_cuda_stream *s,
                                const char **call);
/* Waits for what is under way. A stream that was never created is left alone. */
void kvt_cuda_stream_free(struct kvt_cuda_stream *s);

/* A copy between addresses as the GPU sees them, behind every post before; copies are in no order
 * among each other. It is submitted at the next post or flush, or earlier. */
CUresult kvt_cuda_stream_copy(struct kvt_cuda_stream *s, CUdeviceptr target, CUdeviceptr source,
                              uint64_t bytes);
/* The copies before are complete when `tag` comes back; not before a flush. */
void kvt_cuda_stream_mark(struct kvt_cuda_stream *s, uint32_t tag);
/* Submits the copies, and the write for what was marked and has none yet. */
CUresult kvt_cuda_stream_flush(struct kvt_cuda_stream *s);
/* Writes `value` to an address as the GPU sees it, behind everything before; `tag` comes back then. */
CUresult kvt_cuda_stream_post(struct kvt_cuda_stream *s, CUdeviceptr address, uint64_t value,
                              uint32_t tag);

/* Takes up to `max` tags that came back, in order. */
uint32_t kvt_cuda_stream_take(struct kvt_cuda_stream *s, uint32_t *tags, uint32_t max);
static inline bool kvt_cuda_stream_busy(const struct kvt_cuda_stream *s) {
    return s->completed != s->submitted;
}

#endif
