/* The harness's workers: the model of rows, and the walk over schedules. */
#include "tests/support/engine_harness.h"
#include "tiers/engine/state.h"

#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    (void)vfprintf(stderr, format, arguments);
    va_end(arguments);
    (void)fprintf(stderr, "\n%s\n", kvth_what);
    CU_FAIL_FATAL("a worker found something wrong; see above");
    abort();
}

/* ---- the model of rows --------------------------------------------------------------------------------- */

static uint32_t blocks_of(uint32_t tokens) {
    return (tokens + KVTH_BLOCK - 1) / KVTH_BLOCK;
}

static void row_room(struct kvth_row *r, uint32_t tokens) {
    if (tokens > r->room) {
        r->room = tokens * 2;
        r->id = realloc(r->id, r->room * sizeof(*r->id));
        r->block = realloc(r->block, (blocks_of(r->room) + 1) * sizeof(*r->block));
        CU_ASSERT_PTR_NOT_NULL_FATAL(r->id);
        CU_ASSERT_PTR_NOT_NULL_FATAL(r->block);
    }
}

static void model_row_copy(struct kvth_row *to, const struct kvth_row *from) {
    row_room(to, from->count + 1);
    if (from->count > 0) {
        memcpy(to->id, from->id, from->count * sizeof(*to->id));
        memcpy(to->block, from->block, blocks_of(from->count) * sizeof(*to->block));
    }
    to->count = from->count;
}

static struct kvth_row *rows_mapped(const struct kvth_cache *c, const uint32_t *map,
                                    uint32_t count) {
    struct kvth_row *rows = calloc(count, sizeof(*rows));
    CU_ASSERT_PTR_NOT_NULL_FATAL(rows);
    for (uint32_t i = 0; i < count; i++) {
        model_row_copy(&rows[i], &c->rows[map != NULL ? map[i] : i]);
    }
    return rows;
}

static void rows_free(struct kvth_row *rows, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        free(rows[i].id);
        free(rows[i].block);
    }
    free(rows);
}

static void rows_take(struct kvth_cache *c, const uint32_t *map, uint32_t count) {
    struct kvth_row *rows = rows_mapped(c, map, count);
    rows_free(c->rows, c->row_count);
    c->rows = rows;
    c->row_count = count;
}

static uint32_t name_block(struct kvth *h) {
    if (h->model_blocks == h->model_full_room) {
        h->model_full_room = h->model_full_room * 2 + 256;
        h->model_full = realloc(h->model_full, h->model_full_room);
        CU_ASSERT_PTR_NOT_NULL_FATAL(h->model_full);
    }
    h->model_full[h->model_blocks] = 0;
    return (uint32_t)h->model_blocks++;
}

static uint32_t model_refs(const struct kvth *h, uint32_t session, uint32_t block) {
    uint32_t refs = 0;
    for (uint32_t i = 0; i < KVTH_CACHES; i++) {
        const struct kvth_cache *c = &h->cache[i];
        for (uint32_t r = 0; c->id != 0 && c->session == session && r < c->row_count; r++) {
            for (uint32_t b = 0; b < blocks_of(c->rows[r].count); b++) {
                refs += c->rows[r].block[b] == block;
            }
        }
    }
    return refs;
}

/* Tails that were full, or that others refer to, get new names. Of rows of the step that share one
 * the last has it for itself, if nobody else does and none of them had more tokens in it. */
static void model_cow(struct kvth *h, struct kvth_walk *w) {
    struct kvth_cache *c = w->cache;
    uint32_t old[KVT_ROWS_MAX];
    for (uint32_t i = 0; i < w->count; i++) {
        struct kvth_row *r = &c->rows[w->rows[i]];
        uint32_t *tail = &r->block[r->count / KVTH_BLOCK];
        old[i] = UINT32_MAX;
        if (w->tokens[w->rows[i]] == 0 || r->count % KVTH_BLOCK == 0) {
            continue;
        }
        uint32_t longest = 0;
        for (uint32_t j = 0; j < i; j++) {
            uint32_t other = c->rows[w->rows[j]].count;
            longest = old[j] == *tail && other > longest ? other : longest;
        }
        if (h->model_full[*tail] != 0 || model_refs(h, c->session, *tail) > 1 ||
            r->count < longest) {
            old[i] = *tail;
            *tail = name_block(h);
        }
    }
}

