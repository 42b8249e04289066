#include "tests/support/fake_daemon.h"

#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <zmq.h>

static void must(bool good, const char *what) {
    if (!good) {
        perror(what);
        abort();
    }
}

void fake_sleep_ms(int ms) {
    (void)poll(NULL, 0, ms);
}

/* ---- counters --------------------------------------------------------------------------------- */

void fake_post(struct kvt_counter *c, uint64_t value) {
    __atomic_store_n(&c->value, value, __ATOMIC_SEQ_CST);
    (void)__atomic_add_fetch(&c->wake, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&c->waiters, __ATOMIC_SEQ_CST) != 0) {
        (void)syscall(SYS_futex, &c->wake, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

bool fake_await(const struct kvt_counter *c, uint64_t value, int timeout_ms) {
    for (int i = 0; i <= timeout_ms; i++) {
        if (__atomic_load_n(&c->value, __ATOMIC_SEQ_CST) == value) {
            return true;
        }
        fake_sleep_ms(1);
    }
    return false;
}

/* ---- the attach socket ------------------------------------------------------------------------ */

static void send_packet(int fd, const void *bytes, size_t size, const int *fds, int count) {
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(8 * sizeof(int))];
    } control = {.space = {0}};
    struct iovec v = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = size};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    if (count > 0) {
        m.msg_control = &control;
        m.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        struct cmsghdr *h = CMSG_FIRSTHDR(&m);
        h->cmsg_level = SOL_SOCKET;
        h->cmsg_type = SCM_RIGHTS;
        h->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
        memcpy(CMSG_DATA(h), fds, (size_t)count * sizeof(int));
    }
    (void)sendmsg(fd, &m, MSG_NOSIGNAL);
}

static int memory_file(const char *name, uint64_t bytes, void **memory) {
    int fd = memfd_create(name, MFD_CLOEXEC);
    must(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "memfd");
    *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    must(*memory != MAP_FAILED, "mmap");
    return fd;
}

static void welcome(struct fake_daemon *f) {
    void *page;
    void *ring;
    if (f->page != NULL) {
        (void)munmap(f->page, KVT_CONTROL_PAGE_BYTES);
        (void)munmap(f->ring, FAKE_RING_BYTES);
    }
    int fds[3] = {memory_file("page", KVT_CONTROL_PAGE_BYTES, &page),
                  memory_file("ring", FAKE_RING_BYTES, &ring), -1};
    fds[2] = fds[1];
    f->page = page;
    f->ring = ring;
    f->page->magic = KVT_CONTROL_PAGE_MAGIC;
    f->page->version = KVT_CONTROL_PAGE_VERSION;
    f->page->bytes = KVT_CONTROL_PAGE_BYTES;
    f->page->slots_max = KVT_SLOTS_MAX;
    f->page->boot_epoch = f->welcome.boot_epoch;
    f->page->session = f->welcome.session;
    send_packet(f->connection, &f->welcome, sizeof f->welcome, fds,
                f->hello.role == KVT_ROLE_WORKER ? f->fds_sent : 0);
    (void)close(fds[0]);
    (void)close(fds[1]);
}

static void refuse(struct fake_daemon *f) {
    struct kvt_attach_refuse r = {
        .head = {.magic = KVT_ATTACH_MAGIC, .type = KVT_ATTACH_REFUSE, .bytes = sizeof r},
        .code = f->refuse_code,
        .protocol_major = 7,
        .protocol_minor = 3,
    };
    (void)snprintf(r.text, sizeof r.text, "the fake refuses");
    send_packet(f->connection, &r, sizeof r, NULL, 0);
}

static void on_connect(struct fake_daemon *f) {
    int fd = accept4(f->listen_fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) {
        return;
    }
    (void)pthread_mutex_lock(&f->lock);
    if (f->connection >= 0) {
        (void)close(f->connection);
    }
    f->connection = fd;
    (void)pthread_mutex_unlock(&f->lock);
}

