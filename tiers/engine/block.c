/* Families, groups and blocks: where tokens live, as tables.
 *
 * A block is block_tokens tokens of one row in all layers. Blocks are allocated in groups, whose
 * places hold, for each layer, K of all its blocks and behind it V of all its blocks: neighbouring
 * blocks of one row lie next to each other and move in one copy.
 *
 * A row's table names its blocks in order. Rows share blocks by reference. A block that is shared,
 * or that was ever full, is never written: who would write gets a copy (settle.c).
 */
#include "tiers/engine/state.h"

#include <stdlib.h>
#include <string.h>

#define ENTRIES_PER_BLOCK   8u         /* of row tables, in the daemon */
#define SESSION_ENTRIES_MAX (2u << 20) /* 512 Mi tokens of rows, with blocks of 256 */

/* ---- families ------------------------------------------------------------------------------------ */

struct family *family_create(const struct kvt_layout *layout, const struct kvt_cache_options *o,
                             uint32_t session, bool dense) {
    struct family *f = calloc(1, sizeof(*f));
    if (f == NULL) {
        return NULL;
    }
    uint32_t n = layout->layer_count;
    f->layers = calloc(n, sizeof(*f->layers));
    f->bytes = calloc(n, sizeof(*f->bytes));
    f->resident = calloc(n, sizeof(*f->resident));
    f->priority = calloc(n, sizeof(*f->priority));
    if (f->layers == NULL || f->bytes == NULL || f->resident == NULL || f->priority == NULL) {
        free(f->layers);
        free(f->bytes);
        free(f->resident);
        free(f->priority);
        free(f);
        return NULL;
    }
    for (uint32_t l = 0; l < n; l++) {
        f->layers[l] = layout->layers[l];
        f->bytes[l] = (struct layer_bytes){.k = kvt_layer_k_token_bytes(&layout->layers[l]),
                                           .v = kvt_layer_v_token_bytes(&layout->layers[l])};
        f->listings += dense ? 1 : layout->layers[l].last_reader - l + 1;
    }
    f->layer_count = n;
    f->session = session;
    f->mode = o->mode;
    f->is_static = mode_is_static(o->mode);
    f->resident_layers_max = o->resident_layers_max;
    plan_priority(n, f->layers, f->priority);
    return f;
}

/* ---- groups --------------------------------------------------------------------------------------- */

uint64_t group_layer_bytes(const struct kvt_engine *e, const struct family *f, uint32_t blocks,
                           uint32_t layer) {
    return (uint64_t)blocks * e->config.block_tokens *
           ((uint64_t)f->bytes[layer].k + f->bytes[layer].v);
}

/* Gives the group's memory back and forgets the group. */
static void group_free(struct kvt_engine *e, struct group *g) {
    struct family *f = g->family;
    struct session *s = &e->sessions[f->session];
    for (uint32_t l = 0; l < f->layer_count; l++) {
        uint64_t bytes = group_layer_bytes(e, f, g->block_count, l);
        if (g->host[l] != KVT_NOWHERE) {
            host_free(e, s, g->host[l], bytes);
            f->host_bytes -= bytes;
        }
        if (g->gpu != NULL && g->gpu[l].extent != 0) {
            dev_free(e, g->gpu[l], bytes);
            f->gpu_bytes -= bytes;
        }
    }
    if (g->previous != NULL) {
        g->previous->next = g->next;
    } else if (f->groups == g) {
        f->groups = g->next;
    }
    if (g->next != NULL) {
        g->next->previous = g->previous;
    }
    e->block_count -= g->block_count;
    f->block_count -= g->block_count;
    free(g->host);
    free(g->gpu);
    free(g->blocks);
    free(g);
}

