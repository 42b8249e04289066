/* The attach socket: who comes, who goes. Loop thread. No peer is ever waited for: a packet that
 * its socket does not take waits in a queue that is bounded; a peer whose queue is full is hung up.
 * A first bad packet ends that session and no other.
 */
#ifndef KVT_DAEMON_ATTACH_H
#define KVT_DAEMON_ATTACH_H

#include "daemon/loop.h"
#include "daemon/session.h"

#define KVT_GREETINGS_MAX 32 /* connections that have not said HELLO; the oldest makes room */
#define KVT_OUT_MAX       1024

struct kvt_attach;

struct kvt_greeting {
    struct kvt_attach *attach;
    int fd; /* -1: free */
    struct kvt_watch watch;
    uint64_t deadline_ms;
};

struct kvt_attach {
    struct kvt_daemon *daemon;
    struct kvt_watch listen_watch;
    struct kvt_timer timer;   /* greetings' deadlines; accepting again */
    uint64_t paused_until_ms; /* no descriptor was left to accept with */
    uint32_t fds_max;         /* RLIMIT_NOFILE */
    struct kvt_greeting greetings[KVT_GREETINGS_MAX];
};

/* Begins to listen on the runtime's socket. */
int kvt_attach_start(struct kvt_attach *a, struct kvt_daemon *d)
    __attribute__((warn_unused_result));
/* New connections are refused from now on. */
void kvt_attach_stop(struct kvt_attach *a);

/* Watches socket and process of a new session. 0 or -KVT_ESYS with errno. */
int kvt_session_watch(struct kvt_session *s) __attribute__((warn_unused_result));
void kvt_session_unwatch(struct kvt_session *s);
/* Asks the process of a new session for the extents of its former ones. */
void kvt_session_adopt(struct kvt_session *s);

/* Sends an extent to the session's process, or queues it. Owns fd, -1 for none. */
void kvt_session_send_extent(struct kvt_session *s, const struct kvt_attach_extent *packet, int fd);
/* Asks the process to unmap an extent: by the session's socket, or by that of a later session of
 * the same process. One that the process has not got, or has given back unasked, is not asked for:
 * kvt_session_settle tells the engine that it is back. One without memory is told to be over. */
void kvt_session_send_reclaim(struct kvt_session *s, uint32_t extent, bool keep_address);
/* A reply goes out behind every extent that was sent before it. Copies the bytes. */
void kvt_session_send_reply(struct kvt_session *s, const struct kvt_identity *to,
                            const uint8_t *bytes, size_t size);

/* Marks the session; kvt_daemon_pump hangs it up. `why` is a literal. */
void kvt_session_hangup_later(struct kvt_session *s, const char *why);
/* An extent was given back by the process, or is gone: an orphan without any is dead. */
void kvt_session_extent_back(struct kvt_session *s);
/* Does what is due: hangs it up, or tells the engine that it is dead. Calls the engine at most
 * once. Only kvt_daemon_pump calls it. */
void kvt_session_settle(struct kvt_session *s);
/* The engine has let go of the session: gives its slot back. */
void kvt_session_freed(struct kvt_session *s);

#endif
