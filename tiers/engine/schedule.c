/* Opening a schedule: what STEP settled becomes tables, moves, pieces and operations, written to
 * the ring and handed over in one go.
 */
#include "tiers/engine/state.h"

#include <stdlib.h>
#include <string.h>

/* ---- moves that come first -------------------------------------------------------------------------- */

struct moves {
    struct kvt_sched_move *move;
    uint32_t count, room;
    bool no_memory;
};

static void move_push(struct moves *m, struct dev_place from, uint64_t from_offset,
                      struct dev_place to, uint64_t to_offset, uint64_t bytes) {
    if (bytes == 0) {
        return;
    }
    if (m->count == m->room) {
        uint32_t room = m->room == 0 ? 16 : m->room * 2;
        struct kvt_sched_move *grown = realloc(m->move, room * sizeof(*grown));
        if (grown == NULL) {
            m->no_memory = true;
            return;
        }
        m->move = grown;
        m->room = room;
    }
    m->move[m->count++] = (struct kvt_sched_move){.source_extent = from.extent,
                                                  .target_extent = to.extent,
                                                  .source_offset = from.offset + from_offset,
                                                  .target_offset = to.offset + to_offset,
                                                  .bytes = bytes};
}

static int moves_reserve(struct moves *m, uint32_t more) {
    if (more <= m->room - m->count) {
        return 0;
    }
    struct kvt_sched_move *grown = realloc(m->move, (size_t)(m->count + more) * sizeof(*grown));
    if (grown == NULL) {
        return -KVT_ENOMEM;
    }
    m->move = grown;
    m->room = m->count + more;
    return 0;
}

/* Tails of resident layers of a segment worker. */
static void cow_moves(const struct kvt_engine *e, const struct cache *c, const struct schedule *sc,
                      struct moves *m) {
    const struct family *f = c->family;
    for (uint32_t l = 0; l < f->layer_count && family_is_segment(e, f); l++) {
        for (uint32_t i = 0; i < sc->cow_count && f->resident[l]; i++) {
            const struct row *r = &c->rows[sc->cows[i].row];
            const struct block *to = r->blocks[sc->cows[i].index];
            uint64_t tokens = r->length % e->config.block_tokens;
            move_push(m, block_gpu_k(e, sc->cows[i].old, l), 0, block_gpu_k(e, to, l), 0,
                      tokens * f->bytes[l].k);
            move_push(m, block_gpu_v(e, sc->cows[i].old, l), 0, block_gpu_v(e, to, l), 0,
                      tokens * f->bytes[l].v);
        }
    }
}

/* K and V of one row of one layer, from row `from_row` of one set of planes to `to_row` of another. */
static void row_moves(const struct family *f, uint32_t l, const struct planes *from,
                      uint32_t from_row, const struct planes *to, uint32_t to_row, uint64_t tokens,
                      struct moves *m) {
    uint64_t k = f->bytes[l].k;
    uint64_t v = f->bytes[l].v;
    uint64_t from_v = (uint64_t)from->rows * from->capacity * k;
    uint64_t to_v = (uint64_t)to->rows * to->capacity * k;
    move_push(m, from->place[l], (uint64_t)from_row * from->capacity * k, to->place[l],
              (uint64_t)to_row * to->capacity * k, tokens * k);
    move_push(m, from->place[l], from_v + (uint64_t)from_row * from->capacity * v, to->place[l],
              to_v + (uint64_t)to_row * to->capacity * v, tokens * v);
}

/* A static cache keeps its addresses: rows go to the new planes and back. */
static bool planes_keep_addresses(const struct kvt_engine *e, const struct cache *c) {
    return c->family->is_static && c->planes != NULL && c->planes->owner == c->id &&
           c->planes->refs == 1 && c->planes->rows >= c->row_count &&
           !KVT_BROKEN(e->rules, KVT_BREAK_STATIC_PLANES_WANDER);
}

/* Moves of what the rows hold, from `from` (places as they were) to `to`, layer by layer. */
static void plane_moves(const struct cache *c, const struct schedule *sc, const struct planes *from,
                        const struct planes *to, struct moves *m) {
    const struct family *f = c->family;
    for (uint32_t l = 0; l < f->layer_count; l++) {
        if (!f->resident[l]) {
            continue;
        }
        for (uint32_t i = 0; i < c->row_count; i++) {
            if (!sc->planes_kept || sc->old_planes_row[i] != i) {
                row_moves(f, l, from, sc->old_planes_row[i], to, i, c->rows[i].length, m);
            }
        }
        for (uint32_t i = 0; i < c->row_count && sc->planes_kept; i++) {
            if (sc->old_planes_row[i] != i) {
                row_moves(f, l, to, i, from, i, c->rows[i].length, m);
            }
        }
    }
}

