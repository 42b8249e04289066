/* Counters of the control page, as a CPU posts them and waits for them (proto/control_page.h has
 * the protocol). Thread: any; the counters are shared with another process, so every access is
 * atomic.
 */
#ifndef KVT_CLIENT_COUNTER_H
#define KVT_CLIENT_COUNTER_H

#include "proto/control_page.h"

#include <stdbool.h>
#include <stdint.h>

static inline uint64_t kvt_client_counter_read(const struct kvt_counter *c) {
    return __atomic_load_n(&c->value, __ATOMIC_ACQUIRE);
}

/* Stores `value` and wakes who sleeps. A counter that is poisoned stays as it is. */
void kvt_client_counter_post(struct kvt_counter *c, uint64_t value);
/* The two halves of it: a store alone is noticed when the other side looks again, within 100 ms.
 * false: the counter is poisoned. */
bool kvt_client_counter_store(struct kvt_counter *c, uint64_t value);
void kvt_client_counter_wake(struct kvt_counter *c);

/* Adds KVT_POISON once, and wakes who sleeps. A counter that has it already is left alone. */
void kvt_client_counter_poison(struct kvt_counter *c);

/* Every counter of the page. */
void kvt_client_page_poison(struct kvt_control_page *page);

/* Sleeps until somebody stores to the counter, it has reached `wanted`, or `timeout_us` has passed.
 * May return early; the caller looks again. */
void kvt_client_counter_sleep(struct kvt_counter *c, uint64_t wanted, uint32_t timeout_us);

/* Spins before it sleeps: as long as recent waits were worth it. One for each waiting thread. */
struct kvt_client_spin {
    uint32_t average_ns; /* of recent waits, long ones counted as KVT_CLIENT_SPIN_LONG_NS */
};
#define KVT_CLIENT_SPIN_LONG_NS 50000

/* Waits until the counter has reached `wanted` or `stop(argument)` is not 0, which is asked after
 * every wake-up and at least ten times a second. Returns 0, or what `stop` returned. */
int kvt_client_counter_wait(struct kvt_counter *c, uint64_t wanted, struct kvt_client_spin *spin,
                            int (*stop)(void *), void *argument);

/* Monotonic time. */
uint64_t kvt_client_now_ns(void);

#endif
