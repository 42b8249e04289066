/* Sessions: who is attached, what was shared with them, and what is left of those who went. Loop
 * thread.
 *
 * Life of a session:
 *   1. kvt_session_open: a slot, a number that is unique for ever, a token. Workers also get a
 *      control page, a schedule ring, and a session of the engine.
 *   2. OPEN while the attach socket is.
 *   3. ORPHAN: the socket hung up, the process may live on and still map extents. The engine has
 *      dropped the caches; device memory stays charged.
 *   4. DEAD: the process is gone (pidfd), or it maps no extent any more.
 *   5. The engine says SESSION_FREED: page and ring are unmapped, the slot is free.
 * Control sessions have no part in the engine: they go from OPEN to free.
 */
#ifndef KVT_DAEMON_SESSION_H
#define KVT_DAEMON_SESSION_H

#include "daemon/loop.h"
#include "daemon/pace.h"
#include "daemon/requests.h"
#include "proto/attach.h"
#include "proto/control_page.h"

#include <sys/types.h>

#define KVT_CONTROL_SESSIONS_MAX 64 /* beside [daemon] sessions_max */

struct kvt_daemon;
struct kvt_extent_entry;
struct kvt_out; /* attach.c: what its socket has not taken yet */

enum kvt_session_phase {
    KVT_PHASE_FREE = 0,
    KVT_PHASE_OPEN,
    KVT_PHASE_ORPHAN,
    KVT_PHASE_DEAD,
};

/* Who the peer is, by the kernel's word. */
struct kvt_peer {
    uid_t uid;
    gid_t gid;
    pid_t pid;
    int pid_fd; /* owned */
    bool admin; /* root, the daemon's user, or a member of the admin group */
};

struct kvt_session {
    struct kvt_daemon *daemon;
    enum kvt_session_phase phase;
    uint32_t slot;
    uint32_t uses; /* of the slot: the number is made from it */
    uint32_t id;   /* the number on the wire */
    uint32_t role;
    uint64_t features; /* that both sides named */
    uint32_t worker_kind;
    uint32_t device;
    int engine; /* index there; -1: none */
    struct kvt_peer peer;
    uint8_t token[KVT_TOKEN_BYTES];
    char name[KVT_NAME_BYTES];
    int socket_fd; /* owned; -1 once hung up */
    struct kvt_watch socket_watch;
    struct kvt_watch pid_watch;
    struct kvt_control_page *page; /* workers: mapped */
    void *ring;
    uint64_t ring_bytes;
    struct kvt_out *out; /* oldest first */
    struct kvt_out **out_end;
    uint32_t out_count;
    uint32_t extents_out;          /* extents that the process has got and not given back */
    struct kvt_extent_entry *back; /* asked for while the process does not have them */
    bool gone;                     /* the process is, by its pidfd */
    bool settle_wanted;            /* it is in the daemon's list: see kvt_session_settle */
    const char *hangup;            /* why it shall be hung up; NULL: it shall not */
    struct kvt_session *settle_next;
    struct kvt_requests requests;
    struct kvt_pace pace;
    uint64_t attached_ms;
};

struct kvt_sessions {
    struct kvt_session *all;
    uint32_t capacity;
    uint32_t workers;  /* in use, of [daemon] sessions_max */
    uint32_t controls; /* in use, of KVT_CONTROL_SESSIONS_MAX */
    uint32_t workers_max;
    int *by_engine; /* slot of an engine's index; -1 */
};

int kvt_sessions_init(struct kvt_sessions *t, struct kvt_daemon *d, uint32_t workers_max)
    __attribute__((warn_unused_result));
void kvt_sessions_destroy(struct kvt_sessions *t);

/* A free slot with number and token, or NULL: as many as are accepted are there. */
struct kvt_session *kvt_session_take(struct kvt_sessions *t, uint32_t role);
/* Gives it back: closes and unmaps what it has. */
void kvt_session_release(struct kvt_sessions *t, struct kvt_session *s);
/* The engine's index for a session; -1: forget it. */
void kvt_session_set_engine(struct kvt_sessions *t, struct kvt_session *s, int engine);

/* NULL: none. The first includes those that hung up. */
struct kvt_session *kvt_session_by_id(struct kvt_sessions *t, uint32_t id);
struct kvt_session *kvt_session_by_engine(struct kvt_sessions *t, uint32_t engine);

/* Makes page and ring, maps them, and returns the client's descriptors (owned by the caller): the
 * page read-write, the ring read-only and sealed against any other writable mapping. 0 or
 * -KVT_ESYS with errno. */
int kvt_session_share(struct kvt_session *s, uint64_t ring_bytes, uint64_t boot_epoch,
                      int client_fds[2]) __attribute__((warn_unused_result));

/* In constant time. */
bool kvt_token_equal(const uint8_t *a, const uint8_t *b);

#endif
