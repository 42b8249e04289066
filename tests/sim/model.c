/* The model: for each row the content of its committed tokens, updated by what requests mean. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

/* ---- rows and caches ------------------------------------------------------------------------- */

void sim_cache_clear(struct sim_cache *c) {
    for (uint32_t i = 0; i < SIM_ROWS_MAX; i++) {
        free(c->rows[i].ids);
    }
    *c = (struct sim_cache){0};
}

static void row_room(struct sim_row *r, uint32_t room) {
    if (room > r->room) {
        r->room = room < 512 ? 512 : room * 2;
        r->ids = sim_grow(r->ids, r->room * sizeof(uint64_t));
    }
}

void sim_row_append(struct sim_row *r, uint64_t content) {
    row_room(r, r->length + 1);
    r->ids[r->length++] = content;
}

void sim_row_copy(struct sim_row *to, const struct sim_row *from) {
    *to = (struct sim_row){0};
    row_room(to, from->length);
    if (from->length > 0) {
        memcpy(to->ids, from->ids, from->length * sizeof(uint64_t));
    }
    to->length = from->length;
    to->was_full = from->was_full;
}

/* ---- bytes ----------------------------------------------------------------------------------- */

static uint64_t word_of(uint64_t content, uint32_t layer, uint32_t plane, uint32_t at) {
    return sim_mix(content * 64 + (uint64_t)layer * 8 + plane * 4 + ((uint64_t)at << 40));
}

void sim_token_write(uint8_t *to, uint32_t bytes, uint64_t content, uint32_t layer,
                     uint32_t plane) {
    for (uint32_t i = 0; i < bytes; i += 8) {
        uint64_t word = word_of(content, layer, plane, i);
        memcpy(to + i, &word, bytes - i < 8 ? bytes - i : 8);
    }
}

bool sim_token_is(const uint8_t *at, uint32_t bytes, uint64_t content, uint32_t layer,
                  uint32_t plane) {
    for (uint32_t i = 0; i < bytes; i += 8) {
        uint64_t word = word_of(content, layer, plane, i);
        if (memcmp(at + i, &word, bytes - i < 8 ? bytes - i : 8) != 0) {
            return false;
        }
    }
    return true;
}

/* ---- what requests mean ---------------------------------------------------------------------- */

static bool rows_outside(const struct sim_cache *c, const struct sim_request *r) {
    for (uint32_t i = 0; i < r->count; i++) {
        if (r->rows[i] >= c->row_count) {
            return true;
        }
    }
    return false;
}

static bool step_refused(const struct sim_worker *w, const struct sim_cache *c,
                         const struct sim_request *r) {
    bool dense = w->kind == KVT_WORKER_DENSE;
    if (r->steps < 1 || r->steps > KVT_STEPS_AHEAD_MAX || rows_outside(c, r) ||
        (dense && r->count != 0 && r->count != c->row_count)) {
        return true;
    }
    for (uint32_t i = 0; i < (r->count == 0 ? c->row_count : r->count); i++) {
        uint32_t row = r->count == 0 ? i : r->rows[i];
        uint32_t tokens = r->count == 0 ? r->tokens : r->values[i];
        for (uint32_t j = 0; j < i && r->count != 0; j++) {
            if (r->rows[j] == row) {
                return true;
            }
        }
        if ((dense && row != i) || tokens > c->append_max ||
            (c->tokens_max != 0 && tokens > c->tokens_max - c->rows[row].length)) {
            return true;
        }
    }
    return false;
}

/* A static cache of a dense worker has the addresses of so many rows. */
static bool rows_refused(const struct sim_worker *w, const struct sim_cache *c, uint64_t rows) {
    bool is_static = c->mode == KVT_MODE_STATIC || c->mode == KVT_MODE_OFFLOADED_STATIC;
    return rows == 0 || rows > KVT_ROWS_MAX ||
           (is_static && w->kind == KVT_WORKER_DENSE && rows > c->rows_created);
}

static bool acquire_refused(const struct sim_cache *c, const struct sim_request *r) {
    bool refused = r->tokens > c->append_max;
    for (uint32_t i = 0; i < c->row_count && c->tokens_max != 0; i++) {
        refused = refused || r->tokens > c->tokens_max - c->rows[i].length;
    }
    return refused;
}

