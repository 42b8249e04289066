/* Caches: create, close, and the edits of rows, which are edits of tables.
 *
 * Edits that free blocks first discard the prefetch and wait until none of the session's copies is
 * in flight: a copy must never read memory that already belongs to somebody else.
 */
#include "tiers/engine/state.h"

#include <stdlib.h>
#include <string.h>

/* ---- planes ------------------------------------------------------------------------------------- */

struct planes *planes_create(struct family *f, uint32_t rows, uint32_t capacity, uint32_t owner) {
    struct planes *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        return NULL;
    }
    p->place = calloc(f->layer_count, sizeof(*p->place));
    p->frozen = calloc(rows, sizeof(*p->frozen));
    p->longest = calloc(rows, sizeof(*p->longest));
    if (p->place == NULL || p->frozen == NULL || p->longest == NULL) {
        free(p->place);
        free(p->frozen);
        free(p->longest);
        free(p);
        return NULL;
    }
    p->refs = 1;
    p->rows = rows;
    p->capacity = capacity;
    p->owner = owner;
    p->family = f;
    return p;
}

uint64_t planes_layer_bytes(const struct planes *p, uint32_t layer) {
    const struct layer_bytes *bytes = &p->family->bytes[layer];
    return size_of(p->rows, p->capacity, (uint64_t)bytes->k + bytes->v);
}

/* Places for all resident layers, or for none. */
int planes_alloc(struct kvt_engine *e, struct planes *p) {
    struct family *f = p->family;
    struct session *s = &e->sessions[f->session];
    uint64_t bytes = 0;
    bool any = false;
    for (uint32_t l = 0; l < f->layer_count; l++) {
        bytes +=
            f->resident[l] ? (planes_layer_bytes(p, l) / KVT_ALIGN_BYTES + 1) * KVT_ALIGN_BYTES : 0;
        bytes = bytes < KVT_BYTES_HUGE ? bytes : KVT_BYTES_HUGE;
        any |= p->place[l].extent != 0;
    }
    if (!any && dev_reserve(e, s, bytes) == KVT_WAIT) {
        return KVT_WAIT;
    }
    int result = KVT_READY;
    for (uint32_t l = 0; l < f->layer_count && result >= 0; l++) {
        if (!f->resident[l] || p->place[l].extent != 0) {
            continue;
        }
        int rc = dev_alloc(e, s, planes_layer_bytes(p, l), &p->place[l]);
        if (rc != KVT_READY) {
            result = rc;
        } else {
            f->gpu_bytes += planes_layer_bytes(p, l);
        }
    }
    for (uint32_t l = 0; l < f->layer_count && result != KVT_READY; l++) {
        planes_layer_free(e, p, l);
    }
    return result;
}

/* Whether planes_next may take over the places of planes, one after the other: nobody else reads
 * these, the addresses are not fixed, and it has no places yet, as it has if another cache still
 * read the old ones when the step began to wait. */
bool planes_reuse(const struct cache *c) {
    for (uint32_t l = 0; c->planes_next != NULL && l < c->family->layer_count; l++) {
        if (c->planes_next->place[l].extent != 0) {
            return false;
        }
    }
    return c->planes != NULL && c->planes->refs == 1 && !c->family->is_static;
}

/* Undoes a chain that got as far as it did; `places` are those of `from` before. */
void planes_chain_undo(struct kvt_engine *e, struct planes *from, struct planes *to,
                       const struct dev_place *places) {
    const struct family *f = from->family;
    for (uint32_t l = f->layer_count; l-- > 0;) {
        if (to->place[l].extent != 0 && from->place[l].extent == 0 && places[l].extent != 0) {
            dev_take(e, places[l], planes_layer_bytes(from, l));
            from->family->gpu_bytes += planes_layer_bytes(from, l);
            from->place[l] = places[l];
        }
        planes_layer_free(e, to, l);
    }
}

/* Places for the resident layers of `to`, each layer's old place given free as soon as the new one
 * is found: in this order planes can be moved one by one, with little more memory than before. All
 * or nothing; KVT_WAIT: more memory has been asked for. */
