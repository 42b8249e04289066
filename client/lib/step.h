/* An open schedule as the user walks it: the pieces of the current step, translated to pointers one
 * by one as they are asked for. One a client; owned by the user's thread.
 */
#ifndef KVT_CLIENT_STEP_H
#define KVT_CLIENT_STEP_H

#include "client/lib/schedule_view.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A piece and what the library remembers about it. */
struct kvt_client_piece {
    struct kvt_piece piece; /* first: the user holds a pointer to it */
    uint32_t move_first;
    uint32_t move_count;
    bool moved; /* its moves are done */
    bool done;
};

/* Runs of the current step's pieces, in chunks that do not move. */
struct kvt_client_runs {
    struct kvt_client_runs *next;
    uint32_t used;
    uint32_t capacity;
    struct kvt_run runs[];
};

struct kvt_step {
    struct kvt_client *client; /* NULL: no schedule is open */
    struct kvt_client_cache *cache;
    struct kvt_schedule_view view;
    uint64_t first_step; /* number of the schedule's first step */
    uint32_t steps;      /* in the schedule */
    uint32_t current;    /* index of the current one */
    struct kvt_sched_step step;
    uint32_t taken; /* pieces handed out in the current step */
    struct kvt_client_piece *pieces;
    uint32_t piece_capacity;
    struct kvt_client_runs *runs;
    uint32_t *lengths; /* tokens of each row before the schedule */
    uint32_t *appends; /* tokens that each step appends to each row */
    uint32_t row_count;
    struct { /* the extent of the last piece or move; pinned as long as the step */
        bool known;
        uint32_t id;
        uint8_t *address;
        uint64_t bytes;
    } extent;
    struct {            /* kvt_acquire */
        bool used;      /* it opened this schedule */
        bool held;      /* `layer` was acquired and not committed */
        uint32_t layer; /* held, or the next one to be acquired */
        const struct kvt_piece **pieces;
        uint32_t capacity;
    } acquire;
};

/* ---- step.c: the pieces ------------------------------------------------------------------------ */

/* Makes step `index` of the schedule the current one. */
int kvt_client_step_start(struct kvt_step *s, uint32_t index) KVTIER_CHECK;
/* Does the schedule's leading moves, also when it has failed; before any step is started. */
int kvt_client_step_lead(struct kvt_step *s) KVTIER_CHECK;
/* 0, or why the current step cannot succeed any more: -KVT_EGONE, -KVT_EFAILED. Says nothing. */
int kvt_client_step_stopped(void *step);
/* The same, with a message. */
int kvt_client_step_check(struct kvt_step *s) KVTIER_CHECK;
/* The layer that attends to the next piece; UINT32_MAX: there is none, or it is malformed. */
uint32_t kvt_client_step_next_reader(const struct kvt_step *s);
/* Streamed pieces of the current step that were taken. */
uint32_t kvt_client_step_streamed(const struct kvt_step *s);
/* Streamed pieces of the current step that were not taken or are not done. */
uint32_t kvt_client_step_not_done(const struct kvt_step *s);
/* Frees what a step keeps from one schedule to the next. */
void kvt_client_step_free(struct kvt_step *s);

/* ---- schedule.c: begin, end, abort -------------------------------------------------------------- */

/* What kvt_step_begin and kvt_acquire share. */
struct kvt_client_step_options {
    uint32_t cache;
    const struct kvt_step_row *rows; /* NULL: all */
    uint32_t row_count;
    uint32_t tokens;
    uint32_t steps;
    bool acquire;
};
int kvt_client_step_open(struct kvt_client *c,
                         const struct kvt_client_step_options *o) KVTIER_CHECK;

#endif
