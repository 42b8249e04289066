/* Devices and host memory as the loop sees them: their queues, their events, and which range of the
 * host arena waits for room in the host's queue. Loop thread.
 */
#ifndef KVT_DAEMON_TIERS_H
#define KVT_DAEMON_TIERS_H

#include "daemon/loop.h"
#include "tiers/device/device.h"
#include "tiers/host/host.h"

struct kvt_config;
struct kvt_daemon;
struct kvt_queued_command; /* that a device's full queue has not taken yet */
struct kvt_host_range;     /* that the host's full queue has not taken yet */

#define KVT_EXTENT_ENTRIES 65536 /* the engine's ids have an index in their low 16 bits */

/* What the daemon knows of an extent. */
struct kvt_extent_entry {
    uint32_t id;
    uint32_t session;                   /* number */
    bool out;                           /* the session's process has got it and not given it back */
    struct kvt_extent_entry *back_next; /* see kvt_session.back */
    uint64_t bytes;
    struct kvt_export exported; /* fd is owned until it is sent */
};

struct kvt_tier_device {
    struct kvt_device *device;
    struct kvt_daemon *daemon;
    uint32_t index;
    struct kvt_queued_command *queue; /* oldest first */
    struct kvt_queued_command **queue_end;
};

/* Host memory that is there from the start, while it comes up. */
struct kvt_tiers_keep {
    uint64_t bytes; /* asked for; 0: none */
    bool pending;
    uint64_t asked_ms;
    uint64_t huge_bytes;
    char why[KVT_TEXT_BYTES]; /* some did not come */
};

struct kvt_tiers {
    struct kvt_daemon *daemon;
    int notify_fd; /* eventfd of all devices and the host */
    struct kvt_watch watch;
    struct kvt_timer timer; /* tries full queues again */
    struct kvt_host *host;
    struct kvt_tier_device devices[KVT_DEVICES_MAX];
    uint32_t device_count;
    struct kvt_host_range *ranges; /* oldest first */
    struct kvt_tiers_keep keep;
    uint64_t warned_ms;                /* that a range could not be had */
    struct kvt_extent_entry **extents; /* KVT_EXTENT_ENTRIES; NULL where there is none */
    uint32_t sessions_draining;        /* closed on a device, not yet drained */
};

/* What kvt_tiers_start finds wrong, as far as that is seen without a device: budgets, identities,
 * plug-ins. */
int kvt_tiers_check(const struct kvt_config *c, char *text) __attribute__((warn_unused_result));
/* Starts host arena and devices. 0 or a negative code with text[KVT_CONFIG_ERROR_BYTES]. */
int kvt_tiers_start(struct kvt_tiers *t, struct kvt_daemon *d, char *text)
    __attribute__((warn_unused_result));
void kvt_tiers_stop(struct kvt_tiers *t);
/* Has each device measure its link. Once, before there is a worker. */
void kvt_tiers_measure(struct kvt_tiers *t);

/* To a device, in order, however full its queue is. Takes over c->program. */
void kvt_tiers_command(struct kvt_tiers *t, uint32_t device, const struct kvt_device_command *c);
/* What the engine is to keep of host memory, by configuration and devices. */
uint64_t kvt_tiers_keep_bytes(const struct kvt_tiers *t);
/* A range of the host arena: touched, then made known to every device, then the engine hears. */
void kvt_tiers_host_grow(struct kvt_tiers *t, uint64_t offset, uint64_t bytes);
/* The reverse. */
void kvt_tiers_host_shrink(struct kvt_tiers *t, uint64_t offset, uint64_t bytes);

/* NULL: unknown. */
struct kvt_extent_entry *kvt_tiers_extent(struct kvt_tiers *t, uint32_t extent);
/* Notes who an extent is for, when the engine asks for it. */
void kvt_tiers_extent_expect(struct kvt_tiers *t, uint32_t extent, uint32_t session,
                             uint64_t bytes);
/* The extent is being destroyed. */
void kvt_tiers_extent_forget(struct kvt_tiers *t, uint32_t extent);

#endif
