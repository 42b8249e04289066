/* Connections until they are sessions: accepting, HELLO, WELCOME or REFUSE. What becomes of a
 * session afterwards is in peers.c. */
#include "daemon/attach.h"
#include "daemon/daemon.h"
#include "daemon/log.h"
#include "daemon/packet.h"
#include "daemon/peer.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define ACCEPTS_A_TURN 16
#define GREETING_MS    2000 /* to say HELLO */
#define PAUSE_MS       100
#define FDS_RESERVED   64 /* for sessions that are there: extents, restarts of the front */

static void close_greeting(struct kvt_greeting *g) {
    if (g->fd >= 0) {
        kvt_loop_remove(&g->attach->daemon->loop, &g->watch);
        (void)close(g->fd);
        g->fd = -1;
    }
}

/* ---- WELCOME and REFUSE ------------------------------------------------------------------------- */

static int send_with_fds(int fd, const void *packet, size_t size, const int *fds, int count) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(2 * sizeof(int))];
    } control = {.bytes = {0}};
    struct iovec part = {.iov_base = (void *)packet, .iov_len = size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
        memcpy(CMSG_DATA(head), fds, (size_t)count * sizeof(int));
    }
    return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)size ? 0 : -KVT_ESYS;
}

static void refuse(int fd, const struct kvt_attach_refuse *packet, const struct kvt_peer *peer) {
    kvt_log(KVT_LOG_WARNING, "refused pid %ld, uid %ld: %s", peer != NULL ? (long)peer->pid : -1L,
            peer != NULL ? (long)peer->uid : -1L, packet->text);
    (void)send_with_fds(fd, packet, sizeof(*packet), NULL, 0);
}

static int welcome(struct kvt_session *s, const int *fds, int count) {
    struct kvt_daemon *d = s->daemon;
    struct kvt_attach_welcome w = {
        .head = kvt_attach_head_make(KVT_ATTACH_WELCOME, sizeof(w)),
        .protocol_major = KVT_PROTOCOL_MAJOR,
        .protocol_minor = KVT_PROTOCOL_MINOR,
        .features = s->features,
        .boot_epoch = d->boot_epoch,
        .session = s->id,
        .block_tokens = d->config.block_tokens,
    };
    memcpy(w.token, s->token, sizeof(w.token));
    (void)snprintf(w.server_version, sizeof(w.server_version), "%s", KVT_VERSION);
    (void)snprintf(w.endpoint, sizeof(w.endpoint), "%s", d->endpoint);
    if (s->role == KVT_ROLE_WORKER) {
        const struct kvt_driver_info *info = kvt_device_info(d->tiers.devices[s->device].device);
        w.ring_bytes = s->ring_bytes;
        w.control_page_bytes = KVT_CONTROL_PAGE_BYTES;
        w.extent_kind = info->extent_kind;
        memcpy(w.device, info->uuid, sizeof(w.device));
        (void)snprintf(w.device_name, sizeof(w.device_name), "%s",
                       d->config.devices[s->device].name);
    }
    return send_with_fds(s->socket_fd, &w, sizeof(w), fds, count);
}

/* ---- from a HELLO to a session ------------------------------------------------------------------- */

/* The device that a HELLO names; -1: there is none. */
static int find_device(const struct kvt_daemon *d, const uint8_t *uuid) {
    static const uint8_t any[KVT_UUID_BYTES];
    if (memcmp(uuid, any, sizeof(any)) == 0) {
        return 0;
    }
    for (uint32_t i = 0; i < d->tiers.device_count; i++) {
        const struct kvt_driver_info *info = kvt_device_info(d->tiers.devices[i].device);
        if (memcmp(uuid, info->uuid, KVT_UUID_BYTES) == 0) {
            return (int)i;
        }
    }
    return -1;
}

static int check_device(struct kvt_daemon *d, const struct kvt_attach_hello *h,
                        struct kvt_attach_refuse *no) {
    int device = find_device(d, h->device);
    if (device < 0) {
        kvt_refuse_make(no, KVT_ENOENT,
                        "attach: no device of this daemon has that identity; kvtierctl status "
                        "lists them");
        return -KVT_ENOENT;
    }
    const struct kvt_driver_info *info = kvt_device_info(d->tiers.devices[device].device);
    if ((h->features & info->features) != info->features) {
        kvt_refuse_make(
            no, KVT_ENOTSUP,
            "attach: device %s is a %s device, and this worker does not compute on one; "
            "name the stream (device_kind), or another device by its UUID",
            d->config.devices[device].name, info->name);
        return -KVT_ENOTSUP;
    }
    uint32_t kind = info->extent_kind;
    if (h->extent_kind != 0 && h->extent_kind != kind) {
        kvt_refuse_make(no, KVT_ENOTSUP,
                        "attach: extents of kind %u are wanted, the device %s shares kind %u; see "
                        "extent_kind in kvtierd.conf(5)",
                        h->extent_kind, d->config.devices[device].name, kind);
        return -KVT_ENOTSUP;
    }
    return device;
}

