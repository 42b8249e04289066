/* The host arena; see host.h.
 *
 * Threads: the loop calls, and hands commands over through a bounded queue. Each of our threads takes
 * the next part of the oldest command that has one left; who finishes a command's last part reports
 * it. Measured (H100 machine, 16 CPUs): touching and registering 64 MiB of huge pages at a time in each
 * of 8 threads brings 31 GiB/s; all touched first and then registered, 19.
 *
 * Invariants: nothing behind the budget is ever touched; a range that could not be brought up
 * completely is given back, so that what is present is what was reported as grown.
 */
#include "tiers/host/host.h"

#include "proto/errors.h"
#include "tiers/engine/assert.h"
#include "tiers/host/anonymous.h"
#include "tiers/host/bell.h"
#include "tiers/host/machine.h"
#include "tiers/host/queue.h"
#include "tiers/host/thread.h"
#include "tiers/host/touch.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

enum { COMMANDS_MAX = 1024, EVENTS_MAX = 64, PARTS_MAX = 64, THREADS_AUTO_MAX = 8 };
#define PAGE_BYTES        4096
#define PAGES_A_HUGE_PAGE (KVT_HUGE_PAGE_BYTES / PAGE_BYTES)

struct command {
    uint64_t offset;
    uint64_t bytes;
    bool grow;
};

/* A command that is under way. */
struct job {
    struct command command;
    uint64_t part_bytes;
    uint32_t parts;  /* 0: a free entry */
    uint32_t handed; /* to threads; a failed job hands out no more */
    uint32_t ended;
    uint64_t up; /* a bit for each part that was brought up */
    uint64_t huge_bytes;
    int code;
    char text[KVT_TEXT_BYTES];
};

struct part {
    struct job *job;
    uint32_t index;
    uint64_t offset;
    uint64_t bytes;
    uint64_t wanted_bytes; /* by all threads just now */
};

struct kvt_host {
    struct kvt_host_config config;
    uint8_t *base;
    uint64_t reserved_bytes; /* address range: the budget, rounded up to whole huge pages */
    struct kvt_queue *commands;
    struct kvt_queue *events;
    struct kvt_bell work; /* for the threads: a command, or stop */
    struct kvt_bell room; /* for the threads: room for an event, or stop */
    bool stop;            /* atomic */
    uint32_t thread_count;
    pthread_t threads[KVT_HOST_THREADS_MAX];
    /* What the threads share, the loop not: jobs, and their ends of the queues. Held for a few
     * instructions. */
    pthread_mutex_t lock;
    struct job jobs[KVT_HOST_THREADS_MAX];
    struct job *handing; /* has parts left to hand out; NULL */
    uint64_t wanted_bytes;
};

/* ---- the threads ----------------------------------------------------------------------------- */

static bool stopping(const struct kvt_host *h) {
    return __atomic_load_n(&h->stop, __ATOMIC_ACQUIRE);
}

/* Lock held. There is a free job: each thread but this one has a part of one at most. */
static bool job_begin(struct kvt_host *h) {
    struct job *j = h->jobs;
    struct command c;
    if (!kvt_queue_pop(h->commands, &c)) {
        return false;
    }
    while (j->parts > 0) {
        j++;
    }
    KVT_ASSERT(j < h->jobs + KVT_HOST_THREADS_MAX);
    uint64_t part_bytes = (c.bytes + PARTS_MAX - 1) / PARTS_MAX;
    part_bytes = (part_bytes + KVT_HUGE_PAGE_BYTES - 1) & ~(KVT_HUGE_PAGE_BYTES - 1);
    part_bytes = part_bytes > KVT_HOST_PART_BYTES ? part_bytes : KVT_HOST_PART_BYTES;
    *j = (struct job){.command = c, .part_bytes = part_bytes, .parts = 1};
    if (c.grow) {
        j->parts = (uint32_t)((c.bytes + part_bytes - 1) / part_bytes);
    } else {
        j->part_bytes = c.bytes;
    }
    h->handing = j;
    return true;
}

