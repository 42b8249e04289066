/* A device and workers that are processes of their own, over a shared control page and the
 * extent's memory: every byte of every piece is checked on both sides, with a copy thread that
 * spins, one that always sleeps, and one that has no FUTEX_WAITV; and next to a worker that writes
 * garbage over its control page or dies.
 */
/* test: timeout_s=120 */
#include "tests/support/cunit_run.h"
#include "tests/support/device_rig.h"
#include "tiers/device/counter.h"
#include "tiers/host/futex.h"

#include <CUnit/Basic.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t next_random(uint64_t *state) {
    *state = *state * UINT64_C(6364136223846793005) + 1442695040888963407;
    return *state >> 33;
}

static void scramble(uint8_t *p, uint64_t bytes, uint64_t seed) {
    for (uint64_t i = 0; i < bytes; i++) {
        p[i] = (uint8_t)next_random(&seed);
    }
}

static uint8_t appended_byte(uint32_t piece, uint64_t at) {
    return (uint8_t)(piece * 31 + at * 7 + 1);
}

/* The worker's side of a stream. Returns how many pieces were not what they should be. */
static uint32_t attend(const struct kvt_rig_stream *s, struct kvt_control_page *page,
                       uint8_t *slots, const uint8_t *arena, uint32_t spin_us) {
    uint32_t wrong = 0;
    for (uint32_t i = 0; i < s->pieces; i++) {
        uint32_t slot = i % s->slots;
        uint8_t *place = slots + slot * kvt_rig_slot_bytes(s);
        kvt_rig_counter_wait(&page->ready[slot], KVT_RIG_GENERATION(s, i), spin_us);
        wrong += page->ready[slot].value != KVT_RIG_GENERATION(s, i);
        wrong += memcmp(place, arena + i % s->distinct * s->piece_bytes, s->piece_bytes) != 0;
        for (uint64_t b = 0; b < s->append_bytes; b++) {
            place[s->piece_bytes + b] = appended_byte(i, b);
        }
        kvt_counter_post(&page->done[slot], KVT_RIG_GENERATION(s, i));
    }
    kvt_counter_post(&page->step, 1);
    return wrong;
}

static uint32_t wrong_appends(const struct kvt_rig_stream *s, const uint8_t *arena) {
    uint32_t wrong = 0;
    for (uint32_t i = 0; i < s->pieces; i++) {
        const uint8_t *appended = arena + s->append_offset + i * s->append_bytes;
        for (uint64_t b = 0; b < s->append_bytes; b++) {
            wrong += appended[b] != appended_byte(i, b);
        }
    }
    return wrong;
}

static void take_completions(struct kvt_rig *r, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        struct kvt_device_event e = kvt_rig_event(r);
        CU_ASSERT_EQUAL_FATAL(e.kind, KVT_DEVICE_COMPLETION);
        CU_ASSERT_EQUAL(e.completion.status, KVT_DONE);
    }
}

static void stream(const struct kvt_rig_config *config, const struct kvt_rig_stream *s,
                   uint32_t worker_spin_us) {
    struct kvt_rig r;
    kvt_rig_start(&r, config);
    struct kvt_control_page *page = kvt_rig_page();
    uint8_t *slots =
        kvt_rig_extent(&r, s->extent, (s->slots * kvt_rig_slot_bytes(s) + 4095) / 4096 * 4096);
    scramble(r.arena, s->distinct * s->piece_bytes, 11);
    pid_t pid = fork();
    CU_ASSERT_TRUE_FATAL(pid >= 0);
    if (pid == 0) {
        _exit(attend(s, page, slots, r.arena, worker_spin_us) == 0 ? 0 : 1);
    }
    kvt_rig_open(&r, s->session, page);
    kvt_rig_submit(&r, kvt_rig_stream_program(s));
    take_completions(&r, KVT_RIG_STREAM_OPS(s));
    int status = -1;
    CU_ASSERT_EQUAL(waitpid(pid, &status, 0), pid);
    CU_ASSERT_EQUAL(status, 0);
    CU_ASSERT_EQUAL(wrong_appends(s, r.arena), 0);
    CU_ASSERT_EQUAL(kvt_rig_close(&r, s->session), 0);
    munmap(slots, (s->slots * kvt_rig_slot_bytes(s) + 4095) / 4096 * 4096);
    kvt_rig_page_free(page);
    kvt_rig_stop(&r);
}

static const struct kvt_rig_stream tiny = {.session = 1,
                                           .extent = 4,
                                           .slots = 3,
                                           .pieces = 20000,
                                           .distinct = 7,
                                           .piece_bytes = 1000,
                                           .append_bytes = 24,
                                           .append_offset = 1 << 20};

static const struct kvt_rig_config small = {
    .ops = &kvt_cpu_driver_ops, .arena_bytes = 8 << 20, .budget_bytes = 1 << 20, .copy_threads = 1};

static void test_tiny_pieces_spinning(void) {
    struct kvt_rig_config c = small;
    c.spin_us = 50;
    stream(&c, &tiny, 50);
}

/* A wake-up that is lost hangs here until the copy thread's patience ends (0.1 s), and the test's
 * time limit would not hold 20,000 of them. */
