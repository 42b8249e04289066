/* Measuring the cpu device's copies; see measure.h.
 *
 * Each lane of the extent is copied to and fro between its halves, some lanes at a time, so that the
 * threads always find work. A copy finds its source where the one before has left it: past the caches
 * (move.h), as a layer in host memory is. The threads are a pool of its own, as large as the driver's,
 * so that nobody else is woken by its bell.
 */
#include "tiers/device/cpu/measure.h"

#include "proto/errors.h"
#include "tiers/device/cpu/pool.h"
#include "tiers/engine/assert.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

enum { EXTENT = 1, LANES_MIN = 2, LANES_MAX = 16, PASSES = 8, TURNS = 3 };
#define HALF_BYTES (UINT64_C(512) << 10) /* more than what the pool copies at once and by itself */
#define LANE_BYTES (2 * HALF_BYTES)

struct measuring {
    struct kvt_pool *pool;
    struct kvt_bell bell;
    uint8_t *memory;
    uint32_t lanes;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void submit(struct measuring *m, uint32_t lane, uint32_t pass) {
    uint8_t *a = m->memory + lane * LANE_BYTES;
    uint8_t *b = a + HALF_BYTES;
    kvt_pool_submit(m->pool, lane, pass % 2 == 0 ? a : b, pass % 2 == 0 ? b : a, HALF_BYTES);
}

/* Copies each lane so many times. Returns how long that took. */
static uint64_t copy(struct measuring *m, uint32_t passes) {
    uint32_t done[LANES_MAX];
    uint32_t pass[LANES_MAX] = {0};
    uint32_t left = m->lanes * passes;
    uint64_t begin_ns = now_ns();
    for (uint32_t lane = 0; lane < m->lanes; lane++) {
        submit(m, lane, 0);
    }
    while (left > 0) {
        uint32_t seen = kvt_bell_rings(&m->bell);
        uint32_t count = kvt_pool_collect(m->pool, done, m->lanes);
        left -= count;
        for (uint32_t i = 0; i < count; i++) {
            if (++pass[done[i]] < passes) {
                submit(m, done[i], pass[done[i]]);
            }
        }
        if (count == 0) {
            kvt_bell_wait(&m->bell, seen, KVT_FUTEX_FOREVER);
        }
    }
    return now_ns() - begin_ns;
}

static int measure(struct measuring *m, uint32_t threads, struct kvt_link *out, char *text) {
    int rc = kvt_pool_create(threads, &m->bell, &m->pool);
    if (rc != 0) {
        snprintf(text, KVT_TEXT_BYTES, "device cpu: threads that measure: %s", kvt_error_text(rc));
        return rc;
    }
    uint64_t best_ns = UINT64_MAX;
    copy(m, 1); /* finds what was zeroed just now in the caches */
    for (int turn = 0; turn < TURNS; turn++) {
        uint64_t took_ns = copy(m, PASSES) + 1;
        best_ns = took_ns < best_ns ? took_ns : best_ns;
    }
    kvt_pool_free(m->pool);
    uint64_t bytes_per_s = m->lanes * PASSES * HALF_BYTES * 1000000000 / best_ns;
    *out = (struct kvt_link){.to_bytes_per_s = bytes_per_s, .from_bytes_per_s = bytes_per_s};
    return 0;
}

int kvt_cpu_measure(struct kvt_extents *e, uint64_t budget_bytes, uint32_t threads,
                    struct kvt_link *out, char *text) {
    char ignored[KVT_TEXT_BYTES];
    uint64_t fit = budget_bytes / LANE_BYTES;
    uint32_t wanted = threads < LANES_MIN ? LANES_MIN : threads < LANES_MAX ? threads : LANES_MAX;
    struct measuring m = {.lanes = fit < wanted ? (uint32_t)fit : wanted};
    uint64_t bytes = m.lanes * LANE_BYTES;
    int fd = -1;
    if (m.lanes == 0) {
        *out = (struct kvt_link){0};
        return 0;
    }
    int rc = kvt_extents_add(e, EXTENT, bytes, &fd, text);
    if (rc != 0) {
        return rc;
    }
    close(fd);
    m.memory = kvt_extents_pin(e, EXTENT, 0, bytes);
    KVT_ASSERT(m.memory != NULL);
    rc = measure(&m, threads, out, text);
    kvt_extents_unpin(e, EXTENT);
    int removed = kvt_extents_remove(e, EXTENT, rc == 0 ? text : ignored);
    return rc != 0 ? rc : removed;
}
