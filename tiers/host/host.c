/* The host arena; see host.h.
 *
 * Threads: the loop calls; one thread of ours brings ranges up and gives them back in the order in
 * which it was asked, with helpers for large ones. The two share two bounded queues and a bell.
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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { COMMANDS_MAX = 1024, EVENTS_MAX = 64 };
#define PAGE_BYTES 4096

struct command {
    uint64_t offset;
    uint64_t bytes;
    bool grow;
};

struct kvt_host {
    struct kvt_host_config config;
    uint8_t *base;
    uint64_t reserved_bytes; /* address range: the budget, rounded up to whole huge pages */
    struct kvt_queue *commands;
    struct kvt_queue *events;
    struct kvt_bell bell; /* for the thread: a command, room for an event, or stop */
    bool stop;            /* atomic */
    bool started;
    pthread_t thread;
};

/* ---- the thread ------------------------------------------------------------------------------ */

static bool stopping(const struct kvt_host *h) {
    return __atomic_load_n(&h->stop, __ATOMIC_ACQUIRE);
}

static int grow(struct kvt_host *h, const struct command *c, char *text) {
    int rc = kvt_machine_check_available("host", c->bytes, text);
    if (rc != 0) {
        return rc;
    }
    rc = kvt_touch("host", h->base + c->offset, c->bytes, h->config.touch_threads, text);
    if (rc != 0) {
        char unused[KVT_TEXT_BYTES]; /* the first reason is the one to tell */
        int undone = kvt_untouch("host", h->base + c->offset, c->bytes, unused);
        (void)undone;
    }
    return rc;
}

static void carry_out(struct kvt_host *h, const struct command *c) {
    struct kvt_host_event e = {.grown = c->grow, .offset = c->offset, .bytes = c->bytes};
    e.code =
        c->grow ? grow(h, c, e.text) : kvt_untouch("host", h->base + c->offset, c->bytes, e.text);
    for (;;) {
        uint32_t seen = kvt_bell_rings(&h->bell);
        if (stopping(h)) {
            return;
        }
        if (kvt_queue_push(h->events, &e)) {
            break;
        }
        kvt_bell_wait(&h->bell, seen, KVT_FUTEX_FOREVER);
    }
    uint64_t one = 1;
    ssize_t written = write(h->config.notify_fd, &one, sizeof(one));
    (void)written; /* it can only fail when it is at its maximum, and then it is readable */
}

static void *run(void *argument) {
    struct kvt_host *h = argument;
    struct command c;
    while (!stopping(h)) {
        uint32_t seen = kvt_bell_rings(&h->bell);
        if (kvt_queue_pop(h->commands, &c)) {
            carry_out(h, &c);
        } else if (!stopping(h)) {
            kvt_bell_wait(&h->bell, seen, KVT_FUTEX_FOREVER);
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

int kvt_host_start(const struct kvt_host_config *c, struct kvt_host **out, char *text) {
    KVT_ASSERT(c->budget_bytes > 0);
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
    h->config = *c;
    h->config.touch_threads = c->touch_threads ? c->touch_threads : 1;
    h->reserved_bytes = (c->budget_bytes + KVT_HUGE_PAGE_BYTES - 1) & ~(KVT_HUGE_PAGE_BYTES - 1);
    rc = -KVT_ENOMEM;
    if (kvt_queue_create(sizeof(struct command), COMMANDS_MAX, &h->commands) != 0 ||
        kvt_queue_create(sizeof(struct kvt_host_event), EVENTS_MAX, &h->events) != 0) {
        goto fail;
    }
    h->base = kvt_anonymous_map("kvtier-host", h->reserved_bytes, c->huge_pages);
    if (!h->base) {
        reservation_failed(h->reserved_bytes, errno, text);
        rc = -KVT_ENOMEM;
        goto fail;
    }
    rc = kvt_thread_start("kvt-host", run, h, &h->thread);
    if (rc != 0) {
        snprintf(text, KVT_TEXT_BYTES,
                 "host: no thread could be started: raise the limit on tasks");
        goto fail;
    }
    h->started = true;
    text[0] = '\0';
    *out = h;
    return 0;

fail:
    kvt_host_stop(h);
    return rc;
}

void kvt_host_stop(struct kvt_host *h) {
    if (!h) {
        return;
    }
    if (h->started) {
        __atomic_store_n(&h->stop, true, __ATOMIC_RELEASE);
        kvt_bell_ring(&h->bell, 1);
        pthread_join(h->thread, NULL);
    }
    if (h->base) {
        munmap(h->base, h->reserved_bytes);
    }
    kvt_queue_free(h->events);
    kvt_queue_free(h->commands);
    free(h);
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
    kvt_bell_ring(&h->bell, 1);
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
    kvt_bell_ring(&h->bell, 1); /* it may wait for room */
    return true;
}