static void on_packet(struct fake_daemon *f) {
    union {
        struct kvt_attach_head head;
        struct kvt_attach_hello hello;
        struct kvt_attach_reclaim reclaim;
        uint8_t bytes[1025];
    } p;
    ssize_t n = recv(f->connection, &p, sizeof p, MSG_DONTWAIT);
    (void)pthread_mutex_lock(&f->lock);
    if (n <= 0) {
        (void)close(f->connection);
        f->connection = -1;
    } else if (p.head.type == KVT_ATTACH_HELLO && n == sizeof p.hello) {
        f->hello = p.hello;
        f->hellos++;
        if (!f->mute && f->refuse_code != 0) {
            refuse(f);
        } else if (!f->mute) {
            welcome(f);
        }
    } else if (p.head.type == KVT_ATTACH_RECLAIMED && f->reclaimed_count < 64) {
        f->reclaimed_session[f->reclaimed_count] = p.reclaim.session;
        f->reclaimed[f->reclaimed_count++] = p.reclaim.extent;
    }
    (void)pthread_mutex_unlock(&f->lock);
}

void fake_sync(struct fake_daemon *f) {
    (void)pthread_mutex_lock(&f->lock);
    (void)pthread_mutex_unlock(&f->lock);
}

void fake_send_bytes(struct fake_daemon *f, const void *bytes, size_t size) {
    (void)pthread_mutex_lock(&f->lock);
    send_packet(f->connection, bytes, size, NULL, 0);
    (void)pthread_mutex_unlock(&f->lock);
}

void fake_send_extent(struct fake_daemon *f, uint32_t id, uint64_t bytes, int fd,
                      uint32_t session) {
    struct kvt_attach_extent e = {
        .head = {.magic = KVT_ATTACH_MAGIC, .type = KVT_ATTACH_EXTENT, .bytes = sizeof e},
        .session = session,
        .extent = id,
        .kind = KVT_EXTENT_FD,
        .bytes = bytes,
    };
    (void)pthread_mutex_lock(&f->lock);
    send_packet(f->connection, &e, sizeof e, &fd, fd >= 0 ? 1 : 0);
    (void)pthread_mutex_unlock(&f->lock);
}

uint8_t *fake_extent(struct fake_daemon *f, uint32_t id, uint64_t bytes) {
    struct fake_extent *e = &f->extents[f->extent_count++];
    void *memory;
    e->fd = memory_file("extent", bytes, &memory);
    e->id = id;
    e->bytes = bytes;
    e->memory = memory;
    fake_send_extent(f, id, bytes, e->fd, f->welcome.session);
    return e->memory;
}

static void ask_back(struct fake_daemon *f, uint32_t session, uint32_t id, uint32_t flags) {
    struct kvt_attach_reclaim r = {
        .head = {.magic = KVT_ATTACH_MAGIC,
                 .type = KVT_ATTACH_RECLAIM,
                 .bytes = sizeof r,
                 .reserved = flags},
        .session = session,
        .extent = id,
    };
    fake_send_bytes(f, &r, sizeof r);
}

void fake_reclaim(struct fake_daemon *f, uint32_t session, uint32_t id) {
    ask_back(f, session, id, 0);
}

void fake_reclaim_keep(struct fake_daemon *f, uint32_t session, uint32_t id) {
    ask_back(f, session, id, KVT_RECLAIM_KEEP_ADDRESS);
}

void fake_reclaimed_forget(struct fake_daemon *f) {
    (void)pthread_mutex_lock(&f->lock);
    f->reclaimed_count = 0;
    (void)pthread_mutex_unlock(&f->lock);
}

bool fake_reclaimed(struct fake_daemon *f, uint32_t session, uint32_t id, int timeout_ms) {
    bool found = false;
    for (int ms = 0; ms <= timeout_ms && !found; ms++) {
        (void)pthread_mutex_lock(&f->lock);
        for (uint32_t i = 0; i < f->reclaimed_count; i++) {
            found |= f->reclaimed[i] == id && f->reclaimed_session[i] == session;
        }
        (void)pthread_mutex_unlock(&f->lock);
        if (!found) {
            fake_sleep_ms(1);
        }
    }
    return found;
}

void fake_hangup(struct fake_daemon *f) {
    (void)pthread_mutex_lock(&f->lock);
    if (f->connection >= 0) {
        (void)shutdown(f->connection, SHUT_RDWR);
    }
    (void)pthread_mutex_unlock(&f->lock);
}

/* ---- requests --------------------------------------------------------------------------------- */

static Kvt__Created created;
static Kvt__Schedule schedule;
static Kvt__CacheInfo info;
static Kvt__StatusReply status;
static Kvt__Cache cache_entry;
static Kvt__Cache *cache_list[1] = {&cache_entry};
static Kvt__Counters counters;

