/* A schedule as the worker reads it, held against everything that a worker is promised: extents
 * that it has, offsets inside, each row's tokens exactly once in ascending order and cut only at
 * whole splits, appends by one row alone, generations that grow, no distinct block twice.
 */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

typedef unsigned long long ull;

/* ---- what is expected ------------------------------------------------------------------------ */

uint32_t sim_schedule_position(const struct sim_schedule *s, uint32_t row) {
    for (uint32_t i = 0; i < s->row_count; i++) {
        if (s->row[i] == row) {
            return i;
        }
    }
    return UINT32_MAX;
}

uint64_t sim_schedule_content(const struct sim_schedule *s, uint32_t position, uint32_t token) {
    uint32_t length = s->length[position];
    if (token < length) {
        return s->cache->rows[s->row[position]].ids[token];
    }
    uint32_t append = s->append[position];
    return s->content[(token - length) / append][position] + (token - length) % append;
}

static uint32_t length_before(const struct sim_schedule *s, uint32_t step, uint32_t position) {
    return s->length[position] + step * s->append[position];
}

static uint64_t k_bytes(const struct sim_schedule *s, uint32_t layer) {
    return kvt_layer_k_token_bytes(&s->cache->layers[layer]);
}

static uint64_t v_bytes(const struct sim_schedule *s, uint32_t layer) {
    return kvt_layer_v_token_bytes(&s->cache->layers[layer]);
}

/* ---- header and arrays ----------------------------------------------------------------------- */

static const void *array_at(struct sim *sim, const struct sim_schedule *s, uint32_t offset,
                            uint64_t count, uint64_t size) {
    if (offset % 4 != 0 || offset < sizeof(struct kvt_sched_header) || offset > s->header.bytes ||
        count * size > s->header.bytes - offset) {
        sim_fail(sim, "schedule: an array of %llu at %u leaves its %u bytes", (ull)count, offset,
                 s->header.bytes);
    }
    return s->bytes + offset;
}

static void read_schedule(struct sim *sim, struct sim_worker *w, const struct kvt_answer *a) {
    struct sim_schedule *s = &w->schedule;
    if (a->ring_bytes < sizeof(s->header) || a->ring_bytes > w->ring_bytes ||
        a->ring_offset > w->ring_bytes - a->ring_bytes || a->ring_offset % 8 != 0) {
        sim_fail(sim, "schedule: [%llu, +%llu) is outside the ring", (ull)a->ring_offset,
                 (ull)a->ring_bytes);
    }
    s->bytes = sim_grow(NULL, a->ring_bytes);
    s->ring_offset = a->ring_offset;
    memcpy(s->bytes, w->ring + a->ring_offset, a->ring_bytes);
    memcpy(&s->header, s->bytes, sizeof(s->header));
    const struct kvt_sched_header *h = &s->header;
    if (h->magic != KVT_SCHEDULE_MAGIC || h->version != KVT_SCHEDULE_VERSION ||
        h->bytes != a->ring_bytes || h->cache != s->cache->id || h->first_step != a->first_step ||
        h->steps_count != a->steps || h->moves_leading > h->moves_count) {
        sim_fail(sim, "schedule: the header and the answer disagree");
    }
    s->steps = array_at(sim, s, h->steps_offset, h->steps_count, sizeof(*s->steps));
    s->moves = array_at(sim, s, h->moves_offset, h->moves_count, sizeof(*s->moves));
    s->pieces = array_at(sim, s, h->pieces_offset, h->pieces_count, sizeof(*s->pieces));
    s->runs = array_at(sim, s, h->runs_offset, h->runs_count, sizeof(*s->runs));
    s->rows = array_at(sim, s, h->rows_offset, h->rows_count, sizeof(*s->rows));
}

/* ---- places ---------------------------------------------------------------------------------- */

static void check_range(struct sim *sim, const struct sim_worker *w, uint32_t extent,
                        uint64_t offset, uint64_t bytes, const char *what) {
    const struct sim_extent *x = sim_extent_find(sim, extent);
    if (!x || !x->live || x->mapped != w) {
        sim_fail(sim, "schedule: %s names extent %u, which the worker does not have", what, extent);
    }
    if (bytes > x->bytes || offset > x->bytes - bytes) {
        sim_fail(sim, "schedule: %s: [%llu, +%llu) leaves extent %u of %llu bytes", what,
                 (ull)offset, (ull)bytes, extent, (ull)x->bytes);
    }
}

