/* How far the issuer has come with an operation. It lies in the program's own allocation, so that
 * taking over a program cannot fail. The issuer's alone. */
#ifndef KVT_ENGINE_PROGRESS_H
#define KVT_ENGINE_PROGRESS_H

#include "tiers/engine/program.h"

struct kvt_op_progress {
    struct kvt_program *program;  /* borrows until the operation's completion is collected */
    struct kvt_op_progress *next; /* in the one list that it is in, if any */
    const struct kvt_op *op;
    uint64_t bytes;        /* copied */
    uint64_t cut_offset;   /* bytes of copy `copies_begun` that are submitted */
    uint32_t copies_begun; /* copies that are submitted whole */
    uint32_t deps_seen;    /* dependencies before this one are complete */
    uint32_t cuts_inflight;
    bool begun;    /* something was submitted */
    bool queued;   /* in the queue of its slot, or of its kind: not all of it is submitted */
    bool post_due; /* in the list of posts */
    bool posted;
    bool post_inflight; /* the post was given a tag that has not come back */
    bool failed;        /* a copy failed, or its session was closed in between */
    uint8_t status;     /* enum kvt_completion_status, once it is complete */
};

#endif