/* Makes the moves into the new planes, which may take over the old ones' places. Nothing can fail
 * any more: the settling has tried it. */
static void planes_move(struct kvt_engine *e, struct cache *c, struct schedule *sc, bool chained,
                        struct moves *m) {
    if (sc->old_planes_row == NULL || sc->old_planes == NULL) {
        return;
    }
    struct planes from = sc->planes_kept ? *c->planes : *sc->old_planes;
    struct planes *to = sc->planes_kept ? sc->old_planes : c->planes;
    struct dev_place places[KVT_LAYERS_MAX];
    memcpy(places, from.place, c->family->layer_count * sizeof(*places));
    if (chained) {
        int rc = planes_chain(e, sc->old_planes, to);
        KVT_ASSERT(rc == KVT_READY);
        sc->moved_in_place = true;
    }
    from.place = places;
    plane_moves(c, sc, &from, to, m);
}

/* ---- applying what was settled ------------------------------------------------------------------------ */

static int cows_apply(struct kvt_engine *e, struct schedule *sc) {
    struct cache *c = sc->cache;
    sc->cows = calloc(sc->row_count + 1, sizeof(*sc->cows));
    if (sc->cows == NULL) {
        return -KVT_ENOMEM;
    }
    for (uint32_t i = 0; i < sc->row_count; i++) {
        struct row *r = &c->rows[sc->rows[i]];
        if (r->cow == NULL) {
            continue;
        }
        uint32_t index = r->length / e->config.block_tokens;
        sc->cows[sc->cow_count++] =
            (struct cow){.row = sc->rows[i], .index = index, .old = r->blocks[index]};
        r->blocks[index] = r->cow;
        r->cow = NULL;
        sc->fresh_from[sc->rows[i]] = index * e->config.block_tokens;
    }
    return 0;
}

static int planes_apply(const struct kvt_engine *e, struct cache *c, struct schedule *sc) {
    if (c->planes_next == NULL) {
        return 0;
    }
    sc->old_planes_row = calloc(c->row_count, sizeof(*sc->old_planes_row));
    if (sc->old_planes_row == NULL) {
        return -KVT_ENOMEM;
    }
    for (uint32_t i = 0; i < c->row_count; i++) {
        sc->old_planes_row[i] = c->rows[i].planes_row;
    }
    sc->planes_kept = planes_keep_addresses(e, c);
    if (sc->planes_kept) {
        sc->old_planes = c->planes_next; /* only a place to turn around in */
    } else {
        sc->old_planes = c->planes;
        c->planes = c->planes_next;
    }
    c->planes_next = NULL;
    for (uint32_t i = 0; i < c->row_count; i++) {
        c->rows[i].planes_row = i;
    }
    return 0;
}

/* The moves will not be made: back to the planes that hold the tokens. */
static void planes_revert(struct cache *c, struct schedule *sc) {
    if (sc->old_planes_row == NULL) {
        return;
    }
    if (!sc->planes_kept) {
        struct planes *unused = c->planes;
        c->planes = sc->old_planes;
        sc->old_planes = unused;
    }
    for (uint32_t i = 0; i < c->row_count; i++) {
        c->rows[i].planes_row = sc->old_planes_row[i];
    }
}

static int schedule_fill(struct kvt_engine *e, struct schedule *sc, struct step_plan *plan,
                         uint64_t first_step) {
    struct cache *c = plan->cache;
    *sc = (struct schedule){.phase = PHASE_OPEN,
                            .cache = c,
                            .first_step = first_step,
                            .steps = plan->steps,
                            .row_count = plan->count,
                            .rows = plan->rows,
                            .tokens = plan->tokens};
    plan->rows = NULL;
    plan->tokens = NULL;
    sc->first_op = calloc(plan->steps, sizeof(*sc->first_op));
    sc->need_to = calloc(plan->steps, sizeof(*sc->need_to));
    sc->need_from = calloc(plan->steps, sizeof(*sc->need_from));
    sc->lengths = calloc(plan->count + 1, sizeof(*sc->lengths));
    sc->fresh_from = calloc(c->row_count, sizeof(*sc->fresh_from));
    sc->end_program = kvt_program_create(c->session, 1, 0, 0);
    if (sc->end_program == NULL || sc->first_op == NULL || sc->need_to == NULL ||
        sc->need_from == NULL || sc->lengths == NULL || sc->fresh_from == NULL) {
        return -KVT_ENOMEM;
    }
    for (uint32_t i = 0; i < plan->count; i++) {
        sc->lengths[i] = c->rows[sc->rows[i]].length;
    }
    for (uint32_t i = 0; i < c->row_count; i++) {
        sc->fresh_from[i] = c->rows[i].length;
    }
    return 0;
}

