/* STEP settles everything first: blocks for all tokens that its steps append, copies of shared
 * tails, room in dense planes, slots. It may take several attempts, since memory arrives by
 * completions; what was got is kept in between (in tables behind the committed length, in row.cow,
 * in cache.planes_next). When all is there the schedule is opened in one go. If it cannot be had,
 * the request fails and nothing has changed.
 */
#include "tiers/engine/state.h"

#include <stdlib.h>
#include <string.h>

/* ---- what the request asks for ------------------------------------------------------------------- */

static int plan_rows(struct cache *c, const struct kvt_request *r, struct step_plan *plan) {
    uint32_t count = r->count == 0 ? c->row_count : r->count;
    plan->rows = malloc(count * sizeof(*plan->rows));
    plan->tokens = malloc(count * sizeof(*plan->tokens));
    if (plan->rows == NULL || plan->tokens == NULL) {
        return -KVT_ENOMEM;
    }
    plan->count = count;
    for (uint32_t i = 0; i < count; i++) {
        plan->rows[i] = r->count == 0 ? i : r->rows[i];
        plan->tokens[i] = r->count == 0 ? r->tokens : r->values[i];
    }
    return 0;
}

static int plan_check(const struct kvt_engine *e, struct cache *c, const struct kvt_request *r,
                      struct step_plan *plan, char *text) {
    bool dense = !family_is_segment(e, c->family);
    uint8_t seen[KVT_ROWS_MAX] = {0};
    if (dense && plan->count != c->row_count) {
        kvt_text_format(text, KVT_TEXT_BYTES,
                        "step: %u rows; a dense worker's step names all %u rows in order "
                        "(0 tokens for those that stand still)",
                        plan->count, c->row_count);
        return -KVT_EINVAL;
    }
    if (r->steps < 1 || r->steps > KVT_STEPS_AHEAD_MAX) {
        kvt_text_format(text, KVT_TEXT_BYTES, "step: %u steps; accepted is 1 to %d", r->steps,
                        KVT_STEPS_AHEAD_MAX);
        return -KVT_EINVAL;
    }
    uint64_t limit = c->tokens_max != 0 ? c->tokens_max : KVT_TOKENS_MAX;
    plan->steps = r->steps;
    for (uint32_t i = 0; i < plan->count; i++) {
        uint32_t row = plan->rows[i];
        uint32_t tokens = plan->tokens[i];
        if (row >= c->row_count || seen[row] || (dense && row != i)) {
            kvt_text_format(text, KVT_TEXT_BYTES,
                            "step: row %u at position %u; rows are below %u, each at most once%s",
                            row, i, c->row_count, dense ? ", in order" : "");
            return -KVT_EINVAL;
        }
        seen[row] = 1;
        if (tokens > c->append_max) {
            kvt_text_format(text, KVT_TEXT_BYTES,
                            "step: row %u appends %u tokens; the cache was created for at most %u",
                            row, tokens, c->append_max);
            return -KVT_EINVAL;
        }
        uint64_t room = limit - c->rows[row].length;
        if (tokens > room) {
            kvt_text_format(text, KVT_TEXT_BYTES,
                            "step: row %u has %u tokens and appends %u; its capacity is %llu", row,
                            c->rows[row].length, tokens, (unsigned long long)limit);
            return -KVT_EQUOTA;
        }
        if (tokens > 0 && plan->steps > room / tokens) {
            plan->steps = (uint32_t)(room / tokens);
        }
    }
    return 0;
}

/* What a step costs the loop, which serves all workers: entries of tables that are walked, blocks and
 * pieces of each layer. About 20 ns a unit. */
#define PIECE_UNITS    64u
#define SCHEDULE_UNITS (1u << 17) /* 3 ms */

/* Fewer steps at once for those that are costly to lay out; at least one. */
static uint32_t steps_affordable(const struct kvt_engine *e, const struct step_plan *plan) {
    const struct family *f = plan->cache->family;
    uint64_t entries = 0;
    for (uint32_t i = 0; i < plan->count; i++) {
        entries += plan->cache->rows[plan->rows[i]].count + 1;
    }
    uint64_t blocks =
        family_is_segment(e, f) && entries > f->block_count ? f->block_count : entries;
    uint64_t units = entries + f->listings * (blocks + PIECE_UNITS);
    uint64_t steps = SCHEDULE_UNITS / units;
    steps = steps < 1 ? 1 : steps;
    return steps < plan->steps ? (uint32_t)steps : plan->steps;
}

