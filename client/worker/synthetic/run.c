/* A round: create, prompt, generate with whatever is to happen at random, close. */
#include "client/worker/synthetic/synth.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BARE_TIMES 50

int kvt_synth_layout(struct kvt_synth *s) {
    const struct kvt_synth_options *o = s->o;
    s->layers = calloc((size_t)o->layers, sizeof *s->layers);
    s->address = calloc((size_t)o->layers, sizeof *s->address);
    if (s->layers == NULL || s->address == NULL) {
        return -KVT_ENOMEM;
    }
    for (int64_t i = 0; i < o->layers; i++) {
        s->layers[i] = (struct kvt_layer_shape){.kind = KVT_KIND_FULL,
                                                .kv_heads = (uint32_t)o->heads,
                                                .k_head_dim = (uint32_t)o->k_dim,
                                                .v_head_dim = (uint32_t)o->v_dim,
                                                .dtype = (uint32_t)o->dtype};
    }
    for (uint32_t i = 0; i < o->shared_count; i++) {
        s->layers[o->shared_layer[i]].last_reader = o->shared_last[i];
    }
    return 0;
}

static int create(struct kvt_synth *s) {
    const struct kvt_synth_options *o = s->o;
    struct kvt_cache_create_options c = {
        .layers = s->layers,
        .layer_count = (uint32_t)o->layers,
        .mode = (uint32_t)o->mode,
        .rows = (uint32_t)o->rows,
        .tokens_max = (uint32_t)o->tokens_max,
        .append_max = (uint32_t)(o->chunk > o->append ? o->chunk : o->append),
        .piece_tokens = (uint32_t)o->piece_tokens,
        .resident_layers_max = o->resident,
        .name = o->name,
    };
    uint32_t id;
    int rc = kvt_cache_create(s->client, &c, &id);
    if (rc == 0) {
        kvt_synth_cache_init(&s->caches[s->cache_count++], id, (uint32_t)o->rows);
        s->totals.caches++;
    }
    return rc;
}

void kvt_synth_forget(struct kvt_synth *s) {
    while (s->cache_count > 0) {
        kvt_synth_cache_free(&s->caches[--s->cache_count]);
    }
}

/* ---- one schedule ----------------------------------------------------------------------------- */

/* Who takes part and with how many tokens; `want` for each unless ragged. No row outgrows
 * tokens_max in `steps` steps. */
static uint32_t choose_rows(struct kvt_synth *s, struct kvt_synth_step *w, uint32_t want,
                            uint32_t steps) {
    struct kvt_synth_cache *c = w->cache;
    uint32_t appended = 0;
    w->row_count = 0;
    for (uint32_t i = 0; i < c->row_count; i++) {
        uint32_t room = ((uint32_t)s->o->tokens_max > c->rows[i].count
                             ? (uint32_t)s->o->tokens_max - c->rows[i].count
                             : 0) /
                        steps;
        uint32_t n = s->o->ragged ? kvt_synth_random_below(&s->random, want + 1) : want;
        bool last = i + 1 == c->row_count && w->row_count == 0;
        /* A dense worker's step names every row. */
        w->takes_part[i] =
            !s->o->ragged || s->o->dense || last || !kvt_synth_random_percent(&s->random, 25);
        w->append[i] = w->takes_part[i] ? (n < room ? n : room) : 0;
        if (w->takes_part[i]) {
            w->rows[w->row_count++] = i;
            appended += w->append[i];
        }
    }
    return appended;
}

/* Undoes the model's part of a step that was not committed. */
static void take_back(struct kvt_synth_step *w) {
    for (uint32_t i = 0; i < w->cache->row_count; i++) {
        kvt_synth_row_crop(&w->cache->rows[i], w->before[i]);
    }
}

/* Steps that had been ended could not be written back, and the daemon has said so: what it has is what
 * there is. */
static void take_lost_back(struct kvt_synth *s, struct kvt_synth_step *w) {
    for (uint32_t i = 0; i < w->cache->row_count; i++) {
        uint32_t has = kvt_step_length(w->step, i);
        if (has < w->cache->rows[i].count) {
            kvt_synth_row_crop(&w->cache->rows[i], has);
        }
    }
    s->totals.failed_steps++;
}

