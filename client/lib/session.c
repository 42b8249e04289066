/* The library's own thread: it serves the attach socket of one client.
 *
 *   EXTENT    the fd goes into the extent table; it is mapped when a schedule first names it
 *   RECLAIM   unmapped and acknowledged, at once or when the step that uses it has ended; also for
 *             a former session of this process. Its addresses are kept if that is asked for
 *   hang-up   the session is over: every counter of the control page is poisoned, again and again
 *             as long as something enqueued may wait for one or overwrite one
 */
#include "client/lib/client.h"
#include "client/lib/packet.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define FOREIGN_MAX      64
#define FOREIGN_RETRY_MS 50
#define POISON_AGAIN_MS  10
#define STOP_SEND_MS     1000
#define DRAIN_RETRY_MS   2

/* The clients of this process, so that a RECLAIM for a former session finds what still maps it. */
static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static struct kvt_client *registry;

struct foreign {
    uint32_t session;
    uint32_t extent;
};

struct server {
    struct kvt_client *client;
    struct foreign foreign[FOREIGN_MAX]; /* wanted back, still used by an open step there */
    uint32_t foreign_count;
};

static bool is_stopping(struct kvt_client *c) {
    return __atomic_load_n(&c->stopping, __ATOMIC_ACQUIRE) != 0;
}

static bool is_interrupted(struct kvt_client *c) {
    return __atomic_load_n(&c->interrupted, __ATOMIC_ACQUIRE) != 0;
}

static void signal_fd(int fd) {
    uint64_t one = 1;
    ssize_t n = write(fd, &one, sizeof one);
    (void)n; /* a full eventfd is signalled already */
}

void kvt_client_thread_wake(struct kvt_client *c) {
    signal_fd(c->wake_fd);
}

void kvt_client_set_gone(struct kvt_client *c, enum kvt_client_gone reason) {
    uint32_t none = KVT_GONE_NOT;
    if (!__atomic_compare_exchange_n(&c->gone, &none, (uint32_t)reason, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE)) {
        return;
    }
    (void)shutdown(c->attach_fd, SHUT_RDWR);
    signal_fd(c->gone_fd);
    kvt_client_extents_close(&c->extents);
    if (c->page != NULL) {
        kvt_client_page_poison(c->page);
    }
}

/* Nothing here may take a lock: a signal handler calls it. The library's thread does the rest. */
void kvt_interrupt(struct kvt_client *c) {
    int saved = errno;
    if (c != NULL && kvt_client_process_is_this(&c->process)) {
        __atomic_store_n(&c->interrupted, 1, __ATOMIC_RELEASE);
        (void)shutdown(c->attach_fd, SHUT_RDWR);
    }
    errno = saved;
}

/* ---- reclaim ---------------------------------------------------------------------------------- */

/* Waits for room, unless the client is being detached. */
static void acknowledge(struct kvt_client *c, uint32_t session, uint32_t extent) {
    struct kvt_attach_reclaim r = {
        .head = {.magic = KVT_ATTACH_MAGIC, .type = KVT_ATTACH_RECLAIMED, .bytes = sizeof r},
        .session = session,
        .extent = extent,
    };
    struct pollfd p = {.fd = c->attach_fd, .events = POLLOUT};
    while (kvt_client_packet_send(c->attach_fd, &r, sizeof r) == -KVT_EBUSY && !is_stopping(c)) {
        (void)poll(&p, 1, FOREIGN_RETRY_MS);
    }
}

/* Whether nothing of this process maps that extent of a former session any more. */
static bool reclaim_foreign(struct kvt_client *c, uint32_t session, uint32_t extent) {
    bool free_now = true;
    (void)pthread_mutex_lock(&registry_lock);
    for (struct kvt_client *o = registry; o != NULL; o = o->next) {
        if (o != c && o->welcome.session == session &&
            o->welcome.boot_epoch == c->welcome.boot_epoch) {
            free_now = kvt_client_extents_reclaim(&o->extents, extent, false);
        }
    }
    (void)pthread_mutex_unlock(&registry_lock);
    return free_now;
}

static void on_reclaim(struct server *s, const struct kvt_attach_reclaim *r) {
    struct kvt_client *c = s->client;
    bool own = r->session == c->welcome.session;
    bool keep = (r->head.reserved & KVT_RECLAIM_KEEP_ADDRESS) != 0;
    bool free_now = own ? kvt_client_extents_reclaim(&c->extents, r->extent, keep)
                        : reclaim_foreign(c, r->session, r->extent);
    if (free_now) {
        acknowledge(c, r->session, r->extent);
    } else if (!own && s->foreign_count < FOREIGN_MAX) {
        s->foreign[s->foreign_count++] = (struct foreign){r->session, r->extent};
    }
}

static void look_around(struct server *s) {
    struct kvt_client *c = s->client;
    uint64_t ignored;
    ssize_t n = read(c->wake_fd, &ignored, sizeof ignored);
    (void)n;
    uint32_t extent;
    while (kvt_client_extents_reclaimable(&c->extents, &extent)) {
        acknowledge(c, c->welcome.session, extent);
    }
    for (uint32_t i = 0; i < s->foreign_count;) {
        if (reclaim_foreign(c, s->foreign[i].session, s->foreign[i].extent)) {
            acknowledge(c, s->foreign[i].session, s->foreign[i].extent);
            s->foreign[i] = s->foreign[--s->foreign_count];
        } else {
            i++;
        }
    }
}

/* ---- packets ---------------------------------------------------------------------------------- */

