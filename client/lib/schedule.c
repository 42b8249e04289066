/* A schedule's life: asked for, walked step by step (step.c), ended or aborted. */
#include "client/lib/client.h"

#include <stdlib.h>
#include <string.h>

#define ABORT_LOOK_MS 1

/* Behind everything that was enqueued. A device that takes it no more ends the session. */
static void post_step_how(struct kvt_step *s, uint64_t step, bool quietly) {
    struct kvt_client *c = s->client;
    int rc = quietly ? c->device->store(c->gpu, &c->page->step, step)
                     : c->device->post(c->gpu, &c->page->step, step);
    if (rc != 0) {
        (void)kvt_client_fail_device(c);
    }
    c->posted_step = step;
}

static void post_step(struct kvt_step *s, uint64_t step) {
    post_step_how(s, step, false);
}

/* Nothing of the current step is used any more. */
static void unpin(struct kvt_client *c) {
    if (kvt_client_extents_unpin(&c->extents, c->posted_step)) {
        kvt_client_thread_wake(c);
    }
}

static void close_schedule(struct kvt_step *s) {
    struct kvt_client *c = s->client;
    unpin(c);
    s->acquire.used = false;
    s->acquire.held = false;
    s->client = NULL;
}

/* ---- begin ------------------------------------------------------------------------------------ */

static int check_begin(struct kvt_client *c, const struct kvt_client_step_options *o) {
    if (c->step.client != NULL) {
        return kvt_client_fail(c, -KVT_ESTATE,
                               "STEP: cache %u has an open step; end or abort it first",
                               c->step.cache->id);
    }
    if (o->steps < 1) {
        return kvt_client_fail(c, -KVT_EINVAL, "STEP: steps is 0; accepted is 1 or more");
    }
    if (o->rows != NULL && (o->row_count < 1 || o->row_count > KVT_ROWS_MAX)) {
        return kvt_client_fail(c, -KVT_EINVAL, "STEP: %u rows; accepted is 1 to %d", o->row_count,
                               KVT_ROWS_MAX);
    }
    return 0;
}

/* Both arrays have `rows` entries afterwards. */
static int resize_rows(struct kvt_step *s, uint32_t rows) {
    uint32_t *lengths = realloc(s->lengths, rows * sizeof *lengths);
    if (lengths == NULL) {
        return -KVT_ENOMEM;
    }
    s->lengths = lengths;
    uint32_t *appends = realloc(s->appends, rows * sizeof *appends);
    if (appends == NULL) {
        return -KVT_ENOMEM;
    }
    s->appends = appends;
    s->row_count = rows;
    return 0;
}

static int adopt_rows(struct kvt_step *s, const struct kvt_client_step_options *o,
                      const Kvt__Schedule *m) {
    if (resize_rows(s, (uint32_t)m->n_lengths) != 0) {
        return kvt_client_fail(s->client, -KVT_ENOMEM, "STEP: out of memory");
    }
    memcpy(s->lengths, m->lengths, s->row_count * sizeof *s->lengths);
    for (uint32_t i = 0; i < s->row_count; i++) {
        s->appends[i] = o->rows == NULL ? o->tokens : 0;
    }
    for (uint32_t i = 0; o->rows != NULL && i < o->row_count; i++) {
        if (o->rows[i].row < s->row_count) {
            s->appends[o->rows[i].row] = o->rows[i].tokens;
        }
    }
    return 0;
}

/* Looks at what the ring holds. */
static int view(struct kvt_step *s, const struct kvt_client_step_options *o,
                const Kvt__Schedule *m) {
    struct kvt_client *c = s->client;
    char text[KVT_TEXT_BYTES];
    if (m->steps < 1 || m->steps > KVT_STEPS_AHEAD_MAX || m->first_step < 1) {
        return kvt_client_fail(c, -KVT_EPROTO, "STEP: the reply grants %u steps from number %llu",
                               m->steps, (unsigned long long)m->first_step);
    }
    if (m->n_lengths < 1 || m->n_lengths > KVT_ROWS_MAX) {
        return kvt_client_fail(c, -KVT_EPROTO, "STEP: the reply has lengths of %zu rows",
                               m->n_lengths);
    }
    struct kvt_schedule_shape shape = {
        .worker = (uint32_t)c->worker,
        .cache = s->cache->id,
        .layer_count = s->cache->layout->layer_count,
        .row_count = (uint32_t)m->n_lengths,
        .step_row_count = o->rows != NULL ? o->row_count : (uint32_t)m->n_lengths,
        .layers = s->cache->layout->layers,
    };
    int rc = kvt_schedule_view_open(&s->view, &shape, c->ring, c->welcome.ring_bytes,
                                    m->ring_offset, m->ring_bytes, text);
    if (rc != 0) {
        return kvt_client_fail(c, rc, "STEP: cache %u: %s", s->cache->id, text);
    }
    if (s->view.header.first_step != m->first_step || s->view.header.steps_count != m->steps ||
        m->cache != s->cache->id) {
        return kvt_client_fail(c, -KVT_EPROTO, "STEP: cache %u: reply and schedule disagree",
                               s->cache->id);
    }
    return 0;
}

