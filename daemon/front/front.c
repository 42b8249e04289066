#include "daemon/front/front.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include <zmq.h>

#define QUEUE_MESSAGES   64   /* of one peer, each direction */
#define HANDSHAKE_MS     2000 /* then a silent connection is closed */
#define BATCH            64
#define WATCH_MS         50
#define DROPS_LOGGED_MS  10000
#define AS_RESERVE_BYTES (UINT64_C(512) << 20) /* stacks and arenas of threads: not resident */

struct front {
    const struct kvt_front_options *options;
    void *context;
    void *router;
    int zmq_fd;
    bool bound;
    uint32_t fds_max;
    struct kvt_bad_peers bad;
    /* a message that the daemon has not taken yet */
    bool pending;
    struct kvt_front_head pending_head;
    zmq_msg_t pending_payload;
    uint64_t watched_ms;
    uint64_t drops_logged_ms;
    uint64_t drops;
    bool over; /* the daemon has closed its end */
    int status;
};

/* One whole packet from the daemon and one byte, so that a longer one is noticed. */
static union {
    struct kvt_front_head head;
    uint8_t bytes[KVT_FRONT_PACKET_BYTES_MAX + 1];
} incoming;

static uint64_t now_ms(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000u + (uint64_t)t.tv_nsec / 1000000u;
}

static void end(struct front *f, int status) {
    f->over = true;
    f->status = status;
}

static void dropped(struct front *f) {
    f->drops++;
    uint64_t now = now_ms();
    if (f->drops_logged_ms == 0 || now - f->drops_logged_ms >= DROPS_LOGGED_MS) {
        kvt_front_log("warning", "messages dropped so far: %llu (not one frame of at most 64 KiB)",
                      (unsigned long long)f->drops);
        f->drops_logged_ms = now;
    }
}

/* ---- from peers to the daemon ------------------------------------------------------------------ */

