/* Compaction: a session's device memory has room, but in holes, as when layers have left it that were
 * stored between others. An extent's places move into holes of the session's other extents; then it is
 * empty, for something large or for another worker.
 *
 * Between schedules, as a migration (migrate.c), and in its place: places first, then the copies, and
 * only when these are complete the places change. Of segment workers' blocks only: they get addresses
 * with each schedule. Dense planes are large, and static caches stay where they are.
 *
 * It ends: each time there is one extent less with anything in it, since nothing moves into an empty one;
 * and should a waiting step fill that one again each time it tries, there are only so many for a request.
 */
#include "tiers/engine/state.h"

#include <stdlib.h>

struct walk {
    uint32_t cache; /* of session_family */
    struct family *family;
    struct group *group;
    uint32_t layer;
};

/* The next place on the device of a block group that may move; NULL: that was the last. */
static struct dev_place *place_next(const struct kvt_engine *e, const struct session *s,
                                    struct walk *w) {
    for (;;) {
        while (w->group == NULL) {
            w->family = session_family(e, s, &w->cache);
            if (w->family == NULL) {
                return NULL;
            }
            bool may_move = family_is_segment(e, w->family) && !w->family->is_static;
            w->group = may_move ? w->family->groups : NULL;
            w->layer = 0;
        }
        while (w->layer < w->family->layer_count) {
            struct dev_place *p = &w->group->gpu[w->layer++];
            if (p->extent != 0) {
                return p;
            }
        }
        w->group = w->group->next;
        w->layer = 0;
    }
}

static uint64_t place_bytes(const struct kvt_engine *e, const struct walk *w) {
    return group_layer_bytes(e, w->family, w->group->block_count, w->layer - 1);
}

static bool is_of(const struct extent *x, uint32_t session) {
    return x->state == EXTENT_LIVE && x->session == session;
}

/* The extent with the least in it, if all of that may move and the holes of the others hold as much.
 * NULL also if what is free in and beside the session's extents is less than `need_bytes`. */
static struct extent *extent_to_leave(struct kvt_engine *e, const struct session *s,
                                      uint64_t need_bytes) {
    struct walk w = {0};
    struct extent *least = NULL;
    uint32_t session = session_index(e, s);
    uint64_t holes = 0; /* free in extents that are not empty */
    uint64_t room = dev_available(e, s);
    for (uint32_t i = 1; i < e->extent_top; i++) {
        e->extents[i].movable_bytes = 0;
    }
    for (const struct dev_place *p; (p = place_next(e, s, &w)) != NULL;) {
        struct extent *x = extent_find(e, p->extent);
        x->movable_bytes += round_up(place_bytes(e, &w), KVT_ALIGN_BYTES);
    }
    for (uint32_t i = 1; i < e->extent_top; i++) {
        struct extent *x = &e->extents[i];
        if (!is_of(x, session)) {
            continue;
        }
        room += x->space.free_bytes;
        if (x->live_bytes == 0) {
            continue;
        }
        holes += x->space.free_bytes;
        if (x->movable_bytes == x->live_bytes &&
            (least == NULL || x->live_bytes < least->live_bytes)) {
            least = x;
        }
    }
    bool fits = least != NULL && least->live_bytes <= holes - least->space.free_bytes;
    return fits && room >= need_bytes ? least : NULL;
}

/* Begins to empty an extent of the session, if that can be. `asking` lacks e->short_bytes: its own
 * extents are emptied only if all holes together help. */
bool compact_begin(struct kvt_engine *e, struct session *s, struct session *asking) {
    uint64_t need_bytes = s == asking ? e->short_bytes : 0;
    if (e->chaining || s->hung || s->compact_failed || s->migration.family != NULL ||
        s->schedule.phase != PHASE_NONE || s->demoting || e->devices[s->device].lost ||
        (asking != NULL && asking->compactions_left == 0) ||
        extent_to_leave(e, s, need_bytes) == NULL) {
        return false;
    }
    if (asking != NULL) {
        asking->compactions_left--;
    }
    struct walk w = {0};
    (void)place_next(e, s, &w);
    struct family *first = w.family;
    uint32_t at = 0;
    for (struct family *f; (f = session_family(e, s, &at)) != NULL;) {
        family_quiet(e, s, f);
    }
    s->migration = (struct migration){.family = first, .compacts = true, .need_bytes = need_bytes};
    migrate_progress(e, s);
    return !s->compact_failed;
}

