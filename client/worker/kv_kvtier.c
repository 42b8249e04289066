/*
 * K and V in kvtierd's keeping, through libkvtier and nothing else of this
 * project: what this file does, any worker can do.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "client/kvtier.h"
#include "client/worker/fail.h"
#include "client/worker/kv.h"

struct remote {
    struct run_kv base;
    struct run_kv_shape shape;
    struct kvt_client *client;
    uint32_t cache;
    bool has_cache;
    struct kvt_step *step;     /* NULL: none is open */
    struct kvt_step_row *rows; /* rows_max; tokens of the open schedule's steps */
    uint32_t *lengths;         /* rows_max */
    uint32_t row_count;
    struct kvt_attention_run *runs; /* of the piece that was asked for last */
    uint32_t run_room;
    struct kvt_cache_stat mark; /* before the last step */
    bool marked;
};

static struct remote *remote_of(struct run_kv *kv) {
    return (struct remote *)kv;
}

/* Keeps the library's sentence; returns `code`. */
static int failed(struct remote *r, int code) {
    return kvt_fail(code, r->base.why, sizeof(r->base.why), "%s", kvt_error_message(r->client));
}

static int remote_begin(struct run_kv *kv, const uint32_t *counts, uint32_t row_count,
                        uint32_t steps) {
    struct remote *r = remote_of(kv);
    if (row_count != r->row_count)
        return kvt_fail(-KVT_EINVAL, kv->why, sizeof(kv->why),
                        "kv: %" PRIu32 " rows in a step of a cache of %" PRIu32, row_count,
                        r->row_count);
    for (uint32_t i = 0; i < row_count; i++)
        r->rows[i] = (struct kvt_step_row){i, counts[i]};
    int rc = kvt_step_begin(r->client, r->cache, r->rows, row_count, 0, steps, &r->step);
    if (rc < 0)
        return failed(r, rc);
    for (uint32_t i = 0; i < row_count; i++) {
        uint32_t length = kvt_step_length(r->step, i);
        if (length == r->lengths[i])
            continue;
        (void)kvt_step_abort(r->step);
        r->step = NULL;
        return kvt_fail(-KVT_EPROTO, kv->why, sizeof(kv->why),
                        "kv: the daemon has %" PRIu32 " tokens of row %" PRIu32 ", but %" PRIu32
                        " were appended",
                        length, i, r->lengths[i]);
    }
    return (int)kvt_step_left(r->step);
}

static int remote_next(struct run_kv *kv, struct run_kv_piece *out) {
    struct remote *r = remote_of(kv);
    const struct kvt_piece *piece = NULL;
    int rc = kvt_step_piece(r->step, &piece);
    if (rc <= 0)
        return rc < 0 ? failed(r, rc) : 0;
    if (piece->run_count > r->run_room) {
        struct kvt_attention_run *grown = realloc(r->runs, piece->run_count * sizeof(*grown));
        if (!grown)
            return kvt_fail(-KVT_ENOMEM, kv->why, sizeof(kv->why), "kv: out of memory");
        r->runs = grown;
        r->run_room = piece->run_count;
    }
    for (uint32_t i = 0; i < piece->run_count; i++) {
        const struct kvt_run *run = &piece->runs[i];
        if (run->token_begin % KVT_SPLIT_TOKENS != 0)
            return kvt_fail(-KVT_EPROTO, kv->why, sizeof(kv->why),
                            "kv: a run begins at token %" PRIu32 ", no multiple of %d",
                            run->token_begin, KVT_SPLIT_TOKENS);
        r->runs[i] = (struct kvt_attention_run){
            .rows = run->rows,
            .row_count = run->row_count,
            .token_begin = run->token_begin,
            .read_count = run->read_count,
            .append_count = run->append_count,
            .k = run->k,
            .v = run->v,
        };
    }
    *out = (struct run_kv_piece){piece->reader, r->runs, piece->run_count, piece};
    return 1;
}

static int remote_wait(struct run_kv *kv, const struct run_kv_piece *piece) {
    struct remote *r = remote_of(kv);
    int rc = kvt_piece_wait(r->step, piece->own);
    return rc < 0 ? failed(r, rc) : 0;
}