static void check_move(struct sim *sim, const struct sim_worker *w,
                       const struct kvt_sched_move *m) {
    check_range(sim, w, m->source_extent, m->source_offset, m->bytes, "a move's source");
    check_range(sim, w, m->target_extent, m->target_offset, m->bytes, "a move's target");
    if (m->source_extent == m->target_extent && m->source_offset < m->target_offset + m->bytes &&
        m->target_offset < m->source_offset + m->bytes) {
        sim_fail(sim, "schedule: a move overlaps itself");
    }
    sim->stats.moves++;
}

static void check_piece(struct sim *sim, struct sim_worker *w, uint32_t index) {
    const struct sim_schedule *s = &w->schedule;
    const struct kvt_sched_piece *p = &s->pieces[index];
    if (p->layer >= s->cache->layer_count || p->reader >= s->cache->layer_count ||
        p->last_reader < p->reader || p->last_reader >= s->cache->layer_count ||
        p->run_first > s->header.runs_count || p->run_count > s->header.runs_count - p->run_first ||
        p->move_first > s->header.moves_count ||
        p->move_count > s->header.moves_count - p->move_first) {
        sim_fail(sim, "schedule: piece %u points outside", index);
    }
    if (((p->flags & KVT_PIECE_REREAD) != 0) != (p->layer != p->reader)) {
        sim_fail(sim, "schedule: piece %u: layer %u, reader %u, flags %u", index, p->layer,
                 p->reader, p->flags);
    }
    if ((p->flags & KVT_PIECE_STREAMED) == 0) {
        if (p->move_count != 0) {
            sim_fail(sim, "schedule: piece %u is resident and has duplicates", index);
        }
        return;
    }
    if (p->slot >= KVT_SLOTS_MAX || p->ready != p->done || p->ready <= w->slot_ready[p->slot]) {
        sim_fail(sim, "schedule: piece %u: slot %u, ready %llu, done %llu, after %llu", index,
                 p->slot, (ull)p->ready, (ull)p->done, (ull)w->slot_ready[p->slot]);
    }
    w->slot_ready[p->slot] = p->ready;
    if (w->guessed[p->slot].generation == p->ready) {
        w->crossed_bytes += w->guessed[p->slot].bytes;
    }
    for (uint32_t m = p->move_first; m < p->move_first + p->move_count; m++) {
        if (m < s->header.moves_leading) {
            sim_fail(sim, "schedule: piece %u's duplicate is a leading move", index);
        }
        check_move(sim, w, &s->moves[m]);
    }
}

/* Static caches: a layer stays where it was. */
static void check_static(struct sim *sim, const struct sim_worker *w, uint32_t index) {
    const struct kvt_sched_piece *p = &w->schedule.pieces[index];
    struct sim_cache *c = w->schedule.cache;
    if (w->kind != KVT_WORKER_DENSE || c->may_move ||
        (c->mode != KVT_MODE_STATIC && c->mode != KVT_MODE_OFFLOADED_STATIC)) {
        return;
    }
    if (c->static_extent[p->layer] == 0) {
        c->static_extent[p->layer] = p->extent;
        c->static_offset[p->layer] = p->k_offset;
    }
    if (c->static_extent[p->layer] != p->extent || c->static_offset[p->layer] != p->k_offset) {
        sim_fail(sim, "schedule: static cache %u: layer %u moved from %u+%llu to %u+%llu", c->id,
                 p->layer, c->static_extent[p->layer], (ull)c->static_offset[p->layer], p->extent,
                 (ull)p->k_offset);
    }
}

/* ---- listings -------------------------------------------------------------------------------- */

/* One layer's listing for one reader: pieces with the same two, the last of them flagged. */
struct listing {
    uint32_t layer;
    uint32_t reader;
    uint32_t step;
    uint32_t next[SIM_ROWS_MAX];     /* token that comes next */
    uint32_t appended[SIM_ROWS_MAX]; /* tokens that were to be appended */
};