/* Gives a worker's session its memory and its part in the engine. */
static int furnish(struct kvt_session *s, int fds[2], struct kvt_attach_refuse *no) {
    struct kvt_daemon *d = s->daemon;
    if (kvt_session_share(s, d->config.ring_bytes, d->boot_epoch, fds) != 0) {
        kvt_refuse_make(no, KVT_ESYS, "attach: control page and ring cannot be made: %s",
                        strerror(errno));
        return -KVT_ESYS;
    }
    struct kvt_session_options options = {
        .tenant = s->peer.uid,
        .device = s->device,
        .worker_kind = s->worker_kind,
        .keeps_addresses = (s->features & KVT_FEATURE_KEEP_ADDRESS) != 0,
        .ring = s->ring,
        .ring_bytes = s->ring_bytes,
    };
    int engine = kvt_engine_session_open(d->engine, &options);
    if (engine < 0) {
        kvt_refuse_make(no, -engine, "attach: %s", kvt_error_text(engine));
        return engine;
    }
    kvt_session_set_engine(&d->sessions, s, engine);
    return 0;
}

static int admit(struct kvt_attach *a, int fd, const struct kvt_attach_hello *h,
                 const struct kvt_peer *peer, struct kvt_attach_refuse *no) {
    struct kvt_daemon *d = a->daemon;
    int fds[2] = {-1, -1};
    int device = 0;
    if (h->role == KVT_ROLE_WORKER) {
        device = check_device(d, h, no);
        if (device < 0) {
            return device;
        }
    }
    struct kvt_session *s = kvt_session_take(&d->sessions, h->role);
    if (s == NULL) {
        kvt_refuse_make(no, KVT_EBUSY,
                        "attach: %u workers and %u others are attached, as many as are accepted; "
                        "raise [daemon] sessions_max",
                        d->sessions.workers, d->sessions.controls);
        return -KVT_EBUSY;
    }
    s->peer = *peer;
    s->worker_kind = h->worker_kind;
    s->device = (uint32_t)device;
    if (h->role == KVT_ROLE_WORKER) {
        const struct kvt_driver_info *info = kvt_device_info(d->tiers.devices[device].device);
        uint64_t keep = info->extent_kind == KVT_EXTENT_FD ? KVT_FEATURE_KEEP_ADDRESS : 0;
        s->features = h->features & (info->features | keep);
    }
    memcpy(s->name, h->name, sizeof(s->name));
    s->socket_fd = fd;
    int rc = kvt_session_watch(s);
    if (rc != 0) {
        kvt_refuse_make(no, KVT_ESYS, "attach: %s", strerror(errno));
    } else if (s->role == KVT_ROLE_WORKER) {
        rc = furnish(s, fds, no);
    }
    if (rc == 0 && welcome(s, fds, s->role == KVT_ROLE_WORKER ? 2 : 0) != 0) {
        kvt_session_hangup_later(s, "it did not take WELCOME");
    }
    for (int i = 0; i < 2; i++) {
        if (fds[i] >= 0) {
            (void)close(fds[i]);
        }
    }
    if (rc != 0) {
        kvt_session_unwatch(s);
        s->socket_fd = -1; /* the caller still owns it and the pidfd */
        s->peer.pid_fd = -1;
        kvt_session_release(&d->sessions, s);
        return rc;
    }
    kvt_log(KVT_LOG_INFO, "session %u: %s \"%s\" attached, pid %ld, uid %ld", s->id,
            s->role == KVT_ROLE_WORKER ? "worker" : "control", s->name, (long)peer->pid,
            (long)peer->uid);
    kvt_session_adopt(s);
    kvt_daemon_pump(d);
    return 0;
}

static bool out_of_fds(const struct kvt_attach *a, int fd) {
    return (uint32_t)fd + FDS_RESERVED >= a->fds_max;
}

/* The connection's first packet. Takes over g->fd and frees the greeting. */
static void greet(struct kvt_greeting *g, const uint8_t *bytes, size_t size) {
    struct kvt_attach *a = g->attach;
    struct kvt_daemon *d = a->daemon;
    int fd = g->fd;
    struct kvt_attach_hello h;
    struct kvt_attach_refuse no;
    struct kvt_peer peer = {.pid_fd = -1};
    kvt_loop_remove(&d->loop, &g->watch);
    g->fd = -1;
    int rc = kvt_hello_check(bytes, size, &h, &no);
    int known = kvt_peer_identify(fd, d->admin_group, &peer);
    if (rc == 0 && d->stopping) {
        rc = -KVT_EGONE;
        kvt_refuse_make(&no, KVT_EGONE, "attach: the daemon is stopping");
    }
    if (rc == 0 && out_of_fds(a, fd)) {
        rc = -KVT_EBUSY;
        kvt_refuse_make(&no, KVT_EBUSY,
                        "attach: %d of %u file descriptors of the daemon are in use; detach "
                        "something, or raise LimitNOFILE of kvtierd",
                        fd, a->fds_max);
    }
    if (rc == 0 && known != 0) {
        rc = known;
        kvt_refuse_make(&no, -known,
                        "attach: the kernel does not say which process this is: %s; attach from "
                        "the daemon's pid namespace",
                        known == -KVT_EPERM ? "no pid" : strerror(errno));
    }
    if (rc == 0) {
        rc = admit(a, fd, &h, &peer, &no);
    }
    if (rc != 0) {
        refuse(fd, &no, known == 0 ? &peer : NULL);
        (void)close(fd);
        if (peer.pid_fd >= 0) {
            (void)close(peer.pid_fd);
        }
    }
}