static struct group *group_blank(const struct kvt_engine *e, struct family *f, uint32_t blocks) {
    struct group *g = calloc(1, sizeof(*g));
    if (g == NULL) {
        return NULL;
    }
    g->family = f;
    g->block_count = (uint16_t)blocks;
    g->host = calloc(f->layer_count, sizeof(*g->host));
    g->gpu = family_is_segment(e, f) ? calloc(f->layer_count, sizeof(*g->gpu)) : NULL;
    g->blocks = calloc(blocks, sizeof(*g->blocks));
    if (g->host == NULL || g->blocks == NULL || (family_is_segment(e, f) && g->gpu == NULL)) {
        free(g->host);
        free(g->gpu);
        free(g->blocks);
        free(g);
        return NULL;
    }
    for (uint32_t l = 0; l < f->layer_count; l++) {
        g->host[l] = KVT_NOWHERE;
    }
    for (uint32_t i = 0; i < blocks; i++) {
        g->blocks[i] = (struct block){.group = g, .index = (uint16_t)i};
    }
    return g;
}

/* Places for every layer, or none at all. Goes on after KVT_WAIT, so that all that is missing is
 * asked for at once. */
static int group_create(struct kvt_engine *e, struct family *f, uint32_t blocks,
                        struct group **out) {
    struct session *s = &e->sessions[f->session];
    if (e->block_count + blocks > e->block_limit) {
        return -KVT_EBUSY;
    }
    struct group *g = group_blank(e, f, blocks);
    if (g == NULL) {
        return -KVT_ENOMEM;
    }
    e->block_count += blocks;
    f->block_count += blocks;
    int result = KVT_READY;
    for (uint32_t l = 0; l < f->layer_count && result >= 0; l++) {
        uint64_t bytes = group_layer_bytes(e, f, blocks, l);
        int rc = KVT_READY;
        if (!f->resident[l]) {
            rc = host_alloc(e, s, bytes, &g->host[l]);
            if (rc == KVT_READY) {
                f->host_bytes += bytes;
            }
        } else if (g->gpu != NULL) {
            rc = dev_alloc(e, s, bytes, &g->gpu[l]);
            if (rc == KVT_READY) {
                f->gpu_bytes += bytes;
            }
        }
        if (rc != KVT_READY) {
            result = rc;
        }
    }
    if (result != KVT_READY) {
        group_free(e, g);
        return result;
    }
    g->next = f->groups;
    if (f->groups != NULL) {
        f->groups->previous = g;
    }
    f->groups = g;
    *out = g;
    return KVT_READY;
}

/* One without memory. */
void family_free(struct family *f) {
    free(f->spare);
    free(f->layers);
    free(f->bytes);
    free(f->resident);
    free(f->priority);
    free(f);
}

void family_unref(struct kvt_engine *e, struct family *f) {
    KVT_ASSERT(f->refs > 0);
    if (--f->refs > 0) {
        return;
    }
    e->wanted_count -= f->demote_wanted;
    while (f->groups != NULL) {
        group_free(e, f->groups);
    }
    KVT_ASSERT(f->host_bytes == 0);
    KVT_ASSERT(f->gpu_bytes == 0);
    family_free(f);
}

/* ---- blocks ---------------------------------------------------------------------------------------- */

void block_ref(struct block *b) {
    b->refs++;
}

static void group_settle(struct kvt_engine *e, struct group *g) {
    if (g->live == 0 && !g->open) {
        group_free(e, g);
    }
}

void block_unref(struct kvt_engine *e, struct block *b) {
    KVT_ASSERT(b->refs > 0);
    if (--b->refs > 0) {
        return;
    }
    struct family *f = b->group->family;
    b->full = false;
    if (f->is_static && f->spare_count < f->spare_max) {
        f->spare[f->spare_count++] = b;
        return;
    }
    KVT_ASSERT(b->group->live > 0);
    b->group->live--;
    group_settle(e, b->group);
}

static struct block *group_take(struct group *g) {
    struct block *b = &g->blocks[g->taken++];
    g->live++;
    KVT_ASSERT(b->refs == 0);
    KVT_ASSERT(!b->full);
    return b;
}

/* The row takes no more blocks from its group. */
static void row_close_group(struct kvt_engine *e, struct row *r) {
    struct group *g = r->open;
    r->open = NULL;
    g->open = false;
    group_settle(e, g);
}

/* How many blocks a row gets at once: what it needs now, and otherwise a quarter of what it took for
 * itself before. They lie next to each other, so that a prompt's blocks cross the link in long copies. */