static void run_row(struct sim *sim, const struct sim_schedule *s, struct listing *l,
                    const struct kvt_sched_run *r, uint32_t row) {
    uint32_t p = sim_schedule_position(s, row);
    if (p == UINT32_MAX) {
        sim_fail(sim, "schedule: a run names row %u, which takes no part", row);
    }
    uint32_t before = length_before(s, l->step, p);
    uint32_t readable = before + (l->layer != l->reader ? s->append[p] : 0);
    if (r->token_begin != l->next[p]) {
        sim_fail(sim, "schedule: layer %u row %u: a run begins at token %u, %u comes next",
                 l->layer, row, r->token_begin, l->next[p]);
    }
    if (r->token_begin % KVT_SPLIT_TOKENS != 0) {
        sim_fail(sim, "schedule: layer %u row %u: a cut at token %u", l->layer, row,
                 r->token_begin);
    }
    uint32_t read_end = r->token_begin + r->read_count;
    if ((r->read_count > 0 && read_end > readable) ||
        (r->append_count > 0 && read_end < readable)) {
        sim_fail(sim, "schedule: layer %u row %u: reads [%u, +%u), appends %u, but has %u tokens",
                 l->layer, row, r->token_begin, r->read_count, r->append_count, readable);
    }
    l->next[p] += r->read_count + r->append_count;
    l->appended[p] += r->append_count;
}

static void check_run(struct sim *sim, const struct sim_worker *w, struct listing *l,
                      const struct kvt_sched_piece *p, const struct kvt_sched_run *r) {
    const struct sim_schedule *s = &w->schedule;
    uint64_t tokens = (uint64_t)r->read_count + r->append_count;
    if (r->row_first > s->header.rows_count || r->row_count > s->header.rows_count - r->row_first ||
        r->row_count == 0 || (r->append_count > 0 && r->row_count != 1) ||
        (w->kind == KVT_WORKER_DENSE && r->row_count != 1)) {
        sim_fail(sim, "schedule: a run of layer %u has %u rows, appends %u", l->layer, r->row_count,
                 r->append_count);
    }
    check_range(sim, w, p->extent, r->k_offset, tokens * k_bytes(s, l->layer), "K of a run");
    if (v_bytes(s, l->layer) > 0) {
        check_range(sim, w, p->extent, r->v_offset, tokens * v_bytes(s, l->layer), "V of a run");
    }
    for (uint32_t i = 0; i < r->row_count; i++) {
        run_row(sim, s, l, r, s->rows[r->row_first + i]);
    }
}

/* Returns the piece behind the listing. */
static uint32_t check_listing(struct sim *sim, struct sim_worker *w, struct listing *l,
                              uint32_t piece, uint32_t end) {
    struct sim_schedule *s = &w->schedule;
    uint64_t read = 0;
    uint64_t duplicated = 0;
    bool last = false;
    bool streamed = false;
    for (; piece < end && !last; piece++) {
        const struct kvt_sched_piece *p = &s->pieces[piece];
        check_piece(sim, w, piece);
        if (p->layer != l->layer || p->reader != l->reader) {
            sim_fail(sim, "schedule: piece %u is layer %u for %u, not layer %u for %u", piece,
                     p->layer, p->reader, l->layer, l->reader);
        }
        check_static(sim, w, piece);
        for (uint32_t r = p->run_first; r < p->run_first + p->run_count; r++) {
            check_run(sim, w, l, p, &s->runs[r]);
            read += (p->flags & KVT_PIECE_STREAMED) != 0 ? s->runs[r].read_count : 0;
        }
        for (uint32_t m = p->move_first; m < p->move_first + p->move_count; m++) {
            duplicated += s->moves[m].bytes;
        }
        streamed = streamed || (p->flags & KVT_PIECE_STREAMED) != 0;
        last = (p->flags & KVT_PIECE_LAST) != 0;
    }
    uint64_t token_bytes = k_bytes(s, l->layer) + v_bytes(s, l->layer);
    uint32_t appended = 0;
    bool any = false;
    for (uint32_t p = 0; p < s->row_count; p++) {
        uint32_t end_token = length_before(s, l->step + 1, p);
        any = any || end_token > 0;
        appended += s->append[p];
        if (l->next[p] != end_token ||
            l->appended[p] != (l->layer == l->reader ? s->append[p] : 0)) {
            sim_fail(sim,
                     "schedule: step %u layer %u for %u, row %u: ends at token %u of %u, "
                     "appends %u of %u",
                     l->step, l->layer, l->reader, s->row[p], l->next[p], end_token, l->appended[p],
                     s->append[p]);
        }
    }
    if (any && !last) {
        sim_fail(sim, "schedule: no piece of layer %u is the last", l->layer);
    }
    s->need_to[l->step] += read * token_bytes - duplicated;
    if (streamed && l->layer == l->reader) {
        s->need_from[l->step] += appended * token_bytes;
    }
    return piece;
}

