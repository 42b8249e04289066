/* The device extents that the daemon has passed to a session: found by number, mapped at first use,
 * unmapped when the daemon asks for them (RECLAIM) and no open step uses them.
 *
 * Two threads use a table: the library's (adds, reclaims, acknowledges) and the client's user
 * (looks up and pins). `lock` guards all of it; it is held for a table access or one map call,
 * never while waiting for the daemon. A lookup is one per piece, and cheap.
 */
#ifndef KVT_CLIENT_EXTENTS_H
#define KVT_CLIENT_EXTENTS_H

#include "client/lib/device.h"
#include "proto/limits.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct kvt_client_extent {
    uint32_t id;
    bool pinned;         /* an open step uses it */
    uint64_t used_until; /* the step with which that ended; 0: none has used it */
    bool reclaim;        /* the daemon wants it back */
    bool keep;           /* ... but for its addresses */
    bool vacant;         /* it has: the next packet for it brings other memory */
    bool mapped;
    bool lost; /* the device did not keep its addresses: it cannot be mapped where it was */
    struct kvt_client_import import; /* fd owned until mapped, then -1 */
    void *address;                   /* NULL: never mapped; stays when it becomes vacant */
};

struct kvt_client_extents {
    pthread_mutex_t lock;
    pthread_cond_t added;
    const struct kvt_client_device_ops *ops;
    struct kvt_client_gpu *gpu;        /* borrowed */
    const struct kvt_counter *step;    /* of the control page; borrowed. NULL: there is no page */
    struct kvt_client_extent *entries; /* dense, in no order */
    uint32_t count;
    uint32_t capacity;
    uint32_t *index; /* hash of id -> entry + 1; 0: empty */
    uint32_t index_size;
    uint32_t *pins; /* ids pinned by the open step */
    uint32_t pin_count;
    bool closed; /* nothing will be added any more: waiters give up */
};

int kvt_client_extents_init(struct kvt_client_extents *t, const struct kvt_client_device_ops *ops,
                            struct kvt_client_gpu *gpu);
/* Unmaps and closes everything. */
void kvt_client_extents_free(struct kvt_client_extents *t);

/* Takes over import->fd, also on failure. What is vacant gets its memory. -KVT_EEXIST, -KVT_EBUSY (KVT_EXTENTS_MAX), -KVT_ENOMEM. */
int kvt_client_extents_add(struct kvt_client_extents *t, uint32_t id,
                           const struct kvt_client_import *import);

/* Waits up to timeout_ms for the extent to have been passed, maps it if that was not done, and pins
 * it until kvt_client_extents_unpin. -KVT_ENOENT: it never came; -KVT_EGONE: closed meanwhile. */
int kvt_client_extents_pin(struct kvt_client_extents *t, uint32_t id, int timeout_ms,
                           void **address, uint64_t *bytes);
/* Unpins everything: what uses it comes before step `step`, which has been posted (on a GPU:
 * enqueued). Returns whether an extent that the daemon wants back is, or will soon be, free. */
bool kvt_client_extents_unpin(struct kvt_client_extents *t, uint64_t step);

/* The daemon wants it back, with `keep` all but its addresses. true: it is unmapped (or was never here):
 * acknowledge. false: an open step uses it, or one that was enqueued: it is found by
 * kvt_client_extents_reclaimable later. */
bool kvt_client_extents_reclaim(struct kvt_client_extents *t, uint32_t id, bool keep);
/* Unmaps one extent that is wanted back and not in use, as it is wanted; false: there is none. */
bool kvt_client_extents_reclaimable(struct kvt_client_extents *t, uint32_t *id);
/* Whether one that is wanted back only waits for what was enqueued: look again soon. */
bool kvt_client_extents_draining(struct kvt_client_extents *t);
/* Unmaps and forgets any extent, whoever uses it; false: there is none left. */
bool kvt_client_extents_take(struct kvt_client_extents *t, uint32_t *id);

/* No more extents will come: ends waits. */
void kvt_client_extents_close(struct kvt_client_extents *t);

#endif
