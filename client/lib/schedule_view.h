/* A schedule in the ring, read with every index and offset checked: the daemon is trusted, yet a bug
 * of its must become an error and not a wild pointer. Pure; any thread. Entries are copied out of
 * the shared ring before they are looked at, so that what was checked is what is used.
 *
 * Errors: -KVT_EPROTO, with a sentence in text[KVT_TEXT_BYTES] that names entry, field and range.
 */
#ifndef KVT_CLIENT_SCHEDULE_VIEW_H
#define KVT_CLIENT_SCHEDULE_VIEW_H

#include "client/kvtier.h"
#include "proto/limits.h"
#include "proto/schedule.h"

#include <stdint.h>

/* What a schedule must fit to. */
struct kvt_schedule_shape {
    uint32_t worker; /* KVT_SEGMENT or KVT_DENSE */
    uint32_t cache;
    uint32_t layer_count;
    uint32_t row_count;      /* rows of the cache */
    uint32_t step_row_count; /* rows that take part: a dense piece has planes for each */
    const struct kvt_layer_shape *layers; /* borrowed as long as the view is used */
};

struct kvt_schedule_view {
    const uint8_t *base; /* the schedule's first byte; borrowed */
    struct kvt_sched_header header;
    struct kvt_schedule_shape shape;
};

/* Checks the header, and that all arrays lie inside ring[offset, offset + bytes). */
int kvt_schedule_view_open(struct kvt_schedule_view *v, const struct kvt_schedule_shape *shape,
                           const void *ring, uint64_t ring_bytes, uint64_t offset, uint64_t bytes,
                           char *text) KVTIER_CHECK;

/* Entry `index` of each array; the index is checked too. */
int kvt_schedule_view_step(const struct kvt_schedule_view *v, uint32_t index,
                           struct kvt_sched_step *out, char *text) KVTIER_CHECK;
int kvt_schedule_view_move(const struct kvt_schedule_view *v, uint32_t index,
                           struct kvt_sched_move *out, char *text) KVTIER_CHECK;
int kvt_schedule_view_piece(const struct kvt_schedule_view *v, uint32_t index,
                            struct kvt_sched_piece *out, char *text) KVTIER_CHECK;
/* *rows points into the ring: run->row_count row indexes, each checked. */
int kvt_schedule_view_run(const struct kvt_schedule_view *v, uint32_t index,
                          struct kvt_sched_run *out, const uint32_t **rows,
                          char *text) KVTIER_CHECK;

/* Whether a run's, a dense piece's or a move's bytes lie inside their extents. */
int kvt_schedule_run_fits(const struct kvt_schedule_view *v, const struct kvt_sched_piece *p,
                          const struct kvt_sched_run *r, uint64_t extent_bytes,
                          char *text) KVTIER_CHECK;
int kvt_schedule_planes_fit(const struct kvt_schedule_view *v, const struct kvt_sched_piece *p,
                            uint64_t extent_bytes, char *text) KVTIER_CHECK;
int kvt_schedule_move_fits(const struct kvt_sched_move *m, uint64_t source_extent_bytes,
                           uint64_t target_extent_bytes, char *text) KVTIER_CHECK;

#endif