/* ---- no distinct block twice ----------------------------------------------------------------- */

static bool same_block(const struct sim_schedule *s, uint32_t a, uint32_t b, uint32_t begin,
                       uint32_t tokens) {
    const uint64_t *ids_a = s->cache->rows[s->row[a]].ids;
    const uint64_t *ids_b = s->cache->rows[s->row[b]].ids;
    return memcmp(ids_a + begin, ids_b + begin, tokens * sizeof(uint64_t)) == 0;
}

/* Tokens of the rows' committed blocks, full ones that are the same counted once. */
static uint64_t distinct_tokens(const struct sim *sim, const struct sim_schedule *s) {
    uint32_t block = sim->config.block_tokens;
    uint64_t tokens = 0;
    for (uint32_t p = 0; p < s->row_count; p++) {
        tokens += s->length[p];
        for (uint32_t begin = 0; begin + block <= s->length[p]; begin += block) {
            for (uint32_t q = 0; q < p; q++) {
                if (s->length[q] >= begin + block && same_block(s, p, q, begin, block)) {
                    tokens -= block;
                    break;
                }
            }
        }
    }
    return tokens;
}

/* The first step of a layer's own listing; later steps have the same and what was appended. */
static void check_distinct(struct sim *sim, struct sim_worker *w) {
    const struct sim_schedule *s = &w->schedule;
    uint64_t most = distinct_tokens(sim, s);
    for (uint32_t layer = 0; layer < s->cache->layer_count; layer++) {
        uint64_t bytes = 0;
        for (uint32_t i = 0; i < s->steps[0].piece_count; i++) {
            const struct kvt_sched_piece *p = &s->pieces[s->steps[0].piece_first + i];
            if (p->layer != layer || p->reader != layer || !(p->flags & KVT_PIECE_STREAMED)) {
                continue;
            }
            for (uint32_t r = p->run_first; r < p->run_first + p->run_count; r++) {
                bytes += s->runs[r].read_count * (k_bytes(s, layer) + v_bytes(s, layer));
            }
            for (uint32_t m = p->move_first; m < p->move_first + p->move_count; m++) {
                bytes -= s->moves[m].bytes;
            }
        }
        if (bytes > most * (k_bytes(s, layer) + v_bytes(s, layer))) {
            sim_fail(sim, "schedule: layer %u brings in %llu bytes, distinct are %llu tokens",
                     layer, (ull)bytes, (ull)most);
        }
    }
}

/* ---- life ------------------------------------------------------------------------------------ */

static void check_step(struct sim *sim, struct sim_worker *w, uint32_t step) {
    struct sim_schedule *s = &w->schedule;
    const struct kvt_sched_step *t = &s->steps[step];
    if (t->step != s->header.first_step + step || t->piece_first > s->header.pieces_count ||
        t->piece_count > s->header.pieces_count - t->piece_first) {
        sim_fail(sim, "schedule: step %u is %llu", step, (ull)t->step);
    }
    uint32_t piece = t->piece_first;
    uint32_t end = t->piece_first + t->piece_count;
    bool segment = w->kind == KVT_WORKER_SEGMENT;
    bool empty = true;
    for (uint32_t p = 0; p < s->row_count; p++) {
        empty = empty && length_before(s, step + 1, p) == 0;
    }
    for (uint32_t reader = 0; reader < s->cache->layer_count; reader++) {
        for (uint32_t layer = segment ? 0 : reader; layer <= reader; layer++) {
            if ((layer == reader || s->cache->layers[layer].last_reader >= reader) &&
                !(segment && empty)) {
                struct listing l = {.layer = layer, .reader = reader, .step = step};
                piece = check_listing(sim, w, &l, piece, end);
            }
        }
    }
    if (piece != end) {
        sim_fail(sim, "schedule: step %u has %u pieces too many", step, end - piece);
    }
}