static int begin(struct kvt_synth *s, struct kvt_synth_step *w, uint32_t want, uint32_t steps) {
    struct kvt_step_row rows[KVT_SYNTH_ROWS_MAX];
    for (uint32_t i = 0; i < w->row_count; i++) {
        rows[i] = (struct kvt_step_row){w->rows[i], w->append[w->rows[i]]};
    }
    bool all = !s->o->ragged && w->row_count == w->cache->row_count;
    for (uint32_t i = 0; all && i < w->row_count; i++) {
        all = w->append[i] == want;
    }
    const struct kvt_step_row *some = all ? NULL : rows;
    uint32_t count = all ? 0 : w->row_count;
    uint64_t begin_ns = kvt_synth_now_ns();
    int rc = kvt_step_begin(s->client, w->cache->id, some, count, all ? want : 0, steps, &w->step);
    if (rc == -KVT_EFAILED) {
        w->cache->lost = true;
        rc = kvt_step_begin(s->client, w->cache->id, some, count, all ? want : 0, steps, &w->step);
    }
    kvt_synth_called(s, &s->calls.begins, begin_ns);
    s->begin_us = (double)(kvt_synth_now_ns() - begin_ns) / 1000;
    s->schedule_moved_bytes = 0;
    if (rc == 0 && w->cache->lost) {
        w->cache->lost = false;
        take_lost_back(s, w);
    }
    return rc;
}

/* The daemon's lengths are the model's. */
static int check_lengths(struct kvt_synth *s, const struct kvt_synth_step *w) {
    for (uint32_t i = 0; i < w->cache->row_count; i++) {
        uint32_t has = kvt_step_length(w->step, i);
        if (has != w->cache->rows[i].count) {
            (void)fprintf(stderr,
                          "kvtier-synth: wrong: cache %u row %u has %u tokens for the daemon, %u "
                          "were committed\n",
                          w->cache->id, i, has, w->cache->rows[i].count);
            s->totals.errors++;
            return KVT_SYNTH_FOUND_WRONG;
        }
    }
    return 0;
}

static int one_step(struct kvt_synth *s, struct kvt_synth_step *w) {
    struct kvt_synth_totals *t = &s->totals;
    uint64_t appended = 0;
    int rc = check_lengths(s, w);
    if (s->bare_us != NULL) {
        kvt_synth_gpu_note(s->gpu, true);
    }
    for (uint32_t i = 0; i < w->cache->row_count && rc == 0; i++) {
        w->before[i] = w->cache->rows[i].count;
        kvt_synth_row_append(&w->cache->rows[i], w->append[i], &s->random);
        appended += w->append[i];
        if (s->gpu != NULL) {
            rc = kvt_synth_gpu_row(s->gpu, &w->cache->rows[i], (uint32_t)s->o->tokens_max);
        }
    }
    uint64_t streamed_before = t->streamed_pieces;
    if (rc == 0) {
        rc = kvt_synth_walk(s, w);
    }
    if (rc == 0 && s->bare_us != NULL && t->streamed_pieces == streamed_before) {
        rc = kvt_synth_gpu_again(s->gpu, BARE_TIMES, s->bare_us);
    }
    if (rc == 0 && !w->aborted) {
        uint64_t begin_ns = kvt_synth_now_ns();
        rc = kvt_step_end(w->step);
        kvt_synth_called(s, &s->calls.ends, begin_ns);
    }
    if (rc == 0 && !w->aborted && s->gpu != NULL) {
        rc = kvt_synth_gpu_mark(s->gpu);
    }
    if (rc == 0 && !w->aborted) {
        t->tokens += appended;
        t->steps++;
    }
    return rc;
}

/* Waits for the GPU, and says what it found. What it found in steps that failed says nothing: their
 * pieces were not filled. `lost`: they are known to be lost. */
static int look_at_gpu(struct kvt_synth *s, struct kvt_synth_cache *c, bool lost) {
    struct kvt_synth_gpu_found found;
    int rc = kvt_synth_gpu_sync(s->gpu, &found);
    if (rc != 0 || lost) {
        return rc;
    }
    rc = kvt_cache_check(s->client, c->id);
    if (rc == -KVT_EFAILED) {
        c->lost = true;
        return 0;
    }
    if (rc == 0 && found.wrong > 0) {
        (void)fprintf(stderr, "kvtier-synth: wrong: cache %u, until step %" PRIu64 ": %s\n", c->id,
                      s->steps_begun - 1, found.text);
        s->totals.errors += found.wrong;
        return KVT_SYNTH_FOUND_WRONG;
    }
    return rc;
}

