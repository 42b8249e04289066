/* The engine's state: what its files share, and nobody else includes.
 *
 * Who owns whom
 *   engine   -> sessions -> caches -> rows -> references to blocks
 *   session  -> device extents, slots, the open schedule, the guess (prefetch), op records
 *   family   -> the caches that were forked from each other: one layout, one resident set, and the
 *               groups that hold their blocks. Belongs to one session.
 *   group    -> consecutive blocks that were allocated together; for every layer one place, on the
 *               host (streamed) or on the device (resident layers of segment workers)
 *   planes   -> device memory of a dense cache's resident layers, [row][token][head][dim];
 *               shared by reference between forks until one of them is materialised
 *
 * Invariants, walked by kvt_engine_check:
 *   - a block's `refs` is the number of row tables and deferred lists that name it
 *   - a layer is resident in all of a family or in none of it; a group has a device place for a
 *     layer if it is resident (segment workers), a host place if it is not; both only while it
 *     migrates
 *   - a session's extents add up to what it is charged; devices add up to their sessions'; none is
 *     above its budget
 *   - no memory that an outstanding operation, an open schedule or a worker's mapping may touch is
 *     free
 */
#ifndef KVT_ENGINE_STATE_H
#define KVT_ENGINE_STATE_H

#include "proto/schedule.h"
#include "proto/text.h"
#include "tiers/engine/assert.h"
#include "tiers/engine/engine.h"
#include "tiers/engine/mutants.h"
#include "tiers/engine/ranges.h"

#include <stddef.h>

/* rows * tokens * bytes, cut at a size that no budget has: products of what clients say. */
#define KVT_BYTES_HUGE (UINT64_C(1) << 62)
static inline uint64_t size_of(uint64_t rows, uint64_t tokens, uint64_t token_bytes) {
    uint64_t bytes;
    if (__builtin_mul_overflow(rows, tokens, &bytes) ||
        __builtin_mul_overflow(bytes, token_bytes, &bytes) || bytes > KVT_BYTES_HUGE) {
        return KVT_BYTES_HUGE;
    }
    return bytes;
}

#define ASK_AGAIN_MS 100u /* a worker that was asked for memory has so long before others are */
static inline uint64_t round_up(uint64_t value, uint64_t to) {
    return (value + to - 1) / to * to;
}

static inline bool mode_is_static(uint32_t mode) {
    return mode == KVT_MODE_STATIC || mode == KVT_MODE_OFFLOADED_STATIC;
}

static inline bool mode_is_offloaded(uint32_t mode) {
    return mode == KVT_MODE_OFFLOADED || mode == KVT_MODE_OFFLOADED_STATIC;
}

#define KVT_GROUP_BLOCKS_MAX 32u /* of blocks that are allocated together */

#define KVT_NOWHERE     UINT64_MAX /* a host offset that is none */
#define KVT_ALIGN_BYTES 256        /* of every place: a GPU's copies and loads like it */

/* What an attempt to get memory says. Negative: it failed for good. */
enum { KVT_READY = 0, KVT_WAIT = 1 };

struct dev_place {
    uint32_t extent; /* id; 0: nowhere */
    uint64_t offset;
};

/* ---- memory ------------------------------------------------------------------------------------ */

enum extent_state {
    EXTENT_CREATING = 1,
    EXTENT_LIVE,
    EXTENT_RECLAIMING,
    EXTENT_DESTROYING,
    EXTENT_VACANT, /* no memory, and nothing is charged; see vacate.c */
};

struct extent {
    uint32_t id; /* index below 65536 in the low half, generation above it */
    uint32_t device;
    uint32_t session;
    uint32_t state; /* enum extent_state; 0: the entry is free */
    bool sent;      /* the worker may have mapped it */
    bool vacates; /* it becomes VACANT, is, or gets its memory back: what lies in it stays there */
    uint64_t bytes;
    uint64_t live_bytes;
    uint64_t movable_bytes; /* of these; used inside one search of compact.c */
    bool wanted;            /* used inside one call of session_return */
    uint64_t since_ms;      /* when its worker was asked to unmap it */
    struct kvt_ranges space;
};

