/* The engine under test: an instant driver that carries out its actions, the real issuer with real
 * copies between malloc'ed extents and a host arena, and workers without a process that walk their
 * schedules and compare every byte with a model. One thread, no clock; kvt_engine_check runs after
 * every engine call. Whatever goes wrong fails the CUnit case on the spot.
 *
 * Built with VARIANT=mutant, KVTH_BREAK in the environment leaves out rules (bits of enum
 * kvt_broken_rule), to see a test fail.
 *
 * Life: kvth_start -> kvth_attach -> requests, steps -> kvth_leave -> kvth_stop, which expects that
 * every budget is back to zero.
 */
#ifndef KVT_TESTS_ENGINE_HARNESS_H
#define KVT_TESTS_ENGINE_HARNESS_H

#include "proto/control_page.h"
#include "proto/schedule.h"
#include "tiers/engine/engine.h"
#include "tiers/engine/issuer.h"

enum {
    KVTH_SESSIONS = 8,
    KVTH_CACHES = 64,
    KVTH_EXTENTS = 512,
    KVTH_ANSWERS = 1024,
    KVTH_HELD = 256,
    KVTH_EVENTS = 4096,
    KVTH_BLOCK = KVT_BLOCK_TOKENS_MIN,
};

/* A worker's view of a row: a number for each token; its bytes follow from number, layer and plane.
 * `block` are the model's names for the blocks of its table. */
struct kvth_row {
    uint32_t *id;
    uint32_t *block;
    uint32_t count; /* committed tokens */
    uint32_t room;
};

struct kvth_cache {
    uint32_t id; /* 0: the entry is free */
    uint32_t session;
    uint32_t row_count;
    struct kvth_row *rows;
    struct kvt_layout layout;
};

struct kvth_answer {
    uint64_t tag; /* 0: none yet */
    uint32_t code;
    uint64_t live_bytes; /* on device 0 when it was answered */
    char text[KVT_TEXT_BYTES];
    uint32_t cache;
    uint32_t slots;
    uint64_t slot_bytes;
    uint32_t resident_layers;
    uint64_t first_step;
    uint32_t steps;
    uint64_t ring_offset;
    uint64_t ring_bytes;
    uint32_t length_count;
    uint32_t lengths[KVT_ROWS_MAX];
};

struct kvth_extent {
    uint32_t id; /* 0: free */
    uint32_t session;
    bool sent;
    bool reclaim_asked;
    uint64_t bytes;
    uint8_t *memory;
};

struct kvth_session {
    bool open;   /* until SESSION_FREED */
    bool silent; /* does not answer RECLAIM: it is stopped */
    uint32_t kind;
    uint32_t device;
    struct kvt_control_page *page;
    uint8_t *ring;
    uint64_t ring_bytes;
};

struct kvth_event {
    uint32_t kind; /* of the action that is now complete */
    uint32_t session;
    uint32_t extent;
    uint64_t offset;
    uint64_t bytes;
    int code;
};

struct kvth {
    struct kvt_engine *engine;
    struct kvt_engine_config config;
    struct kvt_issuer *issuer[KVT_DEVICES_MAX];
    uint8_t *arena;
    uint8_t *arena_ready; /* by page of 4096 bytes */
    uint64_t ring_bytes;
    uint64_t now_ms;
    uint64_t tag;
    struct kvth_session session[KVTH_SESSIONS];
    struct kvth_cache cache[KVTH_CACHES];
    struct kvth_extent extent[KVTH_EXTENTS];
    struct kvth_answer *answer; /* [KVTH_ANSWERS], by tag */
    struct kvth_event event[KVTH_EVENTS];
    uint32_t event_count;
    /* Injected. */
    bool keeps_addresses;  /* of sessions that attach from now on */
    uint32_t fail_extents; /* so many EXTENT_CREATEs fail */
    uint32_t fail_grows;   /* so many HOST_GROWs fail */
    uint32_t fail_copies;  /* so many copies fail */
    bool hold_events;      /* extents and chunks do not come or go */
    bool hold_copies;      /* copies are submitted and do not complete */
    struct {
        struct kvt_issue issue;
        uint32_t device;
    } held[KVTH_HELD];
    uint32_t held_count;
    /* Seen. */
    uint64_t copied_to_bytes;
    uint64_t copied_from_bytes;
    uint32_t leading_moves; /* of the schedule walked last */
    uint32_t pieces;        /* likewise, of its last step */
    uint64_t model_blocks;  /* names given */
    uint64_t model_ids;     /* likewise, of tokens */
    uint8_t *model_full;    /* [name] was ever full */
    uint64_t model_full_room;
    bool unchecked; /* no kvt_engine_check: its time grows with the square of blocks */
};

struct kvth_config {
    uint64_t device_budget_bytes;
    uint64_t host_budget_bytes;
    uint64_t device_worker_max_bytes;
    uint64_t host_worker_max_bytes;
    uint64_t host_keep_bytes;
    uint64_t host_range_bytes;
    uint64_t extent_bytes;
    uint64_t piece_bytes;
    uint64_t ring_bytes;
    uint32_t devices;
};

/* Zero fields get defaults: 1 MiB of device, 4 MiB of host, extents of 64 KiB, pieces of one block. */
/* What is being tried, for a case with many: said with a failure. */
extern char kvth_what[128];

void kvth_start(struct kvth *h, const struct kvth_config *c);
/* Expects that nothing is charged to anybody, but what the host keeps. */
void kvth_stop(struct kvth *h);