/* Steps of one schedule of up to `steps`. *done: how many were ended. A step that fails in the
 * daemon, or is aborted, is taken back and no error. */
static int schedule(struct kvt_synth *s, struct kvt_synth_cache *c, uint32_t want, uint32_t steps,
                    uint32_t *done) {
    static struct kvt_synth_step w; /* large, and there is one */
    memset(&w, 0, sizeof w);
    w.cache = c;
    *done = 0;
    if (choose_rows(s, &w, want, steps) == 0) {
        return 0; /* everything is full, or chance had nobody append */
    }
    bool abort = kvt_synth_random_percent(&s->random, s->o->abort);
    uint32_t abort_in = kvt_synth_random_below(&s->random, steps);
    int rc = begin(s, &w, want, steps);
    if (rc != 0) {
        return rc;
    }
    s->totals.schedules++;
    uint32_t left = kvt_step_left(w.step);
    for (uint32_t i = 0; i < left && rc == 0 && !w.aborted; i++) {
        w.abort_after = -1;
        if (abort && (i == abort_in || i + 1 == left)) {
            w.abort_after = kvt_synth_random_below(&s->random, (uint32_t)s->o->layers + 1);
        }
        rc = one_step(s, &w);
        *done += rc == 0 && !w.aborted;
    }
    s->totals.planes_moved_bytes += s->schedule_moved_bytes;
    if (s->gpu != NULL) {
        kvt_synth_gpu_began(s->gpu, s->begin_us, s->schedule_moved_bytes);
    }
    if (w.aborted) {
        s->totals.aborts++;
        /* Every other time in the middle of what is enqueued. */
        if (s->gpu != NULL && kvt_synth_random_percent(&s->random, 50)) {
            rc = look_at_gpu(s, c, false);
        }
    } else if (s->gpu != NULL && rc == 0) {
        return look_at_gpu(s, c, false);
    }
    if (rc != 0 || w.aborted) {
        take_back(&w);
        int aborted = kvt_step_abort(w.step);
        if (s->gpu != NULL) {
            int drained = look_at_gpu(s, c, true);
            rc = rc != 0 ? rc : drained;
        }
        if (rc == 0 || rc == -KVT_EFAILED) {
            s->totals.failed_steps += rc != 0;
            rc = aborted;
        }
    }
    return rc;
}

/* ---- a round ---------------------------------------------------------------------------------- */

static void progress(const struct kvt_synth *s, const struct kvt_synth_cache *c) {
    if (s->o->progress) {
        (void)fprintf(stderr, "kvtier-synth: cache %u rows %u longest %u steps %" PRIu64 "\n",
                      c->id, c->row_count, kvt_synth_cache_longest(c), s->totals.steps);
    }
}

static int prompt(struct kvt_synth *s) {
    struct kvt_synth_cache *c = &s->caches[0];
    uint32_t tries = 0;
    while (kvt_synth_cache_longest(c) < (uint32_t)s->o->prompt && tries++ < 100000) {
        uint32_t left = (uint32_t)s->o->prompt - kvt_synth_cache_longest(c);
        uint32_t want = left < (uint32_t)s->o->chunk ? left : (uint32_t)s->o->chunk;
        uint32_t done;
        int rc = schedule(s, c, want, 1, &done);
        if (rc != 0) {
            return rc;
        }
        progress(s, c);
    }
    return 0;
}

/* --turns; where no line will come, the rest goes on by itself. */
static void await_turn(const struct kvt_synth *s) {
    int c = s->o->turns ? getchar() : EOF;
    while (c != EOF && c != '\n') {
        c = getchar();
    }
}

