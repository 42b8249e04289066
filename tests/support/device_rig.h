/* A device for tests and benches: started, with a host arena, and helpers that wait for the answer
 * to what they ask. A helper that cannot do its work aborts. */
#ifndef KVT_TESTS_DEVICE_RIG_H
#define KVT_TESTS_DEVICE_RIG_H

#include "tiers/device/device.h"

struct kvt_rig_config {
    const struct kvt_driver_ops *ops;
    uint64_t arena_bytes;
    uint64_t budget_bytes;
    uint64_t cut_bytes;
    uint32_t copy_threads;
    uint32_t sessions_max;
    uint32_t inflight_max;
    uint32_t spin_us;
};

struct kvt_rig {
    struct kvt_device *device;
    int notify_fd;
    uint8_t *arena;
    uint64_t arena_bytes;
};

/* The arena is there and added, all of it. */
void kvt_rig_start(struct kvt_rig *r, const struct kvt_rig_config *c);
void kvt_rig_stop(struct kvt_rig *r);

/* A memfd page, mapped; shared with processes that are forked later. Undo: kvt_rig_page_free. */
struct kvt_control_page *kvt_rig_page(void);
void kvt_rig_page_free(struct kvt_control_page *page);

/* Sends a command; waits while the queue is full. */
void kvt_rig_command(struct kvt_rig *r, const struct kvt_device_command *c);
void kvt_rig_submit(struct kvt_rig *r, struct kvt_program *p);
/* The next event; sleeps until there is one. */
struct kvt_device_event kvt_rig_event(struct kvt_rig *r);

/* These expect that nothing else is under way: the next event is the answer. */
uint8_t *kvt_rig_extent(struct kvt_rig *r, uint32_t extent, uint64_t bytes); /* mapped: munmap */
void kvt_rig_extent_destroy(struct kvt_rig *r, uint32_t extent);
void kvt_rig_open(struct kvt_rig *r, uint32_t session, struct kvt_control_page *page);
/* Completions that still come are swallowed; returns how many there were. */
uint32_t kvt_rig_close(struct kvt_rig *r, uint32_t session);

/* Building programs: room for so many operations of one copy and two dependencies each. */
struct kvt_program *kvt_rig_program(uint32_t session, uint32_t ops_max);
/* Appends an operation with one copy (none if bytes is 0). */
struct kvt_op *kvt_rig_op(struct kvt_program *p, enum kvt_op_kind kind, uint64_t id, uint16_t slot,
                          struct kvt_place source, struct kvt_place target, uint64_t bytes);
void kvt_rig_dep(struct kvt_program *p, uint64_t id); /* of the last operation */

static inline struct kvt_place kvt_on_device(uint32_t extent, uint64_t offset) {
    return (struct kvt_place){.tier = KVT_TIER_GPU, .extent = extent, .offset = offset};
}
static inline struct kvt_place kvt_on_host(uint64_t offset) {
    return (struct kvt_place){.tier = KVT_TIER_HOST, .offset = offset};
}

/* What a worker does with a counter: sleeps until it has reached the value; looks again for spin_us
 * first. */
void kvt_rig_counter_wait(struct kvt_counter *c, uint64_t value, uint32_t spin_us);

/* A stream of pieces through one session's slots, as a worker and its schedule know them: piece i
 * lies at host offset i % distinct * piece_bytes, comes into slot i % slots, and has append_bytes
 * behind it written back to append_offset + i * append_bytes. */
struct kvt_rig_stream {
    uint32_t session;
    uint32_t extent;
    uint32_t slots;
    uint32_t pieces;
    uint32_t distinct;
    uint64_t piece_bytes;
    uint64_t append_bytes; /* 0: nothing is written back */
    uint64_t append_offset;
};
#define KVT_RIG_GENERATION(stream, piece) ((piece) / (stream)->slots + 1)
static inline uint64_t kvt_rig_slot_bytes(const struct kvt_rig_stream *s) {
    return s->piece_bytes + s->append_bytes;
}
/* Operations: FILL 2i+1, WRITEBACK 2i+2 of each piece, then STEP 2*pieces+1, which waits for step
 * 1. One completion each. */
struct kvt_program *kvt_rig_stream_program(const struct kvt_rig_stream *s);
#define KVT_RIG_STREAM_OPS(stream) (2 * (stream)->pieces + 1)

#endif
