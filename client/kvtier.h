/* kvtier.h: the client library of kvtierd, the KV-cache service. The only public header.
 *
 * A worker attaches, creates a cache for its model's layout, and for every forward pass (step) asks
 * for a schedule: the pieces of device memory that hold each layer's K and V, in the order of use,
 * with the values to wait for and to post. Between layers and between the steps of one schedule no
 * message is exchanged.
 *
 *     struct kvt_client *c;
 *     struct kvt_step *s;
 *     const struct kvt_piece *p;
 *     kvt_attach(&(struct kvt_attach_options){.worker = KVT_SEGMENT}, &c);
 *     kvt_cache_create(c, &options, &cache);
 *     kvt_step_begin(c, cache, NULL, 0, n, 1, &s);
 *     while (kvt_step_piece(s, &p) == 1) {       // pieces in order of use
 *         kvt_piece_wait(s, p);                  // until its bytes are there
 *         ... append the new tokens' K and V, attend ...
 *         kvt_piece_done(s, p);
 *     }
 *     kvt_step_end(s);                           // the results may be used
 *
 * Errors: functions return 0 (or a count) or a negative KVT_E... code; kvt_error_message(client)
 * has the sentence for a person: what failed, on what, why, what to do. Out-parameters are written
 * only on success.
 *
 * On a GPU (device_kind KVT_DEVICE_CUDA) the worker names its stream at attach, and a step is enqueued
 * ahead of it: kvt_piece_wait makes the stream wait, kvt_piece_done, kvt_step_end and kvt_step_abort
 * post behind what is on the stream, and none of them waits for the GPU. Pieces are device addresses.
 * A worker with several streams joins them into that one before each of these calls. The results of
 * a step may be used once the stream has come so far and kvt_cache_check, asked after that, has
 * returned 0. The GPU is the stream's; of the daemon's devices the one with its UUID is used. About
 * 1,000 operations fit on a stream behind a wait; then the call that enqueues one more waits. libcuda
 * is opened at run time: a program that links the library starts without it.
 *
 * Threads: a client is used by one thread at a time. The library has a thread of its own that
 * serves the attach socket (extents, reclaim, hang-up).
 *
 * Waits: kvt_piece_wait, kvt_acquire, and kvt_cache_settle with a negative time, wait as long as
 * the daemon lives, also for one that is stopped (SIGSTOP, a debugger); kvt_interrupt ends them.
 *
 * Death of the daemon: calls return -KVT_EGONE, waits end. Nothing of the session exists any more;
 * detach, attach again, create again. kvt_attach waits for the daemon up to timeout_ms.
 *
 * fork(2): a child must not use the client (each call returns -KVT_ESTATE); its file descriptors are
 * close-on-exec, its mappings are not inherited.
 */
#ifndef KVTIER_H
#define KVTIER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define KVTIER_API   __attribute__((visibility("default")))
#define KVTIER_CHECK __attribute__((warn_unused_result))
#else
#define KVTIER_API
#define KVTIER_CHECK
#endif

#define KVTIER_VERSION_MAJOR 0
#define KVTIER_VERSION_MINOR 1
#define KVTIER_VERSION_PATCH 0

struct kvt_client;
struct kvt_step;

/* Error codes; functions return them negative. The same list as the protocol's (proto/errors.h,
 * which leaves its own out if this one is there); numbers never change meaning. */
#ifndef KVT_ERROR_CODES
#define KVT_ERROR_CODES
enum kvt_error {
    KVT_OK = 0,
    KVT_EINVAL = 1,     /* an argument is outside its accepted range */
    KVT_ENOMEM = 2,     /* out of ordinary process memory */
    KVT_EBUSY = 3,      /* a bounded queue or table is full; finish or close something */
    KVT_EQUOTA = 4,     /* a memory budget is exhausted */
    KVT_ENOENT = 5,     /* no such object */
    KVT_EPROTO = 6,     /* a message is malformed or out of order */
    KVT_EVERSION = 7,   /* protocol versions do not match */
    KVT_EPERM = 8,      /* not permitted for this user */
    KVT_EGONE = 9,      /* the daemon is gone; attach again */
    KVT_EABORTED = 10,  /* the step was aborted */
    KVT_EFAILED = 11,   /* the step failed and was not committed */
    KVT_ETIMEDOUT = 12, /* the deadline passed */
    KVT_EIO = 13,       /* an input/output error */
    KVT_ETOOBIG = 14,   /* larger than the protocol's limit */
    KVT_ENOTSUP = 15,   /* not supported by this build or device */
    KVT_ESTATE = 16,    /* not allowed in the current state */
    KVT_EEXIST = 17,    /* already exists */
    KVT_EEVICTED = 18,  /* the cache was evicted by an administrator */
    KVT_EDEVICE = 19,   /* the device reported an error */
    KVT_ECONFIG = 20,   /* the configuration is not usable */
    KVT_ESYS = 21,      /* a system call failed */
};
#endif

