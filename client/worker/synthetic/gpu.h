/* kvtier-synth on a GPU: its stream, its kernels (kernels/synth_gpu.h), and what is timed there.
 *
 * Everything is enqueued on one stream, in the order of the calls, and nothing waits for the GPU
 * except kvt_synth_gpu_sync, kvt_synth_gpu_again, kvt_synth_gpu_limit and close. A failure is said on stderr and comes back
 * as -KVT_ENOTSUP (there is no GPU to use) or -KVT_EDEVICE.
 */
#ifndef KVT_SYNTH_GPU_H
#define KVT_SYNTH_GPU_H

#include "client/worker/synthetic/model.h"
#include "client/worker/synthetic/samples.h"

struct kvt_synth_gpu;

/* The GPU with this UUID (16 bytes), NULL: the first; its primary context becomes current. */
int kvt_synth_gpu_open(const uint8_t *uuid, struct kvt_synth_gpu **out);
void kvt_synth_gpu_close(struct kvt_synth_gpu *g); /* NULL is fine */
/* The CUstream, for kvt_attach_options. */
void *kvt_synth_gpu_stream(struct kvt_synth_gpu *g);

/* Brings the row's content numbers to the GPU, as far as they are not there yet. */
int kvt_synth_gpu_row(struct kvt_synth_gpu *g, struct kvt_synth_row *r, uint32_t tokens_max);
/* Tokens [first, first + count) of a row, at `at` on the device. */
int kvt_synth_gpu_check(struct kvt_synth_gpu *g, const struct kvt_synth_row *r, uint32_t first,
                        uint32_t count, uint32_t layer, enum kvt_synth_plane plane,
                        uint32_t token_bytes, const void *at);
int kvt_synth_gpu_write(struct kvt_synth_gpu *g, const struct kvt_synth_row *r, uint32_t first,
                        uint32_t count, uint32_t layer, enum kvt_synth_plane plane,
                        uint32_t token_bytes, void *at);
/* The stream is busy for so long. */
int kvt_synth_gpu_spin(struct kvt_synth_gpu *g, uint32_t us);

/* A step ends here: the time between two such marks is the later step's. */
int kvt_synth_gpu_mark(struct kvt_synth_gpu *g);
/* Of the first step since kvt_synth_gpu_sync; see samples.h. */
void kvt_synth_gpu_began(struct kvt_synth_gpu *g, double begin_us, uint64_t moved_bytes);
/* Forgets the times so far, and begins to keep them; the first step that is timed is the next one. */
int kvt_synth_gpu_time(struct kvt_synth_gpu *g);
void kvt_synth_gpu_time_end(struct kvt_synth_gpu *g);

struct kvt_synth_gpu_found {
    uint64_t wrong; /* words that differed since the last call */
    char text[200]; /* the first of them */
};
/* Waits for the stream. */
int kvt_synth_gpu_sync(struct kvt_synth_gpu *g, struct kvt_synth_gpu_found *out);

/* Whether what is launched is noted from now on; what was noted before is forgotten. */
void kvt_synth_gpu_note(struct kvt_synth_gpu *g, bool noting);
/* Launches what was noted once more, `times` times (1 to 100), and notes no more. *us: the median time.
 * Waits for the stream. */
int kvt_synth_gpu_again(struct kvt_synth_gpu *g, uint32_t times, double *us);

/* Seconds in which so many bytes come over the bus from pinned memory in pieces of 16 MiB. */
int kvt_synth_gpu_limit(struct kvt_synth_gpu *g, uint64_t bytes, double *seconds);

/* The steps that were timed. */
struct kvt_synth_samples *kvt_synth_gpu_times(struct kvt_synth_gpu *g);

#endif