/* ---- gathering ------------------------------------------------------------------------------------- */

static void merge(int *result, int rc) {
    if (*result >= 0 && rc != KVT_READY) {
        *result = rc;
    }
}

/* Whether appending to the row would write a block that others refer to, or that was ever full. Of
  * the rows of a step that share a tail the last one has it for itself when the others have their
 * copies, unless one of these had more tokens in it: should the copies fail, it comes back to them.
 * `walk` numbers the step's look at its rows. */
static bool row_needs_cow(const struct kvt_engine *e, const struct row *r, uint64_t walk) {
    if (r->length % e->config.block_tokens == 0 ||
        KVT_BROKEN(e->rules, KVT_BREAK_NO_COPY_ON_WRITE)) {
        return false;
    }
    struct block *tail = r->blocks[r->length / e->config.block_tokens];
    if (tail->mark != walk) {
        tail->mark = walk;
        tail->mark_tokens = 0; /* rows that leave it */
        tail->mark_row = 0;    /* tokens of the longest of these */
    }
    if (tail->refs - tail->mark_tokens > 1 || r->length < tail->mark_row ||
        (tail->full && !KVT_BROKEN(e->rules, KVT_BREAK_FULL_BLOCK_REWRITTEN))) {
        tail->mark_tokens++;
        tail->mark_row = r->length > tail->mark_row ? r->length : tail->mark_row;
        return true;
    }
    return false;
}

static int settle_rows(struct kvt_engine *e, struct step_plan *plan, uint32_t steps) {
    struct cache *c = plan->cache;
    int result = KVT_READY;
    uint64_t walk = ++e->walk;
    for (uint32_t i = 0; i < plan->count && result >= 0; i++) {
        struct row *r = &c->rows[plan->rows[i]];
        if (plan->tokens[i] == 0) {
            continue;
        }
        if (row_needs_cow(e, r, walk) && r->cow == NULL) {
            merge(&result, block_alloc(e, c, r, 1, &r->cow));
        }
        merge(&result, row_reserve(e, c, r, r->length + steps * plan->tokens[i]));
    }
    return result;
}

/* Whether the cache may use its planes as they are: its own rows, room enough, and nobody reads
 * what a step may write. */
bool planes_exact(struct cache *c, uint32_t capacity) {
    struct planes *p = c->planes;
    bool rows_fit =
        p != NULL && (p->rows == c->row_count || (c->family->is_static && p->rows > c->row_count));
    if (!rows_fit || p->capacity < capacity) {
        return false;
    }
    if (p->refs == 1) {
        p->owner = c->id;
        memset(p->frozen, 0, p->rows * sizeof(*p->frozen));
    }
    for (uint32_t i = 0; i < c->row_count; i++) {
        if (c->rows[i].planes_row != i || c->rows[i].length < p->frozen[i]) {
            return false;
        }
    }
    return p->owner == c->id;
}

/* Whether the chain of moves can be made; it is made when the schedule is opened. */
static int planes_probe(struct kvt_engine *e, struct planes *from, struct planes *to) {
    struct dev_place places[KVT_LAYERS_MAX];
    memcpy(places, from->place, from->family->layer_count * sizeof(*places));
    int rc = planes_chain(e, from, to);
    if (rc == KVT_READY) {
        planes_chain_undo(e, from, to, places);
    }
    return rc;
}

/* Dense: slots and planes for rows of `capacity` tokens. Planes come last: the probe holds as long
 * as nothing else is allocated on the device. */
