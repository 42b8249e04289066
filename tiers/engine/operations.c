/* From pieces to operations: slots and generations are assigned, copies and gates written down.
 *
 * Everything of a schedule is built at once and handed over in order. The gates, as docs/STEP.md
 * has them:
 *   FILL(slot, g)      done[slot] is the last generation that a schedule named for it; the last
 *                      operation on the slot is complete (write-back of its occupant, or a fill
 *                      that was discarded); write-backs and copy-on-write copies of all tokens that
 *                      it reads are complete
 *   WRITEBACK(slot, g) done[slot] is g; its fill and the layer's earlier write-backs are complete
 *   STEP(n)            the worker has posted step n; the step's write-backs are complete
 * Tokens below `fresh_from` of their row were complete before the schedule was opened.
 */
#include "tiers/engine/state.h"

#include <stdlib.h>
#include <string.h>

#define DECODE_TOKENS_MAX 16u /* a step that appends more to a row is prefill */

struct id_list {
    uint64_t *id;
    uint32_t id_count, id_room;
};

struct build {
    struct kvt_engine *e;
    struct session *s;
    struct schedule *sc;
    struct cache *c;
    struct kvt_op *op;
    uint32_t op_count, op_room;
    struct kvt_copy *copy;
    uint32_t copy_count, copy_room;
    uint64_t *dep;
    uint32_t dep_count, dep_room;
    struct id_list *layer; /* [layer] write-backs and copies of its newest tokens */
    struct id_list fresh;  /* write-backs of the layer that is being listed */
    struct id_list step;   /* all that the step's commit waits for */
    uint8_t traffic;
    bool no_memory;
    bool window_attached;  /* to one of the programs */
    struct kvt_op nothing; /* written to when there is no memory, and never read */
};