uint32_t group_blocks(uint32_t taken, uint32_t needed) {
    uint32_t n = taken / 4 > needed ? taken / 4 : needed;
    return n < 1 ? 1 : n < KVT_GROUP_BLOCKS_MAX ? n : KVT_GROUP_BLOCKS_MAX;
}

/* `needed`: blocks that the row needs now, this one included. */
int block_alloc(struct kvt_engine *e, struct cache *c, struct row *r, uint32_t needed,
                struct block **out) {
    struct family *f = c->family;
    if (f->is_static && f->spare_count > 0) {
        *out = f->spare[--f->spare_count];
        block_ref(*out);
        return KVT_READY;
    }
    if (r->open != NULL && r->open->taken == r->open->block_count) {
        row_close_group(e, r);
    }
    if (r->open == NULL) {
        uint32_t blocks = group_blocks(r->own, needed);
        int rc = group_create(e, f, blocks, &r->open);
        if (rc == -KVT_EQUOTA && blocks > 1) {
            rc = group_create(e, f, 1, &r->open);
        }
        if (rc != KVT_READY) {
            r->open = NULL;
            return rc;
        }
        r->open->open = true;
    }
    *out = group_take(r->open);
    block_ref(*out);
    return KVT_READY;
}

void blocks_full_text(const struct kvt_engine *e, const struct session *s, const char *what,
                      char *text) {
    kvt_text_format(
        text, KVT_TEXT_BYTES,
        "%s: the tables are full: %llu blocks of %u tokens of %llu, %llu row entries of "
        "%llu, %llu of them this worker's (at most %llu); close caches, take fewer rows "
        "or raise the budgets",
        what, (unsigned long long)e->block_count, e->config.block_tokens,
        (unsigned long long)e->block_limit, (unsigned long long)e->entry_count,
        (unsigned long long)(e->block_limit * ENTRIES_PER_BLOCK),
        (unsigned long long)s->entry_count, (unsigned long long)SESSION_ENTRIES_MAX);
}

/* Static caches: allocates `blocks` more blocks into the spare list. */
int spare_fill(struct kvt_engine *e, struct cache *c, uint64_t blocks) {
    struct family *f = c->family;
    if (e->block_count + blocks > e->block_limit) {
        return -KVT_EBUSY;
    }
    struct block **grown = realloc(f->spare, ((size_t)f->spare_max + blocks) * sizeof(*grown));
    if (grown == NULL) {
        return -KVT_ENOMEM;
    }
    f->spare = grown;
    while (blocks > 0) {
        uint32_t n = blocks < KVT_GROUP_BLOCKS_MAX ? (uint32_t)blocks : KVT_GROUP_BLOCKS_MAX;
        struct group *g;
        int rc = group_create(e, f, n, &g);
        if (rc == -KVT_EQUOTA && n > 1) {
            n = 1;
            rc = group_create(e, f, n, &g);
        }
        if (rc != KVT_READY) {
            return rc;
        }
        for (uint32_t i = 0; i < n; i++) {
            f->spare[f->spare_count++] = group_take(g);
        }
        f->spare_max += n;
        blocks -= n;
    }
    return KVT_READY;
}

/* ---- rows -------------------------------------------------------------------------------------------- */

static uint32_t blocks_for(const struct kvt_engine *e, uint32_t tokens) {
    return (uint32_t)(((uint64_t)tokens + e->config.block_tokens - 1) / e->config.block_tokens);
}

/* Room for `count` entries in the row's table. Tables are memory that no budget counts, so that there
 * is a limit of their own: of the daemon, and of a session, which also bounds what one STEP walks. */
static int row_room(struct kvt_engine *e, struct cache *c, struct row *r, uint32_t count,
                    uint32_t slack) {
    if (count <= r->room) {
        return 0;
    }
    struct session *s = &e->sessions[c->session];
    uint32_t room = count + slack + 4;
    uint64_t more = room - r->room;
    if (e->entry_count + more > e->block_limit * ENTRIES_PER_BLOCK ||
        s->entry_count + more > SESSION_ENTRIES_MAX) {
        return -KVT_EBUSY;
    }
    struct block **grown = realloc(r->blocks, room * sizeof(struct block *));
    if (grown == NULL) {
        return -KVT_ENOMEM;
    }
    e->entry_count += more;
    s->entry_count += more;
    r->blocks = grown;
    r->room = room;
    return 0;
}

