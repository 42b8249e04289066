/* Answers, held against the model: what must be refused is refused, what is accepted means what it
 * says, nothing takes effect while the cache's schedule is open, lengths are right.
 */
#include "tests/sim/sim.h"

#include <string.h>

typedef unsigned long long ull;

/* Gathers memory: such requests of a session take effect one after another. */
static bool gathers(const struct sim_request *r) {
    return r->kind == KVT_REQUEST_STEP || r->kind == KVT_REQUEST_CREATE ||
           (r->kind == KVT_REQUEST_ACQUIRE && r->layer == 0);
}

/* `later` is answered while `r`, which came before, waits. */
static void check_overtaking(struct sim *sim, const struct sim_worker *w,
                             const struct sim_request *r, const struct sim_request *later) {
    bool same_cache = r->cache != 0 && later->cache == r->cache &&
                      later->kind != KVT_REQUEST_ABORT && r->kind != KVT_REQUEST_ABORT;
    if (same_cache || (gathers(r) && gathers(later))) {
        sim_fail(sim, "session %u: request %llu overtook %llu on cache %u", w->session,
                 (ull)later->tag, (ull)r->tag, r->cache);
    }
}

static struct sim_request take_request(struct sim *sim, struct sim_worker *w,
                                       const struct kvt_answer *answer) {
    for (uint32_t i = 0; i < w->request_count; i++) {
        struct sim_request r = w->requests[i];
        if (r.tag == answer->tag) {
            w->request_count--;
            memmove(&w->requests[i], &w->requests[i + 1],
                    (w->request_count - i) * sizeof(w->requests[0]));
            return r;
        }
        if (answer->code == KVT_EEVICTED || answer->code == KVT_EBUSY ||
            answer->code == KVT_ENOMEM) { /* said at once */
            continue;
        }
        for (uint32_t j = i + 1; j < w->request_count; j++) {
            if (w->requests[j].tag == answer->tag) {
                check_overtaking(sim, w, &r, &w->requests[j]);
            }
        }
    }
    sim_fail(sim, "session %u: an answer to request %llu, which is not waiting", w->session,
             (ull)answer->tag);
}

/* Codes that say: not now. */
/* Nobody's mistake; EIO: a copy has failed with which a static cache that was idle comes back. */
static bool is_shortage(const struct sim *sim, uint32_t code, uint32_t kind) {
    bool steps = kind == KVT_REQUEST_STEP || kind == KVT_REQUEST_ACQUIRE;
    if (code == KVT_EIO && steps) {
        return sim->stats.faults[SIM_COPY_FAILED] + sim->stats.faults[SIM_COPY_TORN] > 0;
    }
    return code == KVT_EQUOTA || code == KVT_EBUSY || code == KVT_ENOMEM || code == KVT_ETIMEDOUT ||
           code == KVT_ETOOBIG || (code == KVT_ESTATE && (steps || kind == KVT_REQUEST_CREATE));
}

static void check_lengths(struct sim *sim, struct sim_worker *w, const struct kvt_answer *answer) {
    struct sim_cache *c = answer->cache == 0 ? NULL : sim_cache_find(w, answer->cache);
    if (!c) {
        sim_fail(sim, "session %u: answer %llu is about cache %u, which is not there", w->session,
                 (ull)answer->tag, answer->cache);
    }
    if (answer->length_count != c->row_count) {
        sim_fail(sim, "session %u: cache %u has %u rows, the answer %u", w->session, c->id,
                 c->row_count, answer->length_count);
    }
    for (uint32_t i = 0; i < c->row_count; i++) {
        while (w->liar && c->rows[i].length < answer->lengths[i]) {
            sim_row_append(&c->rows[i],
                           0); /* its steps end when it says so, and not when they do */
        }
        c->rows[i].length = w->liar ? answer->lengths[i] : c->rows[i].length;
        if (answer->lengths[i] != c->rows[i].length) {
            sim_fail(sim, "session %u: cache %u row %u has %u tokens, the answer says %u",
                     w->session, c->id, i, c->rows[i].length, answer->lengths[i]);
        }
    }
}

static void created(struct sim *sim, struct sim_worker *w, const struct sim_request *r,
                    const struct kvt_answer *answer) {
    struct sim_cache *c = sim_cache_find(w, 0);
    if (!c || answer->cache == 0 || sim_cache_find(w, answer->cache)) {
        sim_fail(sim, "session %u: cache %u was created", w->session, answer->cache);
    }
    if (answer->slots > KVT_SLOTS_MAX || answer->resident_layers > r->blank.layer_count) {
        sim_fail(sim, "session %u: cache %u has %u slots and %u resident layers", w->session,
                 answer->cache, answer->slots, answer->resident_layers);
    }
    *c = r->blank;
    c->id = answer->cache;
    c->slots = answer->slots;
    c->rows_created = c->row_count;
}

