/* The issuer: decides which operation's gates are open, and which goes next. Pure: no I/O, no
 * clock, no threads. A device's copy thread owns one; so does each device of the simulator.
 *
 * Order. Operations of one slot are submitted in their program order, each when all of the one
 * before is submitted; so are COPY operations, and STEP operations. Among what is open the lowest
 * enum kvt_op_class goes first (a session's background work holds back neither its own decode nor
 * another's); in one class sessions take turns, deficit round-robin by bytes; and of one session
 * and class the open operation with the smallest id goes first: a closed one holds back none.
 * Copies are cut to at most `cut_bytes`, and at most `inflight_max` cuts are submitted and not
 * completed at any time. A post goes before any copy, as soon as it is due.
 *
 * In flight. What is submitted cannot be overtaken, so a class must not fill the link while a higher
 * one only waits for a gate. While a class has queued what copies, its gates open or not, the classes
 * below it together have at most a quarter of `inflight_bytes` under way: with that much submitted
 * and not completed no copy of theirs goes. Otherwise a class may have all of it. The quarter also
 * binds a class that has waited for long (KVT_ISSUER_PATIENCE): its fifth of what goes is less than a
 * quarter of what is under way, so that it gets it all the same, and beyond the quarter a decode's
 * next piece would wait for it again. Waiting for the quarter counts as waiting. A higher class that
 * never goes on (its worker is stopped) costs the lower ones nothing but depth.
 *
 * Gates.
 *   FILL       done[slot] == done_wait (if not 0), deps complete
 *   WRITEBACK  done[slot] == generation, deps complete
 *   COPY       deps complete
 *   STEP       `step` has reached step_wait (cyclic compare), deps complete
 * A dependency is complete when that operation's completion is KVT_DONE or KVT_FAILED or
 * KVT_CANCELLED: what a failure means is the engine's business, which sets `failed` and cancels.
 * But until it knows, no byte may go on that never came: when a WRITEBACK or COPY has failed, the
 * FILLs, WRITEBACKs and COPYs that were submitted before and depend on it complete as
 * KVT_CANCELLED, and so on.
 *
 * A FILL posts ready[slot] = generation behind its last copy: with `post_behind` as soon as that
 * copy is submitted (the driver orders them on one stream), otherwise when all are complete. With
 * `post_behind` a post has a tag like a copy, and the FILL is complete when that has come back too:
 * the engine may post to the slot itself, or let the page go, only when no older post is still on
 * its way. If one of a FILL's copies fails it does not post (with post_behind: a failure that is seen late cannot be
 * taken back; such drivers report copy errors as device errors, which end all sessions).
 */
#ifndef KVT_ENGINE_ISSUER_H
#define KVT_ENGINE_ISSUER_H

#include "proto/control_page.h"
#include "tiers/engine/program.h"

struct kvt_issuer;

/* A class whose copies are open goes before a higher one once that has had so many quanta meanwhile,
 * and so many bytes for each of its own: a prompt beside decoding workers gets a fifth of the link. */
#define KVT_ISSUER_PATIENCE 4

/* Classes below one that has something to copy: the part of inflight_bytes that they may have. */
#define KVT_ISSUER_LOWER_PART 4

struct kvt_issuer_config {
    uint32_t sessions_max;   /* session indexes are below this */
    uint32_t inflight_max;   /* cuts submitted and not completed */
    uint64_t inflight_bytes; /* likewise: no more is submitted from here on; 0: no such limit */
    uint64_t cut_bytes;      /* 16 MiB on a GPU */
    uint64_t quantum_bytes;  /* of the round-robin */
    bool post_behind;
};

/* What the driver shall submit next. */
struct kvt_issue {
    uint32_t is_post; /* 0: copy; 1: post */
    uint32_t session;
    uint32_t tag; /* copy, and post with post_behind: to be given back to kvt_issuer_copied */
    uint32_t
        stream; /* 0 towards the device or none, 1 away from it: a FILL's copies and post share one */
    struct kvt_copy copy;
    uint32_t slot; /* post: ready[slot] = value */
    uint64_t value;
    uint64_t op; /* whose copy or post it is: for tests and traces */
};

int kvt_issuer_create(const struct kvt_issuer_config *config, struct kvt_issuer **out)
    __attribute__((warn_unused_result));
void kvt_issuer_free(struct kvt_issuer *i);

/* Sessions. `page` is read only (step, done) and borrowed until the session is drained. */
void kvt_issuer_session_open(struct kvt_issuer *i, uint32_t session,
                             const struct kvt_control_page *page);
/* Cancels everything of the session; kvt_issuer_session_drained tells when nothing is in flight. Of
 * what was begun nothing more is submitted or posted; it completes as KVT_FAILED if that was
 * needed. */
void kvt_issuer_session_close(struct kvt_issuer *i, uint32_t session);

/* Takes over `p`. The session is open. */
void kvt_issuer_submit(struct kvt_issuer *i, struct kvt_program *p);

/* Operations with id >= first_op of which nothing was submitted complete as KVT_CANCELLED. One that
 * was begun is carried to its end. */
void kvt_issuer_cancel(struct kvt_issuer *i, uint32_t session, uint64_t first_op);

/* The next thing to submit. false: no post is due, and no copy is open that may be under way besides.
 * Cost: looks at the head of each filled queue, so in proportion to the slots in use. */
bool kvt_issuer_next(struct kvt_issuer *i, struct kvt_issue *out);

/* A copy from kvt_issuer_next has completed; with post_behind: a copy or a post. Tags are below
 * 2 * inflight_max. */
void kvt_issuer_copied(struct kvt_issuer *i, uint32_t tag, bool ok);

/* Takes the next completion for the engine; false: none. */
bool kvt_issuer_completion(struct kvt_issuer *i, struct kvt_completion *out);

/* Takes one session that was closed and has nothing left in flight or uncollected; false: none. */
bool kvt_issuer_session_drained(struct kvt_issuer *i, uint32_t *session);

/* Whether something waits for a counter that a worker writes: then the caller must look again. */
bool kvt_issuer_waits_for_worker(const struct kvt_issuer *i);

/* The words that kvt_issuer_waits_for_worker waits on, for a caller that can sleep on them: writes
 * up to `max` pointers to counters whose change may open a gate; returns how many there are. */
uint32_t kvt_issuer_watched(const struct kvt_issuer *i, const struct kvt_counter **out,
                            uint32_t max);

/* Test builds only: leaves rules out, so that the simulator can show that it notices. Bits are
 * enum kvt_broken_rule of engine.h. */
void kvt_issuer_break_rules(struct kvt_issuer *i, uint64_t rules);

#endif
