/* Bytes per second streamed to a worker that computes nothing, through three slots of 16 MiB, over
 * a plain memcpy of the same pieces into the same slots by as many threads. In pairs; prints one
 * line of JSON.
 */
#include "client/lib/counter.h"
#include "tests/bench/plain_copy.h"
#include "tests/support/device_rig.h"
#include "tiers/device/counter.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAIRS = 21, PIECES = 48, SLOTS = 3, DISTINCT = 16, THREADS = 2, EXTENT = 1 };
#define PIECE_BYTES (UINT64_C(16) << 20)
#define GOAL        0.9

static struct kvt_rig rig;
static uint8_t *slots;
static struct kvt_control_page *pages[PAIRS];

static int never(void *unused) {
    (void)unused;
    return 0;
}

static void attend(void) {
    struct kvt_client_spin spin = {0};
    for (int pair = 0; pair < PAIRS; pair++) {
        struct kvt_control_page *page = pages[pair];
        for (uint32_t i = 0; i < PIECES; i++) {
            uint64_t g = i / SLOTS + 1;
            (void)kvt_client_counter_wait(&page->ready[i % SLOTS], g, &spin, never, NULL);
            kvt_client_counter_post(&page->done[i % SLOTS], g);
        }
        kvt_client_counter_post(&page->step, 1);
    }
}

static double streamed(int pair) {
    struct kvt_rig_stream s = {.session = (uint32_t)pair,
                               .extent = EXTENT,
                               .slots = SLOTS,
                               .pieces = PIECES,
                               .distinct = DISTINCT,
                               .piece_bytes = PIECE_BYTES};
    kvt_rig_open(&rig, s.session, pages[pair]);
    double begin = kvt_bench_now_s();
    kvt_rig_submit(&rig, kvt_rig_stream_program(&s));
    for (uint32_t i = 0; i < KVT_RIG_STREAM_OPS(&s); i++) {
        (void)kvt_rig_event(&rig);
    }
    double seconds = kvt_bench_now_s() - begin;
    (void)kvt_rig_close(&rig, s.session);
    return (double)PIECES * (double)PIECE_BYTES / seconds / 1e9;
}

static double plain(void) {
    return kvt_plain_copy_run(&(struct kvt_plain_copy){.source = rig.arena,
                                                       .target = slots,
                                                       .piece_bytes = PIECE_BYTES,
                                                       .pieces = PIECES,
                                                       .distinct = DISTINCT,
                                                       .slots = SLOTS,
                                                       .threads = THREADS});
}

int main(void) {
    double ours[PAIRS];
    double theirs[PAIRS];
    double ratios[PAIRS];
    for (int i = 0; i < PAIRS; i++) {
        pages[i] = kvt_rig_page();
    }
    pid_t worker = fork();
    if (worker == 0) {
        attend();
        _exit(0);
    }
    kvt_rig_start(&rig, &(struct kvt_rig_config){.ops = &kvt_cpu_driver_ops,
                                                 .arena_bytes = DISTINCT * PIECE_BYTES,
                                                 .budget_bytes = SLOTS * PIECE_BYTES,
                                                 .cut_bytes = PIECE_BYTES,
                                                 .copy_threads = THREADS,
                                                 .sessions_max = PAIRS,
                                                 .inflight_max = 4,
                                                 .spin_us = 20});
    slots = kvt_rig_extent(&rig, EXTENT, SLOTS * PIECE_BYTES);
    memset(rig.arena, 1, rig.arena_bytes);
    for (int i = 0; i < PAIRS; i++) {
        theirs[i] = i % 2 == 0 ? plain() : 0;
        ours[i] = streamed(i);
        theirs[i] = i % 2 == 1 ? plain() : theirs[i];
        ratios[i] = ours[i] / theirs[i];
    }
    waitpid(worker, NULL, 0);
    munmap(slots, SLOTS * PIECE_BYTES);
    kvt_rig_stop(&rig);

    printf(
        "{\"bench\": \"copy\", \"unit\": \"GB/s\", \"peer\": \"threaded memcpy\", \"pairs\": %d, ",
        PAIRS);
    kvt_interval_print("ours", kvt_median_interval(ours, PAIRS));
    printf(", ");
    kvt_interval_print("theirs", kvt_median_interval(theirs, PAIRS));
    printf(", ");
    struct kvt_interval ratio = kvt_median_interval(ratios, PAIRS);
    kvt_interval_print("ratio", ratio);
    printf(", \"goal\": \"ratio at least %.1f\", \"met\": %s}\n", GOAL,
           ratio.high >= GOAL ? "true" : "false");
    return 0;
}
