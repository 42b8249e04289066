/* Migration: a layer of a family leaves the device, or comes back, between schedules.
 *
 * To the host: a place in every group first, then the copies, and only when these are complete the
 * layer flips and its device memory is free. To the device alike. Until the flip the layer is where
 * it was; if a copy fails it stays there.
 *
 * A family of segment workers moves whole groups. Dense planes are copied block by block, each
 * distinct block once, from the row that has most of its tokens.
 */
#include "tiers/engine/state.h"

#include <stdlib.h>

struct copy_list {
    struct kvt_copy *copy;
    uint32_t count, room;
    bool no_memory;
};

static void copy_push(struct copy_list *list, bool to_host, uint64_t host, struct dev_place gpu,
                      uint64_t gpu_offset, uint64_t bytes) {
    if (bytes == 0) {
        return;
    }
    if (list->count == list->room) {
        uint32_t room = list->room == 0 ? 32 : list->room * 2;
        struct kvt_copy *grown = realloc(list->copy, room * sizeof(*grown));
        if (grown == NULL) {
            list->no_memory = true;
            return;
        }
        list->copy = grown;
        list->room = room;
    }
    struct kvt_place at_host = {.tier = KVT_TIER_HOST, .offset = host};
    struct kvt_place at_gpu = {
        .tier = KVT_TIER_GPU, .extent = gpu.extent, .offset = gpu.offset + gpu_offset};
    list->copy[list->count++] = (struct kvt_copy){
        .source = to_host ? at_gpu : at_host, .target = to_host ? at_host : at_gpu, .bytes = bytes};
}

/* ---- walking a family ----------------------------------------------------------------------------------- */

static struct cache *family_cache(const struct kvt_engine *e, const struct family *f,
                                  uint32_t *at) {
    while (*at < e->config.caches_max) {
        struct cache *c = e->caches[(*at)++];
        if (c != NULL && c->family == f) {
            return c;
        }
    }
    return NULL;
}

static uint32_t row_blocks(const struct kvt_engine *e, const struct row *r) {
    return (r->length + e->config.block_tokens - 1) / e->config.block_tokens;
}

static uint32_t block_tokens_of(const struct kvt_engine *e, const struct row *r, uint32_t index) {
    uint32_t left = r->length - index * e->config.block_tokens;
    return left < e->config.block_tokens ? left : e->config.block_tokens;
}

/* ---- copies ----------------------------------------------------------------------------------------------- */

/* Whether a block belongs to this part of the migration: early the full ones, later the rest. */
static bool block_goes(const struct migration *m, const struct block *b) {
    return m->early ? b->full && b->refs > 0 : !b->moved;
}

static void segment_copies(const struct kvt_engine *e, const struct migration *m,
                           struct copy_list *list) {
    uint32_t l = m->layer;
    for (struct group *g = m->family->groups; g != NULL; g = g->next) {
        for (uint32_t i = 0, n; i < g->taken; i += n) {
            for (n = 0; i + n < g->taken && block_goes(m, &g->blocks[i + n]); n++) {
                g->blocks[i + n].moved = m->early;
            }
            struct group_part p = group_part(e, g, l, i, n);
            copy_push(list, m->to_host, g->host[l] + p.k_offset, g->gpu[l], p.k_offset, p.k_bytes);
            copy_push(list, m->to_host, g->host[l] + p.v_offset, g->gpu[l], p.v_offset, p.v_bytes);
            n += n == 0;
        }
    }
}

static void dense_block_copies(const struct kvt_engine *e, const struct cache *c, uint32_t l,
                               const struct row *r, uint32_t index, bool to_host,
                               struct copy_list *list) {
    const struct planes *p = c->planes;
    const struct layer_bytes *bytes = &c->family->bytes[l];
    uint64_t token =
        (uint64_t)r->planes_row * p->capacity + (uint64_t)index * e->config.block_tokens;
    uint64_t tokens = block_tokens_of(e, r, index);
    uint64_t v_base = (uint64_t)p->rows * p->capacity * bytes->k;
    copy_push(list, to_host, block_host_k(e, r->blocks[index], l), p->place[l], token * bytes->k,
              tokens * bytes->k);
    copy_push(list, to_host, block_host_v(e, r->blocks[index], l), p->place[l],
              v_base + token * bytes->v, tokens * bytes->v);
}

