/* Starting devices and host memory, and their queues. Events are carried to the engine here. */
#include "daemon/tiers.h"
#include "daemon/daemon.h"
#include "daemon/log.h"
#include "daemon/ranges.h"
#include "daemon/units.h"
#include "tiers/engine/assert.h"
#include "tiers/host/machine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define EVENTS_A_TURN 256
#define RETRY_MS      1 /* a full queue is tried again */
#define HUGE_BYTES    (UINT64_C(2) << 20)

struct kvt_queued_command {
    struct kvt_queued_command *next;
    struct kvt_device_command command;
};

/* ---- commands ------------------------------------------------------------------------------------- */

static bool flush(struct kvt_tier_device *d) {
    while (d->queue != NULL) {
        if (kvt_device_command(d->device, &d->queue->command) != 0) {
            return false;
        }
        struct kvt_queued_command *q = d->queue;
        d->queue = q->next;
        free(q);
    }
    d->queue_end = &d->queue;
    return true;
}

void kvt_tiers_command(struct kvt_tiers *t, uint32_t device, const struct kvt_device_command *c) {
    KVT_ASSERT(device < t->device_count);
    struct kvt_tier_device *d = &t->devices[device];
    if (d->queue == NULL && kvt_device_command(d->device, c) == 0) {
        return;
    }
    struct kvt_queued_command *q = malloc(sizeof(*q));
    KVT_ASSERT(q != NULL); /* a command that is lost would be a copy that is never done */
    q->next = NULL;
    q->command = *c;
    *d->queue_end = q;
    d->queue_end = &q->next;
    t->timer.deadline_ms = kvt_now_ms() + RETRY_MS;
}

/* ---- extents -------------------------------------------------------------------------------------- */

static struct kvt_extent_entry **entry_of(struct kvt_tiers *t, uint32_t extent) {
    return &t->extents[extent & (KVT_EXTENT_ENTRIES - 1)];
}

struct kvt_extent_entry *kvt_tiers_extent(struct kvt_tiers *t, uint32_t extent) {
    struct kvt_extent_entry *e = *entry_of(t, extent);
    return e != NULL && e->id == extent ? e : NULL;
}

void kvt_tiers_extent_expect(struct kvt_tiers *t, uint32_t extent, uint32_t session,
                             uint64_t bytes) {
    struct kvt_extent_entry **place = entry_of(t, extent);
    KVT_ASSERT(*place == NULL);
    struct kvt_extent_entry *e = calloc(1, sizeof(*e));
    KVT_ASSERT(e != NULL);
    e->id = extent;
    e->session = session;
    e->bytes = bytes;
    e->exported.fd = -1;
    *place = e;
}

void kvt_tiers_extent_forget(struct kvt_tiers *t, uint32_t extent) {
    struct kvt_extent_entry *e = kvt_tiers_extent(t, extent);
    KVT_ASSERT(e != NULL);
    if (e->exported.fd >= 0) {
        (void)close(e->exported.fd);
    }
    struct kvt_session *s = e->out ? kvt_session_by_id(&t->daemon->sessions, e->session) : NULL;
    *entry_of(t, extent) = NULL;
    free(e);
    if (s != NULL) {
        kvt_session_extent_back(s);
    }
}

static void extent_created(struct kvt_tiers *t, struct kvt_device_event *event) {
    struct kvt_extent_entry *e = kvt_tiers_extent(t, event->extent);
    KVT_ASSERT(e != NULL);
    if (event->code == 0) {
        e->exported = event->exported;
    } else {
        kvt_log(KVT_LOG_WARNING, "device: an extent of %llu bytes cannot be had: %s",
                (unsigned long long)e->bytes, event->text);
        kvt_tiers_extent_forget(t, event->extent);
    }
    kvt_engine_extent_created(t->daemon->engine, event->extent, event->code);
}

/* ---- events ---------------------------------------------------------------------------------------- */