/* Tails that were full once must be copied before anything is appended to them: on the host, and by
 * moves on the device (dense planes are not blocks). */
static void check_copies(struct sim *sim, struct sim_worker *w) {
    struct sim_schedule *s = &w->schedule;
    bool streamed[SIM_LAYERS_MAX] = {false};
    uint64_t token_bytes[2] = {0}; /* resident, streamed */
    for (uint32_t i = 0; i < s->steps[0].piece_count; i++) {
        const struct kvt_sched_piece *p = &s->pieces[s->steps[0].piece_first + i];
        streamed[p->layer] = (p->flags & KVT_PIECE_STREAMED) != 0;
    }
    for (uint32_t l = 0; l < s->cache->layer_count; l++) {
        token_bytes[streamed[l]] += k_bytes(s, l) + v_bytes(s, l);
    }
    uint64_t tokens = 0;
    for (uint32_t p = 0; p < s->row_count; p++) {
        struct sim_row *row = &s->cache->rows[s->row[p]];
        if (s->append[p] > 0 && row->was_full) {
            tokens += s->length[p] % sim->config.block_tokens;
            row->was_full = false;
        }
    }
    uint64_t moved = 0;
    for (uint32_t m = 0; m < s->header.moves_leading; m++) {
        moved += s->moves[m].bytes;
    }
    if (w->kind == KVT_WORKER_SEGMENT && moved < tokens * token_bytes[0]) {
        sim_fail(sim,
                 "schedule: %llu tokens of blocks that were full are to be copied, %llu bytes "
                 "are moved",
                 (ull)tokens, (ull)moved);
    }
    s->need_copied = tokens * token_bytes[1];
}

static void begin_rows(struct sim *sim, struct sim_worker *w, const struct sim_request *r) {
    struct sim_schedule *s = &w->schedule;
    bool all = r->kind == KVT_REQUEST_ACQUIRE || r->count == 0;
    s->row_count = all ? s->cache->row_count : r->count;
    for (uint32_t p = 0; p < s->row_count; p++) {
        s->row[p] = all ? p : r->rows[p];
        s->append[p] = all ? r->tokens : r->values[p];
        s->length[p] = s->cache->rows[s->row[p]].length;
    }
    for (uint32_t step = 0; step < s->header.steps_count; step++) {
        for (uint32_t p = 0; p < s->row_count; p++) {
            s->content[step][p] = sim->content_next;
            sim->content_next += s->append[p];
        }
    }
}

struct kvt_counters sim_counters(struct sim *sim, const struct sim_worker *w) {
    struct kvt_session_info info;
    uint32_t at = w->session;
    if (!kvt_engine_session_info(sim->engine, &at, &info) || info.session != w->session) {
        sim_fail(sim, "session %u is not listed", w->session);
    }
    return info.counters;
}