/* 1: sent; 0: the daemon's queue is full; -1: the daemon is gone. */
static int forward(const struct kvt_front_head *head, zmq_msg_t *payload) {
    struct iovec parts[2] = {
        {.iov_base = (void *)head, .iov_len = sizeof(*head)},
        {.iov_base = zmq_msg_data(payload), .iov_len = zmq_msg_size(payload)},
    };
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t n;
    do {
        n = sendmsg(KVT_FRONT_PAIR_FD, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (n < 0 && errno == EINTR);
    if (n >= 0) {
        return 1;
    }
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS ? 0 : -1;
}

static void forward_pending(struct front *f) {
    int rc = forward(&f->pending_head, &f->pending_payload);
    if (rc == 0) {
        return;
    }
    (void)zmq_msg_close(&f->pending_payload);
    f->pending = false;
    if (rc < 0) {
        end(f, 0);
    }
}

/* Reads and forgets what is left of a multipart message. */
static void skip_frames(struct front *f) {
    int more = 1;
    size_t size = sizeof(more);
    while (zmq_getsockopt(f->router, ZMQ_RCVMORE, &more, &size) == 0 && more != 0) {
        zmq_msg_t frame;
        (void)zmq_msg_init(&frame);
        int rc = zmq_msg_recv(&frame, f->router, ZMQ_DONTWAIT);
        (void)zmq_msg_close(&frame);
        if (rc < 0) {
            return;
        }
    }
}

/* Reads one message. true: there was one, good or not. */
static bool take_message(struct front *f) {
    zmq_msg_t identity;
    zmq_msg_t payload;
    (void)zmq_msg_init(&identity);
    if (zmq_msg_recv(&identity, f->router, ZMQ_DONTWAIT) < 0) {
        (void)zmq_msg_close(&identity);
        return false;
    }
    struct kvt_front_head head = {.magic = KVT_FRONT_MAGIC, .type = KVT_FRONT_MESSAGE};
    bool known = zmq_msg_size(&identity) == KVT_FRONT_IDENTITY_BYTES;
    if (known) {
        memcpy(head.identity, zmq_msg_data(&identity), KVT_FRONT_IDENTITY_BYTES);
    }
    bool more = zmq_msg_more(&identity) != 0;
    (void)zmq_msg_close(&identity);
    (void)zmq_msg_init(&payload);
    if (!more || zmq_msg_recv(&payload, f->router, ZMQ_DONTWAIT) < 0) {
        (void)zmq_msg_close(&payload);
        dropped(f);
        return true;
    }
    size_t bytes = zmq_msg_size(&payload);
    if (zmq_msg_more(&payload) != 0) {
        skip_frames(f);
        if (known) {
            kvt_bad_peers_add(&f->bad, head.identity);
        }
        known = false;
    }
    if (!known || bytes < 1 || bytes > KVT_MESSAGE_BYTES_MAX ||
        kvt_bad_peers_has(&f->bad, head.identity)) {
        (void)zmq_msg_close(&payload);
        dropped(f);
        return true;
    }
    head.bytes = (uint32_t)bytes;
    f->pending_head = head;
    (void)zmq_msg_init(&f->pending_payload);
    (void)zmq_msg_move(&f->pending_payload, &payload);
    (void)zmq_msg_close(&payload);
    f->pending = true;
    forward_pending(f);
    return true;
}

/* ---- from the daemon to peers ------------------------------------------------------------------ */

static bool take_reply(struct front *f) {
    ssize_t n = recv(KVT_FRONT_PAIR_FD, incoming.bytes, sizeof(incoming.bytes), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
        return false;
    }
    if (n <= 0) {
        end(f, 0);
        return false;
    }
    if (!kvt_front_packet_ok(&incoming.head, (size_t)n) ||
        incoming.head.type != KVT_FRONT_MESSAGE) {
        kvt_front_log("error", "a packet from the daemon is malformed");
        end(f, KVT_FRONT_EXIT_FAILED);
        return false;
    }
    /* A peer that has gone, or that does not read: its reply is dropped, and it asks again. */
    if (zmq_send(f->router, incoming.head.identity, KVT_FRONT_IDENTITY_BYTES,
                 ZMQ_SNDMORE | ZMQ_DONTWAIT) >= 0) {
        (void)zmq_send(f->router, incoming.bytes + sizeof(incoming.head), incoming.head.bytes,
                       ZMQ_DONTWAIT);
    }
    return true;
}

/* ---- binding, and what is watched -------------------------------------------------------------- */

static bool bind_router(struct front *f) {
    int fd = fcntl(KVT_FRONT_LISTEN_FD, F_DUPFD_CLOEXEC, KVT_FRONT_LISTEN_FD + 1);
    if (fd < 0 || zmq_setsockopt(f->router, ZMQ_USE_FD, &fd, sizeof(fd)) != 0) {
        return false;
    }
    if (zmq_bind(f->router, f->options->endpoint) != 0) {
        (void)close(fd);
        return false;
    }
    f->bound = true;
    return true;
}

static void unbind_router(struct front *f) {
    char endpoint[256];
    size_t size = sizeof(endpoint);
    if (zmq_getsockopt(f->router, ZMQ_LAST_ENDPOINT, endpoint, &size) == 0 &&
        zmq_unbind(f->router, endpoint) == 0) {
        f->bound = false;
    }
}

static void watch(struct front *f) {
    uint64_t now = now_ms();
    if (now - f->watched_ms < WATCH_MS / 2) {
        return;
    }
    f->watched_ms = now;
    uint64_t used = kvt_front_memory_used();
    if (used > f->options->memory_bytes) {
        kvt_front_log("error", "%llu MiB of memory in use, %llu MiB allowed: starting again",
                      (unsigned long long)(used >> 20),
                      (unsigned long long)(f->options->memory_bytes >> 20));
        end(f, KVT_FRONT_EXIT_MEMORY);
        return;
    }
    uint32_t fds = kvt_front_fds_used();
    if (f->bound && fds > f->fds_max / 2) {
        unbind_router(f);
        kvt_front_log("warning",
                      "%u of %u file descriptors in use: new connections wait until fewer than %u "
                      "are; raise LimitNOFILE",
                      fds, f->fds_max, f->fds_max / 8 * 3);
    } else if (!f->bound && fds < f->fds_max / 8 * 3) {
        if (bind_router(f)) {
            kvt_front_log("info", "%u file descriptors in use: accepting again", fds);
        }
    }
}

static bool set_limits(struct front *f) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0) {
        return false;
    }
    files.rlim_cur = files.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &files);
    (void)getrlimit(RLIMIT_NOFILE, &files);
    f->fds_max = files.rlim_cur > UINT32_MAX ? UINT32_MAX : (uint32_t)files.rlim_cur;
    if (f->fds_max < KVT_FRONT_FDS_MIN) {
        kvt_front_log("error", "the limit of open files is %u; at least %d are needed", f->fds_max,
                      KVT_FRONT_FDS_MIN);
        return false;
    }
    struct rlimit none = {0, 0};
    (void)setrlimit(RLIMIT_CORE, &none);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    /* A second line behind `watch`, should memory grow faster than that looks. */
    rlim_t bytes = (rlim_t)(2 * f->options->memory_bytes + AS_RESERVE_BYTES);
    struct rlimit address_space = {bytes, bytes};
    (void)setrlimit(RLIMIT_AS, &address_space);
