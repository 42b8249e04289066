#include "daemon/front_link.h"
#include "daemon/log.h"
#include "proto/errors.h"
#include "tiers/engine/assert.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

#define QUEUE_BYTES_MAX (4u << 20)
#define READY_MS        5000  /* to bind, before it is given up */
#define BACKOFF_MIN_MS  50    /* doubled with each failure in a row */
#define BACKOFF_MAX_MS  1000  /* so a restart takes less than two seconds */
#define HEALTHY_MS      10000 /* alive for so long: the failures are over */
#define PACKETS_A_TURN  64    /* then others get their turn */

struct kvt_front_queued {
    struct kvt_front_queued *next;
    size_t size;
    uint8_t bytes[];
};

/* One whole packet and one byte, so that a longer one is noticed. */
static union {
    struct kvt_front_head head;
    uint8_t bytes[KVT_FRONT_PACKET_BYTES_MAX + 1];
} packet;

static void clear_queue(struct kvt_front *f) {
    while (f->queue != NULL) {
        struct kvt_front_queued *q = f->queue;
        f->queue = q->next;
        free(q);
    }
    f->queue_end = &f->queue;
    f->queue_bytes = 0;
}

static void close_pair(struct kvt_front *f) {
    kvt_loop_remove(f->loop, &f->pair_watch);
    if (f->pair_fd >= 0) {
        (void)close(f->pair_fd);
        f->pair_fd = -1;
    }
    f->ready = false;
    clear_queue(f);
}

/* ---- starting ----------------------------------------------------------------------------------- */

static int spawn(struct kvt_front *f, int child_fd, pid_t *pid) {
    char memory[32];
    char parent[32];
    (void)snprintf(memory, sizeof(memory), "%llu", (unsigned long long)f->memory_bytes);
    (void)snprintf(parent, sizeof(parent), "%ld", (long)getpid());
    const char *const arguments[] = {"kvtierd-front", "--endpoint", f->endpoint, "--memory",
                                     memory,          "--parent",   parent,      NULL};
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    sigset_t none;
    sigset_t all;
    (void)sigemptyset(&none);
    (void)sigfillset(&all);
    int error = posix_spawn_file_actions_init(&files);
    if (error != 0) {
        return error;
    }
    error = posix_spawnattr_init(&attributes);
    if (error != 0) {
        (void)posix_spawn_file_actions_destroy(&files);
        return error;
    }
    (void)posix_spawnattr_setsigmask(&attributes, &none);
    (void)posix_spawnattr_setsigdefault(&attributes, &all);
    (void)posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    (void)posix_spawn_file_actions_adddup2(&files, child_fd, KVT_FRONT_PAIR_FD);
    (void)posix_spawn_file_actions_adddup2(&files, f->listen_fd, KVT_FRONT_LISTEN_FD);
    error = posix_spawn(pid, f->program, &files, &attributes, (char *const *)arguments, environ);
    (void)posix_spawnattr_destroy(&attributes);
    (void)posix_spawn_file_actions_destroy(&files);
    return error;
}

/* dup2 onto 3 and 4 must not overwrite a source: sources lie above. */
static int above_fixed(int fd) {
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, KVT_FRONT_LISTEN_FD + 1);
    (void)close(fd);
    return moved;
}

static int start(struct kvt_front *f) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0) {
        return -KVT_ESYS;
    }
    f->pair_fd = pair[0];
    int child_fd = above_fixed(pair[1]);
    pid_t pid = 0;
    int error = child_fd < 0 ? errno : spawn(f, child_fd, &pid);
    if (child_fd >= 0) {
        (void)close(child_fd);
    }
    if (error == 0) {
        f->pid = pid;
        f->pid_fd = (int)syscall(SYS_pidfd_open, pid, 0);
        if (f->pid_fd < 0 || kvt_loop_add(f->loop, &f->pid_watch, f->pid_fd, EPOLLIN) != 0 ||
            kvt_loop_add(f->loop, &f->pair_watch, f->pair_fd, EPOLLIN) != 0) {
            error = errno;
            kvt_front_stop(f);
        }
    }
    if (error != 0) {
        close_pair(f);
        errno = error;
        return -KVT_ESYS;
    }
    f->life++;
    f->started_ms = kvt_now_ms();
    f->timer.deadline_ms = f->started_ms + READY_MS;
    return 0;
}

