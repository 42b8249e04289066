/* The simulator: engine and issuers as they are shipped, in a world that is made up. One seed is one
 * run: virtual time, one queue of events, one source of randomness; no wall clock, no threads, and
 * no decision that depends on an address. So equal seeds give equal traces.
 *
 *   main.c      options; seeds one after another; breaking rules
 *   world.c     one run: configuration, events, actions of the engine, the end
 *   device.c    extents, copies that take time, fail, tear; the issuer and its copy thread
 *   host.c      the host arena, growing and shrinking
 *   worker.c    a worker's life: how it comes, hangs, lies, dies, goes
 *   request.c   what it asks for
 *   answer.c    what the daemon answers, held against the model
 *   schedule.c  a schedule as the worker reads it, held against what it was promised
 *   stream.c    the worker's stream: waits, moves, attention over every byte, posts
 *   model.c     every correct byte, apart from the engine
 *   heap.c      allocations of the engine that fail
 *   order.c     which copy goes next, looked at from outside
 *   check.c     invariants; who waits for ever
 */
#ifndef KVT_SIM_SIM_H
#define KVT_SIM_SIM_H

#include "proto/control_page.h"
#include "proto/schedule.h"
#include "tests/sim/random.h"
#include "tiers/engine/engine.h"
#include "tiers/engine/issuer.h"

#include <setjmp.h>
#include <stddef.h>

enum {
    SIM_DEVICES_MAX = 2,
    SIM_SESSIONS_MAX = 8,
    SIM_CLASSES = KVT_CLASS_BACKGROUND + 1,
    SIM_WORKERS_MAX = 4, /* processes at one time */
    SIM_CACHES_MAX = 6,  /* of a worker */
    SIM_LAYERS_MAX = 8,
    SIM_ROWS_MAX = 8,
    SIM_REQUESTS_MAX = 6, /* of a worker, not answered */
    SIM_EXTENTS_MAX = 4096,
    SIM_INFLIGHT_MAX = 8,
    SIM_STEPS_MAX = 16,
    SIM_TOKENS_MAX = 1600, /* a row is kept below about so many */
};

#define SIM_FAULTS(X)                           \
    X(COPY_FAILED, "copies failed")             \
    X(COPY_TORN, "copies torn")                 \
    X(COPY_DELAYED, "copies delayed")           \
    X(EXTENT_REFUSED, "extents refused")        \
    X(EXTENT_DELAYED, "extents delayed")        \
    X(HOST_REFUSED, "host chunks refused")      \
    X(HOST_DELAYED, "host chunks delayed")      \
    X(RECLAIM_LATE, "reclaims late")            \
    X(RECLAIM_NEVER, "reclaims never answered") \
    X(KILLED, "workers killed")                 \
    X(HUNG_UP, "sockets lost")                  \
    X(HUNG, "workers hung")                     \
    X(LIED, "lies")                             \
    X(ABORTED, "aborts")                        \
    X(INVALID, "invalid requests")              \
    X(EVICTED, "workers evicted")               \
    X(DEVICE_LOST, "devices lost")              \
    X(ALLOCATION_FAILED, "allocations failed")

enum sim_fault {
#define SIM_FAULT_ENUM(name, text) SIM_##name,
    SIM_FAULTS(SIM_FAULT_ENUM)
#undef SIM_FAULT_ENUM
        SIM_FAULT_COUNT
};

/* What kind of world a run has. */
enum sim_world {
    SIM_ANY = 0, /* options: the seed decides */
    SIM_ROUGH,   /* whatever can happen */
    SIM_PLAIN,   /* no faults, no edits of rows */
    SIM_STEADY,  /* besides: memory enough, a prompt and then equal steps, one cache a worker */
};

/* A device that reports success although bytes are wrong: one copy in a run. No rule of the engine
 * sees that; the model must. */
enum sim_lie {
    SIM_HONEST = 0,
    SIM_FLIPS_FILL,
    SIM_TEARS_FILL,
    SIM_FLIPS_WRITEBACK,
    SIM_FLIPS_COPY
};

struct sim;
struct sim_worker;