/* Whether there is memory behind it, or on its way to or from it. */
static inline bool extent_is_charged(const struct extent *x) {
    return x->state != 0 && x->state != EXTENT_VACANT;
}

struct device {
    struct kvt_engine_device config;
    uint64_t used_bytes; /* extents that exist or are being created or destroyed */
    bool full; /* the device had no memory though the budget had; until something is freed */
    bool lost;
    uint64_t changed_ms; /* when memory last came or went */
    uint64_t asked_ms;   /* when a session in a schedule was last asked for a layer */
};

enum chunk_state { CHUNK_ABSENT = 0, CHUNK_GROWING, CHUNK_READY, CHUNK_SHRINKING };

struct host {
    struct kvt_ranges space; /* free ranges of ready chunks */
    uint8_t *chunks;         /* enum chunk_state */
    uint32_t chunk_count;
    uint32_t busy_chunks; /* growing or shrinking */
    uint32_t keep_chunks; /* the first so many are never given back */
    uint32_t keep_next;   /* of these, the first to ask for; keep_chunks: none, or no more */
    uint32_t keep_growing;
    uint64_t chunk_bytes;
    uint64_t used_bytes; /* chunks that are not absent */
    uint64_t live_bytes;
    uint64_t kept_bytes; /* of used_bytes, in chunks that are never given back */
    uint64_t growing_bytes;
    uint64_t claimed_bytes; /* of these, what allocations of this pass count on */
    uint64_t changed_ms;    /* when a chunk last came or went */
    bool full;      /* the machine had no memory though the budget had; until something is freed */
    bool sweep_due; /* a chunk may have become empty */
};

/* ---- blocks ------------------------------------------------------------------------------------- */

struct block {
    uint32_t refs;
    uint16_t index; /* in its group */
    bool full;      /* was ever full: never written again */
    bool moved;     /* the layer that migrates has it on the host already */
    struct group *group;
    uint64_t mark; /* scratch of one walk: the walk's number */
    uint32_t mark_row;
    uint32_t mark_tokens;
};

struct group {
    struct group *previous;
    struct group *next;
    struct family *family;
    uint16_t block_count;
    uint16_t taken;        /* blocks handed out so far, in order */
    uint16_t live;         /* of these, with refs > 0 or in the family's spare list */
    bool open;             /* a row takes more blocks from it */
    uint64_t *host;        /* [layer] offset, or KVT_NOWHERE */
    struct dev_place *gpu; /* [layer]; NULL for dense workers */
    struct block *blocks;
};

struct layer_bytes {
    uint32_t k; /* a token's K */
    uint32_t v;
};

struct family {
    uint32_t refs; /* caches */
    uint32_t session;
    uint32_t layer_count;
    uint32_t mode;
    uint32_t piece_tokens; /* segment workers: streamed pieces */
    uint32_t listings;     /* of layers in a step: those with later readers are listed for each */
    uint32_t resident_layers_max;
    uint32_t resident_count;
    bool is_static;
    bool vacated; /* static, and demoted: its places have, or had since, no memory */
    bool demoted; /* was idle: all layers went to the host; those of static caches keep their
                               places on the device */
    uint32_t demote_wanted; /* layers that another session waits for */
    uint64_t changed_ms;    /* when a layer last left, or could not come back */
    struct kvt_layer_layout *layers;
    struct layer_bytes *bytes;
    bool *resident;     /* [layer] */
    uint32_t *priority; /* layers in the order in which they become resident */
    struct group *groups;
    struct block **spare; /* static: blocks that were allocated at CREATE and are not in a table */
    uint32_t spare_count;
    uint32_t spare_max;
    uint64_t block_count; /* of its groups */
    uint64_t host_bytes;
    uint64_t gpu_bytes;
};

/* ---- caches -------------------------------------------------------------------------------------- */

struct planes {
    uint32_t refs;
    uint32_t rows;
    uint32_t capacity;          /* tokens of a row */
    uint32_t owner;             /* cache that may append in place, behind what is frozen */
    uint32_t *frozen;           /* [row] tokens that others still read */
    const struct row **longest; /* [row] used inside one call of dense_copies */
    struct family *family;
    struct dev_place *place; /* [layer]: K of all rows, then V of all rows */
};