static void accepted(struct sim *sim, struct sim_worker *w, const struct sim_request *r,
                     const struct kvt_answer *answer) {
    struct sim_schedule *s = &w->schedule;
    switch (r->kind) {
    case KVT_REQUEST_CREATE:
        created(sim, w, r, answer);
        return;
    case KVT_REQUEST_ABORT:
        if (s->open && !w->liar) {
            sim_fail(sim, "session %u: an abort is answered before the schedule has ended",
                     w->session);
        }
        return;
    case KVT_REQUEST_ACQUIRE:
        if (w->liar && answer->first_step <= w->last_step) {
            return; /* open still, since it lied about its steps */
        }
        if (s->open && s->acquired && s->cache->id == r->cache) {
            bool same = answer->first_step == s->header.first_step &&
                        answer->ring_offset == s->ring_offset &&
                        answer->ring_bytes == s->header.bytes;
            if (!same && !w->liar) {
                sim_fail(sim, "session %u: ACQUIRE answers another schedule", w->session);
            }
            if (same) {
                return;
            }
        }
        if (r->layer != 0 && !w->liar) {
            sim_fail(sim, "session %u: ACQUIRE of layer %u opened a step", w->session, r->layer);
        }
        break;
    default:
        break;
    }
    if (s->open && w->liar) {
        sim_schedule_close(w); /* it may have told that it had stopped */
    }
    if (s->open && (s->cache->id == r->cache || r->kind == KVT_REQUEST_STEP)) {
        sim_fail(sim,
                 "session %u: request %llu of kind %u took effect while steps %llu to %llu of "
                 "the cache are open",
                 w->session, (ull)r->tag, r->kind, (ull)s->header.first_step, (ull)w->last_step);
    }
    if (r->kind == KVT_REQUEST_STEP || r->kind == KVT_REQUEST_ACQUIRE) {
        check_lengths(sim, w, answer);
        sim_schedule_open(sim, w, r, answer);
        return;
    }
    sim_model_edit(sim, w, r, answer);
    if (r->kind != KVT_REQUEST_CLOSE) {
        check_lengths(sim, w, answer);
    }
}

void sim_answer(struct sim *sim, const struct kvt_action *a) {
    struct sim_worker *w = sim_session(sim, a->session);
    const struct kvt_answer *answer = a->answer;
    if (!w->attached && w->unchecked) {
        return; /* evicted, then hung up: nobody to tell */
    }
    if (!w->attached) {
        sim_fail(sim, "an answer for session %u, which has hung up: %s", a->session, answer->text);
    }
    struct sim_request r = take_request(sim, w, answer);
    sim_hash(sim, answer->tag ^ (uint64_t)answer->code << 32 ^ answer->first_step << 40);
    sim_trace(sim, "session %u: answer %llu code %u cache %u %s", a->session, (ull)answer->tag,
              answer->code, answer->cache, answer->text);
    w->progress_us = w->turn_us = sim->now_us;
    if (sim->devices[w->device].lost && answer->code == 0 &&
        (r.kind == KVT_REQUEST_STEP || r.kind == KVT_REQUEST_CREATE)) {
        sim_fail(sim, "session %u: request %llu is accepted on a device that is lost", w->session,
                 (ull)r.tag);
    }
    if (w->unchecked) {
        return;
    }
    bool refuses = r.kind != KVT_REQUEST_ABORT && sim_model_refuses(w, &r);
    if (answer->code == 0) {
        if (refuses) {
            sim_fail(sim, "session %u: request %llu of kind %u is accepted, though it is invalid",
                     w->session, (ull)r.tag, r.kind);
        }
        accepted(sim, w, &r, answer);
        return;
    }
    if (answer->text[0] == 0 || !memchr(answer->text, 0, sizeof(answer->text))) {
        sim_fail(sim, "session %u: request %llu: code %u without a text", w->session, (ull)r.tag,
                 answer->code);
    }
    if (!refuses && r.kind != KVT_REQUEST_ABORT && !is_shortage(sim, answer->code, r.kind)) {
        sim_fail(sim, "session %u: request %llu of kind %u is refused, code %u: %s", w->session,
                 (ull)r.tag, r.kind, answer->code, answer->text);
    }
    if (r.kind == KVT_REQUEST_ABORT && answer->code == KVT_ENOMEM && w->schedule.open) {
        w->schedule.abort_from = 0; /* not taken in: the steps go on */
        w->schedule.aborted = false;
        sim_stream_resume(sim, w);
    }
    sim->stats.refused += !refuses;
}
