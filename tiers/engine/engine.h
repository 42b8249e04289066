/* The engine: owns sessions, caches, blocks, device extents, host memory, budgets and schedules as
 * metadata. A pure state machine: no I/O, no clock, no threads. It is given requests, completions
 * and the time, and returns actions. Owner thread: the daemon's loop (or the simulator).
 *
 * After every call of a kvt_engine_* function that is not const, the caller takes actions with
 * kvt_engine_action until it returns false, and carries them out in order.
 *
 * Life of a session: kvt_engine_session_open -> requests -> kvt_engine_session_hangup (the attach
 * socket closed; caches are dropped, device memory stays charged) -> kvt_engine_session_dead (the
 * process is certainly gone) -> KVT_ACTION_SESSION_FREED, after which the index may be used again.
 */
#ifndef KVT_ENGINE_ENGINE_H
#define KVT_ENGINE_ENGINE_H

#include "proto/errors.h"
#include "proto/layout.h"
#include "proto/limits.h"
#include "tiers/engine/program.h"

struct kvt_engine;

struct kvt_engine_device {
    uint64_t budget_bytes;
    uint64_t worker_max_bytes; /* that one session may hold; 0: the budget */
    uint64_t granule_bytes;    /* extents are whole multiples: 4 KiB (cpu), 2 MiB (cuda) */
    uint64_t extent_bytes;     /* size of an extent that packs small things */
    uint64_t piece_bytes;      /* default size of a segment worker's streamed piece */
};

struct kvt_engine_config {
    uint32_t device_count;
    struct kvt_engine_device devices[KVT_DEVICES_MAX];
    uint64_t host_budget_bytes;
    uint64_t host_worker_max_bytes; /* that one session may hold; 0: the budget */
    uint64_t host_chunk_bytes;      /* the host arena grows and shrinks by whole chunks */
    uint64_t host_keep_bytes;       /* whole chunks of it are there from the start, and for good */
    uint64_t host_range_bytes;      /* these are asked for in ranges of up to so much; 0: a chunk */
    uint32_t block_tokens;          /* 256 */
    uint32_t sessions_max;
    uint32_t caches_max;    /* of the daemon */
    uint32_t idle_after_ms; /* a session without an open step for so long is idle */
    uint32_t reclaim_deadline_ms;
    bool poison_host; /* tests: nothing relies on zeroes in fresh host memory */
};

/* With host_keep_bytes there are actions at once. */
int kvt_engine_create(const struct kvt_engine_config *config, struct kvt_engine **out)
    __attribute__((warn_unused_result));
void kvt_engine_free(struct kvt_engine *e);

/* ---- sessions -------------------------------------------------------------------------------- */

struct kvt_session_options {
    uint32_t tenant;      /* memory never crosses tenants un-zeroed */
    uint32_t device;      /* index in the configuration */
    uint32_t worker_kind; /* enum kvt_worker_kind */
    bool keeps_addresses; /* it can unmap an extent and keep its addresses */
    void *ring;           /* schedule ring, zeroed memory; borrowed until SESSION_FREED */
    uint64_t ring_bytes;
};

/* Returns the session's index (>= 0), or -KVT_EBUSY. The same index names it to the issuer. */
int kvt_engine_session_open(struct kvt_engine *e, const struct kvt_session_options *o)
    __attribute__((warn_unused_result));
/* The attach socket hung up. Idempotent. */
void kvt_engine_session_hangup(struct kvt_engine *e, uint32_t session);
/* The process is certainly gone (implies hang-up). Idempotent. */
void kvt_engine_session_dead(struct kvt_engine *e, uint32_t session);
/* Frees the session's caches and host memory and asks for its device memory (RECLAIM). Further
 * requests get -KVT_EEVICTED. What it still pins is in kvt_session_info.device_bytes. */
void kvt_engine_session_evict(struct kvt_engine *e, uint32_t session);

/* ---- requests -------------------------------------------------------------------------------- */

