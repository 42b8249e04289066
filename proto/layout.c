#include "proto/layout.h"

#include "proto/errors.h"

#include <stdio.h>

static int refuse(char *text, size_t size, uint32_t layer, const char *field, uint64_t value,
                  const char *accepted) {
    (void)snprintf(text, size, "layout: layer %u: %s is %llu; accepted is %s", layer, field,
                   (unsigned long long)value, accepted);
    return -KVT_EINVAL;
}

static int check_planes(const struct kvt_layer_layout *l, uint32_t i, char *text, size_t size) {
    if (l->kv_heads < 1 || l->kv_heads > KVT_KV_HEADS_MAX) {
        return refuse(text, size, i, "kv_heads", l->kv_heads, "1 to 1024");
    }
    if (l->k_head_dim < 1 || l->k_head_dim > KVT_HEAD_DIM_MAX) {
        return refuse(text, size, i, "k_head_dim", l->k_head_dim, "1 to 65536");
    }
    if (l->v_head_dim > KVT_HEAD_DIM_MAX) {
        return refuse(text, size, i, "v_head_dim", l->v_head_dim, "0 to 65536");
    }
    if (kvt_dtype_bytes(l->dtype) == 0) {
        return refuse(text, size, i, "dtype", l->dtype, "1 (f32) to 5 (int8)");
    }
    uint64_t token_bytes = (uint64_t)l->kv_heads * ((uint64_t)l->k_head_dim + l->v_head_dim) *
                           kvt_dtype_bytes(l->dtype);
    if (token_bytes > KVT_TOKEN_BYTES_MAX) {
        return refuse(text, size, i, "bytes a token", token_bytes, "at most 16777216");
    }
    return 0;
}

int kvt_layout_check(const struct kvt_layout *layout, char *text, size_t size) {
    if (layout->layer_count < 1 || layout->layer_count > KVT_LAYERS_MAX) {
        (void)snprintf(text, size, "layout: %u layers; accepted is 1 to %d", layout->layer_count,
                       KVT_LAYERS_MAX);
        return -KVT_EINVAL;
    }
    for (uint32_t i = 0; i < layout->layer_count; i++) {
        const struct kvt_layer_layout *l = &layout->layers[i];
        if (l->kind < KVT_LAYER_FULL || l->kind > KVT_LAYER_STATE) {
            return refuse(text, size, i, "kind", l->kind, "1 (full) to 5 (state)");
        }
        if (l->last_reader < i || l->last_reader >= layout->layer_count) {
            return refuse(text, size, i, "last_reader", l->last_reader,
                          "the layer's own index or a later layer's");
        }
        if (l->kind == KVT_LAYER_STATE) {
            if (l->state_bytes < 1 || l->state_bytes > (UINT64_C(1) << 32)) {
                return refuse(text, size, i, "state_bytes", l->state_bytes, "1 to 4294967296");
            }
            continue;
        }
        int rc = check_planes(l, i, text, size);
        if (rc != 0) {
            return rc;
        }
        if ((l->kind == KVT_LAYER_SLIDING || l->kind == KVT_LAYER_SINK) && l->window < 1) {
            return refuse(text, size, i, "window", l->window, "1 or more tokens");
        }
    }
    return 0;
}
