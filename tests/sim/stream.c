/* A worker's stream: what it has enqueued, carried out in order at moments of its own.
 *
 * Attention looks at every byte of every token that it is promised, then writes what the step
 * appends, then looks at everything once more: memory that is filled, moved or freed meanwhile
 * shows. Enqueueing runs ahead of the stream, by windows, and stops where a step failed.
 */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

typedef unsigned long long ull;

static void stream_later(struct sim *sim, struct sim_worker *w, uint64_t delay_us);

static void push(struct sim_worker *w, struct sim_stream_op op) {
    if (w->stream_head == w->stream_count) {
        w->stream_head = w->stream_count = 0;
    }
    if (w->stream_count == w->stream_room) {
        w->stream_room = w->stream_room == 0 ? 64 : w->stream_room * 2;
        w->stream = sim_grow(w->stream, w->stream_room * sizeof(*w->stream));
    }
    w->stream[w->stream_count++] = op;
}

/* ---- looking at memory ----------------------------------------------------------------------- */

static uint8_t *memory_at(struct sim *sim, const struct sim_worker *w, uint32_t extent,
                          uint64_t offset, uint64_t bytes, const char *what) {
    struct sim_extent *x = sim_extent_find(sim, extent);
    if (!x || !x->live || x->destroying || x->mapped != w) {
        sim_fail(sim, "session %u: %s touches extent %u, which is not mapped any more", w->session,
                 what, extent);
    }
    if (bytes > x->bytes || offset > x->bytes - bytes) {
        sim_fail(sim, "session %u: %s leaves extent %u", w->session, what, extent);
    }
    return x->memory + offset;
}

/* Whether what the worker reads counts: not in a step that has failed. */
static bool counts(const struct sim_worker *w, uint32_t step) {
    const struct sim_schedule *s = &w->schedule;
    return !w->liar && !w->unchecked && w->attached &&
           (s->failed == 0 || s->header.first_step + step < s->failed);
}

struct plane {
    uint32_t layer;
    uint32_t plane; /* 0: K, 1: V */
    uint32_t token_bytes;
    uint32_t extent;
    uint64_t offset; /* of the first token */
};

static void look(struct sim *sim, struct sim_worker *w, const struct plane *at, uint32_t position,
                 uint32_t begin, uint32_t tokens, const char *when) {
    struct sim_schedule *s = &w->schedule;
    if (tokens == 0 || at->token_bytes == 0) {
        return;
    }
    uint64_t bytes = (uint64_t)tokens * at->token_bytes;
    const uint8_t *memory = memory_at(sim, w, at->extent, at->offset, bytes, "attention");
    struct kvt_place place = {.tier = KVT_TIER_GPU, .extent = at->extent, .offset = at->offset};
    sim_race_check(sim, &place, bytes, false, 0, -1, "attention reads");
    for (uint32_t i = 0; i < tokens; i++) {
        uint64_t content = sim_schedule_content(s, position, begin + i);
        if (!sim_token_is(memory + (uint64_t)i * at->token_bytes, at->token_bytes, content,
                          at->layer, at->plane)) {
            sim_fail(sim,
                     "session %u cache %u: wrong byte %s: layer %u %s row %u token %u "
                     "(%u committed)",
                     w->session, s->cache->id, when, at->layer, at->plane ? "V" : "K",
                     s->row[position], begin + i, s->cache->rows[s->row[position]].length);
        }
    }
    sim->stats.checked_bytes += bytes;
}

static void write(struct sim *sim, struct sim_worker *w, const struct plane *at, uint32_t position,
                  uint32_t begin, uint32_t tokens, bool garbage) {
    if (tokens == 0 || at->token_bytes == 0) {
        return;
    }
    uint64_t bytes = (uint64_t)tokens * at->token_bytes;
    uint8_t *memory = memory_at(sim, w, at->extent, at->offset, bytes, "an append");
    struct kvt_place place = {.tier = KVT_TIER_GPU, .extent = at->extent, .offset = at->offset};
    if (!w->liar) {
        sim_race_check(sim, &place, bytes, true, 0, -1, "a worker appends");
    }
    for (uint32_t i = 0; i < tokens; i++) {
        uint64_t content = garbage ? sim_random_next(&sim->random)
                                   : sim_schedule_content(&w->schedule, position, begin + i);
        sim_token_write(memory + (uint64_t)i * at->token_bytes, at->token_bytes, content, at->layer,
                        at->plane);
    }
}

