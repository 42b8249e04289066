/* Programs: what the engine wants a device's copy thread to do, as plain data.
 *
 * A program holds operations of one session in the order of their use. Each operation carries its
 * gates: a value of its slot's `done` counter, the completion of earlier operations, a value of the
 * `step` counter. Whether gates are open is decided by the issuer (issuer.h), nowhere else, so that
 * the simulator runs exactly what orders real copies.
 *
 * Ownership: the engine builds a program in one allocation and hands it over with
 * KVT_ACTION_PROGRAM; the issuer owns it until each of its operations has had its one completion,
 * and then frees it.
 */
#ifndef KVT_ENGINE_PROGRAM_H
#define KVT_ENGINE_PROGRAM_H

#include <stdbool.h>
#include <stdint.h>

/* Where bytes are. */
enum kvt_tier_id { KVT_TIER_GPU = 0, KVT_TIER_HOST = 1, KVT_TIER_NVME = 2, KVT_TIER_REMOTE = 3 };

struct kvt_place {
    uint32_t tier;   /* enum kvt_tier_id */
    uint32_t extent; /* gpu: the extent's id; host: 0 */
    uint64_t offset; /* bytes, in the extent or in the host arena */
};

struct kvt_copy {
    struct kvt_place source;
    struct kvt_place target;
    uint64_t bytes;
};

struct kvt_op_progress;

enum kvt_op_kind {
    KVT_OP_FILL = 1,      /* copies into a slot, then posts ready[slot] = generation */
    KVT_OP_WRITEBACK = 2, /* copies appended tokens out of a slot, once done[slot] == generation */
    KVT_OP_COPY = 3,      /* copies without a slot: copy-on-write on the host, migration */
    KVT_OP_STEP = 4,      /* no copy: completes once `step` has reached step_wait */
};

/* Higher classes go first; within one, sessions share by bytes. */
enum kvt_op_class { KVT_CLASS_DECODE = 0, KVT_CLASS_PREFILL = 1, KVT_CLASS_BACKGROUND = 2 };

struct kvt_op {
    uint64_t id;         /* of the session; ascending in the order of submission */
    uint8_t kind;        /* enum kvt_op_kind */
    uint8_t traffic;     /* enum kvt_op_class */
    uint16_t slot;       /* FILL, WRITEBACK */
    uint32_t copy_first; /* into the program's copies */
    uint32_t copy_count; /* 0 is allowed: an empty FILL only posts */
    uint32_t dep_first; /* into the program's deps: ids of the same session that must be complete */
    uint32_t dep_count;
    uint64_t generation; /* FILL: value posted; WRITEBACK: value of done[slot] waited for */
    uint64_t done_wait;  /* FILL: done[slot] must equal this first; 0: no such gate */
    uint64_t step_wait;  /* STEP */
};

struct kvt_program {
    uint32_t session;
    uint32_t op_count;
    uint32_t copy_count;
    uint32_t dep_count;
    struct kvt_op *ops; /* the arrays lie in the program's own allocation */
    struct kvt_copy *copies;
    uint64_t *deps;
    /* Zeroed bits for the issuer's set of what is outstanding, so that it needs no memory to take the
     * program over: owned, or NULL if what it has suffices. */
    uint64_t *window;
    uint64_t window_capacity;
    /* The issuer's own. */
    struct kvt_op_progress *progress;
    struct kvt_program *next;
    struct kvt_program *previous;
    uint32_t ops_left; /* completions not yet collected */
};

/* One allocation with room for so many, all counts 0; NULL if there is no memory. Freed by kvt_program_free. */
struct kvt_program *kvt_program_create(uint32_t session, uint32_t ops_max, uint32_t copies_max,
                                       uint32_t deps_max);
void kvt_program_free(struct kvt_program *p);

enum kvt_completion_status {
    KVT_DONE = 0,
    KVT_CANCELLED = 1, /* never submitted: not one byte was copied, nothing was posted */
    KVT_FAILED = 2,    /* submitted, and a copy failed; a FILL that failed posts nothing */
};

/* Every operation of a program has exactly one completion. */
struct kvt_completion {
    uint32_t session;
    uint32_t status; /* enum kvt_completion_status */
    uint64_t op;
    uint64_t bytes; /* copied by it */
};

#endif
