/* The cpu driver with switches; see act_driver.h. */
#include "tests/support/act_driver.h"

#include "proto/errors.h"
#include "tiers/engine/assert.h"
#include "tiers/host/futex.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

struct kvt_act kvt_act;

static const struct kvt_driver_ops *const cpu = &kvt_cpu_driver_ops;

/* With post_behind: who is in flight, by tag. Copy thread. */
static struct {
    uint32_t kind; /* 0: nothing; 1: a copy; 2: a post */
    uint32_t stream;
    uint32_t session;
    uint32_t slot;
    uint64_t value;
    uint64_t number; /* in the order of submission */
} flights[KVT_DRIVER_TAGS_MAX];
static uint64_t flights_begun;

static void pause_us(uint32_t us) {
    struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000L};
    nanosleep(&t, NULL);
}

static int act_open(const struct kvt_driver_config *c, struct kvt_driver **out,
                    struct kvt_driver_info *info, char *text) {
    int rc = cpu->open(c, out, info, text);
    info->can_sleep = kvt_act.can_sleep;
    info->post_behind = kvt_act.post_behind;
    memset(flights, 0, sizeof(flights));
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
    int rc = cpu->copy(d, stream, c, tag);
    if (rc == 0) {
        KVT_ASSERT(flights[tag].kind == 0);
        flights[tag].kind = 1;
        flights[tag].stream = stream;
        flights[tag].number = ++flights_begun;
    }
    return rc;
}

static int act_post(struct kvt_driver *d, uint32_t stream, uint32_t session, uint32_t slot,
                    uint64_t value, uint32_t tag) {
    if (__atomic_load_n(&kvt_act.post_lost, __ATOMIC_RELAXED)) {
        return -KVT_EDEVICE;
    }
    if (!kvt_act.post_behind) {
        return cpu->post(d, stream, session, slot, value, tag);
    }
    KVT_ASSERT(flights[tag].kind == 0);
    flights[tag].kind = 2;
    flights[tag].stream = stream;
    flights[tag].session = session;
    flights[tag].slot = slot;
    flights[tag].value = value;
    flights[tag].number = ++flights_begun;
    return 0;
}

/* Whether everything that the post's stream got before it is complete. */
static bool is_due(uint32_t post) {
    for (uint32_t tag = 0; tag < KVT_DRIVER_TAGS_MAX; tag++) {
        if (flights[tag].kind != 0 && flights[tag].stream == flights[post].stream &&
            flights[tag].number < flights[post].number) {
            return false;
        }
    }
    return true;
}

static int act_poll(struct kvt_driver *d, uint32_t *tags, bool *ok, uint32_t max) {
    if (__atomic_load_n(&kvt_act.poll_lost, __ATOMIC_RELAXED)) {
        return -KVT_EDEVICE;
    }
    int count = cpu->poll(d, tags, ok, max);
    for (int i = 0; i < count; i++) {
        flights[tags[i]].kind = 0;
    }
    bool held = __atomic_load_n(&kvt_act.posts_held, __ATOMIC_ACQUIRE);
    for (uint32_t tag = 0; !held && tag < KVT_DRIVER_TAGS_MAX && count < (int)max; tag++) {
        if (flights[tag].kind == 2 && is_due(tag)) {
            ok[count] = cpu->post(d, flights[tag].stream, flights[tag].session, flights[tag].slot,
                                  flights[tag].value, tag) == 0;
            tags[count++] = tag;
            flights[tag].kind = 0;
        }
    }
    return count;
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

static int act_measure(struct kvt_driver *d, struct kvt_link *out, char *text) {
    (void)d;
    __atomic_add_fetch(&kvt_act.measured, 1, __ATOMIC_RELAXED);
    if (kvt_act.unmeasured) {
        snprintf(text, KVT_TEXT_BYTES, "no clock today");
        return -KVT_ESYS;
    }
    *out = kvt_act.link;
    return 0;
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
                                                  .wake = act_wake,
                                                  .measure = act_measure};
