/* The cpu device's copy engines; see pool.h.
 *
 * A job is a copy, one for each tag. Its `left` counts the chunks that nobody has claimed; whoever
 * takes it from n to n - 1 owns chunk n - 1, and may read the job's other fields, which do not
 * change while a claimed chunk is unfinished. So a thread that looks at a job too late claims a
 * chunk of the tag's next copy, which is as good as any other. Who finishes a job's last chunk marks
 * its tag done and rings.
 *
 * `ring` lists the tags in the order of submission. `oldest` may lag behind: it is moved past a job
 * that has no chunk left to claim by whoever meets one there. Twice as many places as tags are
 * enough for the ring not to catch up with jobs that have chunks left.
 */
#include "tiers/device/cpu/pool.h"

#include "proto/errors.h"
#include "tiers/device/cpu/move.h"
#include "tiers/device/device.h"
#include "tiers/engine/assert.h"
#include "tiers/host/thread.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { TAGS = KVT_DRIVER_TAGS_MAX, RING = 2 * TAGS, DONE_WORDS = TAGS / 64 };

/* Up to this the hand-over to another thread costs more than the copy: measured with a worker that
 * reads each piece, 7.9 GB/s against 7.3 at 256 KiB, and twice as much at 32 KiB. The copy thread is
 * busy for some 20 us with one. */
#define INLINE_BYTES_MAX (256u << 10)
#define CHUNK_BYTES_MIN  (128u << 10)
#define CHUNK_BYTES_MAX  (1u << 20)
/* Above this past the caches (move.h); what is smaller the worker may still find in them. */
#define CACHED_BYTES_MAX INLINE_BYTES_MAX

struct job {
    uint8_t *target;
    const uint8_t *source;
    uint64_t bytes;
    uint64_t chunk_bytes;
    uint32_t left;       /* atomic: chunks that nobody has claimed */
    uint32_t unfinished; /* atomic: chunks that are not copied yet */
};

struct kvt_pool {
    struct job jobs[TAGS];
    uint32_t ring[RING];       /* atomic */
    uint32_t newest;           /* atomic: places of the ring that were ever filled */
    uint32_t oldest;           /* atomic: those before it have no chunk left to claim */
    uint64_t done[DONE_WORDS]; /* atomic: a bit for each tag */
    struct kvt_bell *done_bell;
    struct kvt_bell work_bell;
    bool stop; /* atomic */
    uint32_t thread_count;
    pthread_t *threads;
};

/* ---- the pool's threads ---------------------------------------------------------------------- */

static bool claim(struct job *j, uint32_t *chunk) {
    uint32_t left = __atomic_load_n(&j->left, __ATOMIC_RELAXED);
    while (left > 0) {
        if (__atomic_compare_exchange_n(&j->left, &left, left - 1, false, __ATOMIC_ACQUIRE,
                                        __ATOMIC_RELAXED)) {
            *chunk = left - 1;
            return true;
        }
    }
    return false;
}

static void mark_done(struct kvt_pool *p, uint32_t tag) {
    __atomic_fetch_or(&p->done[tag / 64], UINT64_C(1) << tag % 64, __ATOMIC_RELEASE);
}

static void copy_chunk(struct kvt_pool *p, uint32_t tag, uint32_t chunk) {
    struct job *j = &p->jobs[tag];
    uint64_t begin = chunk * j->chunk_bytes;
    uint64_t left = j->bytes - begin;
    kvt_cpu_move(j->target + begin, j->source + begin,
                 left < j->chunk_bytes ? left : j->chunk_bytes, j->bytes > CACHED_BYTES_MAX);
    if (__atomic_sub_fetch(&j->unfinished, 1, __ATOMIC_ACQ_REL) == 0) {
        mark_done(p, tag);
        kvt_bell_ring(p->done_bell, 1);
    }
}

/* Copies one chunk of the oldest job that has one; false: there is none. */
static bool work(struct kvt_pool *p) {
    uint32_t place = __atomic_load_n(&p->oldest, __ATOMIC_ACQUIRE);
    while (place != __atomic_load_n(&p->newest, __ATOMIC_ACQUIRE)) {
        uint32_t tag = __atomic_load_n(&p->ring[place % RING], __ATOMIC_RELAXED);
        uint32_t chunk;
        if (claim(&p->jobs[tag], &chunk)) {
            copy_chunk(p, tag, chunk);
            return true;
        }
        uint32_t expected = place;
        __atomic_compare_exchange_n(&p->oldest, &expected, place + 1, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_RELAXED);
        place++;
    }
    return false;
}

