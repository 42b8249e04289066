/* The life of an open schedule: completions, commits, failure and abort.
 *
 *   OPEN  -> ended                 all steps committed, nothing of it in flight
 *   OPEN  -> DRAIN -> STOP -> ended  a step failed or was aborted
 *
 * DRAIN waits for what was submitted. Then every slot gets its last generation posted, so that no
 * stream of the worker waits for a fill that will not come. STOP waits for the worker's `step`,
 * behind which nothing that it enqueued touches the slots any more.
 */
#include "tiers/engine/state.h"

/* ---- commit ------------------------------------------------------------------------------------------ */

static void row_commit(const struct kvt_engine *e, struct row *r, uint32_t tokens) {
    uint32_t block_tokens = e->config.block_tokens;
    uint32_t before = r->length / block_tokens;
    r->length += tokens;
    for (uint32_t i = before; i < r->length / block_tokens; i++) {
        r->blocks[i]->full = true;
    }
}

static void step_commit(struct kvt_engine *e, struct session *s, uint64_t step) {
    struct schedule *sc = &s->schedule;
    struct cache *c = sc->cache;
    uint32_t at = sc->committed++;
    KVT_ASSERT(sc->first_step + at == step);
    for (uint32_t i = 0; i < sc->row_count; i++) {
        row_commit(e, &c->rows[sc->rows[i]], sc->tokens[i]);
        s->counters.tokens_appended += sc->tokens[i];
        c->counters.tokens_appended += sc->tokens[i];
    }
    c->need_to_bytes = sc->need_to[at];
    c->need_from_bytes = sc->need_from[at];
    s->counters.steps_committed++;
    c->counters.steps_committed++;
    s->committed = step;
    struct kvt_action *a = action_push(e, KVT_ACTION_POST_COMMITTED);
    a->session = session_index(e, s);
    a->value = step;
    if (KVT_BROKEN(e->rules, KVT_BREAK_SCHEDULE_OVERWRITTEN)) {
        ring_scribble(e, s);
    }
}

/* ---- failure ------------------------------------------------------------------------------------------- */

/* Steps from `first_step` on will not commit. */
void step_fail(struct kvt_engine *e, struct session *s, uint64_t first_step, uint32_t code) {
    struct schedule *sc = &s->schedule;
    if (s->hung || (sc->phase != PHASE_OPEN && sc->phase != PHASE_DRAIN)) {
        return;
    }
    uint64_t open = sc->first_step + sc->committed;
    first_step = first_step < open ? open : first_step;
    if (first_step >= sc->first_step + sc->steps ||
        (sc->fail_first != 0 && sc->fail_first <= first_step)) {
        return;
    }
    sc->phase = PHASE_DRAIN;
    sc->fail_first = first_step;
    sc->fail_code = code;
    s->failed_posted = true;
    struct kvt_action *a = action_push(e, KVT_ACTION_POST_FAILED);
    a->session = session_index(e, s);
    a->value = first_step;
    a->code = code;
    guess_discard(e, s, 0);
    a = action_push(e, KVT_ACTION_CANCEL);
    a->device = s->device;
    a->session = session_index(e, s);
    /* fills that were adopted from the guess have ids before the first step's own */
    a->value =
        first_step == sc->first_step ? s->ops.base : sc->first_op[first_step - sc->first_step];
}

static void slots_post_all(struct kvt_engine *e, struct session *s) {
    for (uint32_t i = 0; i < s->slot_count; i++) {
        if (s->slots[i].generation == 0) {
            continue;
        }
        struct kvt_action *a = action_push(e, KVT_ACTION_POST_READY);
        a->session = session_index(e, s);
        a->slot = i;
        a->value = s->slots[i].generation;
        s->slots[i].named = 0;
    }
}

static void schedule_end(struct kvt_engine *e, struct session *s) {
    struct schedule *sc = &s->schedule;
    bool failed = sc->fail_first != 0;
    if (failed) {
        uint64_t steps = sc->steps - sc->committed;
        s->counters.steps_failed += steps;
        sc->cache->counters.steps_failed += steps;
    }
    if (sc->answer_abort && s->hung) {
        answer_drop(e);
    } else if (sc->answer_abort) {
        (void)answer_push(e, session_index(e, s), sc->abort_tag, 0, sc->cache);
    }
    schedule_close(e, s, !sc->cow_failed && sc->cow_ops_left == 0);
    s->last_step_ms = e->now_ms;
    e->epoch++;
}

/* Moves the schedule on, if what it waits for has come. */
void step_progress(struct kvt_engine *e, struct session *s) {
    struct schedule *sc = &s->schedule;
    bool drained = ops_drained(&s->ops);
    if (sc->phase == PHASE_OPEN && sc->committed == sc->steps && drained) {
        schedule_end(e, s);
    } else if (sc->phase == PHASE_DRAIN &&
               (drained || KVT_BROKEN(e->rules, KVT_BREAK_ABORT_NO_DRAIN))) {
        if (KVT_BROKEN(e->rules, KVT_BREAK_ABORT_IGNORES_STEP)) {
            slots_post_all(e, s);
            schedule_end(e, s);
        } else {
            end_op_emit(e, s);
            slots_post_all(e, s);
            sc->phase = PHASE_STOP;
        }
    }
}

/* ---- completions ------------------------------------------------------------------------------------------ */

static void count_bytes(struct session *s, struct cache *c, const struct op_record *r,
                        size_t counter) {
    *(uint64_t *)((char *)&s->counters + counter) += r->bytes;
    if (c != NULL) {
        *(uint64_t *)((char *)&c->counters + counter) += r->bytes;
    }
}

#define COUNT(s, c, r, field) count_bytes(s, c, r, offsetof(struct kvt_counters, field))

static void step_op_completion(struct kvt_engine *e, struct session *s, const struct op_record *r) {
    const struct schedule *sc = &s->schedule;
    bool failed = sc->fail_first != 0 && r->step >= sc->fail_first;
    if (r->status == KVT_DONE && !failed) {
        step_commit(e, s, r->step);
    } else if (KVT_BROKEN(e->rules, KVT_BREAK_FAILED_STEP_COMMITS) &&
               r->step == sc->first_step + sc->committed) {
        step_commit(e, s, r->step);
    }
}

/* An operation of the session has completed (its record says how). */
void step_completion(struct kvt_engine *e, struct session *s, struct op_record *r) {
    struct schedule *sc = &s->schedule;
    struct cache *c = cache_find(e, session_index(e, s), r->cache);
    bool done = r->status == KVT_DONE;
    switch (r->role) {
    case ROLE_FILL:
        if (done) {
            COUNT(s, c, r, to_device_bytes);
        }
        break;
    case ROLE_GUESS:
        s->ops.guesses--;
        return;
    case ROLE_DISCARDED:
        if (done) {
            COUNT(s, c, r, prefetch_discarded_bytes);
        }
        return;
    case ROLE_WRITEBACK:
        if (done) {
            COUNT(s, c, r, from_device_bytes);
        }
        break;
    case ROLE_COW:
        KVT_ASSERT(sc->cow_ops_left > 0);
        sc->cow_ops_left--;
        if (done) {
            COUNT(s, c, r, copied_on_write_bytes);
        } else {
            sc->cow_failed = true;
        }
        break;
    case ROLE_STEP:
        step_op_completion(e, s, r);
        return;
    case ROLE_END:
        if (sc->phase == PHASE_STOP) {
            schedule_end(e, s);
        }
        return;
    default:
        KVT_ASSERT(!"a role that has no completion here");
    }
    if (r->status == KVT_FAILED) {
        step_fail(e, s, r->step, KVT_EIO);
    }
}
