/* kvtier-sim: runs seeds, replays one, or leaves rules out one at a time and counts the seeds until
 * that is noticed. Wall time is looked at here only, between runs.
 */
#include "tests/sim/sim.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long long ull;

static const char *const rule_names[KVT_BREAK_RULES_COUNT] = {
    "fill-ignores-done",
    "fill-ignores-writeback",
    "post-before-copy",
    "writeback-ignores-done",
    "commit-ignores-step",
    "commit-ignores-writeback",
    "keep-stale-prefetch",
    "no-copy-on-write",
    "full-block-rewritten",
    "abort-no-drain",
    "abort-ignores-step",
    "failed-step-commits",
    "free-before-step",
    "reader-releases-slot",
    "free-before-death",
    "free-before-drain",
    "no-reclaim",
    "schedule-overwritten",
    "requests-overtake",
    "flip-before-copy",
    "plane-freed-under-referrer",
    "crop-keeps-length",
    "last-first",
    "decode-last",
    "gather-overtakes",
    "wait-for-ever",
    "resident-not-nested",
    "static-slots-wander",
    "static-planes-wander",
    "prefetch-unused",
    "limit-ignored",
    "limit-takes-from-others",
    "prefill-starves",
    "static-not-returned",
    "static-returns-empty",
    "prefill-fills-link",
};

/* What the device may lie about, as enum sim_lie. */
static const char *const lie_names[] = {
    "",
    "device-flips-a-fill",
    "device-tears-a-fill",
    "device-flips-a-write-back",
    "device-flips-a-copy",
};

enum {
    SEED_SECONDS_MAX = 60,
    BROKEN_SECONDS_MAX = 10,
    LIES_COUNT = sizeof(lie_names) / sizeof(lie_names[0])
};

static struct sim sim;

static void usage(FILE *to) {
    (void)fprintf(to,
                  "usage: kvtier-sim [options]\n"
                  "  --seed N       run this seed only\n"
                  "  --seconds S    run fresh seeds, one after another, for so long\n"
                  "  --from N       --seconds, --count, --break-all: the first seed\n"
                  "  --count N      run N seeds; with --break-all: seeds a rule at most\n"
                  "  --replay FILE  first the seeds of this file, one at the start of each line\n"
                  "  --steps M      steps that a run asks for (default: 5 to 60, by the seed)\n"
                  "  --trace        print everything that happens\n"
                  "  --break RULE   leave a rule out (a name or its number)\n"
                  "  --break-all    leave each rule out in turn until a seed notices\n"
                  "  --world N      1 rough, 2 plain (no faults, no edits), 3 steady\n"
                  "  --lie N        the device says that a copy succeeded, and its bytes are\n"
                  "                 wrong: 1, 2 a fill, 3 a write-back, 4 another copy\n"
                  "  --lies N       tell each lie in N plain seeds: how many are noticed\n"
                  "--break needs a build with VARIANT=mutant\n");
}

/* ---- one seed -------------------------------------------------------------------------------- */

static void add_stats(struct sim_stats *total, const struct sim_stats *one) {
    total->seeds += one->seeds;
    total->events += one->events;
    total->requests += one->requests;
    total->refused += one->refused;
    total->steps_committed += one->steps_committed;
    total->steps_failed += one->steps_failed;
    total->moves += one->moves;
    total->vacated += one->vacated;
    total->copies += one->copies;
    total->copied_bytes += one->copied_bytes;
    total->checked_bytes += one->checked_bytes;
    total->sessions += one->sessions;
    total->virtual_us += one->virtual_us;
    total->migrated_bytes += one->migrated_bytes;
    total->compacted_bytes += one->compacted_bytes;
    total->copied_on_write_bytes += one->copied_on_write_bytes;
    total->discarded_bytes += one->discarded_bytes;
    total->steady_steps += one->steady_steps;
    for (uint32_t f = 0; f < SIM_FAULT_COUNT; f++) {
        total->faults[f] += one->faults[f];
    }
}