static struct part part_of(struct job *j, uint32_t index) {
    uint64_t at = index * j->part_bytes;
    uint64_t left = j->command.bytes - at;
    return (struct part){.job = j,
                         .index = index,
                         .offset = j->command.offset + at,
                         .bytes = left < j->part_bytes ? left : j->part_bytes};
}

/* The next part; false: there is none. */
static bool take(struct kvt_host *h, struct part *out) {
    pthread_mutex_lock(&h->lock);
    bool taken = h->handing || job_begin(h);
    if (taken) {
        struct job *j = h->handing;
        *out = part_of(j, j->handed++);
        if (j->command.grow) {
            h->wanted_bytes += out->bytes;
        }
        out->wanted_bytes = h->wanted_bytes;
        h->handing = j->handed < j->parts ? j : NULL;
    }
    bool more = h->handing != NULL;
    pthread_mutex_unlock(&h->lock);
    if (more) {
        kvt_bell_ring(&h->work, 1);
    }
    return taken;
}

/* A fault brings a page, or a huge page, which is as good as 512. A few others may have been counted. */
static uint64_t huge_bytes_of(uint64_t pages, uint64_t faults) {
    uint64_t spared = PAGES_A_HUGE_PAGE - 1;
    return faults < pages ? (pages - faults + spared / 2) / spared * KVT_HUGE_PAGE_BYTES : 0;
}

static int touch(struct kvt_host *h, const struct part *p, uint64_t *huge_bytes, char *text) {
    struct rusage before;
    struct rusage after;
    int rc = kvt_machine_check_available("host", p->wanted_bytes, text);
    if (rc != 0) {
        return rc;
    }
    getrusage(RUSAGE_THREAD, &before);
    rc = kvt_touch("host", h->base + p->offset, p->bytes, 1, text);
    getrusage(RUSAGE_THREAD, &after);
    *huge_bytes =
        huge_bytes_of(p->bytes / PAGE_BYTES, (uint64_t)(after.ru_minflt - before.ru_minflt));
    return rc;
}

/* All of it or nothing. */
static int bring_up(struct kvt_host *h, const struct part *p, uint64_t *huge_bytes, char *text) {
    const struct kvt_host_config *c = &h->config;
    int rc = touch(h, p, huge_bytes, text);
    if (rc == 0 && c->added) {
        rc = c->added(c->context, p->offset, p->bytes, text);
    }
    if (rc != 0) {
        char unused[KVT_TEXT_BYTES]; /* the first reason is the one to tell */
        int undone = kvt_untouch("host", h->base + p->offset, p->bytes, unused);
        (void)undone;
    }
    return rc;
}

static int give_back(struct kvt_host *h, const struct part *p, char *text) {
    const struct kvt_host_config *c = &h->config;
    int rc = c->removed ? c->removed(c->context, p->offset, p->bytes, text) : 0;
    int untouched = kvt_untouch("host", h->base + p->offset, p->bytes, text);
    return rc != 0 ? rc : untouched;
}

/* Behind all of its parts: what came up of a range that could not be completed goes again. */
static void undo(struct kvt_host *h, struct job *j) {
    char unused[KVT_TEXT_BYTES];
    for (uint32_t i = 0; i < j->parts; i++) {
        struct part p = part_of(j, i);
        if ((j->up >> i & 1) != 0) {
            int undone = give_back(h, &p, unused);
            (void)undone;
        }
    }
}

static bool push(struct kvt_host *h, const struct kvt_host_event *e) {
    pthread_mutex_lock(&h->lock);
    bool pushed = kvt_queue_push(h->events, e);
    pthread_mutex_unlock(&h->lock);
    return pushed;
}