enum kvt_request_kind {
    KVT_REQUEST_CREATE = 1,
    KVT_REQUEST_CLOSE,
    KVT_REQUEST_STEP,
    KVT_REQUEST_ABORT,
    KVT_REQUEST_ACQUIRE,
    KVT_REQUEST_FORK,
    KVT_REQUEST_REORDER,
    KVT_REQUEST_REPEAT,
    KVT_REQUEST_SELECT,
    KVT_REQUEST_CROP,
    KVT_REQUEST_RESET,
};

struct kvt_cache_options {
    uint32_t mode;
    uint32_t codec;
    uint32_t rows;
    uint32_t tokens_max;          /* 0: no limit (dynamic modes) */
    uint32_t append_max;          /* the most tokens that one step appends to a row */
    uint32_t piece_tokens;        /* 0: from piece_bytes */
    uint32_t resident_layers_max; /* UINT32_MAX: no limit */
    uint8_t fingerprint[KVT_FINGERPRINT_BYTES];
    char name[KVT_NAME_BYTES];
};

struct kvt_request {
    uint32_t kind; /* enum kvt_request_kind */
    uint32_t session;
    uint64_t tag; /* comes back in the answer */
    uint32_t cache;
    const struct kvt_layout *layout;         /* CREATE; borrowed for the call */
    const struct kvt_cache_options *options; /* CREATE; borrowed for the call */
    const uint32_t
        *rows; /* STEP: rows that take part; FORK, REORDER, SELECT; borrowed for the call */
    const uint32_t *values; /* STEP: tokens of each; CROP: lengths; borrowed for the call */
    uint32_t count;         /* of rows and values; 0: STEP, FORK: all rows */
    uint32_t tokens;        /* STEP with count 0, ACQUIRE: tokens for every row */
    uint32_t steps;         /* STEP */
    uint32_t times;         /* REPEAT */
    uint32_t layer;         /* ACQUIRE */
    uint64_t first_step;    /* ABORT */
};

/* Every request has exactly one KVT_ACTION_ANSWER, at once or later, unless its session has hung
 * up before. Requests on a cache are answered in order. */
void kvt_engine_request(struct kvt_engine *e, const struct kvt_request *r);

struct kvt_answer {
    uint64_t tag;
    uint32_t code; /* 0 or positive enum kvt_error */
    char text[KVT_TEXT_BYTES];
    uint32_t cache;
    /* CREATE */
    uint32_t slots;
    uint64_t slot_bytes;
    uint32_t resident_layers;
    /* STEP, ACQUIRE */
    uint64_t first_step;
    uint32_t steps;
    uint64_t ring_offset;
    uint64_t ring_bytes;
    /* STEP, ACQUIRE, FORK, ..., RESET, ABORT: tokens of each row; valid until the next engine call */
    const uint32_t *lengths;
    uint32_t length_count;
    uint64_t committed_step;
};

/* ---- completions and time -------------------------------------------------------------------- */

void kvt_engine_completion(struct kvt_engine *e, const struct kvt_completion *c);
/* The issuer of the session's device holds nothing of it any more (after SESSION_CLOSE). */
void kvt_engine_session_drained(struct kvt_engine *e, uint32_t session);
/* code 0, or the reason why there is no memory: the extent does not exist then. */
void kvt_engine_extent_created(struct kvt_engine *e, uint32_t extent, int code);
void kvt_engine_extent_destroyed(struct kvt_engine *e, uint32_t extent);
/* The worker has unmapped the extent. Unknown extents are ignored (a lie harms nobody). */
void kvt_engine_extent_reclaimed(struct kvt_engine *e, uint32_t session, uint32_t extent);
/* [offset, offset + bytes) of the host arena, as it was asked for, is usable (code 0), or is not to be
 * had. If it was to be kept, no more is asked for then; a cache that needs it asks again. */
