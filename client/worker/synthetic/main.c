/* kvtier-synth: a worker without a model that checks every byte. man/kvtier-synth.1 */
#include "client/output.h"
#include "client/worker/synthetic/synth.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now_s(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int attach(struct kvt_synth *s) {
    struct kvt_attach_options a = {
        .runtime_dir = s->o->runtime_dir,
        .worker = s->o->dense ? KVT_DENSE : KVT_SEGMENT,
        .name = s->o->name,
        .device = s->o->has_device ? s->o->device : NULL,
        .device_kind = (int)s->o->device_kind,
        .stream = s->gpu != NULL ? kvt_synth_gpu_stream(s->gpu) : NULL,
        .timeout_ms = s->o->re_attach ? 20000 : 0,
    };
    int rc = kvt_attach(&a, &s->client);
    s->totals.attached += rc == 0;
    return rc;
}

/* The stream ends, whatever is on it: what it reads goes away next. */
static void forget(struct kvt_synth *s) {
    struct kvt_synth_gpu_found ignored;
    if (s->gpu != NULL) {
        (void)kvt_synth_gpu_sync(s->gpu, &ignored);
    }
    kvt_synth_forget(s);
}

static void complain(const struct kvt_synth *s, int rc) {
    (void)fprintf(stderr, "kvtier-synth: %s: %s\n", kvt_error_name(rc),
                  kvt_error_message(s->client));
}

/* Rounds until there were enough. */
static int work(struct kvt_synth *s) {
    double end_s = now_s() + (double)s->o->seconds;
    int rc = attach(s);
    uint64_t rounds = (uint64_t)s->o->rounds;
    while (rc == 0 && (s->totals.rounds < rounds || (s->o->seconds > 0 && now_s() < end_s))) {
        rc = kvt_synth_round(s);
        if (rc == -KVT_EGONE && s->o->re_attach) {
            complain(s, rc);
            forget(s);
            kvt_detach(s->client);
            rc = attach(s);
        }
    }
    return rc;
}