/* Same numbers as on the wire. */
enum { KVT_SEGMENT = 1, KVT_DENSE = 2 };                           /* worker */
enum { KVT_DTYPE_F32 = 1, KVT_DTYPE_F16 = 2, KVT_DTYPE_BF16 = 3 }; /* dtype */
enum { KVT_KIND_FULL = 1 };                                        /* layer kind */
enum { KVT_DEVICE_CPU = 0, KVT_DEVICE_CUDA = 1 };                  /* device_kind */
enum { KVT_DYNAMIC = 1, KVT_STATIC = 2, KVT_OFFLOADED = 3, KVT_OFFLOADED_STATIC = 4 }; /* mode */

struct kvt_attach_options {
    const char *runtime_dir; /* NULL: $KVTIER_RUNTIME_DIR, or /run/kvtierd */
    int worker;              /* KVT_SEGMENT or KVT_DENSE */
    const char *name;        /* shown to people; NULL: the program's name */
    const uint8_t *device;   /* 16 bytes, UUID of the device; NULL: the daemon's first */
    int timeout_ms;          /* wait so long for the daemon to answer; 0: 5,000 */
    int request_timeout_ms;  /* nothing heard of a request for so long: -KVT_EGONE; 0: 30,000 */
    int device_kind;         /* KVT_DEVICE_CPU or KVT_DEVICE_CUDA: see "On a GPU" above */
    void *stream;            /* KVT_DEVICE_CUDA: the worker's CUstream, borrowed until kvt_detach */
};

/* Attaches. On failure *out is still written with an object that only kvt_error_message and
 * kvt_detach accept, so that the reason can be read; NULL only if there is no memory. */
KVTIER_API int kvt_attach(const struct kvt_attach_options *o, struct kvt_client **out) KVTIER_CHECK;
/* Closes all caches, unmaps, frees. An open step must have been ended or aborted. NULL is fine. */
KVTIER_API void kvt_detach(struct kvt_client *c);
/* Gives the session up: a call that waits, and each later one, returns -KVT_EGONE. For any thread
 * and for signal handlers, between the success of kvt_attach and kvt_detach: a wait for a daemon
 * that is alive and does nothing (stopped by SIGSTOP, say) has no other end. NULL is fine. */
KVTIER_API void kvt_interrupt(struct kvt_client *c);

/* The last failure of this client, for a person. Never NULL; valid until the next call. */
KVTIER_API const char *kvt_error_message(const struct kvt_client *c);
/* The text and the name of a code of either sign. Never NULL. */
KVTIER_API const char *kvt_error_text(int code);
KVTIER_API const char *kvt_error_name(int code);
/* "0.1.0" */
KVTIER_API const char *kvt_version(void);

struct kvt_layer_shape {
    uint32_t kind;        /* KVT_KIND_FULL */
    uint32_t kv_heads;    /* heads of K and V */
    uint32_t k_head_dim;  /* elements */
    uint32_t v_head_dim;  /* elements; 0: no V */
    uint32_t dtype;       /* KVT_DTYPE_... */
    uint32_t last_reader; /* 0: only the layer itself; otherwise the last layer that reads its KV */
};

struct kvt_cache_create_options {
    const struct kvt_layer_shape *layers; /* layer_count of them */
    uint32_t layer_count;
    uint32_t mode;         /* KVT_DYNAMIC ... */
    uint32_t rows;         /* sequences; 0: 1 */
    uint32_t tokens_max;   /* a row's tokens; needed by static modes; 0: no limit */
    uint32_t append_max;   /* the most tokens that one step appends to a row; 0: 1 */
    uint32_t piece_tokens; /* segment workers: at most so many tokens a piece; 0: daemon chooses */
    int64_t resident_layers_max; /* -1: the mode's default (dynamic: no limit; offloaded: none) */
    const uint8_t *fingerprint;  /* 32 bytes, of model and tokenizer; NULL: none */
    const char *name;            /* shown to people; NULL: none */
};

KVTIER_API int kvt_cache_create(struct kvt_client *c, const struct kvt_cache_create_options *o,
                                uint32_t *cache) KVTIER_CHECK;
KVTIER_API int kvt_cache_close(struct kvt_client *c, uint32_t cache);

/* ---- steps ------------------------------------------------------------------------------------ */