static void print_stats(const struct sim_stats *s) {
    ull faults = 0;
    for (uint32_t f = 0; f < SIM_FAULT_COUNT; f++) {
        faults += s->faults[f];
    }
    printf("sim: %llu seeds, %llu events, %.1f virtual seconds, %llu workers, %llu requests "
           "(%llu refused for want of memory)\n",
           (ull)s->seeds, (ull)s->events, (double)s->virtual_us / 1e6, (ull)s->sessions,
           (ull)s->requests, (ull)s->refused);
    printf("sim: %llu steps committed, %llu schedules failed, %llu moves, %llu copies of %.1f MB, "
           "%.1f MB checked; %.1f MB migrated, %.1f MB compacted, %llu extents vacated, "
           "%.1f MB copied on write, %.1f MB of prefetch discarded; %llu schedules of steady "
           "worlds took the minimum\n",
           (ull)s->steps_committed, (ull)s->steps_failed, (ull)s->moves, (ull)s->copies,
           (double)s->copied_bytes / 1e6, (double)s->checked_bytes / 1e6,
           (double)s->migrated_bytes / 1e6, (double)s->compacted_bytes / 1e6, (ull)s->vacated,
           (double)s->copied_on_write_bytes / 1e6, (double)s->discarded_bytes / 1e6,
           (ull)s->steady_steps);
    printf("sim: %llu injected faults", faults);
    const char *comma = ": ";
    for (uint32_t f = 0; f < SIM_FAULT_COUNT; f++) {
        if (s->faults[f] != 0) {
            printf("%s%llu %s", comma, (ull)s->faults[f], sim_fault_name(f));
            comma = ", ";
        }
    }
    printf("\n");
}

/* A call of the engine that does not return is a failure too. */
static void on_alarm(int signal) {
    char text[96];
    int n = snprintf(text, sizeof(text), "FAILED seed %llu: it ran for more than %d s\n",
                     (ull)sim.options.seed, SEED_SECONDS_MAX);
    ssize_t wrote = write(1, text, (size_t)n);
    _exit(wrote == n ? 1 : 2);
}

/* A failed run leaves the engine as it is: nothing is freed, and the process ends. */
static bool run_seed(const struct sim_options *options, struct sim_stats *total) {
    (void)alarm(SEED_SECONDS_MAX);
    bool ok = sim_run(&sim, options);
    (void)alarm(0);
    add_stats(total, &sim.stats);
    if (!ok) {
        printf("FAILED seed %llu: %s\n", (ull)options->seed, sim.reason);
        sim_dump(&sim);
        printf("replay: make sim SEED=%llu SIM_ARGS=--trace\n", (ull)options->seed);
        return false;
    }
    sim_end(&sim);
    return true;
}

/* Equal seeds give equal traces: whatever is not in the seed must not matter. */
static bool replays(const struct sim_options *options) {
    uint64_t hash = sim.hash;
    struct sim_stats again = {0};
    if (!run_seed(options, &again)) {
        printf("FAILED seed %llu: it failed when it was run again only\n", (ull)options->seed);
        return false;
    }
    if (sim.hash != hash) {
        printf("FAILED seed %llu: trace %016llx, and %016llx when it was run again\n",
               (ull)options->seed, (ull)hash, (ull)sim.hash);
        return false;
    }
    return true;
}

static uint64_t number(const char *text) {
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 0);
    if (end == text || (*end != 0 && *end != ' ') || errno != 0 || strchr(text, '-') != NULL) {
        (void)fprintf(stderr, "kvtier-sim: %s is no number from 0 to %llu\n", text,
                      (ull)UINT64_MAX);
        exit(2);
    }
    return value;
}

static double now_s(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void done(int status) {
    (void)fflush(stdout);
    _exit(status); /* a failed run's memory is not a leak to be told of */
}

static int run_many(struct sim_options *options, uint64_t count, double seconds) {
    struct sim_stats total = {0};
    double end_s = now_s() + seconds;
    for (uint64_t n = 0; count != 0 ? n < count : now_s() < end_s; n++) {
        if (!run_seed(options, &total) || (n % 32 == 0 && !replays(options))) {
            done(1);
        }
        options->seed++;
    }
    print_stats(&total);
    return 0;
}

static int run_one(const struct sim_options *options) {
    struct sim_stats total = {0};
    bool ok = run_seed(options, &total);
    print_stats(&total);
    printf("sim: seed %llu trace %016llx\n", (ull)options->seed, (ull)sim.hash);
    if (!ok) {
        done(1);
    }
    return 0;
}

/* Seeds that once found something. */
static void replay_file(const struct sim_options *options, const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) {
        perror(path);
        exit(2);
    }
    struct sim_options one = *options;
    struct sim_stats total = {0};
    char line[512];
    while (fgets(line, sizeof(line), file)) {
        if (line[0] == '#' || line[0] == '\n') {
            continue;
        }
        one.seed = number(line);
        if (!run_seed(&one, &total)) {
            printf("what it found before: %s", line);
            done(1);
        }
    }
    (void)fclose(file);
    printf("sim: %llu known seeds of %s replayed\n", (ull)total.seeds, path);
}

