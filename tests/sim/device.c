/* A device: extents, the issuer with its copy thread, and copies that move real bytes, piece by
 * piece, at moments of their own between submission and completion. So a copy that is let go too
 * early, or memory that is used again too early, shows as wrong bytes. Besides, two copies in flight
 * that touch the same bytes, and are ordered by nothing, are a failure at once.
 */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

enum { CANARY_BYTES = 64, CANARY = 0xc7, POISON_GONE = 0xdd };

static void report(struct sim *sim, struct sim_device *d);

/* ---- extents --------------------------------------------------------------------------------- */

struct sim_extent *sim_extent_find(struct sim *sim, uint32_t id) {
    for (uint32_t i = 0; id != 0 && i < sim->extent_top; i++) {
        if (sim->extents[i].id == id) {
            return &sim->extents[i];
        }
    }
    return NULL;
}

static struct sim_extent *extent_entry(struct sim *sim) {
    for (uint32_t i = 0; i < sim->extent_top; i++) {
        if (sim->extents[i].id == 0) {
            return &sim->extents[i];
        }
    }
    if (sim->extent_top == SIM_EXTENTS_MAX) {
        sim_fail(sim, "more than %d extents", SIM_EXTENTS_MAX);
    }
    return &sim->extents[sim->extent_top++];
}

static void on_extent_created(struct sim *sim, void *object, uint64_t value) {
    struct sim_extent *x = sim_extent_find(sim, (uint32_t)value);
    bool refused = value >> 32;
    uint32_t id = x->id;
    if (refused) {
        sim->devices[x->device].extent_bytes -= x->bytes;
        *x = (struct sim_extent){0};
    } else {
        x->memory = sim_zeroed(x->bytes + CANARY_BYTES);
        memset(x->memory + x->bytes, CANARY, CANARY_BYTES);
        x->live = true;
    }
    sim_clock(sim);
    kvt_engine_extent_created(sim->engine, id, refused ? KVT_ENOMEM : 0);
    sim_actions(sim);
}

void sim_extent_create(struct sim *sim, const struct kvt_action *a) {
    sim_trace(sim, "device %u: extent %u, %llu bytes, session %u", a->device, a->extent,
              (unsigned long long)a->bytes, a->session);
    struct sim_device *d = &sim->devices[a->device];
    const struct kvt_engine_device *config = &sim->config.devices[a->device];
    if (a->extent == 0 || sim_extent_find(sim, a->extent) || a->bytes == 0 ||
        a->bytes % config->granule_bytes != 0) {
        sim_fail(sim, "extent %u of %llu bytes is not to be had", a->extent,
                 (unsigned long long)a->bytes);
    }
    *extent_entry(sim) = (struct sim_extent){
        .id = a->extent, .device = a->device, .session = a->session, .bytes = a->bytes};
    d->extent_bytes += a->bytes;
    if (d->extent_bytes > config->budget_bytes) {
        sim_fail(sim, "device %u: %llu bytes of extents, the budget is %llu", a->device,
                 (unsigned long long)d->extent_bytes, (unsigned long long)config->budget_bytes);
    }
    uint64_t delay_us =
        sim_fault(sim, SIM_EXTENT_DELAYED) ? sim_us(sim, 1000, 80000) : sim_us(sim, 5, 500);
    uint64_t refused = d->lost || sim_fault(sim, SIM_EXTENT_REFUSED);
    sim_after(sim, delay_us, on_extent_created, NULL, refused << 32 | a->extent);
}

static void extent_clear(struct sim *sim, struct sim_extent *x) {
    sim->devices[x->device].extent_bytes -= x->bytes;
    free(x->memory);
    *x = (struct sim_extent){0};
}

static void on_extent_destroyed(struct sim *sim, void *object, uint64_t value) {
    extent_clear(sim, sim_extent_find(sim, (uint32_t)value));
    sim_clock(sim);
    kvt_engine_extent_destroyed(sim->engine, (uint32_t)value);
    sim_actions(sim);
}