static int generate(struct kvt_synth *s) {
    for (int64_t made = 0; made < s->o->tokens;) {
        uint32_t index = kvt_synth_random_below(&s->random, s->cache_count);
        int rc = kvt_synth_edit(s, &s->caches[index]);
        if (rc != 0) {
            return rc;
        }
        struct kvt_synth_cache *c = &s->caches[kvt_synth_random_below(&s->random, s->cache_count)];
        int64_t left = (s->o->tokens - made + s->o->append - 1) / s->o->append;
        uint32_t steps = (uint32_t)(left < s->o->ahead ? left : s->o->ahead);
        uint32_t done;
        await_turn(s);
        rc = schedule(s, c, (uint32_t)s->o->append, steps, &done);
        if (rc != 0) {
            return rc;
        }
        /* An aborted or empty one counts too, so that every run ends. */
        made += (done > 0 ? done : 1) * s->o->append;
        progress(s, c);
    }
    return 0;
}

/* What the last steps brought to the device, since it was asked before. */
static void count_moved(struct kvt_synth *s, const struct kvt_cache_stat *stat) {
    s->moved_bytes = stat->to_device_bytes - s->moved_bytes;
    s->moved_steps = stat->steps_committed - s->moved_steps;
}

/* --limit: the bus with the bytes of the last step, which is one of the generation. */
static int measure_bus(struct kvt_synth *s, double *seconds) {
    struct kvt_cache_stat stat;
    int rc = kvt_cache_settle(s->client, s->caches[0].id, -1);
    if (rc == 0) {
        rc = kvt_cache_stat(s->client, s->caches[0].id, &stat);
    }
    if (rc == 0) {
        count_moved(s, &stat);
    }
    if (rc != 0 || stat.need_to_device_bytes == 0) {
        return rc;
    }
    uint64_t need = stat.need_to_device_bytes;
    s->limit_bytes = s->limit_bytes == 0 ? need : (s->limit_bytes + need) / 2;
    return kvt_synth_gpu_limit(s->gpu, need, seconds);
}

/* A step more, and while its memory is ours the same once more without libkvtier. */
static int measure_bare(struct kvt_synth *s, double *us) {
    uint32_t done;
    s->bare_us = us;
    int rc = schedule(s, &s->caches[0], (uint32_t)s->o->append, 1, &done);
    s->bare_us = NULL;
    kvt_synth_gpu_note(s->gpu, false);
    return rc;
}

/* Before the generation: a step of its kind first, so that there is one to take the bytes of. */
static int measure_before(struct kvt_synth *s) {
    uint32_t done;
    int rc = 0;
    if (s->gpu == NULL) {
        return 0;
    }
    if (s->o->bare) {
        rc = measure_bare(s, &s->bare_before_us);
    } else if (s->o->limit) {
        rc = schedule(s, &s->caches[0], (uint32_t)s->o->append, 1, &done);
    }
    if (rc == 0 && s->o->limit) {
        s->limit_bytes = 0;
        s->moved_bytes = 0;
        s->moved_steps = 0;
        rc = measure_bus(s, &s->limit_before_s);
    }
    return rc;
}

static int measure_behind(struct kvt_synth *s) {
    int rc = 0;
    if (s->gpu == NULL || s->cache_count == 0) {
        return 0;
    }
    if (s->o->limit) {
        rc = measure_bus(s, &s->limit_after_s);
    }
    return rc == 0 && s->o->bare ? measure_bare(s, &s->bare_after_us) : rc;
}

/* From here on steps and calls are timed. */
static int keep_times(struct kvt_synth *s) {
    kvt_synth_samples_forget(&s->calls.layers);
    kvt_synth_samples_forget(&s->calls.ends);
    kvt_synth_samples_forget(&s->calls.begins);
    s->calls.kept = true;
    return s->gpu != NULL ? kvt_synth_gpu_time(s->gpu) : 0;
}

static void keep_no_times(struct kvt_synth *s) {
    s->calls.kept = false;
    if (s->gpu != NULL) {
        kvt_synth_gpu_time_end(s->gpu);
    }
}

int kvt_synth_round(struct kvt_synth *s) {
    int rc = create(s);
    if (rc == 0) {
        rc = prompt(s);
    }
    if (rc == 0) {
        rc = measure_before(s);
    }
    if (rc == 0) {
        rc = keep_times(s);
    }
    if (rc == 0) {
        rc = generate(s);
    }
    keep_no_times(s);
    if (rc == 0) {
        rc = measure_behind(s);
    }
    while (rc == 0 && s->cache_count > 0) {
        rc = kvt_synth_close(s, s->cache_count - 1);
    }
    s->totals.rounds += rc == 0;
    return rc;
}
