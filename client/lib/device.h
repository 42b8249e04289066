/* What the library does on the device that a worker computes on: map what the daemon exports, copy
 * inside it, wait for and post counters.
 *
 *   cpu    device memory is a memfd, a wait is a futex, everything is done when the call returns
 *   cuda   device memory is the GPU's; copies, waits and posts are enqueued on the worker's stream and
 *          done in their order. libcuda is opened at run time.
 *
 * Thread: map, unmap, busy and passed also from the library's own thread, the rest from the client's
 * user.
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

struct kvt_client_gpu; /* the device's own state; NULL for the cpu */

/* Calls return 0 or a negative code. -KVT_EDEVICE of a call that enqueues: nothing works any more,
 * and `why` says what the device said. */
struct kvt_client_device_ops {
    const char *name;
    uint32_t extent_kind; /* what HELLO asks for; 0: what the daemon has */
    uint64_t features;    /* KVT_FEATURE_... that HELLO names */
    /* `stream` is the worker's, borrowed until close. `uuid` comes with the identity that the worker
     * asked for (all zero: none) and goes with the one to ask for. What failed goes to
     * text[KVT_TEXT_BYTES]. */
    int (*open)(void *stream, uint8_t *uuid, struct kvt_client_gpu **out, char *text);
    /* The session's control page, mapped until close. */
    int (*page)(struct kvt_client_gpu *g, struct kvt_control_page *page, char *text);
    /* NULL is allowed. Nothing enqueued may use the page any more: drain comes first. */
    void (*close)(struct kvt_client_gpu *g);

    /* *address: NULL, then it is chosen here, or where vacate has left the range; unchanged if this
     * fails. 0 or a negative code. The mapping must not be inherited by fork. */
    int (*map)(struct kvt_client_gpu *g, const struct kvt_client_import *import, void **address);
    void (*unmap)(struct kvt_client_gpu *g, void *address, uint64_t bytes);
    /* The memory goes, the range of addresses stays reserved. 0 or a negative code; then it is mapped
     * as it was. */
    int (*vacate)(struct kvt_client_gpu *g, void *address, uint64_t bytes);
    /* Gives up a range that vacate has left. */
    void (*unreserve)(struct kvt_client_gpu *g, void *address, uint64_t bytes);
    /* Behind what was enqueued before. Ranges do not overlap. */
    int (*move)(struct kvt_client_gpu *g, void *target, const void *source, uint64_t bytes);
    /* What is enqueued afterwards runs once the counter has reached `value`. A device that waits by
     * itself returns at once; a CPU returns when the value is there, or what `stop` returns. */
    int (*wait)(struct kvt_client_gpu *g, struct kvt_counter *c, uint64_t value,
                struct kvt_client_spin *spin, int (*stop)(void *), void *argument);
    /* Behind what was enqueued before. */
    int (*post)(struct kvt_client_gpu *g, struct kvt_counter *c, uint64_t value);
    /* The same, and a CPU does not wake the daemon, which sees it within 100 ms. */
    int (*store)(struct kvt_client_gpu *g, struct kvt_counter *c, uint64_t value);

    /* Whether something enqueued may still wait for a counter, or overwrite one: as long as that is
     * so the counters of a dead daemon are poisoned again and again. */
    bool (*busy)(struct kvt_client_gpu *g);
    /* Whether what was enqueued before `value` was posted to the counter is complete. */
    bool (*passed)(struct kvt_client_gpu *g, const struct kvt_counter *c, uint64_t value);
    /* Waits until all that was enqueued is complete. */
    void (*drain)(struct kvt_client_gpu *g);
    const char *(*why)(const struct kvt_client_gpu *g);
};

extern const struct kvt_client_device_ops kvt_client_device_cpu;
/* In a library that was built without CUDA its `open` says so. */
extern const struct kvt_client_device_ops kvt_client_device_cuda;

#endif