static void test_tiny_pieces_sleeping(void) {
    stream(&small, &tiny, 0);
}

static void test_tiny_pieces_one_slot(void) {
    struct kvt_rig_stream s = tiny;
    s.slots = 1;
    stream(&small, &s, 0);
}

static void test_tiny_pieces_without_waitv(void) {
    struct kvt_rig_stream s = tiny;
    s.pieces = 2000;
    kvt_futex_forbid_waitv(true);
    stream(&small, &s, 0);
    kvt_futex_forbid_waitv(false);
}

/* Cut by the issuer, shared by the pool's threads, with an append that is handed over too. */
static void test_large_pieces(void) {
    static const struct kvt_rig_stream s = {.session = 0,
                                            .extent = 1,
                                            .slots = 3,
                                            .pieces = 60,
                                            .distinct = 2,
                                            .piece_bytes = (3 << 20) + 123,
                                            .append_bytes = 100001,
                                            .append_offset = 8 << 20};
    static const struct kvt_rig_config c = {.ops = &kvt_cpu_driver_ops,
                                            .arena_bytes = 16 << 20,
                                            .budget_bytes = 16 << 20,
                                            .cut_bytes = 1 << 20,
                                            .copy_threads = 2,
                                            .spin_us = 20};
    stream(&c, &s, 20);
}

/* ---- bad neighbours ---------------------------------------------------------------------------- */

static void scribble(struct kvt_control_page *page, uint64_t seed) {
    uint32_t *words = (uint32_t *)page;
    for (;;) {
        uint64_t at = next_random(&seed) % (KVT_CONTROL_PAGE_BYTES / 4);
        __atomic_store_n(&words[at], (uint32_t)next_random(&seed), __ATOMIC_RELAXED);
    }
}

/* Session 1 works; session 2's worker writes garbage over its own page all the while; session 3's
 * never answers and is killed. The first one notices nothing, and the others can be closed. */
static void test_bad_neighbours(void) {
    struct kvt_rig r;
    struct kvt_rig_config config = small;
    struct kvt_rig_stream s = tiny;
    config.budget_bytes = 4 << 20;
    s.pieces = 3000;
    kvt_rig_start(&r, &config);
    struct kvt_control_page *pages[4];
    uint8_t *slots[4];
    for (uint32_t i = 1; i < 4; i++) {
        pages[i] = kvt_rig_page();
        slots[i] = kvt_rig_extent(&r, i, 4096);
        kvt_rig_open(&r, i, pages[i]);
    }
    scramble(r.arena, s.distinct * s.piece_bytes, 5);
    pid_t pids[4];
    for (uint32_t i = 1; i < 4; i++) {
        s.session = s.extent = i;
        pids[i] = fork();
        CU_ASSERT_TRUE_FATAL(pids[i] >= 0);
        if (pids[i] == 0) {
            if (i == 1) {
                _exit(attend(&s, pages[1], slots[1], r.arena, 0) == 0 ? 0 : 1);
            } else if (i == 2) {
                scribble(pages[2], 99);
            }
            for (;;) {
                pause();
            }
        }
    }
    for (uint32_t i = 1; i < 4; i++) {
        s.session = s.extent = i;
        s.append_offset = (uint64_t)i << 20;
        kvt_rig_submit(&r, kvt_rig_stream_program(&s));
    }
    uint32_t done[4] = {0};
    while (done[1] < KVT_RIG_STREAM_OPS(&s)) {
        struct kvt_device_event e = kvt_rig_event(&r);
        CU_ASSERT_EQUAL_FATAL(e.kind, KVT_DEVICE_COMPLETION);
        done[e.session]++;
    }
    int status = -1;
    CU_ASSERT_EQUAL(waitpid(pids[1], &status, 0), pids[1]);
    CU_ASSERT_EQUAL(status, 0);
    s.append_offset = 1 << 20;
    CU_ASSERT_EQUAL(wrong_appends(&s, r.arena), 0);
    kill(pids[3], SIGKILL);
    waitpid(pids[3], &status, 0);
    done[3] += kvt_rig_close(&r, 3); /* while session 2's worker still scribbles */
    CU_ASSERT_EQUAL(done[3], KVT_RIG_STREAM_OPS(&s));
    kill(pids[2], SIGKILL);
    waitpid(pids[2], &status, 0);
    done[2] += kvt_rig_close(&r, 2);
    CU_ASSERT_EQUAL(done[2], KVT_RIG_STREAM_OPS(&s)); /* each had its one completion */
    CU_ASSERT_EQUAL(kvt_rig_close(&r, 1), 0);
    for (uint32_t i = 1; i < 4; i++) {
        kvt_rig_extent_destroy(&r, i);
        munmap(slots[i], 4096);
        kvt_rig_page_free(pages[i]);
    }
    kvt_rig_stop(&r);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"tiny pieces, spinning", test_tiny_pieces_spinning},
        {"tiny pieces, sleeping", test_tiny_pieces_sleeping},
        {"tiny pieces, one slot", test_tiny_pieces_one_slot},
        {"tiny pieces, without FUTEX_WAITV", test_tiny_pieces_without_waitv},
        {"large pieces", test_large_pieces},
        {"bad neighbours", test_bad_neighbours},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("device and worker", tests);
}