/* ---- rules left out -------------------------------------------------------------------------- */

enum { NOTICED = 1, LIED = 2, LIE_NAMED = 4 };

/* In a process of its own: without its rules the engine may do anything. `reason` gets what was
 * noticed. Returns whether it was, and whether the device has lied. */
static int outcome(const struct sim_options *options, char *reason, size_t size) {
    int fds[2];
    (void)fflush(stdout);
    if (pipe(fds) != 0) {
        perror("pipe");
        exit(2);
    }
    pid_t child = fork();
    if (child < 0) {
        perror("fork");
        exit(2);
    }
    if (child == 0) {
        (void)signal(SIGALRM, SIG_DFL);
        (void)alarm(BROKEN_SECONDS_MAX);
        bool ok = sim_run(&sim, options);
        ssize_t wrote = ok ? 0 : write(fds[1], sim.reason, strlen(sim.reason));
        _exit((ok && wrote == 0 ? 0 : NOTICED) | (sim.lied ? LIED : 0) |
              (sim.lie_named ? LIE_NAMED : 0));
    }
    (void)close(fds[1]);
    ssize_t n = read(fds[0], reason, size - 1);
    reason[n > 0 ? n : 0] = 0;
    (void)close(fds[0]);
    int status = 0;
    (void)waitpid(child, &status, 0);
    if (WIFSIGNALED(status)) {
        (void)snprintf(reason, size, "%s",
                       WTERMSIG(status) == SIGALRM ? "ran for ever" : "crashed");
    }
    return WIFSIGNALED(status) ? NOTICED : WEXITSTATUS(status);
}

/* Seeds until the simulator notices. Returns whether it did. */
static bool seeds_until(struct sim_options *options, const char *name, uint64_t count,
                        uint64_t *most) {
    uint64_t first = options->seed;
    uint64_t seeds = 0;
    bool found = false;
    char reason[1024];
    for (; !found && seeds < count; options->seed++) {
        seeds++;
        found = (outcome(options, reason, sizeof(reason)) & NOTICED) != 0;
    }
    options->seed = first;
    *most = seeds > *most ? seeds : *most;
    printf("%-28s %6llu  %.120s\n", name, (ull)seeds,
           found ? reason : "NOTHING: the rule is not needed, or the simulator is blind");
    (void)fflush(stdout);
    return found;
}

static int break_all(struct sim_options *options, uint64_t count) {
    uint32_t missed = 0;
    uint64_t most = 0;
    printf("%-28s %6s  %s\n", "left out", "seeds", "what the simulator said");
    for (uint32_t rule = 0; rule < KVT_BREAK_RULES_COUNT; rule++) {
        options->broken_rules = UINT64_C(1) << rule;
        missed += !seeds_until(options, rule_names[rule], count, &most);
    }
    options->broken_rules = 0;
    for (options->lie = 1; options->lie < LIES_COUNT; options->lie++) {
        missed += !seeds_until(options, lie_names[options->lie], count, &most);
    }
    if (missed > 0) {
        printf("FAILED: %u can go unnoticed for %llu seeds\n", missed, (ull)count);
    } else {
        printf("sim: %d rules left out and %d lies of the device, one at a time: each is noticed "
               "after at most %llu seeds\n",
               KVT_BREAK_RULES_COUNT, LIES_COUNT - 1, (ull)most);
    }
    return missed > 0 ? 1 : 0;
}

/* One wrong byte in each run, without faults or edits: what an open schedule names must be noticed.
 * Other bytes may never be read again. */