/* ---- events ---------------------------------------------------------------------------------- */

typedef void sim_handler(struct sim *sim, void *object, uint64_t value);

struct sim_event {
    uint64_t time_us;
    uint64_t sequence; /* events of one time run in the order in which they were made */
    sim_handler *run;
    void *object;
    uint64_t value;
};

struct sim_events {
    struct sim_event *heap; /* owned */
    uint32_t count;
    uint32_t room;
    uint64_t sequence;
};

/* ---- devices and host ------------------------------------------------------------------------ */

struct sim_extent {
    uint32_t id; /* 0: the entry is free */
    uint32_t device;
    uint32_t session;
    bool live; /* created; memory is not NULL */
    bool destroying;
    struct sim_worker *mapped; /* who has it mapped */
    uint64_t bytes;
    uint8_t *memory; /* owned, with a canary behind */
};

struct sim_copy {
    bool used;
    bool fails;
    uint32_t session;
    uint32_t stream;
    uint64_t op;
    struct kvt_copy copy;
    uint64_t copied;
    uint64_t fail_at; /* bytes that are copied before it fails */
    bool tears;       /* it stops there as well, and reports success */
    uint32_t parts_left;
};

/* An operation that a copy thread has taken over and whose completion has not been collected. */
struct sim_op {
    uint64_t id;
    uint8_t kind;    /* enum kvt_op_kind */
    uint8_t traffic; /* enum kvt_op_class */
    uint16_t slot;
    bool empty;          /* nothing to copy: it only posts */
    bool begun;          /* something of it was issued */
    bool failed;         /* one of its copies has failed: nothing more of it goes */
    uint64_t generation; /* FILL: the value that it posts */
    uint64_t gate;       /* what done[slot] must be; 0: nothing */
    uint64_t left_bytes; /* to be issued */
    uint64_t copied_bytes;
    uint64_t *deps; /* owned */
    uint32_t dep_count;
};

struct sim_ops { /* of a session, in the order of their ids */
    struct sim_op *op;
    uint32_t count, room;
    uint64_t last_id; /* submitted so far */
    bool closed;      /* the copy thread was told to: what is not begun never goes */
};

/* What the loop tells a copy thread, in order. */
struct sim_mail {
    uint32_t kind; /* enum kvt_action_kind */
    uint32_t session;
    uint64_t value;
    struct kvt_program *program;
};

/* What a copy thread tells the loop, in order. */
struct sim_report {
    bool drained;
    uint32_t session;
    struct kvt_completion completion;
    uint64_t guessed_bytes; /* see sim_order_completion */
};

struct sim_device {
    uint32_t index;
    bool post_behind;
    bool lost;
    struct kvt_issuer *issuer;
    struct sim_copy copies[2 * SIM_INFLIGHT_MAX]; /* by tag */
    uint64_t extent_bytes;                        /* created, not destroyed */
    uint64_t quantum_bytes;
    uint64_t inflight_bytes;            /* of copies that may be under way */
    uint64_t passed_bytes[SIM_CLASSES]; /* see order.c */
    uint64_t stream_us[2];              /* when the stream's last submission is complete */
    struct sim_mail *mail;              /* owned */
    uint32_t mail_count, mail_room;
    struct sim_report *reports; /* owned */
    uint32_t report_count, report_room;
    bool mail_due, pump_due, report_due; /* an event is on its way */
};

enum sim_chunk { SIM_CHUNK_ABSENT, SIM_CHUNK_GROWING, SIM_CHUNK_READY, SIM_CHUNK_SHRINKING };

struct sim_host {
    uint8_t *memory; /* owned by the process, used by one run after another */
    uint64_t room;
    uint8_t *chunks; /* enum sim_chunk; owned */
    uint64_t chunk_count;
};

/* ---- the model ------------------------------------------------------------------------------- */

struct sim_row {
    uint64_t *ids; /* content of each committed token; owned */
    uint32_t length;
    bool was_full; /* its last block is not full any more: who appends must get a copy first */
    uint32_t room;
};

