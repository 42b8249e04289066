/* The copy thread: owns the issuer, is the only one that submits to the driver, and never waits for
 * anyone but in `sleep_until_something`. See device_internal.h.
 *
 * It sleeps only after it has looked at everything once more with what it will sleep on already
 * noted: the counters' wake words, and the bell's rings.
 */
#include "tiers/device/device_internal.h"

#include "proto/errors.h"
#include "tiers/engine/assert.h"

#include <sys/prctl.h>
#include <time.h>

enum { POLL_MAX = 64, WATCHED_MAX = 256 };
enum { TELL_NS = 20000 };
/* A worker that stores without waking harms itself only; so this bounds its delay, no more. */
enum { SLEEP_US = 100000 };
/* Drivers that cannot sleep on counters: the pause grows with the time in which nothing happened. */
enum { PAUSE_US_MIN = 10, PAUSE_US_MAX = 1000, PAUSE_GROWTH = 16 };

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void ask_control(struct kvt_device *d, const struct kvt_ask *ask) {
    bool pushed = kvt_queue_push(d->asks, ask);
    KVT_ASSERT(pushed); /* sized for one a session */
    kvt_bell_ring(&d->control_bell, 1);
}

/* ---- copies and posts in flight -------------------------------------------------------------- */

static struct kvt_speed *speed_of(struct kvt_device *d, const struct kvt_copy *c) {
    bool from_device = c->source.tier == KVT_TIER_GPU;
    bool to_device = c->target.tier == KVT_TIER_GPU;
    if (c->bytes < KVT_SPEED_BYTES_MIN || from_device == to_device) {
        return NULL;
    }
    return to_device ? &d->speed_to : &d->speed_from;
}

static void flight_begin(struct kvt_device *d, uint32_t tag, struct kvt_device_flight flight) {
    KVT_ASSERT(tag < KVT_DRIVER_TAGS_MAX);
    struct kvt_device_flight *f = &d->flights[tag];
    KVT_ASSERT(!f->used);
    *f = flight;
    f->used = true;
    if (f->speed) {
        f->sample = kvt_speed_begin(f->speed, now_ns());
    }
    d->in_flight++;
}

static void flight_end(struct kvt_device *d, uint32_t tag, bool ok) {
    KVT_ASSERT(tag < KVT_DRIVER_TAGS_MAX);
    struct kvt_device_flight *f = &d->flights[tag];
    KVT_ASSERT(f->used);
    if (f->speed) {
        kvt_speed_end(f->speed, f->sample, ok ? f->bytes : 0, now_ns());
    }
    f->used = false;
    d->in_flight--;
    kvt_issuer_copied(d->issuer, tag, ok);
}

/* The device is gone: what is in flight fails, and whatever comes fails at once. */
static void lose(struct kvt_device *d, int code, const char *what) {
    if (d->lost) {
        return;
    }
    d->lost = true;
    for (uint32_t tag = 0; tag < KVT_DRIVER_TAGS_MAX; tag++) {
        if (d->flights[tag].used) {
            flight_end(d, tag, false);
        }
    }
    ask_control(d, &(struct kvt_ask){.kind = KVT_ASK_LOST, .code = code, .what = what});
}

static bool collect(struct kvt_device *d) {
    uint32_t tags[POLL_MAX];
    bool ok[POLL_MAX];
    if (d->in_flight == 0) {
        return false;
    }
    int count = d->ops->poll(d->driver, tags, ok, POLL_MAX);
    if (count < 0) {
        lose(d, count, "copying");
        return true;
    }
    for (int i = 0; i < count; i++) {
        flight_end(d, tags[i], ok[i]);
    }
    return count > 0;
}

static void submit_copy(struct kvt_device *d, const struct kvt_issue *issue) {
    KVT_ASSERT(issue->copy.bytes > 0);
    flight_begin(d, issue->tag,
                 (struct kvt_device_flight){.bytes = issue->copy.bytes,
                                            .speed = speed_of(d, &issue->copy)});
    if (d->lost || d->sessions[issue->session].failed) {
        flight_end(d, issue->tag, false);
        return;
    }
    int rc = d->ops->copy(d->driver, issue->stream, &issue->copy, issue->tag);
    if (rc == -KVT_EDEVICE) {
        lose(d, rc, "submitting a copy");
    } else if (rc != 0) {
        flight_end(d, issue->tag, false);
    } else if (!d->info.post_behind) {
        collect(d); /* a small one may be complete already, and its post is waited for */
    }
}