/* Room for all of the extent's places, outside of it. */
static int moves_gather(struct kvt_engine *e, struct session *s, const struct extent *x) {
    struct migration *m = &s->migration;
    struct walk w = {0};
    uint32_t count = 0;
    for (const struct dev_place *p; (p = place_next(e, s, &w)) != NULL;) {
        count += p->extent == x->id;
    }
    m->moves = calloc(count + 1, sizeof(*m->moves));
    if (m->moves == NULL) {
        return -KVT_ENOMEM;
    }
    w = (struct walk){0};
    for (struct dev_place *p; (p = place_next(e, s, &w)) != NULL;) {
        if (p->extent != x->id) {
            continue;
        }
        struct move *move = &m->moves[m->move_count];
        *move = (struct move){.place = p, .group = w.group, .layer = w.layer - 1};
        move->bytes = place_bytes(e, &w);
        int rc = dev_alloc_hole(e, s, move->bytes, x->id, &move->target);
        if (rc != KVT_READY) {
            return rc;
        }
        m->move_count++;
    }
    return KVT_READY;
}

/* K and V of the blocks that were handed out. */
static uint32_t move_copies(const struct kvt_engine *e, const struct move *m,
                            struct kvt_copy *out) {
    struct group_part p = group_part(e, m->group, m->layer, 0, m->group->taken);
    const uint64_t offset[] = {p.k_offset, p.v_offset};
    const uint64_t bytes[] = {p.k_bytes, p.v_bytes};
    uint32_t count = 0;
    for (uint32_t i = 0; i < 2; i++) {
        struct kvt_place from = {.tier = KVT_TIER_GPU,
                                 .extent = m->place->extent,
                                 .offset = m->place->offset + offset[i]};
        struct kvt_place to = {.tier = KVT_TIER_GPU,
                               .extent = m->target.extent,
                               .offset = m->target.offset + offset[i]};
        if (bytes[i] > 0) {
            out[count++] = (struct kvt_copy){.source = from, .target = to, .bytes = bytes[i]};
        }
    }
    return count;
}

/* 0 or more: copies submitted. */
static int moves_submit(struct kvt_engine *e, struct session *s) {
    struct migration *m = &s->migration;
    struct kvt_copy *copies = calloc(2 * (size_t)m->move_count + 1, sizeof(*copies));
    uint32_t count = 0;
    if (copies == NULL) {
        return -KVT_ENOMEM;
    }
    for (uint32_t i = 0; i < m->move_count; i++) {
        count += move_copies(e, &m->moves[i], &copies[count]);
    }
    int rc = count > 0 ? copy_op_emit(e, s, copies, count) : 0;
    free(copies);
    return rc != 0 ? rc : (int)count;
}

/* What was gathered is given back, and where everything is it stays. */
void compact_forget(struct kvt_engine *e, struct session *s) {
    struct migration *m = &s->migration;
    for (uint32_t i = 0; i < m->move_count; i++) {
        dev_free(e, m->moves[i].target, m->moves[i].bytes);
    }
    free(m->moves);
    m->moves = NULL;
    m->move_count = 0;
}

static void moves_apply(struct kvt_engine *e, struct migration *m) {
    for (uint32_t i = 0; i < m->move_count; i++) {
        const struct move *move = &m->moves[i];
        dev_free(e, *move->place, move->bytes);
        *move->place = move->target;
    }
    m->move_count = 0;
}

void compact_end(struct kvt_engine *e, struct session *s, bool moved) {
    struct migration *m = &s->migration;
    if (moved) {
        moves_apply(e, m);
    }
    s->compact_failed |= !moved;
    compact_forget(e, s);
    *m = (struct migration){0};
    e->devices[s->device].changed_ms = e->now_ms;
    e->epoch++;
}

/* Between schedules, and with nothing in flight: a waiting STEP holds nothing that would be moved. */
void compact_progress(struct kvt_engine *e, struct session *s) {
    struct migration *m = &s->migration;
    const struct extent *x = extent_to_leave(e, s, m->need_bytes);
    int rc = x != NULL ? moves_gather(e, s, x) : -KVT_EQUOTA;
    rc = rc == KVT_READY ? moves_submit(e, s) : rc;
    if (rc <= 0) {
        compact_end(e, s, rc == 0);
        return;
    }
    m->submitted = true;
    if (KVT_BROKEN(e->rules, KVT_BREAK_FLIP_BEFORE_COPY)) {
        moves_apply(e, m);
    }
}