struct sim_cache {
    uint32_t id; /* 0: the entry is free */
    uint32_t mode;
    uint32_t tokens_max;
    uint32_t append_max;
    uint32_t slots;
    uint32_t layer_count;
    struct kvt_layer_layout layers[SIM_LAYERS_MAX];
    uint32_t row_count;
    uint32_t rows_created; /* static: never more */
    struct sim_row rows[SIM_ROWS_MAX];
    uint32_t steady_tokens; /* what each step appends to a row, behind the prompt */
    uint32_t steady_steps;  /* of each request */
    bool may_move; /* forked, or a fork: the two share planes, and one of them must give way */
    /* Static: where each layer was when it was first seen; extent 0: not seen. */
    uint32_t static_extent[SIM_LAYERS_MAX];
    uint64_t static_offset[SIM_LAYERS_MAX];
};

/* ---- workers --------------------------------------------------------------------------------- */

struct sim_request {
    uint64_t tag;
    uint32_t kind; /* enum kvt_request_kind */
    uint32_t cache;
    uint32_t count;
    uint32_t rows[SIM_ROWS_MAX + 2];
    uint32_t values[SIM_ROWS_MAX + 2];
    uint32_t tokens;
    uint32_t steps;
    uint32_t times;
    uint32_t layer; /* ACQUIRE */
    uint64_t first_step;
    struct sim_cache blank; /* CREATE: what the cache will be */
    uint64_t sent_us;
};

enum sim_stream_kind { SIM_MOVE, SIM_WAIT, SIM_ATTEND, SIM_DONE, SIM_STEP };

struct sim_stream_op {
    uint32_t kind;
    uint32_t step;  /* of the schedule */
    uint32_t index; /* move or piece */
    uint32_t slot;
    uint64_t value;
};

/* The open schedule: the worker's copy, and what is expected of it. */
struct sim_schedule {
    bool open;  /* steps are left that may commit, or it has not stopped yet */
    bool begun; /* the worker has not yet posted its last step */
    struct sim_cache *cache;
    struct kvt_sched_header header;
    uint8_t *bytes; /* the schedule; owned */
    uint64_t ring_offset;
    const struct kvt_sched_step *steps;
    const struct kvt_sched_move *moves;
    const struct kvt_sched_piece *pieces;
    const struct kvt_sched_run *runs;
    const uint32_t *rows;
    uint32_t row_count; /* that take part */
    uint32_t row[SIM_ROWS_MAX];
    uint32_t append[SIM_ROWS_MAX];
    uint32_t length[SIM_ROWS_MAX];                 /* before the first step */
    uint64_t content[SIM_STEPS_MAX][SIM_ROWS_MAX]; /* id of the first token that it appends */
    uint64_t need_to[SIM_STEPS_MAX];
    uint64_t need_from[SIM_STEPS_MAX];
    uint64_t need_copied; /* at least so many bytes are copied on write */
    uint64_t copied_before;
    uint32_t committed; /* steps */
    uint64_t posted;    /* last step that the worker posted; 0: none */
    uint64_t failed;    /* first step that will not commit; 0: none */
    uint32_t enqueue_step;
    uint32_t enqueue_piece; /* of that step */
    bool aborted;           /* the worker has asked to */
    bool acquired;          /* opened by ACQUIRE */
    bool lazy;              /* a step is enqueued only when the one before is over */
    uint64_t abort_from;    /* first step that it does not run; 0: none */
};

enum sim_process { SIM_RUNNING, SIM_DYING, SIM_GONE };