/* Both planes of a run. */
static struct plane plane_of(const struct sim_schedule *s, const struct kvt_sched_piece *p,
                             const struct kvt_sched_run *r, uint32_t plane, uint32_t token) {
    const struct kvt_layer_layout *l = &s->cache->layers[p->layer];
    uint32_t bytes = plane ? kvt_layer_v_token_bytes(l) : kvt_layer_k_token_bytes(l);
    uint64_t offset = plane ? r->v_offset : r->k_offset;
    return (struct plane){.layer = p->layer,
                          .plane = plane,
                          .token_bytes = bytes,
                          .extent = p->extent,
                          .offset = offset + (uint64_t)(token - r->token_begin) * bytes};
}

enum phase { PHASE_READ, PHASE_APPEND, PHASE_READ_AGAIN, PHASES };

static void attend_run(struct sim *sim, struct sim_worker *w, const struct kvt_sched_piece *p,
                       const struct kvt_sched_run *r, uint32_t step, enum phase phase) {
    struct sim_schedule *s = &w->schedule;
    uint32_t first = sim_schedule_position(s, s->rows[r->row_first]);
    for (uint32_t plane = 0; plane < 2; plane++) {
        struct plane read = plane_of(s, p, r, plane, r->token_begin);
        struct plane append = plane_of(s, p, r, plane, r->token_begin + r->read_count);
        if (phase == PHASE_APPEND) {
            write(sim, w, &append, first, r->token_begin + r->read_count, r->append_count,
                  w->liar && sim_chance(&sim->random, 500));
            continue;
        }
        if (!counts(w, step)) {
            continue;
        }
        look(sim, w, &read, first, r->token_begin, r->read_count,
             phase == PHASE_READ ? "first" : "later");
        if (phase == PHASE_READ_AGAIN) {
            look(sim, w, &append, first, r->token_begin + r->read_count, r->append_count,
                 "appended");
        }
    }
    for (uint32_t i = 1; i < r->row_count && phase == PHASE_READ && counts(w, step); i++) {
        uint32_t other = sim_schedule_position(s, s->rows[r->row_first + i]);
        for (uint32_t t = r->token_begin; t < r->token_begin + r->read_count; t++) {
            if (sim_schedule_content(s, other, t) != sim_schedule_content(s, first, t)) {
                sim_fail(sim, "session %u: rows %u and %u share token %u, which differs",
                         w->session, s->row[first], s->row[other], t);
            }
        }
    }
}

/* Dense: layer `p->layer` also reads what earlier layers keep for it. */
static void attend_held(struct sim *sim, struct sim_worker *w, uint32_t index, uint32_t step,
                        enum phase phase) {
    const struct sim_schedule *s = &w->schedule;
    uint32_t reader = s->pieces[index].layer;
    for (uint32_t i = s->steps[step].piece_first; i < index; i++) {
        const struct kvt_sched_piece *p = &s->pieces[i];
        if (p->last_reader < reader) {
            continue;
        }
        for (uint32_t r = p->run_first; r < p->run_first + p->run_count; r++) {
            attend_run(sim, w, p, &s->runs[r], step, phase);
        }
    }
}

static void attend(struct sim *sim, struct sim_worker *w, const struct sim_stream_op *op,
                   enum phase phase) {
    const struct sim_schedule *s = &w->schedule;
    const struct kvt_sched_piece *p = &s->pieces[op->index];
    for (uint32_t r = p->run_first; r < p->run_first + p->run_count; r++) {
        attend_run(sim, w, p, &s->runs[r], op->step, phase);
    }
    if (w->kind == KVT_WORKER_DENSE && phase == PHASE_READ_AGAIN) {
        attend_held(sim, w, op->index, op->step, phase);
    }
}

static void move(struct sim *sim, struct sim_worker *w, const struct kvt_sched_move *m) {
    const uint8_t *from =
        memory_at(sim, w, m->source_extent, m->source_offset, m->bytes, "a move's source");
    uint8_t *to =
        memory_at(sim, w, m->target_extent, m->target_offset, m->bytes, "a move's target");
    struct kvt_place source = {
        .tier = KVT_TIER_GPU, .extent = m->source_extent, .offset = m->source_offset};
    struct kvt_place target = {
        .tier = KVT_TIER_GPU, .extent = m->target_extent, .offset = m->target_offset};
    if (!w->liar && w->attached && !w->unchecked && w->schedule.failed == 0) {
        sim_race_check(sim, &source, m->bytes, false, 0, -1, "a move reads");
        sim_race_check(sim, &target, m->bytes, true, 0, -1, "a move writes");
    }
    memmove(to, from, m->bytes);
}

/* ---- carrying out ---------------------------------------------------------------------------- */