int planes_chain(struct kvt_engine *e, struct planes *from, struct planes *to) {
    struct family *f = from->family;
    struct session *s = &e->sessions[f->session];
    struct dev_place places[KVT_LAYERS_MAX];
    memcpy(places, from->place, f->layer_count * sizeof(*places));
    for (uint32_t l = 0; l < f->layer_count; l++) {
        if (!f->resident[l]) {
            continue;
        }
        e->chaining = true;
        int rc = dev_alloc(e, s, planes_layer_bytes(to, l), &to->place[l]);
        e->chaining = false;
        if (rc != KVT_READY) {
            planes_chain_undo(e, from, to, places);
            return rc;
        }
        f->gpu_bytes += planes_layer_bytes(to, l);
        planes_layer_free(e, from, l);
    }
    return KVT_READY;
}

void planes_layer_free(struct kvt_engine *e, struct planes *p, uint32_t layer) {
    if (p->place[layer].extent != 0) {
        dev_free(e, p->place[layer], planes_layer_bytes(p, layer));
        p->family->gpu_bytes -= planes_layer_bytes(p, layer);
        p->place[layer] = (struct dev_place){0};
    }
}

void planes_unref(struct kvt_engine *e, struct planes *p) {
    if (p == NULL || --p->refs > 0) {
        return;
    }
    for (uint32_t l = 0; l < p->family->layer_count; l++) {
        planes_layer_free(e, p, l);
    }
    free(p->place);
    free(p->frozen);
    free(p->longest);
    free(p);
}

/* ---- create --------------------------------------------------------------------------------------- */

static int create_check(const struct session *s, const struct kvt_request *r, char *text) {
    const struct kvt_cache_options *o = r->options;
    int rc = kvt_layout_check(r->layout, text, KVT_TEXT_BYTES);
    if (rc != 0) {
        return rc;
    }
    for (uint32_t l = 0; l < r->layout->layer_count; l++) {
        if (r->layout->layers[l].kind != KVT_LAYER_FULL) {
            kvt_text_format(text, KVT_TEXT_BYTES,
                            "create: layer %u: kind %u is not supported yet; only 1 (full) is", l,
                            r->layout->layers[l].kind);
            return -KVT_ENOTSUP;
        }
    }
    rc = plan_slots_check(r->layout->layers, r->layout->layer_count,
                          s->worker_kind == KVT_WORKER_DENSE, r->options->mode, "create", text,
                          KVT_TEXT_BYTES);
    if (rc != 0) {
        return rc;
    }
    const char *wrong = NULL;
    uint64_t value = 0;
    bool is_static = mode_is_static(o->mode);
    if (o->mode < KVT_MODE_DYNAMIC || o->mode > KVT_MODE_OFFLOADED_STATIC) {
        wrong = "mode; accepted is 1 (dynamic) to 4 (offloaded-static)", value = o->mode;
    } else if (o->codec != KVT_CODEC_NONE) {
        wrong = "codec; accepted is 0 (none)", value = o->codec;
    } else if (o->rows < 1 || o->rows > KVT_ROWS_MAX) {
        wrong = "rows; accepted is 1 to 1024", value = o->rows;
    } else if (o->append_max < 1 || o->append_max > KVT_APPEND_MAX) {
        wrong = "append_max; accepted is 1 to 1048576", value = o->append_max;
    } else if (o->tokens_max > KVT_TOKENS_MAX) {
        wrong = "tokens_max; accepted is up to 2147483392", value = o->tokens_max;
    } else if (is_static && o->tokens_max == 0) {
        wrong = "tokens_max; a static mode needs the capacity of a row", value = 0;
    } else if (o->piece_tokens > KVT_TOKENS_MAX) {
        wrong = "piece_tokens; accepted is up to 2147483392", value = o->piece_tokens;
    }
    if (wrong != NULL) {
        kvt_text_format(text, KVT_TEXT_BYTES, "create: %llu is no %s", (unsigned long long)value,
                        wrong);
        return -KVT_EINVAL;
    }
    if (s->cache_count >= KVT_CACHES_MAX) {
        kvt_text_format(text, KVT_TEXT_BYTES,
                        "create: the session has %u caches already; close one", s->cache_count);
        return -KVT_EBUSY;
    }
    return 0;
}