void sim_schedule_open(struct sim *sim, struct sim_worker *w, const struct sim_request *r,
                       const struct kvt_answer *answer) {
    struct sim_schedule *s = &w->schedule;
    uint32_t asked = r->kind == KVT_REQUEST_ACQUIRE ? 1 : r->steps;
    if (answer->steps < 1 || answer->steps > asked || answer->steps > SIM_STEPS_MAX ||
        answer->first_step <= w->last_step) {
        sim_fail(sim, "session %u: %u steps from %llu, asked for %u, the last was %llu", w->session,
                 answer->steps, (ull)answer->first_step, asked, (ull)w->last_step);
    }
    if (w->page->failed.value != 0) {
        sim_fail(sim, "session %u: a step begins with `failed` set", w->session);
    }
    *s = (struct sim_schedule){
        .open = true, .begun = true, .acquired = r->kind == KVT_REQUEST_ACQUIRE};
    s->cache = sim_cache_find(w, r->cache);
    read_schedule(sim, w, answer);
    begin_rows(sim, w, r);
    for (uint32_t m = 0; m < s->header.moves_leading; m++) {
        check_move(sim, w, &s->moves[m]);
    }
    for (uint32_t step = 0; step < s->header.steps_count; step++) {
        check_step(sim, w, step);
    }
    if (!w->liar) { /* what it holds is not known */
        check_distinct(sim, w);
        check_copies(sim, w);
    }
    s->copied_before = sim_counters(sim, w).copied_on_write_bytes;
    w->last_step = answer->first_step + answer->steps - 1;
    for (uint32_t i = 0; i < answer->steps; i++) {
        w->to_bytes += s->need_to[i];
        w->from_bytes += s->need_from[i];
    }
    sim_trace(sim, "session %u: cache %u steps %llu..%llu: %u pieces, %u+%u moves", w->session,
              r->cache, (ull)answer->first_step, (ull)w->last_step, s->header.pieces_count,
              s->header.moves_leading, s->header.moves_count - s->header.moves_leading);
    sim_stream_begin(sim, w);
}

void sim_schedule_close(struct sim_worker *w) {
    free(w->schedule.bytes);
    w->schedule = (struct sim_schedule){0};
    w->stream_head = w->stream_count = w->stream_phase = 0; /* a liar may have left something */
}

void sim_schedule_intact(struct sim *sim, struct sim_worker *w, uint32_t piece) {
    const struct sim_schedule *s = &w->schedule;
    const uint8_t *ring = w->ring + s->ring_offset;
    if (w->liar || w->unchecked || !w->attached) {
        return;
    }
    const struct kvt_sched_piece *p = &s->pieces[piece];
    size_t at = (size_t)((const uint8_t *)p - s->bytes);
    size_t runs = (size_t)((const uint8_t *)&s->runs[p->run_first] - s->bytes);
    if (memcmp(ring, s->bytes, sizeof(s->header)) != 0 ||
        memcmp(ring + at, s->bytes + at, sizeof(*p)) != 0 ||
        memcmp(ring + runs, s->bytes + runs, p->run_count * sizeof(*s->runs)) != 0) {
        sim_fail(sim, "session %u: the schedule was overwritten before its end", w->session);
    }
}

/* ---- commit, failure, post ------------------------------------------------------------------- */

/* Equal steps without faults and edits: what is fetched ahead is what comes next, so nothing crosses
 * in vain, and what crosses does so once. The prompt's guess is of another prompt. */
static void check_steady(struct sim *sim, const struct sim_worker *w,
                         const struct kvt_counters *c) {
    if (sim->world != SIM_STEADY || w->steady_requests < 3) {
        return;
    }
    uint64_t crossed = w->crossed_bytes - w->crossed_before;
    uint64_t vain = c->prefetch_discarded_bytes - w->vain_before;
    if (vain != 0 || crossed != w->to_bytes) {
        sim_fail(sim,
                 "session %u: equal steps without a fault: %llu bytes have crossed, %llu were "
                 "needed, %llu were fetched ahead in vain",
                 w->session, (ull)crossed, (ull)w->to_bytes, (ull)vain);
    }
    sim->stats.steady_steps++;
}

/* Called when nothing is open and nothing is asked for: then the counters are those of what was
 * committed. After a failure they are whatever they are, and counting begins anew. */