static void report(struct kvt_host *h, struct job *j) {
    struct kvt_host_event e = {.grown = j->command.grow,
                               .code = j->code,
                               .offset = j->command.offset,
                               .bytes = j->command.bytes,
                               .huge_bytes = j->huge_bytes};
    memcpy(e.text, j->text, sizeof(e.text));
    pthread_mutex_lock(&h->lock);
    j->parts = 0;
    pthread_mutex_unlock(&h->lock);
    for (;;) {
        uint32_t seen = kvt_bell_rings(&h->room);
        if (stopping(h)) {
            return;
        }
        if (push(h, &e)) {
            break;
        }
        kvt_bell_wait(&h->room, seen, KVT_FUTEX_FOREVER);
    }
    uint64_t one = 1;
    ssize_t written = write(h->config.notify_fd, &one, sizeof(one));
    (void)written; /* it can only fail when it is at its maximum, and then it is readable */
}

static void work(struct kvt_host *h, const struct part *p) {
    struct job *j = p->job;
    char text[KVT_TEXT_BYTES] = "";
    uint64_t huge_bytes = 0;
    bool grow = j->command.grow;
    int rc = grow ? bring_up(h, p, &huge_bytes, text) : give_back(h, p, text);
    pthread_mutex_lock(&h->lock);
    h->wanted_bytes -= grow ? p->bytes : 0;
    j->huge_bytes += huge_bytes;
    if (rc == 0) {
        j->up |= UINT64_C(1) << p->index;
    } else if (j->code == 0) {
        j->code = rc;
        memcpy(j->text, text, sizeof(j->text));
        h->handing = h->handing == j ? NULL : h->handing;
    }
    j->ended++;
    bool last = j->ended == j->handed && h->handing != j;
    pthread_mutex_unlock(&h->lock);
    if (last) {
        if (grow && j->code != 0) {
            undo(h, j);
        }
        report(h, j);
    }
}

static void *run(void *argument) {
    struct kvt_host *h = argument;
    struct part p;
    while (!stopping(h)) {
        uint32_t seen = kvt_bell_rings(&h->work);
        if (take(h, &p)) {
            work(h, &p);
        } else if (!stopping(h)) {
            kvt_bell_wait(&h->work, seen, KVT_FUTEX_FOREVER);
        }
    }
    return NULL;
}

/* ---- the loop's side ------------------------------------------------------------------------- */

/* Private memory counts in full as soon as it is mapped where the kernel does not overcommit. */
static void reservation_failed(uint64_t bytes, int error, char *text) {
    char size[KVT_SIZE_TEXT_BYTES];
    snprintf(text, KVT_TEXT_BYTES,
             "host: %s of private memory could not be reserved: %s; lower [host] budget, or, where "
             "vm.overcommit_memory is 2, raise vm.overcommit_ratio",
             kvt_size_text(bytes, size), strerror(error));
}

/* Half of the CPUs that we may use: the others copy, compute and serve meanwhile. */
static uint32_t threads_auto(void) {
    cpu_set_t set;
    CPU_ZERO(&set);
    uint32_t half =
        sched_getaffinity(0, sizeof(set), &set) == 0 ? (uint32_t)CPU_COUNT(&set) / 2 : 0;
    return half < 2 ? 2 : half > THREADS_AUTO_MAX ? THREADS_AUTO_MAX : half;
}

