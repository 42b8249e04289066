/* Futex calls; see futex.h. */
#include "tiers/host/futex.h"

#include "tiers/engine/assert.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Headers of Debian 12's kernel have it; those of an older build machine may not. */
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif

/* struct futex_waitv of linux/futex.h, under a name of our own for the same reason. */
struct waitv {
    uint64_t value;
    uint64_t address;
    uint32_t flags;
    uint32_t reserved;
};
enum { WAITV_32 = 2, WAITV_PRIVATE = 128 };

static bool waitv_missing; /* atomic: found out at run time */

static struct timespec after(const struct timespec *from, uint32_t timeout_us) {
    struct timespec t = *from;
    t.tv_sec += timeout_us / 1000000;
    t.tv_nsec += (long)(timeout_us % 1000000) * 1000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000;
    }
    return t;
}

void kvt_futex_wait(const uint32_t *word, uint32_t seen, uint32_t timeout_us, bool shared) {
    static const struct timespec zero;
    struct timespec timeout = after(&zero, timeout_us);
    (void)syscall(SYS_futex, word, shared ? FUTEX_WAIT : FUTEX_WAIT_PRIVATE, seen,
                  timeout_us == KVT_FUTEX_FOREVER ? NULL : &timeout, NULL, 0);
}

void kvt_futex_wake(const uint32_t *word, uint32_t count, bool shared) {
    (void)syscall(SYS_futex, word, shared ? FUTEX_WAKE : FUTEX_WAKE_PRIVATE,
                  count > INT_MAX ? INT_MAX : (int)count, NULL, NULL, 0);
}

/* Whether the kernel did it. */
static bool wait_all_words(const struct kvt_futex_watch *watches, uint32_t count,
                           uint32_t timeout_us) {
    struct waitv list[KVT_FUTEX_WATCH_MAX];
    for (uint32_t i = 0; i < count; i++) {
        list[i] = (struct waitv){.value = watches[i].seen,
                                 .address = (uint64_t)(uintptr_t)watches[i].word,
                                 .flags = watches[i].shared ? WAITV_32 : WAITV_32 | WAITV_PRIVATE};
    }
    struct timespec now = {0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    struct timespec deadline = after(&now, timeout_us);
    long rc = syscall(SYS_futex_waitv, list, count, 0,
                      timeout_us == KVT_FUTEX_FOREVER ? NULL : &deadline, CLOCK_MONOTONIC);
    return rc >= 0 || (errno != ENOSYS && errno != EPERM && errno != EINVAL);
}

void kvt_futex_wait_any(const struct kvt_futex_watch *watches, uint32_t count,
                        uint32_t timeout_us) {
    KVT_ASSERT(count > 0);
    KVT_ASSERT(count <= KVT_FUTEX_WATCH_MAX);
    if (count == 1) {
        kvt_futex_wait(watches[0].word, watches[0].seen, timeout_us, watches[0].shared);
        return;
    }
    if (!__atomic_load_n(&waitv_missing, __ATOMIC_RELAXED)) {
        if (wait_all_words(watches, count, timeout_us)) {
            return;
        }
        __atomic_store_n(&waitv_missing, true, __ATOMIC_RELAXED);
    }
    for (uint32_t i = 1; i < count; i++) {
        if (__atomic_load_n(watches[i].word, __ATOMIC_ACQUIRE) != watches[i].seen) {
            return;
        }
    }
    kvt_futex_wait(watches[0].word, watches[0].seen,
                   timeout_us < KVT_FUTEX_POLL_US ? timeout_us : KVT_FUTEX_POLL_US,
                   watches[0].shared);
}

void kvt_futex_forbid_waitv(bool forbidden) {
    __atomic_store_n(&waitv_missing, forbidden, __ATOMIC_RELAXED);
}