static void measured(const char *name, const struct kvt_device_event *e) {
    char to[KVT_UNIT_TEXT_BYTES];
    char from[KVT_UNIT_TEXT_BYTES];
    if (e->code != 0) {
        kvt_log(KVT_LOG_WARNING,
                "device %s: its link cannot be measured, so plans have no ceiling before large "
                "copies were made: %s",
                name, e->text);
    } else if (e->link.to_bytes_per_s != 0) {
        kvt_log(KVT_LOG_INFO, "device %s: link measured: %s/s to it, %s/s from it", name,
                kvt_size_about(e->link.to_bytes_per_s, to),
                kvt_size_about(e->link.from_bytes_per_s, from));
    }
}

static void device_event(struct kvt_tier_device *d, struct kvt_device_event *event) {
    struct kvt_daemon *daemon = d->daemon;
    struct kvt_tiers *t = &daemon->tiers;
    switch (event->kind) {
    case KVT_DEVICE_COMPLETION:
        kvt_engine_completion(daemon->engine, &event->completion);
        break;
    case KVT_DEVICE_DRAINED:
        KVT_ASSERT(t->sessions_draining > 0);
        t->sessions_draining--;
        kvt_engine_session_drained(daemon->engine, event->session);
        break;
    case KVT_DEVICE_EXTENT_CREATED:
        extent_created(t, event);
        break;
    case KVT_DEVICE_EXTENT_DESTROYED:
        if (event->code != 0) {
            kvt_log(KVT_LOG_WARNING, "device %s: an extent was not destroyed cleanly: %s",
                    daemon->config.devices[d->index].name, event->text);
        }
        kvt_engine_extent_destroyed(daemon->engine, event->extent);
        break;
    case KVT_DEVICE_LOST:
        kvt_log(KVT_LOG_ERROR,
                "device %s is lost: %s; the daemon stops and has to be started again",
                daemon->config.devices[d->index].name, event->text);
        kvt_engine_device_lost(daemon->engine, d->index);
        kvt_daemon_pump(daemon);
        kvt_daemon_stop(daemon, KVT_EXIT_DEVICE);
        break;
    case KVT_DEVICE_SESSION_FAILED: {
        struct kvt_session *s = kvt_session_by_engine(&daemon->sessions, event->session);
        kvt_log(KVT_LOG_ERROR, "device %s: a worker's control page cannot be used: %s",
                daemon->config.devices[d->index].name, event->text);
        if (s != NULL && s->phase == KVT_PHASE_OPEN) { /* it may have hung up meanwhile */
            kvt_session_hangup_later(s, "the device cannot use its control page");
        }
        break;
    }
    case KVT_DEVICE_MEASURED:
        measured(daemon->config.devices[d->index].name, event);
        break;
    default:
        KVT_ASSERT(false);
    }
    kvt_daemon_pump(daemon);
}

static void take_events(struct kvt_tiers *t) {
    bool more = false;
    for (uint32_t i = 0; i < t->device_count; i++) {
        struct kvt_device_event event;
        int taken = 0;
        while (taken < EVENTS_A_TURN && kvt_device_event(t->devices[i].device, &event)) {
            device_event(&t->devices[i], &event);
            taken++;
        }
        more = more || taken == EVENTS_A_TURN;
    }
    struct kvt_host_event event;
    for (int i = 0; i < EVENTS_A_TURN && kvt_host_event(t->host, &event); i++) {
        kvt_ranges_host_event(t, &event);
        kvt_daemon_pump(t->daemon);
    }
    if (more) {
        (void)eventfd_write(t->notify_fd, 1);
    }
}

static void try_again(struct kvt_tiers *t) {
    bool all = kvt_ranges_retry(t);
    for (uint32_t i = 0; i < t->device_count; i++) {
        all = flush(&t->devices[i]) && all;
    }
    if (!all) {
        t->timer.deadline_ms = kvt_now_ms() + RETRY_MS;
    }
}