static void schedule_clear(struct schedule *sc) {
    free(sc->rows);
    free(sc->tokens);
    free(sc->first_op);
    free(sc->need_to);
    free(sc->need_from);
    free(sc->lengths);
    free(sc->fresh_from);
    free(sc->cows);
    free(sc->old_planes_row);
    kvt_program_free(sc->end_program);
    *sc = (struct schedule){0};
}

/* What the schedule's moves and copies came from is nobody's any more. */
static void moved_from_free(struct kvt_engine *e, struct schedule *sc, bool keep_cows) {
    struct cache *c = sc->cache;
    for (uint32_t i = 0; i < sc->cow_count; i++) {
        struct cow *cow = &sc->cows[i];
        struct block **entry = &c->rows[cow->row].blocks[cow->index];
        if (keep_cows) {
            block_unref(e, cow->old);
        } else {
            block_unref(e, *entry);
            *entry = cow->old;
        }
    }
    sc->cow_count = 0;
    for (uint32_t l = 0; sc->old_planes != NULL && l < c->family->layer_count &&
                         KVT_BROKEN(e->rules, KVT_BREAK_PLANE_FREED_UNDER_REFERRER);
         l++) {
        planes_layer_free(e, sc->old_planes, l);
    }
    planes_unref(e, sc->old_planes);
    sc->old_planes = NULL;
}

/* Tests: nobody reads a schedule that has ended. */
void ring_scribble(struct kvt_engine *e, struct session *s) {
    if (e->config.poison_host && s->schedule.ring_bytes > 0) {
        memset(s->ring + s->schedule.ring_offset, 0xa5, s->schedule.ring_bytes);
    }
}

/* The schedule is over, in whatever way; nothing of it is in flight, and the worker has stopped
 * using what it moved from. */
void schedule_close(struct kvt_engine *e, struct session *s, bool keep_cows) {
    struct schedule *sc = &s->schedule;
    moved_from_free(e, sc, keep_cows);
    ring_scribble(e, s);
    e->sweep_due |= sc->moved_in_place;
    schedule_clear(sc);
}

/* ---- the ring -------------------------------------------------------------------------------------------- */

static uint64_t ring_bytes_needed(const struct pieces *steps, uint32_t count, uint32_t moves) {
    uint64_t bytes = sizeof(struct kvt_sched_header) + count * sizeof(struct kvt_sched_step) +
                     (uint64_t)moves * sizeof(struct kvt_sched_move);
    for (uint32_t i = 0; i < count; i++) {
        bytes += pieces_bytes(&steps[i]);
    }
    return (bytes + 7) / 8 * 8;
}

/* Pieces of streamed layers were relative to their slot. */
static void piece_place(const struct session *s, struct kvt_sched_piece *piece,
                        struct kvt_sched_run *runs, struct kvt_sched_move *moves) {
    if ((piece->flags & KVT_PIECE_STREAMED) == 0) {
        return;
    }
    struct dev_place at = s->slots[piece->slot].place;
    piece->extent = at.extent;
    if (piece->k_row_bytes != 0) {
        piece->k_offset += at.offset;
        piece->v_offset += at.offset;
    }
    for (uint32_t i = 0; i < piece->run_count; i++) {
        runs[piece->run_first + i].k_offset += at.offset;
        runs[piece->run_first + i].v_offset += at.offset;
    }
    for (uint32_t i = 0; i < piece->move_count; i++) {
        struct kvt_sched_move *m = &moves[piece->move_first + i];
        m->source_extent = m->target_extent = at.extent;
        m->source_offset += at.offset;
        m->target_offset += at.offset;
    }
}