void kvt_engine_host_grown(struct kvt_engine *e, uint64_t offset, uint64_t bytes, int code);
void kvt_engine_host_shrunk(struct kvt_engine *e, uint64_t offset, uint64_t bytes);
/* The device failed for good: every session on it fails its steps and requests. */
void kvt_engine_device_lost(struct kvt_engine *e, uint32_t device);
/* Time, monotonic. Call it at least when kvt_engine_deadline_ms has passed. */
void kvt_engine_tick(struct kvt_engine *e, uint64_t now_ms);
uint64_t kvt_engine_deadline_ms(const struct kvt_engine *e); /* UINT64_MAX: none */

/* ---- actions --------------------------------------------------------------------------------- */

enum kvt_action_kind {
    KVT_ACTION_ANSWER = 1,    /* session, answer */
    KVT_ACTION_PROGRAM,       /* device, program: handed over to the issuer */
    KVT_ACTION_CANCEL,        /* device, session, value = first operation */
    KVT_ACTION_SESSION_OPEN,  /* device, session: tell the issuer */
    KVT_ACTION_SESSION_CLOSE, /* device, session: tell the issuer; drained comes back */
    KVT_ACTION_SESSION_FREED, /* session: nothing refers to page, ring or index any more */
    KVT_ACTION_EXTENT_CREATE, /* device, session, extent, bytes: zeroed memory; also for one that was
                                  destroyed and whose addresses are kept */
    KVT_ACTION_EXTENT_SEND,   /* session, extent, bytes: export it over the attach socket */
    KVT_ACTION_EXTENT_RECLAIM, /* session, extent, value: ask the worker to unmap it; 1: and to keep its
                                  addresses. Of one that has no memory: these are given up */
    KVT_ACTION_EXTENT_DESTROY, /* device, extent */
    KVT_ACTION_HOST_GROW,      /* offset, bytes */
    KVT_ACTION_HOST_SHRINK,    /* offset, bytes */
    KVT_ACTION_POST_READY,     /* session, slot, value: store ready[slot], wake */
    KVT_ACTION_POST_COMMITTED, /* session, value: store committed, wake */
    KVT_ACTION_POST_FAILED, /* session, value, code: store aux then failed, wake; value may be 0 */
};

struct kvt_action {
    uint32_t kind;
    uint32_t device;
    uint32_t session;
    uint32_t extent;
    uint32_t slot;
    uint32_t code;
    uint64_t value;
    uint64_t offset;
    uint64_t bytes;
    struct kvt_program *program; /* PROGRAM */
    struct kvt_answer *answer;   /* ANSWER; valid until the next engine call */
};

/* Takes the next action; false: none. */
bool kvt_engine_action(struct kvt_engine *e, struct kvt_action *out);

/* ---- what can be asked (const; any time on the owner thread) ---------------------------------- */

struct kvt_counters {
    uint64_t to_device_bytes;   /* by fills that a schedule used */
    uint64_t from_device_bytes; /* by write-backs */
    uint64_t prefetch_discarded_bytes;
    uint64_t migrated_bytes; /* residency changes, either direction */
    uint64_t
        compacted_bytes; /* moved inside device memory, so that holes become room; by session */
    uint64_t copied_on_write_bytes;
    uint64_t steps_committed;
    uint64_t steps_failed;
    uint64_t tokens_appended;
};

struct kvt_tier_info {
    uint64_t budget_bytes;
    uint64_t used_bytes;        /* charged: extents (gpu), chunks (host) */
    uint64_t live_bytes;        /* of these, allocated to caches and slots */
    uint64_t pinned_dead_bytes; /* charged to hung-up or evicted sessions */
    uint64_t kept_bytes;        /* host: there for good, or coming for that */
    bool keep_pending;          /* host: more of what is to be kept comes */
};

enum kvt_session_state {
    KVT_SESSION_IDLE = 1,
    KVT_SESSION_STEP,
    KVT_SESSION_RECLAIMING, /* evicted or hung up; still pins device memory */
};

struct kvt_session_info {
    uint32_t session;
    uint32_t state;
    uint32_t tenant;
    uint32_t device;
    uint32_t worker_kind;
    uint32_t cache_count;
    uint64_t device_bytes;
    uint64_t host_bytes;
    uint64_t idle_ms;
    bool migrating; /* layers of it are on their way between tiers, or being compacted */
    struct kvt_counters counters;
};

