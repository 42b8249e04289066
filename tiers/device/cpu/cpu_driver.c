/* The embedded driver: "device memory" is memory files, "DMA" is done by threads, and posts are
 * stores of the copy thread.
 *
 * Threads: as device.h says. The copy thread owns the pool's front and `bell_seen`; the control
 * thread owns the budget. They share the tables of extents, of the host arena's pages and of control
 * pages, in which an entry is used only after the event that says that it is there.
 *
 * Every place is checked here once more, after the engine: what lies outside of its extent, outside
 * of the host memory that was added, or overlaps, is refused and not copied.
 */
#include "proto/errors.h"
#include "tiers/device/counter.h"
#include "tiers/device/cpu/extents.h"
#include "tiers/device/cpu/measure.h"
#include "tiers/device/cpu/page_map.h"
#include "tiers/device/cpu/pool.h"
#include "tiers/device/device.h"
#include "tiers/engine/assert.h"
#include "tiers/host/bell.h"
#include "tiers/host/machine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SESSIONS_MAX = 65536 };
/* One of FUTEX_WAITV's words is the bell. More counters than fit are looked at now and then. */
enum { WATCHED_MAX = KVT_FUTEX_WATCH_MAX - 1, UNWATCHED_US = 200 };

struct kvt_driver {
    uint64_t budget_bytes;
    uint32_t copy_threads;
    uint8_t *host_base; /* borrowed */
    struct kvt_page_map *host_pages;
    struct kvt_extents *extents;
    struct kvt_pool *pool;
    struct kvt_copy copies[KVT_DRIVER_TAGS_MAX]; /* by tag: in flight, so that they are unpinned */
    struct kvt_bell bell;                        /* a copy is complete, or kvt_driver_ops.wake */
    uint32_t bell_seen;
    struct kvt_control_page *pages[SESSIONS_MAX]; /* atomic, borrowed */
};

/* ---- opening --------------------------------------------------------------------------------- */

static void cpu_close(struct kvt_driver *d) {
    if (!d) {
        return;
    }
    kvt_pool_free(d->pool); /* first: its threads touch the others */
    kvt_extents_free(d->extents);
    kvt_page_map_free(d->host_pages);
    free(d);
}

static int cpu_open(const struct kvt_driver_config *c, struct kvt_driver **out,
                    struct kvt_driver_info *info, char *text) {
    int rc = kvt_machine_check_budget("device cpu", "the device's budget", KVT_MACHINE_FILE,
                                      c->budget_bytes, text);
    if (rc != 0) {
        return rc;
    }
    if (c->extent_kind != 0 && c->extent_kind != KVT_EXTENT_FD) {
        snprintf(text, KVT_TEXT_BYTES, "device cpu: it hands out extents as file descriptors only");
        return -KVT_ENOTSUP;
    }
    struct kvt_driver *d = calloc(1, sizeof(*d));
    if (!d) {
        rc = -KVT_ENOMEM;
        goto fail;
    }
    d->budget_bytes = c->budget_bytes;
    d->copy_threads = c->copy_threads;
    d->host_base = c->host_base;
    rc = kvt_page_map_create(c->host_bytes, &d->host_pages);
    if (rc != 0) {
        goto fail;
    }
    rc = kvt_extents_create(c->budget_bytes, c->copy_threads ? c->copy_threads : 1, &d->extents);
    if (rc != 0) {
        goto fail;
    }
    rc = kvt_pool_create(c->copy_threads, &d->bell, &d->pool);
    if (rc != 0) {
        goto fail;
    }
    *info = (struct kvt_driver_info){.name = "cpu",
                                     .granule_bytes = KVT_CPU_PAGE_BYTES,
                                     .free_bytes = c->budget_bytes,
                                     .extent_kind = KVT_EXTENT_FD,
                                     .post_behind = false,
                                     .numa_node = -1,
                                     .can_sleep = true};
    memcpy(info->uuid, c->uuid, sizeof(info->uuid));
    *out = d;
    return 0;

fail:
    snprintf(text, KVT_TEXT_BYTES, "device cpu: %s%s", kvt_error_text(rc),
             rc == -KVT_ESYS ? ": no thread could be started; raise the limit on tasks" : "");
    cpu_close(d);
    return rc;
}

