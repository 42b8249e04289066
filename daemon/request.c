#include "daemon/request.h"

#include <stdio.h>
#include <string.h>

Kvt__Request *kvt_request_unpack(struct kvt_arena *arena, const uint8_t *bytes, size_t size,
                                 int *code) {
    kvt_arena_reset(arena);
    Kvt__Request *m = kvt__request__unpack(&arena->allocator, size, bytes);
    if (m == NULL) {
        *code = arena->exhausted ? -KVT_ETOOBIG : -KVT_EPROTO;
    }
    return m;
}

static int refuse(char *text, const char *what, uint64_t value, const char *accepted) {
    (void)snprintf(text, KVT_TEXT_BYTES, "%s is %llu; accepted is %s", what,
                   (unsigned long long)value, accepted);
    return -KVT_EINVAL;
}

static int check_count(char *text, const char *what, size_t count) {
    if (count > KVT_ROWS_MAX) {
        return refuse(text, what, count, "at most 1024");
    }
    return 0;
}

/* ---- CREATE ------------------------------------------------------------------------------------- */

static int read_layer(const Kvt__Layer *m, struct kvt_layout *layout, char *text) {
    uint32_t repeat = m->repeat == 0 ? 1 : m->repeat;
    if (repeat > KVT_LAYERS_MAX - layout->layer_count) {
        (void)snprintf(text, KVT_TEXT_BYTES, "layout: more than %d layers", KVT_LAYERS_MAX);
        return -KVT_EINVAL;
    }
    for (uint32_t i = 0; i < repeat; i++) {
        uint32_t index = layout->layer_count++;
        layout->layers[index] = (struct kvt_layer_layout){
            .kind = m->kind,
            .kv_heads = m->kv_heads,
            .k_head_dim = m->k_head_dim,
            .v_head_dim = m->v_head_dim,
            .dtype = m->dtype,
            .last_reader = m->last_reader_plus_1 == 0 ? index : m->last_reader_plus_1 - 1,
            .window = m->window,
            .sinks = m->sinks,
            .state_bytes = m->state_bytes,
        };
    }
    return 0;
}

static int read_scalars(const Kvt__CacheOptions *m, struct kvt_cache_options *o, char *text) {
    if (m->mode < KVT_MODE_DYNAMIC || m->mode > KVT_MODE_OFFLOADED_STATIC) {
        return refuse(text, "create: mode", m->mode, "1 (dynamic) to 4 (offloaded-static)");
    }
    if (m->codec != KVT_CODEC_NONE) {
        return refuse(text, "create: codec", m->codec, "0 (none)");
    }
    if (m->rows < 1 || m->rows > KVT_ROWS_MAX) {
        return refuse(text, "create: rows", m->rows, "1 to 1024");
    }
    bool fixed = m->mode == KVT_MODE_STATIC || m->mode == KVT_MODE_OFFLOADED_STATIC;
    if (m->tokens_max > KVT_TOKENS_MAX || (fixed && m->tokens_max == 0)) {
        return refuse(text, "create: tokens_max", m->tokens_max,
                      fixed ? "1 to 2147483392 in the static modes" : "0 to 2147483392");
    }
    if (m->append_max < 1 || m->append_max > KVT_APPEND_MAX) {
        return refuse(text, "create: append_max", m->append_max, "1 to 1048576");
    }
    if (m->piece_tokens % KVT_SPLIT_TOKENS != 0 || m->piece_tokens > KVT_TOKENS_MAX) {
        return refuse(text, "create: piece_tokens", m->piece_tokens, "a multiple of 256");
    }
    if (m->resident_layers_max_plus_1 > KVT_LAYERS_MAX + 1) {
        return refuse(text, "create: resident_layers_max_plus_1", m->resident_layers_max_plus_1,
                      "0 to 1025");
    }
    if (m->fingerprint.len != 0 && m->fingerprint.len != KVT_FINGERPRINT_BYTES) {
        return refuse(text, "create: bytes of fingerprint", m->fingerprint.len, "0 or 32");
    }
    bool offloaded = m->mode == KVT_MODE_OFFLOADED || m->mode == KVT_MODE_OFFLOADED_STATIC;
    *o = (struct kvt_cache_options){
        .mode = m->mode,
        .codec = m->codec,
        .rows = m->rows,
        .tokens_max = m->tokens_max,
        .append_max = m->append_max,
        .piece_tokens = m->piece_tokens,
        .resident_layers_max = m->resident_layers_max_plus_1 != 0
                                   ? m->resident_layers_max_plus_1 - 1
                               : offloaded ? 0
                                           : UINT32_MAX,
    };
    if (m->fingerprint.len > 0) {
        memcpy(o->fingerprint, m->fingerprint.data, KVT_FINGERPRINT_BYTES);
    }
    return 0;
}