static void start_later(struct kvt_front *f) {
    uint64_t now_ms = kvt_now_ms();
    if (now_ms - f->started_ms >= HEALTHY_MS) {
        f->failures = 0;
    }
    uint32_t shift = f->failures < 8 ? f->failures : 8;
    uint64_t wait_ms = f->failures == 0 ? 0 : (uint64_t)BACKOFF_MIN_MS << shift;
    wait_ms = wait_ms > BACKOFF_MAX_MS ? BACKOFF_MAX_MS : wait_ms;
    f->failures++;
    f->timer.deadline_ms = now_ms + wait_ms;
}

static void timer_fired(void *context, uint64_t now_ms) {
    struct kvt_front *f = context;
    (void)now_ms;
    if (f->pid != 0) {
        if (!f->ready) {
            kvt_log(KVT_LOG_ERROR, "kvtierd-front is not ready after %d ms: starting it again",
                    READY_MS);
            (void)kill(f->pid, SIGKILL);
        }
        return;
    }
    if (start(f) != 0) {
        kvt_log(KVT_LOG_ERROR, "%s: cannot be started: %s", f->program, strerror(errno));
        start_later(f);
    }
}

/* ---- its death ---------------------------------------------------------------------------------- */

static void forget_process(struct kvt_front *f) {
    kvt_loop_remove(f->loop, &f->pid_watch);
    if (f->pid_fd >= 0) {
        (void)close(f->pid_fd);
        f->pid_fd = -1;
    }
    f->pid = 0;
    close_pair(f);
}

static void process_ended(void *context, uint32_t events) {
    struct kvt_front *f = context;
    int status = 0;
    (void)events;
    if (waitpid(f->pid, &status, WNOHANG) != f->pid) {
        return;
    }
    forget_process(f);
    if (WIFSIGNALED(status)) {
        kvt_log(KVT_LOG_WARNING, "kvtierd-front was ended by signal %d: starting it again",
                WTERMSIG(status));
    } else {
        kvt_log(KVT_LOG_WARNING, "kvtierd-front ended with status %d: starting it again",
                WEXITSTATUS(status));
    }
    start_later(f);
}

/* The process is of no use any more; process_ended follows. */
static void give_up(struct kvt_front *f, const char *why) {
    kvt_log(KVT_LOG_WARNING, "kvtierd-front: %s", why);
    (void)kill(f->pid, SIGKILL);
    close_pair(f);
}

void kvt_front_stop(struct kvt_front *f) {
    f->timer.deadline_ms = UINT64_MAX;
    if (f->pid != 0) {
        (void)kill(f->pid, SIGKILL);
        (void)waitpid(f->pid, NULL, 0);
    }
    forget_process(f);
}

/* ---- packets ------------------------------------------------------------------------------------ */