static int on_extent(struct kvt_client *c, struct kvt_client_packet *p) {
    const struct kvt_attach_extent *e = &p->extent;
    struct kvt_client_import import = {.kind = e->kind, .fd = -1, .bytes = e->bytes};
    memcpy(import.handle, e->handle, sizeof import.handle);
    if (e->session != c->welcome.session || e->bytes == 0 || e->bytes >= UINT64_C(1) << 48 ||
        p->fd_count != (e->kind == KVT_EXTENT_FD ? 1 : 0)) {
        return -KVT_EPROTO;
    }
    if (p->fd_count == 1) {
        import.fd = p->fds[0];
        p->fd_count = 0; /* handed over */
    }
    return kvt_client_extents_add(&c->extents, e->extent, &import);
}

/* 1: go on; 0: nothing more now; negative: the session is over. */
static int serve_packet(struct server *s) {
    struct kvt_client_packet p;
    int rc = kvt_client_packet_receive(s->client->attach_fd, &p);
    if (rc != 1) {
        return rc;
    }
    if (p.head.type == KVT_ATTACH_EXTENT) {
        rc = on_extent(s->client, &p) == 0 ? 1 : -KVT_EPROTO;
    } else if (p.head.type == KVT_ATTACH_RECLAIM && p.fd_count == 0) {
        on_reclaim(s, &p.reclaim);
    } else {
        rc = -KVT_EPROTO;
    }
    kvt_client_packet_close_fds(&p);
    return rc;
}

static int serve(struct server *s) {
    struct kvt_client *c = s->client;
    struct pollfd fds[2] = {{.fd = c->attach_fd, .events = POLLIN},
                            {.fd = c->wake_fd, .events = POLLIN}};
    int wait_ms = s->foreign_count > 0 ? FOREIGN_RETRY_MS : -1;
    int n = poll(fds, 2, kvt_client_extents_draining(&c->extents) ? DRAIN_RETRY_MS : wait_ms);
    if (n < 0 && errno != EINTR) {
        return -KVT_EGONE;
    }
    int rc = 1;
    while (rc == 1 && !is_stopping(c)) {
        rc = serve_packet(s);
    }
    look_around(s);
    return rc < 0 ? rc : 0;
}

static void *run(void *argument) {
    struct server s = {.client = argument};
    struct kvt_client *c = s.client;
    while (!is_stopping(c) && !kvt_client_is_gone(c)) {
        int rc = serve(&s);
        if (rc < 0) {
            kvt_client_set_gone(c, rc == -KVT_EPROTO   ? KVT_GONE_PROTOCOL
                                   : is_interrupted(c) ? KVT_GONE_INTERRUPTED
                                                       : KVT_GONE_HANGUP);
        }
    }
    struct pollfd wake = {.fd = c->wake_fd, .events = POLLIN};
    while (!is_stopping(c)) {
        /* Requests to unmap still reach this process through a later session. */
        bool busy = c->device->busy(c->gpu) || kvt_client_extents_draining(&c->extents);
        (void)poll(&wake, 1, busy ? POISON_AGAIN_MS : -1);
        look_around(&s);
        if (c->page != NULL) {
            kvt_client_page_poison(c->page);
        }
    }
    return NULL;
}

/* ---- start and stop --------------------------------------------------------------------------- */

int kvt_client_thread_start(struct kvt_client *c) {
    sigset_t all;
    sigset_t before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&c->thread, NULL, run, c);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0) {
        return kvt_client_fail(c, -KVT_ESYS, "attach: the library's thread: %s", strerror(rc));
    }
    (void)pthread_setname_np(c->thread, "kvtier");
    c->thread_runs = true;
    (void)pthread_mutex_lock(&registry_lock);
    c->next = registry;
    registry = c;
    (void)pthread_mutex_unlock(&registry_lock);
    return 0;
}

static void unregister(struct kvt_client *c) {
    (void)pthread_mutex_lock(&registry_lock);
    for (struct kvt_client **p = &registry; *p != NULL; p = &(*p)->next) {
        if (*p == c) {
            *p = c->next;
            break;
        }
    }
    (void)pthread_mutex_unlock(&registry_lock);
}

/* The process lives on, so the daemon cannot tell by its death that the memory is free. */
static void give_back_all(struct kvt_client *c) {
    struct kvt_attach_reclaim r = {
        .head = {.magic = KVT_ATTACH_MAGIC, .type = KVT_ATTACH_RECLAIMED, .bytes = sizeof r},
        .session = c->welcome.session,
    };
    uint64_t end_ns = kvt_client_now_ns() + STOP_SEND_MS * UINT64_C(1000000);
    struct server s = {.client = c};
    while (!kvt_client_is_gone(c) && serve_packet(&s) == 1) {
        /* extents that came since the thread ended are given back too */
    }
    struct pollfd p = {.fd = c->attach_fd, .events = POLLOUT};
    while (kvt_client_extents_take(&c->extents, &r.extent)) {
        while (!kvt_client_is_gone(c) &&
               kvt_client_packet_send(c->attach_fd, &r, sizeof r) == -KVT_EBUSY &&
               kvt_client_now_ns() < end_ns) {
            (void)poll(&p, 1, FOREIGN_RETRY_MS);
        }
    }
}

void kvt_client_thread_stop(struct kvt_client *c) {
    if (!c->thread_runs) {
        return;
    }
    /* What is unmapped may still be in use on the device; while the daemon is dead, the thread's
     * poison is what ends the waits there. */
    c->device->drain(c->gpu);
    __atomic_store_n(&c->stopping, 1, __ATOMIC_RELEASE);
    kvt_client_thread_wake(c);
    (void)pthread_join(c->thread, NULL);
    c->thread_runs = false;
    unregister(c);
    give_back_all(c);
}