int kvt_cache_options_read(const Kvt__CacheOptions *m, struct kvt_request_buffers *b, char *text) {
    if (m == NULL) {
        (void)snprintf(text, KVT_TEXT_BYTES, "create: the options are missing");
        return -KVT_EINVAL;
    }
    int rc = read_scalars(m, &b->options, text);
    if (rc != 0) {
        return rc;
    }
    size_t name_bytes = strlen(m->name);
    if (name_bytes >= KVT_NAME_BYTES) {
        return refuse(text, "create: bytes of name", name_bytes, "at most 63");
    }
    memcpy(b->options.name, m->name, name_bytes + 1);
    b->layout.layer_count = 0;
    for (size_t i = 0; i < m->n_layers; i++) {
        rc = read_layer(m->layers[i], &b->layout, text);
        if (rc != 0) {
            return rc;
        }
    }
    return kvt_layout_check(&b->layout, text, KVT_TEXT_BYTES);
}

/* ---- the others --------------------------------------------------------------------------------- */

static int read_step(const Kvt__Step *m, struct kvt_request_buffers *b, struct kvt_request *out,
                     char *text) {
    int rc = check_count(text, "step: rows", m->n_rows);
    if (rc != 0) {
        return rc;
    }
    if (m->steps < 1 || m->steps > KVT_STEPS_AHEAD_MAX) {
        return refuse(text, "step: steps", m->steps, "1 to 64");
    }
    if (m->tokens > KVT_APPEND_MAX) {
        return refuse(text, "step: tokens", m->tokens, "0 to 1048576");
    }
    for (size_t i = 0; i < m->n_rows; i++) {
        if (m->rows[i]->row >= KVT_ROWS_MAX) {
            return refuse(text, "step: row", m->rows[i]->row, "0 to 1023");
        }
        if (m->rows[i]->tokens > KVT_APPEND_MAX) {
            return refuse(text, "step: tokens of a row", m->rows[i]->tokens, "0 to 1048576");
        }
        b->rows[i] = m->rows[i]->row;
        b->values[i] = m->rows[i]->tokens;
    }
    out->kind = KVT_REQUEST_STEP;
    out->cache = m->cache;
    out->rows = b->rows;
    out->values = b->values;
    out->count = (uint32_t)m->n_rows;
    out->tokens = m->tokens;
    out->steps = m->steps;
    return 0;
}

static int read_acquire(const Kvt__Acquire *m, struct kvt_request *out, char *text) {
    if (m->layer >= KVT_LAYERS_MAX) {
        return refuse(text, "acquire: layer", m->layer, "0 to 1023");
    }
    if (m->tokens > KVT_APPEND_MAX) {
        return refuse(text, "acquire: tokens", m->tokens, "0 to 1048576");
    }
    out->kind = KVT_REQUEST_ACQUIRE;
    out->cache = m->cache;
    out->layer = m->layer;
    out->tokens = m->tokens;
    return 0;
}