void sim_extent_destroy(struct sim *sim, const struct kvt_action *a) {
    sim_trace(sim, "device %u: extent %u is destroyed", a->device, a->extent);
    struct sim_extent *x = sim_extent_find(sim, a->extent);
    if (!x || !x->live || x->destroying) {
        sim_fail(sim, "extent %u is destroyed, which is not there", a->extent);
    }
    if (x->mapped) {
        sim_fail(sim, "extent %u is destroyed, which the worker of session %u has mapped",
                 a->extent, x->session);
    }
    struct kvt_place place = {.tier = KVT_TIER_GPU, .extent = x->id};
    sim_race_check(sim, &place, x->bytes, true, x->device, -1, "an extent is destroyed");
    for (uint32_t i = 0; i < CANARY_BYTES; i++) {
        if (x->memory[x->bytes + i] != CANARY) {
            sim_fail(sim, "extent %u: something was written behind its end", a->extent);
        }
    }
    x->destroying = true;
    memset(x->memory, POISON_GONE, x->bytes);
    sim_after(sim, sim_us(sim, 5, 2000), on_extent_destroyed, NULL, a->extent);
}

void sim_extents_unmap(struct sim *sim, const struct sim_worker *w) {
    for (uint32_t i = 0; i < sim->extent_top; i++) {
        if (sim->extents[i].mapped == w) {
            sim->extents[i].mapped = NULL;
        }
    }
}

/* ---- copies ---------------------------------------------------------------------------------- */

static uint8_t *place_at(struct sim *sim, const struct sim_device *d, uint32_t session,
                         const struct kvt_place *p, uint64_t bytes) {
    if (p->tier == KVT_TIER_HOST) {
        return sim_host_at(sim, p->offset, bytes, "copy");
    }
    struct sim_extent *x = p->tier == KVT_TIER_GPU ? sim_extent_find(sim, p->extent) : NULL;
    if (!x || !x->live || x->destroying || x->device != d->index || x->session != session) {
        sim_fail(sim, "session %u: a copy touches extent %u of tier %u, which is not its own",
                 session, p->extent, p->tier);
    }
    if (bytes > x->bytes || p->offset > x->bytes - bytes) {
        sim_fail(sim, "session %u: a copy touches [%llu, +%llu) of extent %u, which has %llu bytes",
                 session, (unsigned long long)p->offset, (unsigned long long)bytes, p->extent,
                 (unsigned long long)x->bytes);
    }
    return x->memory + p->offset;
}

static bool overlaps(const struct kvt_place *a, uint64_t a_bytes, const struct kvt_place *b,
                     uint64_t b_bytes) {
    return a->tier == b->tier && (a->tier == KVT_TIER_HOST || a->extent == b->extent) &&
           a->offset < b->offset + b_bytes && b->offset < a->offset + a_bytes;
}

/* A prefetch that is not used any more, or longer than what is used of it, may read what is being
 * written: so reads by fills are left to those who look at the bytes. */
static bool copy_is_fill(const struct kvt_copy *c) {
    return c->source.tier == KVT_TIER_HOST && c->target.tier == KVT_TIER_GPU;
}

static void race_check(struct sim *sim, const struct kvt_place *place, uint64_t bytes, bool writes,
                       uint32_t device, int skip_stream, const char *what, bool is_copy,
                       bool may_tear) {
    for (uint32_t n = 0; n < sim->config.device_count; n++) {
        for (uint32_t i = 0; i < 2 * SIM_INFLIGHT_MAX; i++) {
            const struct sim_copy *c = &sim->devices[n].copies[i];
            if (!c->used || (n == device && (int)c->stream == skip_stream)) {
                continue;
            }
            bool written = overlaps(place, bytes, &c->copy.target, c->copy.bytes);
            if (written && may_tear) {
                continue;
            }
            if (written || (writes && !(is_copy && copy_is_fill(&c->copy)) &&
                            overlaps(place, bytes, &c->copy.source, c->copy.bytes))) {
                sim_fail(
                    sim, "race: %s, while a copy of session %u %s tier %u extent %u [%llu, +%llu)",
                    what, c->session, written ? "writes" : "reads",
                    written ? c->copy.target.tier : c->copy.source.tier,
                    written ? c->copy.target.extent : c->copy.source.extent,
                    (unsigned long long)(written ? c->copy.target.offset : c->copy.source.offset),
                    (unsigned long long)c->copy.bytes);
            }
        }
    }
}

