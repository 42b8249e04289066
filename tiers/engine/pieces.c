/* Pieces: how one step's KV is cut and in what order it is used.
 *
 * Segment workers. The rows' tables are walked together: while rows agree on a block it is one
 * segment that all of them read; where they part, the walk goes on with each class alone. So every
 * row meets its tokens in ascending order, a shared prefix once. Then, for each layer, segments are
 * packed into pieces: streamed ones by the size of a slot, cut only between blocks; resident ones
 * where device memory is not contiguous.
 *
 * Dense workers get one piece a layer, with each row's plane in one stretch.
 *
 * Offsets of streamed pieces are relative to the slot until a slot is assigned (operations.c).
 */
#include "tiers/engine/state.h"

#include <stdlib.h>
#include <string.h>

#define RUN_ALIGN_TOKENS 16u /* runs that share a piece begin at multiples of it */

/* ---- growing arrays ------------------------------------------------------------------------------ */

bool array_grow(void **array, uint32_t *room, uint32_t count, size_t size) {
    if (count < *room) {
        return true;
    }
    uint32_t more = *room < 16 ? 16 : *room * 2;
    void *grown = realloc(*array, (size_t)more * size);
    if (grown == NULL) {
        return false;
    }
    *array = grown;
    *room = more;
    return true;
}

