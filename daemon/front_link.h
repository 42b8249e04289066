/* The daemon's end of kvtierd-front: starts it, watches it, starts it again when it dies, and passes
 * messages. What comes from it is checked and not believed. Loop thread.
 */
#ifndef KVT_DAEMON_FRONT_LINK_H
#define KVT_DAEMON_FRONT_LINK_H

#include "daemon/loop.h"
#include "daemon/requests.h"

#include <sys/types.h>

struct kvt_front_queued;

struct kvt_front {
    struct kvt_loop *loop;
    const char *program;  /* borrowed for ever */
    const char *endpoint; /* borrowed for ever */
    uint64_t memory_bytes;
    int listen_fd; /* borrowed */
    void (*on_ready)(void *context);
    /* `bytes` are borrowed for the call. */
    void (*on_message)(void *context, const struct kvt_identity *from, const uint8_t *bytes,
                       size_t size);
    void *context;

    pid_t pid; /* 0: none is running */
    int pid_fd;
    int pair_fd;
    struct kvt_watch pid_watch;
    struct kvt_watch pair_watch;
    struct kvt_timer timer; /* the next start, or the time by which it shall be ready */
    uint32_t life;          /* counts starts: identities are of one life */
    bool ready;
    uint32_t failures; /* in a row */
    uint64_t started_ms;
    struct kvt_front_queued *queue; /* replies that it has not taken yet, oldest first */
    struct kvt_front_queued **queue_end;
    size_t queue_bytes;
};

/* Fields up to `context` are set. 0, or -KVT_ESYS with errno if the program cannot be started. */
int kvt_front_start(struct kvt_front *f) __attribute__((warn_unused_result));
/* Ends the process and forgets it. */
void kvt_front_stop(struct kvt_front *f);
/* A reply for a peer. It is dropped if the peer was one of an earlier life, or if more waits than
 * the queue holds: clients ask again. */
void kvt_front_send(struct kvt_front *f, const struct kvt_identity *to, const uint8_t *bytes,
                    size_t size);

#endif