void sim_race_check(struct sim *sim, const struct kvt_place *place, uint64_t bytes, bool writes,
                    uint32_t device, int skip_stream, const char *what) {
    race_check(sim, place, bytes, writes, device, skip_stream, what, false, false);
}

/* Carries the copy on up to `until` bytes. */
static void copy_part(struct sim *sim, struct sim_device *d, struct sim_copy *c, uint64_t until) {
    if ((c->fails || c->tears) && until > c->fail_at) {
        until = c->fail_at;
    }
    if (until <= c->copied || d->lost) {
        return;
    }
    uint64_t bytes = until - c->copied;
    struct kvt_place source = c->copy.source;
    struct kvt_place target = c->copy.target;
    source.offset += c->copied;
    target.offset += c->copied;
    const uint8_t *from = place_at(sim, d, c->session, &source, bytes);
    memmove(place_at(sim, d, c->session, &target, bytes), from, bytes);
    c->copied = until;
    sim->stats.copied_bytes += bytes;
    struct sim_op *op = sim_order_find(sim, c->session, c->op);
    if (op) {
        op->copied_bytes += bytes;
    }
}

/* ---- a device that lies ---------------------------------------------------------------------- */

static bool lies(struct sim *sim, const struct sim_op *op, enum sim_lie lie, uint32_t kind) {
    if (sim->options.lie != lie || op->kind != kind || sim->lied || !sim_chance(&sim->random, 50)) {
        return false;
    }
    sim_trace(sim, "the device lies about operation %llu", (unsigned long long)op->id);
    sim->lied = true;
    return true;
}

/* Whether a schedule that is open, and goes on, names the fill: then a worker will look at it. */
static bool is_named(const struct sim *sim, uint32_t session, const struct sim_op *op) {
    const struct sim_worker *w = sim->sessions[session];
    const struct sim_schedule *s = &w->schedule;
    if (op->kind != KVT_OP_FILL || !s->open || s->failed != 0 || s->abort_from != 0) {
        return false;
    }
    for (uint32_t i = 0; i < s->header.pieces_count; i++) {
        const struct kvt_sched_piece *p = &s->pieces[i];
        if ((p->flags & KVT_PIECE_STREAMED) && p->slot == op->slot && p->ready == op->generation) {
            return true;
        }
    }
    return false;
}

static void on_copy(struct sim *sim, void *object, uint64_t tag) {
    struct sim_device *d = object;
    struct sim_copy *c = &d->copies[tag];
    uint64_t parts = c->parts_left--;
    if (parts > 1) {
        uint64_t left = c->copy.bytes - c->copied;
        copy_part(sim, d, c, c->copied + sim_below(&sim->random, left + 1));
        return;
    }
    copy_part(sim, d, c, c->copy.bytes);
    bool ok = !c->fails && !d->lost;
    c->used = false;
    struct sim_op *op = sim_order_find(sim, c->session, c->op);
    if (op && !ok) {
        op->failed = true;
    }
    if (op && ok &&
        (lies(sim, op, SIM_FLIPS_FILL, KVT_OP_FILL) ||
         lies(sim, op, SIM_FLIPS_WRITEBACK, KVT_OP_WRITEBACK) ||
         lies(sim, op, SIM_FLIPS_COPY, KVT_OP_COPY))) {
        uint8_t *to = place_at(sim, d, c->session, &c->copy.target, c->copy.bytes);
        to[sim_below(&sim->random, c->copy.bytes)] ^= (uint8_t)(1u << sim_below(&sim->random, 8));
        sim->lie_named = is_named(sim, c->session, op);
    }
    sim_hash(sim, tag << 1 | ok);
    kvt_issuer_copied(d->issuer, (uint32_t)tag, ok);
    report(sim, d);
    sim_device_look(sim, d->index);
}

static void copy_faults(struct sim *sim, const struct sim_device *d, struct sim_copy *c) {
    if (d->post_behind) {
        return; /* such a device reports errors as a lost device */
    }
    if (sim_fault(sim, SIM_COPY_FAILED)) {
        c->fails = true;
    } else if (sim_fault(sim, SIM_COPY_TORN)) {
        c->fails = true;
        c->fail_at = sim_below(&sim->random, c->copy.bytes);
    }
    if (c->fails && sim->sessions[c->session]) {
        sim->sessions[c->session]->counted = false;
    }
}