#define GROW(p, what) \
    array_grow((void **)&(p)->what, &(p)->what##_room, (p)->what##_count, sizeof(*(p)->what))

uint64_t pieces_bytes(const struct pieces *p) {
    return (uint64_t)p->piece_count * sizeof(*p->piece) + (uint64_t)p->run_count * sizeof(*p->run) +
           (uint64_t)p->move_count * sizeof(*p->move) + (uint64_t)p->row_count * sizeof(*p->row);
}

void pieces_clear(struct pieces *p) {
    p->piece_count = p->run_count = p->row_count = p->move_count = 0;
}

void pieces_free(struct pieces *p) {
    free(p->piece);
    free(p->run);
    free(p->row);
    free(p->move);
    *p = (struct pieces){0};
}

/* ---- segments ------------------------------------------------------------------------------------ */

struct segment {
    uint32_t row_first; /* into pieces.row */
    uint32_t row_count;
    const struct row *table; /* of any of them */
    uint32_t token_begin;
    uint32_t read;
    uint32_t append;
};

struct walk {
    const struct kvt_engine *e;
    struct cache *c;
    const struct step_shape *shape;
    struct pieces *out;
    struct segment *segment;
    uint32_t segment_count, segment_room;
    uint32_t *set; /* indexes into shape; classes are ranges of it */
};

/* What a row has in block `index`: NULL if its tokens end before it. */
static const struct block *row_block(const struct walk *w, uint32_t at, uint32_t index,
                                     uint32_t *tokens) {
    uint32_t block_tokens = w->e->config.block_tokens;
    uint64_t begin = (uint64_t)index * block_tokens;
    uint32_t length = w->shape->lengths[at];
    if (length <= begin) {
        *tokens = 0;
        return NULL;
    }
    uint64_t left = length - begin;
    *tokens = left < block_tokens ? (uint32_t)left : block_tokens;
    return w->c->rows[w->shape->rows[at]].blocks[index];
}

static int segment_add(struct walk *w, uint32_t first, uint32_t count, uint64_t begin, uint64_t end,
                       uint32_t append) {
    if (end == begin && append == 0) {
        return 0;
    }
    if (!GROW(w, segment)) {
        return -KVT_ENOMEM;
    }
    struct segment *s = &w->segment[w->segment_count++];
    *s = (struct segment){.row_first = w->out->row_count,
                          .row_count = count,
                          .table = &w->c->rows[w->shape->rows[w->set[first]]],
                          .token_begin = (uint32_t)begin,
                          .read = (uint32_t)(end - begin),
                          .append = append};
    for (uint32_t i = 0; i < count; i++) {
        if (!GROW(w->out, row)) {
            return -KVT_ENOMEM;
        }
        w->out->row[w->out->row_count++] = w->shape->rows[w->set[first + i]];
    }
    return 0;
}

/* Rows whose tokens have ended append alone. */
static int appends_add(struct walk *w, uint32_t first, uint32_t count) {
    int rc = 0;
    for (uint32_t i = 0; i < count && rc == 0; i++) {
        uint32_t at = w->set[first + i];
        uint32_t length = w->shape->lengths[at];
        rc = segment_add(w, first + i, 1, length, length, w->shape->tokens[at]);
    }
    return rc;
}

/* Brings the rows of set[first, count) that agree with the first one on block `index` to the
 * front; returns how many they are. */
static uint32_t class_gather(struct walk *w, uint32_t first, uint32_t count, uint32_t index) {
    uint32_t tokens;
    const struct block *block = row_block(w, w->set[first], index, &tokens);
    uint32_t same = 1;
    for (uint32_t i = 1; i < count; i++) {
        uint32_t other_tokens;
        const struct block *other = row_block(w, w->set[first + i], index, &other_tokens);
        if (other == block && other_tokens == tokens) {
            uint32_t swapped = w->set[first + same];
            w->set[first + same] = w->set[first + i];
            w->set[first + i] = swapped;
            same++;
        }
    }
    return same;
}

/* Segments of the rows set[first, count), which agree on everything before block `index`. */
static int segments_walk(struct walk *w, uint32_t first, uint32_t count, uint32_t index) {
    uint64_t block_tokens = w->e->config.block_tokens;
    uint64_t begin = index * block_tokens;
    if (count == 1) {
        uint32_t at = w->set[first];
        uint64_t length = w->shape->lengths[at];
        return segment_add(w, first, 1, begin, length > begin ? length : begin,
                           w->shape->tokens[at]);
    }
    for (;; index++) {
        uint32_t tokens;
        const struct block *block = row_block(w, w->set[first], index, &tokens);
        uint32_t same = class_gather(w, first, count, index);
        if (same == count && tokens == block_tokens) {
            continue;
        }
        uint64_t end = index * block_tokens;
        if (same == count) { /* all end here */
            int rc = segment_add(w, first, count, begin, end + tokens, 0);
            return rc != 0 ? rc : appends_add(w, first, count);
        }
        int rc = segment_add(w, first, count, begin, end, 0);
        while (rc == 0 && count > 0) {
            rc = block == NULL ? appends_add(w, first, same) : segments_walk(w, first, same, index);
            first += same;
            count -= same;
            if (count > 0) {
                block = row_block(w, w->set[first], index, &tokens);
                same = class_gather(w, first, count, index);
            }
        }
        return rc;
    }
}

/* ---- pieces of segment workers --------------------------------------------------------------------- */

static struct kvt_sched_piece *piece_add(struct pieces *p, uint32_t layer, uint32_t reader) {
    if (!GROW(p, piece)) {
        return NULL;
    }
    struct kvt_sched_piece *piece = &p->piece[p->piece_count++];
    *piece = (struct kvt_sched_piece){.layer = layer,
                                      .reader = reader,
                                      .last_reader = reader,
                                      .flags = layer != reader ? KVT_PIECE_REREAD : 0,
                                      .run_first = p->run_count,
                                      .move_first = p->move_count};
    return piece;
}

static struct kvt_sched_run *run_add(struct pieces *p, struct kvt_sched_piece *piece,
                                     const struct segment *s, uint32_t begin, uint32_t read,
                                     uint32_t append) {
    if (!GROW(p, run)) {
        return NULL;
    }
    struct kvt_sched_run *run = &p->run[p->run_count++];
    *run = (struct kvt_sched_run){.row_first = s->row_first,
                                  .row_count = s->row_count,
                                  .token_begin = begin,
                                  .read_count = read,
                                  .append_count = append};
    piece->run_count++;
    return run;
}

static uint32_t run_room(uint32_t tokens) {
    return (tokens + RUN_ALIGN_TOKENS - 1) / RUN_ALIGN_TOKENS * RUN_ALIGN_TOKENS;
}

/* Tokens of each piece of a streamed layer: as few pieces as its slot allows, and these of one size:
 * a short last one would take a slot, and bring little while the link waits for the others. */
static uint32_t piece_tokens_even(const struct walk *w, const struct segment *segments,
                                  uint32_t count) {
    uint32_t block_tokens = w->e->config.block_tokens;
    uint32_t most = w->c->family->piece_tokens / block_tokens;
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < count; i++) {
        tokens += run_room(segments[i].read + segments[i].append);
    }
    uint64_t blocks = (tokens + block_tokens - 1) / block_tokens;
    uint64_t pieces = (blocks + most - 1) / most;
    return pieces < 2 ? w->c->family->piece_tokens
                      : (uint32_t)((blocks + pieces - 1) / pieces) * block_tokens;
}