/* Blocks for the row's first `tokens` tokens. What was got stays in the table on KVT_WAIT. */
int row_reserve(struct kvt_engine *e, struct cache *c, struct row *r, uint32_t tokens) {
    uint32_t count = blocks_for(e, tokens);
    int rc = row_room(e, c, r, count, count / 2);
    while (rc == 0 && r->count < count) {
        rc = block_alloc(e, c, r, count - r->count, &r->blocks[r->count]);
        if (rc == KVT_READY) {
            r->count++;
            r->own++;
        }
    }
    return rc;
}

/* The row's last block goes back to the group that it was just taken from, if it can. */
static void row_pop(struct kvt_engine *e, struct row *r) {
    struct block *b = r->blocks[--r->count];
    r->own -= r->own > 0;
    struct group *g = b->group;
    bool give_back = g == r->open && b->index + 1 == g->taken && b->refs == 1;
    block_unref(e, b);
    if (give_back && !g->family->is_static) {
        g->taken--;
    }
}

/* Drops blocks behind the committed tokens, and a group of which none is left. */
void row_trim(struct kvt_engine *e, struct row *r) {
    uint32_t keep = blocks_for(e, r->length);
    while (r->count > keep) {
        row_pop(e, r);
    }
    if (r->open != NULL && r->open->taken == 0) {
        row_close_group(e, r);
    }
}

void row_clear(struct kvt_engine *e, struct cache *c, struct row *r) {
    r->length = 0;
    row_trim(e, r);
    if (r->open != NULL) {
        row_close_group(e, r);
    }
    e->entry_count -= r->room;
    e->sessions[c->session].entry_count -= r->room;
    free(r->blocks);
    *r = (struct row){0};
}

/* `to` is empty and becomes a copy of `from`'s committed tokens. */
int row_copy(struct kvt_engine *e, struct cache *c, const struct row *from, struct row *to) {
    uint32_t count = blocks_for(e, from->length);
    KVT_ASSERT(from->count >= count);
    int rc = row_room(e, c, to, count, 0);
    if (rc != 0) {
        return rc;
    }
    for (uint32_t i = 0; i < count; i++) {
        to->blocks[i] = from->blocks[i];
        block_ref(to->blocks[i]);
    }
    to->count = count;
    to->length = from->length;
    to->planes_row = from->planes_row;
    return 0;
}

/* ---- places ------------------------------------------------------------------------------------------ */

struct group_part group_part(const struct kvt_engine *e, const struct group *g, uint32_t layer,
                             uint32_t first, uint32_t count) {
    uint64_t k = (uint64_t)e->config.block_tokens * g->family->bytes[layer].k;
    uint64_t v = (uint64_t)e->config.block_tokens * g->family->bytes[layer].v;
    return (struct group_part){.k_offset = first * k,
                               .k_bytes = count * k,
                               .v_offset = g->block_count * k + first * v,
                               .v_bytes = count * v};
}

uint64_t block_host_k(const struct kvt_engine *e, const struct block *b, uint32_t layer) {
    KVT_ASSERT(b->group->host[layer] != KVT_NOWHERE);
    return b->group->host[layer] + group_part(e, b->group, layer, b->index, 1).k_offset;
}

uint64_t block_host_v(const struct kvt_engine *e, const struct block *b, uint32_t layer) {
    KVT_ASSERT(b->group->host[layer] != KVT_NOWHERE);
    return b->group->host[layer] + group_part(e, b->group, layer, b->index, 1).v_offset;
}

struct dev_place block_gpu_k(const struct kvt_engine *e, const struct block *b, uint32_t layer) {
    struct dev_place p = b->group->gpu[layer];
    KVT_ASSERT(p.extent != 0);
    p.offset += group_part(e, b->group, layer, b->index, 1).k_offset;
    return p;
}

struct dev_place block_gpu_v(const struct kvt_engine *e, const struct block *b, uint32_t layer) {
    struct dev_place p = b->group->gpu[layer];
    KVT_ASSERT(p.extent != 0);
    p.offset += group_part(e, b->group, layer, b->index, 1).v_offset;
    return p;
}