int kvt_host_start(const struct kvt_host_config *c, struct kvt_host **out, char *text) {
    KVT_ASSERT(c->budget_bytes > 0);
    KVT_ASSERT(c->threads <= KVT_HOST_THREADS_MAX);
    KVT_ASSERT(!c->added == !c->removed);
    int rc = kvt_machine_check_budget("host", "[host] budget", KVT_MACHINE_PRIVATE, c->budget_bytes,
                                      text);
    if (rc != 0) {
        return rc;
    }
    snprintf(text, KVT_TEXT_BYTES, "host: %s", kvt_error_text(KVT_ENOMEM));
    struct kvt_host *h = calloc(1, sizeof(*h));
    if (!h) {
        return -KVT_ENOMEM;
    }
    pthread_mutex_init(&h->lock, NULL);
    h->config = *c;
    h->config.threads = c->threads ? c->threads : threads_auto();
    h->reserved_bytes = (c->budget_bytes + KVT_HUGE_PAGE_BYTES - 1) & ~(KVT_HUGE_PAGE_BYTES - 1);
    rc = -KVT_ENOMEM;
    if (kvt_queue_create(sizeof(struct command), COMMANDS_MAX, &h->commands) != 0 ||
        kvt_queue_create(sizeof(struct kvt_host_event), EVENTS_MAX, &h->events) != 0) {
        goto fail;
    }
    h->base = kvt_anonymous_map("kvtier-host", h->reserved_bytes, c->huge_pages);
    if (!h->base) {
        reservation_failed(h->reserved_bytes, errno, text);
        goto fail;
    }
    while (h->thread_count < h->config.threads &&
           kvt_thread_start("kvt-host", run, h, &h->threads[h->thread_count]) == 0) {
        h->thread_count++;
    }
    if (h->thread_count == 0) { /* one is enough */
        snprintf(text, KVT_TEXT_BYTES,
                 "host: no thread could be started: raise the limit on tasks");
        rc = -KVT_ESYS;
        goto fail;
    }
    text[0] = '\0';
    *out = h;
    return 0;

fail:
    kvt_host_free(h);
    return rc;
}

void kvt_host_stop(struct kvt_host *h) {
    __atomic_store_n(&h->stop, true, __ATOMIC_RELEASE);
    kvt_bell_ring(&h->work, KVT_HOST_THREADS_MAX);
    kvt_bell_ring(&h->room, KVT_HOST_THREADS_MAX);
    while (h->thread_count > 0) {
        pthread_join(h->threads[--h->thread_count], NULL);
    }
}

void kvt_host_free(struct kvt_host *h) {
    if (!h) {
        return;
    }
    kvt_host_stop(h);
    if (h->base) {
        munmap(h->base, h->reserved_bytes);
    }
    kvt_queue_free(h->events);
    kvt_queue_free(h->commands);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

int kvt_host_prefer(struct kvt_host *h, uint64_t nodes, char *text) {
    int rc = kvt_anonymous_prefer(h->base, h->reserved_bytes, nodes);
    if (rc != 0) {
        snprintf(text, KVT_TEXT_BYTES,
                 "host: memory near the devices cannot be preferred: mbind: %s", strerror(errno));
    }
    return rc;
}

void *kvt_host_base(const struct kvt_host *h) {
    return h->base;
}

static int ask(struct kvt_host *h, bool grows, uint64_t offset, uint64_t bytes) {
    KVT_ASSERT(offset % PAGE_BYTES == 0);
    KVT_ASSERT(bytes % PAGE_BYTES == 0);
    KVT_ASSERT(bytes > 0);
    KVT_ASSERT(offset <= h->config.budget_bytes);
    KVT_ASSERT(bytes <= h->config.budget_bytes - offset);
    struct command c = {.offset = offset, .bytes = bytes, .grow = grows};
    if (!kvt_queue_push(h->commands, &c)) {
        return -KVT_EBUSY;
    }
    kvt_bell_ring(&h->work, 1);
    return 0;
}

int kvt_host_grow(struct kvt_host *h, uint64_t offset, uint64_t bytes) {
    return ask(h, true, offset, bytes);
}

int kvt_host_shrink(struct kvt_host *h, uint64_t offset, uint64_t bytes) {
    return ask(h, false, offset, bytes);
}

bool kvt_host_event(struct kvt_host *h, struct kvt_host_event *out) {
    if (!kvt_queue_pop(h->events, out)) {
        return false;
    }
    kvt_bell_ring(&h->room, 1); /* one may wait for room */
    return true;
}