struct kvt_cache_info {
    uint32_t cache;
    uint32_t session;
    uint32_t mode;
    uint32_t rows;
    uint32_t layer_count;
    uint32_t tokens_longest;
    uint64_t tokens_total;
    uint64_t device_bytes;
    uint64_t host_bytes;
    char name[KVT_NAME_BYTES];
    uint8_t layers[KVT_LAYERS_MAX]; /* 'R' resident, 'S' streamed, 'I' idle in host memory */
    uint32_t slots;                 /* of its session, shared by the session's caches */
    uint64_t slot_bytes;
    struct kvt_counters counters;
    uint64_t need_to_device_bytes; /* of the last committed step */
    uint64_t need_from_device_bytes;
};

void kvt_engine_device_info(const struct kvt_engine *e, uint32_t device, struct kvt_tier_info *out);
void kvt_engine_host_info(const struct kvt_engine *e, struct kvt_tier_info *out);
/* The session or cache at or after index *at; advances *at behind it; false: no more. */
bool kvt_engine_session_info(const struct kvt_engine *e, uint32_t *at,
                             struct kvt_session_info *out);
bool kvt_engine_cache_info(const struct kvt_engine *e, uint32_t *at, struct kvt_cache_info *out);

/* Adds each of the counters. */
void kvt_counters_add(struct kvt_counters *sum, const struct kvt_counters *c);
/* What sessions that are gone have done; with those of kvt_engine_session_info: all since the start. */
void kvt_engine_ended_counters(const struct kvt_engine *e, struct kvt_counters *out);

struct kvt_plan_request {
    const struct kvt_layout *layout;
    const struct kvt_cache_options *options;
    uint32_t tokens; /* a row's length */
    uint32_t worker_kind;
    uint32_t device;
    uint64_t device_budget_bytes; /* 0: what is free now */
};

struct kvt_plan {
    uint32_t resident_layers;
    uint32_t slots;
    uint64_t slot_bytes;
    uint64_t device_bytes;
    uint64_t host_bytes;
    uint64_t to_device_bytes_per_step;
    uint64_t from_device_bytes_per_step; /* one token a row */
    uint8_t layers[KVT_LAYERS_MAX];
    struct {
        uint32_t tier;             /* enum kvt_tier_id: GPU or HOST */
        uint64_t need_bytes;       /* the smallest of all resident sets, in pieces as asked for */
        uint64_t available_bytes;  /* to plan with */
        uint32_t piece_tokens;     /* smaller pieces need less: so many tokens, the fewest; or 0 */
        uint64_t piece_need_bytes; /* with these */
        bool by_tokens;            /* a shorter context or fewer rows need less */
        uint64_t worker_max_bytes; /* a worker's limit, where that is what is short; otherwise 0 */
    } lacks;                       /* -KVT_EQUOTA: what does not fit */
};

/* What CREATE and a STEP at this length would do. -KVT_EQUOTA with a text if it cannot fit: then
 * only out->lacks is written. */
int kvt_engine_plan(const struct kvt_engine *e, const struct kvt_plan_request *r,
                    struct kvt_plan *out, char *text, uint32_t size)
    __attribute__((warn_unused_result));

/* ---- tests ----------------------------------------------------------------------------------- */

/* Walks every structure: reference counts, budgets, free lists, slots, generations. Returns 0, or
 * -KVT_ESTATE with the first violation in text. Costs time in proportion to what exists. */
int kvt_engine_check(const struct kvt_engine *e, char *text, uint32_t size)
    __attribute__((warn_unused_result));

/* Rules of docs/STEP.md that a test build can leave out, to show that the simulator notices. Each
 * is a bit; numbering follows the text. */
