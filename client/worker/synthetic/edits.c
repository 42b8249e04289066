/* What happens to caches at random between schedules; the model follows. */
#include "client/worker/synthetic/synth.h"

#include <string.h>

static uint32_t below(struct kvt_synth *s, uint32_t limit) {
    return kvt_synth_random_below(&s->random, limit);
}

static int crop(struct kvt_synth *s, struct kvt_synth_cache *c) {
    uint32_t lengths[KVT_SYNTH_ROWS_MAX];
    bool one = below(s, 2) == 0;
    uint32_t longest = kvt_synth_cache_longest(c);
    for (uint32_t i = 0; i < c->row_count; i++) {
        /* Mostly a little, sometimes far back; a length above the row's own is no crop. */
        uint32_t back = below(s, 4) == 0 ? longest + 1 : longest / 16 + 1;
        uint32_t have = one ? longest : c->rows[i].count;
        uint32_t cut = below(s, back);
        lengths[i] = cut > have ? 0 : have - cut;
    }
    for (uint32_t i = 0; one && i < c->row_count; i++) {
        lengths[i] = lengths[0] < c->rows[i].count ? lengths[0] : c->rows[i].count;
    }
    /* The short form only where it says the same for every row. */
    bool same = true;
    for (uint32_t i = 0; i < c->row_count; i++) {
        same = same && lengths[i] == lengths[0];
    }
    int rc = kvt_cache_crop(s->client, c->id, lengths, one && same ? 1 : c->row_count);
    for (uint32_t i = 0; rc == 0 && i < c->row_count; i++) {
        kvt_synth_row_crop(&c->rows[i], lengths[i]);
    }
    return rc;
}

static int take(struct kvt_synth *s, struct kvt_synth_cache *c, bool reorder) {
    uint32_t rows[KVT_SYNTH_ROWS_MAX];
    uint32_t count = reorder ? c->row_count : 1 + below(s, c->row_count);
    uint32_t first = below(s, c->row_count);
    for (uint32_t i = 0; i < count; i++) {
        rows[i] = reorder ? below(s, c->row_count) : (first + i) % c->row_count;
    }
    int rc = reorder ? kvt_cache_reorder(s->client, c->id, rows, count)
                     : kvt_cache_select(s->client, c->id, rows, count);
    if (rc == 0) {
        kvt_synth_cache_take_rows(c, rows, count);
    }
    return rc;
}

static int repeat(struct kvt_synth *s, struct kvt_synth_cache *c) {
    uint32_t rows[KVT_SYNTH_ROWS_MAX];
    if (2 * (int64_t)c->row_count > s->o->rows_max) {
        return 0;
    }
    for (uint32_t i = 0; i < 2 * c->row_count; i++) {
        rows[i] = i / 2;
    }
    int rc = kvt_cache_repeat(s->client, c->id, 2);
    if (rc == 0) {
        kvt_synth_cache_take_rows(c, rows, 2 * c->row_count);
    }
    return rc;
}

static int reset(struct kvt_synth *s, struct kvt_synth_cache *c) {
    int rc = kvt_cache_reset(s->client, c->id);
    for (uint32_t i = 0; rc == 0 && i < c->row_count; i++) {
        kvt_synth_row_crop(&c->rows[i], 0);
    }
    return rc;
}

static int fork_cache(struct kvt_synth *s, const struct kvt_synth_cache *c) {
    uint32_t id;
    uint32_t rows[KVT_SYNTH_ROWS_MAX];
    bool all = below(s, 2) == 0;
    uint32_t count = all ? c->row_count : 1 + below(s, c->row_count);
    for (uint32_t i = 0; i < count; i++) {
        rows[i] = all ? i : below(s, c->row_count);
    }
    int rc = kvt_cache_fork(s->client, c->id, all ? NULL : rows, all ? 0 : count, &id);
    if (rc != 0) {
        return rc;
    }
    struct kvt_synth_cache *forked = &s->caches[s->cache_count++];
    kvt_synth_cache_copy(forked, c, id);
    kvt_synth_cache_take_rows(forked, rows, count);
    s->totals.forks++;
    s->totals.caches++;
    if ((int64_t)s->cache_count > s->o->caches) {
        return kvt_synth_close(s, below(s, s->cache_count));
    }
    return 0;
}

int kvt_synth_close(struct kvt_synth *s, uint32_t index) {
    struct kvt_cache_stat stat;
    struct kvt_synth_totals *t = &s->totals;
    uint32_t id = s->caches[index].id;
    int rc = kvt_cache_settle(s->client, id, 30000);
    if (rc == 0) {
        rc = kvt_cache_stat(s->client, id, &stat);
    }
    if (rc != 0) {
        return rc;
    }
    t->to_device_bytes += stat.to_device_bytes;
    t->from_device_bytes += stat.from_device_bytes;
    t->prefetch_discarded_bytes += stat.prefetch_discarded_bytes;
    t->migrated_bytes += stat.migrated_bytes;
    t->copied_on_write_bytes += stat.copied_on_write_bytes;
    t->steps_committed += stat.steps_committed;
    t->need_to_device_bytes = stat.need_to_device_bytes;
    t->need_from_device_bytes = stat.need_from_device_bytes;
    t->device_bytes = stat.device_bytes;
    t->host_bytes = stat.host_bytes;
    memcpy(t->layers, stat.layers, sizeof t->layers);
    kvt_synth_cache_free(&s->caches[index]);
    s->caches[index] = s->caches[--s->cache_count];
    return kvt_cache_close(s->client, id);
}

int kvt_synth_edit(struct kvt_synth *s, struct kvt_synth_cache *c) {
    const struct kvt_synth_options *o = s->o;
    int rc = 0;
    const struct {
        int64_t percent;
        int (*run)(struct kvt_synth *, struct kvt_synth_cache *);
    } plain[] = {{o->crop, crop}, {o->repeat, repeat}, {o->reset, reset}};
    for (size_t i = 0; i < sizeof plain / sizeof plain[0] && rc == 0; i++) {
        if (kvt_synth_random_percent(&s->random, plain[i].percent)) {
            s->totals.edits++;
            rc = plain[i].run(s, c);
        }
    }
    if (rc == 0 && kvt_synth_random_percent(&s->random, o->reorder)) {
        s->totals.edits++;
        rc = take(s, c, true);
    }
    if (rc == 0 && kvt_synth_random_percent(&s->random, o->select)) {
        s->totals.edits++;
        rc = take(s, c, false);
    }
    /* Last: it may close `c`. */
    if (rc == 0 && kvt_synth_random_percent(&s->random, o->fork)) {
        rc = fork_cache(s, c);
    }
    return rc;
}