static void answer_schedule(struct fake_daemon *f, Kvt__Reply *r, uint32_t cache) {
    if (f->step_code != 0) {
        r->code = f->step_code;
        r->text = (char *)(uintptr_t) "device: 2 GiB needed, 1 GiB in the budget";
        return;
    }
    fake_post(&f->page->failed, 0);
    schedule = (Kvt__Schedule)KVT__SCHEDULE__INIT;
    schedule.cache = cache;
    schedule.first_step = f->first_step;
    schedule.steps = f->steps;
    schedule.ring_offset = f->ring_offset;
    schedule.ring_bytes = f->ring_bytes;
    schedule.lengths = f->lengths;
    schedule.n_lengths = f->length_count;
    r->body_case = KVT__REPLY__BODY_SCHEDULE;
    r->schedule = &schedule;
}

static void answer_info(struct fake_daemon *f, Kvt__Reply *r, uint32_t cache) {
    info = (Kvt__CacheInfo)KVT__CACHE_INFO__INIT;
    info.cache = cache;
    info.lengths = f->lengths;
    info.n_lengths = f->length_count;
    r->body_case = KVT__REPLY__BODY_CACHE;
    r->cache = &info;
}

/* As the engine: `failed` first; the answer when the worker has said by `step` that it stopped. */
static void answer_abort(struct fake_daemon *f, const Kvt__Request *q, Kvt__Reply *r) {
    uint64_t last = f->first_step + f->steps - 1;
    f->abort_first = q->abort->first_step;
    fake_sleep_ms(5);
    f->abort_before_step = __atomic_load_n(&f->page->step.value, __ATOMIC_SEQ_CST) >= last;
    __atomic_store_n(&f->page->failed.aux, KVT_EABORTED, __ATOMIC_SEQ_CST);
    fake_post(&f->page->failed, q->abort->first_step);
    (void)fake_await(&f->page->step, last, 2000);
    answer_info(f, r, 1);
}

static void answer_status(Kvt__Reply *r, const Kvt__Request *q) {
    status = (Kvt__StatusReply)KVT__STATUS_REPLY__INIT;
    cache_entry = (Kvt__Cache)KVT__CACHE__INIT;
    counters = (Kvt__Counters)KVT__COUNTERS__INIT;
    cache_entry.cache = 1;
    /* In parts: the first holds another session's cache of the same number. */
    cache_entry.session = q->status->offset == 0 ? q->session + 1 : q->session;
    status.next_offset = q->status->offset == 0 ? 1 : 0;
    cache_entry.rows = 3;
    cache_entry.layers.data = (uint8_t *)(uintptr_t) "RSI";
    cache_entry.layers.len = 3;
    counters.to_device_bytes = q->status->offset == 0 ? 1 : 4711;
    cache_entry.counters = &counters;
    status.n_caches = 1;
    status.caches = cache_list;
    r->body_case = KVT__REPLY__BODY_STATUS;
    r->status = &status;
}

bool fake_answer(struct fake_daemon *f, const Kvt__Request *q, Kvt__Reply *r) {
    switch (q->body_case) {
    case KVT__REQUEST__BODY_PING:
        r->body_case = KVT__REPLY__BODY_PING;
        r->ping = q->ping;
        break;
    case KVT__REQUEST__BODY_CREATE:
        created = (Kvt__Created)KVT__CREATED__INIT;
        created.cache = 1;
        r->body_case = KVT__REPLY__BODY_CREATED;
        r->created = &created;
        break;
    case KVT__REQUEST__BODY_STEP:
        f->last_rows = (uint32_t)q->step->n_rows;
        answer_schedule(f, r, q->step->cache);
        break;
    case KVT__REQUEST__BODY_ACQUIRE:
        answer_schedule(f, r, q->acquire->cache);
        break;
    case KVT__REQUEST__BODY_ABORT:
        answer_abort(f, q, r);
        break;
    case KVT__REQUEST__BODY_CLOSE:
        break;
    case KVT__REQUEST__BODY_FORK:
        answer_info(f, r, 2);
        break;
    case KVT__REQUEST__BODY_STATUS:
        answer_status(r, q);
        break;
    default:
        answer_info(f, r, 1);
        break;
    }
    return true;
}