static void notified(void *context, uint32_t events) {
    struct kvt_tiers *t = context;
    eventfd_t count;
    (void)events;
    (void)eventfd_read(t->notify_fd, &count);
    take_events(t);
    try_again(t);
}

static void timer_fired(void *context, uint64_t now_ms) {
    (void)now_ms;
    try_again(context);
}

/* ---- start and stop -------------------------------------------------------------------------------- */

static const uint8_t no_uuid[KVT_UUID_BYTES];

static bool is_cpu(const struct kvt_config_device *d) {
    return strcmp(kvt_config_driver_name(d), "cpu") == 0;
}

/* The budgets that are ordinary memory of this machine fit into it together. */
static int check_machine(const struct kvt_config *c, char *text) {
    uint64_t machine = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t sum = c->host_budget_bytes;
    char a[KVT_UNIT_TEXT_BYTES];
    char b[KVT_UNIT_TEXT_BYTES];
    char m[KVT_UNIT_TEXT_BYTES];
    if (sum > machine) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES,
                       "[host] budget = %s: the machine has %s of memory; lower it",
                       kvt_size_exact(sum, a), kvt_size_about(machine, m));
        return -KVT_ECONFIG;
    }
    for (uint32_t i = 0; i < c->device_count; i++) {
        const struct kvt_config_device *d = &c->devices[i];
        if (!is_cpu(d)) {
            continue;
        }
        sum += d->budget_bytes;
        if (sum > machine) {
            (void)snprintf(text, KVT_CONFIG_ERROR_BYTES,
                           "[device %s] budget = %s: with the budgets before it that makes %s, and "
                           "the machine has %s of memory; lower it",
                           d->name, kvt_size_exact(d->budget_bytes, a), kvt_size_about(sum, b),
                           kvt_size_about(machine, m));
            return -KVT_ECONFIG;
        }
    }
    return 0;
}

/* An identity made from a name: the same in every life of the daemon. FNV-1a, twice. */
static void uuid_from_name(const char *name, uint8_t uuid[KVT_UUID_BYTES]) {
    for (int half = 0; half < 2; half++) {
        uint64_t hash = UINT64_C(0xcbf29ce484222325) + (uint64_t)half;
        for (const char *p = name; *p != '\0'; p++) {
            hash = (hash ^ (uint8_t)*p) * UINT64_C(0x100000001b3);
        }
        memcpy(uuid + 8 * half, &hash, 8);
    }
}

/* What the configuration says; all zero: the driver chooses. */
static void uuid_wanted(const struct kvt_config_device *d, uint8_t uuid[KVT_UUID_BYTES]) {
    memcpy(uuid, d->uuid, KVT_UUID_BYTES);
    if (is_cpu(d) && memcmp(d->uuid, no_uuid, sizeof(no_uuid)) == 0) {
        uuid_from_name(d->name, uuid);
    }
}

static int same_uuid(const struct kvt_config_device *a, const struct kvt_config_device *b,
                     char *text) {
    (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "[device %s]: has the same uuid as [device %s]",
                   a->name, b->name);
    return -KVT_ECONFIG;
}