/* Of the rows that share a plane's row one that has most: they have the same tokens, as far as they go. */
static void note_longest(const struct kvt_engine *e, const struct family *f) {
    struct cache *c;
    for (uint32_t at = 0; (c = family_cache(e, f, &at)) != NULL;) {
        for (uint32_t i = 0; c->planes != NULL && i < c->planes->rows; i++) {
            c->planes->longest[i] = NULL;
        }
    }
    for (uint32_t at = 0; (c = family_cache(e, f, &at)) != NULL;) {
        for (uint32_t i = 0; c->planes != NULL && i < c->row_count; i++) {
            const struct row **longest = &c->planes->longest[c->rows[i].planes_row];
            if (*longest == NULL || (*longest)->length < c->rows[i].length) {
                *longest = &c->rows[i];
            }
        }
    }
}

static void dense_copies(struct kvt_engine *e, const struct migration *m, struct copy_list *list) {
    const struct family *f = m->family;
    uint32_t l = m->layer;
    uint64_t walk = ++e->walk;
    struct cache *c;
    for (uint32_t at = 0; (c = family_cache(e, f, &at)) != NULL;) {
        for (uint32_t i = 0; i < c->row_count; i++) {
            for (uint32_t b = 0; b < row_blocks(e, &c->rows[i]); b++) {
                struct block *block = c->rows[i].blocks[b];
                uint32_t tokens = block_tokens_of(e, &c->rows[i], b);
                if (block->mark != walk || block->mark_tokens < tokens) {
                    block->mark = walk;
                    block->mark_tokens = tokens;
                }
            }
        }
    }
    uint64_t copied = ++e->walk;
    if (!m->to_host) {
        note_longest(e, f);
    }
    for (uint32_t at = 0; (c = family_cache(e, f, &at)) != NULL;) {
        for (uint32_t i = 0; i < c->row_count && c->planes != NULL; i++) {
            if (!m->to_host && c->planes->longest[c->rows[i].planes_row] != &c->rows[i]) {
                continue;
            }
            for (uint32_t b = 0; b < row_blocks(e, &c->rows[i]); b++) {
                struct block *block = c->rows[i].blocks[b];
                if (!m->to_host) { /* every plane's rows */
                    dense_block_copies(e, c, l, &c->rows[i], b, false, list);
                } else if (block->mark == walk && block_goes(m, block) &&
                           block->mark_tokens == block_tokens_of(e, &c->rows[i], b)) {
                    block->mark = copied;
                    block->moved = m->early;
                    dense_block_copies(e, c, l, &c->rows[i], b, true, list);
                }
            }
        }
    }
}

/* ---- places ------------------------------------------------------------------------------------------------- */

static int host_places(struct kvt_engine *e, struct session *s, struct family *f, uint32_t l) {
    for (struct group *g = f->groups; g != NULL; g = g->next) {
        if (g->host[l] != KVT_NOWHERE) {
            continue;
        }
        uint64_t bytes = group_layer_bytes(e, f, g->block_count, l);
        int rc = host_alloc(e, s, bytes, &g->host[l]);
        if (rc != KVT_READY) {
            return rc;
        }
        f->host_bytes += bytes;
    }
    return KVT_READY;
}

static void host_places_free(struct kvt_engine *e, struct session *s, struct family *f,
                             uint32_t l) {
    for (struct group *g = f->groups; g != NULL; g = g->next) {
        if (g->host[l] != KVT_NOWHERE) {
            uint64_t bytes = group_layer_bytes(e, f, g->block_count, l);
            host_free(e, s, g->host[l], bytes);
            g->host[l] = KVT_NOWHERE;
            f->host_bytes -= bytes;
        }
    }
}

/* Fresh planes for every cache, none shared: the tokens come from the host. */
static int planes_renew(struct kvt_engine *e, struct family *f) {
    struct cache *c;
    for (uint32_t at = 0; (c = family_cache(e, f, &at)) != NULL;) {
        if (c->capacity == 0 || planes_exact(c, c->capacity)) {
            continue;
        }
        if (f->resident_count > 0) {
            return -KVT_ESTATE; /* they hold other layers' tokens */
        }
        struct planes *p = planes_create(f, c->row_count, c->capacity, c->id);
        if (p == NULL) {
            return -KVT_ENOMEM;
        }
        planes_unref(e, c->planes);
        c->planes = p;
        for (uint32_t i = 0; i < c->row_count; i++) {
            c->rows[i].planes_row = i;
        }
    }
    return KVT_READY;
}

