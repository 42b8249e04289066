/* What a request that gets no memory says: what it needs beyond what its worker keeps, which budget is
 * short, and who uses it. Made when the request was undone, so that what it had gathered itself counts
 * as need and not as use.
 *
 * The need is what suffices: places are taken in new extents, and moved planes have both places.
 */
#include "tiers/engine/state.h"

#include <string.h>

/* Extents that places would be packed into, one behind the other. */
struct pack {
    const struct kvt_engine_device *config;
    uint64_t used_bytes;
    uint64_t last_bytes;  /* of the last extent for several places */
    uint64_t left_bytes;  /* in it */
    uint64_t small_bytes; /* of the places in it, if each had an extent of its own */
};

static uint64_t add(uint64_t a, uint64_t b) {
    return a + b < KVT_BYTES_HUGE ? a + b : KVT_BYTES_HUGE;
}

static void pack_places(struct pack *p, uint64_t count, uint64_t bytes) {
    if (count == 0 || bytes == 0) {
        return;
    }
    bytes = round_up(bytes, KVT_ALIGN_BYTES);
    uint64_t small = round_up(bytes, p->config->granule_bytes);
    uint64_t extent = dev_extent_bytes(p->config, bytes);
    if (extent == small) {
        p->used_bytes = add(p->used_bytes, size_of(1, count, small));
        return;
    }
    uint64_t fit = p->left_bytes / bytes < count ? p->left_bytes / bytes : count;
    p->left_bytes -= fit * bytes;
    p->small_bytes = add(p->small_bytes, size_of(1, fit, small));
    count -= fit;
    if (count > 0) {
        uint64_t each = extent / bytes;
        uint64_t last = count % each == 0 ? each : count % each;
        p->used_bytes = add(p->used_bytes, size_of(1, (count + each - 1) / each, extent));
        p->last_bytes = extent;
        p->left_bytes = extent - last * bytes;
        p->small_bytes = last * small;
    }
}

/* Where the budget ends the last extent is as small as it can be. */
static uint64_t pack_bytes(const struct pack *p) {
    bool smaller = p->small_bytes > 0 && p->small_bytes < p->last_bytes;
    return smaller ? p->used_bytes - p->last_bytes + p->small_bytes : p->used_bytes;
}

struct need {
    struct pack device;
    uint64_t host_bytes;
};

static void need_groups(const struct kvt_engine *e, const struct family *f, uint64_t count,
                        uint32_t blocks, struct need *n) {
    for (uint32_t l = 0; l < f->layer_count && count > 0; l++) {
        uint64_t bytes = group_layer_bytes(e, f, blocks, l);
        if (!f->resident[l]) {
            n->host_bytes = add(n->host_bytes, size_of(1, count, round_up(bytes, KVT_ALIGN_BYTES)));
        } else if (family_is_segment(e, f)) {
            pack_places(&n->device, count, bytes);
        }
    }
}

static void need_slots(const struct kvt_engine *e, const struct session *s, const struct cache *c,
                       uint32_t capacity, struct need *n) {
    uint32_t count = slots_needed(e, c->family);
    uint64_t bytes = slot_bytes_needed(e, c, capacity);
    if (count > s->slot_count || bytes > s->slot_bytes) {
        count = count > s->slot_count ? count : s->slot_count;
        pack_places(&n->device, count, bytes > s->slot_bytes ? bytes : s->slot_bytes);
    }
}

/* All resident planes for rows of so many tokens: one extent, if that is to be had. */
static void need_planes(const struct cache *c, uint32_t capacity, struct need *n) {
    const struct family *f = c->family;
    uint64_t whole = 0;
    for (uint32_t l = 0; l < f->layer_count; l++) {
        uint64_t bytes = size_of(c->row_count, capacity, (uint64_t)f->bytes[l].k + f->bytes[l].v);
        whole =
            f->resident[l] ? add(whole, (bytes / KVT_ALIGN_BYTES + 1) * KVT_ALIGN_BYTES) : whole;
    }
    if (whole > 0) {
        n->device.used_bytes =
            add(n->device.used_bytes, round_up(whole, n->device.config->granule_bytes));
    }
}

