#include "daemon/session.h"
#include "proto/errors.h"
#include "tiers/engine/assert.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

int kvt_sessions_init(struct kvt_sessions *t, struct kvt_daemon *d, uint32_t workers_max) {
    memset(t, 0, sizeof(*t));
    t->capacity = workers_max + KVT_CONTROL_SESSIONS_MAX;
    t->workers_max = workers_max;
    t->all = calloc(t->capacity, sizeof(*t->all));
    t->by_engine = calloc(workers_max, sizeof(*t->by_engine));
    if (t->all == NULL || t->by_engine == NULL) {
        kvt_sessions_destroy(t);
        return -KVT_ENOMEM;
    }
    for (uint32_t i = 0; i < workers_max; i++) {
        t->by_engine[i] = -1;
    }
    for (uint32_t i = 0; i < t->capacity; i++) {
        t->all[i].daemon = d;
        t->all[i].slot = i;
    }
    return 0;
}

void kvt_sessions_destroy(struct kvt_sessions *t) {
    for (uint32_t i = 0; t->all != NULL && i < t->capacity; i++) {
        if (t->all[i].phase != KVT_PHASE_FREE) {
            kvt_session_release(t, &t->all[i]);
        }
    }
    free(t->all);
    free(t->by_engine);
    memset(t, 0, sizeof(*t));
}

struct kvt_session *kvt_session_take(struct kvt_sessions *t, uint32_t role) {
    bool worker = role == KVT_ROLE_WORKER;
    if (worker ? t->workers == t->workers_max : t->controls == KVT_CONTROL_SESSIONS_MAX) {
        return NULL;
    }
    struct kvt_session *s = NULL;
    for (uint32_t i = 0; i < t->capacity; i++) {
        /* The slot that was used least: a number that has just gone does not come again soon. */
        struct kvt_session *c = &t->all[i];
        if (c->phase == KVT_PHASE_FREE && (s == NULL || c->uses < s->uses)) {
            s = c;
        }
    }
    KVT_ASSERT(s != NULL);
    if ((uint64_t)(s->uses + 1) * t->capacity > UINT32_MAX) {
        return NULL; /* numbers are unique for ever, and none is left */
    }
    struct kvt_session fresh = {
        .daemon = s->daemon,
        .phase = KVT_PHASE_OPEN,
        .slot = s->slot,
        .uses = s->uses + 1,
        .id = s->uses * t->capacity + s->slot + 1,
        .role = role,
        .engine = -1,
        .peer = {.pid_fd = -1},
        .socket_fd = -1,
        .socket_watch = {.fd = -1},
        .pid_watch = {.fd = -1},
        .attached_ms = kvt_now_ms(),
    };
    *s = fresh;
    s->out_end = &s->out;
    ssize_t n = getrandom(s->token, sizeof(s->token), 0);
    KVT_ASSERT(n == (ssize_t)sizeof(s->token));
    *(worker ? &t->workers : &t->controls) += 1;
    return s;
}

void kvt_session_release(struct kvt_sessions *t, struct kvt_session *s) {
    KVT_ASSERT(s->phase != KVT_PHASE_FREE);
    KVT_ASSERT(s->out == NULL);
    KVT_ASSERT(s->socket_watch.fd < 0);
    KVT_ASSERT(s->pid_watch.fd < 0);
    kvt_session_set_engine(t, s, -1);
    kvt_requests_clear(&s->requests);
    if (s->page != NULL) {
        (void)munmap(s->page, KVT_CONTROL_PAGE_BYTES);
        s->page = NULL;
    }
    if (s->ring != NULL) {
        (void)munmap(s->ring, s->ring_bytes);
        s->ring = NULL;
    }
    if (s->socket_fd >= 0) {
        (void)close(s->socket_fd);
        s->socket_fd = -1;
    }
    if (s->peer.pid_fd >= 0) {
        (void)close(s->peer.pid_fd);
        s->peer.pid_fd = -1;
    }
    explicit_bzero(s->token, sizeof(s->token));
    *(s->role == KVT_ROLE_WORKER ? &t->workers : &t->controls) -= 1;
    s->phase = KVT_PHASE_FREE;
}