static int cache_enter(struct kvt_engine *e, struct cache *c) {
    for (uint32_t i = 0; i < e->config.caches_max; i++) {
        if (e->caches[i] == NULL) {
            e->caches[i] = c;
            if (++e->cache_generation[i] == 0) {
                e->cache_generation[i] = 1; /* no cache's id is 0 */
            }
            c->id = ((uint32_t)e->cache_generation[i] << 16) | i;
            e->sessions[c->session].cache_count++;
            return 0;
        }
    }
    return -KVT_EBUSY;
}

static struct cache *cache_blank(struct family *f, uint32_t session, uint32_t rows) {
    struct cache *c = calloc(1, sizeof(*c));
    if (c == NULL) {
        return NULL;
    }
    c->rows = calloc(rows, sizeof(*c->rows));
    if (c->rows == NULL) {
        free(c);
        return NULL;
    }
    for (uint32_t i = 0; i < rows; i++) {
        c->rows[i].planes_row = i;
    }
    c->session = session;
    c->family = f;
    c->row_count = rows;
    f->refs++;
    return c;
}

void cache_unmake(struct kvt_engine *e, struct cache *c) {
    for (uint32_t i = 0; i < c->row_count; i++) {
        row_clear(e, c, &c->rows[i]);
    }
    planes_unref(e, c->planes);
    family_unref(e, c->family);
    free(c->rows);
    free(c);
}

/* Of a static cache: one more a row than it has tokens for, for a copied tail beside the old one. */
uint64_t spare_blocks(const struct kvt_engine *e, const struct cache *c) {
    uint64_t blocks =
        ((uint64_t)c->tokens_max + e->config.block_tokens - 1) / e->config.block_tokens;
    return c->row_count * (blocks + 1);
}

/* All memory that CREATE promises: slots, and everything of a static cache. */
static int create_memory(struct kvt_engine *e, struct session *s, struct cache *c) {
    struct family *f = c->family;
    int result = KVT_READY;
    memory_pass_begin(e, s);
    bool offloaded = mode_is_offloaded(f->mode);
    if (offloaded) {
        uint32_t capacity = c->capacity != 0 ? c->capacity : e->config.block_tokens;
        result = slots_settle(e, s, slots_needed(e, f), slot_bytes_needed(e, c, capacity));
    }
    if (result >= 0 && f->is_static && s->worker_kind == KVT_WORKER_DENSE &&
        f->resident_count > 0) {
        c->planes = planes_create(f, c->row_count, c->capacity, c->id);
        int rc = c->planes == NULL ? -KVT_ENOMEM : planes_alloc(e, c->planes);
        result = rc != KVT_READY ? rc : result;
    }
    if (result >= 0 && f->is_static) {
        int rc = spare_fill(e, c, spare_blocks(e, c));
        result = rc != KVT_READY ? rc : result;
    }
    return result;
}

int cache_make(const struct kvt_engine *e, const struct session *s, const struct kvt_request *r,
               struct cache **out) {
    const struct kvt_cache_options *o = r->options;
    struct family *f =
        family_create(r->layout, o, session_index(e, s), s->worker_kind == KVT_WORKER_DENSE);
    if (f == NULL) {
        return -KVT_ENOMEM;
    }
    f->piece_tokens = plan_piece_tokens(e, f->layers, f->layer_count, s->device, o->piece_tokens);
    f->resident_count = resident_layers_most(f->mode, f->layer_count, f->resident_layers_max);
    for (uint32_t i = 0; i < f->resident_count; i++) {
        f->resident[f->priority[i]] = true;
    }
    struct cache *c = cache_blank(f, session_index(e, s), o->rows);
    if (c == NULL) {
        family_free(f);
        return -KVT_ENOMEM;
    }
    c->tokens_max = o->tokens_max;
    c->append_max = o->append_max;
    c->rows_created = o->rows;
    memcpy(c->name, o->name, sizeof(c->name));
    c->name[sizeof(c->name) - 1] = 0;
    if (f->is_static) {
        uint32_t bt = e->config.block_tokens;
        c->capacity = (o->tokens_max + bt - 1) / bt * bt;
    }
    *out = c;
    return 0;
}

