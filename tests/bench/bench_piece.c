/* What a piece costs when nothing is computed and nearly nothing copied: the worker posts `done`,
 * the device writes 64 bytes back, fills 64 bytes, posts `ready`, and the worker sees it. Beside it,
 * in pairs: a round trip between the same two cores with nothing but futexes. "asleep" is the same
 * piece when neither side looks again before it sleeps, as after a long wait: that is what the
 * kernel's wake-ups cost, and to be compared with the bare futex.
 *
 * The worker is a process on the last core, the device with its threads and the thread that takes
 * its events is on the first. With one core both share it. Prints one line of JSON.
 */
#include "client/lib/counter.h"
#include "tests/bench/stats.h"
#include "tests/support/device_rig.h"
#include "tiers/device/counter.h"
#include "tiers/host/futex.h"

#include <sched.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAIRS = 21, PIECES = 2000, TRIPS = 2000, EXTENT = 1, SLOT_BYTES = 64 };
#define GOAL_US 10.0

struct shared {
    uint32_t ping __attribute__((aligned(64)));
    uint32_t pong __attribute__((aligned(64)));
    double pieces_us[PAIRS];
    double asleep_us[PAIRS];
    double trips_us[PAIRS];
};

static struct shared *shared;
static struct kvt_control_page *pages[2 * PAIRS]; /* by session */
static struct kvt_rig spinning;
static struct kvt_rig sleeping;

static void pin_to(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    (void)sched_setaffinity(0, sizeof(set), &set);
}

/* ---- the bare futex ---------------------------------------------------------------------------- */

static void say(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
    kvt_futex_wake(word, 1, true);
}

static void hear(uint32_t *word, uint32_t value) {
    uint32_t seen;
    while ((seen = __atomic_load_n(word, __ATOMIC_SEQ_CST)) != value) {
        kvt_futex_wait(word, seen, KVT_FUTEX_FOREVER, true);
    }
}

static void trips_first(int pair) {
    for (uint32_t i = 1; i <= TRIPS; i++) {
        say(&shared->ping, (uint32_t)pair * TRIPS + i);
        hear(&shared->pong, (uint32_t)pair * TRIPS + i);
    }
}

static void trips_second(int pair) {
    double begin = 0;
    for (uint32_t i = 1; i <= TRIPS; i++) {
        hear(&shared->ping, (uint32_t)pair * TRIPS + i);
        begin = i == 1 ? kvt_bench_now_s() : begin;
        say(&shared->pong, (uint32_t)pair * TRIPS + i);
    }
    shared->trips_us[pair] = (kvt_bench_now_s() - begin) / (TRIPS - 1) * 1e6;
}

/* ---- pieces ------------------------------------------------------------------------------------ */

static int never(void *unused) {
    (void)unused;
    return 0;
}

static double attend(struct kvt_control_page *page, bool spins) {
    struct kvt_client_spin spin = {0};
    double begin = 0;
    for (uint64_t g = 1; g <= PIECES; g++) {
        if (spins) {
            (void)kvt_client_counter_wait(&page->ready[0], g, &spin, never, NULL);
        } else {
            kvt_rig_counter_wait(&page->ready[0], g, 0);
        }
        begin = g == 1 ? kvt_bench_now_s() : begin;
        kvt_client_counter_post(&page->done[0], g);
    }
    kvt_client_counter_post(&page->step, 1);
    return (kvt_bench_now_s() - begin) / (PIECES - 1) * 1e6;
}

static void serve(struct kvt_rig *r, uint32_t session) {
    struct kvt_rig_stream s = {.session = session,
                               .extent = EXTENT,
                               .slots = 1,
                               .pieces = PIECES,
                               .distinct = 16,
                               .piece_bytes = SLOT_BYTES,
                               .append_bytes = SLOT_BYTES,
                               .append_offset = 4096};
    kvt_rig_open(r, session, pages[session]);
    kvt_rig_submit(r, kvt_rig_stream_program(&s));
    for (uint32_t i = 0; i < KVT_RIG_STREAM_OPS(&s); i++) {
        (void)kvt_rig_event(r);
    }
    (void)kvt_rig_close(r, session);
}

static void run_worker(void) {
    for (int pair = 0; pair < PAIRS; pair++) {
        if (pair % 2 == 0) {
            trips_second(pair);
        }
        shared->pieces_us[pair] = attend(pages[2 * pair], true);
        shared->asleep_us[pair] = attend(pages[2 * pair + 1], false);
        if (pair % 2 == 1) {
            trips_second(pair);
        }
    }
}

static void run_daemon(void) {
    for (int pair = 0; pair < PAIRS; pair++) {
        if (pair % 2 == 0) {
            trips_first(pair);
        }
        serve(&spinning, 2 * (uint32_t)pair);
        serve(&sleeping, 2 * (uint32_t)pair + 1);
        if (pair % 2 == 1) {
            trips_first(pair);
        }
    }
}

static uint8_t *start(struct kvt_rig *r, uint32_t spin_us) {
    kvt_rig_start(r, &(struct kvt_rig_config){.ops = &kvt_cpu_driver_ops,
                                              .arena_bytes = 1 << 20,
                                              .budget_bytes = 1 << 20,
                                              .copy_threads = 1,
                                              .sessions_max = 2 * PAIRS,
                                              .inflight_max = 4,
                                              .spin_us = spin_us});
    return kvt_rig_extent(r, EXTENT, 4096);
}

static void stop(struct kvt_rig *r, uint8_t *slots) {
    munmap(slots, 4096);
    kvt_rig_stop(r);
}

int main(void) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) {
        return 1;
    }
    for (int i = 0; i < 2 * PAIRS; i++) {
        pages[i] = kvt_rig_page();
    }
    pid_t worker = fork();
    if (worker == 0) {
        pin_to((int)cores - 1);
        run_worker();
        _exit(0);
    }
    pin_to(0);
    uint8_t *slots_spinning = start(&spinning, 20);
    uint8_t *slots_sleeping = start(&sleeping, 0);
    run_daemon();
    waitpid(worker, NULL, 0);
    stop(&spinning, slots_spinning);
    stop(&sleeping, slots_sleeping);

    double ratios[PAIRS];
    double asleep_ratios[PAIRS];
    for (int i = 0; i < PAIRS; i++) {
        ratios[i] = shared->pieces_us[i] / shared->trips_us[i];
        asleep_ratios[i] = shared->asleep_us[i] / shared->trips_us[i];
    }
    struct kvt_interval ours = kvt_median_interval(shared->pieces_us, PAIRS);
    struct kvt_interval peer = kvt_median_interval(shared->trips_us, PAIRS);
    struct kvt_interval ratio = kvt_median_interval(ratios, PAIRS);
    printf(
        "{\"bench\": \"piece\", \"unit\": \"us\", \"peer\": \"futex ping-pong\", \"pairs\": %d, ",
        PAIRS);
    kvt_interval_print("ours", ours);
    printf(", ");
    kvt_interval_print("theirs", peer);
    printf(", ");
    kvt_interval_print("ratio", ratio);
    printf(", ");
    kvt_interval_print("asleep", kvt_median_interval(shared->asleep_us, PAIRS));
    printf(", ");
    kvt_interval_print("asleep_ratio", kvt_median_interval(asleep_ratios, PAIRS));
    printf(", \"goal\": \"ours below %.0f us\", \"met\": %s}\n", GOAL_US,
           ours.low < GOAL_US ? "true" : "false");
    return 0;
}