static void store(struct sim *sim, struct sim_worker *w, struct kvt_counter *counter,
                  uint64_t value) {
    if (w->liar && sim_fault(sim, SIM_LIED)) {
        value = sim_chance(&sim->random, 500) ? sim_random_next(&sim->random)
                                              : value + sim_between(&sim->random, 0, 3) - 1;
    }
    __atomic_store_n(&counter->value, value, __ATOMIC_RELEASE);
    sim_device_look(sim, w->device);
}

/* Whether the operation is over. */
static bool carry_out(struct sim *sim, struct sim_worker *w, const struct sim_stream_op *op) {
    switch (op->kind) {
    case SIM_MOVE:
        move(sim, w, &w->schedule.moves[op->index]);
        return true;
    case SIM_ATTEND:
        attend(sim, w, op, (enum phase)w->stream_phase);
        w->stream_phase = (w->stream_phase + 1) % PHASES;
        return w->stream_phase == 0;
    case SIM_DONE:
        sim_trace(sim, "session %u: done[%u] = %llu", w->session, op->slot, (ull)op->value);
        store(sim, w, &w->page->done[op->slot], op->value);
        return true;
    default:
        sim_trace(sim, "session %u: step = %llu", w->session, (ull)op->value);
        store(sim, w, &w->page->step, op->value);
        return true;
    }
}

static void on_stream(struct sim *sim, void *object, uint64_t value) {
    struct sim_worker *w = object;
    w->stream_due = false;
    if (w->process == SIM_GONE || w->hung || w->stream_head == w->stream_count) {
        return;
    }
    struct sim_stream_op op = w->stream[w->stream_head];
    if (op.kind == SIM_WAIT) {
        uint64_t ready = __atomic_load_n(&w->page->ready[op.slot].value, __ATOMIC_ACQUIRE);
        w->stream_waits =
            !kvt_counter_reached(ready, op.value) && !(w->liar && sim_chance(&sim->random, 300));
        if (w->stream_waits) {
            return;
        }
    } else if (!carry_out(sim, w, &op)) {
        stream_later(sim, w, sim_us(sim, 0, 60));
        return;
    }
    w->stream_head++;
    w->progress_us = sim->now_us;
    if (op.kind == SIM_STEP) {
        sim_schedule_posted(sim, w, op.value); /* may close the schedule: nothing is left */
        sim_stream_resume(sim, w);
    }
    if (w->stream_head < w->stream_count) {
        stream_later(sim, w, op.kind == SIM_ATTEND ? sim_us(sim, 0, 60) : sim_us(sim, 0, 8));
    }
}

static void stream_later(struct sim *sim, struct sim_worker *w, uint64_t delay_us) {
    if (!w->stream_due && w->process != SIM_GONE && !w->hung) {
        w->stream_due = true;
        sim_after(sim, delay_us, on_stream, w, 0);
    }
}

void sim_stream_wake(struct sim *sim, struct sim_worker *w) {
    if (w->stream_head < w->stream_count) {
        stream_later(sim, w, sim_us(sim, 0, 20));
    }
}

/* ---- enqueueing ------------------------------------------------------------------------------ */

static void push_done(struct sim_worker *w, uint32_t step, const struct kvt_sched_piece *p) {
    push(w,
         (struct sim_stream_op){.kind = SIM_DONE, .step = step, .slot = p->slot, .value = p->done});
}

/* Dense: `done` of what no later layer reads, when the next layer is asked for: only then does a
 * framework let it go. */
static void push_late(struct sim_worker *w, uint32_t step, uint32_t reader, bool all) {
    const struct sim_schedule *s = &w->schedule;
    for (uint32_t l = 0; l < s->cache->layer_count; l++) {
        if (w->held[l] == 0) {
            continue;
        }
        const struct kvt_sched_piece *p = &s->pieces[w->held[l] - 1];
        if (all || p->last_reader < reader) {
            push_done(w, step, p);
            w->held[l] = 0;
        }
    }
}

static void enqueue_piece(struct sim *sim, struct sim_worker *w) {
    struct sim_schedule *s = &w->schedule;
    uint32_t step = s->enqueue_step;
    uint32_t index = s->steps[step].piece_first + s->enqueue_piece++;
    const struct kvt_sched_piece *p = &s->pieces[index];
    bool streamed = (p->flags & KVT_PIECE_STREAMED) != 0;
    sim_schedule_intact(sim, w, index);
    if (w->kind == KVT_WORKER_DENSE) {
        push_late(w, step, p->layer, false);
    }
    if (streamed) {
        push(w, (struct sim_stream_op){
                    .kind = SIM_WAIT, .step = step, .slot = p->slot, .value = p->ready});
    }
    for (uint32_t m = p->move_first; m < p->move_first + p->move_count; m++) {
        push(w, (struct sim_stream_op){.kind = SIM_MOVE, .step = step, .index = m});
    }
    push(w, (struct sim_stream_op){.kind = SIM_ATTEND, .step = step, .index = index});
    if (w->kind == KVT_WORKER_DENSE) {
        w->held[p->layer] = streamed ? index + 1 : 0;
    } else if (streamed) {
        push_done(w, step, p);
    }
}