static void *run(void *argument) {
    struct kvt_pool *p = argument;
    while (!__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) {
        uint32_t seen = kvt_bell_rings(&p->work_bell);
        if (!work(p) && !__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) {
            kvt_bell_wait(&p->work_bell, seen, KVT_FUTEX_FOREVER);
        }
    }
    return NULL;
}

/* ---- the copy thread's side ------------------------------------------------------------------ */

int kvt_pool_create(uint32_t threads, struct kvt_bell *done_bell, struct kvt_pool **out) {
    struct kvt_pool *p = calloc(1, sizeof(*p));
    if (!p) {
        return -KVT_ENOMEM;
    }
    p->done_bell = done_bell;
    int rc = -KVT_ENOMEM;
    p->threads = calloc(threads ? threads : 1, sizeof(p->threads[0]));
    if (!p->threads) {
        goto fail;
    }
    for (; p->thread_count < threads; p->thread_count++) {
        rc = kvt_thread_start("kvt-dma", run, p, &p->threads[p->thread_count]);
        if (rc != 0) {
            goto fail;
        }
    }
    *out = p;
    return 0;

fail:
    kvt_pool_free(p);
    return rc;
}

void kvt_pool_free(struct kvt_pool *p) {
    if (!p) {
        return;
    }
    __atomic_store_n(&p->stop, true, __ATOMIC_RELEASE);
    kvt_bell_ring(&p->work_bell, UINT32_MAX);
    for (uint32_t i = 0; i < p->thread_count; i++) {
        pthread_join(p->threads[i], NULL);
    }
    free(p->threads);
    free(p);
}

/* Every thread gets some of it, and none waits long for the last chunk of another. */
static uint64_t chunk_bytes_of(const struct kvt_pool *p, uint64_t bytes) {
    uint64_t chunk_bytes = bytes / (2 * (uint64_t)p->thread_count) / 4096 * 4096;
    chunk_bytes = chunk_bytes > CHUNK_BYTES_MIN ? chunk_bytes : CHUNK_BYTES_MIN;
    return chunk_bytes < CHUNK_BYTES_MAX ? chunk_bytes : CHUNK_BYTES_MAX;
}

void kvt_pool_submit(struct kvt_pool *p, uint32_t tag, void *target, const void *source,
                     uint64_t bytes) {
    KVT_ASSERT(tag < TAGS);
    if (bytes <= INLINE_BYTES_MAX || p->thread_count == 0) {
        kvt_cpu_move(target, source, bytes, bytes > CACHED_BYTES_MAX);
        mark_done(p, tag);
        return;
    }
    struct job *j = &p->jobs[tag];
    KVT_ASSERT(__atomic_load_n(&j->unfinished, __ATOMIC_RELAXED) == 0);
    j->target = target;
    j->source = source;
    j->bytes = bytes;
    j->chunk_bytes = chunk_bytes_of(p, bytes);
    uint64_t chunks = (bytes + j->chunk_bytes - 1) / j->chunk_bytes;
    KVT_ASSERT(chunks <= UINT32_MAX);
    __atomic_store_n(&j->unfinished, (uint32_t)chunks, __ATOMIC_RELAXED);
    __atomic_store_n(&j->left, (uint32_t)chunks, __ATOMIC_RELEASE);
    uint32_t newest = __atomic_load_n(&p->newest, __ATOMIC_RELAXED);
    __atomic_store_n(&p->ring[newest % RING], tag, __ATOMIC_RELAXED);
    __atomic_store_n(&p->newest, newest + 1, __ATOMIC_RELEASE);
    kvt_bell_ring(&p->work_bell, (uint32_t)(chunks < p->thread_count ? chunks : p->thread_count));
}

uint32_t kvt_pool_collect(struct kvt_pool *p, uint32_t *tags, uint32_t max) {
    uint32_t count = 0;
    for (uint32_t w = 0; w < DONE_WORDS && count < max; w++) {
        uint64_t bits = __atomic_load_n(&p->done[w], __ATOMIC_ACQUIRE);
        uint64_t taken = 0;
        for (; bits != 0 && count < max; bits &= bits - 1) {
            taken |= bits & -bits;
            tags[count++] = w * 64 + (uint32_t)__builtin_ctzll(bits);
        }
        if (taken != 0) {
            __atomic_fetch_and(&p->done[w], ~taken, __ATOMIC_ACQUIRE);
        }
    }
    return count;
}