#define FIELD(name) \
    { #name, offsetof(struct kvt_synth_totals, name) }

#define SLOW_STEPS  5
#define MOVED_STEPS 32

/* The slowest steps, and whether a STEP was asked for before each. `t` is sorted. */
static void report_slow(const struct kvt_synth_samples *t) {
    (void)printf(", \"slow_steps\": [");
    for (uint32_t i = 0; i < SLOW_STEPS && i < t->count; i++) {
        const struct kvt_synth_sample *p = &t->list[t->count - 1 - i];
        (void)printf("%s{\"step\": %u, \"us\": %.1f, \"first\": %s}", i > 0 ? ", " : "", p->index,
                     p->us, p->first ? "true" : "false");
    }
    (void)printf("]");
}

/* The nearest first step of a schedule that moved nothing, rather behind `at`; NULL: there is none. */
static const struct kvt_synth_sample *beside(const struct kvt_synth_samples *t, uint32_t at) {
    const struct kvt_synth_sample *found = NULL;
    for (uint32_t i = 0; i < t->count && (i < at || found == NULL || found->index < at); i++) {
        const struct kvt_synth_sample *p = &t->list[i];
        if (p->first && p->moved_bytes == 0) {
            found = p;
        }
    }
    return found;
}

/* First steps of schedules that moved planes, each beside one of a schedule that did not. `t` is in
 * the order of the steps. */
static void report_moves(const struct kvt_synth_samples *t) {
    const char *comma = "";
    uint32_t listed = 0;
    (void)printf(", \"moved_steps\": [");
    for (uint32_t i = 0; i < t->count && listed < MOVED_STEPS; i++) {
        const struct kvt_synth_sample *p = &t->list[i];
        const struct kvt_synth_sample *other = p->moved_bytes > 0 ? beside(t, i) : NULL;
        if (other != NULL) {
            (void)printf("%s{\"step\": %u, \"bytes\": %" PRIu64
                         ", \"us\": %.1f, \"begin_us\": %.1f, "
                         "\"beside_us\": %.1f, \"beside_begin_us\": %.1f}",
                         comma, p->index, p->moved_bytes, p->us, p->begin_us, other->us,
                         other->begin_us);
            comma = ", ";
            listed++;
        }
    }
    (void)printf("]");
}

/* Of the generation's calls, whose order nobody asks for any more. */
static void report_calls(const char *name, struct kvt_synth_samples *calls) {
    struct kvt_synth_summary t;
    kvt_synth_samples_sum_up(calls, &t);
    (void)printf(", \"%s\": %.2f, \"%s_p99\": %.2f, \"%s_mean\": %.2f", name, t.p50_us, name,
                 t.p99_us, name, t.mean_us);
}

static void report_gpu(struct kvt_synth *s) {
    struct kvt_synth_samples *times = kvt_synth_gpu_times(s->gpu);
    struct kvt_synth_summary t;
    report_moves(times);
    kvt_synth_samples_sum_up(times, &t);
    (void)printf(", \"steps_timed\": %u, \"schedules_timed\": %u, \"step_us\": %.1f, "
                 "\"step_us_p10\": %.1f, "
                 "\"step_us_p90\": %.1f, \"step_us_p99\": %.1f, \"step_us_max\": %.1f, "
                 "\"step_us_mean\": %.1f",
                 t.count, s->calls.begins.count, t.p50_us, t.p10_us, t.p90_us, t.p99_us, t.max_us,
                 t.mean_us);
    report_slow(times);
    report_calls("host_us_layer", &s->calls.layers);
    report_calls("host_us_end", &s->calls.ends);
    report_calls("host_us_begin", &s->calls.begins);
    if (s->bare_before_us > 0 && s->bare_after_us > 0) {
        (void)printf(", \"bare_us_before\": %.1f, \"bare_us_after\": %.1f, \"bare_us\": %.1f",
                     s->bare_before_us, s->bare_after_us,
                     (s->bare_before_us + s->bare_after_us) / 2);
    }
    if (s->limit_bytes > 0) {
        double limit_us = (s->limit_before_s + s->limit_after_s) / 2 * 1e6;
        (void)printf(", \"limit_bytes\": %" PRIu64 ", \"limit_us_before\": %.1f, "
                     "\"limit_us_after\": %.1f, \"limit_gb_s\": %.2f, \"ratio\": %.4f, "
                     "\"moved_bytes_step\": %" PRIu64,
                     s->limit_bytes, s->limit_before_s * 1e6, s->limit_after_s * 1e6,
                     (double)s->limit_bytes / limit_us / 1e3, t.p50_us / limit_us,
                     s->moved_steps > 0 ? s->moved_bytes / s->moved_steps : 0);
    }
}

static void report(struct kvt_synth *s, int rc, double elapsed_s) {
    static const struct {
        const char *name;
        size_t offset;
    } fields[] = {FIELD(tokens),
                  FIELD(steps),
                  FIELD(schedules),
                  FIELD(pieces),
                  FIELD(streamed_pieces),
                  FIELD(bytes_checked),
                  FIELD(bytes_written),
                  FIELD(errors),
                  FIELD(aborts),
                  FIELD(failed_steps),
                  FIELD(edits),
                  FIELD(forks),
                  FIELD(caches),
                  FIELD(rounds),
                  FIELD(attached),
                  FIELD(wait_us),
                  FIELD(address_changes),
                  FIELD(to_device_bytes),
                  FIELD(from_device_bytes),
                  FIELD(prefetch_discarded_bytes),
                  FIELD(migrated_bytes),
                  FIELD(copied_on_write_bytes),
                  FIELD(planes_moved_bytes),
                  FIELD(steps_committed),
                  FIELD(need_to_device_bytes),
                  FIELD(need_from_device_bytes),
                  FIELD(device_bytes),
                  FIELD(host_bytes)};
    s->totals.wait_us = s->calls.wait_ns / 1000;
    (void)printf("{\"result\": \"%s\", \"worker\": \"%s\", \"seed\": %" PRId64,
                 rc == KVT_SYNTH_FOUND_WRONG ? "wrong" : kvt_error_name(rc),
                 s->o->dense ? "dense" : "segment", s->o->seed);
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        uint64_t value;
        memcpy(&value, (const char *)&s->totals + fields[i].offset, sizeof value);
        (void)printf(", \"%s\": %" PRIu64, fields[i].name, value);
    }
    if (s->gpu != NULL) {
        report_gpu(s);
    }
    (void)printf(", \"layers\": \"%s\", \"elapsed_s\": %.3f}\n", s->totals.layers, elapsed_s);
}

/* The exit status: a report that nobody can read is no success. */
static int end(int status) {
    const char *why = kvt_output_failed();
    if (why != NULL) {
        (void)fprintf(stderr, "kvtier-synth: the output cannot be written: %s\n", why);
    }
    return why != NULL && status == KVT_SYNTH_OK ? KVT_SYNTH_ERROR : status;
}

int main(int argc, char **argv) {
    static struct kvt_synth s;
    struct kvt_synth_options o;
    int status = kvt_synth_options_parse(&o, argc, argv);
    if (status >= 0) {
        return end(status);
    }
    s.o = &o;
    s.random.state = (uint64_t)o.seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
    double start_s = now_s();
    int rc = kvt_synth_layout(&s);
    if (rc == 0 && o.device_kind == KVT_DEVICE_CUDA) {
        rc = kvt_synth_gpu_open(o.has_device ? o.device : NULL, &s.gpu);
        if (rc != 0) {
            return KVT_SYNTH_ERROR; /* it has said why */
        }
    }
    if (rc == 0) {
        rc = work(&s);
    }
    if (rc < 0) {
        complain(&s, rc);
    }
    report(&s, rc, now_s() - start_s);
    forget(&s);
    kvt_detach(s.client);
    kvt_synth_gpu_close(s.gpu);
    kvt_synth_samples_free(&s.calls.layers);
    kvt_synth_samples_free(&s.calls.ends);
    kvt_synth_samples_free(&s.calls.begins);
    free(s.layers);
    free(s.address);
    return end(rc == 0                       ? KVT_SYNTH_OK
               : rc == KVT_SYNTH_FOUND_WRONG ? KVT_SYNTH_WRONG
                                             : KVT_SYNTH_ERROR);
}
