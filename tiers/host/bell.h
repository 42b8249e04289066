/* A bell: threads of one process sleep until it is rung. Rings before the sleep are not lost: a
 * waiter reads the number of rings, looks at what it waits for, and sleeps only while that number
 * stands.
 *
 *     waiter                                     ringer
 *     seen = kvt_bell_rings(b)                   makes something true
 *     looks whether something is true            kvt_bell_ring(b, 1)
 *     if not: kvt_bell_wait(b, seen, timeout)
 *
 * The waiter stores `sleepers` and then reads `rings`, the ringer stores `rings` and then reads
 * `sleepers`, all sequentially consistent: so one of the two sees the other.
 */
#ifndef KVT_HOST_BELL_H
#define KVT_HOST_BELL_H

#include "tiers/host/futex.h"

#include <stdint.h>

struct kvt_bell {
    uint32_t rings;
    uint32_t sleepers;
};

/* Any thread. Wakes up to `count` sleepers; costs no system call while nobody sleeps. */
static inline void kvt_bell_ring(struct kvt_bell *b, uint32_t count) {
    __atomic_add_fetch(&b->rings, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&b->sleepers, __ATOMIC_SEQ_CST) != 0) {
        kvt_futex_wake(&b->rings, count, false);
    }
}

static inline uint32_t kvt_bell_rings(const struct kvt_bell *b) {
    return __atomic_load_n(&b->rings, __ATOMIC_SEQ_CST);
}

/* Around any sleep on `rings`, so that a ringer knows to wake. */
static inline void kvt_bell_sleeps(struct kvt_bell *b) {
    __atomic_add_fetch(&b->sleepers, 1, __ATOMIC_SEQ_CST);
}
static inline void kvt_bell_woke(struct kvt_bell *b) {
    __atomic_sub_fetch(&b->sleepers, 1, __ATOMIC_SEQ_CST);
}

/* Returns when the bell was rung after `seen` was read, at timeout_us, or earlier. */
static inline void kvt_bell_wait(struct kvt_bell *b, uint32_t seen, uint32_t timeout_us) {
    kvt_bell_sleeps(b);
    if (kvt_bell_rings(b) == seen) {
        kvt_futex_wait(&b->rings, seen, timeout_us, false);
    }
    kvt_bell_woke(b);
}

#endif
