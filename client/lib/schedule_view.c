#include "client/lib/schedule_view.h"

#include "proto/control_page.h"
#include "proto/layout.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

__attribute__((format(printf, 2, 3))) static int refuse(char *text, const char *format, ...) {
    int used = snprintf(text, KVT_TEXT_BYTES, "schedule: ");
    va_list args;
    va_start(args, format);
    (void)vsnprintf(text + used, KVT_TEXT_BYTES - (size_t)used, format, args);
    va_end(args);
    return -KVT_EPROTO;
}

static bool inside(uint64_t first, uint64_t count, uint64_t limit) {
    return first <= limit && count <= limit - first;
}

/* ---- header ----------------------------------------------------------------------------------- */

static int check_array(const struct kvt_sched_header *h, const char *name, uint32_t offset,
                       uint32_t count, uint32_t entry_bytes, char *text) {
    if (offset < sizeof *h || offset % (entry_bytes % 8 == 0 ? 8 : 4) != 0 ||
        !inside(offset, (uint64_t)count * entry_bytes, h->bytes)) {
        return refuse(text, "%u %s at offset %u do not lie inside its %u bytes", count, name,
                      offset, h->bytes);
    }
    return 0;
}

static int check_arrays(const struct kvt_sched_header *h, char *text) {
    int rc = check_array(h, "steps", h->steps_offset, h->steps_count, sizeof(struct kvt_sched_step),
                         text);
    if (rc == 0) {
        rc = check_array(h, "moves", h->moves_offset, h->moves_count, sizeof(struct kvt_sched_move),
                         text);
    }
    if (rc == 0) {
        rc = check_array(h, "pieces", h->pieces_offset, h->pieces_count,
                         sizeof(struct kvt_sched_piece), text);
    }
    if (rc == 0) {
        rc = check_array(h, "runs", h->runs_offset, h->runs_count, sizeof(struct kvt_sched_run),
                         text);
    }
    if (rc == 0) {
        rc = check_array(h, "rows", h->rows_offset, h->rows_count, sizeof(uint32_t), text);
    }
    return rc;
}

static int check_header(const struct kvt_sched_header *h, uint32_t cache, uint64_t bytes,
                        char *text) {
    if (h->magic != KVT_SCHEDULE_MAGIC || h->version != KVT_SCHEDULE_VERSION) {
        return refuse(text, "magic %08x version %u; %08x version %u is expected", h->magic,
                      h->version, KVT_SCHEDULE_MAGIC, KVT_SCHEDULE_VERSION);
    }
    if (h->bytes < sizeof *h || h->bytes > bytes) {
        return refuse(text, "it says %u bytes; the reply says %llu", h->bytes,
                      (unsigned long long)bytes);
    }
    if (h->cache != cache) {
        return refuse(text, "it is for cache %u; cache %u was asked for", h->cache, cache);
    }
    if (h->steps_count < 1 || h->steps_count > KVT_STEPS_AHEAD_MAX) {
        return refuse(text, "%u steps; accepted is 1 to %d", h->steps_count, KVT_STEPS_AHEAD_MAX);
    }
    if (h->moves_leading > h->moves_count) {
        return refuse(text, "%u leading moves of %u", h->moves_leading, h->moves_count);
    }
    return check_arrays(h, text);
}

int kvt_schedule_view_open(struct kvt_schedule_view *v, const struct kvt_schedule_shape *shape,
                           const void *ring, uint64_t ring_bytes, uint64_t offset, uint64_t bytes,
                           char *text) {
    struct kvt_sched_header h;
    if (!inside(offset, bytes, ring_bytes) || offset % 8 != 0 || bytes < sizeof h) {
        return refuse(text, "%llu bytes at offset %llu do not lie inside the ring of %llu bytes",
                      (unsigned long long)bytes, (unsigned long long)offset,
                      (unsigned long long)ring_bytes);
    }
    const uint8_t *base = (const uint8_t *)ring + offset;
    memcpy(&h, base, sizeof h);
    int rc = check_header(&h, shape->cache, bytes, text);
    if (rc != 0) {
        return rc;
    }
    *v = (struct kvt_schedule_view){.base = base, .header = h, .shape = *shape};
    return 0;
}

/* ---- entries ---------------------------------------------------------------------------------- */

static int copy_out(const struct kvt_schedule_view *v, const char *name, uint32_t index,
                    uint32_t count, uint32_t offset, void *out, size_t entry_bytes, char *text) {
    if (index >= count) {
        return refuse(text, "%s %u of %u", name, index, count);
    }
    memcpy(out, v->base + offset + (size_t)index * entry_bytes, entry_bytes);
    return 0;
}