/* One that is done behind copies is in flight like them: the session is not drained before. */
static void submit_post(struct kvt_device *d, const struct kvt_issue *issue) {
    bool behind = d->info.post_behind;
    if (behind) {
        flight_begin(d, issue->tag, (struct kvt_device_flight){.bytes = 0});
    }
    if (d->lost || d->sessions[issue->session].failed) {
        if (behind) {
            flight_end(d, issue->tag, false);
        }
        return;
    }
    int rc = d->ops->post(d->driver, issue->stream, issue->session, issue->slot, issue->value,
                          issue->tag);
    if (rc != 0) {
        lose(d, rc, "posting");
    }
}

static bool submit(struct kvt_device *d) {
    struct kvt_issue issue;
    bool any = false;
    while (kvt_issuer_next(d->issuer, &issue)) {
        any = true;
        if (issue.is_post) {
            submit_post(d, &issue);
        } else {
            submit_copy(d, &issue);
        }
    }
    return any;
}

/* ---- commands and sessions ------------------------------------------------------------------- */

static void apply(struct kvt_device *d, const struct kvt_device_command *c) {
    struct kvt_device_session *s = &d->sessions[c->session];
    KVT_ASSERT(s->state == KVT_DEVICE_SESSION_OPENED);
    switch (c->kind) {
    case KVT_DEVICE_PROGRAM:
        kvt_issuer_submit(d->issuer, c->program);
        return;
    case KVT_DEVICE_CANCEL:
        kvt_issuer_cancel(d->issuer, c->session, c->value);
        return;
    case KVT_DEVICE_SESSION_CLOSE:
        s->state = KVT_DEVICE_SESSION_CLOSING;
        kvt_issuer_session_close(d->issuer, c->session);
        return;
    default:
        KVT_ASSERT(!"a command of the copy thread");
    }
}

static void take_command(struct kvt_device *d, const struct kvt_device_command *c) {
    struct kvt_device_session *s = &d->sessions[c->session];
    if (c->kind == KVT_DEVICE_SESSION_OPEN) {
        KVT_ASSERT(s->state == KVT_DEVICE_SESSION_CLOSED);
        KVT_ASSERT(c->page != NULL);
        *s = (struct kvt_device_session){.state = KVT_DEVICE_SESSION_OPENING, .page = c->page};
        ask_control(
            d, &(struct kvt_ask){.kind = KVT_ASK_PAGE_ADD, .session = c->session, .page = c->page});
    } else if (s->state == KVT_DEVICE_SESSION_OPENING) {
        d->held[d->held_count++] = *c;
    } else {
        apply(d, c);
    }
}

/* While too much is held for pages that are being registered, the rest stays in its queue. */
static bool take_commands(struct kvt_device *d) {
    struct kvt_device_command c;
    bool any = false;
    while (d->held_count < KVT_HELD_MAX && kvt_queue_pop(d->commands, &c)) {
        take_command(d, &c);
        any = true;
    }
    return any;
}

static void page_answered(struct kvt_device *d, const struct kvt_page_answer *a) {
    struct kvt_device_session *s = &d->sessions[a->session];
    KVT_ASSERT(s->state == KVT_DEVICE_SESSION_OPENING);
    s->state = KVT_DEVICE_SESSION_OPENED;
    s->failed = a->code != 0;
    kvt_issuer_session_open(d->issuer, a->session, s->page);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < d->held_count; i++) {
        if (d->held[i].session == a->session) {
            apply(d, &d->held[i]);
        } else {
            d->held[kept++] = d->held[i];
        }
    }
    d->held_count = kept;
}

static bool take_answers(struct kvt_device *d) {
    struct kvt_page_answer a;
    bool any = false;
    while (kvt_queue_pop(d->answers, &a)) {
        page_answered(d, &a);
        any = true;
    }
    return any;
}

/* ---- towards the loop ------------------------------------------------------------------------ */

/* The loop is told of events before the thread sleeps, and while it does not: when an operation
 * without bytes is among them (the end of a step, which somebody waits for), or when the first was
 * TELL_NS ago. One system call for many, and none while a worker is answered. */
static void tell_loop(struct kvt_device *d) {
    if (d->untold_since_ns != 0) {
        d->untold_since_ns = 0;
        d->untold_hurry = false;
        kvt_device_notify(d);
    }
}

