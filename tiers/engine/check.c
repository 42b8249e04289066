/* Walks every structure of the engine and compares what it finds with what is written down. For
 * tests: it costs time in proportion to what exists.
 */
#include "tiers/engine/state.h"

#include <stdlib.h>

struct check {
    const struct kvt_engine *e;
    char *text;
    uint32_t size;
    bool failed;
};

#define EXPECT(c, condition, ...)                               \
    do {                                                        \
        if (!(c)->failed && !(condition)) {                     \
            (c)->failed = true;                                 \
            kvt_text_format((c)->text, (c)->size, __VA_ARGS__); \
        }                                                       \
    } while (0)

#define ULL(x) ((unsigned long long)(x))

static void check_extents(struct check *c) {
    const struct kvt_engine *e = c->e;
    for (uint32_t d = 0; d < e->config.device_count; d++) {
        uint64_t used = 0;
        for (uint32_t i = 1; i < e->extent_top; i++) {
            const struct extent *x = &e->extents[i];
            if (!extent_is_charged(x) || x->device != d) {
                continue;
            }
            used += x->bytes;
            EXPECT(c, x->state == EXTENT_LIVE || x->vacates || x->live_bytes == 0,
                   "extent %u: state %u with %llu live bytes", x->id, x->state, ULL(x->live_bytes));
            EXPECT(c, x->state != EXTENT_LIVE || x->space.free_bytes + x->live_bytes == x->bytes,
                   "extent %u: %llu free and %llu live of %llu", x->id, ULL(x->space.free_bytes),
                   ULL(x->live_bytes), ULL(x->bytes));
            EXPECT(c, e->sessions[x->session].in_use, "extent %u: its session is free", x->id);
        }
        const struct device *device = &e->devices[d];
        EXPECT(c, used == device->used_bytes, "device %u: extents hold %llu, charged %llu", d,
               ULL(used), ULL(device->used_bytes));
        EXPECT(c, used <= device->config.budget_bytes, "device %u: %llu used of a budget of %llu",
               d, ULL(used), ULL(device->config.budget_bytes));
    }
}

static void check_sessions(struct check *c) {
    const struct kvt_engine *e = c->e;
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        const struct session *s = &e->sessions[i];
        if (!s->in_use) {
            continue;
        }
        uint64_t most = e->devices[s->device].config.worker_max_bytes;
        EXPECT(c, s->device_bytes <= most, "session %u: %llu device bytes of the %llu it may hold",
               i, ULL(s->device_bytes), ULL(most));
        EXPECT(c, s->host_bytes <= e->config.host_worker_max_bytes,
               "session %u: %llu host bytes of the %llu it may hold", i, ULL(s->host_bytes),
               ULL(e->config.host_worker_max_bytes));
    }
}

static void check_host(struct check *c) {
    const struct host *h = &c->e->host;
    uint64_t ready = 0;
    uint64_t used = 0;
    uint64_t growing = 0;
    uint64_t kept = 0;
    for (uint32_t i = 0; i < h->chunk_count; i++) {
        growing += h->chunks[i] == CHUNK_GROWING ? h->chunk_bytes : 0;
        kept += i < h->keep_chunks && h->chunks[i] != CHUNK_ABSENT ? h->chunk_bytes : 0;
        used += h->chunks[i] != CHUNK_ABSENT ? h->chunk_bytes : 0;
        ready += h->chunks[i] == CHUNK_READY ? h->chunk_bytes : 0;
    }
    EXPECT(c, used == h->used_bytes, "host: chunks hold %llu, charged %llu", ULL(used),
           ULL(h->used_bytes));
    EXPECT(c, growing == h->growing_bytes, "host: %llu are growing, written down are %llu",
           ULL(growing), ULL(h->growing_bytes));
    EXPECT(c, kept == h->kept_bytes, "host: %llu are kept, written down are %llu", ULL(kept),
           ULL(h->kept_bytes));
    EXPECT(c, h->claimed_bytes <= h->growing_bytes, "host: %llu claimed of %llu",
           ULL(h->claimed_bytes), ULL(h->growing_bytes));
    EXPECT(c, used <= c->e->config.host_budget_bytes, "host: %llu used of a budget of %llu",
           ULL(used), ULL(c->e->config.host_budget_bytes));
    EXPECT(c, h->space.free_bytes + h->live_bytes == ready,
           "host: %llu free and %llu live of %llu ready", ULL(h->space.free_bytes),
           ULL(h->live_bytes), ULL(ready));
}

