/* The schedule ring: what one STEP settled, as the worker reads it.
 *
 * One ring per session, a memfd that the daemon writes and the worker maps read-only. A STEP reply
 * names offset and length of one schedule in it; the schedule is not overwritten before its last
 * step has ended. All structs are little-endian, 8-byte aligned, and hold indexes into the arrays
 * behind the header; every offset is in bytes from the schedule's first byte.
 *
 *   header | steps[] | moves[] | pieces[] | runs[] | rows[]
 *
 * Order of use: first moves [0, moves_leading), in order, at once and also if the step is given up:
 * they stand. Then the pieces of each step, in order.
 * For a streamed piece: wait for ready[slot] >= ready, do its duplicates (moves), attend and
 * append, and when the layer `last_reader` has been attended, post done[slot] = done. Resident
 * pieces have no counters. After a step's last piece: post `step` behind everything it enqueued.
 *
 * Addresses are (extent, byte offset); the library maps an extent when it first meets it.
 */
#ifndef KVT_PROTO_SCHEDULE_H
#define KVT_PROTO_SCHEDULE_H

#include <assert.h>
#include <stdint.h>

#define KVT_SCHEDULE_MAGIC   0x5354564bu /* "KVTS" */
#define KVT_SCHEDULE_VERSION 1

struct kvt_sched_header {
    uint32_t magic;
    uint32_t version;
    uint32_t bytes; /* whole schedule */
    uint32_t cache; /* cache id */
    uint64_t first_step;
    uint32_t steps_count;
    uint32_t moves_count;
    uint32_t moves_leading; /* moves done before the first piece; the rest belong to pieces */
    uint32_t pieces_count;
    uint32_t runs_count;
    uint32_t rows_count;
    uint32_t steps_offset;
    uint32_t moves_offset;
    uint32_t pieces_offset;
    uint32_t runs_offset;
    uint32_t rows_offset;
    uint32_t reserved;
};

struct kvt_sched_step {
    uint64_t step;
    uint32_t piece_first;
    uint32_t piece_count;
};

/* A copy inside device memory that the worker's library enqueues. Ranges do not overlap. */
struct kvt_sched_move {
    uint32_t source_extent;
    uint32_t target_extent;
    uint64_t source_offset;
    uint64_t target_offset;
    uint64_t bytes;
};

#define KVT_PIECE_STREAMED (1u << 0) /* has slot, ready and done */
#define KVT_PIECE_LAST     (1u << 1) /* the last piece of this layer's listing */
#define KVT_PIECE_REREAD   (1u << 2) /* listed again for a later layer that reads this layer's KV */

struct kvt_sched_piece {
    uint32_t layer;       /* whose K and V these are */
    uint32_t reader;      /* layer that attends now; differs from `layer` only with REREAD */
    uint32_t last_reader; /* done is due when this layer has been attended */
    uint32_t flags;       /* KVT_PIECE_* */
    uint32_t slot;        /* 0 .. KVT_SLOTS_MAX-1, only if streamed */
    uint32_t extent;
    uint32_t run_first;
    uint32_t run_count;
    uint32_t move_first; /* duplicates to do behind ready, before attending */
    uint32_t move_count;
    uint64_t ready; /* value to wait for */
    uint64_t done;  /* value to post (equal to ready) */
    /* Dense workers: the planes as [row][token][kv_head][head_dim]; rows in the order of the step's
     * row list. 0 for segment workers, whose runs say everything. */
    uint64_t k_offset;
    uint64_t v_offset;
    uint64_t k_row_bytes; /* stride between rows */
    uint64_t v_row_bytes;
    uint32_t token_capacity; /* tokens that a row's plane has room for */
    uint32_t reserved;
};

/* Tokens that lie in one stretch: [token_begin, token_begin + read_count) are there, and the step
 * appends append_count more behind them. Read by every row of the row set; only a run with one row
 * appends. */
struct kvt_sched_run {
    uint32_t row_first; /* index into rows[] */
    uint32_t row_count;
    uint32_t token_begin;
    uint32_t read_count;
    uint32_t append_count;
    uint32_t reserved;
    uint64_t k_offset; /* of token_begin's K, in the piece's extent */
    uint64_t v_offset;
};

static_assert(sizeof(struct kvt_sched_header) == 72, "fixed layout");
static_assert(sizeof(struct kvt_sched_step) == 16, "fixed layout");
static_assert(sizeof(struct kvt_sched_move) == 32, "fixed layout");
static_assert(sizeof(struct kvt_sched_piece) == 96, "fixed layout");
static_assert(sizeof(struct kvt_sched_run) == 40, "fixed layout");

#endif