struct sim_worker {
    uint32_t index; /* place among the processes */
    uint32_t session;
    uint32_t tenant;
    uint32_t device;
    uint32_t kind;
    enum sim_process process;
    bool attached; /* the socket is open */
    bool hung;     /* stopped: nothing moves */
    bool liar;
    bool unchecked; /* evicted, or its device is lost: what it reads does not count */
    bool leaving;
    bool goes;                /* leaves without closing its caches */
    bool freed;               /* SESSION_FREED came */
    bool counted;             /* to_bytes and from_bytes are what the engine must have counted */
    uint64_t crossed_bytes;   /* that fills have copied which a schedule names */
    uint32_t steady_requests; /* steps asked for, in a steady world */
    uint64_t vain_before;     /* bytes fetched in vain behind the prompt */
    uint64_t
        prompt_op_last; /* operations up to this one were submitted before the second was asked for */
    uint64_t crossed_before;
    struct {
        uint64_t generation, bytes; /* the last fill that none has named when it was complete */
    } guessed[KVT_SLOTS_MAX];
    uint64_t to_bytes;
    uint64_t from_bytes;
    bool stubborn;                 /* has left a RECLAIM without an answer */
    struct kvt_control_page *page; /* owned */
    uint8_t *ring;                 /* owned */
    uint64_t ring_bytes;
    struct sim_cache caches[SIM_CACHES_MAX];
    struct sim_request requests[SIM_REQUESTS_MAX];
    uint32_t request_count;
    struct sim_schedule schedule;
    uint64_t last_step;                 /* of the last schedule */
    uint64_t slot_ready[KVT_SLOTS_MAX]; /* last value that a schedule named */
    struct sim_stream_op *stream;       /* owned; [stream_head, stream_count) are left */
    uint32_t stream_head, stream_count, stream_room;
    uint32_t stream_phase;
    bool stream_due, stream_waits;
    bool enqueue_due;
    uint64_t held[SIM_LAYERS_MAX]; /* dense: index + 1 of the piece whose done is due later */
    uint64_t progress_us;          /* when it last got something */
    uint64_t turn_us; /* since then nothing of its own stands before its first request */
};

/* ---- one run --------------------------------------------------------------------------------- */

struct sim_stats {
    uint64_t seeds;
    uint64_t events;
    uint64_t requests;
    uint64_t refused; /* for want of memory */
    uint64_t steps_committed;
    uint64_t steps_failed;
    uint64_t moves;
    uint64_t vacated; /* extents */
    uint64_t copies;
    uint64_t copied_bytes;
    uint64_t checked_bytes;
    uint64_t sessions;
    uint64_t virtual_us;
    uint64_t migrated_bytes;
    uint64_t compacted_bytes;
    uint64_t copied_on_write_bytes;
    uint64_t discarded_bytes;
    uint64_t steady_steps;
    uint64_t faults[SIM_FAULT_COUNT];
};

struct sim_options {
    uint64_t seed;
    uint32_t steps; /* 0: random */
    uint64_t broken_rules;
    uint32_t world; /* enum sim_world */
    uint32_t lie;   /* enum sim_lie */
    bool trace;
};

struct sim {
    struct sim_options options;
    struct sim_random random;
    uint64_t now_us;
    uint64_t hash;
    struct sim_events events;
    struct sim_stats stats;
    uint32_t world; /* enum sim_world, never SIM_ANY */
    bool
        static_ones; /* most caches are, and most workers keep addresses: they give way to each other */
    bool shared_out; /* every session's limits at once are within the budgets */
    bool lied;       /* the device has, in this run */
    bool lie_named;  /* in a fill that an open schedule names: it will be read */
    uint32_t fault_per_mille[SIM_FAULT_COUNT];
    uint32_t check_every; /* events */
    struct kvt_engine_config config;
    struct kvt_engine *engine;
    struct sim_device devices[SIM_DEVICES_MAX];
    struct sim_extent extents[SIM_EXTENTS_MAX];
    uint32_t extent_top; /* entries from here on were never used */
    struct sim_host host;
    struct sim_worker *processes[SIM_WORKERS_MAX]; /* borrowed from `workers` */
    uint32_t process_count;
    struct sim_worker *sessions[SIM_SESSIONS_MAX]; /* whose session it is; borrowed */
    struct sim_ops ops[SIM_SESSIONS_MAX];          /* of each session */
    struct sim_worker **workers;                   /* all that ever were; owned */
    uint32_t worker_count, worker_room;
    uint64_t tick_us; /* when the next tick is due; UINT64_MAX: none */
    uint64_t content_next;
    uint64_t tag_next;
    uint32_t steps_left;
    bool lingering; /* no more faults and no more requests: those that wait are waited for */
    uint64_t linger_until_us; /* at most */
    bool cooling;             /* likewise, and everybody leaves */
    struct kvt_layout layout; /* scratch of CREATE */
    jmp_buf failure;          /* sim_fail leaves the run here */
    char reason[1024];
};