int kvt_schedule_view_step(const struct kvt_schedule_view *v, uint32_t index,
                           struct kvt_sched_step *out, char *text) {
    const struct kvt_sched_header *h = &v->header;
    struct kvt_sched_step s;
    int rc = copy_out(v, "step", index, h->steps_count, h->steps_offset, &s, sizeof s, text);
    if (rc != 0) {
        return rc;
    }
    if (s.step != h->first_step + index) {
        return refuse(text, "step %u has number %llu; %llu is expected", index,
                      (unsigned long long)s.step, (unsigned long long)(h->first_step + index));
    }
    if (!inside(s.piece_first, s.piece_count, h->pieces_count)) {
        return refuse(text, "step %u: pieces %u and %u more; there are %u", index, s.piece_first,
                      s.piece_count, h->pieces_count);
    }
    *out = s;
    return 0;
}

int kvt_schedule_view_move(const struct kvt_schedule_view *v, uint32_t index,
                           struct kvt_sched_move *out, char *text) {
    const struct kvt_sched_header *h = &v->header;
    return copy_out(v, "move", index, h->moves_count, h->moves_offset, out, sizeof *out, text);
}

static int check_layers(const struct kvt_schedule_view *v, uint32_t index,
                        const struct kvt_sched_piece *p, char *text) {
    if (p->layer >= v->shape.layer_count || p->last_reader >= v->shape.layer_count ||
        p->reader < p->layer || p->reader > p->last_reader) {
        return refuse(text, "piece %u: layer %u, reader %u, last reader %u of %u layers", index,
                      p->layer, p->reader, p->last_reader, v->shape.layer_count);
    }
    return 0;
}

int kvt_schedule_view_piece(const struct kvt_schedule_view *v, uint32_t index,
                            struct kvt_sched_piece *out, char *text) {
    const struct kvt_sched_header *h = &v->header;
    struct kvt_sched_piece p;
    int rc = copy_out(v, "piece", index, h->pieces_count, h->pieces_offset, &p, sizeof p, text);
    if (rc == 0) {
        rc = check_layers(v, index, &p, text);
    }
    if (rc != 0) {
        return rc;
    }
    if ((p.flags & KVT_PIECE_STREAMED) != 0 && p.slot >= KVT_SLOTS_MAX) {
        return refuse(text, "piece %u: slot is %u; accepted is 0 to %d", index, p.slot,
                      KVT_SLOTS_MAX - 1);
    }
    if ((p.flags & KVT_PIECE_STREAMED) != 0 && (p.ready >= KVT_POISON || p.done >= KVT_POISON)) {
        return refuse(text, "piece %u: a counter's value is not below 2^62", index);
    }
    if (!inside(p.run_first, p.run_count, h->runs_count)) {
        return refuse(text, "piece %u: runs %u and %u more; there are %u", index, p.run_first,
                      p.run_count, h->runs_count);
    }
    if (!inside(p.move_first, p.move_count, h->moves_count)) {
        return refuse(text, "piece %u: moves %u and %u more; there are %u", index, p.move_first,
                      p.move_count, h->moves_count);
    }
    *out = p;
    return 0;
}

static int check_rows(const struct kvt_schedule_view *v, uint32_t index,
                      const struct kvt_sched_run *r, const uint32_t *rows, char *text) {
    for (uint32_t i = 0; i < r->row_count; i++) {
        uint32_t row = __atomic_load_n(&rows[i], __ATOMIC_RELAXED);
        if (row >= v->shape.row_count) {
            return refuse(text, "run %u: row is %u; the cache has %u", index, row,
                          v->shape.row_count);
        }
    }
    return 0;
}

int kvt_schedule_view_run(const struct kvt_schedule_view *v, uint32_t index,
                          struct kvt_sched_run *out, const uint32_t **rows, char *text) {
    const struct kvt_sched_header *h = &v->header;
    struct kvt_sched_run r;
    int rc = copy_out(v, "run", index, h->runs_count, h->runs_offset, &r, sizeof r, text);
    if (rc != 0) {
        return rc;
    }
    if (r.row_count < 1 || !inside(r.row_first, r.row_count, h->rows_count)) {
        return refuse(text, "run %u: rows %u and %u more; there are %u", index, r.row_first,
                      r.row_count, h->rows_count);
    }
    if (r.append_count > 0 && r.row_count != 1) {
        return refuse(text, "run %u: appends to %u rows at once", index, r.row_count);
    }
    if ((uint64_t)r.token_begin + r.read_count + r.append_count > KVT_TOKENS_MAX) {
        return refuse(text, "run %u: tokens %u + %u + %u; accepted is up to %d", index,
                      r.token_begin, r.read_count, r.append_count, KVT_TOKENS_MAX);
    }
    const uint32_t *first = (const uint32_t *)(const void *)(v->base + h->rows_offset);
    rc = check_rows(v, index, &r, first + r.row_first, text);
    if (rc != 0) {
        return rc;
    }
    *out = r;
    *rows = first + r.row_first;
    return 0;
}