/* ---- blocks ------------------------------------------------------------------------------------------ */

/* References to a block, by the tables and lists that hold them. */
static uint32_t row_refs(const struct row *r, const struct block *b) {
    uint32_t refs = r->cow == b;
    for (uint32_t i = 0; i < r->count; i++) {
        refs += r->blocks[i] == b;
    }
    return refs;
}

static uint32_t block_refs(const struct kvt_engine *e, const struct family *f,
                           const struct block *b) {
    uint32_t refs = 0;
    for (uint32_t i = 0; i < e->config.caches_max; i++) {
        const struct cache *cache = e->caches[i];
        for (uint32_t r = 0; cache != NULL && cache->family == f && r < cache->row_count; r++) {
            refs += row_refs(&cache->rows[r], b);
        }
    }
    const struct schedule *sc = &e->sessions[f->session].schedule;
    for (uint32_t i = 0; i < sc->cow_count; i++) {
        refs += sc->cows[i].old == b;
    }
    return refs;
}

static bool block_is_spare(const struct family *f, const struct block *b) {
    for (uint32_t i = 0; i < f->spare_count; i++) {
        if (f->spare[i] == b) {
            return true;
        }
    }
    return false;
}

static void check_group(struct check *c, const struct family *f, const struct group *g) {
    const struct kvt_engine *e = c->e;
    const struct migration *m = &e->sessions[f->session].migration;
    uint32_t live = 0;
    for (uint32_t i = 0; i < g->block_count; i++) {
        const struct block *b = &g->blocks[i];
        uint32_t refs = block_refs(e, f, b);
        EXPECT(c, refs == b->refs, "a block has %u references and counts %u", refs, b->refs);
        EXPECT(c, i < g->taken || refs == 0, "a block that was not taken has %u references", refs);
        live += refs > 0 || block_is_spare(f, b);
    }
    EXPECT(c, live == g->live, "a group has %u live blocks and counts %u", live, g->live);
    EXPECT(c, live > 0 || g->open, "an empty group was not freed");
    for (uint32_t l = 0; l < f->layer_count; l++) {
        bool moves = m->family == f && m->layer == l;
        bool on_gpu = g->gpu != NULL && g->gpu[l].extent != 0;
        bool on_host = g->host[l] != KVT_NOWHERE;
        EXPECT(c, moves || on_host == !f->resident[l], "layer %u: resident %d, on the host %d", l,
               f->resident[l], on_host);
        bool keeps = f->is_static && f->demoted && on_gpu;
        EXPECT(c, moves || keeps || g->gpu == NULL || on_gpu == f->resident[l],
               "layer %u: resident %d, on the device %d", l, f->resident[l], on_gpu);
        EXPECT(c, !on_gpu || extent_find(e, g->gpu[l].extent) != NULL,
               "layer %u: its extent does not exist", l);
    }
}

static void check_family(struct check *c, const struct family *f) {
    const struct kvt_engine *e = c->e;
    uint32_t refs = 0;
    for (uint32_t i = 0; i < e->config.caches_max; i++) {
        refs += e->caches[i] != NULL && e->caches[i]->family == f;
    }
    EXPECT(c, refs == f->refs, "a family has %u caches and counts %u", refs, f->refs);
    uint32_t resident = 0;
    for (uint32_t l = 0; l < f->layer_count; l++) {
        resident += f->resident[l];
    }
    EXPECT(c, resident == f->resident_count, "a family has %u resident layers and counts %u",
           resident, f->resident_count);
    for (const struct group *g = f->groups; g != NULL; g = g->next) {
        check_group(c, f, g);
    }
}