/* ---- world.c --------------------------------------------------------------------------------- */

/* Runs one seed. Returns true, or false with the reason in sim->reason; then sim_dump may be
 * called. sim_end frees everything; after a failure what the engine holds is left alone. */
bool sim_run(struct sim *sim, const struct sim_options *options);
void sim_end(struct sim *sim);

void sim_fail(struct sim *sim, const char *format, ...)
    __attribute__((format(printf, 2, 3), noreturn));
void sim_trace(struct sim *sim, const char *format, ...) __attribute__((format(printf, 2, 3)));
void sim_hash(struct sim *sim, uint64_t value);
bool sim_fault(struct sim *sim, enum sim_fault fault); /* whether it happens now; counts it */
void sim_after(struct sim *sim, uint64_t delay_us, sim_handler *run, void *object, uint64_t value);

/* To be called after each call of the engine that is not const: takes its actions. */
void sim_actions(struct sim *sim);
/* Before a call: sometimes the time. */
void sim_clock(struct sim *sim);

static inline uint64_t sim_us(struct sim *sim, uint64_t low, uint64_t high) {
    return sim_between(&sim->random, low, high);
}

/* ---- heap.c ---------------------------------------------------------------------------------- */

void sim_heap_arm(struct sim *sim); /* from now on the engine's allocations may fail; NULL: none */
void *sim_grow(void *memory, size_t bytes);
void *sim_zeroed(size_t bytes);

/* ---- device.c, host.c ------------------------------------------------------------------------ */

void sim_device_open(struct sim *sim, uint32_t index, bool post_behind);
void sim_device_close(struct sim *sim, uint32_t index);
void sim_device_mail(struct sim *sim, const struct kvt_action *a);
void sim_device_lose(struct sim *sim, uint32_t index);
/* Something that gates look at has changed. */
void sim_device_look(struct sim *sim, uint32_t index);

struct sim_extent *sim_extent_find(struct sim *sim, uint32_t id);
void sim_extent_create(struct sim *sim, const struct kvt_action *a);
void sim_extent_destroy(struct sim *sim, const struct kvt_action *a);
void sim_extents_unmap(struct sim *sim, const struct sim_worker *w);

void sim_host_open(struct sim *sim);
void sim_host_close(struct sim *sim);
void sim_host_grow(struct sim *sim, const struct kvt_action *a);
void sim_host_shrink(struct sim *sim, const struct kvt_action *a);
uint64_t sim_host_used(const struct sim *sim);
/* [offset, offset + bytes) of the arena; fails if it is not all there. */
uint8_t *sim_host_at(struct sim *sim, uint64_t offset, uint64_t bytes, const char *what);

/* Fails if a copy that is in flight touches the range, and one of the two writes. `skip_stream`: a
 * stream of `device` on which order is kept; -1: none. */
void sim_race_check(struct sim *sim, const struct kvt_place *place, uint64_t bytes, bool writes,
                    uint32_t device, int skip_stream, const char *what);

/* ---- worker.c -------------------------------------------------------------------------------- */

void sim_worker_start(struct sim *sim, uint32_t process);
void sim_worker_free(struct sim *sim, struct sim_worker *w);
void sim_worker_freed(struct sim *sim, uint32_t session);
void sim_worker_extent(struct sim *sim, const struct kvt_action *a);
void sim_worker_reclaim(struct sim *sim, const struct kvt_action *a);
void sim_worker_post(struct sim *sim, const struct kvt_action *a);
/* ready[slot] = value was stored. */
void sim_worker_ready(struct sim *sim, struct sim_worker *w, uint32_t slot, uint64_t value);
void sim_worker_cool(struct sim *sim, struct sim_worker *w);
struct sim_worker *sim_session(struct sim *sim, uint32_t session);
struct sim_cache *sim_cache_find(struct sim_worker *w, uint32_t id);

/* ---- request.c ------------------------------------------------------------------------------- */