static void need_create(const struct kvt_engine *e, const struct session *s, const struct cache *c,
                        struct need *n) {
    const struct family *f = c->family;
    if (mode_is_offloaded(f->mode)) {
        need_slots(e, s, c, c->capacity != 0 ? c->capacity : e->config.block_tokens, n);
    }
    if (f->is_static) {
        if (s->worker_kind == KVT_WORKER_DENSE) {
            need_planes(c, c->capacity, n);
        }
        uint64_t blocks = spare_blocks(e, c);
        need_groups(e, f, blocks / KVT_GROUP_BLOCKS_MAX, KVT_GROUP_BLOCKS_MAX, n);
        need_groups(e, f, 1, (uint32_t)(blocks % KVT_GROUP_BLOCKS_MAX), n);
    }
}

/* Blocks of the rows of a step, in the groups that they would be taken in. */
static void need_rows(const struct kvt_engine *e, const struct cache *c,
                      const struct kvt_request *r, struct need *n) {
    uint64_t groups[KVT_GROUP_BLOCKS_MAX + 1] = {0};
    uint32_t count = r->count == 0 ? c->row_count : r->count;
    for (uint32_t i = 0; i < count && !c->family->is_static; i++) {
        const struct row *row = &c->rows[r->count == 0 ? i : r->rows[i]];
        uint64_t tokens = row->length + (uint64_t)(r->count == 0 ? r->tokens : r->values[i]);
        uint64_t wanted = (tokens + e->config.block_tokens - 1) / e->config.block_tokens;
        uint32_t tail = row->length % e->config.block_tokens;
        if (tail != 0 && tokens > row->length) { /* a tail that others share is copied */
            const struct block *b = row->blocks[row->length / e->config.block_tokens];
            wanted += b->refs > 1 || b->full;
        }
        uint64_t own = row->own;
        uint64_t more = wanted > row->count ? wanted - row->count : 0;
        uint64_t room = row->open != NULL ? row->open->block_count - row->open->taken : 0;
        more -= more < room ? more : room;
        while (more > 0) {
            uint32_t blocks = group_blocks((uint32_t)own, (uint32_t)more);
            groups[blocks]++;
            own += blocks;
            more -= more < blocks ? more : blocks;
        }
    }
    for (uint32_t blocks = 1; blocks <= KVT_GROUP_BLOCKS_MAX; blocks++) {
        need_groups(e, c->family, groups[blocks], blocks, n);
    }
}

static void need_step(const struct kvt_engine *e, const struct session *s, struct cache *c,
                      const struct kvt_request *r, struct need *n) {
    const struct family *f = c->family;
    uint32_t capacity = 0;
    if (!family_is_segment(e, f)) {
        uint64_t longest = 1;
        for (uint32_t i = 0; i < c->row_count; i++) { /* a dense step names all rows in order */
            uint64_t more = r->count == 0 ? r->tokens : r->values[i];
            longest = c->rows[i].length + more > longest ? c->rows[i].length + more : longest;
        }
        uint32_t least = (uint32_t)round_up(longest, e->config.block_tokens);
        capacity = least > c->capacity ? least : c->capacity;
        if (f->resident_count > 0 && !planes_exact(c, capacity)) {
            need_planes(c, capacity, n);
        }
    }
    if (f->resident_count < f->layer_count) {
        need_slots(e, s, c, capacity, n);
    }
    need_rows(e, c, r, n);
}

/* What the worker keeps: extents that nothing lives in any more go back. */
static uint64_t kept_bytes(const struct kvt_engine *e, const struct session *s) {
    uint64_t bytes = 0;
    for (uint32_t i = 1; i < e->extent_top; i++) {
        const struct extent *x = &e->extents[i];
        bool counts = extent_is_charged(x) && x->live_bytes > 0;
        bytes += counts && &e->sessions[x->session] == s ? x->bytes : 0;
    }
    return bytes;
}