int cache_create(struct kvt_engine *e, struct session *s, const struct kvt_request *r,
                 struct cache **out, char *text) {
    struct cache *c;
    int rc = create_check(s, r, text);
    rc = rc == 0 ? session_return(e, s, NULL) : rc; /* what is away has to fit beside it */
    if (rc == -KVT_EQUOTA) {
        return memory_take(e, s);
    }
    rc = rc == 0 ? cache_make(e, s, r, &c) : rc;
    if (rc != 0) {
        return rc;
    }
    rc = create_memory(e, s, c);
    if (rc == KVT_READY) {
        rc = cache_enter(e, c);
        if (rc != 0) {
            kvt_text_format(text, KVT_TEXT_BYTES, "create: the daemon's table of %u caches is full",
                            e->config.caches_max);
        } else if (c->planes != NULL) {
            c->planes->owner = c->id;
        }
        s->last_step_ms = e->now_ms; /* a cache that was just made is about to be used */
    } else if (rc == -KVT_EQUOTA) {
        rc = memory_take(e, s);
    } else if (rc == -KVT_EBUSY) {
        blocks_full_text(e, s, "create", text);
    }
    if (rc != KVT_READY) {
        cache_unmake(e, c);
        return rc;
    }
    *out = c;
    return KVT_READY;
}

/* Nothing of the session is in flight that reads or writes the cache's memory. */
void cache_destroy(struct kvt_engine *e, struct cache *c) {
    struct session *s = &e->sessions[c->session];
    KVT_ASSERT(e->caches[c->id & 0xffff] == c);
    e->caches[c->id & 0xffff] = NULL;
    KVT_ASSERT(s->cache_count > 0);
    s->cache_count--;
    cache_unmake(e, c);
    if (!s->hung) {
        slots_shrink(e, s);
    }
}

/* ---- edits ------------------------------------------------------------------------------------------- */

/* New rows: row i is a copy of row map[i]. With `steal` the old rows will not be needed any more:
 * each one's last copy is the row itself, with its table and its room for growth. */
static int rows_mapped(struct kvt_engine *e, struct cache *c, const uint32_t *map, uint32_t count,
                       bool steal, struct row **out) {
    uint32_t heir[KVT_ROWS_MAX];
    struct row *rows = calloc(count, sizeof(*rows));
    if (rows == NULL) {
        return -KVT_ENOMEM;
    }
    for (uint32_t i = 0; i < count; i++) {
        heir[map[i]] = i;
    }
    for (uint32_t i = 0; i < count; i++) {
        bool copied = !steal || heir[map[i]] != i;
        int rc = copied ? row_copy(e, c, &c->rows[map[i]], &rows[i]) : 0;
        if (rc != 0) {
            while (i-- > 0) {
                row_clear(e, c, &rows[i]);
            }
            free(rows);
            return rc;
        }
    }
    for (uint32_t i = 0; i < count && steal; i++) {
        if (heir[map[i]] == i) {
            struct row *old = &c->rows[map[i]];
            KVT_ASSERT(old->cow == NULL);
            rows[i] = *old;
            *old = (struct row){0};
            row_trim(e, &rows[i]);
        }
    }
    *out = rows;
    return 0;
}