static void reply(struct fake_daemon *f, const uint8_t *identity, size_t identity_bytes,
                  const Kvt__Reply *r) {
    uint8_t buffer[KVT_MESSAGE_BYTES_MAX];
    size_t bytes = kvt__reply__pack(r, buffer);
    if (f->reply_garbage) {
        memset(buffer, 0xff, bytes);
    }
    (void)zmq_send(f->router, identity, identity_bytes, ZMQ_SNDMORE);
    (void)zmq_send(f->router, buffer, bytes, f->reply_extra != 0 ? ZMQ_SNDMORE : 0);
    if (f->reply_extra != 0) {
        (void)zmq_send(f->router, "x", 1, 0);
    }
}

static void on_request(struct fake_daemon *f) {
    uint8_t identity[256];
    uint8_t buffer[KVT_MESSAGE_BYTES_MAX];
    int identity_bytes = zmq_recv(f->router, identity, sizeof identity, ZMQ_DONTWAIT);
    if (identity_bytes < 0) {
        return;
    }
    int bytes = zmq_recv(f->router, buffer, sizeof buffer, 0);
    Kvt__Request *q = kvt__request__unpack(NULL, (size_t)bytes, buffer);
    must(q != NULL, "a request is malformed");
    Kvt__Reply r = KVT__REPLY__INIT;
    (void)pthread_mutex_lock(&f->lock);
    f->requests++;
    f->repeats += q->sequence == f->sequence;
    f->sequence = q->sequence;
    f->last_body = q->body_case;
    r.sequence = q->sequence;
    r.boot_epoch = f->reply_epoch;
    if (q->token.len != KVT_TOKEN_BYTES ||
        memcmp(q->token.data, f->welcome.token, KVT_TOKEN_BYTES) != 0) {
        r.code = KVT_EPERM;
        reply(f, identity, (size_t)identity_bytes, &r);
    } else if (f->ignore > 0) {
        f->ignore--;
    } else if ((f->answer != NULL ? f->answer : fake_answer)(f, q, &r)) {
        reply(f, identity, (size_t)identity_bytes, &r);
    }
    (void)pthread_mutex_unlock(&f->lock);
    kvt__request__free_unpacked(q, NULL);
}

/* ---- the thread ------------------------------------------------------------------------------- */

static void *run(void *argument) {
    struct fake_daemon *f = argument;
    while (!__atomic_load_n(&f->stop, __ATOMIC_ACQUIRE)) {
        zmq_pollitem_t items[] = {{.socket = f->router, .events = ZMQ_POLLIN},
                                  {.fd = f->listen_fd, .events = ZMQ_POLLIN},
                                  {.fd = f->wake_fd, .events = ZMQ_POLLIN},
                                  {.fd = f->connection, .events = ZMQ_POLLIN}};
        (void)zmq_poll(items, f->connection >= 0 ? 4 : 3, 1000);
        if (f->connection >= 0 && items[3].revents != 0) {
            on_packet(f);
        }
        if (items[1].revents != 0) {
            on_connect(f);
        }
        if (items[0].revents != 0) {
            on_request(f);
        }
    }
    return NULL;
}

static int listen_at(const char *dir) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    (void)snprintf(a.sun_path, sizeof a.sun_path, "%.90s/attach.sock", dir);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    must(fd >= 0 && bind(fd, (struct sockaddr *)&a, sizeof a) == 0 && listen(fd, 8) == 0, "listen");
    return fd;
}

void fake_start(struct fake_daemon *f) {
    const char *tmp = getenv("TMPDIR");
    memset(f, 0, sizeof *f);
    (void)snprintf(f->dir, sizeof f->dir, "%.80s/fake.XXXXXX", tmp != NULL ? tmp : "/tmp");
    must(mkdtemp(f->dir) != NULL, f->dir);
    (void)pthread_mutex_init(&f->lock, NULL);
    f->connection = -1;
    f->fds_sent = 2;
    f->reply_epoch = FAKE_EPOCH;
    f->welcome = (struct kvt_attach_welcome){
        .head = {.magic = KVT_ATTACH_MAGIC, .type = KVT_ATTACH_WELCOME, .bytes = 352},
        .protocol_major = KVT_PROTOCOL_MAJOR,
        .boot_epoch = FAKE_EPOCH,
        .ring_bytes = FAKE_RING_BYTES,
        .session = 5,
        .block_tokens = 256,
        .control_page_bytes = KVT_CONTROL_PAGE_BYTES,
        .extent_kind = KVT_EXTENT_FD,
        .token = "fifteen bytes..",
        .server_version = "fake",
    };
    (void)snprintf(f->welcome.endpoint, sizeof f->welcome.endpoint, "ipc://%s/front.sock", f->dir);
    f->listen_fd = listen_at(f->dir);
    f->wake_fd = eventfd(0, EFD_CLOEXEC);
    f->context = zmq_ctx_new();
    f->router = zmq_socket(f->context, ZMQ_ROUTER);
    int linger = 0;
    (void)zmq_setsockopt(f->router, ZMQ_LINGER, &linger, sizeof linger);
    must(zmq_bind(f->router, f->welcome.endpoint) == 0, "zmq_bind");
    must(pthread_create(&f->thread, NULL, run, f) == 0, "pthread_create");
}

