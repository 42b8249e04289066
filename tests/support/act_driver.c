/* The cpu driver with switches; see act_driver.h. */
#include "tests/support/act_driver.h"

#include "proto/errors.h"
#include "tiers/engine/assert.h"
#include "tiers/host/futex.h"

#include <stdio.h>
#include <time.h>

struct kvt_act kvt_act;

static const struct kvt_driver_ops *const cpu = &kvt_cpu_driver_ops;

static void pause_us(uint32_t us) {
    struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000L};
    nanosleep(&t, NULL);
}

static int act_open(const struct kvt_driver_config *c, struct kvt_driver **out,
                    struct kvt_driver_info *info, char *text) {
    int rc = cpu->open(c, out, info, text);
    info->can_sleep = kvt_act.can_sleep;
    return rc;
}

static void act_close(struct kvt_driver *d) {
    kvt_act.closed++;
    cpu->close(d);
}

static int act_extent_create(struct kvt_driver *d, uint32_t extent, uint64_t bytes,
                             struct kvt_export *out, char *text) {
    while (__atomic_load_n(&kvt_act.hold, __ATOMIC_ACQUIRE)) {
        pause_us(100);
    }
    return cpu->extent_create(d, extent, bytes, out, text);
}

static int act_extent_destroy(struct kvt_driver *d, uint32_t extent, char *text) {
    return cpu->extent_destroy(d, extent, text);
}

static int act_host_added(struct kvt_driver *d, uint64_t offset, uint64_t bytes, char *text) {
    return cpu->host_added(d, offset, bytes, text);
}

static int act_host_removed(struct kvt_driver *d, uint64_t offset, uint64_t bytes, char *text) {
    return cpu->host_removed(d, offset, bytes, text);
}

static int act_page_added(struct kvt_driver *d, uint32_t session, struct kvt_control_page *page,
                          char *text) {
    pause_us(kvt_act.page_delay_us);
    if (kvt_act.page_refused) {
        snprintf(text, KVT_TEXT_BYTES, "no page today");
        return -KVT_EDEVICE;
    }
    __atomic_add_fetch(&kvt_act.pages, 1, __ATOMIC_RELAXED);
    return cpu->page_added(d, session, page, text);
}

static void act_page_removed(struct kvt_driver *d, uint32_t session) {
    __atomic_sub_fetch(&kvt_act.pages, 1, __ATOMIC_RELAXED);
    cpu->page_removed(d, session);
}

static int act_copy(struct kvt_driver *d, uint32_t stream, const struct kvt_copy *c, uint32_t tag) {
    if (__atomic_load_n(&kvt_act.copy_lost, __ATOMIC_RELAXED)) {
        return -KVT_EDEVICE;
    }
    if (__atomic_load_n(&kvt_act.copy_refused, __ATOMIC_RELAXED) > 0) {
        __atomic_sub_fetch(&kvt_act.copy_refused, 1, __ATOMIC_RELAXED);
        return -KVT_EINVAL;
    }
    return cpu->copy(d, stream, c, tag);
}

static int act_post(struct kvt_driver *d, uint32_t stream, uint32_t session, uint32_t slot,
                    uint64_t value) {
    return __atomic_load_n(&kvt_act.post_lost, __ATOMIC_RELAXED)
               ? -KVT_EDEVICE
               : cpu->post(d, stream, session, slot, value);
}

static int act_poll(struct kvt_driver *d, uint32_t *tags, bool *ok, uint32_t max) {
    return __atomic_load_n(&kvt_act.poll_lost, __ATOMIC_RELAXED) ? -KVT_EDEVICE
                                                                 : cpu->poll(d, tags, ok, max);
}

static void act_wait(struct kvt_driver *d, const struct kvt_counter *const *counters,
                     const uint32_t *seen, uint32_t count, uint32_t timeout_us) {
    KVT_ASSERT(kvt_act.can_sleep);
    __atomic_add_fetch(&kvt_act.waits, 1, __ATOMIC_RELAXED);
    cpu->wait(d, counters, seen, count, kvt_act.patient ? KVT_FUTEX_FOREVER : timeout_us);
}

static void act_wake(struct kvt_driver *d) {
    KVT_ASSERT(kvt_act.can_sleep);
    cpu->wake(d);
}

const struct kvt_driver_ops kvt_act_driver_ops = {.abi = KVT_DRIVER_ABI,
                                                  .name = "act",
                                                  .open = act_open,
                                                  .close = act_close,
                                                  .extent_create = act_extent_create,
                                                  .extent_destroy = act_extent_destroy,
                                                  .host_added = act_host_added,
                                                  .host_removed = act_host_removed,
                                                  .page_added = act_page_added,
                                                  .page_removed = act_page_removed,
                                                  .copy = act_copy,
                                                  .post = act_post,
                                                  .poll = act_poll,
                                                  .wait = act_wait,
                                                  .wake = act_wake};
