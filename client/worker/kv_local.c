/*
 * K and V in this process' own memory: what a daemon is compared with.
 *
 * Each row has one mapping with room for tokens_max tokens of every plane; pages
 * come into being when they are first written.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "client/worker/fail.h"
#include "client/worker/kv.h"
#include "proto/errors.h"

struct row {
    char *planes; /* [layer] K, then V, of tokens_max tokens each */
    uint32_t length;
};

struct local {
    struct run_kv base;
    struct run_kv_shape shape;
    uint32_t piece_tokens; /* UINT32_MAX: whole layers */
    size_t k_plane_bytes, v_plane_bytes;
    struct row *rows; /* rows_max */
    uint32_t row_count;

    uint32_t *counts; /* of the open step */
    uint32_t steps_left;
    uint32_t longest;      /* tokens of the longest row with this step's */
    uint32_t layer, begin; /* of the next piece */
    uint32_t *row_index;   /* 0, 1, 2 ... */
    struct kvt_attention_run *runs;
};

static struct local *local_of(struct run_kv *kv) {
    return (struct local *)kv;
}

static size_t row_bytes(const struct local *l) {
    return (l->k_plane_bytes + l->v_plane_bytes) * l->shape.layers;
}

static char *plane_of(const struct local *l, uint32_t row, uint32_t layer, int is_v) {
    return l->rows[row].planes + (l->k_plane_bytes + l->v_plane_bytes) * layer +
           (is_v ? l->k_plane_bytes : 0);
}

static size_t k_token_bytes(const struct local *l) {
    return (size_t)l->shape.kv_heads * l->shape.k_dim * kvt_kv_dtype_bytes(l->shape.dtype);
}

static size_t v_token_bytes(const struct local *l) {
    return (size_t)l->shape.kv_heads * l->shape.v_dim * kvt_kv_dtype_bytes(l->shape.dtype);
}

static void open_step(struct local *l) {
    l->layer = 0;
    l->begin = 0;
    l->longest = 0;
    for (uint32_t r = 0; r < l->row_count; r++) {
        uint32_t total = l->rows[r].length + l->counts[r];
        l->longest = total > l->longest ? total : l->longest;
    }
}

static int local_begin(struct run_kv *kv, const uint32_t *counts, uint32_t row_count,
                       uint32_t steps) {
    struct local *l = local_of(kv);
    if (l->steps_left > 0 || steps == 0 || row_count != l->row_count)
        return kvt_fail(-KVT_ESTATE, kv->why, sizeof(kv->why), "kv: a step is open already");
    for (uint32_t r = 0; r < row_count; r++) {
        uint64_t wanted = l->rows[r].length + (uint64_t)counts[r] * steps;
        if (wanted > l->shape.tokens_max)
            return kvt_fail(-KVT_EQUOTA, kv->why, sizeof(kv->why),
                            "kv: row %" PRIu32 " would hold %" PRIu64 " tokens, and has room for "
                            "%" PRIu32 "; raise --context or generate fewer",
                            r, wanted, l->shape.tokens_max);
    }
    memcpy(l->counts, counts, row_count * sizeof(*counts));
    l->steps_left = steps;
    open_step(l);
    return (int)steps;
}

static int local_next(struct run_kv *kv, struct run_kv_piece *piece) {
    struct local *l = local_of(kv);
    if (l->layer == l->shape.layers)
        return 0;
    uint32_t end =
        l->piece_tokens < l->longest - l->begin ? l->begin + l->piece_tokens : l->longest;
    uint32_t count = 0;
    for (uint32_t r = 0; r < l->row_count; r++) {
        uint32_t length = l->rows[r].length;
        uint32_t total = length + l->counts[r];
        uint32_t stop = total < end ? total : end;
        if (l->counts[r] == 0 || stop <= l->begin)
            continue;
        uint32_t read_end = length < l->begin ? l->begin : length < stop ? length : stop;
        l->runs[count++] = (struct kvt_attention_run){
            .rows = &l->row_index[r],
            .row_count = 1,
            .token_begin = l->begin,
            .read_count = read_end - l->begin,
            .append_count = stop - read_end,
            .k = plane_of(l, r, l->layer, 0) + l->begin * k_token_bytes(l),
            .v = plane_of(l, r, l->layer, 1) + l->begin * v_token_bytes(l),
        };
    }
    *piece = (struct run_kv_piece){l->layer, l->runs, count, NULL};
    l->begin = end;
    if (end == l->longest) {
        l->layer++;
        l->begin = 0;
    }
    return 1;
}