static void ring_write(struct session *s, const struct pieces *steps, const struct moves *lead) {
    struct schedule *sc = &s->schedule;
    uint8_t *base = s->ring + sc->ring_offset;
    struct kvt_sched_header h = {.magic = KVT_SCHEDULE_MAGIC,
                                 .version = KVT_SCHEDULE_VERSION,
                                 .bytes = (uint32_t)sc->ring_bytes,
                                 .cache = sc->cache->id,
                                 .first_step = sc->first_step,
                                 .steps_count = sc->steps,
                                 .moves_count = lead->count,
                                 .moves_leading = lead->count};
    for (uint32_t i = 0; i < sc->steps; i++) {
        h.moves_count += steps[i].move_count;
        h.pieces_count += steps[i].piece_count;
        h.runs_count += steps[i].run_count;
        h.rows_count += steps[i].row_count;
    }
    h.steps_offset = sizeof(h);
    h.moves_offset = h.steps_offset + h.steps_count * (uint32_t)sizeof(struct kvt_sched_step);
    h.pieces_offset = h.moves_offset + h.moves_count * (uint32_t)sizeof(struct kvt_sched_move);
    h.runs_offset = h.pieces_offset + h.pieces_count * (uint32_t)sizeof(struct kvt_sched_piece);
    h.rows_offset = h.runs_offset + h.runs_count * (uint32_t)sizeof(struct kvt_sched_run);
    memcpy(base, &h, sizeof(h));
    struct kvt_sched_step *step = (void *)(base + h.steps_offset);
    struct kvt_sched_move *move = (void *)(base + h.moves_offset);
    struct kvt_sched_piece *piece = (void *)(base + h.pieces_offset);
    struct kvt_sched_run *run = (void *)(base + h.runs_offset);
    uint32_t *row = (void *)(base + h.rows_offset);
    uint32_t moves = lead->count, pieces = 0, runs = 0, rows = 0;
    if (lead->count > 0) {
        memcpy(move, lead->move, lead->count * sizeof(*move));
    }
    for (uint32_t i = 0; i < sc->steps; i++) {
        const struct pieces *p = &steps[i];
        step[i] = (struct kvt_sched_step){
            .step = sc->first_step + i, .piece_first = pieces, .piece_count = p->piece_count};
        if (p->move_count > 0) {
            memcpy(move + moves, p->move, p->move_count * sizeof(*move));
        }
        if (p->row_count > 0) {
            memcpy(row + rows, p->row, p->row_count * sizeof(*row));
        }
        for (uint32_t j = 0; j < p->run_count; j++) {
            run[runs + j] = p->run[j];
            run[runs + j].row_first += rows;
        }
        for (uint32_t j = 0; j < p->piece_count; j++) {
            struct kvt_sched_piece *out = &piece[pieces + j];
            *out = p->piece[j];
            out->run_first += runs;
            out->move_first += moves;
            piece_place(s, out, run, move);
        }
        moves += p->move_count;
        pieces += p->piece_count;
        runs += p->run_count;
        rows += p->row_count;
    }
}

/* Moves that new planes can need. */
static uint32_t plane_moves_most(const struct cache *c, const struct schedule *sc) {
    return sc->old_planes_row == NULL ? 0 : 4 * c->row_count * c->family->resident_count;
}

/* ---- opening --------------------------------------------------------------------------------------------- */

/* Builds as many of the steps as fit the ring beside `moves` leading moves, at least one: then
 * sc->steps is how many. `lengths` is scratch, of each row that takes part. */
static int steps_build(struct kvt_engine *e, const struct session *s, struct schedule *sc,
                       struct pieces *steps, uint32_t moves, uint32_t *lengths, char *text) {
    for (uint32_t at = 0; at < sc->steps; at++) {
        for (uint32_t i = 0; i < sc->row_count; i++) {
            lengths[i] = sc->lengths[i] + at * sc->tokens[i];
        }
        struct step_shape shape = {.rows = sc->rows,
                                   .lengths = lengths,
                                   .tokens = sc->tokens,
                                   .count = sc->row_count,
                                   .bytes_max = s->ring_bytes};
        int rc = pieces_build(e, sc->cache, &shape, &steps[at]);
        bool fits = rc == 0 && ring_bytes_needed(steps, at + 1, moves) <= s->ring_bytes;
        if (rc != 0 && rc != -KVT_ETOOBIG) {
            return rc;
        }
        if (!fits && at == 0) {
            kvt_text_format(text, KVT_TEXT_BYTES,
                            "step: its schedule does not fit the schedule ring of %llu bytes; use "
                            "larger pieces or fewer rows, or raise [daemon] ring_size",
                            (unsigned long long)s->ring_bytes);
            return -KVT_ETOOBIG;
        }
        if (!fits) {
            pieces_free(&steps[at]);
            sc->steps = at;
        }
    }
    return 0;
}

/* Pieces of the step that will probably come next: the same rows append as much again, in as many
 * steps as were asked for. If that does not fit, the next slots will be larger: no guess. */