/* With post_behind a stream keeps its order; without, copies overtake each other. */
static void copy_begin(struct sim *sim, struct sim_device *d, const struct kvt_issue *issue) {
    struct sim_copy *c = &d->copies[issue->tag];
    if (issue->tag >= 2 * SIM_INFLIGHT_MAX || c->used) {
        sim_fail(sim, "the issuer gave a tag that is in use");
    }
    const struct kvt_copy *copy = &issue->copy;
    int ordered = d->post_behind ? (int)issue->stream : -1;
    place_at(sim, d, issue->session, &copy->source, copy->bytes);
    place_at(sim, d, issue->session, &copy->target, copy->bytes);
    race_check(sim, &copy->source, copy->bytes, false, d->index, ordered, "a copy reads", true,
               copy_is_fill(copy));
    race_check(sim, &copy->target, copy->bytes, true, d->index, ordered, "a copy writes", true,
               false);
    *c = (struct sim_copy){.used = true,
                           .session = issue->session,
                           .stream = issue->stream,
                           .op = issue->op,
                           .copy = *copy,
                           .parts_left = (uint32_t)sim_between(&sim->random, 1, 3)};
    copy_faults(sim, d, c);
    const struct sim_op *op = sim_order_find(sim, issue->session, issue->op);
    c->tears = !c->fails && lies(sim, op, SIM_TEARS_FILL, KVT_OP_FILL);
    if (c->tears) {
        c->fail_at = sim_below(&sim->random, copy->bytes);
    }
    uint64_t took_us =
        sim_fault(sim, SIM_COPY_DELAYED)
            ? sim_us(sim, 1000, 50000)
            : sim_us(sim, 5, 100) + copy->bytes / sim_between(&sim->random, 100, 2000);
    uint64_t from_us = sim->now_us;
    if (d->post_behind) {
        from_us = d->stream_us[issue->stream] > from_us ? d->stream_us[issue->stream] : from_us;
        d->stream_us[issue->stream] = from_us + took_us;
    }
    uint64_t wait_us = from_us - sim->now_us;
    uint64_t part_us[2] = {sim_us(sim, 0, took_us), sim_us(sim, 0, took_us)};
    for (uint32_t i = 0; i + 1 < c->parts_left; i++) {
        sim_after(sim, wait_us + part_us[i], on_copy, d, issue->tag);
    }
    sim_after(sim, wait_us + took_us, on_copy, d, issue->tag);
    sim->stats.copies++;
}

/* ---- the copy thread ------------------------------------------------------------------------- */

static void post(struct sim *sim, struct sim_worker *w, uint32_t slot, uint64_t value) {
    sim_trace(sim, "session %u: ready[%u] = %llu", w->session, slot, (unsigned long long)value);
    __atomic_store_n(&w->page->ready[slot].value, value, __ATOMIC_RELEASE);
    sim_worker_ready(sim, w, slot, value);
}

/* A post behind the copies of its stream. */
struct late_post {
    struct sim_worker *w;
    uint32_t slot;
    uint32_t tag;
    uint64_t value;
};

static void on_post(struct sim *sim, void *object, uint64_t device) {
    struct sim_device *d = &sim->devices[device];
    struct late_post p = *(struct late_post *)object;
    free(object);
    if (p.w->freed) {
        sim_fail(sim, "a post for session %u, which is freed", p.w->session);
    }
    post(sim, p.w, p.slot, p.value);
    kvt_issuer_copied(d->issuer, p.tag, true);
    report(sim, d);
    sim_device_look(sim, d->index);
}

static void post_issue(struct sim *sim, struct sim_device *d, const struct kvt_issue *issue) {
    struct sim_worker *w = sim->sessions[issue->session];
    if (!w || issue->slot >= KVT_SLOTS_MAX) {
        sim_fail(sim, "a post for session %u, which is not there", issue->session);
    }
    if (!d->post_behind) {
        post(sim, w, issue->slot, issue->value);
        return;
    }
    struct late_post *late = sim_zeroed(sizeof(*late));
    *late =
        (struct late_post){.w = w, .slot = issue->slot, .tag = issue->tag, .value = issue->value};
    uint64_t at_us = d->stream_us[0] > sim->now_us ? d->stream_us[0] : sim->now_us;
    d->stream_us[0] = at_us;
    sim_after(sim, at_us - sim->now_us, on_post, late, d->index);
}