static int start_device(struct kvt_tiers *t, uint32_t index, const char *plugin_dir, char *text) {
    const struct kvt_config *c = &t->daemon->config;
    const struct kvt_config_device *d = &c->devices[index];
    char why[KVT_TEXT_BYTES] = "";
    struct kvt_device_config config = {
        .driver = {.budget_bytes = d->budget_bytes,
                   .copy_threads = d->copy_threads,
                   .extent_kind = d->extent_kind,
                   .host_base = kvt_host_base(t->host),
                   .host_bytes = c->host_budget_bytes},
        .issuer = {.sessions_max = c->sessions_max,
                   .inflight_max = KVT_DRIVER_INFLIGHT_MAX,
                   .inflight_bytes = d->inflight_bytes,
                   .cut_bytes = d->cut_bytes,
                   .quantum_bytes = d->quantum_bytes},
        .spin_us = (uint32_t)d->spin_us,
        .notify_fd = t->notify_fd,
    };
    uuid_wanted(d, config.driver.uuid);
    int rc = kvt_driver_find(kvt_config_driver_name(d), plugin_dir, &config.ops, why);
    if (rc == 0) {
        rc = kvt_device_start(&config, &t->devices[index].device, why);
    }
    if (rc != 0) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "[device %s]: %s", d->name, why);
        return rc;
    }
    t->device_count = index + 1;
    const uint8_t *uuid = kvt_device_info(t->devices[index].device)->uuid;
    for (uint32_t i = 0; i < index; i++) {
        if (memcmp(kvt_device_info(t->devices[i].device)->uuid, uuid, KVT_UUID_BYTES) == 0) {
            return same_uuid(d, &c->devices[i], text);
        }
    }
    return 0;
}

/* ../lib/kvtierd, seen from the folder of this program. */
static const char *plugin_dir(const struct kvt_config *c, char *text, size_t size) {
    if (c->plugin_dir[0] != '\0') {
        return c->plugin_dir;
    }
    char self[KVT_CONFIG_TEXT_BYTES];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    self[n < 0 ? 0 : n] = '\0';
    char *slash = strrchr(self, '/');
    if (slash != NULL) {
        *slash = '\0';
    }
    (void)snprintf(text, size, "%s/../lib/kvtierd", self);
    return text;
}

static bool pins_host(const struct kvt_tiers *t) {
    bool pins = false;
    for (uint32_t i = 0; i < t->device_count; i++) {
        pins |= kvt_device_info(t->devices[i].device)->pins_host;
    }
    return pins;
}

/* A driver may count what it pins, or not: so a limit that is too low is no reason to stop. */
static void allow_pinning(const struct kvt_tiers *t) {
    char why[KVT_TEXT_BYTES];
    if (pins_host(t) &&
        kvt_machine_allow_locked("[host]", t->daemon->config.host_budget_bytes, why) != 0) {
        kvt_log(KVT_LOG_WARNING, "%s", why);
    }
}

/* Host memory lies where the devices are, if this machine has several places. */
static void prefer_near_memory(const struct kvt_tiers *t) {
    char why[KVT_TEXT_BYTES];
    uint64_t near = 0;
    for (uint32_t i = 0; i < t->device_count; i++) {
        int node = kvt_device_info(t->devices[i].device)->numa_node;
        near |= node >= 0 && node < 64 ? UINT64_C(1) << node : 0;
    }
    near = kvt_machine_nodes_near("", near);
    if (near == 0) {
        return;
    }
    if (kvt_host_prefer(t->host, near, why) != 0) {
        kvt_log(KVT_LOG_WARNING, "%s", why);
    } else {
        kvt_log(KVT_LOG_INFO, "host memory: preferred near the devices, on NUMA nodes 0x%llx",
                (unsigned long long)near);
    }
}

uint64_t kvt_tiers_keep_bytes(const struct kvt_tiers *t) {
    const struct kvt_config *c = &t->daemon->config;
    if (c->host_preallocate_bytes == 0) {
        return pins_host(t) ? c->host_budget_bytes : 0;
    }
    return c->host_preallocate_bytes == KVT_SIZE_NONE ? 0 : c->host_preallocate_bytes;
}