/* ---- control thread -------------------------------------------------------------------------- */

static int cpu_extent_create(struct kvt_driver *d, uint32_t extent, uint64_t bytes,
                             struct kvt_export *out, char *text) {
    int fd = -1;
    int rc = kvt_extents_add(d->extents, extent, bytes, &fd, text);
    if (rc == 0) {
        *out = (struct kvt_export){.kind = KVT_EXTENT_FD, .fd = fd};
    }
    return rc;
}

static int cpu_extent_destroy(struct kvt_driver *d, uint32_t extent, char *text) {
    return kvt_extents_remove(d->extents, extent, text);
}

static int cpu_measure(struct kvt_driver *d, struct kvt_link *out, char *text) {
    return kvt_cpu_measure(d->extents, d->budget_bytes, d->copy_threads, out, text);
}

static int host_changed(struct kvt_driver *d, uint64_t offset, uint64_t bytes, bool there,
                        char *text) {
    if (kvt_page_map_set(d->host_pages, offset, bytes, there)) {
        return 0;
    }
    snprintf(text, KVT_TEXT_BYTES,
             "device cpu: host memory at %llu, %llu bytes, is not made of pages of the arena",
             (unsigned long long)offset, (unsigned long long)bytes);
    return -KVT_EINVAL;
}

static int cpu_host_added(struct kvt_driver *d, uint64_t offset, uint64_t bytes, char *text) {
    return host_changed(d, offset, bytes, true, text);
}

static int cpu_host_removed(struct kvt_driver *d, uint64_t offset, uint64_t bytes, char *text) {
    return host_changed(d, offset, bytes, false, text);
}

static int cpu_page_added(struct kvt_driver *d, uint32_t session, struct kvt_control_page *page,
                          char *text) {
    if (session >= SESSIONS_MAX) {
        snprintf(text, KVT_TEXT_BYTES, "device cpu: session %u: there can be %d", session,
                 SESSIONS_MAX);
        return -KVT_EINVAL;
    }
    __atomic_store_n(&d->pages[session], page, __ATOMIC_RELEASE);
    return 0;
}

static void cpu_page_removed(struct kvt_driver *d, uint32_t session) {
    KVT_ASSERT(session < SESSIONS_MAX);
    __atomic_store_n(&d->pages[session], NULL, __ATOMIC_RELEASE);
}

/* ---- copy thread ----------------------------------------------------------------------------- */

/* The address of a place; NULL: it is not there. Undo: unpin. */
static uint8_t *pin(struct kvt_driver *d, const struct kvt_place *p, uint64_t bytes) {
    if (p->tier == KVT_TIER_GPU) {
        return kvt_extents_pin(d->extents, p->extent, p->offset, bytes);
    }
    if (p->tier == KVT_TIER_HOST && kvt_page_map_holds(d->host_pages, p->offset, bytes)) {
        return d->host_base + p->offset;
    }
    return NULL;
}

static void unpin(struct kvt_driver *d, const struct kvt_place *p) {
    if (p->tier == KVT_TIER_GPU) {
        kvt_extents_unpin(d->extents, p->extent);
    }
}