static int settle_dense_at(struct kvt_engine *e, struct session *s, struct cache *c,
                           uint32_t capacity) {
    struct family *f = c->family;
    int result = KVT_READY;
    if (f->resident_count < f->layer_count) {
        merge(&result, slots_settle(e, s, slots_needed(e, f), slot_bytes_needed(e, c, capacity)));
    }
    if (result < 0 || f->resident_count == 0) {
        return result;
    }
    if (planes_exact(c, capacity)) { /* perhaps only since another cache has let go of them */
        planes_unref(e, c->planes_next);
        c->planes_next = NULL;
        return result;
    }
    struct planes *next = c->planes_next;
    if (next != NULL && (next->capacity != capacity || next->rows != c->row_count)) {
        planes_unref(e, next);
        next = NULL;
    }
    if (next == NULL) {
        next = planes_create(f, c->row_count, capacity, c->id);
    }
    c->planes_next = next;
    if (next == NULL) {
        merge(&result, -KVT_ENOMEM);
    } else if (planes_reuse(c)) {
        merge(&result, planes_probe(e, c->planes, next));
    } else {
        merge(&result, planes_alloc(e, next));
    }
    return result;
}

static int settle_dense(struct kvt_engine *e, struct session *s, struct step_plan *plan,
                        uint32_t steps, uint32_t *capacity) {
    struct cache *c = plan->cache;
    uint64_t bt = e->config.block_tokens;
    uint64_t need = 1;
    for (uint32_t i = 0; i < plan->count; i++) {
        uint64_t tokens = c->rows[plan->rows[i]].length + (uint64_t)steps * plan->tokens[i];
        need = tokens > need ? tokens : need;
    }
    need = (need + bt - 1) / bt * bt;
    if (need <= c->capacity) {
        *capacity = c->capacity;
        return settle_dense_at(e, s, c, c->capacity);
    }
    uint64_t slack = c->capacity + (c->capacity / 8 > bt ? c->capacity / 8 / bt * bt : bt);
    uint64_t most =
        c->tokens_max != 0 ? (c->tokens_max + bt - 1) / bt * bt : KVT_TOKENS_MAX / bt * bt;
    slack = slack < need ? need : slack;
    slack = slack > most ? most : slack;
    *capacity = (uint32_t)slack;
    int rc = settle_dense_at(e, s, c, *capacity);
    if (rc == -KVT_EQUOTA && slack > need) {
        slots_undo(e, s);
        *capacity = (uint32_t)need;
        rc = settle_dense_at(e, s, c, *capacity);
    }
    return rc;
}

static int settle_segment(struct kvt_engine *e, struct session *s, struct cache *c) {
    struct family *f = c->family;
    if (f->resident_count == f->layer_count) {
        return KVT_READY;
    }
    return slots_settle(e, s, slots_needed(e, f), slot_bytes_needed(e, c, 0));
}

/* Gives back what an attempt has gathered. */
void settle_undo(struct kvt_engine *e, struct cache *c) {
    for (uint32_t i = 0; i < c->row_count; i++) {
        if (c->rows[i].cow != NULL) {
            block_unref(e, c->rows[i].cow);
            c->rows[i].cow = NULL;
        }
        row_trim(e, &c->rows[i]);
    }
    planes_unref(e, c->planes_next);
    c->planes_next = NULL;
    slots_undo(e, &e->sessions[c->session]);
}

/* One attempt at `steps` steps. */
static int settle_once(struct kvt_engine *e, struct session *s, struct step_plan *plan,
                       uint32_t steps, uint32_t *capacity) {
    memory_pass_begin(e, s);
    int result = family_is_segment(e, plan->cache->family)
                     ? settle_segment(e, s, plan->cache)
                     : settle_dense(e, s, plan, steps, capacity);
    if (result >= 0) { /* last: tables are not in the device's budget */
        merge(&result, settle_rows(e, plan, steps));
    }
    return result;
}

/* Whether another session waits for memory of the same device. */
bool others_gather(const struct kvt_engine *e, const struct session *s) {
    for (uint32_t i = 0; i < e->config.sessions_max; i++) {
        const struct session *other = &e->sessions[i];
        if (other != s && other->in_use && !other->hung && other->device == s->device &&
            other->settling && other->migration.family == NULL) {
            return true;
        }
    }
    return false;
}

/* Brings layers back to the device: of a cache that was idle as many as there is room for, of one
 * that had to give way one at a time, when there has been ample room for a while. KVT_WAIT: a layer
 * is on its way. */