#endif
    return true;
}

static bool open_router(struct front *f) {
    static const struct {
        int option;
        int value;
    } options[] = {
        {ZMQ_LINGER, 0},
        {ZMQ_ROUTER_MANDATORY, 1},
        {ZMQ_HANDSHAKE_IVL, HANDSHAKE_MS},
        {ZMQ_RCVHWM, QUEUE_MESSAGES},
        {ZMQ_SNDHWM, QUEUE_MESSAGES},
    };
    int64_t size_max = KVT_MESSAGE_BYTES_MAX;
    f->context = zmq_ctx_new();
    f->router = f->context == NULL ? NULL : zmq_socket(f->context, ZMQ_ROUTER);
    if (f->router == NULL ||
        zmq_setsockopt(f->router, ZMQ_MAXMSGSIZE, &size_max, sizeof(size_max)) != 0) {
        return false;
    }
    for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++) {
        if (zmq_setsockopt(f->router, options[i].option, &options[i].value, sizeof(int)) != 0) {
            return false;
        }
    }
    size_t size = sizeof(f->zmq_fd);
    return bind_router(f) && zmq_getsockopt(f->router, ZMQ_FD, &f->zmq_fd, &size) == 0;
}

/* ---- the loop ----------------------------------------------------------------------------------- */

/* ZMQ_FD is edge-triggered, and every call on the socket may swallow its edge. So replies go first
 * and messages are read until there are none: only then, or while the daemon's queue is full, is
 * the descriptor waited for. */
static void serve(struct front *f) {
    bool progress = true;
    while (progress && !f->over) {
        progress = false;
        for (int i = 0; i < BATCH && !f->over && take_reply(f); i++) {
            progress = true;
        }
        if (f->pending && !f->over) {
            forward_pending(f);
        }
        for (int i = 0; i < BATCH && !f->pending && !f->over && take_message(f); i++) {
            progress = true;
        }
    }
}

static bool say_ready(void) {
    struct kvt_front_head head = {.magic = KVT_FRONT_MAGIC, .type = KVT_FRONT_READY};
    return send(KVT_FRONT_PAIR_FD, &head, sizeof(head), MSG_NOSIGNAL) == (ssize_t)sizeof(head);
}

int kvt_front_run(const struct kvt_front_options *o) {
    struct front f = {.options = o, .zmq_fd = -1};
    if (!set_limits(&f)) {
        return KVT_FRONT_EXIT_FAILED;
    }
    if (!open_router(&f)) {
        kvt_front_log("error", "%s: cannot be served: %s", o->endpoint, zmq_strerror(zmq_errno()));
        f.status = KVT_FRONT_EXIT_FAILED;
    } else if (say_ready()) {
        while (!f.over) {
            serve(&f);
            watch(&f);
            struct pollfd fds[2] = {
                {.fd = f.pending ? -1 : f.zmq_fd, .events = POLLIN},
                {.fd = KVT_FRONT_PAIR_FD, .events = (short)(f.pending ? POLLIN | POLLOUT : POLLIN)},
            };
            if (!f.over) {
                (void)poll(fds, 2, WATCH_MS);
            }
        }
    }
    if (f.status == 0) {
        if (f.pending) {
            (void)zmq_msg_close(&f.pending_payload);
        }
        (void)zmq_close(f.router);
        (void)zmq_ctx_term(f.context);
    }
    return f.status;
}
