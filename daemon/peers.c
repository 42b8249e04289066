/* Sessions while they are attached and after: packets either way, hang-up, death, what the process
 * of a former session still maps. */
#include "daemon/attach.h"
#include "daemon/daemon.h"
#include "daemon/log.h"
#include "daemon/packet.h"
#include "daemon/peer.h"
#include "tiers/engine/assert.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PACKETS_A_TURN 64
#define EVENTS         ((uint32_t)(EPOLLIN | EPOLLRDHUP))

/* A packet for the socket, or a reply that waits behind such. */
struct kvt_out {
    struct kvt_out *next;
    bool is_reply;
    struct kvt_identity to; /* reply */
    int fd;                 /* packet; owned, -1: none */
    size_t size;
    uint8_t bytes[];
};

/* A session is in the daemon's list only while it is OPEN or ORPHAN, and leaves these two by
 * kvt_session_settle alone, which is called for one taken out of the list: so no slot that was
 * given back is in it. */
static void settle_later(struct kvt_session *s) {
    if (!s->settle_wanted) {
        s->settle_wanted = true;
        s->settle_next = s->daemon->settle;
        s->daemon->settle = s;
    }
}

/* ---- the queue ----------------------------------------------------------------------------------- */

static void free_out(struct kvt_out *o) {
    if (o->fd >= 0) {
        (void)close(o->fd);
    }
    free(o);
}

static void clear_out(struct kvt_session *s) {
    while (s->out != NULL) {
        struct kvt_out *o = s->out;
        s->out = o->next;
        free_out(o);
    }
    s->out_end = &s->out;
    s->out_count = 0;
}