static int gpu_places(struct kvt_engine *e, struct session *s, struct family *f, uint32_t l) {
    int result = KVT_READY;
    for (struct group *g = f->groups; g != NULL && family_is_segment(e, f) && result >= 0;
         g = g->next) {
        uint64_t bytes = group_layer_bytes(e, f, g->block_count, l);
        bool fresh = g->gpu[l].extent == 0;
        int rc = fresh ? dev_alloc(e, s, bytes, &g->gpu[l]) : KVT_READY;
        if (rc != KVT_READY) {
            result = rc;
        } else if (fresh) {
            f->gpu_bytes += bytes;
        }
    }
    struct cache *c;
    for (uint32_t at = 0; result >= 0 && (c = family_cache(e, f, &at)) != NULL;) {
        if (c->planes == NULL || c->planes->place[l].extent != 0) {
            continue;
        }
        int rc = dev_alloc(e, s, planes_layer_bytes(c->planes, l), &c->planes->place[l]);
        if (rc != KVT_READY) {
            result = rc;
        } else {
            f->gpu_bytes += planes_layer_bytes(c->planes, l);
        }
    }
    return result;
}

static void gpu_places_free(struct kvt_engine *e, struct family *f, uint32_t l) {
    for (struct group *g = f->groups; g != NULL && g->gpu != NULL; g = g->next) {
        if (g->gpu[l].extent != 0) {
            uint64_t bytes = group_layer_bytes(e, f, g->block_count, l);
            dev_free(e, g->gpu[l], bytes);
            g->gpu[l] = (struct dev_place){0};
            f->gpu_bytes -= bytes;
        }
    }
    struct cache *c;
    for (uint32_t at = 0; (c = family_cache(e, f, &at)) != NULL;) {
        if (c->planes != NULL) {
            planes_layer_free(e, c->planes, l);
        }
    }
}

/* ---- the machine ---------------------------------------------------------------------------------------------- */

static void migration_flip(struct kvt_engine *e, struct session *s, struct migration *m) {
    struct family *f = m->family;
    KVT_ASSERT(f->resident[m->layer] == m->to_host);
    f->resident[m->layer] = !m->to_host;
    f->changed_ms = m->to_host ? e->now_ms : f->changed_ms;
    f->resident_count += m->to_host ? (uint32_t)-1 : 1u;
    if (m->to_host && !f->is_static) {
        gpu_places_free(e, f, m->layer);
    } else if (!m->to_host) {
        host_places_free(e, s, f, m->layer);
    }
}

static void moved_forget(struct family *f) {
    for (struct group *g = f->groups; g != NULL; g = g->next) {
        for (uint32_t i = 0; i < g->block_count; i++) {
            g->blocks[i].moved = false;
        }
    }
}

/* code: 0, or why it stays where it was. */
static void migration_end(struct kvt_engine *e, struct session *s, int code) {
    struct migration *m = &s->migration;
    bool flip = code == 0;
    if (flip && (m->family->resident[m->layer] == m->to_host)) {
        migration_flip(e, s, m);
    } else if (!flip && m->to_host) {
        host_places_free(e, s, m->family, m->layer);
        s->demote_failed = true;
    } else if (!flip && m->family->is_static) {
        s->promote_failed = code;
    } else if (!flip) {
        gpu_places_free(e, m->family, m->layer);
        m->family->demoted = false; /* stays where it is; not tried again at every step */
        m->family->changed_ms = e->now_ms;
    }
    moved_forget(m->family);
    s->give_backs_left = GIVE_BACKS_MAX; /* there are fewer layers each time: it ends */
    s->compact_failed = false;           /* there are more holes */
    s->compactions_left = e->extent_top;
    e->devices[s->device].changed_ms = e->now_ms;
    e->epoch++;
    *m = (struct migration){0};
    slots_shrink(e, s); /* the last streamed layer may have come back */
}