static int local_nothing(struct run_kv *kv, const struct run_kv_piece *piece) {
    (void)kv;
    (void)piece;
    return 0;
}

static int local_end(struct run_kv *kv) {
    struct local *l = local_of(kv);
    for (uint32_t r = 0; r < l->row_count; r++)
        l->rows[r].length += l->counts[r];
    if (--l->steps_left > 0)
        open_step(l);
    return 0;
}

static void local_abort(struct run_kv *kv) {
    local_of(kv)->steps_left = 0;
}

static uint32_t local_length(const struct run_kv *kv, uint32_t row) {
    return ((const struct local *)kv)->rows[row].length;
}

/*
 * Whether memory that processes share gets huge pages, as a daemon's device needs: then
 * this memory has them too, otherwise neither, so that the same is compared.
 */
static int shared_memory_has_huge_pages(void) {
    char text[128] = "";
    FILE *file = fopen("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "re");
    if (file) {
        if (!fgets(text, sizeof(text), file))
            text[0] = 0;
        (void)fclose(file);
    }
    return strstr(text, "[always]") || strstr(text, "[within_size]") || strstr(text, "[advise]") ||
           strstr(text, "[force]");
}

static int map_row(struct local *l, struct row *row) {
    void *planes = mmap(NULL, row_bytes(l), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (planes == MAP_FAILED)
        return kvt_fail(-KVT_ENOMEM, l->base.why, sizeof(l->base.why),
                        "kv: no address space for %zu MiB of one row; lower --context",
                        row_bytes(l) >> 20);
    (void)madvise(planes, row_bytes(l),
                  shared_memory_has_huge_pages() ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    *row = (struct row){planes, 0};
    return 0;
}

static void unmap_rows(const struct local *l, struct row *rows, uint32_t count) {
    for (uint32_t r = 0; rows && r < count; r++)
        if (rows[r].planes)
            (void)munmap(rows[r].planes, row_bytes(l));
    free(rows);
}

static void copy_row(const struct local *l, const struct row *from, struct row *to) {
    size_t at = 0;
    for (uint32_t layer = 0; layer < l->shape.layers; layer++) {
        memcpy(to->planes + at, from->planes + at, from->length * k_token_bytes(l));
        at += l->k_plane_bytes;
        memcpy(to->planes + at, from->planes + at, from->length * v_token_bytes(l));
        at += l->v_plane_bytes;
    }
    to->length = from->length;
}

static int local_repeat(struct run_kv *kv, uint32_t times) {
    struct local *l = local_of(kv);
    if ((uint64_t)l->row_count * times > l->shape.rows_max || times == 0 || l->steps_left > 0)
        return kvt_fail(-KVT_EINVAL, kv->why, sizeof(kv->why),
                        "kv: %" PRIu32 " rows cannot be repeated %" PRIu32 " times", l->row_count,
                        times);
    struct row *rows = calloc(l->shape.rows_max, sizeof(*rows));
    if (!rows)
        return kvt_fail(-KVT_ENOMEM, kv->why, sizeof(kv->why), "kv: out of memory");
    uint32_t count = l->row_count * times;
    for (uint32_t r = 0; r < count; r++) {
        if (map_row(l, &rows[r])) {
            unmap_rows(l, rows, r);
            return -KVT_ENOMEM;
        }
        copy_row(l, &l->rows[r / times], &rows[r]);
    }
    unmap_rows(l, l->rows, l->row_count);
    l->rows = rows;
    l->row_count = count;
    return 0;
}

static int local_crop(struct run_kv *kv, uint32_t row, uint32_t tokens) {
    struct local *l = local_of(kv);
    if (row >= l->row_count || tokens > l->rows[row].length || l->steps_left > 0)
        return kvt_fail(-KVT_EINVAL, kv->why, sizeof(kv->why),
                        "kv: row %" PRIu32 " has no %" PRIu32 " tokens to keep", row, tokens);
    l->rows[row].length = tokens;
    return 0;
}

static void local_mark(struct run_kv *kv) {
    (void)kv; /* nothing is counted here */
}

static void local_interrupt(struct run_kv *kv) {
    (void)kv; /* nothing waits here */
}

static void local_describe(struct run_kv *kv, char *text, size_t size) {
    struct local *l = local_of(kv);
    uint64_t tokens = 0;
    for (uint32_t r = 0; r < l->row_count; r++)
        tokens += l->rows[r].length;
    snprintf(text, size, "\"kv\": \"local\", \"kv_bytes\": %" PRIu64,
             tokens * l->shape.layers * (k_token_bytes(l) + v_token_bytes(l)));
}

static void local_close(struct run_kv *kv) {
    struct local *l = local_of(kv);
    unmap_rows(l, l->rows, l->shape.rows_max);
    free(l->counts);
    free(l->row_index);
    free(l->runs);
    free(l);
}

static const struct run_kv_ops local_ops = {
    .begin = local_begin,
    .next = local_next,
    .wait = local_nothing,
    .done = local_nothing,
    .end = local_end,
    .abort = local_abort,
    .length = local_length,
    .repeat = local_repeat,
    .crop = local_crop,
    .mark = local_mark,
    .interrupt = local_interrupt,
    .describe = local_describe,
    .close = local_close,
};

int run_kv_local_open(struct run_kv **out, const struct run_kv_shape *shape, uint32_t piece_tokens,
                      char *err, size_t err_size) {
    if (piece_tokens % KVT_SPLIT_TOKENS != 0)
        return kvt_fail(-KVT_EINVAL, err, err_size,
                        "kv: pieces of %" PRIu32 " tokens; a multiple of %d is possible",
                        piece_tokens, KVT_SPLIT_TOKENS);
    struct local *l = calloc(1, sizeof(*l));
    if (!l)
        return kvt_fail(-KVT_ENOMEM, err, err_size, "kv: out of memory");
    l->base.ops = &local_ops;
    l->shape = *shape;
    l->piece_tokens = piece_tokens ? piece_tokens : UINT32_MAX;
    l->k_plane_bytes = k_token_bytes(l) * shape->tokens_max;
    l->v_plane_bytes = v_token_bytes(l) * shape->tokens_max;
    l->rows = calloc(shape->rows_max, sizeof(*l->rows));
    l->counts = calloc(shape->rows_max, sizeof(*l->counts));
    l->row_index = calloc(shape->rows_max, sizeof(*l->row_index));
    l->runs = calloc(shape->rows_max, sizeof(*l->runs));
    int rc = l->rows && l->counts && l->row_index && l->runs ? 0 : -KVT_ENOMEM;
    for (uint32_t r = 0; rc == 0 && r < shape->rows; r++)
        rc = map_row(l, &l->rows[r]);
    if (rc) {
        kvt_fail(rc, err, err_size, "%s", l->base.why[0] ? l->base.why : "kv: out of memory");
        local_close(&l->base);
        return rc;
    }
    for (uint32_t r = 0; r < shape->rows_max; r++)
        l->row_index[r] = r;
    l->row_count = shape->rows;
    *out = &l->base;
    return 0;
}
