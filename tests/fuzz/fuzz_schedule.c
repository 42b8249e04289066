/* Schedules of any bytes: whatever the ring holds, the library reads inside it, and every address
 * that it would hand out lies inside its extent. */
#include "client/lib/schedule_view.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const struct kvt_layer_shape layers[3] = {
    {.kind = KVT_KIND_FULL,
     .kv_heads = 2,
     .k_head_dim = 8,
     .v_head_dim = 4,
     .dtype = KVT_DTYPE_F16},
    {.kind = KVT_KIND_FULL,
     .kv_heads = 1,
     .k_head_dim = 4,
     .v_head_dim = 0,
     .dtype = KVT_DTYPE_F32},
    {.kind = KVT_KIND_FULL,
     .kv_heads = 1024,
     .k_head_dim = 65536,
     .v_head_dim = 65536,
     .dtype = KVT_DTYPE_F32},
};

/* Any extent has some size; a large one lets large offsets through to the arithmetic. */
static uint64_t extent_bytes(uint32_t extent) {
    return extent % 2 == 0 ? 65536 : UINT64_C(1) << 47;
}

static void must(int holds) {
    if (!holds) {
        abort();
    }
}

static void walk_run(const struct kvt_schedule_view *v, const struct kvt_sched_piece *p,
                     uint32_t index, uint32_t *budget) {
    char text[KVT_TEXT_BYTES];
    struct kvt_sched_run r;
    const uint32_t *rows;
    if (kvt_schedule_view_run(v, index, &r, &rows, text) != 0) {
        return;
    }
    for (uint32_t i = 0; i<r.row_count && * budget> 0; i++, --*budget) {
        must(rows[i] < v->shape.row_count);
    }
    uint64_t bytes = extent_bytes(p->extent);
    if (kvt_schedule_run_fits(v, p, &r, bytes, text) == 0) {
        const struct kvt_layer_shape *l = &layers[p->layer];
        uint64_t token =
            (uint64_t)l->kv_heads * l->k_head_dim * (l->dtype == KVT_DTYPE_F32 ? 4 : 2);
        unsigned __int128 end =
            r.k_offset + (unsigned __int128)token * ((uint64_t)r.read_count + r.append_count);
        must(end <= bytes);
    }
}

static void walk_piece(const struct kvt_schedule_view *v, uint32_t index, uint32_t *budget) {
    char text[KVT_TEXT_BYTES];
    struct kvt_sched_piece p;
    struct kvt_sched_move m;
    if (kvt_schedule_view_piece(v, index, &p, text) != 0) {
        return;
    }
    must(p.layer < 3 && p.reader < 3);
    for (uint32_t i = 0; i<p.run_count && * budget> 0; i++, --*budget) {
        walk_run(v, &p, p.run_first + i, budget);
    }
    for (uint32_t i = 0; i<p.move_count && * budget> 0; i++, --*budget) {
        must(kvt_schedule_view_move(v, p.move_first + i, &m, text) == 0);
        if (kvt_schedule_move_fits(&m, extent_bytes(m.source_extent), extent_bytes(m.target_extent),
                                   text) == 0) {
            must((unsigned __int128)m.source_offset + m.bytes <= extent_bytes(m.source_extent));
            must((unsigned __int128)m.target_offset + m.bytes <= extent_bytes(m.target_extent));
        }
    }
    uint64_t bytes = extent_bytes(p.extent);
    if (kvt_schedule_planes_fit(v, &p, bytes, text) == 0) {
        uint64_t rows = v->shape.step_row_count;
        must((unsigned __int128)p.k_offset + (unsigned __int128)p.k_row_bytes * (rows - 1) <=
             bytes);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char text[KVT_TEXT_BYTES];
    struct kvt_schedule_view v;
    struct kvt_schedule_shape shape = {.worker = KVT_DENSE,
                                       .cache = 1,
                                       .layer_count = 3,
                                       .row_count = 4,
                                       .step_row_count = 4,
                                       .layers = layers};
    /* A copy of its own: a read beyond its end is seen. */
    uint8_t *ring = aligned_alloc(8, (size + 7) / 8 * 8 + 8);
    must(ring != NULL);
    if (size > 0) {
        memcpy(ring, data, size);
    }
    uint64_t ring_bytes = size / 8 * 8;
    uint8_t *exact = realloc(ring, ring_bytes > 0 ? ring_bytes : 1);
    ring = exact != NULL ? exact : ring;
    if (kvt_schedule_view_open(&v, &shape, ring, ring_bytes, 0, ring_bytes, text) == 0) {
        uint32_t budget = 4096; /* schedules may name the same entry again and again */
        struct kvt_sched_step step;
        for (uint32_t i = 0; i < v.header.steps_count; i++) {
            if (kvt_schedule_view_step(&v, i, &step, text) != 0) {
                continue;
            }
            for (uint32_t j = 0; j < step.piece_count && budget > 0; j++, budget--) {
                walk_piece(&v, step.piece_first + j, &budget);
            }
        }
    }
    free(ring);
    return 0;
}