static int lies(struct sim_options *options, uint64_t count) {
    uint64_t first = options->seed;
    uint64_t blind = 0;
    char reason[1024];
    options->world = SIM_PLAIN;
    printf("%-28s %6s %8s %14s %8s\n", "", "told", "noticed", "surely read", "noticed");
    for (options->lie = 1; options->lie < LIES_COUNT; options->lie++) {
        uint64_t told[4] = {0};
        for (options->seed = first; options->seed < first + count; options->seed++) {
            int how = outcome(options, reason, sizeof(reason));
            told[0] += (how & LIED) != 0;
            told[1] += (how & LIED) != 0 && (how & NOTICED) != 0;
            told[2] += (how & LIE_NAMED) != 0;
            told[3] += (how & LIE_NAMED) != 0 && (how & NOTICED) != 0;
            if ((how & LIE_NAMED) != 0 && (how & NOTICED) == 0) {
                printf("FAILED seed %llu: nobody noticed %s\n", (ull)options->seed,
                       lie_names[options->lie]);
                blind++;
            }
        }
        printf("%-28s %6llu %8llu %14llu %8llu\n", lie_names[options->lie], (ull)told[0],
               (ull)told[1], (ull)told[2], (ull)told[3]);
    }
    return blind > 0 ? 1 : 0;
}

/* ---- options --------------------------------------------------------------------------------- */

static uint64_t rule_bit(const char *text) {
    for (uint32_t i = 0; i < KVT_BREAK_RULES_COUNT; i++) {
        if (strcmp(text, rule_names[i]) == 0) {
            return UINT64_C(1) << i;
        }
    }
    uint64_t rule = number(text);
    if (rule >= KVT_BREAK_RULES_COUNT) {
        (void)fprintf(stderr, "kvtier-sim: no rule %s; there are 0 to %d\n", text,
                      KVT_BREAK_RULES_COUNT - 1);
        exit(2);
    }
    return UINT64_C(1) << rule;
}

static void need_mutants(void) {
#ifndef KVT_MUTANTS
    (void)fprintf(stderr, "kvtier-sim: this build keeps its rules; build with VARIANT=mutant\n");
    exit(2);
#endif
}

int main(int argc, char **argv) {
    static const struct option known[] = {
        {"seed", required_argument, NULL, 's'},  {"seconds", required_argument, NULL, 't'},
        {"from", required_argument, NULL, 'f'},  {"count", required_argument, NULL, 'c'},
        {"steps", required_argument, NULL, 'm'}, {"trace", no_argument, NULL, 'v'},
        {"world", required_argument, NULL, 'w'}, {"lie", required_argument, NULL, 'l'},
        {"lies", required_argument, NULL, 'L'},  {"replay", required_argument, NULL, 'r'},
        {"break", required_argument, NULL, 'b'}, {"break-all", no_argument, NULL, 'a'},
        {"help", no_argument, NULL, 'h'},        {NULL, 0, NULL, 0},
    };
    struct sim_options options = {.seed = (uint64_t)time(NULL) << 20};
    bool one = false;
    bool all = false;
    double seconds = 10;
    uint64_t count = 0;
    uint64_t lies_count = 0;
    const char *known_seeds = NULL;
    int c;
    (void)signal(SIGALRM, on_alarm);
    while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
        switch (c) {
        case 's':
            options.seed = number(optarg);
            one = true;
            break;
        case 't':
            seconds = (double)number(optarg);
            break;
        case 'f':
            options.seed = number(optarg);
            break;
        case 'c':
            count = number(optarg);
            break;
        case 'm':
            options.steps = (uint32_t)number(optarg);
            break;
        case 'v':
            options.trace = true;
            break;
        case 'w':
            options.world = (uint32_t)number(optarg);
            break;
        case 'l':
            options.lie = (uint32_t)number(optarg);
            break;
        case 'r':
            known_seeds = optarg;
            break;
        case 'L':
            lies_count = number(optarg);
            break;
        case 'b':
            need_mutants();
            options.broken_rules |= rule_bit(optarg);
            break;
        case 'a':
            need_mutants();
            all = true;
            break;
        case 'h':
            usage(stdout);
            return 0;
        default:
            usage(stderr);
            return 2;
        }
    }
    if (all) {
        return break_all(&options, count != 0 ? count : 2000);
    }
    if (lies_count != 0) {
        return lies(&options, lies_count);
    }
    if (known_seeds) {
        replay_file(&options, known_seeds);
    }
    return one ? run_one(&options) : run_many(&options, count, seconds);
}