static bool need_of(struct kvt_engine *e, struct session *s, const struct pending *p,
                    struct need *n, bool *is_static) {
    const struct kvt_request *r = &p->request;
    struct cache *c = cache_find(e, r->session, r->cache);
    const struct family *of = r->kind != KVT_REQUEST_CREATE && c != NULL ? c->family : NULL;
    n->device.used_bytes = session_vacant_bytes(e, s, of);
    if (r->kind == KVT_REQUEST_CREATE) {
        int rc = cache_make(e, s, r, &c);
        if (rc == 0) {
            need_create(e, s, c, n);
            *is_static = c->family->mode == KVT_MODE_STATIC;
            cache_unmake(e, c);
        }
        return rc == 0;
    }
    if (c != NULL) {
        if (!c->family->is_static || n->device.used_bytes == 0) {
            need_step(e, s, c, r, n);
        }
        *is_static = c->family->mode == KVT_MODE_STATIC;
    }
    return c != NULL;
}

void refuse_text(struct kvt_engine *e, struct session *s, const struct pending *p, char *text) {
    bool host = e->short_tier == KVT_TIER_HOST;
    bool create = p->request.kind == KVT_REQUEST_CREATE;
    const struct device *d = &e->devices[s->device];
    const struct kvt_engine_config *config = &e->config;
    bool is_static = false;
    struct need n = {.device = {.config = &d->config}};
    uint64_t need = e->short_bytes;
    if (need_of(e, s, p, &n, &is_static)) {
        uint64_t all = host ? n.host_bytes : pack_bytes(&n.device);
        need = all > need ? all : need;
    }
    uint64_t own = host ? s->host_bytes : kept_bytes(e, s);
    uint64_t others = host ? e->host.live_bytes - own : d->used_bytes - s->device_bytes;
    uint64_t budget = host ? config->host_budget_bytes : d->config.budget_bytes;
    uint64_t own_max = host ? config->host_worker_max_bytes : d->config.worker_max_bytes;
    uint64_t least = add(own + others, need);
    char use[160];
    char help[96];
    const char *why = "";
    if (e->short_own) {
        kvt_text_format(use, sizeof(use),
                        "and this worker holds %llu of the %llu that one worker may",
                        (unsigned long long)own, (unsigned long long)own_max);
        kvt_text_format(help, sizeof(help), "raise [%s] worker_max to %llu",
                        host ? "host" : "device NAME", (unsigned long long)add(own, need));
    } else {
        kvt_text_format(use, sizeof(use),
                        "%llu of the budget of %llu are in use (%llu by this worker)",
                        (unsigned long long)(own + others), (unsigned long long)budget,
                        (unsigned long long)own);
        kvt_text_format(help, sizeof(help), "raise %s budget to %llu",
                        host ? "[host]" : "the device's", (unsigned long long)least);
        why = host || own + others == 0 ? "" : " and none can be moved to the host";
    }
    if (!e->short_own && least <= budget) {
        bool full = host ? e->host.full : d->full;
        why = full ? ", and there is less memory than the budget says"
                   : ", and what is free lies in pieces that are too small";
        kvt_text_format(help, sizeof(help), full ? "lower the budget" : "try again");
    }
    kvt_text_format(text, KVT_TEXT_BYTES, "%s: %s memory: %llu bytes more are needed, %s%s; %s%s%s",
                    create ? "create" : "step", host ? "host" : "device", (unsigned long long)need,
                    use, why, help, s->cache_count > (create ? 0u : 1u) ? ", close a cache" : "",
                    host        ? " or shorten the context"
                    : is_static ? " or use an offloaded mode"
                                : " or take fewer rows or tokens");
}