/* The moves that come before everything are done first, whatever else may fail. If they cannot be
 * done the daemon takes bytes for the truth that are not there, and an abort would not tell it: so
 * the session ends. */
static int adopt(struct kvt_step *s, const struct kvt_client_step_options *o,
                 const Kvt__Schedule *m) {
    int rc = view(s, o, m);
    if (rc == 0) {
        rc = kvt_client_step_lead(s);
    }
    if (rc != 0) {
        if (rc != -KVT_EGONE && rc != -KVT_EEVICTED) {
            kvt_client_set_gone(s->client, KVT_GONE_PROTOCOL);
        }
        return rc;
    }
    rc = adopt_rows(s, o, m);
    if (rc == 0) {
        rc = kvt_client_step_start(s, 0);
    }
    return rc != 0 ? rc : kvt_client_step_check(s);
}

static int ask(struct kvt_client *c, const struct kvt_client_step_options *o, Kvt__Reply **reply) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Step step = KVT__STEP__INIT;
    Kvt__Acquire acquire = KVT__ACQUIRE__INIT;
    Kvt__StepRow rows[KVT_ROWS_MAX];
    Kvt__StepRow *pointers[KVT_ROWS_MAX];
    if (o->acquire) {
        acquire.cache = o->cache;
        acquire.tokens = o->tokens;
        r.body_case = KVT__REQUEST__BODY_ACQUIRE;
        r.acquire = &acquire;
        return kvt_client_request(c, "ACQUIRE", &r, KVT__REPLY__BODY_SCHEDULE, reply);
    }
    step.cache = o->cache;
    step.tokens = o->tokens;
    step.steps = o->steps < KVT_STEPS_AHEAD_MAX ? o->steps : KVT_STEPS_AHEAD_MAX;
    for (uint32_t i = 0; o->rows != NULL && i < o->row_count; i++) {
        rows[i] = (Kvt__StepRow)KVT__STEP_ROW__INIT;
        rows[i].row = o->rows[i].row;
        rows[i].tokens = o->rows[i].tokens;
        pointers[i] = &rows[i];
    }
    step.n_rows = o->rows != NULL ? o->row_count : 0;
    step.rows = pointers;
    r.body_case = KVT__REQUEST__BODY_STEP;
    r.step = &step;
    return kvt_client_request(c, "STEP", &r, KVT__REPLY__BODY_SCHEDULE, reply);
}

int kvt_client_step_open(struct kvt_client *c, const struct kvt_client_step_options *o) {
    Kvt__Reply *reply;
    struct kvt_step *s = &c->step;
    struct kvt_client_cache *cache = kvt_client_cache_find(c, o->cache);
    if (cache == NULL) {
        return -KVT_ENOENT;
    }
    int rc = check_begin(c, o);
    if (rc == 0) {
        rc = kvt_client_check_usable(c);
    }
    if (rc == 0) {
        rc = kvt_client_settle_await(c); /* the next schedule clears `failed` */
    }
    if (rc == 0) {
        rc = kvt_client_settle_tell(c, cache);
    }
    if (rc == 0) {
        rc = ask(c, o, &reply);
    }
    if (rc != 0) {
        return rc;
    }
    const Kvt__Schedule *m = reply->schedule;
    s->client = c;
    s->cache = cache;
    s->first_step = m->first_step;
    s->steps = m->steps;
    s->current = 0;
    rc = adopt(s, o, m);
    kvt__reply__free_unpacked(reply, NULL);
    if (rc != 0) {
        char message[sizeof c->message];
        memcpy(message, c->message, sizeof message); /* the first failure is the one to tell */
        (void)kvt_step_abort(s);
        memcpy(c->message, message, sizeof message);
    }
    return rc;
}