bool sim_model_refuses(const struct sim_worker *w, const struct sim_request *r) {
    if (r->kind == KVT_REQUEST_CREATE) {
        bool is_static =
            r->blank.mode == KVT_MODE_STATIC || r->blank.mode == KVT_MODE_OFFLOADED_STATIC;
        return r->blank.mode < KVT_MODE_DYNAMIC || r->blank.mode > KVT_MODE_OFFLOADED_STATIC ||
               r->blank.row_count == 0 || r->blank.append_max == 0 ||
               (is_static && r->blank.tokens_max == 0);
    }
    const struct sim_cache *c = sim_cache_find((struct sim_worker *)w, r->cache);
    if (!c || r->cache == 0) {
        return true;
    }
    switch (r->kind) {
    case KVT_REQUEST_STEP:
        return step_refused(w, c, r);
    case KVT_REQUEST_ACQUIRE:
        return r->layer >= c->layer_count || acquire_refused(c, r);
    case KVT_REQUEST_FORK:
        return rows_outside(c, r);
    case KVT_REQUEST_REORDER:
        return rows_outside(c, r) || r->count != c->row_count;
    case KVT_REQUEST_SELECT:
        return rows_outside(c, r) || rows_refused(w, c, r->count);
    case KVT_REQUEST_REPEAT:
        return rows_refused(w, c, (uint64_t)r->times * c->row_count);
    case KVT_REQUEST_CROP:
        return r->count != 1 && r->count != c->row_count;
    default:
        return false;
    }
}

static void rows_map(struct sim_cache *to, const struct sim_cache *from, const uint32_t *map,
                     uint32_t count) {
    struct sim_row rows[SIM_ROWS_MAX] = {{0}};
    for (uint32_t i = 0; i < count; i++) {
        sim_row_copy(&rows[i], &from->rows[map[i]]);
    }
    for (uint32_t i = 0; i < SIM_ROWS_MAX; i++) {
        free(to->rows[i].ids);
    }
    memcpy(to->rows, rows, sizeof(rows));
    to->row_count = count;
}

/* The two share planes; the one that steps first may have to move. */
static void cache_fork(struct sim *sim, struct sim_worker *w, struct sim_cache *c,
                       const uint32_t *map, uint32_t count, uint32_t id) {
    struct sim_cache *to = sim_cache_find(w, 0);
    if (!to) {
        sim_fail(sim, "more caches than the simulator asked for");
    }
    struct sim_cache copy = *c;
    memset(copy.rows, 0, sizeof(copy.rows));
    copy.id = id;
    copy.may_move = c->may_move = true;
    copy.rows_created = count;
    *to = copy;
    rows_map(to, c, map, count);
}

static void crop_row(const struct sim *sim, struct sim_row *r, uint32_t keep) {
    uint32_t block = sim->config.block_tokens;
    if (keep < r->length) {
        bool same_block = keep / block == r->length / block;
        r->was_full = keep % block != 0 && (!same_block || r->was_full);
        r->length = keep;
    }
}

static void edit_rows(struct sim *sim, struct sim_worker *w, struct sim_cache *c,
                      const struct sim_request *r, uint32_t id) {
    uint32_t map[SIM_ROWS_MAX * SIM_ROWS_MAX];
    uint32_t count = r->count;
    for (uint32_t i = 0; i < SIM_ROWS_MAX * SIM_ROWS_MAX; i++) {
        map[i] = i;
    }
    if (r->kind == KVT_REQUEST_REPEAT) {
        count = r->times * c->row_count;
        for (uint32_t i = 0; i < count; i++) {
            map[i] = i / r->times;
        }
    } else if (count != 0) {
        memcpy(map, r->rows, count * sizeof(uint32_t));
    } else {
        count = c->row_count;
    }
    if (r->kind == KVT_REQUEST_FORK) {
        cache_fork(sim, w, c, map, count, id);
    } else {
        rows_map(c, c, map, count);
    }
}

void sim_model_edit(struct sim *sim, struct sim_worker *w, const struct sim_request *r,
                    const struct kvt_answer *answer) {
    struct sim_cache *c = sim_cache_find(w, r->cache);
    switch (r->kind) {
    case KVT_REQUEST_CLOSE:
        sim_cache_clear(c);
        break;
    case KVT_REQUEST_CROP:
    case KVT_REQUEST_RESET:
        for (uint32_t i = 0; i < c->row_count; i++) {
            uint32_t keep = r->kind == KVT_REQUEST_RESET ? 0 : r->values[r->count == 1 ? 0 : i];
            crop_row(sim, &c->rows[i], keep);
        }
        break;
    default:
        edit_rows(sim, w, c, r, answer->cache);
    }
}
