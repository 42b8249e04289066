#include "daemon/ranges.h"
#include "daemon/daemon.h"
#include "daemon/log.h"
#include "tiers/engine/assert.h"

#include <stdlib.h>
#include <string.h>

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

void kvt_ranges_host_event(struct kvt_tiers *t, const struct kvt_host_event *event) {
    if (event->code != 0) {
        kvt_log(KVT_LOG_WARNING, "host memory: %s", event->text);
    }
    if (event->grown) {
        kvt_engine_host_grown(t->daemon->engine, event->offset, event->bytes, event->code);
    } else {
        kvt_engine_host_shrunk(t->daemon->engine, event->offset, event->bytes);
    }
}

void kvt_ranges_clear(struct kvt_tiers *t) {
    while (t->ranges != NULL) {
        struct kvt_host_range *r = t->ranges;
        t->ranges = r->next;
        free(r);
    }
}
