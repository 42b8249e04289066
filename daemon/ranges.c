#include "daemon/ranges.h"
#include "daemon/daemon.h"
#include "daemon/log.h"
#include "daemon/units.h"
#include "tiers/engine/assert.h"

#include <stdlib.h>
#include <string.h>

#define WARN_MS 10000 /* between two warnings of one kind */

/* That the host's full queue has not taken. */
struct kvt_host_range {
    struct kvt_host_range *next;
    bool grow;
    uint64_t offset;
    uint64_t bytes;
};

/* ---- the host's threads ---------------------------------------------------------------------------- */

static int remove_from(struct kvt_tiers *t, uint32_t device_count, uint64_t offset, uint64_t bytes,
                       char *text) {
    int rc = 0;
    for (uint32_t i = 0; i < device_count; i++) {
        int one = kvt_device_host_removed(t->devices[i].device, offset, bytes, text);
        rc = rc == 0 ? one : rc;
    }
    return rc;
}

int kvt_ranges_removed(void *context, uint64_t offset, uint64_t bytes, char *text) {
    struct kvt_tiers *t = context;
    return remove_from(t, t->device_count, offset, bytes, text);
}

int kvt_ranges_added(void *context, uint64_t offset, uint64_t bytes, char *text) {
    struct kvt_tiers *t = context;
    for (uint32_t i = 0; i < t->device_count; i++) {
        int rc = kvt_device_host_added(t->devices[i].device, offset, bytes, text);
        if (rc != 0) {
            char unused[KVT_TEXT_BYTES]; /* the first reason is the one to tell */
            int undone = remove_from(t, i, offset, bytes, unused);
            (void)undone;
            return rc;
        }
    }
    return 0;
}

/* ---- the loop -------------------------------------------------------------------------------------- */

static bool ask_host(struct kvt_tiers *t, const struct kvt_host_range *r) {
    return (r->grow ? kvt_host_grow(t->host, r->offset, r->bytes)
                    : kvt_host_shrink(t->host, r->offset, r->bytes)) == 0;
}

bool kvt_ranges_retry(struct kvt_tiers *t) {
    while (t->ranges != NULL && ask_host(t, t->ranges)) {
        struct kvt_host_range *r = t->ranges;
        t->ranges = r->next;
        free(r);
    }
    return t->ranges == NULL;
}

static void ask(struct kvt_tiers *t, bool grow, uint64_t offset, uint64_t bytes) {
    struct kvt_host_range range = {.grow = grow, .offset = offset, .bytes = bytes};
    if (t->ranges == NULL && ask_host(t, &range)) {
        return;
    }
    struct kvt_host_range *r = malloc(sizeof(*r));
    KVT_ASSERT(r != NULL);
    *r = range;
    struct kvt_host_range **end = &t->ranges;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    *end = r;
    t->timer.deadline_ms = kvt_now_ms() + 1;
}

void kvt_tiers_host_grow(struct kvt_tiers *t, uint64_t offset, uint64_t bytes) {
    ask(t, true, offset, bytes);
}

void kvt_tiers_host_shrink(struct kvt_tiers *t, uint64_t offset, uint64_t bytes) {
    ask(t, false, offset, bytes);
}

/* ---- what is there from the start ------------------------------------------------------------------ */

void kvt_ranges_keep_begin(struct kvt_tiers *t) {
    struct kvt_tier_info info;
    kvt_engine_host_info(t->daemon->engine, &info);
    t->keep = (struct kvt_tiers_keep){
        .bytes = kvt_tiers_keep_bytes(t), .pending = info.keep_pending, .asked_ms = kvt_now_ms()};
}

static double gib_a_second(uint64_t bytes, uint64_t since_ms, double *seconds) {
    uint64_t ms = kvt_now_ms() - since_ms;
    *seconds = (double)(ms == 0 ? 1 : ms) / 1000;
    return (double)bytes / *seconds / (UINT64_C(1) << 30);
}

static void keep_report(struct kvt_tiers *t, uint64_t bytes) {
    const struct kvt_tiers_keep *k = &t->keep;
    char have[KVT_UNIT_TEXT_BYTES];
    char wanted[KVT_UNIT_TEXT_BYTES];
    double took;
    double since_start;
    double rate = gib_a_second(bytes, k->asked_ms, &took);
    double rate_since_start = gib_a_second(bytes, t->daemon->started_ms, &since_start);
    kvt_size_about(bytes, have);
    if (k->why[0] != '\0') {
        kvt_log(
            KVT_LOG_WARNING,
            "host memory: %s of the %s that [host] preallocate asks for are there, and no more: "
            "%s. The daemon goes on with these, and tries again when a cache needs more",
            have, kvt_size_about(k->bytes, wanted), k->why);
        return;
    }
    kvt_log(KVT_LOG_INFO,
            "host memory: %s preallocated in %.2f s, %.1f GiB/s; %.2f s after the start, "
            "%.1f GiB/s; %.0f%% in huge pages",
            have, took, rate, since_start, rate_since_start,
            bytes == 0 ? 0 : 100.0 * (double)k->huge_bytes / (double)bytes);
}

/* Said once while memory comes up at start, and otherwise now and then. */
static void grow_failed(struct kvt_tiers *t, const struct kvt_host_event *event) {
    uint64_t now_ms = kvt_now_ms();
    if (t->keep.pending) {
        if (t->keep.why[0] == '\0') {
            memcpy(t->keep.why, event->text, sizeof(t->keep.why));
        }
    } else if (t->warned_ms == 0 || now_ms - t->warned_ms >= WARN_MS) {
        t->warned_ms = now_ms;
        kvt_log(KVT_LOG_WARNING, "host memory: %s", event->text);
    }
}

static void grown(struct kvt_tiers *t, const struct kvt_host_event *event) {
    struct kvt_tier_info info;
    if (event->code != 0) {
        grow_failed(t, event);
    } else if (event->offset < t->keep.bytes) {
        t->keep.huge_bytes += event->huge_bytes;
    }
    kvt_engine_host_grown(t->daemon->engine, event->offset, event->bytes, event->code);
    kvt_engine_host_info(t->daemon->engine, &info);
    if (t->keep.pending && !info.keep_pending) {
        t->keep.pending = false;
        keep_report(t, info.kept_bytes);
    }
}

void kvt_ranges_host_event(struct kvt_tiers *t, const struct kvt_host_event *event) {
    if (event->grown) {
        grown(t, event);
        return;
    }
    if (event->code != 0) {
        kvt_log(KVT_LOG_WARNING, "host memory: %s", event->text);
    }
    kvt_engine_host_shrunk(t->daemon->engine, event->offset, event->bytes);
}

void kvt_ranges_clear(struct kvt_tiers *t) {
    while (t->ranges != NULL) {
        struct kvt_host_range *r = t->ranges;
        t->ranges = r->next;
        free(r);
    }
}