int kvt_step_begin(struct kvt_client *c, uint32_t cache, const struct kvt_step_row *rows,
                   uint32_t row_count, uint32_t tokens, uint32_t steps, struct kvt_step **out) {
    struct kvt_client_step_options o = {
        .cache = cache, .rows = rows, .row_count = row_count, .tokens = tokens, .steps = steps};
    int rc = kvt_client_step_open(c, &o);
    if (rc == 0) {
        *out = &c->step;
    }
    return rc;
}

/* ---- end -------------------------------------------------------------------------------------- */

/* The current step failed, or the daemon is gone. The daemon waits for the schedule's last step: it
 * says that nothing of this worker touches the memory any more. */
static int end_failed(struct kvt_step *s) {
    int rc = kvt_client_step_check(s);
    post_step(s, s->first_step + s->steps - 1);
    close_schedule(s);
    return rc;
}

/* Whether the daemon has nothing to do because the current step ended: then it is not woken for it.
 * On a busy machine that costs more than the daemon's part of a step of resident layers. */
static bool ends_quietly(const struct kvt_step *s) {
    bool last = s->current + 1 == s->steps;
    bool moved =
        s->current == 0 && s->view.header.moves_leading > 0; /* from memory that is free now */
    return !last && !moved && kvt_client_step_streamed(s) == 0;
}

int kvt_step_end(struct kvt_step *s) {
    if (s->client == NULL) {
        return -KVT_ESTATE;
    }
    struct kvt_client *c = s->client;
    int rc = kvt_client_check_own(c);
    if (rc != 0) {
        return rc;
    }
    if (kvt_client_step_stopped(s) != 0) {
        return end_failed(s);
    }
    uint32_t not_done = kvt_client_step_not_done(s);
    if (not_done > 0) {
        return kvt_client_fail(
            c, -KVT_ESTATE,
            "step %llu of cache %u cannot end: %u streamed pieces were not taken "
            "or are not done",
            (unsigned long long)s->step.step, s->cache->id, not_done);
    }
    post_step_how(s, s->step.step, ends_quietly(s));
    if (kvt_client_step_stopped(s) != 0) {
        return end_failed(s);
    }
    s->cache->ended = s->step.step;
    if (s->current + 1 == s->steps) {
        close_schedule(s);
        return 0;
    }
    unpin(c);
    rc = kvt_client_step_start(s, s->current + 1);
    if (rc != 0) {
        (void)kvt_step_abort(s);
    }
    return rc;
}

/* ---- abort ------------------------------------------------------------------------------------ */

static int start_abort(struct kvt_step *s, struct kvt_client_call *call) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Abort abort = KVT__ABORT__INIT;
    abort.first_step = s->first_step + s->current;
    r.body_case = KVT__REQUEST__BODY_ABORT;
    r.abort = &abort;
    return kvt_client_call_start(s->client, call, "ABORT", &r);
}

/* `step` may be posted only once the daemon has said, by `failed` or by its answer, that it commits
 * no more; before that it would take the post for the end of the steps. The answer itself may come
 * only when the daemon has seen `step`. */
static int tell_and_wait(struct kvt_step *s) {
    struct kvt_client_call call;
    Kvt__Reply *reply = NULL;
    bool posted = false;
    int rc = start_abort(s, &call);
    while (rc == 0) {
        rc = kvt_client_call_poll(s->client, &call, posted ? -1 : ABORT_LOOK_MS, &reply);
        if (!posted && (rc != 0 || kvt_client_step_stopped(s) != 0)) {
            post_step(s, s->first_step + s->steps - 1);
            posted = true;
        }
    }
    if (rc == 1) {
        kvt__reply__free_unpacked(reply, NULL);
        rc = 0;
    }
    return rc;
}

int kvt_step_abort(struct kvt_step *s) {
    if (s == NULL || s->client == NULL) {
        return 0;
    }
    int rc = kvt_client_check_own(s->client);
    if (rc != 0) {
        return rc;
    }
    rc = kvt_client_step_stopped(s);
    if (rc == 0) {
        rc = tell_and_wait(s);
    } else {
        /* The daemon knows already. */
        rc = rc == -KVT_EGONE ? kvt_client_fail_gone(s->client) : 0;
        post_step(s, s->first_step + s->steps - 1);
    }
    close_schedule(s);
    return rc;
}
