/*
 * See pool.h.
 *
 * `ticket` holds the job's number and the next item. A thread takes an item by
 * compare-and-swap, so it never takes one of a job whose function it has not read:
 * the job's fields are only written while the ticket is closed (item UINT32_MAX)
 * and every item of the job before has been counted in `done`.
 * Idle threads spin for a moment, as the next job of a forward pass comes within
 * microseconds, and then sleep on a futex.
 */
#include "client/worker/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "proto/errors.h"

#define CLOSED     UINT32_MAX
#define SPINS_IDLE 2000
#define SPINS_WAIT 1000

typedef void (*work_fn)(void *arg, uint32_t item, uint32_t thread);

struct member {
    struct kvt_pool *pool;
    pthread_t id;
    uint32_t thread;
};

struct kvt_pool {
    _Atomic uint64_t ticket; /* job << 32 | next item */
    _Atomic uint32_t items;
    _Atomic(work_fn) fn;
    _Atomic(void *) arg;
    _Alignas(64) _Atomic uint32_t done; /* items of this job that have returned */
    _Alignas(64) _Atomic uint32_t wake; /* futex: changes with every job */
    _Atomic uint32_t sleepers;
    atomic_bool ends;
    uint32_t threads;
    struct member members[]; /* threads - 1 */
};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Takes and runs items until the job has none left. */
static void work(struct kvt_pool *pool, uint32_t thread) {
    uint64_t ticket = atomic_load(&pool->ticket);
    for (;;) {
        work_fn fn = atomic_load(&pool->fn);
        void *arg = atomic_load(&pool->arg);
        uint32_t items = atomic_load(&pool->items);
        uint32_t item = (uint32_t)ticket;
        if (item == CLOSED || item >= items)
            return;
        if (!atomic_compare_exchange_strong(&pool->ticket, &ticket, ticket + 1))
            continue;
        fn(arg, item, thread);
        atomic_fetch_add(&pool->done, 1);
        ticket = atomic_load(&pool->ticket);
    }
}

static void *member_main(void *arg) {
    struct member *member = arg;
    struct kvt_pool *pool = member->pool;
    uint32_t seen = 0;
    while (!atomic_load(&pool->ends)) {
        uint32_t wake = atomic_load(&pool->wake);
        for (int i = 0; wake == seen && i < SPINS_IDLE; i++) {
            relax();
            wake = atomic_load(&pool->wake);
        }
        if (wake == seen) {
            atomic_fetch_add(&pool->sleepers, 1);
            if (atomic_load(&pool->wake) == seen)
                syscall(SYS_futex, &pool->wake, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            atomic_fetch_sub(&pool->sleepers, 1);
            continue;
        }
        seen = wake;
        work(pool, member->thread);
    }
    return NULL;
}

static void wake_members(struct kvt_pool *pool) {
    atomic_fetch_add(&pool->wake, 1);
    if (atomic_load(&pool->sleepers) > 0)
        syscall(SYS_futex, &pool->wake, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

void kvt_pool_run(void *arg_pool, uint32_t items, work_fn fn, void *arg) {
    struct kvt_pool *pool = arg_pool;
    if (items == 0)
        return;
    if (pool->threads == 1 || items == 1) {
        for (uint32_t i = 0; i < items; i++)
            fn(arg, i, 0);
        return;
    }
    uint64_t job = (atomic_load(&pool->ticket) >> 32) + 1;
    atomic_store(&pool->ticket, job << 32 | CLOSED);
    atomic_store(&pool->fn, fn);
    atomic_store(&pool->arg, arg);
    atomic_store(&pool->items, items);
    atomic_store(&pool->done, 0);
    atomic_store(&pool->ticket, job << 32);
    wake_members(pool);
    work(pool, 0);
    for (int i = 0; atomic_load(&pool->done) < items; i++) {
        if (i < SPINS_WAIT)
            relax();
        else
            sched_yield(); /* another thread's CPU may be ours */
    }
}

int kvt_pool_open(struct kvt_pool **out, uint32_t threads) {
    size_t size = sizeof(struct kvt_pool) + threads * sizeof(struct member);
    struct kvt_pool *pool = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!pool)
        return -KVT_ENOMEM;
    atomic_init(&pool->ticket, CLOSED);
    atomic_init(&pool->items, 0);
    atomic_init(&pool->fn, NULL);
    atomic_init(&pool->arg, NULL);
    atomic_init(&pool->done, 0);
    atomic_init(&pool->wake, 0);
    atomic_init(&pool->sleepers, 0);
    atomic_init(&pool->ends, false);
    pool->threads = 1;
    for (uint32_t i = 1; i < threads; i++) {
        struct member *member = &pool->members[i - 1];
        member->pool = pool;
        member->thread = i;
        if (pthread_create(&member->id, NULL, member_main, member)) {
            kvt_pool_close(pool);
            return -KVT_ESYS;
        }
        pool->threads++;
    }
    *out = pool;
    return 0;
}

void kvt_pool_close(struct kvt_pool *pool) {
    if (!pool)
        return;
    atomic_store(&pool->ends, true);
    wake_members(pool);
    for (uint32_t i = 1; i < pool->threads; i++)
        (void)pthread_join(pool->members[i - 1].id, NULL);
    free(pool);
}

uint32_t kvt_pool_threads(const struct kvt_pool *pool) {
    return pool->threads;
}

uint32_t kvt_pool_cpu_count(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set))
        return 1;
    int count = CPU_COUNT(&set);
    return count < 1 ? 1 : count > KVT_POOL_THREADS_MAX ? KVT_POOL_THREADS_MAX : (uint32_t)count;
}
