/*
 * Threads that share out the items of one job at a time.
 *
 * Thread: one thread owns the pool and runs jobs on it, taking part itself as
 * thread 0. Which thread gets which item is chance; whoever wants the same bits
 * each time lets an item's result depend on the item alone.
 */
#ifndef KVT_WORKER_POOL_H
#define KVT_WORKER_POOL_H

#include <stdint.h>

#define KVT_POOL_THREADS_MAX 256

struct kvt_pool;

/* `threads` counts the caller too: 1 starts none. -KVT_ENOMEM, or -KVT_ESYS if none can start. */
__attribute__((warn_unused_result)) int kvt_pool_open(struct kvt_pool **out, uint32_t threads);
void kvt_pool_close(struct kvt_pool *pool);

uint32_t kvt_pool_threads(const struct kvt_pool *pool);

/*
 * Calls fn(arg, item, thread) for each item below `items`; returns when all have
 * returned. The pool comes as void so that this is a kvt_parallel_fn.
 */
void kvt_pool_run(void *pool, uint32_t items, void (*fn)(void *arg, uint32_t item, uint32_t thread),
                  void *arg);

/* CPUs that this process may run on. */
uint32_t kvt_pool_cpu_count(void);

#endif