void kvt_session_set_engine(struct kvt_sessions *t, struct kvt_session *s, int engine) {
    KVT_ASSERT(engine < (int)t->workers_max);
    if (s->engine >= 0) {
        t->by_engine[s->engine] = -1;
    }
    s->engine = engine;
    if (engine >= 0) {
        KVT_ASSERT(t->by_engine[engine] < 0);
        t->by_engine[engine] = (int)s->slot;
    }
}

struct kvt_session *kvt_session_by_id(struct kvt_sessions *t, uint32_t id) {
    if (id == 0) {
        return NULL;
    }
    struct kvt_session *s = &t->all[(id - 1) % t->capacity];
    return s->phase != KVT_PHASE_FREE && s->id == id ? s : NULL;
}

struct kvt_session *kvt_session_by_engine(struct kvt_sessions *t, uint32_t engine) {
    if (engine >= t->workers_max || t->by_engine[engine] < 0) {
        return NULL;
    }
    return &t->all[t->by_engine[engine]];
}

bool kvt_token_equal(const uint8_t *a, const uint8_t *b) {
    unsigned different = 0;
    for (int i = 0; i < KVT_TOKEN_BYTES; i++) {
        different |= (unsigned)(a[i] ^ b[i]);
    }
    return different == 0;
}

/* ---- what is shared ----------------------------------------------------------------------------- */

/* A memfd of mode 0600, mapped read-write. A memfd is 0777 otherwise: any user that gets a
 * descriptor of it could open it again for writing. */
static int make_memory(const char *name, size_t bytes, int *fd_out, void **out) {
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        return -KVT_ESYS;
    }
    if (fchmod(fd, 0600) == 0 && ftruncate(fd, (off_t)bytes) == 0) {
        void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (memory != MAP_FAILED) {
            *out = memory;
            *fd_out = fd;
            return 0;
        }
    }
    int error = errno;
    (void)close(fd);
    errno = error;
    return -KVT_ESYS;
}

static int open_read_only(int fd) {
    char path[64];
    (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return open(path, O_RDONLY | O_CLOEXEC);
}

int kvt_session_share(struct kvt_session *s, uint64_t ring_bytes, uint64_t boot_epoch,
                      int client_fds[2]) {
    int page_fd = -1;
    int ring_fd = -1;
    int ring_client_fd = -1;
    void *page = NULL;
    void *ring = NULL;
    if (make_memory("kvtier-control", KVT_CONTROL_PAGE_BYTES, &page_fd, &page) != 0 ||
        make_memory("kvtier-ring", ring_bytes, &ring_fd, &ring) != 0) {
        goto undo;
    }
    /* The daemon's own mapping is older than the seal, so it stays writable. */
    if (fcntl(page_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0 ||
        fcntl(ring_fd, F_ADD_SEALS,
              F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) != 0) {
        goto undo;
    }
    ring_client_fd = open_read_only(ring_fd);
    if (ring_client_fd < 0) {
        goto undo;
    }
    (void)close(ring_fd);
    s->page = page;
    s->page->magic = KVT_CONTROL_PAGE_MAGIC;
    s->page->version = KVT_CONTROL_PAGE_VERSION;
    s->page->bytes = KVT_CONTROL_PAGE_BYTES;
    s->page->slots_max = KVT_SLOTS_MAX;
    s->page->boot_epoch = boot_epoch;
    s->page->session = s->id;
    s->ring = ring;
    s->ring_bytes = ring_bytes;
    client_fds[0] = page_fd;
    client_fds[1] = ring_client_fd;
    return 0;
undo:;
    int error = errno;
    if (ring != NULL) {
        (void)munmap(ring, ring_bytes);
        (void)close(ring_fd);
    }
    if (page != NULL) {
        (void)munmap(page, KVT_CONTROL_PAGE_BYTES);
        (void)close(page_fd);
    }
    errno = error;
    return -KVT_ESYS;
}