struct kvt_step_row {
    uint32_t row;
    uint32_t tokens; /* to append in each step; may be 0 */
};

/* A run: tokens in one stretch of device memory, read by each row of `rows`. K of token t (absolute,
 * token_begin <= t < token_begin + read_count + append_count) is at
 * k + (t - token_begin) * kv_heads * k_head_dim * element size, as [kv_head][k_head_dim]; V alike.
 * The last append_count tokens are the step's new ones: the worker writes them. */
struct kvt_run {
    const uint32_t *rows;
    uint32_t row_count;
    uint32_t token_begin;
    uint32_t read_count;
    uint32_t append_count;
    void *k;
    void *v; /* NULL: the layer has no V */
};

struct kvt_piece {
    uint32_t layer;  /* whose K and V */
    uint32_t reader; /* layer that attends now (differs when a later layer reads them) */
    /* kvt_piece_done is due behind that layer's attention; segment workers: always the reader */
    uint32_t last_reader;
    uint32_t streamed; /* 0: resident */
    uint32_t last;     /* 1: the layer's last piece */
    uint32_t slot;     /* streamed: index in the control page */
    uint64_t ready;    /* streamed: value that kvt_piece_wait waits for */
    uint64_t done;     /* streamed: value that kvt_piece_done posts */
    uint32_t run_count;
    const struct kvt_run *runs;
    /* Dense workers: planes [row][token][kv_head][head_dim] of all rows of the step */
    void *k;
    void *v;
    uint64_t k_row_bytes; /* stride between rows */
    uint64_t v_row_bytes;
    uint32_t token_capacity;
};

/* Opens a schedule of up to `steps` equal steps on `cache` and makes its first step the current
 * one. rows NULL: every row appends `tokens`. Rows that are not named are not read; dense workers
 * name all of them, in order (0 tokens for those that stand still). Fails with -KVT_EQUOTA (budget
 * and need are in the message) and then nothing has changed. One schedule at a time a client.
 * Waits first until the steps that were ended are written back. -KVT_EFAILED, once: some of this
 * cache were not (the message names steps, row and tokens): no schedule was opened; the rows have
 * the length before them, which kvt_step_length says behind the next begin, and the caller goes on
 * from there. -KVT_ETIMEDOUT: not written back within request_timeout_ms; nothing has changed. */
KVTIER_API int kvt_step_begin(struct kvt_client *c, uint32_t cache, const struct kvt_step_row *rows,
                              uint32_t row_count, uint32_t tokens, uint32_t steps,
                              struct kvt_step **out) KVTIER_CHECK;
/* Steps of the schedule that are left, the current one included. */
KVTIER_API uint32_t kvt_step_left(const struct kvt_step *s);
/* Tokens of `row` before the current step. */
KVTIER_API uint32_t kvt_step_length(const struct kvt_step *s, uint32_t row);
/* 1: *p is the next piece of the current step; 0: there is none; negative: error, -KVT_EFAILED and
 * -KVT_EGONE among them: abort it. Pieces stay valid until the step is ended or aborted. A layer
 * whose K and V later layers read too is listed again for each of them to segment workers: another
 * piece, whose reader differs from its layer, and which reads this step's tokens as well. Dense
 * workers get it once and keep it until last_reader. */
KVTIER_API int kvt_step_piece(struct kvt_step *s, const struct kvt_piece **p) KVTIER_CHECK;
/* Waits (CPU) until the piece's bytes are there; call it for every piece, also for resident ones,
 * which may need a copy on the device first. Has no time limit: see "Waits" at the top.
 * -KVT_EFAILED: the step failed; abort it. -KVT_EGONE: the daemon is gone; abort it too. */
KVTIER_API int kvt_piece_wait(struct kvt_step *s, const struct kvt_piece *p) KVTIER_CHECK;
/* The caller is done with the piece: its memory may change at once. Due for every streamed piece,
 * behind the attention of its last_reader, before the step is ended; a no-op for resident ones.
 * It may be late (frameworks learn that a layer's attention is over when the next layer begins),
 * but comes before the wait for a piece of a later reader, which may need the memory. */
KVTIER_API int kvt_piece_done(struct kvt_step *s, const struct kvt_piece *p) KVTIER_CHECK;
/* Ends the current step: everything that it did is complete. If the schedule has more steps
 * (kvt_step_left was above 1) the next one becomes current, otherwise `s` is freed. 0: the results
 * may be used; the commit is confirmed by the next kvt_step_begin or kvt_acquire on the cache, or
 * by kvt_cache_settle: until then the step may still fail to be written back. -KVT_ESTATE: a streamed
 * piece is not done; nothing has changed. Any other error, -KVT_EFAILED and -KVT_EGONE among them:
 * the results may not be used; `s` is freed. */
