/* Attaching: the socket, the handshake, control page and ring; and detaching, in reverse. */
#include "client/lib/client.h"
#include "client/lib/packet.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define RUNTIME_DIR        "/run/kvtierd"
#define ATTACH_TIMEOUT_MS  5000
#define REQUEST_TIMEOUT_MS 30000
#define RETRY_MS           20

static void sleep_ms(int ms) {
    (void)poll(NULL, 0, ms);
}

static int left_ms(uint64_t deadline_ns) {
    uint64_t now_ns = kvt_client_now_ns();
    return now_ns >= deadline_ns ? 0 : (int)((deadline_ns - now_ns + 999999) / 1000000);
}

/* ---- the socket ------------------------------------------------------------------------------- */

static int socket_path(struct kvt_client *c, const char *runtime_dir, struct sockaddr_un *out) {
    const char *dir = runtime_dir != NULL ? runtime_dir : getenv("KVTIER_RUNTIME_DIR");
    if (dir == NULL || dir[0] == '\0') {
        dir = RUNTIME_DIR;
    }
    memset(out, 0, sizeof *out);
    out->sun_family = AF_UNIX;
    int n = snprintf(out->sun_path, sizeof out->sun_path, "%s/attach.sock", dir);
    if (n < 0 || (size_t)n >= sizeof out->sun_path) {
        return kvt_client_fail(c, -KVT_EINVAL,
                               "attach: socket path %s/attach.sock has %d bytes; at most %zu are "
                               "possible: use a shorter runtime directory",
                               dir, n, sizeof out->sun_path - 1);
    }
    return 0;
}

static int connect_failed(struct kvt_client *c, const char *path, int error) {
    if (error == EACCES || error == EPERM) {
        return kvt_client_fail(c, -KVT_EPERM,
                               "attach: %s: permission denied for uid %u; the daemon's group may "
                               "attach",
                               path, (unsigned)geteuid());
    }
    return kvt_client_fail(c, -KVT_EGONE, "attach: %s: %s; is kvtierd running with this directory?",
                           path, strerror(error));
}

/* 0: connected; -KVT_EGONE: nobody there yet; other codes are final. */
static int connect_once(struct kvt_client *c, const struct sockaddr_un *address) {
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return kvt_client_fail(c, -KVT_ESYS, "attach: socket: %s", strerror(errno));
    }
    if (connect(fd, (const struct sockaddr *)address, sizeof *address) != 0) {
        int error = errno;
        (void)close(fd);
        return connect_failed(c, address->sun_path, error);
    }
    c->attach_fd = fd;
    return 0;
}

/* ---- handshake -------------------------------------------------------------------------------- */

static void copy_name(char *out, size_t size, const char *name) {
    (void)snprintf(out, size, "%s", name != NULL ? name : program_invocation_short_name);
}

static int say_hello(struct kvt_client *c, const struct kvt_client_options *o) {
    struct kvt_attach_hello h = {
        .head = {.magic = KVT_ATTACH_MAGIC, .type = KVT_ATTACH_HELLO, .bytes = sizeof h},
        .protocol_major = KVT_PROTOCOL_MAJOR,
        .protocol_minor = KVT_PROTOCOL_MINOR,
        .features = o->role == KVT_ROLE_WORKER ? c->device->features : KVT_FEATURES_NONE,
        .role = o->role,
        .worker_kind = o->role == KVT_ROLE_WORKER ? (uint32_t)o->worker : 0,
        .extent_kind = o->role == KVT_ROLE_WORKER ? c->device->extent_kind : 0,
    };
    memcpy(h.device, c->device_uuid, sizeof h.device);
    copy_name(h.name, sizeof h.name, o->name);
    int rc = kvt_client_packet_send(c->attach_fd, &h, sizeof h);
    return rc == 0 ? 0 : kvt_client_fail(c, -KVT_EGONE, "attach: the daemon hung up");
}

