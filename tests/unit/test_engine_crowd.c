/* Several workers on a budget that is too small for all of them: schedules left open, memory and
 * copies that come late, idle times, deaths. Every byte is checked; nobody is refused while memory
 * lies idle; nothing waits for ever; at the end nothing is left. SEED=n, SEEDS=n. */
#include "tests/support/cunit_run.h"
#include "tests/support/engine_harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORKERS = 4, LAYERS = 4, TOKENS_MOST = 700, ROWS_MOST = 3 };

struct worker {
    bool here;
    uint32_t session;
    uint32_t kind;
    struct kvth_cache *cache[2];
    uint64_t tag; /* STEP that was sent; 0: none */
    struct kvth_cache *stepping;
    uint32_t count;
    uint32_t rows[ROWS_MOST];
    uint32_t tokens[ROWS_MOST];
    bool open; /* `walk` is a schedule */
    struct kvth_walk walk;
};

static struct kvth h;
static struct worker workers[WORKERS];
static uint64_t refusals, steps_done, migrated;
static uint64_t random_state;

static uint32_t below(uint32_t limit) {
    random_state = random_state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)(((random_state >> 33) * limit) >> 31);
}

/* ---- a worker ------------------------------------------------------------------------------------------ */

static void arrive(struct worker *v) {
    static const uint32_t modes[] = {KVT_MODE_DYNAMIC, KVT_MODE_DYNAMIC, KVT_MODE_OFFLOADED};
    struct kvt_layout layout = kvth_layout(LAYERS);
    struct kvt_cache_options o = kvth_options(modes[below(3)], 1 + below(ROWS_MOST));
    memset(v, 0, sizeof(*v));
    v->kind = below(2) ? KVT_WORKER_SEGMENT : KVT_WORKER_DENSE;
    v->session = kvth_attach(&h, v->kind, 0);
    v->here = true;
    struct kvt_request r = {
        .kind = KVT_REQUEST_CREATE, .session = v->session, .layout = &layout, .options = &o};
    uint64_t tag = kvth_send(&h, &r);
    const struct kvth_answer *a = kvth_answer(&h, tag);
    if (a == NULL || a->code != 0) { /* no room, or not yet: it leaves again */
        kvth_leave(&h, v->session);
        v->here = false;
        return;
    }
    v->cache[0] = kvth_adopt(&h, v->session, a->cache, &layout, o.rows);
}

static void leave(struct worker *v) {
    if (v->here) {
        kvth_leave(&h, v->session);
        v->here = v->open = false;
        v->tag = 0;
    }
}

static void send_step(struct worker *v) {
    struct kvth_cache *c = v->cache[v->cache[1] != NULL ? below(2) : 0];
    uint32_t steps = 1 + below(3);
    v->count = 0;
    for (uint32_t i = 0; i < c->row_count; i++) {
        uint32_t room = (TOKENS_MOST - c->rows[i].count) / steps;
        uint32_t n = below(4) == 0 ? below(200) : below(5);
        v->rows[v->count] = i;
        v->tokens[v->count++] = n < room ? n : room;
    }
    v->stepping = c;
    v->tag = kvth_step_send(&h, c, v->rows, v->tokens, v->count, 0, steps);
}

/* What an edit waits for comes. */
static void calm(void) {
    h.hold_events = false;
    kvth_release(&h, true);
}

static void fork_or_close(struct worker *v) {
    calm();
    if (v->cache[1] == NULL) {
        v->cache[1] = kvth_fork(&h, v->cache[0], NULL, 0);
    } else {
        struct kvt_request r = {
            .kind = KVT_REQUEST_CLOSE, .session = v->session, .cache = v->cache[1]->id};
        CU_ASSERT_EQUAL(kvth_ask(&h, &r)->code, 0);
        kvth_forget(v->cache[1]);
        v->cache[1] = NULL;
    }
}

/* Memory that nobody uses is no reason to refuse. */
static void look_at_refusal(const struct kvth_answer *a) {
    uint64_t budget_bytes = h.config.devices[0].budget_bytes;
    unsigned long long need = 0;
    refusals++;
    CU_ASSERT_EQUAL(a->code, KVT_EQUOTA);
    if (sscanf(a->text, "step: device memory: %llu", &need) == 1 &&
        a->live_bytes + need <= budget_bytes / 2) {
        (void)fprintf(stderr, "\n%s: %llu live of %llu: %s\n", kvth_what,
                      (unsigned long long)a->live_bytes, (unsigned long long)budget_bytes, a->text);
        CU_FAIL("refused while half of the device lies idle");
    }
}

