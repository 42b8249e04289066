#include "daemon/actions.h"
#include "daemon/daemon.h"
#include "daemon/dispatch.h"
#include "daemon/packet.h"
#include "tiers/engine/assert.h"

#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- the control page ------------------------------------------------------------------------------ */

/* Stores behind everything that was written before, and wakes who sleeps. `waiters` is the worker's
 * word: a wrong one costs a system call, or the worker's own wake-up. */
static void store(struct kvt_counter *c, uint64_t value) {
    __atomic_store_n(&c->value, value, __ATOMIC_RELEASE);
    (void)__atomic_add_fetch(&c->wake, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&c->waiters, __ATOMIC_SEQ_CST) != 0) {
        (void)syscall(SYS_futex, &c->wake, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

static void committed(struct kvt_session *s, uint64_t step) {
    struct kvt_session_info info;
    uint32_t at = (uint32_t)s->engine;
    if (kvt_engine_session_info(s->daemon->engine, &at, &info) &&
        info.session == (uint32_t)s->engine) { /* it is not gone since */
        kvt_pace_committed(&s->pace, kvt_now_ns(), info.counters.to_device_bytes,
                           info.counters.from_device_bytes);
    }
    store(&s->page->committed, step);
}

/* ---- extents ---------------------------------------------------------------------------------------- */

static void send_extent(struct kvt_daemon *d, struct kvt_session *s, uint32_t extent) {
    struct kvt_extent_entry *e = kvt_tiers_extent(&d->tiers, extent);
    KVT_ASSERT(e != NULL);
    KVT_ASSERT(!e->out);
    KVT_ASSERT(e->session == s->id);
    if (s->phase != KVT_PHASE_OPEN) {
        return;
    }
    struct kvt_attach_extent packet = {
        .head = kvt_attach_head_make(KVT_ATTACH_EXTENT, sizeof(packet)),
        .session = s->id,
        .extent = extent,
        .kind = e->exported.kind,
        .bytes = e->bytes,
    };
    memcpy(packet.handle, e->exported.handle, sizeof(packet.handle));
    int fd = e->exported.fd;
    e->exported.fd = -1;
    e->out = true;
    kvt_session_send_extent(s, &packet, fd);
}

static void create_extent(struct kvt_daemon *d, const struct kvt_action *a) {
    const struct kvt_session *s = kvt_session_by_engine(&d->sessions, a->session);
    KVT_ASSERT(s != NULL);
    kvt_tiers_extent_expect(&d->tiers, a->extent, s->id, a->bytes);
    struct kvt_device_command c = {
        .kind = KVT_DEVICE_EXTENT_CREATE, .extent = a->extent, .bytes = a->bytes};
    kvt_tiers_command(&d->tiers, a->device, &c);
}

static void destroy_extent(struct kvt_daemon *d, const struct kvt_action *a) {
    struct kvt_device_command c = {.kind = KVT_DEVICE_EXTENT_DESTROY, .extent = a->extent};
    kvt_tiers_extent_forget(&d->tiers, a->extent);
    kvt_tiers_command(&d->tiers, a->device, &c);
}

/* ---- the others -------------------------------------------------------------------------------------- */

static void tell_device(struct kvt_daemon *d, const struct kvt_action *a, struct kvt_session *s) {
    struct kvt_device_command c = {.session = a->session, .value = a->value, .program = a->program};
    switch (a->kind) {
    case KVT_ACTION_PROGRAM:
        c.kind = KVT_DEVICE_PROGRAM;
        break;
    case KVT_ACTION_CANCEL:
        c.kind = KVT_DEVICE_CANCEL;
        break;
    case KVT_ACTION_SESSION_OPEN:
        c.kind = KVT_DEVICE_SESSION_OPEN;
        c.page = s->page;
        break;
    default:
        KVT_ASSERT(a->kind == KVT_ACTION_SESSION_CLOSE);
        c.kind = KVT_DEVICE_SESSION_CLOSE;
        d->tiers.sessions_draining++;
        break;
    }
    kvt_tiers_command(&d->tiers, a->device, &c);
}

void kvt_action_carry_out(struct kvt_daemon *d, const struct kvt_action *a) {
    struct kvt_session *s = kvt_session_by_engine(&d->sessions, a->session);
    switch (a->kind) {
    case KVT_ACTION_ANSWER:
        KVT_ASSERT(s != NULL);
        kvt_dispatch_answer(s, a->answer);
        break;
    case KVT_ACTION_PROGRAM:
    case KVT_ACTION_CANCEL:
    case KVT_ACTION_SESSION_OPEN:
    case KVT_ACTION_SESSION_CLOSE:
        KVT_ASSERT(s != NULL);
        tell_device(d, a, s);
        break;
    case KVT_ACTION_SESSION_FREED:
        KVT_ASSERT(s != NULL);
        kvt_session_freed(s);
        break;
    case KVT_ACTION_EXTENT_CREATE:
        create_extent(d, a);
        break;
    case KVT_ACTION_EXTENT_SEND:
        KVT_ASSERT(s != NULL);
        send_extent(d, s, a->extent);
        break;
    case KVT_ACTION_EXTENT_RECLAIM:
        KVT_ASSERT(s != NULL);
        kvt_session_send_reclaim(s, a->extent, a->value != 0);
        break;
    case KVT_ACTION_EXTENT_DESTROY:
        destroy_extent(d, a);
        break;
    case KVT_ACTION_HOST_GROW:
        kvt_tiers_host_grow(&d->tiers, a->offset, a->bytes);
        break;
    case KVT_ACTION_HOST_SHRINK:
        kvt_tiers_host_shrink(&d->tiers, a->offset, a->bytes);
        break;
    case KVT_ACTION_POST_READY:
        KVT_ASSERT(s != NULL);
        KVT_ASSERT(a->slot < KVT_SLOTS_MAX);
        store(&s->page->ready[a->slot], a->value);
        break;
    case KVT_ACTION_POST_COMMITTED:
        KVT_ASSERT(s != NULL);
        committed(s, a->value);
        break;
    case KVT_ACTION_POST_FAILED:
        KVT_ASSERT(s != NULL);
        __atomic_store_n(&s->page->failed.aux, a->code, __ATOMIC_RELEASE);
        store(&s->page->failed, a->value);
        break;
    default:
        KVT_ASSERT(false);
    }
}