struct row {
    struct block **blocks;
    uint32_t count; /* blocks in the table */
    uint32_t room;
    uint32_t length;     /* committed tokens */
    uint32_t own;        /* blocks at the table's end that the row took for itself */
    uint32_t planes_row; /* dense: whose row in `planes` holds it */
    struct group *open;
    struct block *cow; /* settled by STEP for copy-on-write of the tail, not in the table yet */
};

struct cache {
    uint32_t id; /* index in the low half, generation above it */
    uint32_t session;
    struct family *family;
    struct planes *planes; /* dense, with resident layers; NULL: none yet */
    struct row *rows;
    uint32_t row_count;
    uint32_t rows_created;      /* what the memory of a static cache is for */
    uint32_t capacity;          /* dense: tokens of a row in slots and planes */
    struct planes *planes_next; /* settled by STEP, moved into by the schedule */
    uint32_t tokens_max;
    uint32_t append_max;
    uint64_t version; /* changes when rows do (not on crop) */
    char name[KVT_NAME_BYTES];
    struct kvt_counters counters;
    uint64_t need_to_bytes;
    uint64_t need_from_bytes;
};

/* ---- steps ---------------------------------------------------------------------------------------- */

enum op_role {
    ROLE_FILL = 1,
    ROLE_GUESS,     /* a fill that no schedule has named yet */
    ROLE_DISCARDED, /* a guess that was not used */
    ROLE_WRITEBACK,
    ROLE_COW,
    ROLE_STEP,
    ROLE_END, /* the step counter after a failure */
    ROLE_MIGRATE,
};

struct op_record {
    uint8_t role;   /* 0: the entry is free */
    uint8_t status; /* enum kvt_completion_status, once it is complete */
    bool complete;
    uint32_t cache;
    uint64_t step;
    uint64_t bytes;
};

/* Records of a session's operations, by id: a window that ends at the last id given. */
struct op_window {
    struct op_record *records;
    uint64_t capacity; /* power of two */
    uint64_t base;     /* smallest id that is kept */
    uint64_t next;     /* id of the next operation */
    uint64_t outstanding;
    uint64_t guesses;     /* of these, fills that no schedule has named yet */
    uint64_t migrates;    /* of these, copies of a migration */
    uint64_t window_sent; /* capacity that the issuer has for its own set */
};

struct slot {
    struct dev_place place;
    uint64_t generation; /* of the last fill, named by a schedule or not */
    uint64_t named;      /* last generation that a schedule named; 0: none since the last failure */
    uint64_t last_op; /* a later fill waits for it: write-back of the last occupant, or its fill */
    uint64_t free_at; /* schedule building: position behind the last reader of the occupant */
};

/* A growing array of the pieces of one or several steps. */
struct pieces {
    struct kvt_sched_piece *piece;
    uint32_t piece_count, piece_room;
    struct kvt_sched_run *run;
    uint32_t run_count, run_room;
    uint32_t *row; /* row sets */
    uint32_t row_count, row_room;
    struct kvt_sched_move *move;
    uint32_t move_count, move_room;
};

/* The prefetch into the next step. */
struct guess {
    bool active;
    uint32_t cache;
    uint64_t version;
    struct pieces pieces;       /* streamed ones only, in order; offsets relative to their slots */
    uint64_t op[KVT_SLOTS_MAX]; /* [piece] its fill */
};

/* A copy-on-write of one row's tail, which is undone if it could not be completed. */
struct cow {
    uint32_t row;
    uint32_t index; /* in the row's table */
    struct block *old;
};

enum schedule_phase {
    PHASE_NONE = 0,
    PHASE_OPEN,
    PHASE_DRAIN, /* failed: waits for submitted operations */
    PHASE_STOP,  /* failed, slots posted: waits for the worker's `step` */
};

