/* The cpu device's copy engines: threads that share large copies between them.
 *
 * The copy thread submits and collects; the threads of the pool copy. No lock: a copy is cut into
 * chunks that the threads claim one by one.
 */
#ifndef KVT_DEVICE_CPU_POOL_H
#define KVT_DEVICE_CPU_POOL_H

#include "tiers/host/bell.h"

#include <stdint.h>

struct kvt_pool;

/* `threads` may be 0: then every copy is done inside kvt_pool_submit. `done_bell` is rung when a
 * copy is complete; borrowed. -KVT_ENOMEM or -KVT_ESYS. */
int kvt_pool_create(uint32_t threads, struct kvt_bell *done_bell, struct kvt_pool **out)
    __attribute__((warn_unused_result));
/* Stops the threads; chunks that nobody has begun are not copied. NULL is allowed. */
void kvt_pool_free(struct kvt_pool *p);

/* Copy thread. `tag` is below KVT_DRIVER_TAGS_MAX and not in use. Small copies are done at once,
 * by the caller. */
void kvt_pool_submit(struct kvt_pool *p, uint32_t tag, void *target, const void *source,
                     uint64_t bytes);

/* Copy thread. Takes up to `max` tags of complete copies, in no order; returns how many. */
uint32_t kvt_pool_collect(struct kvt_pool *p, uint32_t *tags, uint32_t max);

#endif
