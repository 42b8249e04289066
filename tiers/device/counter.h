/* Storing into a counter of a control page, as proto/control_page.h says. Any thread; two threads
 * that store the same counter need an order of their own.
 */
#ifndef KVT_DEVICE_COUNTER_H
#define KVT_DEVICE_COUNTER_H

#include "proto/control_page.h"
#include "tiers/host/futex.h"

/* The waiter stores `waiters` and then reads `wake`; this stores `wake` and then reads `waiters`,
 * all sequentially consistent: so one of the two sees the other. */
static inline void kvt_counter_post(struct kvt_counter *c, uint64_t value) {
    __atomic_store_n(&c->value, value, __ATOMIC_RELEASE);
    __atomic_add_fetch(&c->wake, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&c->waiters, __ATOMIC_SEQ_CST) != 0) {
        kvt_futex_wake(&c->wake, UINT32_MAX, true);
    }
}

#endif