struct schedule {
    uint32_t phase;
    struct cache *cache;
    uint64_t first_step;
    uint32_t steps;
    uint32_t committed;
    uint64_t fail_first; /* 0: none failed */
    uint32_t fail_code;
    uint32_t row_count;
    uint32_t *rows;     /* that take part */
    uint32_t *tokens;   /* that each appends in a step */
    uint64_t *first_op; /* [step] */
    uint64_t *need_to;  /* [step] */
    uint64_t *need_from;
    uint64_t ring_offset;
    uint64_t ring_bytes;
    struct cow *cows;
    uint32_t cow_count;
    uint32_t cow_ops_left; /* host copies that are not complete */
    bool cow_failed;
    struct planes *old_planes; /* moved from, or through */
    uint32_t *old_planes_row;  /* [row of the cache] before the moves */
    bool moved_in_place;       /* planes moved into places that others of them had: extents stay */
    bool planes_kept;          /* the moves end where they began: addresses are fixed */
    uint32_t *lengths;         /* [row that takes part] before the first step */
    uint32_t *fresh_from; /* [row of the cache] tokens from here on may still be on their way */
    struct kvt_program *end_program; /* for the step counter after a failure: owned */
    bool answer_abort;               /* somebody waits for the end of the abort */
    uint64_t abort_tag;
};

/* A request that waits its turn; owns copies of its arrays. */
struct pending {
    struct kvt_request request;
    struct kvt_layout *layout;
    struct kvt_cache_options options;
    uint32_t *rows;
    uint32_t *values;
    uint64_t since_ms;
    uint64_t epoch;      /* the engine's when it was last tried */
    bool started;        /* it waits for memory, not for its turn */
    uint64_t started_ms; /* when it was first tried in vain, or there was last more than ever */
    uint64_t used_most;  /* bytes that device and host together had taken by then */
    uint32_t short_tier; /* what it waits for */
};

/* A family's layer on its way between device and host. */
/* A place of a group that compaction moves. */
struct move {
    struct dev_place *place; /* in the group's */
    struct dev_place target;
    uint64_t bytes;
    const struct group *group;
    uint32_t layer;
};

struct migration {
    struct family *family; /* NULL: none */
    uint32_t layer;
    bool to_host;
    bool early;           /* to the host, while a schedule is open: full blocks go first */
    bool early_submitted; /* or could not be */
    bool submitted;       /* the rest; the layer flips when it is complete */
    bool compacts;        /* no layer, but what lies in an extent, which becomes empty */
    uint64_t need_bytes;  /* that its session lacks; 0: it is for another one */
    struct move *moves;
    uint32_t move_count;
};

struct session {
    bool in_use;
    bool hung; /* attach socket closed, or evicted: no requests any more */
    bool evicted;
    bool dead;     /* the process is certainly gone */
    bool draining; /* SESSION_CLOSE was sent to the issuer */
    bool drained;  /* the issuer holds nothing of it */
    bool emptied;  /* caches and host memory are gone */
    uint32_t tenant;
    uint32_t device;
    uint32_t worker_kind;
    bool keeps_addresses;
    uint32_t vacating; /* its extents that have no memory, or are about to lose or get it */
    uint8_t *ring;
    uint64_t ring_bytes;
    uint64_t ring_head;
    struct slot slots[KVT_SLOTS_MAX];
    uint32_t slot_count;
    uint64_t slot_bytes;
    uint32_t slot_cursor;
    struct schedule schedule;
    struct guess guess;
    struct op_window ops;
    uint64_t position;  /* of the next piece, ever growing: orders last readers */
    bool failed_posted; /* the control page's `failed` is not 0 */
    uint64_t step_next; /* number of the next step */
    uint64_t committed;
    struct pending queue[KVT_REQUESTS_MAX];
    uint32_t queue_count;
    struct migration migration;
    bool demoting;       /* idle: another session wants its memory */
    bool demote_failed;  /* and it could not be done; tried again after its next step */
    int promote_failed;  /* why a static layer could not come back; not tried again in that STEP */
    bool compact_failed; /* likewise */
    uint32_t give_backs_left;  /* of its own empty extents, in one request */
    uint32_t compactions_left; /* that one request of it may begin, or since a layer has left */
    bool settling;             /* a request has begun to gather memory: empty extents stay */
    uint32_t cache_count;
    uint64_t entry_count; /* of its row tables */
    uint32_t extent_count;
    uint64_t settling_since_ms;
    uint32_t extents_creating;
    uint64_t creating_bytes; /* of these; claimed during one settling pass */
    uint64_t device_bytes;
    uint64_t host_bytes;
    uint64_t last_step_ms;
    struct kvt_counters counters;
};