void fake_stop(struct fake_daemon *f) {
    uint64_t one = 1;
    char path[128];
    __atomic_store_n(&f->stop, true, __ATOMIC_RELEASE);
    must(write(f->wake_fd, &one, sizeof one) == sizeof one, "eventfd");
    (void)pthread_join(f->thread, NULL);
    (void)zmq_close(f->router);
    (void)zmq_ctx_term(f->context);
    (void)close(f->listen_fd);
    (void)close(f->wake_fd);
    if (f->connection >= 0) {
        (void)close(f->connection);
    }
    for (uint32_t i = 0; i < f->extent_count; i++) {
        (void)munmap(f->extents[i].memory, f->extents[i].bytes);
        (void)close(f->extents[i].fd);
    }
    if (f->page != NULL) {
        (void)munmap(f->page, KVT_CONTROL_PAGE_BYTES);
        (void)munmap(f->ring, FAKE_RING_BYTES);
    }
    (void)snprintf(path, sizeof path, "%s/attach.sock", f->dir);
    (void)unlink(path);
    (void)snprintf(path, sizeof path, "%s/front.sock", f->dir);
    (void)unlink(path);
    (void)rmdir(f->dir);
    (void)pthread_mutex_destroy(&f->lock);
}

/* ---- schedules -------------------------------------------------------------------------------- */

static uint32_t append(uint8_t *at, uint32_t *used, const void *array, size_t bytes) {
    uint32_t offset = *used;
    if (bytes > 0) {
        memcpy(at + offset, array, bytes);
    }
    *used = (uint32_t)((offset + bytes + 7) / 8 * 8);
    return offset;
}

uint32_t fake_schedule_write(const struct fake_schedule *s, uint8_t *at) {
    uint32_t used = sizeof(struct kvt_sched_header);
    struct kvt_sched_header h = {
        .magic = KVT_SCHEDULE_MAGIC,
        .version = KVT_SCHEDULE_VERSION,
        .cache = s->cache,
        .first_step = s->first_step,
        .steps_count = s->steps_count,
        .moves_count = s->moves_count,
        .moves_leading = s->moves_leading,
        .pieces_count = s->pieces_count,
        .runs_count = s->runs_count,
        .rows_count = s->rows_count,
    };
    h.steps_offset = append(at, &used, s->steps, s->steps_count * sizeof s->steps[0]);
    h.moves_offset = append(at, &used, s->moves, s->moves_count * sizeof s->moves[0]);
    h.pieces_offset = append(at, &used, s->pieces, s->pieces_count * sizeof s->pieces[0]);
    h.runs_offset = append(at, &used, s->runs, s->runs_count * sizeof s->runs[0]);
    h.rows_offset = append(at, &used, s->rows, s->rows_count * sizeof s->rows[0]);
    h.bytes = used;
    memcpy(at, &h, sizeof h);
    return used;
}

void fake_schedule(struct fake_daemon *f, const struct fake_schedule *s, uint32_t rows,
                   uint32_t length) {
    (void)pthread_mutex_lock(&f->lock);
    f->ring_offset = 64;
    f->ring_bytes = fake_schedule_write(s, f->ring + f->ring_offset);
    f->first_step = s->first_step;
    f->steps = s->steps_count;
    f->length_count = rows;
    for (uint32_t i = 0; i < rows; i++) {
        f->lengths[i] = length;
    }
    (void)pthread_mutex_unlock(&f->lock);
}