static int refused(struct kvt_client *c, struct kvt_attach_refuse *r) {
    static const char said[] = "attach: "; /* by the daemon, as it is here */
    int code = r->code >= 1 && r->code <= KVT_ESYS ? -(int)r->code : -KVT_EPROTO;
    r->text[sizeof r->text - 1] = '\0';
    const char *text = r->text;
    text += strncmp(text, said, sizeof said - 1) == 0 ? sizeof said - 1 : 0;
    if (code == -KVT_EVERSION) {
        return kvt_client_fail(
            c, code,
            "attach: refused: %s (this library speaks protocol %d.%d, the daemon "
            "%u.%u)",
            text, KVT_PROTOCOL_MAJOR, KVT_PROTOCOL_MINOR, r->protocol_major, r->protocol_minor);
    }
    return kvt_client_fail(c, code, "attach: refused: %s", text);
}

static int check_welcome(struct kvt_client *c, struct kvt_attach_welcome *w) {
    w->device_name[sizeof w->device_name - 1] = '\0';
    w->server_version[sizeof w->server_version - 1] = '\0';
    w->endpoint[sizeof w->endpoint - 1] = '\0';
    if (w->protocol_major != KVT_PROTOCOL_MAJOR) {
        return kvt_client_fail(c, -KVT_EVERSION,
                               "attach: the daemon speaks protocol %u.%u, this library %d.%d",
                               w->protocol_major, w->protocol_minor, KVT_PROTOCOL_MAJOR,
                               KVT_PROTOCOL_MINOR);
    }
    if (strncmp(w->endpoint, "ipc://", 6) != 0) {
        return kvt_client_fail(
            c, -KVT_ENOTSUP, "attach: the daemon's endpoint is %s; this library takes ipc:// only",
            w->endpoint);
    }
    c->welcome = *w;
    return 0;
}

static void *map_shared(int fd, uint64_t bytes, int protection) {
    struct stat st;
    if (fstat(fd, &st) != 0 || st.st_size < 0 || (uint64_t)st.st_size < bytes) {
        return NULL;
    }
    void *p = mmap(NULL, bytes, protection, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
        return NULL;
    }
    (void)madvise(p, bytes, MADV_DONTFORK);
    return p;
}

static int map_page_and_ring(struct kvt_client *c, const struct kvt_client_packet *p) {
    const struct kvt_attach_welcome *w = &c->welcome;
    if (p->fd_count != 2 || w->control_page_bytes != KVT_CONTROL_PAGE_BYTES || w->ring_bytes == 0) {
        return kvt_client_fail(c, -KVT_EPROTO,
                               "attach: WELCOME with %u fds, a control page of %u "
                               "bytes, a ring of %llu bytes",
                               p->fd_count, w->control_page_bytes,
                               (unsigned long long)w->ring_bytes);
    }
    c->page = map_shared(p->fds[0], w->control_page_bytes, PROT_READ | PROT_WRITE);
    c->ring = map_shared(p->fds[1], w->ring_bytes, PROT_READ);
    if (c->page == NULL || c->ring == NULL) {
        return kvt_client_fail(c, -KVT_EPROTO, "attach: control page and ring cannot be mapped: %s",
                               strerror(errno));
    }
    const struct kvt_control_page *page = c->page;
    if (page->magic != KVT_CONTROL_PAGE_MAGIC || page->version != KVT_CONTROL_PAGE_VERSION ||
        page->slots_max != KVT_SLOTS_MAX || page->boot_epoch != w->boot_epoch ||
        page->session != w->session) {
        return kvt_client_fail(c, -KVT_EPROTO, "attach: the control page is not this session's");
    }
    return 0;
}

static int on_answer(struct kvt_client *c, struct kvt_client_packet *p) {
    if (p->head.type == KVT_ATTACH_REFUSE) {
        return refused(c, &p->refuse);
    }
    if (p->head.type != KVT_ATTACH_WELCOME) {
        return kvt_client_fail(c, -KVT_EPROTO, "attach: packet of type %u instead of WELCOME",
                               p->head.type);
    }
    int rc = check_welcome(c, &p->welcome);
    return rc == 0 && c->role == KVT_ROLE_WORKER ? map_page_and_ring(c, p) : rc;
}