/* Actions wait in a ring; answers own their lengths. */
struct action_queue {
    struct kvt_action *actions;
    uint32_t head, count, room;
};

struct kvt_engine {
    struct kvt_engine_config config;
    uint64_t rules; /* left out, test builds only */
    uint64_t now_ms;
    uint64_t walk;        /* number of the last walk over blocks */
    uint64_t epoch;       /* grows when something happened that may let a waiting request go on */
    uint64_t block_count; /* of all groups: their tables are memory that no budget counts */
    uint64_t block_limit;
    uint64_t entry_count; /* of all row tables */
    uint32_t settling_count;
    bool chaining;         /* planes trade places: what looks empty still holds tokens */
    uint32_t wanted_count; /* families with demote_wanted */
    uint32_t short_tier;   /* of the last -KVT_EQUOTA: enum kvt_tier_id, and what was wanted */
    uint64_t short_bytes;
    bool refused;              /* memory_take found none: the request's text is to be made */
    bool short_own;            /* the session's own limit, not the budget, was short */
    struct kvt_counters ended; /* of sessions that are gone */
    struct device devices[KVT_DEVICES_MAX];
    struct host host;
    struct session *sessions; /* [sessions_max] */
    struct cache **caches;    /* [caches_max] */
    uint16_t *cache_generation;
    struct extent *extents; /* [EXTENTS_MAX]; entry 0 is not used */
    uint32_t extent_top;    /* entries from here on were never used */
    bool sweep_due;         /* an extent may have become empty */
    uint16_t *extent_generation;
    struct action_queue queue;
    struct kvt_answer *last_answer; /* of the action taken last; owned */
    /* Room for answers is taken when requests come in, so that none is lost for want of memory: as
     * much as there are requests without an answer, and one to refuse another. */
    struct answer_room *answers;
    struct answer_room *refusal;
};

#define EXTENTS_MAX    65536u
#define GIVE_BACKS_MAX 6u /* of empty extents, until a layer has left the device */

/* ---- queue.c: requests that wait their turn ------------------------------------------------------ */
void request_enter(struct kvt_engine *e, const struct kvt_request *r);
void queue_progress(struct kvt_engine *e, struct session *s);
void queue_drop(struct kvt_engine *e, struct session *s);
void queue_expire(struct kvt_engine *e, struct session *s);
uint64_t pending_deadline_ms(const struct kvt_engine *e, const struct session *s,
                             const struct pending *p);

/* An answer, and lengths of as many rows as there can be. */
struct answer_room {
    struct kvt_answer answer; /* first: what is freed */
    uint32_t lengths[KVT_ROWS_MAX];
    struct answer_room *next;
};

/* ---- engine.c: actions ---------------------------------------------------------------------------- */
struct kvt_action *action_push(struct kvt_engine *e, uint32_t kind);
/* An answer to `tag`; the caller fills more in. lengths of `cache` are added if it is not NULL. */
struct kvt_answer *answer_push(struct kvt_engine *e, uint32_t session, uint64_t tag, int code,
                               const struct cache *cache);
bool answer_reserve(
    struct kvt_engine *e);              /* for a request that comes in; false: only to refuse it */
void answer_drop(struct kvt_engine *e); /* it will have none */
void answer_error(struct kvt_engine *e, uint32_t session, uint64_t tag, int code,
                  const char *format, ...) __attribute__((format(printf, 5, 6)));
struct cache *cache_find(const struct kvt_engine *e, uint32_t session, uint32_t id);

