#include "client/lib/counter.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPIN_NS_MAX 8000
#define SPIN_NS_MIN 1000
#define SLEEP_US    100000

uint64_t kvt_client_now_ns(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void kvt_client_counter_wake(struct kvt_counter *c) {
    (void)__atomic_add_fetch(&c->wake, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&c->waiters, __ATOMIC_SEQ_CST) != 0) {
        (void)syscall(SYS_futex, &c->wake, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

bool kvt_client_counter_store(struct kvt_counter *c, uint64_t value) {
    uint64_t before = __atomic_load_n(&c->value, __ATOMIC_RELAXED);
    while (before < KVT_POISON) { /* the library's thread may poison it meanwhile */
        if (__atomic_compare_exchange_n(&c->value, &before, value, false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_RELAXED)) {
            return true;
        }
    }
    return false;
}

void kvt_client_counter_post(struct kvt_counter *c, uint64_t value) {
    if (kvt_client_counter_store(c, value)) {
        kvt_client_counter_wake(c);
    }
}

void kvt_client_counter_poison(struct kvt_counter *c) {
    uint64_t value = __atomic_load_n(&c->value, __ATOMIC_RELAXED);
    while (value < KVT_POISON) {
        if (__atomic_compare_exchange_n(&c->value, &value, value + KVT_POISON, false,
                                        __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
            kvt_client_counter_wake(c);
            return;
        }
    }
}

void kvt_client_page_poison(struct kvt_control_page *page) {
    kvt_client_counter_poison(&page->step);
    kvt_client_counter_poison(&page->committed);
    kvt_client_counter_poison(&page->failed);
    for (uint32_t i = 0; i < KVT_SLOTS_MAX; i++) {
        kvt_client_counter_poison(&page->ready[i]);
        kvt_client_counter_poison(&page->done[i]);
    }
}

void kvt_client_counter_sleep(struct kvt_counter *c, uint64_t wanted, uint32_t timeout_us) {
    /* The order of these three is what makes a wake-up impossible to miss: who stores a value that
     * this thread does not see finds `waiters` set, and has changed `wake` since it was read. */
    __atomic_store_n(&c->waiters, 1, __ATOMIC_SEQ_CST);
    uint32_t seen = __atomic_load_n(&c->wake, __ATOMIC_SEQ_CST);
    uint64_t value = __atomic_load_n(&c->value, __ATOMIC_SEQ_CST);
    if (!kvt_counter_reached(value, wanted)) {
        struct timespec t = {.tv_sec = timeout_us / 1000000,
                             .tv_nsec = (long)(timeout_us % 1000000) * 1000};
        (void)syscall(SYS_futex, &c->wake, FUTEX_WAIT, seen, &t, NULL, 0);
    }
    __atomic_store_n(&c->waiters, 0, __ATOMIC_SEQ_CST);
}

static bool spin_until(struct kvt_counter *c, uint64_t wanted, uint64_t start_ns,
                       uint32_t limit_ns) {
    do {
        for (int i = 0; i < 32; i++) {
            if (kvt_counter_reached(kvt_client_counter_read(c), wanted)) {
                return true;
            }
            relax();
        }
    } while (kvt_client_now_ns() - start_ns < limit_ns);
    return false;
}

static void remember(struct kvt_client_spin *spin, uint64_t waited_ns) {
    uint64_t capped = waited_ns < KVT_CLIENT_SPIN_LONG_NS ? waited_ns : KVT_CLIENT_SPIN_LONG_NS;
    spin->average_ns = (uint32_t)((3 * (uint64_t)spin->average_ns + capped) / 4);
}

int kvt_client_counter_wait(struct kvt_counter *c, uint64_t wanted, struct kvt_client_spin *spin,
                            int (*stop)(void *), void *argument) {
    if (kvt_counter_reached(kvt_client_counter_read(c), wanted)) {
        return stop(argument);
    }
    /* Spinning is worth it only while waits end soon; otherwise it takes time from who copies. */
    uint32_t limit_ns = spin->average_ns <= SPIN_NS_MAX ? SPIN_NS_MAX : SPIN_NS_MIN;
    uint64_t start_ns = kvt_client_now_ns();
    bool reached = spin_until(c, wanted, start_ns, limit_ns);
    int rc = stop(argument);
    while (!reached && rc == 0) {
        kvt_client_counter_sleep(c, wanted, SLEEP_US);
        reached = kvt_counter_reached(kvt_client_counter_read(c), wanted);
        rc = stop(argument);
    }
    remember(spin, kvt_client_now_ns() - start_ns);
    return rc;
}
