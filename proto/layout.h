/* What a model's cache looks like, as plain data: the same in engine, daemon and library. */
#ifndef KVT_PROTO_LAYOUT_H
#define KVT_PROTO_LAYOUT_H

#include "proto/limits.h"

#include <stddef.h>
#include <stdint.h>

/* Numbers are on the wire: never reuse one. */
enum kvt_dtype { KVT_F32 = 1, KVT_F16 = 2, KVT_BF16 = 3, KVT_FP8_E4M3 = 4, KVT_INT8 = 5 };

enum kvt_layer_kind {
    KVT_LAYER_FULL = 1,
    KVT_LAYER_SLIDING = 2, /* the last `window` tokens */
    KVT_LAYER_SINK = 3,    /* the first `sinks` tokens and the last `window` */
    KVT_LAYER_CROSS = 4,   /* written once, read by every step */
    KVT_LAYER_STATE = 5,   /* `state_bytes` opaque bytes a row */
};

enum kvt_mode {
    KVT_MODE_DYNAMIC = 1,          /* grows; resident while it fits, then migrated to host */
    KVT_MODE_STATIC = 2,           /* capacity and addresses fixed at CREATE; resident */
    KVT_MODE_OFFLOADED = 3,        /* grows; streamed */
    KVT_MODE_OFFLOADED_STATIC = 4, /* capacity, addresses and resident set fixed; streamed */
};

enum kvt_codec { KVT_CODEC_NONE = 0 };

enum kvt_worker_kind {
    KVT_WORKER_SEGMENT = 1, /* merges partial attention: takes pieces of any cut */
    KVT_WORKER_DENSE = 2,   /* needs each row's plane in one stretch */
};

struct kvt_layer_layout {
    uint32_t kind;       /* enum kvt_layer_kind */
    uint32_t kv_heads;   /* heads of K and of V */
    uint32_t k_head_dim; /* elements */
    uint32_t v_head_dim; /* elements; 0: the layer has no V plane (MLA) */
    uint32_t dtype;      /* enum kvt_dtype */
    uint32_t
        last_reader; /* the last layer that reads this one's KV; its own index if only itself */
    uint32_t window; /* tokens: sliding, sink */
    uint32_t sinks;  /* tokens: sink */
    uint64_t state_bytes; /* state */
};

struct kvt_layout {
    uint32_t layer_count;
    struct kvt_layer_layout layers[KVT_LAYERS_MAX];
};

/* Bytes of one element; 0 for a number that is no dtype. */
static inline uint32_t kvt_dtype_bytes(uint32_t dtype) {
    switch (dtype) {
    case KVT_F32:
        return 4;
    case KVT_F16:
    case KVT_BF16:
        return 2;
    case KVT_FP8_E4M3:
    case KVT_INT8:
        return 1;
    default:
        return 0;
    }
}

/* Bytes of one token's K (V) in one layer. */
static inline uint32_t kvt_layer_k_token_bytes(const struct kvt_layer_layout *l) {
    return l->kv_heads * l->k_head_dim * kvt_dtype_bytes(l->dtype);
}
static inline uint32_t kvt_layer_v_token_bytes(const struct kvt_layer_layout *l) {
    return l->kv_heads * l->v_head_dim * kvt_dtype_bytes(l->dtype);
}

/* Checks every field of `layout` against the limits and each other. Returns 0, or -KVT_EINVAL with
 * a sentence in text[size] that names layer, field, value and accepted range. */
int kvt_layout_check(const struct kvt_layout *layout, char *text, size_t size)
    __attribute__((warn_unused_result));

#endif