/* ---- memory.c: extents and host memory --------------------------------------------------------------- */
void memory_pass_begin(struct kvt_engine *e, struct session *s);
int dev_short(struct kvt_engine *e, const struct session *s, uint64_t bytes);
void extent_vacate(struct kvt_engine *e, struct extent *x);
void extent_refill(struct kvt_engine *e, struct extent *x);
int dev_reserve(struct kvt_engine *e, struct session *s, uint64_t bytes);
bool dev_pending(const struct kvt_engine *e, const struct session *s);
bool dev_hoped_for(const struct kvt_engine *e, const struct session *s);
void dev_take_from_younger(struct kvt_engine *e, const struct session *s, uint64_t since_ms);
bool own_empty_give_back(struct kvt_engine *e, struct session *s);
uint64_t dev_extent_bytes(const struct kvt_engine_device *config, uint64_t bytes);
int dev_alloc(struct kvt_engine *e, struct session *s, uint64_t bytes, struct dev_place *out);
int dev_alloc_hole(struct kvt_engine *e, struct session *s, uint64_t bytes, uint32_t except,
                   struct dev_place *out);
void dev_take(struct kvt_engine *e, struct dev_place place, uint64_t bytes);
void dev_free(struct kvt_engine *e, struct dev_place place, uint64_t bytes);
uint64_t dev_available(const struct kvt_engine *e, const struct session *s);
struct extent *extent_find(const struct kvt_engine *e, uint32_t id);
void extents_sweep(struct kvt_engine *e);
void extents_release(struct kvt_engine *e, struct session *s);
void host_keep(struct kvt_engine *e);
int host_alloc(struct kvt_engine *e, struct session *s, uint64_t bytes, uint64_t *offset);
void host_free(struct kvt_engine *e, struct session *s, uint64_t offset, uint64_t bytes);
void host_sweep(struct kvt_engine *e);
void extent_created(struct kvt_engine *e, uint32_t extent, int code);
void extent_destroyed(struct kvt_engine *e, uint32_t extent);
void extent_reclaimed(struct kvt_engine *e, uint32_t session, uint32_t extent);
void host_grown(struct kvt_engine *e, uint64_t offset, uint64_t bytes, int code);
void host_shrunk(struct kvt_engine *e, uint64_t offset, uint64_t bytes);
uint32_t session_index(const struct kvt_engine *e, const struct session *s);

/* ---- block.c: families, groups, tables ---------------------------------------------------------------- */
struct family *family_create(const struct kvt_layout *layout, const struct kvt_cache_options *o,
                             uint32_t session, bool dense);
void family_free(struct family *f);
void family_unref(struct kvt_engine *e, struct family *f);
uint64_t group_layer_bytes(const struct kvt_engine *e, const struct family *f, uint32_t blocks,
                           uint32_t layer);
int row_reserve(struct kvt_engine *e, struct cache *c, struct row *r, uint32_t tokens);
void row_trim(struct kvt_engine *e, struct row *r);
void row_clear(struct kvt_engine *e, struct cache *c, struct row *r);
int row_copy(struct kvt_engine *e, struct cache *c, const struct row *from, struct row *to);
int block_alloc(struct kvt_engine *e, struct cache *c, struct row *r, uint32_t needed,
                struct block **out);
void blocks_full_text(const struct kvt_engine *e, const struct session *s, const char *what,
                      char *text);
void block_ref(struct block *b);
void block_unref(struct kvt_engine *e, struct block *b);
uint32_t group_blocks(uint32_t taken, uint32_t needed);
int spare_fill(struct kvt_engine *e, struct cache *c, uint64_t blocks);
/* K and V of `count` blocks from `first` on, in a group's place of a layer: all its K, then all its V. */
struct group_part {
    uint64_t k_offset, k_bytes;
    uint64_t v_offset, v_bytes;
};
struct group_part group_part(const struct kvt_engine *e, const struct group *g, uint32_t layer,
                             uint32_t first, uint32_t count);
uint64_t block_host_k(const struct kvt_engine *e, const struct block *b, uint32_t layer);
uint64_t block_host_v(const struct kvt_engine *e, const struct block *b, uint32_t layer);
struct dev_place block_gpu_k(const struct kvt_engine *e, const struct block *b, uint32_t layer);
struct dev_place block_gpu_v(const struct kvt_engine *e, const struct block *b, uint32_t layer);
static inline bool family_is_segment(const struct kvt_engine *e, const struct family *f) {
    return e->sessions[f->session].worker_kind == KVT_WORKER_SEGMENT;
}