/* ---- against the extents ---------------------------------------------------------------------- */

static int check_plane(const char *what, uint32_t number, uint64_t offset, uint64_t bytes,
                       uint32_t element_bytes, uint64_t extent_bytes, char *text) {
    if (offset % element_bytes != 0 || !inside(offset, bytes, extent_bytes)) {
        return refuse(text, "%s of layer %u: %llu bytes at offset %llu of an extent of %llu bytes",
                      what, number, (unsigned long long)bytes, (unsigned long long)offset,
                      (unsigned long long)extent_bytes);
    }
    return 0;
}

static uint64_t k_token_bytes(const struct kvt_layer_shape *l) {
    return (uint64_t)l->kv_heads * l->k_head_dim * kvt_dtype_bytes(l->dtype);
}

static uint64_t v_token_bytes(const struct kvt_layer_shape *l) {
    return (uint64_t)l->kv_heads * l->v_head_dim * kvt_dtype_bytes(l->dtype);
}

int kvt_schedule_run_fits(const struct kvt_schedule_view *v, const struct kvt_sched_piece *p,
                          const struct kvt_sched_run *r, uint64_t extent_bytes, char *text) {
    const struct kvt_layer_shape *l = &v->shape.layers[p->layer];
    uint64_t tokens = (uint64_t)r->read_count + r->append_count;
    uint32_t element_bytes = kvt_dtype_bytes(l->dtype);
    int rc = check_plane("a run's K", p->layer, r->k_offset, tokens * k_token_bytes(l),
                         element_bytes, extent_bytes, text);
    if (rc == 0 && l->v_head_dim != 0) {
        rc = check_plane("a run's V", p->layer, r->v_offset, tokens * v_token_bytes(l),
                         element_bytes, extent_bytes, text);
    }
    return rc;
}

/* The last row's plane ends inside the extent, and no multiplication overflows on the way. */
static int check_rows_planes(const char *what, const struct kvt_schedule_view *v,
                             const struct kvt_sched_piece *p, uint64_t offset, uint64_t row_bytes,
                             uint64_t token_bytes, uint64_t extent_bytes, char *text) {
    uint64_t plane_bytes = (uint64_t)p->token_capacity * token_bytes;
    uint32_t rows = v->shape.step_row_count;
    if (rows == 0) {
        return 0;
    }
    if (rows > 1 && (row_bytes < plane_bytes || row_bytes > extent_bytes)) {
        return refuse(text, "%s of layer %u: rows of %llu bytes are %llu bytes apart", what,
                      p->layer, (unsigned long long)plane_bytes, (unsigned long long)row_bytes);
    }
    uint64_t before_last = rows > 1 ? (rows - 1) * row_bytes : 0;
    uint32_t element_bytes = kvt_dtype_bytes(v->shape.layers[p->layer].dtype);
    return check_plane(what, p->layer, offset, before_last + plane_bytes, element_bytes,
                       extent_bytes, text);
}

int kvt_schedule_planes_fit(const struct kvt_schedule_view *v, const struct kvt_sched_piece *p,
                            uint64_t extent_bytes, char *text) {
    const struct kvt_layer_shape *l = &v->shape.layers[p->layer];
    if (p->token_capacity > KVT_TOKENS_MAX) {
        return refuse(text, "layer %u: token_capacity is %u; accepted is up to %d", p->layer,
                      p->token_capacity, KVT_TOKENS_MAX);
    }
    int rc = check_rows_planes("K planes", v, p, p->k_offset, p->k_row_bytes, k_token_bytes(l),
                               extent_bytes, text);
    if (rc == 0 && l->v_head_dim != 0) {
        rc = check_rows_planes("V planes", v, p, p->v_offset, p->v_row_bytes, v_token_bytes(l),
                               extent_bytes, text);
    }
    return rc;
}

int kvt_schedule_move_fits(const struct kvt_sched_move *m, uint64_t source_extent_bytes,
                           uint64_t target_extent_bytes, char *text) {
    if (!inside(m->source_offset, m->bytes, source_extent_bytes) ||
        !inside(m->target_offset, m->bytes, target_extent_bytes)) {
        return refuse(text,
                      "a move of %llu bytes from offset %llu of %llu to offset %llu of %llu bytes",
                      (unsigned long long)m->bytes, (unsigned long long)m->source_offset,
                      (unsigned long long)source_extent_bytes, (unsigned long long)m->target_offset,
                      (unsigned long long)target_extent_bytes);
    }
    uint64_t distance = m->source_offset > m->target_offset ? m->source_offset - m->target_offset
                                                            : m->target_offset - m->source_offset;
    if (m->source_extent == m->target_extent && distance < m->bytes) {
        return refuse(text, "a move of %llu bytes overlaps itself", (unsigned long long)m->bytes);
    }
    return 0;
}