static void check_counters(struct sim *sim, struct sim_worker *w, uint64_t need_to,
                           uint64_t need_from, uint32_t cache) {
    struct kvt_cache_info info;
    struct kvt_counters counters = sim_counters(sim, w);
    const struct kvt_counters *c = &counters;
    if (c->copied_on_write_bytes - w->schedule.copied_before < w->schedule.need_copied) {
        sim_fail(sim, "session %u: %llu bytes copied on write, at least %llu were to be",
                 w->session, (ull)(c->copied_on_write_bytes - w->schedule.copied_before),
                 (ull)w->schedule.need_copied);
    }
    if (w->counted &&
        (c->to_device_bytes != w->to_bytes || c->from_device_bytes != w->from_bytes)) {
        sim_fail(sim, "session %u: %llu bytes to the device, %llu from it; needed %llu and %llu",
                 w->session, (ull)c->to_device_bytes, (ull)c->from_device_bytes, (ull)w->to_bytes,
                 (ull)w->from_bytes);
    }
    check_steady(sim, w, c);
    w->counted = true;
    w->to_bytes = c->to_device_bytes;
    w->from_bytes = c->from_device_bytes;
    for (uint32_t at = 0; kvt_engine_cache_info(sim->engine, &at, &info);) {
        if (info.cache == cache && info.session == w->session &&
            (info.need_to_device_bytes != need_to || info.need_from_device_bytes != need_from)) {
            sim_fail(sim,
                     "cache %u: the last step is said to need %llu and %llu bytes, not %llu "
                     "and %llu",
                     cache, (ull)info.need_to_device_bytes, (ull)info.need_from_device_bytes,
                     (ull)need_to, (ull)need_from);
        }
    }
}

static void commit_one(struct sim *sim, struct sim_worker *w) {
    struct sim_schedule *s = &w->schedule;
    uint32_t step = s->committed++;
    uint64_t number = s->header.first_step + step;
    if (!w->liar && (int64_t)(s->posted - number) < 0) {
        sim_fail(sim, "session %u: step %llu is committed, the worker has posted %llu", w->session,
                 (ull)number, (ull)s->posted);
    }
    if (s->failed != 0 && number >= s->failed) {
        sim_fail(sim, "session %u: step %llu is committed, though %llu failed", w->session,
                 (ull)number, (ull)s->failed);
    }
    for (uint32_t p = 0; p < s->row_count; p++) {
        for (uint32_t i = 0; i < s->append[p]; i++) {
            sim_row_append(&s->cache->rows[s->row[p]], s->content[step][p] + i);
        }
    }
    sim->stats.steps_committed++;
}

/* Ended: all committed, or failed and the worker has stopped. */
static void close_if_ended(struct sim_worker *w) {
    struct sim_schedule *s = &w->schedule;
    uint64_t committed = s->header.first_step + s->committed;
    bool failed = s->failed != 0 && committed == s->failed && s->posted == w->last_step;
    if (s->open && (s->committed == s->header.steps_count || failed)) {
        sim_schedule_close(w);
    }
}

void sim_schedule_committed(struct sim *sim, struct sim_worker *w, uint64_t value) {
    struct sim_schedule *s = &w->schedule;
    if (w->unchecked || !w->attached || (!s->open && w->liar)) {
        return;
    }
    if (!s->open) {
        sim_fail(sim, "session %u: step %llu is committed, but none is open", w->session,
                 (ull)value);
    }
    if (value < s->header.first_step + s->committed || value > w->last_step) {
        sim_fail(sim, "session %u: step %llu is committed, the open ones are %llu to %llu",
                 w->session, (ull)value, (ull)(s->header.first_step + s->committed),
                 (ull)w->last_step);
    }
    while (s->header.first_step + s->committed <= value) {
        commit_one(sim, w);
    }
    if (s->committed == s->header.steps_count && w->request_count == 0 && !w->liar &&
        !w->unchecked) {
        check_counters(sim, w, s->need_to[s->committed - 1], s->need_from[s->committed - 1],
                       s->cache->id);
    }
    close_if_ended(w);
}

void sim_schedule_failed(struct sim *sim, struct sim_worker *w, uint64_t value, uint32_t code) {
    struct sim_schedule *s = &w->schedule;
    if (value == 0 || w->liar || w->unchecked || !w->attached) {
        return;
    }
    if (!s->open || value < s->header.first_step + s->committed || value > w->last_step ||
        (s->failed != 0 && value > s->failed) || code == 0) {
        sim_fail(sim, "session %u: step %llu fails with code %u, the open ones are %llu to %llu",
                 w->session, (ull)value, code, (ull)(s->header.first_step + s->committed),
                 (ull)w->last_step);
    }
    if (s->failed == 0) {
        sim->stats.steps_failed++;
    }
    s->failed = value;
    w->counted = false;
    close_if_ended(w);
}

void sim_schedule_posted(struct sim *sim, struct sim_worker *w, uint64_t value) {
    w->schedule.posted = value;
    close_if_ended(w);
}