static int list_streamed(struct walk *w, const struct segment *segments, uint32_t count,
                         uint32_t layer, uint32_t reader) {
    const struct family *f = w->c->family;
    const struct layer_bytes *bytes = &f->bytes[layer];
    uint32_t block_tokens = w->e->config.block_tokens;
    uint32_t piece_tokens = piece_tokens_even(w, segments, count);
    struct kvt_sched_piece *piece = NULL;
    uint32_t used = piece_tokens;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t begin = segments[i].token_begin;
        uint32_t read = segments[i].read;
        uint32_t append = segments[i].append;
        while (read + append > 0) {
            uint32_t room = used < piece_tokens ? piece_tokens - used : 0;
            uint32_t portion = read + append;
            if (portion > room) {
                portion = room / block_tokens * block_tokens;
            }
            if (portion == 0) {
                piece = piece_add(w->out, layer, reader);
                if (piece == NULL) {
                    return -KVT_ENOMEM;
                }
                piece->flags |= KVT_PIECE_STREAMED;
                used = 0;
                continue;
            }
            uint32_t reads = read < portion ? read : portion;
            struct kvt_sched_run *run =
                run_add(w->out, piece, &segments[i], begin, reads, portion - reads);
            if (run == NULL) {
                return -KVT_ENOMEM;
            }
            run->k_offset = (uint64_t)used * bytes->k;
            run->v_offset = (uint64_t)f->piece_tokens * bytes->k + (uint64_t)used * bytes->v;
            begin += portion;
            read -= reads;
            append -= portion - reads;
            used += run_room(portion);
        }
    }
    return 0;
}

static int list_resident(struct walk *w, const struct segment *segments, uint32_t count,
                         uint32_t layer, uint32_t reader) {
    const struct layer_bytes *bytes = &w->c->family->bytes[layer];
    uint32_t block_tokens = w->e->config.block_tokens;
    struct kvt_sched_piece *piece = NULL;
    for (uint32_t i = 0; i < count; i++) {
        const struct segment *s = &segments[i];
        struct kvt_sched_run *run = NULL;
        const struct block *last = NULL;
        uint32_t done = 0;
        while (done < s->read + s->append) {
            uint32_t token = s->token_begin + done;
            uint32_t inside = token % block_tokens;
            uint32_t portion = block_tokens - inside;
            if (portion > s->read + s->append - done) {
                portion = s->read + s->append - done;
            }
            const struct block *b = s->table->blocks[token / block_tokens];
            uint32_t reads = done >= s->read            ? 0
                             : s->read - done < portion ? s->read - done
                                                        : portion;
            if (run == NULL || last->group != b->group || last->index + 1 != b->index) {
                struct dev_place k = block_gpu_k(w->e, b, layer);
                struct dev_place v = block_gpu_v(w->e, b, layer);
                if (piece == NULL || piece->extent != k.extent) {
                    piece = piece_add(w->out, layer, reader);
                    if (piece == NULL) {
                        return -KVT_ENOMEM;
                    }
                    piece->extent = k.extent;
                }
                run = run_add(w->out, piece, s, token, 0, 0);
                if (run == NULL) {
                    return -KVT_ENOMEM;
                }
                run->k_offset = k.offset + (uint64_t)inside * bytes->k;
                run->v_offset = v.offset + (uint64_t)inside * bytes->v;
            }
            run->read_count += reads;
            run->append_count += portion - reads;
            last = b;
            done += portion;
        }
    }
    return 0;
}

/* Asked for each layer, so that a step which cannot be given is not laid out to its end. */
static int size_check(const struct walk *w) {
    return pieces_bytes(w->out) <= w->shape->bytes_max ? 0 : -KVT_ETOOBIG;
}