static void model_append(struct kvth *h, struct kvth_walk *w) {
    for (uint32_t i = 0; i < w->cache->row_count; i++) {
        struct kvth_row *r = &w->cache->rows[i];
        row_room(r, r->count + w->tokens[i] + 1);
        for (uint32_t t = 0; t < w->tokens[i]; t++) {
            if ((r->count + t) % KVTH_BLOCK == 0) {
                r->block[(r->count + t) / KVTH_BLOCK] = name_block(h);
            }
            r->id[r->count + t] = (uint32_t)++h->model_ids;
        }
    }
}

static void model_commit(struct kvth *h, struct kvth_walk *w) {
    for (uint32_t i = 0; i < w->cache->row_count; i++) {
        struct kvth_row *r = &w->cache->rows[i];
        for (uint32_t b = r->count / KVTH_BLOCK; b < (r->count + w->tokens[i]) / KVTH_BLOCK; b++) {
            h->model_full[r->block[b]] = 1;
        }
        r->count += w->tokens[i];
    }
}

/* ---- tables against the model ------------------------------------------------------------------------------ */

static void check_row(struct kvth *h, const struct kvth_cache *c, uint32_t row,
                      const struct block **of_name, uint32_t *seen) {
    const struct cache *real = h->engine->caches[c->id & 0xffff];
    const struct row *r = &real->rows[row];
    const struct kvth_row *m = &c->rows[row];
    if (r->length != m->count) {
        die("cache %u row %u: %u tokens, the model has %u", c->id, row, r->length, m->count);
    }
    for (uint32_t b = 0; b < blocks_of(m->count); b++) {
        const struct block **known = &of_name[m->block[b]];
        if (*known == NULL) {
            *known = r->blocks[b];
            (*seen)++;
            if (r->blocks[b]->refs != model_refs(h, c->session, m->block[b])) {
                die("cache %u row %u block %u: %u references, the model has %u", c->id, row, b,
                    r->blocks[b]->refs, model_refs(h, c->session, m->block[b]));
            }
        } else if (*known != r->blocks[b]) {
            die("cache %u row %u block %u: not the one that the model shares", c->id, row, b);
        }
    }
}

void kvth_check_tables(struct kvth *h) {
    const struct block **of_name = calloc(h->model_blocks + 1, sizeof(const struct block *));
    CU_ASSERT_PTR_NOT_NULL_FATAL(of_name);
    for (uint32_t s = 0; s < KVTH_SESSIONS; s++) {
        uint32_t seen = 0;
        uint32_t reserved = 0;
        for (uint32_t i = 0; i < KVTH_CACHES; i++) {
            const struct kvth_cache *c = &h->cache[i];
            for (uint32_t r = 0; c->id != 0 && c->session == s && r < c->row_count; r++) {
                const struct row *real = &h->engine->caches[c->id & 0xffff]->rows[r];
                reserved += real->count - blocks_of(real->length);
                check_row(h, c, r, of_name, &seen);
            }
        }
        if (h->session[s].open && kvth_blocks(h, s) != seen + reserved) {
            die("session %u: %u blocks, the model has %u", s, kvth_blocks(h, s), seen + reserved);
        }
    }
    free(of_name);
}