static int read_rows(uint32_t kind, uint32_t cache, size_t count, const uint32_t *rows,
                     const char *what, struct kvt_request *out, char *text) {
    int rc = check_count(text, what, count);
    if (rc != 0) {
        return rc;
    }
    for (size_t i = 0; i < count; i++) {
        if (rows[i] >= KVT_ROWS_MAX) {
            return refuse(text, what, rows[i], "rows 0 to 1023");
        }
    }
    if (count == 0 && kind != KVT_REQUEST_FORK) {
        return refuse(text, what, 0, "1 row or more");
    }
    out->kind = kind;
    out->cache = cache;
    out->rows = rows;
    out->count = (uint32_t)count;
    return 0;
}

static int read_crop(const Kvt__Crop *m, struct kvt_request *out, char *text) {
    int rc = check_count(text, "crop: lengths", m->n_lengths);
    if (rc != 0) {
        return rc;
    }
    if (m->n_lengths == 0) {
        return refuse(text, "crop: lengths", 0, "one for all rows, or one for each");
    }
    for (size_t i = 0; i < m->n_lengths; i++) {
        if (m->lengths[i] > KVT_TOKENS_MAX) {
            return refuse(text, "crop: length", m->lengths[i], "0 to 2147483392");
        }
    }
    out->kind = KVT_REQUEST_CROP;
    out->cache = m->cache;
    out->values = m->lengths;
    out->count = (uint32_t)m->n_lengths;
    return 0;
}

int kvt_request_read(const Kvt__Request *m, struct kvt_request_buffers *b, struct kvt_request *out,
                     char *text) {
    memset(out, 0, sizeof(*out));
    switch (m->body_case) {
    case KVT__REQUEST__BODY_CREATE: {
        int rc = kvt_cache_options_read(m->create->options, b, text);
        out->kind = KVT_REQUEST_CREATE;
        out->layout = &b->layout;
        out->options = &b->options;
        return rc;
    }
    case KVT__REQUEST__BODY_CLOSE:
        out->kind = KVT_REQUEST_CLOSE;
        out->cache = m->close->cache;
        return 0;
    case KVT__REQUEST__BODY_STEP:
        return read_step(m->step, b, out, text);
    case KVT__REQUEST__BODY_ABORT:
        out->kind = KVT_REQUEST_ABORT;
        out->first_step = m->abort->first_step;
        return 0;
    case KVT__REQUEST__BODY_ACQUIRE:
        return read_acquire(m->acquire, out, text);
    case KVT__REQUEST__BODY_FORK:
        return read_rows(KVT_REQUEST_FORK, m->fork->cache, m->fork->n_rows, m->fork->rows,
                         "fork: rows", out, text);
    case KVT__REQUEST__BODY_REORDER:
        return read_rows(KVT_REQUEST_REORDER, m->reorder->cache, m->reorder->n_rows,
                         m->reorder->rows, "reorder: rows", out, text);
    case KVT__REQUEST__BODY_SELECT:
        return read_rows(KVT_REQUEST_SELECT, m->select->cache, m->select->n_rows, m->select->rows,
                         "select: rows", out, text);
    case KVT__REQUEST__BODY_REPEAT:
        if (m->repeat->times < 1 || m->repeat->times > KVT_ROWS_MAX) {
            return refuse(text, "repeat: times", m->repeat->times, "1 to 1024");
        }
        out->kind = KVT_REQUEST_REPEAT;
        out->cache = m->repeat->cache;
        out->times = m->repeat->times;
        return 0;
    case KVT__REQUEST__BODY_CROP:
        return read_crop(m->crop, out, text);
    case KVT__REQUEST__BODY_RESET:
        out->kind = KVT_REQUEST_RESET;
        out->cache = m->reset->cache;
        return 0;
    default:
        (void)snprintf(text, KVT_TEXT_BYTES, "the request has no body that this daemon knows");
        return -KVT_ENOTSUP;
    }
}