static int remote_done(struct run_kv *kv, const struct run_kv_piece *piece) {
    struct remote *r = remote_of(kv);
    int rc = kvt_piece_done(r->step, piece->own);
    return rc < 0 ? failed(r, rc) : 0;
}

static int remote_end(struct run_kv *kv) {
    struct remote *r = remote_of(kv);
    uint32_t left = kvt_step_left(r->step);
    int rc = kvt_step_end(r->step);
    if (rc == -KVT_ESTATE)
        return failed(r, rc);
    if (rc < 0 || left <= 1)
        r->step = NULL;
    if (rc < 0)
        return failed(r, rc);
    for (uint32_t i = 0; i < r->row_count; i++)
        r->lengths[i] += r->rows[i].tokens;
    return 0;
}

static void remote_abort(struct run_kv *kv) {
    struct remote *r = remote_of(kv);
    if (r->step)
        (void)kvt_step_abort(r->step);
    r->step = NULL;
}

static uint32_t remote_length(const struct run_kv *kv, uint32_t row) {
    return ((const struct remote *)kv)->lengths[row];
}

static int remote_repeat(struct run_kv *kv, uint32_t times) {
    struct remote *r = remote_of(kv);
    if ((uint64_t)r->row_count * times > r->shape.rows_max)
        return kvt_fail(-KVT_EINVAL, kv->why, sizeof(kv->why),
                        "kv: %" PRIu32 " rows cannot be repeated %" PRIu32 " times", r->row_count,
                        times);
    int rc = kvt_cache_repeat(r->client, r->cache, times);
    if (rc < 0)
        return failed(r, rc);
    r->row_count *= times;
    for (uint32_t i = r->row_count; i-- > 0;)
        r->lengths[i] = r->lengths[i / times];
    return 0;
}

static int remote_crop(struct run_kv *kv, uint32_t row, uint32_t tokens) {
    struct remote *r = remote_of(kv);
    if (row >= r->row_count || tokens > r->lengths[row])
        return kvt_fail(-KVT_EINVAL, kv->why, sizeof(kv->why),
                        "kv: row %" PRIu32 " has no %" PRIu32 " tokens to keep", row, tokens);
    uint32_t before = r->lengths[row];
    r->lengths[row] = tokens;
    int rc = kvt_cache_crop(r->client, r->cache, r->lengths, r->row_count);
    if (rc < 0) {
        r->lengths[row] = before;
        return failed(r, rc);
    }
    return 0;
}

/* The counters when everything that was ended is committed. */
static int settled(struct remote *r, struct kvt_cache_stat *stat) {
    int rc = kvt_cache_settle(r->client, r->cache, 5000);
    return rc < 0 ? rc : kvt_cache_stat(r->client, r->cache, stat);
}

static void remote_mark(struct run_kv *kv) {
    struct remote *r = remote_of(kv);
    r->marked = settled(r, &r->mark) == 0;
}

static void remote_interrupt(struct run_kv *kv) {
    kvt_interrupt(remote_of(kv)->client);
}

static void remote_describe(struct run_kv *kv, char *text, size_t size) {
    struct remote *r = remote_of(kv);
    struct kvt_cache_stat stat;
    text[0] = 0;
    if (settled(r, &stat) < 0)
        return;
    int used =
        snprintf(text, size,
                 "\"kv\": \"kvtierd\", \"kv_device_bytes\": %" PRIu64
                 ", \"kv_host_bytes\": %" PRIu64 ", \"to_device_bytes\": %" PRIu64
                 ", \"from_device_bytes\": %" PRIu64 ", \"need_to_device_bytes\": %" PRIu64
                 ", \"need_from_device_bytes\": %" PRIu64 ", \"prefetch_discarded_bytes\": %" PRIu64
                 ", \"migrated_bytes\": %" PRIu64 ", \"copied_on_write_bytes\": %" PRIu64
                 ", \"steps_committed\": %" PRIu64 ", \"layers\": \"%.*s\"",
                 stat.device_bytes, stat.host_bytes, stat.to_device_bytes, stat.from_device_bytes,
                 stat.need_to_device_bytes, stat.need_from_device_bytes,
                 stat.prefetch_discarded_bytes, stat.migrated_bytes, stat.copied_on_write_bytes,
                 stat.steps_committed, (int)sizeof(stat.layers), stat.layers);
    /* one step and no more: nothing was generated, or a text ended early, otherwise */
    if (!r->marked || stat.steps_committed != r->mark.steps_committed + 1)
        return;
    snprintf(text + used, size - (size_t)used,
             ", \"last_step_to_device_bytes\": %" PRIu64
             ", \"last_step_from_device_bytes\": %" PRIu64
             ", \"last_step_prefetch_discarded_bytes\": %" PRIu64
             ", \"last_step_migrated_bytes\": %" PRIu64,
             stat.to_device_bytes - r->mark.to_device_bytes,
             stat.from_device_bytes - r->mark.from_device_bytes,
             stat.prefetch_discarded_bytes - r->mark.prefetch_discarded_bytes,
             stat.migrated_bytes - r->mark.migrated_bytes);
}