int kvt_tiers_check(const struct kvt_config *c, char *text) {
    char why[KVT_TEXT_BYTES] = "";
    char plugins[KVT_CONFIG_TEXT_BYTES + 32];
    uint8_t uuids[KVT_DEVICES_MAX][KVT_UUID_BYTES];
    int rc = check_machine(c, text);
    for (uint32_t i = 0; i < c->device_count && rc == 0; i++) {
        const struct kvt_config_device *d = &c->devices[i];
        const struct kvt_driver_ops *ops;
        rc = kvt_driver_find(kvt_config_driver_name(d), plugin_dir(c, plugins, sizeof(plugins)),
                             &ops, why);
        if (rc != 0) {
            (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "[device %s]: %s", d->name, why);
        }
        uuid_wanted(d, uuids[i]);
        for (uint32_t k = 0; k < i && rc == 0; k++) {
            if (memcmp(uuids[k], uuids[i], KVT_UUID_BYTES) == 0) {
                rc = same_uuid(d, &c->devices[k], text);
            }
        }
    }
    return rc;
}

int kvt_tiers_start(struct kvt_tiers *t, struct kvt_daemon *d, char *text) {
    char why[KVT_TEXT_BYTES] = "";
    char plugins[KVT_CONFIG_TEXT_BYTES + 32];
    t->daemon = d;
    int rc = check_machine(&d->config, text);
    if (rc != 0) {
        return rc;
    }
    t->extents = calloc(KVT_EXTENT_ENTRIES, sizeof(struct kvt_extent_entry *));
    t->notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    t->watch = (struct kvt_watch){.ready = notified, .context = t, .fd = -1};
    t->timer = (struct kvt_timer){.fire = timer_fired, .context = t};
    kvt_loop_add_timer(&d->loop, &t->timer);
    if (t->extents == NULL || t->notify_fd < 0 ||
        kvt_loop_add(&d->loop, &t->watch, t->notify_fd, EPOLLIN) != 0) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "devices: %s", strerror(errno));
        return -KVT_ESYS;
    }
    struct kvt_host_config host = {.budget_bytes = d->config.host_budget_bytes,
                                   .huge_pages = d->config.host_chunk_bytes % HUGE_BYTES == 0,
                                   .threads = d->config.host_touch_threads,
                                   .notify_fd = t->notify_fd,
                                   .added = kvt_ranges_added,
                                   .removed = kvt_ranges_removed,
                                   .context = t};
    rc = kvt_host_start(&host, &t->host, why);
    if (rc != 0) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "[host]: %s", why);
        return rc;
    }
    for (uint32_t i = 0; i < d->config.device_count && rc == 0; i++) {
        t->devices[i] = (struct kvt_tier_device){.daemon = d, .index = i};
        t->devices[i].queue_end = &t->devices[i].queue;
        rc = start_device(t, i, plugin_dir(&d->config, plugins, sizeof(plugins)), text);
    }
    if (rc == 0) {
        allow_pinning(t);
        prefer_near_memory(t);
    }
    return rc;
}

void kvt_tiers_measure(struct kvt_tiers *t) {
    for (uint32_t i = 0; i < t->device_count; i++) {
        kvt_tiers_command(t, i, &(struct kvt_device_command){.kind = KVT_DEVICE_MEASURE});
    }
}

void kvt_tiers_stop(struct kvt_tiers *t) {
    if (t->host != NULL) {
        kvt_host_stop(t->host); /* its threads call the devices */
    }
    for (uint32_t i = 0; i < t->device_count; i++) {
        while (t->devices[i].queue != NULL) {
            struct kvt_queued_command *q = t->devices[i].queue;
            t->devices[i].queue = q->next;
            kvt_program_free(q->command.program);
            free(q);
        }
        kvt_device_stop(t->devices[i].device);
    }
    t->device_count = 0;
    kvt_host_free(t->host);
    t->host = NULL;
    kvt_ranges_clear(t);
    for (uint32_t i = 0; t->extents != NULL && i < KVT_EXTENT_ENTRIES; i++) {
        if (t->extents[i] != NULL && t->extents[i]->exported.fd >= 0) {
            (void)close(t->extents[i]->exported.fd);
        }
        free(t->extents[i]);
    }
    free(t->extents);
    t->extents = NULL;
    if (t->daemon != NULL) {
        kvt_loop_remove(&t->daemon->loop, &t->watch);
        (void)close(t->notify_fd);
    }
}
