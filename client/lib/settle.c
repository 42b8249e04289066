/* What became of steps that were ended: written back and committed, or lost.
 *
 * kvt_step_end returns before a step is written back, so it may still fail. `failed` says so until
 * the next schedule is opened: before that the fate of every ended step is looked at, and a loss is
 * kept with the cache until kvt_step_begin, kvt_acquire or kvt_cache_settle has told it, once. So
 * the ended steps whose fate is open are all of the last schedule, whose rows c->step still has.
 */
#include "client/lib/client.h"

#include <stdio.h>
#include <string.h>

#define SLEEP_US_MAX 100000

/* 1: committed; 0: not known yet; -KVT_EFAILED: lost; -KVT_EGONE. */
static int fate(struct kvt_client *c, uint64_t step) {
    uint64_t committed = kvt_client_counter_read(&c->page->committed);
    uint64_t failed = kvt_client_counter_read(&c->page->failed);
    if (kvt_client_is_gone(c)) { /* behind the counters: they may have been poisoned */
        return -KVT_EGONE;
    }
    if (kvt_counter_reached(committed, step)) {
        return 1;
    }
    return failed != 0 && failed <= step ? -KVT_EFAILED : 0;
}

static void note_lost(struct kvt_client *c, struct kvt_client_cache *cache) {
    const struct kvt_step *s = &c->step;
    struct kvt_client_lost lost = {
        .cache = cache->id,
        .first = kvt_client_counter_read(&c->page->failed),
        .last = cache->ended,
        .code = (int)__atomic_load_n(&c->page->failed.aux, __ATOMIC_RELAXED),
    };
    for (uint32_t i = 0; i < s->row_count; i++) {
        if (s->appends[i] != 0 && lost.rows++ == 0) {
            lost.row = i;
            lost.tokens = s->appends[i] * (lost.last - lost.first + 1);
        }
    }
    cache->lost = lost;
    cache->ended = 0;
}

void kvt_client_settle_look(struct kvt_client *c) {
    for (uint32_t i = 0; i < c->cache_count; i++) {
        struct kvt_client_cache *cache = c->caches[i];
        int rc = cache->ended != 0 ? fate(c, cache->ended) : 0;
        if (rc == 1) {
            cache->ended = 0;
        } else if (rc == -KVT_EFAILED) {
            note_lost(c, cache);
        }
    }
}

int kvt_client_settle_tell(struct kvt_client *c, struct kvt_client_cache *cache) {
    const struct kvt_client_lost lost = cache->lost;
    char steps[64];
    char rows[96] = "";
    if (lost.first == 0) {
        return 0;
    }
    if (lost.code == KVT_EEVICTED) {
        return kvt_client_fail_evicted(c);
    }
    cache->lost = (struct kvt_client_lost){.first = 0};
    (void)snprintf(steps, sizeof steps,
                   lost.first == lost.last ? "step %llu" : "steps %llu to %llu",
                   (unsigned long long)lost.first, (unsigned long long)lost.last);
    if (lost.rows > 1) {
        (void)snprintf(rows, sizeof rows, " and those of %u more rows", lost.rows - 1);
    }
    return kvt_client_fail(c, -KVT_EFAILED,
                           "%s of cache %u failed when written back (%s): %llu new tokens of row "
                           "%u%s are not there; go on from the rows' lengths",
                           steps, lost.cache, kvt_error_text(lost.code),
                           (unsigned long long)lost.tokens, lost.row, rows);
}

/* ---- before a schedule is opened --------------------------------------------------------------- */

struct waiting {
    struct kvt_client *client;
    uint64_t step;
    uint64_t end_ns;
};

static int stop(void *argument) {
    struct waiting *w = argument;
    int rc = fate(w->client, w->step);
    return rc == 0 && kvt_client_now_ns() >= w->end_ns ? -KVT_ETIMEDOUT : rc;
}

int kvt_client_settle_await(struct kvt_client *c) {
    uint64_t end_ns = kvt_client_now_ns() + (uint64_t)c->request_timeout_ms * 1000000;
    for (uint32_t i = 0; i < c->cache_count; i++) {
        const struct kvt_client_cache *cache = c->caches[i];
        if (cache->ended == 0) {
            continue;
        }
        struct waiting w = {.client = c, .step = cache->ended, .end_ns = end_ns};
        int rc =
            kvt_client_counter_wait(&c->page->committed, cache->ended, &c->settle_spin, stop, &w);
        if (rc == -KVT_EGONE) {
            return kvt_client_fail_gone(c);
        }
        if (rc == -KVT_ETIMEDOUT) {
            return kvt_client_fail(c, rc,
                                   "STEP: step %llu of cache %u was not written back within %d ms; "
                                   "nothing has changed: try again, or detach",
                                   (unsigned long long)cache->ended, cache->id,
                                   c->request_timeout_ms);
        }
    }
    kvt_client_settle_look(c);
    return 0;
}

/* ---- the call ---------------------------------------------------------------------------------- */

int kvt_cache_check(struct kvt_client *c, uint32_t cache) {
    struct kvt_client_cache *own = kvt_client_cache_find(c, cache);
    if (own == NULL) {
        return -KVT_ENOENT;
    }
    kvt_client_settle_look(c); /* before `gone` is looked at: counters may have been poisoned */
    int rc = kvt_client_check_usable(c);
    return rc != 0 ? rc : kvt_client_settle_tell(c, own);
}

int kvt_cache_settle(struct kvt_client *c, uint32_t cache, int timeout_ms) {
    struct kvt_client_cache *own = kvt_client_cache_find(c, cache);
    if (own == NULL) {
        return -KVT_ENOENT;
    }
    uint64_t end_ns = kvt_client_now_ns() + (uint64_t)(timeout_ms < 0 ? 0 : timeout_ms) * 1000000;
    bool woken = false;
    for (;;) {
        int rc = kvt_client_check_usable(c);
        if (rc != 0) {
            return rc;
        }
        if (!woken) { /* steps may have ended quietly */
            kvt_client_counter_wake(&c->page->step);
            woken = true;
        }
        kvt_client_settle_look(c);
        rc = kvt_client_settle_tell(c, own);
        if (rc != 0 || own->ended == 0) {
            return rc;
        }
        uint64_t now_ns = kvt_client_now_ns();
        if (timeout_ms >= 0 && now_ns >= end_ns) {
            return kvt_client_fail(c, -KVT_ETIMEDOUT,
                                   "settle: step %llu of cache %u is not committed after %d ms",
                                   (unsigned long long)own->ended, cache, timeout_ms);
        }
        uint64_t left_us = timeout_ms < 0 ? UINT64_MAX : (end_ns - now_ns) / 1000 + 1;
        kvt_client_counter_sleep(&c->page->committed, own->ended,
                                 left_us < SLEEP_US_MAX ? (uint32_t)left_us : SLEEP_US_MAX);
    }
}