static bool guess_pieces(struct kvt_engine *e, struct session *s, uint32_t asked,
                         struct pieces *next) {
    struct schedule *sc = &s->schedule;
    struct cache *c = sc->cache;
    if (s->slot_count == 0 || sc->row_count == 0) {
        return false;
    }
    uint32_t *lengths = malloc(sc->row_count * sizeof(*lengths));
    bool fits = lengths != NULL;
    uint64_t limit = c->tokens_max != 0 ? c->tokens_max : KVT_TOKENS_MAX;
    uint64_t room = family_is_segment(e, c->family) ? limit : c->capacity;
    for (uint32_t i = 0; i < sc->row_count && fits; i++) {
        uint64_t length = sc->lengths[i] + (uint64_t)sc->steps * sc->tokens[i];
        lengths[i] = (uint32_t)length;
        uint64_t ahead = length + (uint64_t)asked * sc->tokens[i];
        fits = length + sc->tokens[i] <= limit && (ahead < limit ? ahead : limit) <= room;
    }
    struct step_shape shape = {.rows = sc->rows,
                               .lengths = lengths,
                               .tokens = sc->tokens,
                               .count = sc->row_count,
                               .bytes_max = s->ring_bytes,
                               .streamed_only = true};
    fits = fits && pieces_build(e, c, &shape, next) == 0;
    free(lengths);
    return fits;
}

static void ring_place(struct session *s, struct schedule *sc, uint64_t bytes) {
    if (s->ring_head + bytes > s->ring_bytes) {
        s->ring_head = 0;
    }
    sc->ring_offset = s->ring_head;
    sc->ring_bytes = bytes;
    s->ring_head += bytes;
}

int schedule_open(struct kvt_engine *e, struct session *s, struct step_plan *plan, char *text) {
    struct schedule *sc = &s->schedule;
    struct cache *c = plan->cache;
    struct moves lead = {0};
    struct pieces next = {0};
    uint32_t planned = plan->steps;
    struct dev_place places[KVT_LAYERS_MAX]; /* of the old planes, to go back to */
    bool moved = false;
    struct pieces *steps = calloc(planned, sizeof(*steps));
    uint32_t *lengths = malloc((plan->count + 1) * sizeof(*lengths));
    int rc =
        steps == NULL || lengths == NULL ? -KVT_ENOMEM : schedule_fill(e, sc, plan, s->step_next);
    if (rc == 0) {
        rc = cows_apply(e, sc);
    }
    bool chained = c->planes_next != NULL && planes_reuse(c);
    if (rc == 0) {
        rc = planes_apply(e, c, sc);
    }
    if (rc == 0) {
        cow_moves(e, c, sc, &lead);
        rc = lead.no_memory ? -KVT_ENOMEM
                            : steps_build(e, s, sc, steps, lead.count + plane_moves_most(c, sc),
                                          lengths, text);
    }
    if (rc == 0 && sc->old_planes_row != NULL) {
        rc = moves_reserve(&lead, plane_moves_most(c, sc));
    }
    if (rc == 0 && sc->old_planes_row != NULL) {
        moved = chained;
        if (chained) {
            memcpy(places, sc->old_planes->place, c->family->layer_count * sizeof(*places));
        }
        planes_move(e, c, sc, chained, &lead);
        KVT_ASSERT(!lead.no_memory);
        rc = steps_build(e, s, sc, steps, lead.count, lengths, text); /* now with the places */
        KVT_ASSERT(rc == 0);
    }
    if (rc == 0) {
        bool guess = guess_pieces(e, s, planned, &next);
        rc = programs_emit(e, s, steps, guess ? &next : NULL);
    }
    if (rc == 0) {
        ring_place(s, sc, ring_bytes_needed(steps, sc->steps, lead.count));
        ring_write(s, steps, &lead);
        s->step_next += sc->steps;
        if (KVT_BROKEN(e->rules, KVT_BREAK_FREE_BEFORE_STEP)) {
            moved_from_free(e, sc, true);
        }
    } else if (sc->phase != PHASE_NONE) {
        if (moved) {
            planes_chain_undo(e, sc->old_planes, c->planes, places);
            sc->moved_in_place = false;
        }
        planes_revert(c, sc);
        schedule_close(e, s, false);
    }
    for (uint32_t i = 0; i < planned && steps != NULL; i++) {
        pieces_free(&steps[i]);
    }
    free(steps);
    free(lengths);
    free(lead.move);
    pieces_free(&next);
    return rc;
}