/* ---- cache.c: create, close, edits --------------------------------------------------------------------- */
int cache_create(struct kvt_engine *e, struct session *s, const struct kvt_request *r,
                 struct cache **out, char *text);
void cache_destroy(struct kvt_engine *e, struct cache *c);
int cache_edit(struct kvt_engine *e, struct session *s, const struct kvt_request *r,
               struct cache **result, char *text);
/* A cache of the request's options that has no memory and is in no table. */
int cache_make(const struct kvt_engine *e, const struct session *s, const struct kvt_request *r,
               struct cache **out);
void cache_unmake(struct kvt_engine *e, struct cache *c);
uint64_t spare_blocks(const struct kvt_engine *e, const struct cache *c);
void planes_unref(struct kvt_engine *e, struct planes *p);
int planes_alloc(struct kvt_engine *e, struct planes *p);
bool planes_reuse(const struct cache *c);
int planes_chain(struct kvt_engine *e, struct planes *from, struct planes *to);
void planes_chain_undo(struct kvt_engine *e, struct planes *from, struct planes *to,
                       const struct dev_place *places);
void planes_layer_free(struct kvt_engine *e, struct planes *p, uint32_t layer);
struct planes *planes_create(struct family *f, uint32_t rows, uint32_t capacity, uint32_t owner);
uint64_t planes_layer_bytes(const struct planes *p, uint32_t layer);

/* Room for one more element of a growing array; false: no memory, nothing changed. */
bool array_grow(void **array, uint32_t *room, uint32_t count, size_t size);

/* ---- layout of pieces: pieces.c -------------------------------------------------------------------------- */
struct step_shape { /* what one step is: rows that take part, their lengths before it, appends */
    const uint32_t *rows;
    const uint32_t *lengths;
    const uint32_t *tokens;
    uint32_t count;
    uint64_t bytes_max; /* of the ring: a step that needs more is -KVT_ETOOBIG */
    bool streamed_only; /* a guess: resident layers need no prefetch */
};
int pieces_build(struct kvt_engine *e, struct cache *c, const struct step_shape *shape,
                 struct pieces *out);
void pieces_mark_sources(struct kvt_engine *e, struct cache *c, const struct step_shape *shape);
/* What they take in the ring. */
uint64_t pieces_bytes(const struct pieces *p);
void pieces_clear(struct pieces *p);
void pieces_free(struct pieces *p);

uint64_t slot_bytes_needed(const struct kvt_engine *e, const struct cache *c, uint32_t capacity);
uint32_t slots_needed(const struct kvt_engine *e, const struct family *f);

/* ---- settle.c: a STEP gathers its memory ------------------------------------------------------------------ */
int step_request(struct kvt_engine *e, struct session *s, struct pending *p, char *text);
void settle_undo(struct kvt_engine *e, struct cache *c);
bool planes_exact(struct cache *c, uint32_t capacity);

/* ---- slots.c ------------------------------------------------------------------------------------------------ */
int slots_settle(struct kvt_engine *e, struct session *s, uint32_t count, uint64_t bytes);
void slots_undo(struct kvt_engine *e, struct session *s);
void slots_free(struct kvt_engine *e, struct session *s);
void slots_shrink(struct kvt_engine *e, struct session *s);

/* ---- schedule.c: building one ------------------------------------------------------------------------------- */
struct step_plan { /* what STEP settled on */
    struct cache *cache;
    uint32_t steps;
    uint32_t count;
    uint32_t *rows;   /* handed over to the schedule */
    uint32_t *tokens; /* likewise */
};
int schedule_open(struct kvt_engine *e, struct session *s, struct step_plan *plan, char *text);
void ring_scribble(struct kvt_engine *e, struct session *s);
void schedule_close(struct kvt_engine *e, struct session *s, bool keep_cows);

/* ---- operations.c: of a schedule --------------------------------------------------------------------------- */
int programs_emit(struct kvt_engine *e, struct session *s, struct pieces *steps,
                  struct pieces *next);
void guess_discard(struct kvt_engine *e, struct session *s, uint32_t from);

/* ---- step.c: the life of an open schedule ----------------------------------------------------------------- */
void step_completion(struct kvt_engine *e, struct session *s, struct op_record *r);
void step_fail(struct kvt_engine *e, struct session *s, uint64_t first_step, uint32_t code);
void step_progress(struct kvt_engine *e, struct session *s);