static void on_look(struct sim *sim, void *object, uint64_t value) {
    struct sim_device *d = object;
    d->pump_due = false;
    struct kvt_issue issue;
    uint64_t most = sim_us(sim, 1, 12);
    while (kvt_issuer_next(d->issuer, &issue)) {
        sim_hash(sim, (uint64_t)issue.session << 32 ^ issue.is_post << 8 ^ issue.slot);
        sim_hash(sim, issue.value ^ issue.copy.source.offset ^ issue.copy.target.offset << 20);
        report(sim, d);
        if (issue.is_post) {
            post_issue(sim, d, &issue);
        } else {
            sim_order_issue(sim, d->index, &issue);
            copy_begin(sim, d, &issue);
        }
        if (--most == 0) {
            sim_device_look(sim, d->index);
            break;
        }
    }
    report(sim, d);
}

void sim_device_look(struct sim *sim, uint32_t index) {
    struct sim_device *d = &sim->devices[index];
    if (!d->pump_due) {
        d->pump_due = true;
        sim_after(sim, sim_us(sim, 0, 30), on_look, d, 0);
    }
}

static void mail_open_one(struct sim *sim, struct sim_device *d, const struct sim_mail *m) {
    switch (m->kind) {
    case KVT_ACTION_PROGRAM:
        sim_order_program(sim, m->program);
        kvt_issuer_submit(d->issuer, m->program);
        break;
    case KVT_ACTION_CANCEL:
        kvt_issuer_cancel(d->issuer, m->session, m->value);
        break;
    case KVT_ACTION_SESSION_OPEN:
        kvt_issuer_session_open(d->issuer, m->session, sim->sessions[m->session]->page);
        break;
    default:
        sim->ops[m->session].closed = true;
        kvt_issuer_session_close(d->issuer, m->session);
    }
}

static void on_mail(struct sim *sim, void *object, uint64_t value) {
    struct sim_device *d = object;
    d->mail_due = false;
    for (uint32_t i = 0; i < d->mail_count; i++) {
        mail_open_one(sim, d, &d->mail[i]);
    }
    d->mail_count = 0;
    sim_device_look(sim, d->index);
    report(sim, d);
}

static void hash_program(struct sim *sim, const struct kvt_program *p) {
    for (uint32_t i = 0; i < p->op_count; i++) {
        const struct kvt_op *op = &p->ops[i];
        sim_hash(sim, op->id ^ (uint64_t)op->kind << 40 ^ (uint64_t)op->slot << 48);
        sim_hash(sim, op->generation ^ op->done_wait << 20 ^ op->step_wait << 40);
        sim_trace(sim, "session %u: op %llu kind %u slot %u generation %llu after %llu, %u deps",
                  p->session, (unsigned long long)op->id, op->kind, op->slot,
                  (unsigned long long)op->generation,
                  (unsigned long long)(op->kind == KVT_OP_STEP ? op->step_wait : op->done_wait),
                  op->dep_count);
    }
}

void sim_device_mail(struct sim *sim, const struct kvt_action *a) {
    struct sim_device *d = &sim->devices[a->device];
    if (d->mail_count == d->mail_room) {
        d->mail_room = d->mail_room == 0 ? 16 : d->mail_room * 2;
        d->mail = sim_grow(d->mail, d->mail_room * sizeof(*d->mail));
    }
    d->mail[d->mail_count++] = (struct sim_mail){
        .kind = a->kind, .session = a->session, .value = a->value, .program = a->program};
    if (a->kind == KVT_ACTION_PROGRAM) {
        d->mail[d->mail_count - 1].session = a->program->session;
        hash_program(sim, a->program);
    } else {
        sim_trace(sim, "session %u: issuer action %u value %llu", a->session, a->kind,
                  (unsigned long long)a->value);
    }
    if (!d->mail_due) {
        d->mail_due = true;
        sim_after(sim, sim_us(sim, 0, 60), on_mail, d, 0);
    }
}

/* ---- reports to the loop --------------------------------------------------------------------- */