static int handshake(struct kvt_client *c, const struct kvt_client_options *o,
                     uint64_t deadline_ns) {
    int rc = say_hello(c, o);
    if (rc != 0) {
        return rc;
    }
    struct pollfd wait = {.fd = c->attach_fd, .events = POLLIN};
    struct kvt_client_packet p;
    while ((rc = kvt_client_packet_receive(c->attach_fd, &p)) == 0) {
        int ms = left_ms(deadline_ns);
        if (ms == 0) {
            return kvt_client_fail(c, -KVT_ETIMEDOUT,
                                   "attach: the daemon accepted the connection "
                                   "and did not answer in time");
        }
        (void)poll(&wait, 1, ms);
    }
    if (rc < 0) {
        return kvt_client_fail(c, rc,
                               rc == -KVT_EGONE ? "attach: the daemon hung up before it answered"
                                                : "attach: the daemon's answer is malformed");
    }
    rc = on_answer(c, &p);
    kvt_client_packet_close_fds(&p);
    return rc;
}

static void disconnect(struct kvt_client *c) {
    if (c->page != NULL) {
        (void)munmap(c->page, KVT_CONTROL_PAGE_BYTES);
        c->page = NULL;
    }
    if (c->ring != NULL) {
        (void)munmap((void *)(uintptr_t)c->ring, c->welcome.ring_bytes);
        c->ring = NULL;
    }
    if (c->attach_fd >= 0) {
        /* A forked child may hold the socket, too: closing alone would not be the hang-up. */
        (void)shutdown(c->attach_fd, SHUT_RDWR);
        (void)close(c->attach_fd);
        c->attach_fd = -1;
    }
}

/* Tries again while nobody is there: a daemon that restarts is back within seconds. */
static int connect_and_greet(struct kvt_client *c, const struct kvt_client_options *o) {
    struct sockaddr_un address;
    int rc = socket_path(c, o->runtime_dir, &address);
    if (rc != 0) {
        return rc;
    }
    int timeout_ms = o->timeout_ms > 0 ? o->timeout_ms : ATTACH_TIMEOUT_MS;
    uint64_t deadline_ns = kvt_client_now_ns() + (uint64_t)timeout_ms * 1000000;
    for (;;) {
        rc = connect_once(c, &address);
        if (rc == 0) {
            rc = handshake(c, o, deadline_ns);
        }
        if (rc == 0) {
            return 0;
        }
        disconnect(c);
        if (rc != -KVT_EGONE || !o->wait || left_ms(deadline_ns) == 0) {
            return rc;
        }
        sleep_ms(RETRY_MS);
    }
}

/* ---- the client ------------------------------------------------------------------------------- */

static int check_options(struct kvt_client *c, const struct kvt_client_options *o) {
    if (o->role == KVT_ROLE_WORKER && o->worker != KVT_SEGMENT && o->worker != KVT_DENSE) {
        return kvt_client_fail(c, -KVT_EINVAL,
                               "attach: worker is %d; accepted is KVT_SEGMENT (1) or KVT_DENSE (2)",
                               o->worker);
    }
    if (o->timeout_ms < 0 || o->request_timeout_ms < 0) {
        return kvt_client_fail(c, -KVT_EINVAL, "attach: a timeout is negative");
    }
    if (o->device_kind != KVT_DEVICE_CPU && o->device_kind != KVT_DEVICE_CUDA) {
        return kvt_client_fail(c, -KVT_EINVAL,
                               "attach: device_kind is %d; accepted is KVT_DEVICE_CPU (0) or "
                               "KVT_DEVICE_CUDA (1)",
                               o->device_kind);
    }
    return 0;
}