/* ---- ops.c: op records -------------------------------------------------------------------------------------- */
int ops_reserve(struct op_window *w, uint64_t more);
int ops_window_attach(const struct op_window *w, struct kvt_program *program);
void program_push(struct kvt_engine *e, struct session *s, struct kvt_program *program);
uint64_t ops_add(struct op_window *w, uint32_t role, uint32_t cache, uint64_t step, uint64_t bytes);
struct op_record *ops_find(const struct op_window *w, uint64_t id);
void ops_complete(struct op_window *w, struct op_record *r, uint32_t status);
void ops_trim(struct op_window *w);
void end_op_emit(struct kvt_engine *e, struct session *s);
int copy_op_emit(struct kvt_engine *e, struct session *s, const struct kvt_copy *copies,
                 uint32_t count);
/* Whether nothing is in flight but fills that nobody has named and copies of a migration. */
static inline bool ops_drained(const struct op_window *w) {
    return w->outstanding == w->guesses + w->migrates;
}

/* ---- migrate.c ------------------------------------------------------------------------------------------------ */
int demote_layer(struct kvt_engine *e, struct session *s, struct family *f);
void demote_early(struct kvt_engine *e, struct session *s, struct family *f);
int promote_layer(struct kvt_engine *e, struct session *s, struct family *f);
bool family_stays(struct kvt_engine *e, struct session *s, struct family *f);
bool promote_is_due(const struct kvt_engine *e, const struct session *s, const struct family *f);
void migrate_completion(struct kvt_engine *e, struct session *s, struct op_record *r);
void migrate_progress(struct kvt_engine *e, struct session *s);
void family_quiet(struct kvt_engine *e, struct session *s, const struct family *f);

bool others_gather(const struct kvt_engine *e, const struct session *s); /* settle.c */

/* ---- compact.c ------------------------------------------------------------------------------------------------ */
bool compact_begin(struct kvt_engine *e, struct session *s, struct session *asking);
void compact_progress(struct kvt_engine *e, struct session *s);
void compact_end(struct kvt_engine *e, struct session *s, bool moved);
void compact_forget(struct kvt_engine *e, struct session *s);

/* ---- vacate.c ------------------------------------------------------------------------------------------------- */
bool family_may_leave(const struct kvt_engine *e, const struct family *f);
bool family_streams(const struct family *f);
bool session_may_vacate(const struct kvt_engine *e, const struct session *s);
void session_vacate(struct kvt_engine *e, struct session *s);
bool session_statics_fit_host(const struct kvt_engine *e, const struct session *s);
uint64_t session_vacant_bytes(const struct kvt_engine *e, const struct session *s,
                              const struct family *f);
int session_return(struct kvt_engine *e, struct session *s, const struct family *f);

/* ---- admit.c: where memory is taken from -------------------------------------------------------------------- */
int memory_take(struct kvt_engine *e, struct session *s);
void demote_progress(struct kvt_engine *e, struct session *s);
struct family *session_family(const struct kvt_engine *e, const struct session *s, uint32_t *at);

/* ---- refuse.c: what a request says that gets no memory ------------------------------------------------------- */
void refuse_text(struct kvt_engine *e, struct session *s, const struct pending *p, char *text);

/* ---- plan.c --------------------------------------------------------------------------------------------------- */
uint32_t resident_layers_most(uint32_t mode, uint32_t layer_count, uint32_t resident_layers_max);
int plan_slots_check(const struct kvt_layer_layout *layers, uint32_t layer_count, bool dense,
                     uint32_t mode, const char *what, char *text, uint32_t size);
uint32_t plan_slots(const struct kvt_layer_layout *layers, uint32_t layer_count,
                    const bool *resident, bool dense, bool is_static);
uint32_t plan_piece_tokens(const struct kvt_engine *e, const struct kvt_layer_layout *layers,
                           uint32_t layer_count, uint32_t device, uint32_t wanted);
void plan_priority(uint32_t layer_count, const struct kvt_layer_layout *layers, uint32_t *order);

#endif