/* Looks whether the STEP has been answered. */
static void look(struct worker *v) {
    const struct kvth_answer *a = v->tag != 0 ? kvth_answer(&h, v->tag) : NULL;
    if (a == NULL) {
        return;
    }
    if (a->code != 0) {
        look_at_refusal(a);
    } else {
        kvth_walk_begin(&h, &v->walk, v->stepping, v->rows, v->tokens, v->count, 0, v->tag);
        v->open = true;
    }
    v->tag = 0;
}

static void go_on(struct worker *v) {
    bool held = h.hold_copies;
    kvth_release(&h, true); /* what a piece waits for comes */
    if (below(12) == 0) {
        kvth_walk_abort(&h, &v->walk);
        v->open = false;
    } else if (!kvth_walk_pieces(&h, &v->walk, below(4) == 0 ? 1 : 100)) {
        kvth_walk_post(&h, &v->walk);
        steps_done++;
        v->open = v->walk.next < v->walk.steps;
    }
    h.hold_copies = held;
}

static void act(struct worker *v) {
    if (!v->here) {
        arrive(v);
        return;
    }
    look(v);
    if (v->open) {
        go_on(v);
    } else if (v->tag == 0) {
        uint32_t what = below(20);
        if (what == 0) {
            fork_or_close(v);
        } else if (what == 1) {
            calm();
            kvth_crop(&h, v->cache[0], below(TOKENS_MOST));
        } else {
            send_step(v);
        }
    }
    if (below(150) == 0) {
        leave(v);
    }
}

/* ---- all of them ---------------------------------------------------------------------------------------- */

/* Everybody ends what is begun; within the deadline every request is answered. */
static void settle_all(void) {
    h.hold_events = false;
    kvth_release(&h, true);
    for (uint32_t round = 0; round < 4; round++) {
        for (uint32_t i = 0; i < WORKERS; i++) {
            struct worker *v = &workers[i];
            look(v);
            while (v->here && v->open) {
                (void)kvth_walk_pieces(&h, &v->walk, UINT32_MAX);
                kvth_walk_post(&h, &v->walk);
                v->open = v->walk.next < v->walk.steps;
            }
        }
    }
    kvth_tick(&h, h.config.reclaim_deadline_ms + 1);
    for (uint32_t i = 0; i < WORKERS; i++) {
        look(&workers[i]);
        CU_ASSERT_EQUAL_FATAL(workers[i].here ? workers[i].tag : 0, 0);
    }
    for (uint32_t i = 0; i < WORKERS; i++) { /* those that were answered just now */
        while (workers[i].here && workers[i].open) {
            (void)kvth_walk_pieces(&h, &workers[i].walk, UINT32_MAX);
            kvth_walk_post(&h, &workers[i].walk);
            workers[i].open = workers[i].walk.next < workers[i].walk.steps;
        }
    }
}

static void crowd(uint64_t seed, bool late) {
    random_state = seed;
    (void)snprintf(kvth_what, sizeof(kvth_what), "SEED=%llu %s", (unsigned long long)seed,
                   late ? "late" : "at once");
    kvth_start(&h, &(struct kvth_config){.device_budget_bytes = 512u << 10,
                                         .host_budget_bytes = 4u << 20,
                                         .extent_bytes = 32u << 10});
    memset(workers, 0, sizeof(workers));
    for (uint32_t i = 0; i < 250; i++) {
        act(&workers[below(WORKERS)]);
        if (late && below(6) == 0) {
            h.hold_copies = below(2);
            h.hold_events = below(3) == 0;
            if (!h.hold_copies) {
                kvth_release(&h, true);
            }
            kvth_pump(&h);
        }
        if (below(40) == 0) {
            kvth_tick(&h, below(7000));
        }
    }
    settle_all();
    for (uint32_t i = 0; i < WORKERS; i++) {
        struct kvt_session_info info;
        if (workers[i].here) {
            kvth_session_info(&h, workers[i].session, &info);
            migrated += info.counters.migrated_bytes;
        }
        leave(&workers[i]);
    }
    kvth_stop(&h);
}

static void run(bool late) {
    const char *only = getenv("SEED");
    uint64_t first = only != NULL ? strtoull(only, NULL, 10) : 1;
    uint64_t last = only != NULL      ? first
                    : getenv("SEEDS") ? strtoull(getenv("SEEDS"), NULL, 10)
                                      : 25;
    refusals = steps_done = migrated = 0;
    for (uint64_t seed = first; seed <= last; seed++) {
        crowd(seed, late);
    }
    (void)printf("%llu steps, %llu refusals, %llu bytes migrated; ", (unsigned long long)steps_done,
                 (unsigned long long)refusals, (unsigned long long)migrated);
    CU_ASSERT_TRUE(steps_done > 0);
}

static void test_crowd(void) {
    run(false);
}

static void test_crowd_late(void) {
    run(true);
}

int main(void) {
    CU_TestInfo tests[] = {{"a crowd", test_crowd},
                           {"a crowd, and everything comes late", test_crowd_late},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("engine, several workers", tests);
}