#define ROOM(b, p, what)                                                                       \
    (array_grow((void **)&(p)->what, &(p)->what##_room, (p)->what##_count, sizeof(*(p)->what)) \
         ? true                                                                                \
         : ((b)->no_memory = true, false))

static void id_add(struct build *b, struct id_list *list, uint64_t id) {
    if (ROOM(b, list, id)) {
        list->id[list->id_count++] = id;
    }
}

static void dep_add(struct build *b, uint64_t id) {
    if (id != 0 && ROOM(b, b, dep)) {
        b->dep[b->dep_count++] = id;
    }
}

static void deps_add(struct build *b, const struct id_list *list) {
    for (uint32_t i = 0; i < list->id_count; i++) {
        dep_add(b, list->id[i]);
    }
}

/* ---- copies --------------------------------------------------------------------------------------- */

static struct kvt_place on_host(uint64_t offset) {
    return (struct kvt_place){.tier = KVT_TIER_HOST, .offset = offset};
}

static struct kvt_place on_gpu(struct dev_place p, uint64_t offset) {
    return (
        struct kvt_place){.tier = KVT_TIER_GPU, .extent = p.extent, .offset = p.offset + offset};
}

/* Adds a copy, or lets the last one of this operation go on. */
static void copy_add(struct build *b, uint32_t first, struct kvt_place source,
                     struct kvt_place target, uint64_t bytes) {
    if (bytes == 0) {
        return;
    }
    if (b->copy_count > first) {
        struct kvt_copy *last = &b->copy[b->copy_count - 1];
        if (last->source.tier == source.tier && last->target.tier == target.tier &&
            last->source.extent == source.extent && last->target.extent == target.extent &&
            last->source.offset + last->bytes == source.offset &&
            last->target.offset + last->bytes == target.offset) {
            last->bytes += bytes;
            return;
        }
    }
    if (ROOM(b, b, copy)) {
        b->copy[b->copy_count++] =
            (struct kvt_copy){.source = source, .target = target, .bytes = bytes};
    }
}

/* Copies tokens [begin, end) of one plane between the slot and the row's blocks. `slot_offset` is
 * that of `begin`. `only_row`: leave out blocks that another row of the piece brings. */
static void plane_copies(struct build *b, uint32_t first, const struct row *table, uint32_t layer,
                         bool is_v, uint64_t begin, uint64_t end, struct dev_place slot,
                         uint64_t slot_offset, bool to_slot, uint32_t only_row) {
    uint64_t block_tokens = b->e->config.block_tokens;
    const struct layer_bytes *bytes = &b->c->family->bytes[layer];
    uint64_t token_bytes = is_v ? bytes->v : bytes->k;
    uint64_t token = begin;
    while (token < end && token_bytes > 0) {
        const struct block *block = table->blocks[token / block_tokens];
        uint64_t inside = token % block_tokens;
        uint64_t portion =
            block_tokens - inside < end - token ? block_tokens - inside : end - token;
        if (only_row == UINT32_MAX || block->mark_row == only_row) {
            uint64_t host =
                is_v ? block_host_v(b->e, block, layer) : block_host_k(b->e, block, layer);
            struct kvt_place at_host = on_host(host + inside * token_bytes);
            struct kvt_place at_slot = on_gpu(slot, slot_offset + (token - begin) * token_bytes);
            copy_add(b, first, to_slot ? at_host : at_slot, to_slot ? at_slot : at_host,
                     portion * token_bytes);
        }
        token += portion;
    }
}

static uint64_t copies_bytes(const struct build *b, uint32_t first) {
    uint64_t bytes = 0;
    for (uint32_t i = first; i < b->copy_count; i++) {
        bytes += b->copy[i].bytes;
    }
    return bytes;
}

/* The copies that fill a piece's slot (to_slot), or that take the appended tokens out of it. */
static uint64_t piece_copies(struct build *b, const struct pieces *p,
                             const struct kvt_sched_piece *piece, bool to_slot) {
    bool dense = !family_is_segment(b->e, b->c->family);
    struct dev_place slot = b->s->slots[piece->slot].place;
    uint32_t first = b->copy_count;
    for (uint32_t i = 0; i < piece->run_count; i++) {
        const struct kvt_sched_run *run = &p->run[piece->run_first + i];
        const struct row *table = &b->c->rows[p->row[run->row_first]];
        const struct layer_bytes *bytes = &b->c->family->bytes[piece->layer];
        uint64_t middle = (uint64_t)run->token_begin + run->read_count;
        uint64_t begin = to_slot ? run->token_begin : middle;
        uint64_t end = to_slot ? middle : middle + run->append_count;
        uint64_t skipped = begin - run->token_begin;
        uint32_t only_row = dense && to_slot ? i : UINT32_MAX;
        plane_copies(b, first, table, piece->layer, false, begin, end, slot,
                     run->k_offset + skipped * bytes->k, to_slot, only_row);
        plane_copies(b, first, table, piece->layer, true, begin, end, slot,
                     run->v_offset + skipped * bytes->v, to_slot, only_row);
    }
    return copies_bytes(b, first);
}

/* ---- slots ------------------------------------------------------------------------------------------ */

static void slots_restart(struct build *b) {
    if (b->c->family->is_static && !KVT_BROKEN(b->e->rules, KVT_BREAK_STATIC_SLOTS_WANDER)) {
        b->s->slot_cursor = 0;
    }
}

/* The slot that has been free for longest at `position`: its occupant was read for the last time
 * before. A static cache takes the next one in turn, so that each step has the same slots. */
static uint32_t slot_choose(struct build *b, uint64_t position) {
    struct session *s = b->s;
    KVT_ASSERT(s->slot_count > 0);
    uint32_t best = UINT32_MAX;
    for (uint32_t i = 0; i < s->slot_count; i++) {
        uint32_t slot = (s->slot_cursor + i) % s->slot_count;
        if (s->slots[slot].free_at <= position &&
            (best == UINT32_MAX ||
             (!b->c->family->is_static && s->slots[slot].free_at < s->slots[best].free_at))) {
            best = slot;
        }
    }
    KVT_ASSERT(best != UINT32_MAX); /* or a step needs more slots than slots_needed says */
    s->slot_cursor = (best + 1) % s->slot_count;
    return best;
}

/* Position of a piece among all pieces ever, and the one from which its slot may be used again. */
static uint64_t piece_position(const struct build *b, const struct kvt_sched_piece *piece,
                               uint32_t index) {
    bool dense = !family_is_segment(b->e, b->c->family);
    return b->s->position + (dense ? piece->reader : index);
}

static uint64_t piece_free_at(const struct build *b, const struct kvt_sched_piece *piece,
                              uint32_t index) {
    bool dense = !family_is_segment(b->e, b->c->family);
    if (dense && !KVT_BROKEN(b->e->rules, KVT_BREAK_READER_RELEASES_SLOT)) {
        return b->s->position + piece->last_reader + 1;
    }
    return piece_position(b, piece, index) + 1;
}

static void step_positions_pass(struct build *b, const struct pieces *p) {
    uint32_t layers = b->c->family->layer_count;
    b->s->position += p->piece_count > layers ? p->piece_count : layers;
}

/* ---- operations -------------------------------------------------------------------------------------- */

static struct kvt_op *op_add(struct build *b, uint32_t kind, uint32_t role, uint64_t step,
                             uint32_t first_copy, uint64_t bytes) {
    if (!ROOM(b, b, op)) {
        return &b->nothing;
    }
    struct kvt_op *op = &b->op[b->op_count++];
    *op = (struct kvt_op){.id = ops_add(&b->s->ops, role, b->c->id, step, bytes),
                          .kind = (uint8_t)kind,
                          .traffic = b->traffic,
                          .copy_first = first_copy,
                          .copy_count = b->copy_count - first_copy,
                          .dep_first = b->dep_count};
    return op;
}

static void op_close(struct build *b, struct kvt_op *op) {
    op->dep_count = b->dep_count - op->dep_first;
}

/* Whether the piece reads tokens that were not complete when the schedule was opened. */
static bool piece_is_fresh(const struct build *b, const struct pieces *p,
                           const struct kvt_sched_piece *piece) {
    for (uint32_t i = 0; i < piece->run_count; i++) {
        const struct kvt_sched_run *run = &p->run[piece->run_first + i];
        for (uint32_t j = 0; j < run->row_count; j++) {
            uint32_t row = p->row[run->row_first + j];
            if (run->token_begin + run->read_count > b->sc->fresh_from[row]) {
                return true;
            }
        }
    }
    return false;
}

/* Names the next generation of a slot for the piece and writes down its fill. */
static uint64_t fill_add(struct build *b, const struct pieces *p, struct kvt_sched_piece *piece,
                         uint32_t index, uint32_t role, uint64_t step) {
    struct slot *slot = &b->s->slots[piece->slot];
    slot->generation++;
    piece->ready = piece->done = slot->generation;
    uint32_t first_copy = b->copy_count;
    uint64_t bytes = piece_copies(b, p, piece, true);
    struct kvt_op *op = op_add(b, KVT_OP_FILL, role, step, first_copy, bytes);
    op->slot = (uint16_t)piece->slot;
    op->generation = slot->generation;
    op->done_wait = slot->named;
    if (!KVT_BROKEN(b->e->rules, KVT_BREAK_FILL_IGNORES_WRITEBACK)) {
        dep_add(b, slot->last_op);
        if (piece_is_fresh(b, p, piece)) {
            deps_add(b, &b->layer[piece->layer]);
        }
    }
    op_close(b, op);
    slot->last_op = op->id;
    slot->free_at = piece_free_at(b, piece, index);
    if (role == ROLE_GUESS) {
        b->s->ops.guesses++;
    } else {
        slot->named = slot->generation;
    }
    return bytes;
}

static uint64_t writeback_add(struct build *b, const struct pieces *p,
                              const struct kvt_sched_piece *piece, uint64_t step) {
    uint32_t first_copy = b->copy_count;
    uint64_t bytes = piece_copies(b, p, piece, false);
    if (bytes == 0) {
        return 0;
    }
    struct slot *slot = &b->s->slots[piece->slot];
    struct kvt_op *op = op_add(b, KVT_OP_WRITEBACK, ROLE_WRITEBACK, step, first_copy, bytes);
    op->slot = (uint16_t)piece->slot;
    op->generation = piece->ready;
    dep_add(b, slot->last_op);
    deps_add(b, &b->layer[piece->layer]);
    op_close(b, op);
    slot->last_op = op->id;
    id_add(b, &b->fresh, op->id);
    id_add(b, &b->step, op->id);
    return bytes;
}

/* The layer's own listing is over: later reads wait for what it has appended. */
static void layer_listed(struct build *b, uint32_t layer) {
    if (b->fresh.id_count > 0) {
        struct id_list old = b->layer[layer];
        b->layer[layer] = b->fresh;
        b->fresh = old;
    }
    b->fresh.id_count = 0;
}

/* ---- the prefetch of the step before ------------------------------------------------------------------ */

static bool run_matches(const struct pieces *p, const struct kvt_sched_run *run,
                        const struct pieces *g, const struct kvt_sched_run *guessed) {
    return run->token_begin == guessed->token_begin && run->read_count <= guessed->read_count &&
           run->k_offset == guessed->k_offset && run->v_offset == guessed->v_offset &&
           run->row_count == guessed->row_count &&
           memcmp(&p->row[run->row_first], &g->row[guessed->row_first],
                  run->row_count * sizeof(*p->row)) == 0;
}

/* Whether what was prefetched for `guessed` serves `piece`: the same rows' tokens, or more of them,
 * at the same places. */
static bool piece_matches(const struct build *b, const struct pieces *p,
                          const struct kvt_sched_piece *piece,
                          const struct kvt_sched_piece *guessed) {
    const struct pieces *g = &b->s->guess.pieces;
    if (piece->layer != guessed->layer || piece->reader != guessed->reader ||
        piece->k_row_bytes != guessed->k_row_bytes || piece->v_row_bytes != guessed->v_row_bytes) {
        return false;
    }
    if (KVT_BROKEN(b->e->rules, KVT_BREAK_KEEP_STALE_PREFETCH)) {
        return true;
    }
    if (piece->move_count != guessed->move_count) {
        return false;
    }
    if (piece->move_count > 0 && memcmp(&p->move[piece->move_first], &g->move[guessed->move_first],
                                        piece->move_count * sizeof(*p->move)) != 0) {
        return false;
    }
    for (uint32_t i = 0; i < piece->run_count; i++) {
        const struct kvt_sched_run *run = &p->run[piece->run_first + i];
        if (i >= guessed->run_count ? run->read_count > 0
                                    : !run_matches(p, run, g, &g->run[guessed->run_first + i])) {
            return false;
        }
    }
    return true;
}

static bool guess_is_usable(const struct build *b) {
    const struct guess *g = &b->s->guess;
    return g->active && !KVT_BROKEN(b->e->rules, KVT_BREAK_PREFETCH_UNUSED) &&
           (KVT_BROKEN(b->e->rules, KVT_BREAK_KEEP_STALE_PREFETCH) ||
            (g->cache == b->c->id && g->version == b->c->version));
}

/* Uses the guess's piece `at` for `piece`, if it serves it. */
static bool guess_adopt(struct build *b, const struct pieces *p, struct kvt_sched_piece *piece,
                        uint32_t index, uint32_t at, uint64_t step, uint64_t *need) {
    struct session *s = b->s;
    struct guess *g = &s->guess;
    if (at >= g->pieces.piece_count || !piece_matches(b, p, piece, &g->pieces.piece[at])) {
        return false;
    }
    struct op_record *r = ops_find(&s->ops, g->op[at]);
    KVT_ASSERT(r != NULL && r->role == ROLE_GUESS);
    if (r->complete && r->status != KVT_DONE) {
        return false;
    }
    piece->slot = g->pieces.piece[at].slot;
    piece->ready = piece->done = g->pieces.piece[at].ready;
    uint32_t first = b->copy_count;
    *need = piece_copies(b, p, piece, true); /* only to count */
    b->copy_count = first;
    struct slot *slot = &s->slots[piece->slot];
    slot->named = piece->ready;
    slot->free_at = piece_free_at(b, piece, index);
    s->slot_cursor = (piece->slot + 1) % s->slot_count;
    uint64_t unused = r->bytes > *need ? r->bytes - *need : 0;
    s->counters.prefetch_discarded_bytes += unused;
    b->c->counters.prefetch_discarded_bytes += unused;
    r->role = ROLE_FILL;
    r->step = step;
    r->bytes -= unused;
    if (r->complete) {
        s->counters.to_device_bytes += r->bytes;
        b->c->counters.to_device_bytes += r->bytes;
    } else {
        s->ops.guesses--;
    }
    return true;
}

/* Gives up the pieces of the guess from `from` on: what is not submitted never will be, and a
 * later fill of their slots waits for what is. */
void guess_discard(struct kvt_engine *e, struct session *s, uint32_t from) {
    struct guess *g = &s->guess;
    if (!g->active) {
        return;
    }
    g->active = false;
    bool cancel = false;
    uint64_t first = UINT64_MAX;
    for (uint32_t i = from; i < g->pieces.piece_count; i++) {
        struct op_record *r = ops_find(&s->ops, g->op[i]);
        KVT_ASSERT(r != NULL && r->role == ROLE_GUESS);
        s->slots[g->pieces.piece[i].slot].free_at = 0;
        r->role = ROLE_DISCARDED;
        if (r->complete) {
            uint64_t bytes = r->status == KVT_DONE ? r->bytes : 0;
            struct cache *c = cache_find(e, session_index(e, s), g->cache);
            s->counters.prefetch_discarded_bytes += bytes;
            if (c != NULL) {
                c->counters.prefetch_discarded_bytes += bytes;
            }
        } else {
            s->ops.guesses--;
            cancel = true;
            first = g->op[i] < first ? g->op[i] : first;
        }
    }
    ops_trim(&s->ops);
    if (cancel && !s->draining) {
        struct kvt_action *a = action_push(e, KVT_ACTION_CANCEL);
        a->device = s->device;
        a->session = session_index(e, s);
        a->value = first;
    }
}

/* The first pieces of a step that nobody has asked for yet, each slot at most once. */
static void guess_build(struct build *b, struct pieces *next) {
    struct session *s = b->s;
    struct guess *g = &s->guess;
    uint64_t used = 0;
    uint32_t kept = 0;
    slots_restart(b);
    for (uint32_t i = 0; i < next->piece_count; i++) {
        struct kvt_sched_piece *piece = &next->piece[i];
        KVT_ASSERT((piece->flags & KVT_PIECE_STREAMED) != 0);
        if ((piece->flags & KVT_PIECE_REREAD) != 0) {
            break; /* reads what that step will append */
        }
        bool any = false;
        for (uint32_t j = 0; j < s->slot_count; j++) {
            any |= s->slots[j].free_at <= piece_position(b, piece, i);
        }
        if (!any) {
            break;
        }
        piece->slot = slot_choose(b, piece_position(b, piece, i));
        if ((used >> piece->slot) & 1) {
            break;
        }
        used |= UINT64_C(1) << piece->slot;
        (void)fill_add(b, next, piece, i, ROLE_GUESS, 0);
        g->op[kept++] = s->slots[piece->slot].last_op;
    }
    next->piece_count = kept;
    struct pieces old = g->pieces;
    g->pieces = *next;
    *next = old;
    g->active = kept > 0;
    g->cache = b->c->id;
    g->version = b->c->version;
}

/* ---- a step ----------------------------------------------------------------------------------------------- */

/* Copies of tails that are shared or were full: on the host, a layer each. */
static void cows_build(struct build *b, uint64_t step) {
    struct schedule *sc = b->sc;
    const struct family *f = b->c->family;
    uint64_t block_tokens = b->e->config.block_tokens;
    for (uint32_t l = 0; l < f->layer_count && sc->cow_count > 0; l++) {
        if (f->resident[l]) {
            continue;
        }
        uint32_t first = b->copy_count;
        for (uint32_t i = 0; i < sc->cow_count; i++) {
            const struct row *r = &b->c->rows[sc->cows[i].row];
            const struct block *to = r->blocks[sc->cows[i].index];
            uint64_t tokens = r->length % block_tokens;
            copy_add(b, first, on_host(block_host_k(b->e, sc->cows[i].old, l)),
                     on_host(block_host_k(b->e, to, l)), tokens * f->bytes[l].k);
            copy_add(b, first, on_host(block_host_v(b->e, sc->cows[i].old, l)),
                     on_host(block_host_v(b->e, to, l)), tokens * f->bytes[l].v);
        }
        struct kvt_op *op = op_add(b, KVT_OP_COPY, ROLE_COW, step, first, copies_bytes(b, first));
        op_close(b, op);
        id_add(b, &b->layer[l], op->id);
        id_add(b, &b->step, op->id);
        sc->cow_ops_left++;
    }
}

static void step_op_add(struct build *b, uint64_t step) {
    struct kvt_op *op = op_add(b, KVT_OP_STEP, ROLE_STEP, step, b->copy_count, 0);
    op->step_wait = step;
    if (!KVT_BROKEN(b->e->rules, KVT_BREAK_COMMIT_IGNORES_WRITEBACK)) {
        deps_add(b, &b->step);
    }
    op_close(b, op);
}

/* Slots and operations of step `at` of the schedule. The first one uses the guess, as far as it
 * serves, and discards the rest before other slots are chosen. */
static void step_build(struct build *b, struct pieces *p, uint32_t at) {
    struct schedule *sc = b->sc;
    uint64_t step = sc->first_step + at;
    bool adopting = at == 0 && guess_is_usable(b);
    uint32_t adopted = 0;
    b->step.id_count = 0;
    sc->first_op[at] = b->s->ops.next;
    if (at == 0) {
        cows_build(b, step);
    }
    slots_restart(b);
    for (uint32_t i = 0; i < p->piece_count; i++) {
        struct kvt_sched_piece *piece = &p->piece[i];
        if ((piece->flags & KVT_PIECE_STREAMED) != 0) {
            uint64_t need = 0;
            adopting = adopting && guess_adopt(b, p, piece, i, adopted, step, &need);
            if (adopting) {
                adopted++;
            } else {
                guess_discard(b->e, b->s, adopted);
                piece->slot = slot_choose(b, piece_position(b, piece, i));
                need = fill_add(b, p, piece, i, ROLE_FILL, step);
            }
            sc->need_to[at] += need;
            sc->need_from[at] += writeback_add(b, p, piece, step);
        }
        if ((piece->flags & KVT_PIECE_LAST) != 0 && (piece->flags & KVT_PIECE_REREAD) == 0) {
            layer_listed(b, piece->layer);
        }
    }
    guess_discard(b->e, b->s, adopted);
    step_op_add(b, step);
    step_positions_pass(b, p);
}

/* Hands the operations built so far over as one program. */
static void program_flush(struct build *b, struct kvt_program **out) {
    *out = b->no_memory ? NULL
                        : kvt_program_create(session_index(b->e, b->s), b->op_count, b->copy_count,
                                             b->dep_count);
    if (*out == NULL) {
        b->no_memory = true;
        return;
    }
    struct kvt_program *program = *out;
    if (!b->window_attached && ops_window_attach(&b->s->ops, program) != 0) {
        b->no_memory = true;
        return;
    }
    b->window_attached = true;
    program->op_count = b->op_count;
    program->copy_count = b->copy_count;
    program->dep_count = b->dep_count;
    memcpy(program->ops, b->op, b->op_count * sizeof(*b->op));
    if (b->copy_count > 0) {
        memcpy(program->copies, b->copy, b->copy_count * sizeof(*b->copy));
    }
    if (b->dep_count > 0) {
        memcpy(program->deps, b->dep, b->dep_count * sizeof(*b->dep));
    }
    b->op_count = b->copy_count = b->dep_count = 0;
}

static void build_free(struct build *b) {
    free(b->op);
    free(b->copy);
    free(b->dep);
    for (uint32_t l = 0; b->layer != NULL && l < b->c->family->layer_count; l++) {
        free(b->layer[l].id);
    }
    free(b->layer);
    free(b->fresh.id);
    free(b->step.id);
}

static void shape_of_step(const struct build *b, uint32_t at, uint32_t *lengths,
                          struct step_shape *shape) {
    const struct schedule *sc = b->sc;
    for (uint32_t i = 0; i < sc->row_count; i++) {
        lengths[i] = sc->lengths[i] + at * sc->tokens[i];
    }
    *shape = (struct step_shape){
        .rows = sc->rows, .lengths = lengths, .tokens = sc->tokens, .count = sc->row_count};
}

/* What building changes, to go back to if memory runs out on the way. */
struct undo {
    struct slot slots[KVT_SLOTS_MAX];
    uint32_t slot_cursor;
    uint64_t position;
    struct guess guess;
    struct op_record guessed[KVT_SLOTS_MAX]; /* records of the guess's fills */
    struct op_window ops;
    struct kvt_counters of_session, of_cache;
    uint32_t action_count;
};

static void undo_note(const struct build *b, struct undo *u) {
    const struct session *s = b->s;
    memcpy(u->slots, s->slots, sizeof(u->slots));
    u->slot_cursor = s->slot_cursor;
    u->position = s->position;
    u->guess = s->guess;
    for (uint32_t i = 0; s->guess.active && i < s->guess.pieces.piece_count; i++) {
        u->guessed[i] = *ops_find(&s->ops, s->guess.op[i]);
    }
    u->ops = s->ops;
    u->of_session = s->counters;
    u->of_cache = b->c->counters;
    u->action_count = b->e->queue.count;
}

/* `next` gets back what the guess took of it. The only actions since then are cancels. */
static void undo_apply(struct build *b, const struct undo *u, struct pieces *next) {
    struct session *s = b->s;
    memcpy(s->slots, u->slots, sizeof(u->slots));
    s->slot_cursor = u->slot_cursor;
    s->position = u->position;
    if (s->guess.pieces.piece != u->guess.pieces.piece) {
        *next = s->guess.pieces;
    }
    s->guess = u->guess;
    s->ops = u->ops;
    for (uint32_t i = 0; s->guess.active && i < s->guess.pieces.piece_count; i++) {
        *ops_find(&s->ops, s->guess.op[i]) = u->guessed[i];
    }
    s->counters = u->of_session;
    b->c->counters = u->of_cache;
    b->e->queue.count = u->action_count;
}

/* Builds and hands over everything of the schedule that is being opened: `steps` holds its steps'
 * pieces, whose slots are assigned here; `next` (may be NULL) those of a guessed next step.
 * -KVT_ENOMEM: nothing was handed over; slots, guess and records are as they were. */
int programs_emit(struct kvt_engine *e, struct session *s, struct pieces *steps,
                  struct pieces *next) {
    struct schedule *sc = &s->schedule;
    struct build b = {.e = e, .s = s, .sc = sc, .c = sc->cache, .traffic = KVT_CLASS_DECODE};
    struct kvt_program *programs[KVT_STEPS_AHEAD_MAX + 1] = {NULL};
    uint64_t ops = 2 * sc->cache->family->layer_count + 2;
    for (uint32_t i = 0; i < sc->steps; i++) {
        ops += 2 * (uint64_t)steps[i].piece_count + 1;
    }
    for (uint32_t i = 0; i < sc->row_count; i++) {
        b.traffic = sc->tokens[i] > DECODE_TOKENS_MAX ? KVT_CLASS_PREFILL : b.traffic;
    }
    uint32_t *lengths = malloc((sc->row_count + 1) * sizeof(*lengths));
    b.layer = calloc(sc->cache->family->layer_count, sizeof(*b.layer));
    if (lengths == NULL || b.layer == NULL || ops_reserve(&s->ops, ops + KVT_SLOTS_MAX + 1) != 0) {
        free(lengths);
        build_free(&b);
        return -KVT_ENOMEM;
    }
    struct undo undo;
    undo_note(&b, &undo);
    struct step_shape shape;
    for (uint32_t i = 0; i < sc->steps && !b.no_memory; i++) {
        shape_of_step(&b, i, lengths, &shape);
        pieces_mark_sources(e, sc->cache, &shape);
        step_build(&b, &steps[i], i);
        program_flush(&b, &programs[i]);
    }
    if (next != NULL && !b.no_memory) {
        shape_of_step(&b, sc->steps, lengths, &shape);
        pieces_mark_sources(e, sc->cache, &shape);
        guess_build(&b, next);
        if (s->guess.active) {
            program_flush(&b, &programs[sc->steps]);
        }
    }
    if (b.no_memory) {
        undo_apply(&b, &undo, next);
    } else {
        s->ops.window_sent = s->ops.capacity;
    }
    for (uint32_t i = 0; i <= sc->steps; i++) {
        if (b.no_memory) {
            kvt_program_free(programs[i]);
        } else if (programs[i] != NULL) {
            program_push(e, s, programs[i]);
        }
    }
    free(lengths);
    build_free(&b);
    return b.no_memory ? -KVT_ENOMEM : 0;
}