static int open_device(struct kvt_client *c, const struct kvt_client_options *o) {
    char text[KVT_TEXT_BYTES] = "";
    if (o->device != NULL) {
        memcpy(c->device_uuid, o->device, sizeof c->device_uuid);
    }
    int rc = c->device->open(o->stream, c->device_uuid, &c->gpu, text);
    return rc == 0 ? 0 : kvt_client_fail(c, rc, "attach: device %s: %s", c->device->name, text);
}

static int share_page(struct kvt_client *c) {
    char text[KVT_TEXT_BYTES] = "";
    if (c->role != KVT_ROLE_WORKER) {
        return 0;
    }
    int rc = c->device->page(c->gpu, c->page, text);
    c->extents.step = &c->page->step;
    return rc == 0 ? 0 : kvt_client_fail(c, rc, "attach: device %s: %s", c->device->name, text);
}

static int open_client(struct kvt_client *c, const struct kvt_client_options *o) {
    int rc = check_options(c, o);
    if (rc != 0) {
        return rc;
    }
    rc = open_device(c, o);
    if (rc != 0) {
        return rc;
    }
    c->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    c->gone_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->wake_fd < 0 || c->gone_fd < 0) {
        return kvt_client_fail(c, -KVT_ESYS, "attach: eventfd: %s", strerror(errno));
    }
    rc = kvt_client_extents_init(&c->extents, c->device, c->gpu);
    if (rc != 0) {
        return kvt_client_fail(c, rc, "attach: out of memory");
    }
    rc = connect_and_greet(c, o);
    if (rc == 0) {
        rc = share_page(c);
    }
    if (rc == 0) {
        rc = kvt_client_requests_open(c);
    }
    if (rc == 0) {
        rc = kvt_client_thread_start(c);
    }
    return rc;
}

/* Undoes open_client, also half of it. */
static void close_client(struct kvt_client *c) {
    kvt_client_thread_stop(c);
    kvt_client_requests_close(c);
    kvt_client_extents_free(&c->extents); /* its extents are on the device ... */
    c->device->close(c->gpu);             /* ... which has the page */
    c->gpu = NULL;
    disconnect(c);
    if (c->gone_fd >= 0) {
        (void)close(c->gone_fd);
    }
    if (c->wake_fd >= 0) {
        (void)close(c->wake_fd);
    }
    c->wake_fd = c->gone_fd = -1;
}

int kvt_client_open(const struct kvt_client_options *o, struct kvt_client **out) {
    struct kvt_client *c = calloc(1, sizeof *c);
    *out = c;
    if (c == NULL) {
        return -KVT_ENOMEM;
    }
    c->attach_fd = c->wake_fd = c->gone_fd = -1;
    kvt_client_process_init(&c->process);
    c->role = o->role;
    c->worker = o->worker;
    c->request_timeout_ms = o->request_timeout_ms > 0 ? o->request_timeout_ms : REQUEST_TIMEOUT_MS;
    c->device =
        o->device_kind == KVT_DEVICE_CUDA ? &kvt_client_device_cuda : &kvt_client_device_cpu;
    int rc = open_client(c, o);
    if (rc != 0) {
        close_client(c);
    }
    return rc;
}

int kvt_attach(const struct kvt_attach_options *o, struct kvt_client **out) {
    struct kvt_client_options options = {
        .runtime_dir = o->runtime_dir,
        .role = KVT_ROLE_WORKER,
        .worker = o->worker,
        .name = o->name,
        .device = o->device,
        .device_kind = o->device_kind,
        .stream = o->stream,
        .wait = true,
        .timeout_ms = o->timeout_ms,
        .request_timeout_ms = o->request_timeout_ms,
    };
    return kvt_client_open(&options, out);
}

void kvt_detach(struct kvt_client *c) {
    if (c == NULL) {
        return;
    }
    if (kvt_client_process_is_this(&c->process)) {
        kvt_client_leave(c);
        close_client(c);
    }
    kvt_client_step_free(&c->step);
    kvt_client_caches_free(c);
    kvt_client_process_free(&c->process);
    free(c);
}