/* Submits the copies of what goes now. 0 or a count of operations; -KVT_ENOMEM. */
static int copies_submit(struct kvt_engine *e, struct session *s) {
    struct migration *m = &s->migration;
    struct copy_list list = {0};
    if (KVT_BROKEN(e->rules, KVT_BREAK_STATIC_RETURNS_EMPTY) && m->family->is_static &&
        !m->to_host) {
        return 0;
    }
    if (family_is_segment(e, m->family)) {
        segment_copies(e, m, &list);
    } else {
        dense_copies(e, m, &list);
    }
    int rc = list.no_memory ? -KVT_ENOMEM : list.count == 0 ? 0 : 1;
    if (rc == 1 && copy_op_emit(e, s, list.copy, list.count) != 0) {
        rc = -KVT_ENOMEM;
    }
    free(list.copy);
    return rc;
}

/* While a schedule is open: full blocks are never written, so they can go already. What fails here
 * is done later. */
static void early_progress(struct kvt_engine *e, struct session *s) {
    struct migration *m = &s->migration;
    const struct schedule *sc = &s->schedule;
    bool planes_move = sc->old_planes_row != NULL && sc->committed == 0;
    if (!m->early || m->early_submitted || sc->phase != PHASE_OPEN || planes_move) {
        return;
    }
    int rc = host_places(e, s, m->family, m->layer);
    if (rc == KVT_WAIT) {
        return;
    }
    m->early_submitted = true;
    if (rc != KVT_READY || copies_submit(e, s) < 0) {
        moved_forget(m->family);
    }
}

/* What a waiting STEP has gathered, and the prefetch, do not outlive a change of residency. */
void family_quiet(struct kvt_engine *e, struct session *s, const struct family *f) {
    struct cache *c;
    for (uint32_t at = 0; (c = family_cache(e, f, &at)) != NULL;) {
        settle_undo(e, c);
    }
    guess_discard(e, s, 0);
}

/* Gathers places, then submits the copies. */
void migrate_progress(struct kvt_engine *e, struct session *s) {
    struct migration *m = &s->migration;
    if (m->family == NULL || m->submitted) {
        return;
    }
    if (s->schedule.phase != PHASE_NONE) {
        early_progress(e, s);
        return;
    }
    if (m->early) {
        m->early = false;
        family_quiet(e, s, m->family);
    }
    if (s->ops.outstanding > 0) {
        return; /* a discarded prefetch may still read what will be freed */
    }
    if (m->compacts) {
        compact_progress(e, s);
        return;
    }
    memory_pass_begin(e, s);
    int rc =
        m->to_host ? host_places(e, s, m->family, m->layer) : gpu_places(e, s, m->family, m->layer);
    if (rc == KVT_WAIT) {
        return;
    }
    rc = rc == KVT_READY ? copies_submit(e, s) : rc;
    if (rc <= 0) {
        migration_end(e, s, rc);
        return;
    }
    m->submitted = true;
    if (KVT_BROKEN(e->rules, KVT_BREAK_FLIP_BEFORE_COPY)) {
        migration_flip(e, s, m);
    }
}

static void migrated(struct session *s, const struct family *f, uint64_t bytes,
                     const struct kvt_engine *e) {
    s->counters.migrated_bytes += bytes;
    uint32_t at = 0;
    struct cache *c = family_cache(e, f, &at);
    if (c != NULL) {
        c->counters.migrated_bytes += bytes;
    }
}

void migrate_completion(struct kvt_engine *e, struct session *s, struct op_record *r) {
    struct migration *m = &s->migration;
    bool done = r->status == KVT_DONE;
    KVT_ASSERT(s->ops.migrates > 0);
    s->ops.migrates--;
    if (m->family == NULL) {
        return;
    }
    if (m->compacts) {
        s->counters.compacted_bytes += done ? r->bytes : 0;
        compact_end(e, s, done);
    } else {
        migrated(s, m->family, done ? r->bytes : 0, e);
        if (m->submitted) {
            migration_end(e, s, done ? 0 : -KVT_EIO);
        } else if (!done) {
            moved_forget(m->family);
        }
    }
    if (done && m->family == NULL && others_gather(e, s)) {
        (void)compact_begin(e, s, NULL); /* what has left may have left holes, which help nobody */
    }
}