KVTIER_API int kvt_step_end(struct kvt_step *s) KVTIER_CHECK;
/* Gives up the current step and those behind it and frees `s`: the cache keeps the length that it
 * had before the current step. NULL is fine. */
KVTIER_API int kvt_step_abort(struct kvt_step *s);
/* Whether steps of the cache that were ended have failed, as far as is known now. 0: none: results
 * whose computation is complete may be used. -KVT_EFAILED, once: some were lost, as kvt_step_begin
 * would say; -KVT_EGONE: the daemon is gone. Waits for nothing. On a CPU kvt_step_end has said it. */
KVTIER_API int kvt_cache_check(struct kvt_client *c, uint32_t cache) KVTIER_CHECK;
/* Waits until every step of the cache that was ended has been committed; timeout_ms negative:
 * without a limit, see "Waits" at the top. -KVT_EFAILED, once: some were lost, as kvt_step_begin
 * would say. */
KVTIER_API int kvt_cache_settle(struct kvt_client *c, uint32_t cache, int timeout_ms) KVTIER_CHECK;

/* The simple way, a layer at a time, on the same machinery: opens a step of `tokens` new tokens for
 * every row if none is open; layers 0, 1, ... in order. Waits; then the layer's pieces are in
 * *pieces, borrowed until the step has ended. Commit posts done of the pieces that no later layer
 * reads; that of the last layer ends the step. After an error the step is given up.
 * -KVT_ENOTSUP: the layer's pieces do not fit in the slots at once: use kvt_step_piece. */
KVTIER_API int kvt_acquire(struct kvt_client *c, uint32_t cache, uint32_t layer, uint32_t tokens,
                           const struct kvt_piece *const **pieces, uint32_t *count) KVTIER_CHECK;
KVTIER_API int kvt_commit(struct kvt_client *c, uint32_t cache, uint32_t layer) KVTIER_CHECK;
/* Gives up the step that kvt_acquire opened. Without one: 0. */
KVTIER_API int kvt_acquire_abort(struct kvt_client *c, uint32_t cache);

/* ---- rows: edits of tables, no copies --------------------------------------------------------- */

/* A new cache with copies of `rows` (NULL: all). */
KVTIER_API int kvt_cache_fork(struct kvt_client *c, uint32_t cache, const uint32_t *rows,
                              uint32_t count, uint32_t *forked) KVTIER_CHECK;
/* Row i becomes a copy of row rows[i]; count is the cache's number of rows (beam search). */
KVTIER_API int kvt_cache_reorder(struct kvt_client *c, uint32_t cache, const uint32_t *rows,
                                 uint32_t count) KVTIER_CHECK;
/* Each row `times` times, copies next to each other. */
KVTIER_API int kvt_cache_repeat(struct kvt_client *c, uint32_t cache, uint32_t times) KVTIER_CHECK;
/* Keeps these rows, in this order. */
KVTIER_API int kvt_cache_select(struct kvt_client *c, uint32_t cache, const uint32_t *rows,
                                uint32_t count) KVTIER_CHECK;
/* Keeps the first lengths[i] tokens of row i (count 1: of every row). */
KVTIER_API int kvt_cache_crop(struct kvt_client *c, uint32_t cache, const uint32_t *lengths,
                              uint32_t count) KVTIER_CHECK;
KVTIER_API int kvt_cache_reset(struct kvt_client *c, uint32_t cache) KVTIER_CHECK;

struct kvt_cache_stat {
    uint32_t mode;
    uint32_t rows;
    uint32_t layer_count;
    uint32_t tokens_longest;
    uint64_t device_bytes;
    uint64_t host_bytes;
    uint64_t to_device_bytes; /* since CREATE */
    uint64_t from_device_bytes;
    uint64_t prefetch_discarded_bytes;
    uint64_t migrated_bytes;
    uint64_t copied_on_write_bytes;
    uint64_t steps_committed;
    uint64_t need_to_device_bytes;   /* minimum for the last committed step */
    uint64_t need_from_device_bytes; /* minimum for the last committed step */
    char layers[1025];               /* 'R' resident, 'S' streamed, 'I' idle; NUL behind the last */
};
KVTIER_API int kvt_cache_stat(struct kvt_client *c, uint32_t cache,
                              struct kvt_cache_stat *out) KVTIER_CHECK;

/* A round trip without effect; microseconds in *us if not NULL. */
KVTIER_API int kvt_ping(struct kvt_client *c, double *us) KVTIER_CHECK;

#ifdef __cplusplus
}
#endif
#endif