/* 1: sent; 0: the socket is full; -1: the peer is gone. */
static int send_one(int socket_fd, const uint8_t *bytes, size_t size, int fd) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.bytes = {0}};
    struct iovec part = {.iov_base = (void *)bytes, .iov_len = size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof(control.bytes);
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(head), &fd, sizeof(int));
    }
    ssize_t n;
    do {
        n = sendmsg(socket_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (n < 0 && errno == EINTR);
    if (n == (ssize_t)size) {
        return 1;
    }
    /* ETOOMANYREFS: too many descriptors of ours lie unread in sockets. */
    bool full = n < 0 && (errno == EAGAIN || errno == ENOBUFS || errno == ETOOMANYREFS);
    return full ? 0 : -1;
}

static void flush(struct kvt_session *s) {
    while (s->out != NULL) {
        struct kvt_out *o = s->out;
        if (o->is_reply) {
            kvt_front_send(&s->daemon->front, &o->to, o->bytes, o->size);
        } else {
            int rc = send_one(s->socket_fd, o->bytes, o->size, o->fd);
            if (rc == 0) {
                return;
            }
            if (rc < 0) {
                kvt_session_hangup_later(s, "its socket is closed");
                return;
            }
        }
        s->out = o->next;
        s->out_count--;
        free_out(o);
    }
    s->out_end = &s->out;
    kvt_loop_change(&s->daemon->loop, &s->socket_watch, EVENTS);
}

/* Takes over fd. */
static void enqueue(struct kvt_session *s, const struct kvt_identity *to, const void *bytes,
                    size_t size, int fd) {
    struct kvt_out *o = s->out_count < KVT_OUT_MAX ? malloc(sizeof(*o) + size) : NULL;
    if (o == NULL) {
        if (fd >= 0) {
            (void)close(fd);
        }
        kvt_session_hangup_later(s, "it does not read its attach socket");
        return;
    }
    *o = (struct kvt_out){.is_reply = to != NULL, .fd = fd, .size = size};
    if (to != NULL) {
        o->to = *to;
    }
    memcpy(o->bytes, bytes, size);
    if (s->out == NULL) {
        kvt_loop_change(&s->daemon->loop, &s->socket_watch, EVENTS | EPOLLOUT);
    }
    *s->out_end = o;
    s->out_end = &o->next;
    s->out_count++;
}

/* Takes over fd. */
static void send_packet(struct kvt_session *s, const void *bytes, size_t size, int fd) {
    KVT_ASSERT(s->phase == KVT_PHASE_OPEN);
    int rc = s->out != NULL ? 0 : send_one(s->socket_fd, bytes, size, fd);
    if (rc == 0) {
        enqueue(s, NULL, bytes, size, fd);
        return;
    }
    if (fd >= 0) {
        (void)close(fd);
    }
    if (rc < 0) {
        kvt_session_hangup_later(s, "its socket is closed");
    }
}

void kvt_session_send_reply(struct kvt_session *s, const struct kvt_identity *to,
                            const uint8_t *bytes, size_t size) {
    if (s->out != NULL) {
        enqueue(s, to, bytes, size, -1);
    } else {
        kvt_front_send(&s->daemon->front, to, bytes, size);
    }
}

void kvt_session_send_extent(struct kvt_session *s, const struct kvt_attach_extent *packet,
                             int fd) {
    kvt_log(KVT_LOG_DEBUG, "session %u: extent %u, %llu bytes, is sent", s->id, packet->extent,
            (unsigned long long)packet->bytes);
    s->extents_out++;
    send_packet(s, packet, sizeof(*packet), fd);
}

/* ---- the same process, attached again ------------------------------------------------------------- */

static bool same_process(const struct kvt_session *a, const struct kvt_session *b) {
    return a->peer.pid == b->peer.pid && !kvt_pidfd_ended(a->peer.pid_fd) &&
           !kvt_pidfd_ended(b->peer.pid_fd);
}

/* The session over whose socket the process of `s` can be asked; NULL: none. */
static struct kvt_session *way_to(struct kvt_session *s) {
    if (s->phase == KVT_PHASE_OPEN) {
        return s;
    }
    struct kvt_sessions *t = &s->daemon->sessions;
    for (uint32_t i = 0; s->phase == KVT_PHASE_ORPHAN && i < t->capacity; i++) {
        struct kvt_session *other = &t->all[i];
        if (other->phase == KVT_PHASE_OPEN && other->role == KVT_ROLE_WORKER &&
            same_process(s, other)) {
            return other;
        }
    }
    return NULL;
}

void kvt_session_send_reclaim(struct kvt_session *s, uint32_t extent, bool keep_address) {
    struct kvt_extent_entry *e = kvt_tiers_extent(&s->daemon->tiers, extent);
    if (e != NULL &&
        !e->out) { /* never sent, or given back before it was asked for: RECLAIMED comes once */
        e->back_next = s->back;
        s->back = e;
        settle_later(s); /* the engine is called when all its actions are carried out */
        return;
    }
    struct kvt_attach_reclaim packet = {
        .head = kvt_attach_head_make(KVT_ATTACH_RECLAIM, sizeof(packet)),
        .session = s->id,
        .extent = extent,
    };
    packet.head.reserved = keep_address ? KVT_RECLAIM_KEEP_ADDRESS : 0;
    struct kvt_session *way = way_to(s);
    kvt_log(KVT_LOG_DEBUG, "session %u: extent %u is asked back%s", s->id, extent,
            way == s      ? ""
            : way != NULL ? " over a later session"
                          : ", once its process attaches again");
    if (way != NULL) {
        send_packet(way, &packet, sizeof(packet), -1);
    }
}

static void reclaim_all(struct kvt_session *orphan) {
    struct kvt_tiers *tiers = &orphan->daemon->tiers;
    for (uint32_t i = 0; i < KVT_EXTENT_ENTRIES; i++) {
        const struct kvt_extent_entry *e = tiers->extents[i];
        if (e != NULL && e->out && e->session == orphan->id) {
            kvt_session_send_reclaim(orphan, e->id, false);
        }
    }
}

void kvt_session_adopt(struct kvt_session *s) {
    struct kvt_sessions *t = &s->daemon->sessions;
    for (uint32_t i = 0; s->role == KVT_ROLE_WORKER && i < t->capacity; i++) {
        struct kvt_session *other = &t->all[i];
        if (other->phase == KVT_PHASE_ORPHAN && other->extents_out > 0 && same_process(s, other)) {
            reclaim_all(other);
        }
    }
}

/* ---- what comes ----------------------------------------------------------------------------------- */

static void reclaimed(struct kvt_session *s, const struct kvt_attach_reclaim *packet) {
    struct kvt_daemon *d = s->daemon;
    struct kvt_session *owner = kvt_session_by_id(&d->sessions, packet->session);
    struct kvt_extent_entry *e = kvt_tiers_extent(&d->tiers, packet->extent);
    /* Only what that process got, and once: anything else is a lie or late, and harms nobody. */
    if (owner == NULL || e == NULL || !e->out || e->session != owner->id || owner->engine < 0 ||
        (owner != s && !same_process(owner, s))) {
        kvt_log(KVT_LOG_DEBUG, "session %u: RECLAIMED %u of session %u is ignored", s->id,
                packet->extent, packet->session);
        return;
    }
    kvt_log(KVT_LOG_DEBUG, "session %u: extent %u is given back", owner->id, packet->extent);
    e->out = false;
    /* Before it is asked back, as by who detaches, this is nothing to the engine: what counts then is
     * that it is not out any more, see kvt_session_send_reclaim. */
    kvt_engine_extent_reclaimed(d->engine, (uint32_t)owner->engine, packet->extent);
    kvt_session_extent_back(owner);
    kvt_daemon_pump(d);
}

static void socket_ready(void *context, uint32_t events) {
    struct kvt_session *s = context;
    struct kvt_daemon *d = s->daemon;
    if ((events & EPOLLOUT) != 0) {
        flush(s);
    }
    for (int i = 0; i < PACKETS_A_TURN && s->socket_watch.fd >= 0 && s->hangup == NULL; i++) {
        uint8_t bytes[KVT_ATTACH_PACKET_BYTES_MAX + 1];
        struct kvt_attach_reclaim packet;
        ssize_t n = recv(s->socket_fd, bytes, sizeof(bytes), MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            break;
        }
        if (n <= 0) {
            kvt_session_hangup_later(s, "it detached");
        } else if (s->role != KVT_ROLE_WORKER ||
                   kvt_reclaimed_check(bytes, (size_t)n, &packet) != 0) {
            kvt_session_hangup_later(s, "a packet on its attach socket is malformed");
        } else {
            reclaimed(s, &packet);
        }
    }
    kvt_daemon_pump(d);
}

static void process_ended(void *context, uint32_t events) {
    struct kvt_session *s = context;
    (void)events;
    s->gone = true;
    kvt_loop_remove(&s->daemon->loop, &s->pid_watch);
    if (s->phase == KVT_PHASE_OPEN) {
        kvt_session_hangup_later(s, "its process ended");
    } else if (s->phase == KVT_PHASE_ORPHAN) {
        settle_later(s);
    }
    kvt_daemon_pump(s->daemon);
}

int kvt_session_watch(struct kvt_session *s) {
    struct kvt_loop *loop = &s->daemon->loop;
    s->socket_watch = (struct kvt_watch){.ready = socket_ready, .context = s, .fd = -1};
    s->pid_watch = (struct kvt_watch){.ready = process_ended, .context = s, .fd = -1};
    int rc = kvt_loop_add(loop, &s->socket_watch, s->socket_fd, EVENTS);
    return rc != 0 ? rc : kvt_loop_add(loop, &s->pid_watch, s->peer.pid_fd, EPOLLIN);
}

void kvt_session_unwatch(struct kvt_session *s) {
    kvt_loop_remove(&s->daemon->loop, &s->socket_watch);
    kvt_loop_remove(&s->daemon->loop, &s->pid_watch);
}

/* ---- the end -------------------------------------------------------------------------------------- */

void kvt_session_hangup_later(struct kvt_session *s, const char *why) {
    KVT_ASSERT(s->phase == KVT_PHASE_OPEN);
    if (s->hangup == NULL) {
        s->hangup = why;
        settle_later(s);
    }
}

void kvt_session_extent_back(struct kvt_session *s) {
    KVT_ASSERT(s->extents_out > 0);
    s->extents_out--;
    if (s->phase == KVT_PHASE_ORPHAN) {
        settle_later(s);
    }
}

static void hang_up(struct kvt_session *s) {
    struct kvt_daemon *d = s->daemon;
    kvt_log(KVT_LOG_INFO, "session %u: \"%s\", pid %ld, hung up: %s", s->id, s->name,
            (long)s->peer.pid, s->hangup);
    kvt_loop_remove(&d->loop, &s->socket_watch);
    clear_out(s);
    (void)close(s->socket_fd);
    s->socket_fd = -1;
    s->phase = KVT_PHASE_ORPHAN;
    if (s->engine < 0) {
        kvt_session_unwatch(s);
        kvt_session_release(&d->sessions, s);
        return;
    }
    settle_later(s); /* it may be dead at once */
    kvt_engine_session_hangup(d->engine, (uint32_t)s->engine);
}

void kvt_session_settle(struct kvt_session *s) {
    s->settle_wanted = false;
    if (s->back != NULL) {
        const struct kvt_extent_entry *e = s->back;
        s->back = e->back_next;
        settle_later(s); /* for the others, and for what else there is to settle */
        kvt_engine_extent_reclaimed(s->daemon->engine, (uint32_t)s->engine, e->id);
    } else if (s->phase == KVT_PHASE_OPEN && s->hangup != NULL) {
        hang_up(s);
    } else if (s->phase == KVT_PHASE_ORPHAN && (s->gone || s->extents_out == 0)) {
        /* A process that maps no extent any more cannot touch device memory: for the engine it is
         * as good as gone, and a worker that detaches and attaches again leaves nothing behind. */
        s->phase = KVT_PHASE_DEAD;
        kvt_engine_session_dead(s->daemon->engine, (uint32_t)s->engine);
    }
}

void kvt_session_freed(struct kvt_session *s) {
    KVT_ASSERT(s->phase == KVT_PHASE_DEAD);
    KVT_ASSERT(s->back == NULL);
    kvt_session_unwatch(s);
    kvt_session_release(&s->daemon->sessions, s);
}