static void greeting_ready(void *context, uint32_t events) {
    struct kvt_greeting *g = context;
    uint8_t bytes[KVT_ATTACH_PACKET_BYTES_MAX + 1];
    (void)events;
    ssize_t n =
        recv(g->fd, bytes, sizeof(bytes), MSG_DONTWAIT); /* descriptors sent along are lost */
    if (n > 0) {
        greet(g, bytes, (size_t)n);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
        close_greeting(g);
    }
}

/* ---- accepting ----------------------------------------------------------------------------------- */

static void set_timer(struct kvt_attach *a) {
    uint64_t first = a->paused_until_ms;
    for (uint32_t i = 0; i < KVT_GREETINGS_MAX; i++) {
        const struct kvt_greeting *g = &a->greetings[i];
        if (g->fd >= 0 && g->deadline_ms < first) {
            first = g->deadline_ms;
        }
    }
    a->timer.deadline_ms = first;
}

static void timer_fired(void *context, uint64_t now_ms) {
    struct kvt_attach *a = context;
    for (uint32_t i = 0; i < KVT_GREETINGS_MAX; i++) {
        struct kvt_greeting *g = &a->greetings[i];
        if (g->fd >= 0 && g->deadline_ms <= now_ms) {
            close_greeting(g);
        }
    }
    if (a->paused_until_ms <= now_ms) {
        a->paused_until_ms = UINT64_MAX;
        if (a->listen_watch.fd >= 0) {
            kvt_loop_change(&a->daemon->loop, &a->listen_watch, EPOLLIN);
        }
    }
    set_timer(a);
}

/* A free greeting; the oldest makes room. */
static struct kvt_greeting *take_greeting(struct kvt_attach *a) {
    struct kvt_greeting *oldest = &a->greetings[0];
    for (uint32_t i = 0; i < KVT_GREETINGS_MAX; i++) {
        struct kvt_greeting *g = &a->greetings[i];
        if (g->fd < 0) {
            return g;
        }
        if (g->deadline_ms < oldest->deadline_ms) {
            oldest = g;
        }
    }
    close_greeting(oldest);
    return oldest;
}

static void listen_ready(void *context, uint32_t events) {
    struct kvt_attach *a = context;
    struct kvt_daemon *d = a->daemon;
    (void)events;
    for (int i = 0; i < ACCEPTS_A_TURN; i++) {
        int fd = accept4(a->listen_watch.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM)) {
            kvt_log(KVT_LOG_ERROR, "attach: %s; no connection is accepted for %d ms",
                    strerror(errno), PAUSE_MS);
            a->paused_until_ms = kvt_now_ms() + PAUSE_MS;
            kvt_loop_change(&d->loop, &a->listen_watch, 0);
            break;
        }
        if (fd < 0) {
            break;
        }
        struct kvt_greeting *g = take_greeting(a);
        g->watch = (struct kvt_watch){.ready = greeting_ready, .context = g, .fd = -1};
        if (kvt_loop_add(&d->loop, &g->watch, fd, EPOLLIN) != 0) {
            (void)close(fd);
            continue;
        }
        g->fd = fd;
        g->deadline_ms = kvt_now_ms() + GREETING_MS;
    }
    set_timer(a);
}

int kvt_attach_start(struct kvt_attach *a, struct kvt_daemon *d) {
    struct rlimit files = {0, 0};
    memset(a, 0, sizeof(*a));
    a->daemon = d;
    a->paused_until_ms = UINT64_MAX;
    for (uint32_t i = 0; i < KVT_GREETINGS_MAX; i++) {
        a->greetings[i] = (struct kvt_greeting){.attach = a, .fd = -1};
    }
    a->timer = (struct kvt_timer){.fire = timer_fired, .context = a};
    kvt_loop_add_timer(&d->loop, &a->timer);
    (void)getrlimit(RLIMIT_NOFILE, &files);
    a->fds_max = files.rlim_cur > UINT32_MAX ? UINT32_MAX : (uint32_t)files.rlim_cur;
    a->listen_watch = (struct kvt_watch){.ready = listen_ready, .context = a, .fd = -1};
    return kvt_loop_add(&d->loop, &a->listen_watch, d->runtime.attach_fd, EPOLLIN);
}

void kvt_attach_stop(struct kvt_attach *a) {
    if (a->daemon == NULL) {
        return;
    }
    kvt_loop_remove(&a->daemon->loop, &a->listen_watch);
    for (uint32_t i = 0; i < KVT_GREETINGS_MAX; i++) {
        close_greeting(&a->greetings[i]);
    }
    a->timer.deadline_ms = UINT64_MAX;
}