static void remote_close(struct run_kv *kv) {
    struct remote *r = remote_of(kv);
    remote_abort(kv);
    if (r->client && r->has_cache)
        (void)kvt_cache_close(r->client, r->cache);
    kvt_detach(r->client);
    free(r->rows);
    free(r->lengths);
    free(r->runs);
    free(r);
}

static const struct run_kv_ops remote_ops = {
    .begin = remote_begin,
    .next = remote_next,
    .wait = remote_wait,
    .done = remote_done,
    .end = remote_end,
    .abort = remote_abort,
    .length = remote_length,
    .repeat = remote_repeat,
    .crop = remote_crop,
    .mark = remote_mark,
    .interrupt = remote_interrupt,
    .describe = remote_describe,
    .close = remote_close,
};

static int create(struct remote *r, const struct run_kv_kvtier_options *o) {
    struct kvt_layer_shape *layers = calloc(r->shape.layers, sizeof(*layers));
    if (!layers)
        return kvt_fail(-KVT_ENOMEM, r->base.why, sizeof(r->base.why), "kv: out of memory");
    for (uint32_t i = 0; i < r->shape.layers; i++)
        layers[i] = (struct kvt_layer_shape){
            .kind = KVT_KIND_FULL,
            .kv_heads = r->shape.kv_heads,
            .k_head_dim = r->shape.k_dim,
            .v_head_dim = r->shape.v_dim,
            .dtype = (uint32_t)r->shape.dtype, /* the same numbers */
        };
    struct kvt_cache_create_options create = {
        .layers = layers,
        .layer_count = r->shape.layers,
        .mode = (uint32_t)o->mode,
        .rows = r->shape.rows,
        .tokens_max =
            o->mode == KVT_STATIC || o->mode == KVT_OFFLOADED_STATIC ? r->shape.tokens_max : 0,
        .append_max = r->shape.append_max,
        .piece_tokens = o->piece_tokens,
        .resident_layers_max = o->resident_layers,
        .fingerprint = o->fingerprint,
        .name = o->name,
    };
    int rc = kvt_cache_create(r->client, &create, &r->cache);
    free(layers);
    if (rc < 0)
        return failed(r, rc);
    r->has_cache = true;
    return 0;
}

int run_kv_kvtier_open(struct run_kv **out, const struct run_kv_shape *shape,
                       const struct run_kv_kvtier_options *options, char *err, size_t err_size) {
    struct remote *r = calloc(1, sizeof(*r));
    if (!r)
        return kvt_fail(-KVT_ENOMEM, err, err_size, "kv: out of memory");
    r->base.ops = &remote_ops;
    r->shape = *shape;
    r->row_count = shape->rows;
    r->rows = calloc(shape->rows_max, sizeof(*r->rows));
    r->lengths = calloc(shape->rows_max, sizeof(*r->lengths));
    int rc = r->rows && r->lengths ? 0 : -KVT_ENOMEM;
    if (rc == 0) {
        const struct kvt_attach_options attach = {
            .runtime_dir = options->runtime_dir,
            .device = options->device,
            .worker = KVT_SEGMENT,
            .name = options->worker,
        };
        rc = kvt_attach(&attach, &r->client);
        rc = rc < 0 ? failed(r, rc) : create(r, options);
    }
    if (rc) {
        kvt_fail(rc, err, err_size, "%s", r->base.why[0] ? r->base.why : "kv: out of memory");
        remote_close(&r->base);
        return rc;
    }
    *out = &r->base;
    return 0;
}
