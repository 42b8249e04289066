/* What the library does on the device that a worker computes on: map what the daemon exports, copy
 * inside it, wait for and post counters. `cpu` is built in (device memory is a memfd, a wait is a
 * futex); a plug-in with streams slots in here without the rest noticing.
 *
 * Thread: map and unmap also from the library's own thread, the rest from the client's user.
 */
#ifndef KVT_CLIENT_DEVICE_H
#define KVT_CLIENT_DEVICE_H

#include "client/lib/counter.h"

#include <stdbool.h>
#include <stdint.h>

/* How the daemon passed an extent; see proto/attach.h. */
struct kvt_client_import {
    uint32_t kind; /* enum kvt_extent_kind */
    int fd;        /* kind FD; borrowed for the call */
    uint64_t bytes;
    uint8_t handle[64];
};

struct kvt_client_device_ops {
    const char *name;
    uint32_t extent_kind; /* what HELLO asks for */
    /* 0 and *address, or a negative code. The mapping must not be inherited by fork. */
    int (*map)(const struct kvt_client_import *import, void **address);
    void (*unmap)(void *address, uint64_t bytes);
    /* Behind what was enqueued before. Ranges do not overlap. */
    void (*move)(void *target, const void *source, uint64_t bytes);
    /* What is enqueued afterwards runs once the counter has reached `value`. A device that waits by
     * itself returns 0 at once; a CPU returns when the value is there, or what `stop` returns. */
    int (*wait)(struct kvt_counter *c, uint64_t value, struct kvt_client_spin *spin,
                int (*stop)(void *), void *argument);
    /* Behind what was enqueued before. */
    void (*post)(struct kvt_counter *c, uint64_t value);
    /* The same, and nobody is woken: the daemon sees it within 100 ms. */
    void (*store)(struct kvt_counter *c, uint64_t value);
    /* Whether something enqueued may still wait for a counter, or overwrite one: as long as that is
     * so the counters of a dead daemon are poisoned again and again. */
    bool (*busy)(void);
};

extern const struct kvt_client_device_ops kvt_client_device_cpu;

#endif