static int cpu_copy(struct kvt_driver *d, uint32_t stream, const struct kvt_copy *c, uint32_t tag) {
    (void)stream; /* posts come when copies are complete: post_behind is false */
    KVT_ASSERT(tag < KVT_DRIVER_TAGS_MAX);
    uint8_t *source = pin(d, &c->source, c->bytes);
    if (!source) {
        return -KVT_EINVAL;
    }
    uint8_t *target = pin(d, &c->target, c->bytes);
    if (!target) {
        goto unpin_source;
    }
    uint64_t apart = source < target ? (uint64_t)(target - source) : (uint64_t)(source - target);
    if (apart < c->bytes) {
        goto unpin_target;
    }
    d->copies[tag] = *c;
    kvt_pool_submit(d->pool, tag, target, source, c->bytes);
    return 0;

unpin_target:
    unpin(d, &c->target);
unpin_source:
    unpin(d, &c->source);
    return -KVT_EINVAL;
}

static int cpu_post(struct kvt_driver *d, uint32_t stream, uint32_t session, uint32_t slot,
                    uint64_t value, uint32_t tag) {
    (void)stream;
    (void)tag; /* done when this returns */
    KVT_ASSERT(session < SESSIONS_MAX);
    KVT_ASSERT(slot < KVT_SLOTS_MAX);
    struct kvt_control_page *page = __atomic_load_n(&d->pages[session], __ATOMIC_ACQUIRE);
    if (!page) {
        return -KVT_ESTATE;
    }
    kvt_counter_post(&page->ready[slot], value);
    return 0;
}

static int cpu_poll(struct kvt_driver *d, uint32_t *tags, bool *ok, uint32_t max) {
    uint32_t count = kvt_pool_collect(d->pool, tags, max);
    for (uint32_t i = 0; i < count; i++) {
        ok[i] = true;
        unpin(d, &d->copies[tags[i]].source);
        unpin(d, &d->copies[tags[i]].target);
    }
    return (int)count;
}

/* The worker stores `wake` and then reads `waiters`; here `waiters` is stored before the kernel (or
 * the fallback in futex.c) compares `wake`. */
static void set_waiters(const struct kvt_counter *const *counters, uint32_t count, uint32_t value) {
    for (uint32_t i = 0; i < count; i++) {
        struct kvt_counter *c = (struct kvt_counter *)(uintptr_t)counters[i];
        __atomic_store_n(&c->waiters, value, __ATOMIC_SEQ_CST);
    }
}

static void cpu_wait(struct kvt_driver *d, const struct kvt_counter *const *counters,
                     const uint32_t *seen, uint32_t count, uint32_t timeout_us) {
    struct kvt_futex_watch watches[KVT_FUTEX_WATCH_MAX];
    if (count > WATCHED_MAX) {
        count = WATCHED_MAX;
        timeout_us = timeout_us < UNWATCHED_US ? timeout_us : UNWATCHED_US;
    }
    kvt_bell_sleeps(&d->bell);
    set_waiters(counters, count, 1);
    watches[0] = (struct kvt_futex_watch){.word = &d->bell.rings, .seen = d->bell_seen};
    for (uint32_t i = 0; i < count; i++) {
        watches[1 + i] =
            (struct kvt_futex_watch){.word = &counters[i]->wake, .seen = seen[i], .shared = true};
    }
    kvt_futex_wait_any(watches, 1 + count, timeout_us);
    set_waiters(counters, count, 0);
    kvt_bell_woke(&d->bell);
    d->bell_seen = kvt_bell_rings(&d->bell); /* the caller looks at everything after this */
}

static void cpu_wake(struct kvt_driver *d) {
    kvt_bell_ring(&d->bell, 1);
}

const struct kvt_driver_ops kvt_cpu_driver_ops = {
    .abi = KVT_DRIVER_ABI,
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .extent_create = cpu_extent_create,
    .extent_destroy = cpu_extent_destroy,
    .host_added = cpu_host_added,
    .host_removed = cpu_host_removed,
    .page_added = cpu_page_added,
    .page_removed = cpu_page_removed,
    .copy = cpu_copy,
    .post = cpu_post,
    .poll = cpu_poll,
    .wait = cpu_wait,
    .wake = cpu_wake,
    .measure = cpu_measure,
};
