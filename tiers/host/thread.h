/* Threads of the tiers: named, and with every signal blocked, so that the daemon's loop alone gets
 * them. */
#ifndef KVT_HOST_THREAD_H
#define KVT_HOST_THREAD_H

#include <pthread.h>

/* name: at most 15 characters. -KVT_ESYS: the system has no thread left; *out is as it was. */
int kvt_thread_start(const char *name, void *(*run)(void *), void *argument, pthread_t *out)
    __attribute__((warn_unused_result));

#endif