/* A later reader finds what the layer's own listing appended already there. */
static int list_layer(struct walk *w, uint32_t layer, uint32_t reader) {
    uint32_t first = w->out->piece_count;
    if (w->shape->streamed_only && w->c->family->resident[layer]) {
        return 0;
    }
    struct segment *segments = w->segment;
    uint32_t count = w->segment_count;
    struct segment *read_only = NULL;
    if (layer != reader) {
        read_only = malloc((count + 1) * sizeof(*read_only));
        if (read_only == NULL) {
            return -KVT_ENOMEM;
        }
        for (uint32_t i = 0; i < count; i++) {
            read_only[i] = segments[i];
            read_only[i].read += read_only[i].append;
            read_only[i].append = 0;
        }
        segments = read_only;
    }
    int rc = w->c->family->resident[layer] ? list_resident(w, segments, count, layer, reader)
                                           : list_streamed(w, segments, count, layer, reader);
    free(read_only);
    if (rc == 0 && w->out->piece_count > first) {
        w->out->piece[w->out->piece_count - 1].flags |= KVT_PIECE_LAST;
    }
    return rc == 0 ? size_check(w) : rc;
}

static int build_segment(struct walk *w) {
    int rc = 0;
    w->set = malloc((w->shape->count + 1) * sizeof(*w->set));
    if (w->set == NULL) {
        return -KVT_ENOMEM;
    }
    for (uint32_t i = 0; i < w->shape->count; i++) {
        w->set[i] = i;
    }
    if (w->shape->count > 0) {
        rc = segments_walk(w, 0, w->shape->count, 0);
    }
    const struct family *f = w->c->family;
    uint32_t shared[KVT_LAYERS_MAX]; /* layers that later ones read, so far */
    uint32_t shared_count = 0;
    for (uint32_t reader = 0; reader < f->layer_count && rc == 0; reader++) {
        for (uint32_t i = 0; i < shared_count && rc == 0; i++) {
            rc = f->layers[shared[i]].last_reader >= reader ? list_layer(w, shared[i], reader) : 0;
        }
        rc = rc == 0 ? list_layer(w, reader, reader) : rc;
        if (f->layers[reader].last_reader > reader) {
            shared[shared_count++] = reader;
        }
    }
    free(w->set);
    free(w->segment);
    return rc;
}

/* ---- pieces of dense workers ------------------------------------------------------------------------ */

/* For each row and block: the row from which it is copied on the device, or the row itself. The
 * source is the row that has most tokens of the block. Marks: two walks over the tables. */
void pieces_mark_sources(struct kvt_engine *e, struct cache *c, const struct step_shape *shape) {
    struct walk w = {.e = e, .c = c, .shape = shape};
    uint64_t walk = ++e->walk;
    for (uint32_t at = 0; at < shape->count; at++) {
        uint32_t tokens;
        for (uint32_t i = 0; row_block(&w, at, i, &tokens) != NULL; i++) {
            struct block *b = c->rows[shape->rows[at]].blocks[i];
            if (b->mark != walk || b->mark_tokens < tokens) {
                b->mark = walk;
                b->mark_row = at;
                b->mark_tokens = tokens;
            }
        }
    }
}

/* Appends the copy to the last move if it goes on where that one ended. */
static int move_add(struct pieces *p, uint32_t first, struct kvt_sched_move m) {
    if (p->move_count > first) {
        struct kvt_sched_move *last = &p->move[p->move_count - 1];
        if (last->source_extent == m.source_extent && last->target_extent == m.target_extent &&
            last->source_offset + last->bytes == m.source_offset &&
            last->target_offset + last->bytes == m.target_offset) {
            last->bytes += m.bytes;
            return 0;
        }
    }
    if (!GROW(p, move)) {
        return -KVT_ENOMEM;
    }
    p->move[p->move_count++] = m;
    return 0;
}

/* Duplicates of one plane (K or V) behind the fill of a streamed piece. */
static int duplicates_add(struct walk *w, struct kvt_sched_piece *piece, uint64_t base,
                          uint64_t row_bytes, uint32_t token_bytes) {
    uint32_t block_tokens = w->e->config.block_tokens;
    for (uint32_t at = 0; at < w->shape->count && token_bytes > 0; at++) {
        uint32_t tokens;
        const struct block *b;
        for (uint32_t i = 0; (b = row_block(w, at, i, &tokens)) != NULL; i++) {
            if (b->mark_row == at) {
                continue;
            }
            uint64_t inside = (uint64_t)i * block_tokens * token_bytes;
            int rc = move_add(
                w->out, piece->move_first,
                (struct kvt_sched_move){.source_offset = base + b->mark_row * row_bytes + inside,
                                        .target_offset = base + at * row_bytes + inside,
                                        .bytes = (uint64_t)tokens * token_bytes});
            if (rc != 0) {
                return rc;
            }
        }
    }
    piece->move_count = w->out->move_count - piece->move_first;
    return 0;
}