/* The model's names follow the engine's tables, where a step that failed leaves both open. */
static void model_resync(struct kvth *h, struct kvth_cache *c) {
    const struct cache *real = h->engine->caches[c->id & 0xffff];
    for (uint32_t r = 0; r < c->row_count; r++) {
        uint32_t tail = c->rows[r].count / KVTH_BLOCK;
        if (c->rows[r].count % KVTH_BLOCK != 0 && real->rows[r].blocks[tail]->refs == 1 &&
            model_refs(h, c->session, c->rows[r].block[tail]) > 1) {
            c->rows[r].block[tail] = name_block(h);
        }
        if (c->rows[r].count % KVTH_BLOCK != 0) {
            h->model_full[c->rows[r].block[tail]] = real->rows[r].blocks[tail]->full;
        }
    }
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

static uint32_t token_bytes(const struct kvth_cache *c, uint32_t layer, bool v) {
    const struct kvt_layer_layout *l = &c->layout.layers[layer];
    return v ? kvt_layer_v_token_bytes(l) : kvt_layer_k_token_bytes(l);
}

static void token_fill(uint32_t id, uint32_t layer, bool v, uint8_t *out, uint32_t bytes) {
    uint64_t x = ((uint64_t)id << 20 | layer << 1 | v) * UINT64_C(0x9e3779b97f4a7c15);
    for (uint32_t i = 0; i < bytes; i++) {
        out[i] = (uint8_t)(x >> (8 * (i % 8)));
    }
}

/* Compares, or writes, `count` tokens of one plane. */
static void plane(const struct kvth_cache *c, uint32_t row, uint32_t layer, bool v, uint32_t first,
                  uint32_t count, uint8_t *at, bool write) {
    uint8_t expected[1024];
    uint32_t bytes = token_bytes(c, layer, v);
    CU_ASSERT_TRUE_FATAL(bytes <= sizeof(expected));
    for (uint32_t t = 0; t < count && bytes > 0; t++) {
        token_fill(c->rows[row].id[first + t], layer, v, expected, bytes);
        if (write) {
            memcpy(at + (uint64_t)t * bytes, expected, bytes);
        } else if (memcmp(at + (uint64_t)t * bytes, expected, bytes) != 0) {
            die("cache %u row %u layer %u %c token %u: wrong bytes", c->id, row, layer,
                v ? 'V' : 'K', first + t);
        }
    }
}

/* ---- the walk -------------------------------------------------------------------------------------------------------- */

static const void *section(const struct kvth_walk *w, uint32_t offset) {
    return (const uint8_t *)w->head + offset;
}

static void do_moves(struct kvth *h, const struct kvth_walk *w, uint32_t first, uint32_t count) {
    const struct kvt_sched_move *m = section(w, w->head->moves_offset);
    for (uint32_t i = first; i < first + count; i++) {
        uint32_t s = w->cache->session;
        const uint8_t *from =
            kvth_device_memory(h, s, m[i].source_extent, m[i].source_offset, m[i].bytes);
        uint8_t *to = kvth_device_memory(h, s, m[i].target_extent, m[i].target_offset, m[i].bytes);
        if (from < to + m[i].bytes && to < from + m[i].bytes) {
            die("move %u overlaps", i);
        }
        memcpy(to, from, m[i].bytes);
    }
}

static const struct kvt_sched_step *step_of(const struct kvth_walk *w) {
    const struct kvt_sched_step *steps = section(w, w->head->steps_offset);
    return &steps[w->next];
}

static const struct kvt_sched_piece *piece_at(const struct kvth_walk *w, uint32_t at) {
    const struct kvt_sched_piece *pieces = section(w, w->head->pieces_offset);
    return &pieces[step_of(w)->piece_first + at];
}

static void walk_run(struct kvth *h, struct kvth_walk *w, const struct kvt_sched_piece *p,
                     const struct kvt_sched_run *run, bool again) {
    const struct kvth_cache *c = w->cache;
    const uint32_t *rows = section(w, w->head->rows_offset);
    uint32_t s = c->session;
    uint64_t n = (uint64_t)run->read_count + run->append_count;
    for (uint32_t i = 0; i < run->row_count; i++) {
        uint32_t row = rows[run->row_first + i];
        uint32_t limit = w->before[row] + (again ? w->tokens[row] : 0);
        if (run->read_count > 0 && run->token_begin + run->read_count > limit) {
            die("row %u is offered token %u; it has %u", row, run->token_begin + run->read_count,
                limit);
        }
        for (int v = 0; v < 2; v++) {
            uint32_t bytes = token_bytes(c, p->layer, v);
            uint8_t *at =
                kvth_device_memory(h, s, p->extent, v ? run->v_offset : run->k_offset, n * bytes);
            plane(c, row, p->layer, v, run->token_begin, run->read_count, at, false);
            if (run->append_count > 0) {
                CU_ASSERT_EQUAL_FATAL(run->row_count, 1);
                CU_ASSERT_EQUAL_FATAL(run->token_begin + run->read_count >= w->before[row], true);
                plane(c, row, p->layer, v, run->token_begin + run->read_count, run->append_count,
                      at + (uint64_t)run->read_count * bytes, !again);
            }
        }
    }
}

static void post_done(struct kvth *h, const struct kvth_walk *w, const struct kvt_sched_piece *p) {
    struct kvt_counter *done = &h->session[w->cache->session].page->done[p->slot];
    done->value = p->done;
    done->wake++;
}

/* Dense workers hand back what no layer from `reader` on reads: one layer late. Until then the
 * bytes must stay. */
static void hand_back(struct kvth *h, struct kvth_walk *w, uint32_t upto, uint32_t reader) {
    const struct kvt_sched_run *runs = section(w, w->head->runs_offset);
    for (uint32_t i = 0; i < upto; i++) {
        const struct kvt_sched_piece *p = piece_at(w, i);
        bool now = p->last_reader < reader &&
                   (i + 1 == upto || p->last_reader + 1 == reader || reader == UINT32_MAX);
        if (!now || (p->flags & KVT_PIECE_STREAMED) == 0 ||
            h->session[w->cache->session].page->done[p->slot].value >= p->done) {
            continue;
        }
        for (uint32_t r = 0; r < p->run_count; r++) {
            walk_run(h, w, p, &runs[p->run_first + r], true);
        }
        post_done(h, w, p);
    }
}

static void walk_piece(struct kvth *h, struct kvth_walk *w, uint32_t at) {
    const struct kvt_sched_piece *p = piece_at(w, at);
    const struct kvt_sched_run *runs = section(w, w->head->runs_offset);
    struct kvth_session *s = &h->session[w->cache->session];
    bool dense = s->kind == KVT_WORKER_DENSE;
    if (dense) {
        hand_back(h, w, at, p->reader);
    }
    if ((p->flags & KVT_PIECE_STREAMED) != 0) {
        kvth_pump(h);
        if (!kvt_counter_reached(s->page->ready[p->slot].value, p->ready)) {
            die("step %u layer %u piece %u: slot %u is not ready: %llu, wanted %llu", w->next,
                p->layer, at, p->slot, (unsigned long long)s->page->ready[p->slot].value,
                (unsigned long long)p->ready);
        }
    }
    do_moves(h, w, p->move_first, p->move_count);
    for (uint32_t i = 0; i < p->run_count; i++) {
        walk_run(h, w, p, &runs[p->run_first + i], (p->flags & KVT_PIECE_REREAD) != 0);
    }
    if (!dense && (p->flags & KVT_PIECE_STREAMED) != 0) {
        post_done(h, w, p);
    }
}

/* Every listing of a layer offers each token of each row that takes part exactly once. */
static void check_cover(const struct kvth_walk *w) {
    const struct kvt_sched_run *runs = section(w, w->head->runs_offset);
    const uint32_t *rows = section(w, w->head->rows_offset);
    const struct kvt_sched_step *step = step_of(w);
    uint64_t *cover = calloc(w->cache->row_count, 3 * sizeof(*cover));
    CU_ASSERT_PTR_NOT_NULL_FATAL(cover);
    for (uint32_t i = 0; i < step->piece_count; i++) {
        const struct kvt_sched_piece *p = piece_at(w, i);
        for (uint32_t j = 0; j < p->run_count; j++) {
            const struct kvt_sched_run *run = &runs[p->run_first + j];
            for (uint32_t k = 0; k < run->row_count; k++) {
                uint64_t *v = &cover[3 * rows[run->row_first + k]];
                uint64_t n = (uint64_t)run->read_count + run->append_count;
                v[0] += n;
                v[1] += n * run->token_begin + (n > 0 ? n * (n - 1) / 2 : 0);
                v[2] += run->append_count;
            }
        }
        for (uint32_t k = 0; (p->flags & KVT_PIECE_LAST) != 0 && k < w->count; k++) {
            uint32_t row = w->rows[k];
            uint64_t n = (uint64_t)w->before[row] + w->tokens[row];
            uint64_t *v = &cover[3 * row];
            bool reread = (p->flags & KVT_PIECE_REREAD) != 0;
            if (v[0] != n || v[1] != (n > 0 ? n * (n - 1) / 2 : 0) ||
                v[2] != (reread ? 0 : w->tokens[row])) {
                die("step %u layer %u reader %u: row %u is offered %llu of %llu tokens", w->next,
                    p->layer, p->reader, row, (unsigned long long)v[0], (unsigned long long)n);
            }
            memset(v, 0, 3 * sizeof(*v));
        }
    }
    free(cover);
}

static void step_enter(struct kvth *h, struct kvth_walk *w) {
    for (uint32_t i = 0; i < w->cache->row_count; i++) {
        w->before[i] = w->cache->rows[i].count;
    }
    model_append(h, w);
    check_cover(w);
    h->pieces = step_of(w)->piece_count;
    w->piece = 0;
}

uint64_t kvth_step_send(struct kvth *h, struct kvth_cache *c, const uint32_t *rows,
                        const uint32_t *tokens, uint32_t count, uint32_t each, uint32_t steps) {
    struct kvt_request r = {.kind = KVT_REQUEST_STEP,
                            .session = c->session,
                            .cache = c->id,
                            .rows = rows,
                            .values = tokens,
                            .count = rows != NULL ? count : 0,
                            .tokens = each,
                            .steps = steps};
    return kvth_send(h, &r);
}

void kvth_walk_begin(struct kvth *h, struct kvth_walk *w, struct kvth_cache *c,
                     const uint32_t *rows, const uint32_t *tokens, uint32_t count, uint32_t each,
                     uint64_t tag) {
    const struct kvth_answer *a = kvth_answer(h, tag);
    if (a == NULL || a->code != 0) {
        die("step: %s", a == NULL ? "no answer" : a->text);
    }
    memset(w, 0, sizeof(*w));
    w->cache = c;
    w->head = (const void *)(h->session[c->session].ring + a->ring_offset);
    w->first_step = a->first_step;
    w->steps = a->steps;
    w->count = rows != NULL ? count : c->row_count;
    for (uint32_t i = 0; i < w->count; i++) {
        w->rows[i] = rows != NULL ? rows[i] : i;
        w->tokens[w->rows[i]] = rows != NULL ? tokens[i] : each;
    }
    CU_ASSERT_EQUAL_FATAL(w->head->magic, KVT_SCHEDULE_MAGIC);
    CU_ASSERT_EQUAL_FATAL(w->head->cache, c->id);
    CU_ASSERT_EQUAL_FATAL(a->length_count, c->row_count);
    for (uint32_t i = 0; i < c->row_count; i++) {
        if (a->lengths[i] != c->rows[i].count) {
            die("row %u has %u tokens, the model %u", i, a->lengths[i], c->rows[i].count);
        }
    }
    model_cow(h, w);
    h->leading_moves = w->head->moves_leading;
    do_moves(h, w, 0, w->head->moves_leading);
    step_enter(h, w);
}

bool kvth_walk_pieces(struct kvth *h, struct kvth_walk *w, uint32_t pieces) {
    while (pieces-- > 0 && w->piece < step_of(w)->piece_count) {
        walk_piece(h, w, w->piece++);
    }
    return w->piece < step_of(w)->piece_count;
}

static void step_counter(struct kvth *h, const struct kvth_walk *w, uint64_t step) {
    struct kvt_counter *counter = &h->session[w->cache->session].page->step;
    counter->value = step;
    counter->wake++;
    kvth_pump(h);
}

void kvth_walk_post(struct kvth *h, struct kvth_walk *w) {
    CU_ASSERT_EQUAL_FATAL(w->piece, step_of(w)->piece_count);
    if (h->session[w->cache->session].kind == KVT_WORKER_DENSE) {
        hand_back(h, w, w->piece, UINT32_MAX);
    }
    step_counter(h, w, w->first_step + w->next);
    model_commit(h, w);
    if (++w->next < w->steps) {
        step_enter(h, w);
    }
}

void kvth_walk_all(struct kvth *h, struct kvth_walk *w) {
    while (w->next < w->steps) {
        (void)kvth_walk_pieces(h, w, UINT32_MAX);
        kvth_walk_post(h, w);
    }
    const struct kvt_control_page *page = h->session[w->cache->session].page;
    CU_ASSERT_EQUAL_FATAL(page->committed.value, w->first_step + w->steps - 1);
    CU_ASSERT_EQUAL_FATAL(page->failed.value, 0);
}

void kvth_walk_abort(struct kvth *h, struct kvth_walk *w) {
    struct kvth_cache *c = w->cache;
    struct kvt_request r = {.kind = KVT_REQUEST_ABORT,
                            .session = c->session,
                            .cache = c->id,
                            .first_step = w->first_step + w->next};
    uint64_t tag = kvth_send(h, &r);
    step_counter(h, w, w->first_step + w->steps - 1);
    const struct kvth_answer *a = kvth_answer(h, tag);
    if (a == NULL || a->code != 0) {
        die("abort: %s", a == NULL ? "no answer" : a->text);
    }
    CU_ASSERT_EQUAL_FATAL(a->length_count, c->row_count);
    for (uint32_t i = 0; i < c->row_count; i++) {
        CU_ASSERT_EQUAL_FATAL(a->lengths[i], c->rows[i].count);
    }
    model_resync(h, c);
}

void kvth_step(struct kvth *h, struct kvth_cache *c, uint32_t tokens, uint32_t steps) {
    static struct kvth_walk w;
    while (steps > 0) {
        uint64_t tag = kvth_step_send(h, c, NULL, NULL, 0, tokens, steps);
        kvth_walk_begin(h, &w, c, NULL, NULL, 0, tokens, tag);
        CU_ASSERT_TRUE_FATAL(w.steps >= 1 && w.steps <= steps);
        steps -= w.steps;
        kvth_walk_all(h, &w);
    }
}

/* ---- edits ---------------------------------------------------------------------------------------------------------------- */

static struct kvth_cache *cache_add(struct kvth *h, uint32_t session, uint32_t id,
                                    const struct kvt_layout *layout, struct kvth_row *rows,
                                    uint32_t count) {
    for (uint32_t i = 0; i < KVTH_CACHES; i++) {
        struct kvth_cache *c = &h->cache[i];
        if (c->id == 0) {
            c->id = id;
            c->session = session;
            c->rows = rows;
            c->row_count = count;
            c->layout = *layout;
            return c;
        }
    }
    die("too many caches");
}

static const struct kvth_answer *expect(struct kvth *h, struct kvt_request *r) {
    const struct kvth_answer *a = kvth_ask(h, r);
    if (a->code != 0) {
        die("request of kind %u: %u: %s", r->kind, a->code, a->text);
    }
    return a;
}

struct kvth_cache *kvth_create(struct kvth *h, uint32_t session, const struct kvt_layout *layout,
                               const struct kvt_cache_options *options) {
    struct kvt_request r = {
        .kind = KVT_REQUEST_CREATE, .session = session, .layout = layout, .options = options};
    return kvth_adopt(h, session, expect(h, &r)->cache, layout, options->rows);
}

struct kvth_cache *kvth_adopt(struct kvth *h, uint32_t session, uint32_t id,
                              const struct kvt_layout *layout, uint32_t count) {
    struct kvth_row *rows = calloc(count, sizeof(*rows));
    CU_ASSERT_PTR_NOT_NULL_FATAL(rows);
    for (uint32_t i = 0; i < count; i++) {
        row_room(&rows[i], 1);
    }
    return cache_add(h, session, id, layout, rows, count);
}

void kvth_forget(struct kvth_cache *c) {
    rows_free(c->rows, c->row_count);
    memset(c, 0, sizeof(*c));
}

static struct kvt_request about(const struct kvth_cache *c, uint32_t kind) {
    return (struct kvt_request){.kind = kind, .session = c->session, .cache = c->id};
}

struct kvth_cache *kvth_fork(struct kvth *h, struct kvth_cache *c, const uint32_t *rows,
                             uint32_t count) {
    struct kvt_request r = about(c, KVT_REQUEST_FORK);
    r.rows = rows;
    r.count = rows != NULL ? count : 0;
    uint32_t id = expect(h, &r)->cache;
    count = rows != NULL ? count : c->row_count;
    return cache_add(h, c->session, id, &c->layout, rows_mapped(c, rows, count), count);
}

void kvth_rows(struct kvth *h, struct kvth_cache *c, uint32_t kind, const uint32_t *rows,
               uint32_t count) {
    struct kvt_request r = about(c, kind);
    r.rows = rows;
    r.count = count;
    (void)expect(h, &r);
    rows_take(c, rows, count);
}

void kvth_repeat(struct kvth *h, struct kvth_cache *c, uint32_t times) {
    uint32_t map[KVT_ROWS_MAX];
    struct kvt_request r = about(c, KVT_REQUEST_REPEAT);
    r.times = times;
    (void)expect(h, &r);
    for (uint32_t i = 0; i < times * c->row_count; i++) {
        map[i] = i / times;
    }
    rows_take(c, map, times * c->row_count);
}

static void crop(struct kvth *h, struct kvth_cache *c, const uint32_t *tokens, uint32_t count) {
    struct kvt_request r = about(c, KVT_REQUEST_CROP);
    r.values = tokens;
    r.count = count;
    (void)expect(h, &r);
    for (uint32_t i = 0; i < c->row_count; i++) {
        uint32_t length = tokens[count == 1 ? 0 : i];
        c->rows[i].count = c->rows[i].count < length ? c->rows[i].count : length;
    }
}

void kvth_crop(struct kvth *h, struct kvth_cache *c, uint32_t tokens) {
    crop(h, c, &tokens, 1);
}

void kvth_crop_rows(struct kvth *h, struct kvth_cache *c, const uint32_t *tokens) {
    crop(h, c, tokens, c->row_count);
}

void kvth_reset(struct kvth *h, struct kvth_cache *c) {
    struct kvt_request r = about(c, KVT_REQUEST_RESET);
    (void)expect(h, &r);
    for (uint32_t i = 0; i < c->row_count; i++) {
        c->rows[i].count = 0;
    }
}

void kvth_close(struct kvth *h, struct kvth_cache *c) {
    struct kvt_request r = about(c, KVT_REQUEST_CLOSE);
    (void)expect(h, &r);
    kvth_forget(c);
}