static void end_step(struct sim_worker *w) {
    struct sim_schedule *s = &w->schedule;
    if (w->kind == KVT_WORKER_DENSE) {
        push_late(w, s->enqueue_step, 0, true);
    }
    push(w, (struct sim_stream_op){.kind = SIM_STEP,
                                   .step = s->enqueue_step,
                                   .value = s->steps[s->enqueue_step].step});
    s->enqueue_step++;
    s->enqueue_piece = 0;
    s->begun = s->enqueue_step < s->header.steps_count;
}

/* One piece, or the end of a step, or of the schedule. False: nothing can be done now. */
static bool enqueue_one(struct sim *sim, struct sim_worker *w) {
    struct sim_schedule *s = &w->schedule;
    if (!s->open || !s->begun) {
        return false;
    }
    uint64_t step = s->header.first_step + s->enqueue_step;
    if (s->failed != 0 && step >= s->failed) {
        push(w, (struct sim_stream_op){
                    .kind = SIM_STEP, .step = s->enqueue_step, .value = w->last_step});
        memset(w->held, 0, sizeof(w->held));
        s->begun = false;
        return false;
    }
    if (s->abort_from != 0 && step >= s->abort_from) {
        return false; /* until the daemon has said that it failed */
    }
    if (s->lazy && s->enqueue_step > 0 && s->enqueue_piece == 0 && s->posted != step - 1) {
        return false;
    }
    if (s->enqueue_piece < s->steps[s->enqueue_step].piece_count) {
        enqueue_piece(sim, w);
    } else {
        end_step(w);
    }
    return true;
}

static void on_enqueue(struct sim *sim, void *object, uint64_t value) {
    struct sim_worker *w = object;
    w->enqueue_due = false;
    if (w->process != SIM_RUNNING || w->hung) {
        return;
    }
    uint64_t most = sim_us(sim, 1, 12);
    bool more = true;
    while (most-- > 0 && more) {
        more = enqueue_one(sim, w);
    }
    sim_stream_wake(sim, w);
    if (more) {
        sim_stream_resume(sim, w);
    }
}

void sim_stream_resume(struct sim *sim, struct sim_worker *w) {
    if (!w->enqueue_due && w->process == SIM_RUNNING && !w->hung) {
        w->enqueue_due = true;
        uint64_t most_us = w->schedule.lazy && w->schedule.enqueue_piece == 0 ? 300 : 40;
        sim_after(sim, sim_us(sim, 0, most_us), on_enqueue, w, 0);
    }
}

void sim_stream_begin(struct sim *sim, struct sim_worker *w) {
    const struct sim_schedule *s = &w->schedule;
    w->schedule.lazy = sim_chance(&sim->random, 300);
    memset(w->held, 0, sizeof(w->held));
    for (uint32_t m = 0; m < s->header.moves_leading; m++) {
        push(w, (struct sim_stream_op){.kind = SIM_MOVE, .index = m});
    }
    sim_stream_wake(sim, w);
    sim_stream_resume(sim, w);
}

/* Whether something that is not over yet touches the extent: what is enqueued, in whose steps earlier
 * pieces may still be read, and what will be. */
bool sim_stream_uses(const struct sim_worker *w, uint32_t extent) {
    const struct sim_schedule *s = &w->schedule;
    if (!s->open) {
        return false;
    }
    uint32_t step = s->enqueue_step;
    for (uint32_t i = w->stream_head; i < w->stream_count; i++) {
        const struct sim_stream_op *op = &w->stream[i];
        const struct kvt_sched_move *m = &s->moves[op->index];
        if (op->kind == SIM_MOVE && (m->source_extent == extent || m->target_extent == extent)) {
            return true;
        }
        step = op->step < step ? op->step : step;
    }
    if (step >= s->header.steps_count || (s->failed != 0 && w->stream_head == w->stream_count)) {
        return false;
    }
    for (uint32_t i = s->steps[step].piece_first; i < s->header.pieces_count; i++) {
        if (s->pieces[i].extent == extent) {
            return true;
        }
    }
    return false;
}