static int settle_promotion(struct kvt_engine *e, struct session *s, struct family *f,
                            bool first_attempt) {
    if (s->migration.family != NULL) {
        return KVT_WAIT;
    }
    if (f->is_static && f->demoted && family_stays(e, s, f)) {
        return KVT_READY;
    }
    if (f->is_static && f->demoted) {
        int rc = s->promote_failed != 0 ? s->promote_failed : promote_layer(e, s, f);
        f->demoted = rc != KVT_READY;
        f->vacated = f->vacated && f->demoted;
        return rc;
    }
    if (f->demoted && others_gather(e, s)) {
        f->demoted = false; /* they would take the layers away again, and so on */
    }
    if (f->demoted) {
        int rc = promote_layer(e, s, f);
        f->demoted = rc == KVT_WAIT;
        return rc == KVT_WAIT ? KVT_WAIT : KVT_READY;
    }
    return first_attempt && promote_is_due(e, s, f) ? promote_layer(e, s, f) : KVT_READY;
}

/* What a cache that was idle needs before anything else: its memory, its layers. */
static int step_wake(struct kvt_engine *e, struct session *s, const struct pending *p,
                     struct family *f, char *text) {
    int rc =
        KVT_BROKEN(e->rules, KVT_BREAK_STATIC_NOT_RETURNED) ? KVT_READY : session_return(e, s, f);
    if (rc == -KVT_EQUOTA) {
        return memory_take(e, s);
    }
    rc = rc == KVT_READY ? settle_promotion(e, s, f, !p->started) : rc;
    if (rc < 0) {
        kvt_text_format(
            text, KVT_TEXT_BYTES,
            "step: cache %u was idle, and a layer of it cannot come back to the device: %s; "
            "nothing is lost: try again, or close it",
            p->request.cache, kvt_error_text(rc));
    }
    return rc;
}

/* Gathers what the steps need. */
static int step_gather(struct kvt_engine *e, struct session *s, struct step_plan *plan,
                       uint32_t *capacity, char *text) {
    plan->steps = steps_affordable(e, plan);
    int rc = settle_once(e, s, plan, plan->steps, capacity);
    if (rc == -KVT_EQUOTA && plan->steps > 1) {
        settle_undo(e, plan->cache);
        plan->steps = 1;
        rc = settle_once(e, s, plan, 1, capacity);
    }
    if (rc == -KVT_EQUOTA) {
        rc = memory_take(e, s);
    } else if (rc == -KVT_EBUSY) {
        blocks_full_text(e, s, "step", text);
    } else if (rc == -KVT_ESTATE) {
        kvt_text_format(text, KVT_TEXT_BYTES,
                        "step: the slots of this session are fixed by "
                        "an offloaded-static cache; attach once more for another cache");
    }
    return rc;
}

/* Tries to open the schedule that the request asks for. KVT_READY: it is open. KVT_WAIT: call again
 * when something has happened. Negative: it cannot be, the reason is in `text`. */
int step_request(struct kvt_engine *e, struct session *s, struct pending *p, char *text) {
    struct cache *c = cache_find(e, p->request.session, p->request.cache);
    KVT_ASSERT(c != NULL);
    KVT_ASSERT(s->schedule.phase == PHASE_NONE);
    if (!p->started) {
        s->demote_failed = false;
        s->compact_failed = false;
        s->promote_failed = 0;
    }
    struct step_plan plan = {.cache = c};
    uint32_t capacity = c->capacity;
    int rc = plan_rows(c, &p->request, &plan);
    rc = rc == 0 ? plan_check(e, c, &p->request, &plan, text) : rc;
    rc = rc == 0 ? step_wake(e, s, p, c->family, text) : rc;
    rc = rc == KVT_READY ? step_gather(e, s, &plan, &capacity, text) : rc;
    if (rc < 0) {
        settle_undo(e, c); /* also what earlier attempts have gathered */
    }
    if (rc == KVT_READY) {
        uint32_t before = c->capacity;
        c->capacity = capacity;
        rc = schedule_open(e, s, &plan, text);
        if (rc != 0) {
            c->capacity = before;
            settle_undo(e, c);
        }
    }
    free(plan.rows);
    free(plan.tokens);
    return rc;
}