/* Another session waits for a layer, and this one's schedule is open: a beginning is made. */
void demote_early(struct kvt_engine *e, struct session *s, struct family *f) {
    if (s->migration.family != NULL || f->resident_count == 0 || s->schedule.phase != PHASE_OPEN) {
        return;
    }
    s->migration = (struct migration){
        .family = f, .layer = f->priority[f->resident_count - 1], .to_host = true, .early = true};
    migrate_progress(e, s);
}

/* Sends the family's least important resident layer to the host. The session has no open schedule.
 * KVT_WAIT: under way; KVT_READY: there is none. */
int demote_layer(struct kvt_engine *e, struct session *s, struct family *f) {
    KVT_ASSERT(s->schedule.phase == PHASE_NONE);
    if (s->migration.family != NULL) {
        return KVT_WAIT;
    }
    if (f->resident_count == 0) {
        return KVT_READY;
    }
    family_quiet(e, s, f);
    uint32_t last = KVT_BROKEN(e->rules, KVT_BREAK_RESIDENT_NOT_NESTED) ? 0 : f->resident_count - 1;
    s->migration = (struct migration){.family = f, .layer = f->priority[last], .to_host = true};
    migrate_progress(e, s);
    return KVT_WAIT;
}

/* Device memory that a layer of the family would take now. */
static uint64_t resident_bytes(const struct kvt_engine *e, const struct family *f, uint32_t l) {
    uint64_t bytes = 0;
    for (const struct group *g = f->groups; g != NULL && family_is_segment(e, f); g = g->next) {
        bytes += group_layer_bytes(e, f, g->block_count, l);
    }
    const struct cache *c;
    for (uint32_t at = 0; !family_is_segment(e, f) && (c = family_cache(e, f, &at)) != NULL;) {
        bytes += size_of(c->row_count, c->capacity, (uint64_t)f->bytes[l].k + f->bytes[l].v);
    }
    return bytes;
}

/* Whether a family that had to give way may have a layer back: nothing has left for a while, and
 * there is room for twice as much, so that the next step's growth does not send it away again. */
bool promote_is_due(const struct kvt_engine *e, const struct session *s, const struct family *f) {
    if (f->is_static ||
        f->resident_count >=
            resident_layers_most(f->mode, f->layer_count, f->resident_layers_max) ||
        e->now_ms - f->changed_ms < e->config.idle_after_ms) {
        return false;
    }
    return 2 * resident_bytes(e, f, f->priority[f->resident_count]) <= dev_available(e, s);
}

/* Brings the most important layer that is not resident back. KVT_READY: all are, or there is no
 * room. */
int promote_layer(struct kvt_engine *e, struct session *s, struct family *f) {
    KVT_ASSERT(s->schedule.phase == PHASE_NONE);
    if (s->migration.family != NULL) {
        return KVT_WAIT;
    }
    if (f->resident_count >=
        resident_layers_most(f->mode, f->layer_count, f->resident_layers_max)) {
        return KVT_READY;
    }
    if (!family_is_segment(e, f) && !f->is_static && planes_renew(e, f) != KVT_READY) {
        return KVT_READY;
    }
    guess_discard(e, s, 0);
    s->migration =
        (struct migration){.family = f, .layer = f->priority[f->resident_count], .to_host = false};
    migrate_progress(e, s);
    return s->migration.family != NULL || f->demoted ? KVT_WAIT : KVT_READY;
}

/* Layers of a static cache whose copies have gone to the host, and whose places on the device nobody has
 * touched: they are resident again at once. false: the memory was away. */
bool family_stays(struct kvt_engine *e, struct session *s, struct family *f) {
    KVT_ASSERT(f->is_static);
    KVT_ASSERT(s->migration.family == NULL);
    if (f->vacated) {
        return false;
    }
    uint32_t most = resident_layers_most(f->mode, f->layer_count, f->resident_layers_max);
    while (f->resident_count < most) {
        uint32_t l = f->priority[f->resident_count++];
        f->resident[l] = true;
        host_places_free(e, s, f, l);
    }
    f->demoted = false;
    return true;
}