static int map_check(const struct cache *c, const uint32_t *map, uint32_t count, const char *what,
                     char *text) {
    if (count < 1 || count > KVT_ROWS_MAX) {
        kvt_text_format(text, KVT_TEXT_BYTES, "%s: %u rows; accepted is 1 to 1024", what, count);
        return -KVT_EINVAL;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (map[i] >= c->row_count) {
            kvt_text_format(text, KVT_TEXT_BYTES,
                            "%s: row %u at position %u; the cache has %u rows", what, map[i], i,
                            c->row_count);
            return -KVT_EINVAL;
        }
    }
    return 0;
}

static int rows_replace(struct kvt_engine *e, struct cache *c, const uint32_t *map,
                        uint32_t count) {
    struct row *rows;
    int rc = rows_mapped(e, c, map, count, true, &rows);
    if (rc != 0) {
        return rc;
    }
    for (uint32_t i = 0; i < c->row_count; i++) {
        row_clear(e, c, &c->rows[i]);
    }
    free(c->rows);
    c->rows = rows;
    c->row_count = count;
    c->version++;
    return 0;
}

static int cache_repeat(struct kvt_engine *e, struct cache *c, uint32_t times) {
    uint32_t count = times * c->row_count;
    uint32_t map[KVT_ROWS_MAX];
    for (uint32_t i = 0; i < count; i++) {
        map[i] = i / times;
    }
    return rows_replace(e, c, map, count);
}

static void cache_crop(struct kvt_engine *e, struct cache *c, const uint32_t *lengths,
                       uint32_t count) {
    for (uint32_t i = 0; i < c->row_count && !KVT_BROKEN(e->rules, KVT_BREAK_CROP_KEEPS_LENGTH);
         i++) {
        uint32_t length = lengths[count == 1 ? 0 : i];
        if (length < c->rows[i].length) {
            c->rows[i].length = length;
            row_trim(e, &c->rows[i]);
        }
    }
}

static int cache_fork(struct kvt_engine *e, struct session *s, struct cache *c, const uint32_t *map,
                      uint32_t count, struct cache **result, char *text) {
    uint32_t all[KVT_ROWS_MAX];
    if (count == 0) {
        for (uint32_t i = 0; i < c->row_count; i++) {
            all[i] = i;
        }
        map = all;
        count = c->row_count;
    }
    if (s->cache_count >= KVT_CACHES_MAX) {
        kvt_text_format(text, KVT_TEXT_BYTES, "fork: the session has %u caches already; close one",
                        s->cache_count);
        return -KVT_EBUSY;
    }
    struct cache *fork = cache_blank(c->family, c->session, count);
    if (fork == NULL) {
        return -KVT_ENOMEM;
    }
    free(fork->rows);
    fork->rows = NULL;
    fork->row_count = 0;
    int rc = rows_mapped(e, c, map, count, false, &fork->rows);
    if (rc == 0) {
        fork->row_count = count;
        rc = cache_enter(e, fork);
    }
    if (rc != 0) {
        cache_unmake(e, fork);
        return rc;
    }
    fork->capacity = c->capacity;
    fork->rows_created = count;
    fork->tokens_max = c->tokens_max;
    fork->append_max = c->append_max;
    memcpy(fork->name, c->name, sizeof(fork->name));
    if (c->planes != NULL) {
        fork->planes = c->planes;
        fork->planes->refs++;
        for (uint32_t i = 0; i < count; i++) {
            uint32_t *frozen = &fork->planes->frozen[fork->rows[i].planes_row];
            *frozen = fork->rows[i].length > *frozen ? fork->rows[i].length : *frozen;
        }
    }
    *result = fork;
    return 0;
}

/* Whether the edit frees blocks, or changes what the prefetch was made for. */
static bool edit_frees(const struct kvt_engine *e, const struct cache *c,
                       const struct kvt_request *r) {
    if (r->kind == KVT_REQUEST_FORK || r->kind == KVT_REQUEST_REPEAT) {
        return false;
    }
    if (r->kind != KVT_REQUEST_CROP) {
        return true;
    }
    for (uint32_t i = 0; i < c->row_count && (r->count == 1 || r->count == c->row_count); i++) {
        uint64_t keep = r->values[r->count == 1 ? 0 : i];
        if (keep < c->rows[i].length &&
            (keep + e->config.block_tokens - 1) / e->config.block_tokens < c->rows[i].count) {
            return true;
        }
    }
    return false;
}