static void check_cache(struct check *c, const struct cache *cache) {
    const struct kvt_engine *e = c->e;
    for (uint32_t i = 0; i < cache->row_count; i++) {
        const struct row *r = &cache->rows[i];
        uint64_t room = (uint64_t)r->count * e->config.block_tokens;
        EXPECT(c, r->length <= room, "cache %u row %u: %u tokens in %u blocks", cache->id, i,
               r->length, r->count);
        for (uint32_t b = 0; b < r->length / e->config.block_tokens; b++) {
            EXPECT(c, r->blocks[b]->full, "cache %u row %u: block %u is not marked full", cache->id,
                   i, b);
        }
        EXPECT(c, cache->planes == NULL || r->planes_row < cache->planes->rows,
               "cache %u row %u: planes row %u", cache->id, i, r->planes_row);
    }
    uint32_t planes_refs =
        cache->planes != NULL && e->sessions[cache->session].schedule.old_planes == cache->planes;
    for (uint32_t i = 0; i < e->config.caches_max && cache->planes != NULL; i++) {
        planes_refs += e->caches[i] != NULL && e->caches[i]->planes == cache->planes;
    }
    EXPECT(c, cache->planes == NULL || planes_refs == cache->planes->refs,
           "cache %u: its planes have %u references and count %u", cache->id, planes_refs,
           cache->planes != NULL ? cache->planes->refs : 0);
}

/* ---- sessions ------------------------------------------------------------------------------------------ */

static void check_session(struct check *c, const struct session *s) {
    const struct kvt_engine *e = c->e;
    uint32_t index = session_index(e, s);
    uint64_t device_bytes = 0;
    for (uint32_t i = 1; i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        device_bytes += extent_is_charged(x) && x->session == index ? x->bytes : 0;
    }
    EXPECT(c, device_bytes == s->device_bytes, "session %u: extents hold %llu, charged %llu", index,
           ULL(device_bytes), ULL(s->device_bytes));
    uint64_t outstanding = 0;
    uint64_t guesses = 0;
    for (uint64_t id = s->ops.base; id < s->ops.next; id++) {
        const struct op_record *r = ops_find(&s->ops, id);
        outstanding += !r->complete;
        guesses += !r->complete && r->role == ROLE_GUESS;
    }
    EXPECT(c, outstanding == s->ops.outstanding,
           "session %u: %llu operations outstanding, counts %llu", index, ULL(outstanding),
           ULL(s->ops.outstanding));
    EXPECT(c, guesses == s->ops.guesses, "session %u: %llu guesses outstanding, counts %llu", index,
           ULL(guesses), ULL(s->ops.guesses));
    for (uint32_t i = 0; i < s->slot_count; i++) {
        const struct slot *slot = &s->slots[i];
        EXPECT(c, slot->named <= slot->generation, "session %u slot %u: named %llu above %llu",
               index, i, ULL(slot->named), ULL(slot->generation));
        EXPECT(c, slot->place.extent == 0 || extent_find(e, slot->place.extent) != NULL,
               "session %u slot %u: its extent does not exist", index, i);
    }
    uint32_t at = 0;
    const struct family *f;
    while ((f = session_family(e, s, &at)) != NULL) {
        check_family(c, f);
    }
}

int kvt_engine_check(const struct kvt_engine *e, char *text, uint32_t size) {
    struct check c = {.e = e, .text = text, .size = size};
    check_extents(&c);
    check_sessions(&c);
    check_host(&c);
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        if (e->sessions[i].in_use) {
            check_session(&c, &e->sessions[i]);
        }
    }
    for (uint32_t i = 0; i < e->config.caches_max; i++) {
        if (e->caches[i] != NULL) {
            check_cache(&c, e->caches[i]);
        }
    }
    return c.failed ? -KVT_ESTATE : 0;
}
