/* What the files of kvtier-synth share. One thread; everything is owned by main. */
#ifndef KVT_SYNTH_SYNTH_H
#define KVT_SYNTH_SYNTH_H

#include "client/kvtier.h"
#include "client/worker/synthetic/gpu.h"
#include "client/worker/synthetic/model.h"
#include "client/worker/synthetic/options.h"
#include "client/worker/synthetic/samples.h"

#include <stdbool.h>
#include <stdint.h>

#define KVT_SYNTH_CACHES_MAX 65
#define KVT_SYNTH_ROWS_MAX   1024
#define KVT_SYNTH_LAYERS_MAX 1024

struct kvt_synth_totals {
    uint64_t tokens; /* appended to rows, in steps that were ended well */
    uint64_t steps;
    uint64_t schedules;
    uint64_t pieces;
    uint64_t streamed_pieces;
    uint64_t bytes_checked;
    uint64_t bytes_written;
    uint64_t errors;
    uint64_t aborts;
    uint64_t failed_steps;
    uint64_t edits;
    uint64_t forks;
    uint64_t caches;
    uint64_t rounds;
    uint64_t attached;
    uint64_t wait_us;         /* in kvt_piece_wait */
    uint64_t address_changes; /* of a layer's first token of row 0, between two steps */
    /* sums over caches, asked before each is closed */
    uint64_t to_device_bytes;
    uint64_t from_device_bytes;
    uint64_t prefetch_discarded_bytes;
    uint64_t migrated_bytes;
    uint64_t copied_on_write_bytes;
    uint64_t planes_moved_bytes; /* dense, when schedules began: as far as planes show it */
    uint64_t steps_committed;
    /* of the cache that was asked last */
    uint64_t need_to_device_bytes;
    uint64_t need_from_device_bytes;
    uint64_t device_bytes;
    uint64_t host_bytes;
    char layers[1025];
};

/* Time of this thread inside libkvtier's calls. On a GPU these enqueue, and wait for it only where more
 * is enqueued than it takes. */
struct kvt_synth_calls {
    bool kept;         /* the generation's are */
    uint64_t wait_ns;  /* kvt_piece_wait, all in all */
    uint64_t layer_ns; /* of the layer under way */
    struct kvt_synth_samples
        layers; /* kvt_step_piece, kvt_piece_wait and kvt_piece_done of a layer */
    struct kvt_synth_samples ends;   /* kvt_step_end */
    struct kvt_synth_samples begins; /* kvt_step_begin: a STEP and its answer */
};

struct kvt_synth {
    const struct kvt_synth_options *o;
    struct kvt_client *client;
    struct kvt_synth_gpu *gpu; /* NULL: the CPU looks at the bytes */
    struct kvt_layer_shape *layers;
    struct kvt_synth_random random;
    struct kvt_synth_cache caches[KVT_SYNTH_CACHES_MAX];
    uint32_t cache_count;
    struct kvt_synth_totals totals;
    uint64_t steps_begun; /* of this process, for --hold-step */
    const void **address; /* [layer] where that was in the last step, of cache `address_cache` */
    uint32_t address_cache;
    struct kvt_synth_calls calls;
    uint64_t limit_bytes; /* --limit: of a step, over the bus */
    double limit_before_s;
    double limit_after_s;
    uint64_t moved_bytes;  /* until --limit measured last; then of the generation */
    uint64_t moved_steps;  /* in which they were */
    double bare_before_us; /* --bare: a step without libkvtier; 0: not measured */
    double bare_after_us;
    double *bare_us; /* the current step is followed by that measurement, into here; or NULL */
    /* dense: where resident layers were in the last step, of this cache */
    uint32_t planes_cache;
    const void *planes[KVT_SYNTH_LAYERS_MAX];
    uint64_t schedule_moved_bytes; /* inside the device, when the schedule began */
    double begin_us;               /* what the call took that began it */
};

/* Everything that goes wrong comes back as 0, a negative KVT_E... code with the client's message, or
 * this: a byte, a length or a listing was wrong, and stderr says which. */
#define KVT_SYNTH_FOUND_WRONG 1

/* ---- walk.c: one step ------------------------------------------------------------------------- */

struct kvt_synth_step {
    struct kvt_synth_cache *cache;
    struct kvt_step *step;
    uint32_t row_count; /* rows that take part, in the order of their planes */
    uint32_t rows[KVT_SYNTH_ROWS_MAX];
    uint32_t before[KVT_SYNTH_ROWS_MAX]; /* by row of the cache: tokens before the step */
    uint32_t append[KVT_SYNTH_ROWS_MAX]; /* by row of the cache: tokens that it appends */
    bool takes_part[KVT_SYNTH_ROWS_MAX]; /* by row of the cache */
    int64_t abort_after;                 /* pieces, then give up; -1: never */
    bool aborted;
};

/* Walks the pieces of the current step, checking and appending. The model has the step's new tokens
 * already. Does not end the step; with `aborted` set the caller aborts it. */
int kvt_synth_walk(struct kvt_synth *s, struct kvt_synth_step *w);

uint64_t kvt_synth_now_ns(void);
/* kvt_synth_now_ns was `begin_ns` before the call, of a kind of which one at a time is kept. */
void kvt_synth_called(struct kvt_synth *s, struct kvt_synth_samples *kind, uint64_t begin_ns);

/* ---- run.c: a round --------------------------------------------------------------------------- */

int kvt_synth_layout(struct kvt_synth *s);
/* Creates a cache, prompt, generation with whatever is to happen at random, closes all caches. */
int kvt_synth_round(struct kvt_synth *s);
/* Forgets the caches of a session that is gone. */
void kvt_synth_forget(struct kvt_synth *s);

/* ---- edits.c: what happens between schedules at random ---------------------------------------- */

int kvt_synth_edit(struct kvt_synth *s, struct kvt_synth_cache *c);
/* Asks for its counters, closes it and takes it off the list. */
int kvt_synth_close(struct kvt_synth *s, uint32_t index);

#endif