static void untold(struct kvt_device *d, bool hurry) {
    d->untold_since_ns = d->untold_since_ns ? d->untold_since_ns : now_ns();
    d->untold_hurry |= hurry;
}

static bool deliver(struct kvt_device *d) {
    struct kvt_completion c;
    uint32_t session;
    bool any = false;
    while (kvt_device_room(d->completions, &d->completions_full) &&
           kvt_issuer_completion(d->issuer, &c)) {
        any = kvt_queue_push(d->completions, &c);
        KVT_ASSERT(any);
        untold(d, c.bytes == 0);
    }
    while (kvt_issuer_session_drained(d->issuer, &session)) {
        struct kvt_device_session *s = &d->sessions[session];
        KVT_ASSERT(s->state == KVT_DEVICE_SESSION_CLOSING);
        s->state = KVT_DEVICE_SESSION_CLOSED;
        ask_control(d, &(struct kvt_ask){
                           .kind = KVT_ASK_PAGE_REMOVE, .session = session, .failed = s->failed});
        any = true;
    }
    return any;
}

/* ---- the loop of the thread ------------------------------------------------------------------ */

/* Looks at everything once. Returns whether anything was there. */
static bool look(struct kvt_device *d) {
    bool any = take_commands(d);
    any |= take_answers(d);
    any |= collect(d);
    any |= submit(d);
    any |= deliver(d);
    return any;
}

/* `idle_ns`: how long nothing has happened. Returns whether the last look found something. */
static bool sleep_until_something(struct kvt_device *d, uint64_t idle_ns) {
    const struct kvt_counter *watched[WATCHED_MAX];
    uint32_t seen[WATCHED_MAX];
    bool in_driver = d->info.can_sleep && !d->lost;
    uint32_t rings = kvt_bell_rings(&d->copy_bell);
    /* Noted before the look: a worker's store rings no bell, and one behind the look would make it seem
     * that nobody is waited for. */
    bool waits = kvt_issuer_waits_for_worker(d->issuer);
    uint32_t count = 0;
    if (in_driver) {
        count = kvt_issuer_watched(d->issuer, watched, WATCHED_MAX);
        count = count < WATCHED_MAX ? count : WATCHED_MAX;
        for (uint32_t i = 0; i < count; i++) {
            seen[i] = __atomic_load_n(&watched[i]->wake, __ATOMIC_SEQ_CST);
        }
    }
    bool any = look(d);
    tell_loop(d);
    if (any || kvt_device_stopping(d)) {
        return any;
    }
    if (in_driver) {
        d->ops->wait(d->driver, watched, seen, count, waits ? SLEEP_US : KVT_FUTEX_FOREVER);
        return false;
    }
    uint32_t timeout_us = KVT_FUTEX_FOREVER;
    if (waits || d->in_flight > 0) {
        uint64_t pause_us = idle_ns / 1000 / PAUSE_GROWTH;
        pause_us = pause_us > PAUSE_US_MIN ? pause_us : PAUSE_US_MIN;
        timeout_us = (uint32_t)(pause_us < PAUSE_US_MAX ? pause_us : PAUSE_US_MAX);
    }
    kvt_bell_wait(&d->copy_bell, rings, timeout_us);
    return false;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

void *kvt_device_copy_thread(void *argument) {
    struct kvt_device *d = argument;
    uint64_t spin_ns = d->config.spin_us * UINT64_C(1000);
    uint64_t idle_since_ns = 0;           /* 0: something has just happened */
    (void)prctl(PR_SET_TIMERSLACK, 1000); /* ns: short sleeps shall be short */
    while (!kvt_device_stopping(d)) {
        bool any = look(d);
        uint64_t now = any && d->untold_since_ns == 0 ? 0 : now_ns();
        if (d->untold_hurry || (d->untold_since_ns != 0 && now - d->untold_since_ns >= TELL_NS)) {
            tell_loop(d);
        }
        if (any) {
            idle_since_ns = 0;
            continue;
        }
        idle_since_ns = idle_since_ns ? idle_since_ns : now;
        bool spins =
            kvt_issuer_waits_for_worker(d->issuer) || (d->in_flight > 0 && !d->info.can_sleep);
        if (spins && now - idle_since_ns < spin_ns) {
            relax();
            continue;
        }
        if (sleep_until_something(d, now - idle_since_ns)) {
            idle_since_ns = 0;
        }
    }
    return NULL;
}