void sim_request_random(struct sim *sim, struct sim_worker *w);
void sim_request_close(struct sim *sim, struct sim_worker *w); /* of any cache that it has */
void sim_request_abort(struct sim *sim, struct sim_worker *w);
void sim_request_acquire(struct sim *sim, struct sim_worker *w);

/* ---- answer.c -------------------------------------------------------------------------------- */

void sim_answer(struct sim *sim, const struct kvt_action *a);

/* ---- schedule.c ------------------------------------------------------------------------------ */

void sim_schedule_open(struct sim *sim, struct sim_worker *w, const struct sim_request *r,
                       const struct kvt_answer *answer);
void sim_schedule_close(struct sim_worker *w);
struct kvt_counters sim_counters(struct sim *sim, const struct sim_worker *w);
void sim_schedule_committed(struct sim *sim, struct sim_worker *w, uint64_t value);
void sim_schedule_failed(struct sim *sim, struct sim_worker *w, uint64_t value, uint32_t code);
/* The worker has posted `step`. */
void sim_schedule_posted(struct sim *sim, struct sim_worker *w, uint64_t value);
/* The part of the ring that a piece lies in is as it was when the step was answered. */
void sim_schedule_intact(struct sim *sim, struct sim_worker *w, uint32_t piece);
/* Content of token `token` of the row at `position`, in step `step`: committed or to be appended. */
uint64_t sim_schedule_content(const struct sim_schedule *s, uint32_t position, uint32_t token);
uint32_t sim_schedule_position(const struct sim_schedule *s, uint32_t row);

/* ---- stream.c -------------------------------------------------------------------------------- */

void sim_stream_begin(struct sim *sim, struct sim_worker *w);
void sim_stream_wake(struct sim *sim, struct sim_worker *w);
void sim_stream_resume(struct sim *sim, struct sim_worker *w);
bool sim_stream_uses(const struct sim_worker *w, uint32_t extent);

/* ---- model.c --------------------------------------------------------------------------------- */

void sim_cache_clear(struct sim_cache *c);
void sim_row_append(struct sim_row *r, uint64_t content);
void sim_row_copy(struct sim_row *to, const struct sim_row *from);
/* Whether the request is one that the engine must refuse, as things stand. */
bool sim_model_refuses(const struct sim_worker *w, const struct sim_request *r);
/* Carries out an edit (everything but CREATE, STEP, ABORT, ACQUIRE). */
void sim_model_edit(struct sim *sim, struct sim_worker *w, const struct sim_request *r,
                    const struct kvt_answer *answer);
void sim_token_write(uint8_t *to, uint32_t bytes, uint64_t content, uint32_t layer, uint32_t plane);
bool sim_token_is(const uint8_t *at, uint32_t bytes, uint64_t content, uint32_t layer,
                  uint32_t plane);

/* ---- order.c --------------------------------------------------------------------------------- */

void sim_order_program(struct sim *sim, const struct kvt_program *p);
/* A copy goes: whether it was its turn. */
void sim_order_issue(struct sim *sim, uint32_t device, const struct kvt_issue *issue);
/* Bytes of a fill that no schedule has named so far; 0: it is none. */
uint64_t sim_order_completion(struct sim *sim, const struct kvt_completion *c);
void sim_order_clear(struct sim *sim, uint32_t session);
struct sim_op *sim_order_find(struct sim *sim, uint32_t session,
                              uint64_t op); /* NULL: it is over */

/* ---- check.c --------------------------------------------------------------------------------- */

void sim_check(struct sim *sim);
/* The copies that the session makes now are of a layer that leaves, and for itself. */
void sim_check_leaving(struct sim *sim, const struct kvt_program *p);
void sim_check_stuck(struct sim *sim);
/* How long a request may wait whose turn it is; whether one of a worker that is checked waits now. */
uint64_t sim_wait_most_us(const struct sim *sim);
bool sim_somebody_waits(const struct sim *sim);
void sim_check_end(struct sim *sim);
void sim_dump(const struct sim *sim);
const char *sim_fault_name(uint32_t fault);

#endif