enum kvt_broken_rule {
    KVT_BREAK_FILL_IGNORES_DONE = 0,        /* issuer */
    KVT_BREAK_FILL_IGNORES_WRITEBACK = 1,   /* engine: deps on write-backs left out */
    KVT_BREAK_POST_BEFORE_COPY = 2,         /* issuer */
    KVT_BREAK_WRITEBACK_IGNORES_DONE = 3,   /* issuer */
    KVT_BREAK_COMMIT_IGNORES_STEP = 4,      /* issuer */
    KVT_BREAK_COMMIT_IGNORES_WRITEBACK = 5, /* engine */
    KVT_BREAK_KEEP_STALE_PREFETCH = 6,      /* engine: rows changed, prefetch kept */
    KVT_BREAK_NO_COPY_ON_WRITE = 7,         /* engine */
    KVT_BREAK_FULL_BLOCK_REWRITTEN = 8,     /* engine: only shared blocks are copied */
    KVT_BREAK_ABORT_NO_DRAIN = 9,           /* engine: posts before submitted copies have drained */
    KVT_BREAK_ABORT_IGNORES_STEP = 10,   /* engine: schedule ends before the worker has stopped */
    KVT_BREAK_FAILED_STEP_COMMITS = 11,  /* engine */
    KVT_BREAK_FREE_BEFORE_STEP = 12,     /* engine: memory moved from is reused at once */
    KVT_BREAK_READER_RELEASES_SLOT = 13, /* engine: slot reused before its last reader */
    KVT_BREAK_FREE_BEFORE_DEATH = 14,    /* engine: device memory freed at hang-up */
    KVT_BREAK_FREE_BEFORE_DRAIN = 15,    /* engine: host memory freed with copies in flight */
    KVT_BREAK_NO_RECLAIM = 16,           /* engine: extent destroyed without the worker's word */
    KVT_BREAK_SCHEDULE_OVERWRITTEN = 17, /* engine: ring space reused before the step has ended */
    KVT_BREAK_REQUESTS_OVERTAKE = 18,    /* engine: requests do not wait for the open schedule */
    KVT_BREAK_FLIP_BEFORE_COPY = 19,     /* engine: residency flips before migration is complete */
    KVT_BREAK_PLANE_FREED_UNDER_REFERRER = 20, /* engine: resident plane freed while referred to */
    KVT_BREAK_CROP_KEEPS_LENGTH = 21,          /* engine: crop below committed is ignored */
    KVT_BREAK_LAST_FIRST = 22,                 /* issuer: of what is open the last in use */
    KVT_BREAK_DECODE_LAST = 23,                /* issuer: background before decode */
    KVT_BREAK_GATHER_OVERTAKES = 24,           /* engine: a STEP overtakes one that gathers */
    KVT_BREAK_WAIT_FOR_EVER = 25,              /* engine: no deadline for a wait for memory */
    KVT_BREAK_RESIDENT_NOT_NESTED = 26,        /* engine: any layer leaves, not the last one */
    KVT_BREAK_STATIC_SLOTS_WANDER = 27,        /* engine: slots go on where the last step ended */
    KVT_BREAK_STATIC_PLANES_WANDER = 28,       /* engine: exchanged rows get other planes */
    KVT_BREAK_PREFETCH_UNUSED = 29,            /* engine: what was fetched ahead is fetched again */
    KVT_BREAK_LIMIT_IGNORED = 30,              /* engine: a session takes what there is */
    KVT_BREAK_LIMIT_TAKES_FROM_OTHERS = 31,    /* engine: for its own limit others give way */
    KVT_BREAK_PREFILL_STARVES = 32,            /* issuer: no class below ever goes first */
    KVT_BREAK_STATIC_NOT_RETURNED = 33,        /* engine: a static cache steps without its memory */
    KVT_BREAK_STATIC_RETURNS_EMPTY = 34,       /* engine: ... or with what that happens to hold */
    KVT_BREAK_PREFILL_FILLS_LINK = 35,         /* issuer: a lower class has all in flight */
    KVT_BREAK_RULES_COUNT = 36,
};

void kvt_engine_break_rules(struct kvt_engine *e, uint64_t rules);

#endif