static void on_report(struct sim *sim, void *object, uint64_t value) {
    struct sim_device *d = object;
    d->report_due = false;
    uint32_t count = d->report_count;
    struct sim_report *reports = d->reports;
    d->reports = NULL;
    d->report_count = d->report_room = 0;
    for (uint32_t i = 0; i < count; i++) {
        const struct sim_report *r = &reports[i];
        sim_clock(sim);
        sim_hash(sim, r->completion.op << 8 ^ r->completion.status ^ r->session << 16);
        if (r->drained) {
            sim_trace(sim, "session %u: drained", r->session);
            kvt_engine_session_drained(sim->engine, r->session);
        } else {
            sim_trace(sim, "session %u: op %llu completes, status %u, %llu bytes",
                      r->completion.session, (unsigned long long)r->completion.op,
                      r->completion.status, (unsigned long long)r->completion.bytes);
            struct sim_worker *w = sim->sessions[r->completion.session];
            if (w && w->steady_requests >= 3 && r->completion.op <= w->prompt_op_last) {
                w->vain_before += r->guessed_bytes; /* it was slow to come */
            }
            kvt_engine_completion(sim->engine, &r->completion);
        }
        sim_actions(sim);
    }
    free(reports);
}

static void report_add(struct sim_device *d, struct sim_report r) {
    if (d->report_count == d->report_room) {
        d->report_room = d->report_room == 0 ? 16 : d->report_room * 2;
        d->reports = sim_grow(d->reports, d->report_room * sizeof(*d->reports));
    }
    d->reports[d->report_count++] = r;
}

static void report(struct sim *sim, struct sim_device *d) {
    struct sim_report r = {.drained = false};
    while (kvt_issuer_completion(d->issuer, &r.completion)) {
        r.guessed_bytes = sim_order_completion(sim, &r.completion);
        report_add(d, r);
    }
    r.drained = true;
    while (kvt_issuer_session_drained(d->issuer, &r.session)) {
        report_add(d, r);
    }
    if (d->report_count > 0 && !d->report_due) {
        d->report_due = true;
        sim_after(sim, sim_us(sim, 0, 80), on_report, d, 0);
    }
}

/* ---- life ------------------------------------------------------------------------------------ */

void sim_device_open(struct sim *sim, uint32_t index, bool post_behind) {
    struct sim_device *d = &sim->devices[index];
    struct sim_random *r = &sim->random;
    *d = (struct sim_device){.index = index, .post_behind = post_behind};
    struct kvt_issuer_config config = {
        .sessions_max = sim->config.sessions_max,
        .inflight_max = (uint32_t)sim_between(r, 1, SIM_INFLIGHT_MAX),
        .cut_bytes = sim_chance(r, 500) ? 1024 * sim_between(r, 1, 64) : 1 << 24,
        .quantum_bytes = 1024 * sim_between(r, 1, 64),
        .inflight_bytes = sim_chance(r, 500) ? 1024 * sim_between(r, 1, 32) : 0,
        .post_behind = post_behind,
    };
    d->quantum_bytes = config.quantum_bytes;
    d->inflight_bytes = config.inflight_bytes;
    if (kvt_issuer_create(&config, &d->issuer) != 0) {
        sim_fail(sim, "no issuer");
    }
    kvt_issuer_break_rules(d->issuer, sim->options.broken_rules);
}

void sim_device_close(struct sim *sim, uint32_t index) {
    struct sim_device *d = &sim->devices[index];
    kvt_issuer_free(d->issuer);
    free(d->mail);
    free(d->reports);
    for (uint32_t i = 0; i < sim->extent_top; i++) {
        if (sim->extents[i].id != 0 && sim->extents[i].device == index) {
            extent_clear(sim, &sim->extents[i]);
        }
    }
}

/* Every copy fails from now on, and the engine is told. */
void sim_device_lose(struct sim *sim, uint32_t index) {
    sim_trace(sim, "device %u is lost", index);
    sim->devices[index].lost = true;
    for (uint32_t i = 0; i < sim->process_count; i++) {
        if (sim->processes[i] && sim->processes[i]->device == index) {
            sim->processes[i]->unchecked = true;
        }
    }
    kvt_engine_device_lost(sim->engine, index);
    sim_actions(sim);
}
