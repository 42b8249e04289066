/*
 * Where a forward pass finds K and V: the seam between kvtier-run and whoever
 * holds them. Two implementations: kv_local.c, this process' own memory, and
 * kv_kvtier.c, the daemon through libkvtier.
 *
 * A step:  begin (once for several equal steps ahead)
 *          next, wait, [append, attend], done    for every piece, in order
 *          end
 * begin counts the tokens that each row appends; a row may append none. next gives
 * a layer's pieces one after another, layers ascending; each appended token lies in
 * exactly one piece of its layer. After an error the caller aborts.
 *
 * Functions return 0 (or what they say) or -KVT_E...; `why` then has the sentence.
 * -KVT_EGONE: whoever held K and V is gone, and they with it.
 * Thread: one.
 */
#ifndef KVT_WORKER_KV_H
#define KVT_WORKER_KV_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/attention_ref.h"

struct run_kv;

/* What the model needs of a cache. */
struct run_kv_shape {
    uint32_t layers;
    uint32_t kv_heads;
    uint32_t k_dim, v_dim; /* of a head, elements */
    enum kvt_kv_dtype dtype;
    uint32_t rows;       /* sequences at first */
    uint32_t rows_max;   /* after repeat */
    uint32_t tokens_max; /* of a row */
    uint32_t append_max; /* tokens of a row in one step */
};

struct run_kv_piece {
    uint32_t layer;
    const struct kvt_attention_run *runs; /* rows are the cache's; valid until done */
    uint32_t run_count;
    const void *own; /* the implementation's */
};

struct run_kv_ops {
    /* how many steps, at most `steps`, are open now: begin again behind the last one */
    int (*begin)(struct run_kv *kv, const uint32_t *counts, uint32_t row_count, uint32_t steps);
    /* 1: *piece is the next one of this step; 0: there is none */
    int (*next)(struct run_kv *kv, struct run_kv_piece *piece);
    int (*wait)(struct run_kv *kv, const struct run_kv_piece *piece);
    int (*done)(struct run_kv *kv, const struct run_kv_piece *piece);
    int (*end)(struct run_kv *kv);
    /* gives up this step and those behind it; without one, nothing */
    void (*abort)(struct run_kv *kv);
    /* tokens of a row that ended steps have appended */
    uint32_t (*length)(const struct run_kv *kv, uint32_t row);
    /* every row `times` times, copies next to each other */
    int (*repeat)(struct run_kv *kv, uint32_t times);
    /* keeps the first `tokens` of a row */
    int (*crop)(struct run_kv *kv, uint32_t row, uint32_t tokens);
    /* the step that follows is the last one: describe then says what it alone has moved */
    void (*mark)(struct run_kv *kv);
    /* from a signal handler: whatever waits, or will, returns -KVT_EGONE */
    void (*interrupt)(struct run_kv *kv);
    /* members of a JSON object about where the bytes are and went, without braces; "" for none */
    void (*describe)(struct run_kv *kv, char *text, size_t size);
    void (*close)(struct run_kv *kv);
};

/* The first member of every implementation. */
struct run_kv {
    const struct run_kv_ops *ops;
    char why[512];
};

/* Where an append run's new tokens go: the kernel reads runs, the forward pass writes here. */
static inline void *run_kv_append_k(const struct kvt_attention_run *run, size_t token_bytes) {
    return (char *)(uintptr_t)run->k + run->read_count * token_bytes;
}
static inline void *run_kv_append_v(const struct kvt_attention_run *run, size_t token_bytes) {
    return (char *)(uintptr_t)run->v + run->read_count * token_bytes;
}

/*
 * K and V in this process. piece_tokens cuts the layers, a multiple of
 * KVT_SPLIT_TOKENS; 0: a layer is one piece.
 */
__attribute__((warn_unused_result)) int run_kv_local_open(struct run_kv **out,
                                                          const struct run_kv_shape *shape,
                                                          uint32_t piece_tokens, char *err,
                                                          size_t err_size);

/* How the daemon shall keep a cache; as in kvtier.h's kvt_cache_create_options. */
struct run_kv_kvtier_options {
    const char *runtime_dir;    /* NULL: the default */
    const uint8_t *device;      /* 16 bytes; NULL: the daemon's first */
    int mode;                   /* KVT_DYNAMIC ... */
    uint32_t piece_tokens;      /* 0: the daemon chooses */
    int64_t resident_layers;    /* -1: as the mode says */
    const uint8_t *fingerprint; /* 32 bytes, or NULL */
    const char *name;           /* of the cache */
    const char *worker;         /* of the worker */
};

/* K and V in kvtierd's keeping. Waits some seconds for the daemon to answer. */
__attribute__((warn_unused_result)) int run_kv_kvtier_open(
    struct run_kv **out, const struct run_kv_shape *shape,
    const struct run_kv_kvtier_options *options, char *err, size_t err_size);

#endif