/* Everything that can be refused is refused before anything is given up for the edit. */
static int edit_check(const struct kvt_engine *e, const struct cache *c,
                      const struct kvt_request *r, char *text) {
    uint32_t rows = c->row_count;
    int rc = 0;
    switch (r->kind) {
    case KVT_REQUEST_FORK:
        return r->count == 0 ? 0 : map_check(c, r->rows, r->count, "fork", text);
    case KVT_REQUEST_REORDER:
        if (r->count != c->row_count) {
            kvt_text_format(text, KVT_TEXT_BYTES, "reorder: %u rows; the cache has %u", r->count,
                            c->row_count);
            return -KVT_EINVAL;
        }
        rc = map_check(c, r->rows, r->count, "reorder", text);
        break;
    case KVT_REQUEST_SELECT:
        rc = map_check(c, r->rows, r->count, "select", text);
        rows = r->count;
        break;
    case KVT_REQUEST_REPEAT:
        if (r->times < 1 || (uint64_t)r->times * c->row_count > KVT_ROWS_MAX) {
            kvt_text_format(text, KVT_TEXT_BYTES,
                            "repeat: %u times %u rows; accepted is 1 to 1024 rows", r->times,
                            c->row_count);
            return -KVT_EINVAL;
        }
        rows = r->times * c->row_count;
        break;
    case KVT_REQUEST_CROP:
        if (r->count != 1 && r->count != c->row_count) {
            kvt_text_format(text, KVT_TEXT_BYTES,
                            "crop: %u lengths; accepted is 1 or one for each of the %u rows",
                            r->count, c->row_count);
            return -KVT_EINVAL;
        }
        break;
    default:
        break;
    }
    if (rc == 0 && rows > c->rows_created && c->family->is_static &&
        !family_is_segment(e, c->family)) {
        kvt_text_format(text, KVT_TEXT_BYTES,
                        "%u rows; a static cache of a dense worker was created for %u and its "
                        "addresses are fixed; create one for more, or use a dynamic mode",
                        rows, c->rows_created);
        return -KVT_ESTATE;
    }
    return rc;
}

/* Carries out a close or an edit; *result is the cache that the answer is about (NULL: closed). */
int cache_edit(struct kvt_engine *e, struct session *s, const struct kvt_request *r,
               struct cache **result, char *text) {
    struct cache *c = cache_find(e, r->session, r->cache);
    KVT_ASSERT(c != NULL);
    int rc = edit_check(e, c, r, text);
    if (rc != 0) {
        return rc;
    }
    *result = c;
    if (edit_frees(e, c, r) && !KVT_BROKEN(e->rules, KVT_BREAK_FREE_BEFORE_DRAIN)) {
        if (s->guess.active && r->kind != KVT_REQUEST_CROP) {
            guess_discard(e, s, 0);
        }
        if (s->ops.outstanding > 0 || s->migration.family != NULL) {
            return KVT_WAIT;
        }
    }
    switch (r->kind) {
    case KVT_REQUEST_CLOSE:
        cache_destroy(e, c);
        *result = NULL;
        return 0;
    case KVT_REQUEST_FORK:
        return cache_fork(e, s, c, r->rows, r->count, result, text);
    case KVT_REQUEST_REORDER:
    case KVT_REQUEST_SELECT:
        return rows_replace(e, c, r->rows, r->count);
    case KVT_REQUEST_REPEAT:
        return cache_repeat(e, c, r->times);
    case KVT_REQUEST_CROP:
        cache_crop(e, c, r->values, r->count);
        return 0;
    default:
        KVT_ASSERT(r->kind == KVT_REQUEST_RESET);
        for (uint32_t i = 0; i < c->row_count; i++) {
            c->rows[i].length = 0;
            row_trim(e, &c->rows[i]);
        }
        c->version++;
        return 0;
    }
}