/* 1: sent; 0: later; -1: the front is gone. */
static int send_packet(struct kvt_front *f, const uint8_t *bytes, size_t size) {
    ssize_t n;
    do {
        n = send(f->pair_fd, bytes, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (n < 0 && errno == EINTR);
    if (n >= 0) {
        return 1;
    }
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS ? 0 : -1;
}

static void send_queued(struct kvt_front *f) {
    while (f->queue != NULL) {
        int rc = send_packet(f, f->queue->bytes, f->queue->size);
        if (rc < 0) {
            give_up(f, "does not take messages any more");
            return;
        }
        if (rc == 0) {
            return;
        }
        struct kvt_front_queued *q = f->queue;
        f->queue = q->next;
        f->queue_bytes -= q->size;
        free(q);
    }
    f->queue_end = &f->queue;
    kvt_loop_change(f->loop, &f->pair_watch, EPOLLIN);
}

static void queue_packet(struct kvt_front *f, const uint8_t *bytes, size_t size) {
    if (f->queue_bytes + size > QUEUE_BYTES_MAX) {
        kvt_log(KVT_LOG_DEBUG, "kvtierd-front is slow: a reply is dropped");
        return;
    }
    struct kvt_front_queued *q = malloc(sizeof(*q) + size);
    if (q == NULL) {
        return;
    }
    q->next = NULL;
    q->size = size;
    memcpy(q->bytes, bytes, size);
    if (f->queue == NULL) {
        kvt_loop_change(f->loop, &f->pair_watch, EPOLLIN | EPOLLOUT);
    }
    *f->queue_end = q;
    f->queue_end = &q->next;
    f->queue_bytes += size;
}

void kvt_front_send(struct kvt_front *f, const struct kvt_identity *to, const uint8_t *bytes,
                    size_t size) {
    static union {
        struct kvt_front_head head;
        uint8_t bytes[KVT_FRONT_PACKET_BYTES_MAX];
    } out;
    KVT_ASSERT(size >= 1);
    KVT_ASSERT(size <= KVT_MESSAGE_BYTES_MAX);
    if (f->pair_fd < 0 || !f->ready || to->life != f->life) {
        return;
    }
    memset(&out.head, 0, sizeof(out.head));
    out.head.magic = KVT_FRONT_MAGIC;
    out.head.type = KVT_FRONT_MESSAGE;
    out.head.bytes = (uint32_t)size;
    memcpy(out.head.identity, to->bytes, sizeof(to->bytes));
    memcpy(out.bytes + sizeof(out.head), bytes, size);
    size_t whole = sizeof(out.head) + size;
    int rc = f->queue == NULL ? send_packet(f, out.bytes, whole) : 0;
    if (rc == 0) {
        queue_packet(f, out.bytes, whole);
    } else if (rc < 0) {
        give_up(f, "does not take messages any more");
    }
}

static void take_packet(struct kvt_front *f, size_t size) {
    if (!kvt_front_packet_ok(&packet.head, size)) {
        give_up(f, "sent a malformed packet");
        return;
    }
    if (packet.head.type == KVT_FRONT_READY) {
        f->ready = true;
        f->timer.deadline_ms = UINT64_MAX;
        f->on_ready(f->context);
        return;
    }
    struct kvt_identity from = {.life = f->life};
    memcpy(from.bytes, packet.head.identity, sizeof(from.bytes));
    f->on_message(f->context, &from, packet.bytes + sizeof(packet.head), packet.head.bytes);
}

static void pair_ready(void *context, uint32_t events) {
    struct kvt_front *f = context;
    if ((events & EPOLLOUT) != 0) {
        send_queued(f);
    }
    for (int i = 0; i < PACKETS_A_TURN && f->pair_fd >= 0; i++) {
        ssize_t n = recv(f->pair_fd, packet.bytes, sizeof(packet.bytes), MSG_DONTWAIT);
        if (n > 0) {
            take_packet(f, (size_t)n);
        } else if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            return;
        } else {
            give_up(f, "has closed its end");
            return;
        }
    }
}

int kvt_front_start(struct kvt_front *f) {
    f->pid = 0;
    f->pid_fd = -1;
    f->pair_fd = -1;
    f->queue = NULL;
    f->queue_end = &f->queue;
    f->queue_bytes = 0;
    f->pid_watch = (struct kvt_watch){.ready = process_ended, .context = f, .fd = -1};
    f->pair_watch = (struct kvt_watch){.ready = pair_ready, .context = f, .fd = -1};
    f->timer = (struct kvt_timer){.fire = timer_fired, .context = f};
    kvt_loop_add_timer(f->loop, &f->timer);
    return start(f);
}