static int list_dense(struct walk *w, uint32_t layer) {
    struct cache *c = w->c;
    const struct family *f = c->family;
    if (w->shape->streamed_only && f->resident[layer]) {
        return 0;
    }
    struct kvt_sched_piece *piece = piece_add(w->out, layer, layer);
    if (piece == NULL) {
        return -KVT_ENOMEM;
    }
    piece->last_reader = f->layers[layer].last_reader;
    piece->flags |= KVT_PIECE_LAST;
    piece->token_capacity = f->resident[layer] ? c->planes->capacity : c->capacity;
    piece->k_row_bytes = (uint64_t)piece->token_capacity * f->bytes[layer].k;
    piece->v_row_bytes = (uint64_t)piece->token_capacity * f->bytes[layer].v;
    if (f->resident[layer]) {
        piece->extent = c->planes->place[layer].extent;
        piece->k_offset = c->planes->place[layer].offset;
    } else {
        piece->flags |= KVT_PIECE_STREAMED;
    }
    uint32_t rows = f->resident[layer] ? c->planes->rows : c->row_count;
    piece->v_offset = piece->k_offset + rows * piece->k_row_bytes;
    for (uint32_t at = 0; at < w->shape->count; at++) {
        struct segment one = {.row_first = w->out->row_count, .row_count = 1};
        if (!GROW(w->out, row)) {
            return -KVT_ENOMEM;
        }
        w->out->row[w->out->row_count++] = w->shape->rows[at];
        struct kvt_sched_run *run =
            run_add(w->out, piece, &one, 0, w->shape->lengths[at], w->shape->tokens[at]);
        if (run == NULL) {
            return -KVT_ENOMEM;
        }
        run->k_offset = piece->k_offset + at * piece->k_row_bytes;
        run->v_offset = piece->v_offset + at * piece->v_row_bytes;
    }
    int rc = 0;
    if (!f->resident[layer]) {
        rc = duplicates_add(w, piece, piece->k_offset, piece->k_row_bytes, f->bytes[layer].k);
    }
    if (rc == 0 && !f->resident[layer]) {
        rc = duplicates_add(w, piece, piece->v_offset, piece->v_row_bytes, f->bytes[layer].v);
    }
    return rc == 0 ? size_check(w) : rc;
}

int pieces_build(struct kvt_engine *e, struct cache *c, const struct step_shape *shape,
                 struct pieces *out) {
    struct walk w = {.e = e, .c = c, .shape = shape, .out = out};
    pieces_clear(out);
    if (family_is_segment(e, c->family)) {
        return build_segment(&w);
    }
    pieces_mark_sources(e, c, shape);
    int rc = 0;
    for (uint32_t layer = 0; layer < c->family->layer_count && rc == 0; layer++) {
        rc = list_dense(&w, layer);
    }
    return rc;
}

/* ---- sizes -------------------------------------------------------------------------------------------- */

/* The largest streamed piece of the cache, for dense workers with so many tokens a row. */
uint64_t slot_bytes_needed(const struct kvt_engine *e, const struct cache *c, uint32_t capacity) {
    const struct family *f = c->family;
    uint64_t most = 0;
    for (uint32_t l = 0; l < f->layer_count; l++) {
        if (f->resident[l]) {
            continue;
        }
        uint64_t bytes = (uint64_t)f->bytes[l].k + f->bytes[l].v;
        bytes = family_is_segment(e, f) ? size_of(1, f->piece_tokens, bytes)
                                        : size_of(c->row_count, capacity, bytes);
        most = bytes > most ? bytes : most;
    }
    return most;
}

uint32_t slots_needed(const struct kvt_engine *e, const struct family *f) {
    return plan_slots(f->layers, f->layer_count, f->resident, !family_is_segment(e, f),
                      f->is_static);
}
