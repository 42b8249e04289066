#include "daemon/ranges.h"
#include "daemon/daemon.h"
#include "daemon/log.h"
#include "tiers/engine/assert.h"

#include <stdlib.h>

/* growing:   WANTED -> TOUCHING -> ADDING -> the engine hears
 *            a device cannot: ADDING -> REMOVING -> UNWANTED -> UNTOUCHING -> the engine hears why
 * shrinking: REMOVING -> UNWANTED -> UNTOUCHING -> the engine hears */
enum stage { WANTED, TOUCHING, ADDING, REMOVING, UNWANTED, UNTOUCHING };

struct kvt_host_range {
    struct kvt_host_range *next;
    enum stage stage;
    uint64_t offset;
    uint64_t bytes;
    uint32_t waiting; /* devices that have not answered */
    uint32_t added;   /* bit a device that has it */
    bool failed;      /* it grew in vain */
    int code;
};

static struct kvt_host_range *find(struct kvt_tiers *t, uint64_t offset) {
    struct kvt_host_range *r = t->ranges;
    while (r != NULL && r->offset != offset) {
        r = r->next;
    }
    KVT_ASSERT(r != NULL);
    return r;
}

static struct kvt_host_range *add(struct kvt_tiers *t, enum stage stage, uint64_t offset,
                                  uint64_t bytes) {
    struct kvt_host_range *r = calloc(1, sizeof(*r));
    KVT_ASSERT(r != NULL);
    r->stage = stage;
    r->offset = offset;
    r->bytes = bytes;
    r->next = t->ranges;
    t->ranges = r;
    return r;
}

/* The engine hears, and the range is on its way no more. */
static void finish(struct kvt_tiers *t, struct kvt_host_range *r, bool grown) {
    struct kvt_host_range **link = &t->ranges;
    struct kvt_host_range copy = *r;
    while (*link != r) {
        link = &(*link)->next;
    }
    *link = r->next;
    free(r);
    if (grown) {
        kvt_engine_host_grown(t->daemon->engine, copy.offset, copy.bytes, copy.code);
    } else {
        kvt_engine_host_shrunk(t->daemon->engine, copy.offset, copy.bytes);
    }
}

static bool ask_host(struct kvt_tiers *t, struct kvt_host_range *r) {
    if (r->stage == WANTED) {
        if (kvt_host_grow(t->host, r->offset, r->bytes) != 0) {
            return false;
        }
        r->stage = TOUCHING;
    } else if (r->stage == UNWANTED) {
        if (kvt_host_shrink(t->host, r->offset, r->bytes) != 0) {
            return false;
        }
        r->stage = UNTOUCHING;
    }
    return true;
}

bool kvt_ranges_retry(struct kvt_tiers *t) {
    bool all = true;
    for (struct kvt_host_range *r = t->ranges; r != NULL; r = r->next) {
        all = ask_host(t, r) && all;
    }
    return all;
}

static void ask_host_soon(struct kvt_tiers *t, struct kvt_host_range *r) {
    if (!ask_host(t, r)) {
        t->timer.deadline_ms = kvt_now_ms() + 1;
    }
}

static void tell_device(struct kvt_tiers *t, uint32_t device, const struct kvt_host_range *r,
                        enum kvt_device_command_kind kind) {
    struct kvt_device_command c = {.kind = kind, .offset = r->offset, .bytes = r->bytes};
    kvt_tiers_command(t, device, &c);
}

/* From every device that has it. */
static void remove_from_devices(struct kvt_tiers *t, struct kvt_host_range *r) {
    r->stage = REMOVING;
    for (uint32_t i = 0; i < t->device_count; i++) {
        if ((r->added & (UINT32_C(1) << i)) != 0) {
            r->waiting++;
        }
    }
    if (r->waiting == 0) {
        r->stage = UNWANTED;
        ask_host_soon(t, r);
        return;
    }
    for (uint32_t i = 0; i < t->device_count; i++) {
        if ((r->added & (UINT32_C(1) << i)) != 0) {
            tell_device(t, i, r, KVT_DEVICE_HOST_REMOVED);
        }
    }
}

void kvt_tiers_host_grow(struct kvt_tiers *t, uint64_t offset, uint64_t bytes) {
    ask_host_soon(t, add(t, WANTED, offset, bytes));
}

void kvt_tiers_host_shrink(struct kvt_tiers *t, uint64_t offset, uint64_t bytes) {
    struct kvt_host_range *r = add(t, REMOVING, offset, bytes);
    r->added = (UINT32_C(1) << t->device_count) - 1;
    remove_from_devices(t, r);
}

void kvt_ranges_host_event(struct kvt_tiers *t, const struct kvt_host_event *event) {
    struct kvt_host_range *r = find(t, event->offset);
    if (event->code != 0) {
        kvt_log(KVT_LOG_WARNING, "host memory: %s", event->text);
    }
    if (!event->grown) {
        finish(t, r, r->failed);
        return;
    }
    if (event->code != 0) {
        r->code = event->code;
        finish(t, r, true);
        return;
    }
    r->stage = ADDING;
    r->waiting = t->device_count;
    for (uint32_t i = 0; i < t->device_count; i++) {
        tell_device(t, i, r, KVT_DEVICE_HOST_ADDED);
    }
}

void kvt_ranges_device_ready(struct kvt_tiers *t, uint32_t device, uint64_t offset, int code,
                             const char *text) {
    struct kvt_host_range *r = find(t, offset);
    KVT_ASSERT(r->stage == ADDING);
    KVT_ASSERT(r->waiting > 0);
    r->waiting--;
    if (code == 0) {
        r->added |= UINT32_C(1) << device;
    } else {
        kvt_log(KVT_LOG_WARNING, "device %s cannot use %llu bytes of host memory: %s",
                t->daemon->config.devices[device].name, (unsigned long long)r->bytes, text);
        r->code = code;
    }
    if (r->waiting > 0) {
        return;
    }
    if (r->code == 0) {
        finish(t, r, true);
    } else {
        r->failed = true;
        remove_from_devices(t, r);
    }
}

void kvt_ranges_device_gone(struct kvt_tiers *t, uint64_t offset) {
    struct kvt_host_range *r = find(t, offset);
    KVT_ASSERT(r->stage == REMOVING);
    KVT_ASSERT(r->waiting > 0);
    r->waiting--;
    if (r->waiting == 0) {
        r->stage = UNWANTED;
        ask_host_soon(t, r);
    }
}

void kvt_ranges_clear(struct kvt_tiers *t) {
    while (t->ranges != NULL) {
        struct kvt_host_range *r = t->ranges;
        t->ranges = r->next;
        free(r);
    }
}