/* `layers` layers of one KV head, K and V of 4 f16 each: 16 bytes a token and layer. */
struct kvt_layout kvth_layout(uint32_t layers);
struct kvt_cache_options kvth_options(uint32_t mode, uint32_t rows);
enum { KVTH_TOKEN = 16, KVTH_LAYER_BLOCK = KVTH_TOKEN * KVTH_BLOCK };

uint32_t kvth_attach(struct kvth *h, uint32_t kind, uint32_t device);
/* Hang-up and death; pumped until the session is freed. */
void kvth_leave(struct kvth *h, uint32_t session);

/* Everything that can go on does. */
void kvth_pump(struct kvth *h);
/* Held copies complete, `ok` or not, and everything goes on. */
void kvth_release(struct kvth *h, bool ok);
/* So much time passes. */
void kvth_tick(struct kvth *h, uint64_t ms);

/* Sends r (session, kind, ... are the caller's) and pumps. Returns the tag. */
uint64_t kvth_send(struct kvth *h, struct kvt_request *r);
/* NULL: not answered yet. */
const struct kvth_answer *kvth_answer(struct kvth *h, uint64_t tag);
/* Send, and the answer is there. */
const struct kvth_answer *kvth_ask(struct kvth *h, struct kvt_request *r);

/* ---- what a worker does; expects success; the model follows ------------------------------------- */
struct kvth_cache *kvth_create(struct kvth *h, uint32_t session, const struct kvt_layout *layout,
                               const struct kvt_cache_options *options);
/* The model's side alone, of a cache that was created by kvth_send. */
struct kvth_cache *kvth_adopt(struct kvth *h, uint32_t session, uint32_t id,
                              const struct kvt_layout *layout, uint32_t rows);
void kvth_forget(struct kvth_cache *c);
struct kvth_cache *kvth_fork(struct kvth *h, struct kvth_cache *c, const uint32_t *rows,
                             uint32_t count);
void kvth_rows(struct kvth *h, struct kvth_cache *c, uint32_t kind, const uint32_t *rows,
               uint32_t count);
void kvth_repeat(struct kvth *h, struct kvth_cache *c, uint32_t times);
void kvth_crop(struct kvth *h, struct kvth_cache *c, uint32_t tokens);
/* A length for each row. */
void kvth_crop_rows(struct kvth *h, struct kvth_cache *c, const uint32_t *tokens);
void kvth_reset(struct kvth *h, struct kvth_cache *c);
void kvth_close(struct kvth *h, struct kvth_cache *c);
/* Every row appends `tokens` in each of `steps` steps, which are walked and committed. */
void kvth_step(struct kvth *h, struct kvth_cache *c, uint32_t tokens, uint32_t steps);

/* A schedule in the worker's hands: the answer to STEP. */
struct kvth_walk {
    struct kvth_cache *cache;
    const struct kvt_sched_header *head;
    uint64_t first_step;
    uint32_t steps;
    uint32_t next;  /* step to walk */
    uint32_t piece; /* of that step */
    uint32_t count; /* rows that take part */
    uint32_t rows[KVT_ROWS_MAX];
    uint32_t tokens[KVT_ROWS_MAX]; /* by row of the cache */
    uint32_t before[KVT_ROWS_MAX]; /* likewise: before the step being walked */
    uint64_t begun_pieces;
};
/* rows NULL: all, with `tokens` each. Returns the tag. */
uint64_t kvth_step_send(struct kvth *h, struct kvth_cache *c, const uint32_t *rows,
                        const uint32_t *tokens, uint32_t count, uint32_t each, uint32_t steps);
/* The answer has come: look at the schedule, do its leading moves. */
void kvth_walk_begin(struct kvth *h, struct kvth_walk *w, struct kvth_cache *c,
                     const uint32_t *rows, const uint32_t *tokens, uint32_t count, uint32_t each,
                     uint64_t tag);
/* Walks up to `pieces` pieces of the step at hand. true: it has more. */
bool kvth_walk_pieces(struct kvth *h, struct kvth_walk *w, uint32_t pieces);
/* Posts `step`; the model has the tokens from then on. */
void kvth_walk_post(struct kvth *h, struct kvth_walk *w);
/* Walks and posts all that is left, and expects that it was committed. */
void kvth_walk_all(struct kvth *h, struct kvth_walk *w);
/* Gives up: ABORT for the step at hand, `step` posted, the model's length as it was. */
void kvth_walk_abort(struct kvth *h, struct kvth_walk *w);

/* ---- what is looked at ----------------------------------------------------------------------------- */
void kvth_cache_info(struct kvth *h, const struct kvth_cache *c, struct kvt_cache_info *out);
void kvth_session_info(struct kvth *h, uint32_t session, struct kvt_session_info *out);
uint64_t kvth_device_used(struct kvth *h);
uint64_t kvth_host_used(struct kvth *h);
/* Tables agree with the model: the same rows share the same blocks, with as many references, and
 * nothing else exists. */
void kvth_check_tables(struct kvth *h);
/* Blocks with references, of all caches of the session. */
uint32_t kvth_blocks(struct kvth *h, uint32_t session);

/* ---- between the harness's files -------------------------------------------------------------------- */
void kvth_checked(struct kvth *h, const char *after);
uint8_t *kvth_device_memory(struct kvth *h, uint32_t session, uint32_t extent, uint64_t offset,
                            uint64_t bytes);

#endif
