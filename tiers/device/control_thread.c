/* The control thread: the driver's calls that may block. See device_internal.h.
 *
 * Everything that it takes leads to at most one event, so it takes something only while there is
 * room for one: it may wait for the loop, and nobody waits for it.
 */
#include "tiers/device/device_internal.h"

#include "proto/errors.h"
#include "tiers/engine/assert.h"

#include <stdio.h>

static void emit(struct kvt_device *d, const struct kvt_device_event *e) {
    bool pushed = kvt_queue_push(d->events, e);
    KVT_ASSERT(pushed);
    kvt_device_notify(d);
}

static void answer_page(struct kvt_device *d, uint32_t session, int code) {
    bool pushed =
        kvt_queue_push(d->answers, &(struct kvt_page_answer){.session = session, .code = code});
    KVT_ASSERT(pushed); /* sized for one a session */
    kvt_device_wake_copy_thread(d);
}

static void answer_ask(struct kvt_device *d, const struct kvt_ask *ask) {
    struct kvt_device_event e = {.session = ask->session, .exported.fd = -1};
    char why[KVT_TEXT_BYTES] = "";
    switch (ask->kind) {
    case KVT_ASK_PAGE_ADD:
        e.code = d->ops->page_added(d->driver, ask->session, ask->page, e.text);
        answer_page(d, ask->session, e.code);
        if (e.code == 0) {
            return;
        }
        e.kind = KVT_DEVICE_SESSION_FAILED;
        break;
    case KVT_ASK_PAGE_REMOVE:
        if (!ask->failed) {
            d->ops->page_removed(d->driver, ask->session);
        }
        e.kind = KVT_DEVICE_DRAINED;
        break;
    case KVT_ASK_LOST:
        e.kind = KVT_DEVICE_LOST;
        e.code = ask->code;
        if (d->ops->explain) {
            d->ops->explain(d->driver, why);
        }
        snprintf(e.text, sizeof(e.text), "%s failed: %s%s%.300s", ask->what,
                 kvt_error_text(ask->code), why[0] ? ": " : "", why);
        break;
    default:
        KVT_ASSERT(!"a known question");
    }
    emit(d, &e);
}

/* No copy is in flight: there is no extent yet, and this thread makes them. */
static void measure(struct kvt_device *d, struct kvt_device_event *e) {
    if (!d->ops->measure) {
        return;
    }
    e->code = d->ops->measure(d->driver, &e->link, e->text);
    if (e->code == 0) {
        kvt_speed_start(&d->speed_to, e->link.to_bytes_per_s);
        kvt_speed_start(&d->speed_from, e->link.from_bytes_per_s);
    }
}

static void carry_out(struct kvt_device *d, const struct kvt_device_command *c) {
    struct kvt_device_event e = {.extent = c->extent, .bytes = c->bytes, .exported.fd = -1};
    switch (c->kind) {
    case KVT_DEVICE_EXTENT_CREATE:
        e.kind = KVT_DEVICE_EXTENT_CREATED;
        e.code = d->ops->extent_create(d->driver, c->extent, c->bytes, &e.exported, e.text);
        break;
    case KVT_DEVICE_EXTENT_DESTROY:
        e.kind = KVT_DEVICE_EXTENT_DESTROYED;
        e.code = d->ops->extent_destroy(d->driver, c->extent, e.text);
        break;
    case KVT_DEVICE_MEASURE:
        e.kind = KVT_DEVICE_MEASURED;
        measure(d, &e);
        break;
    default:
        KVT_ASSERT(!"a command of the control thread");
    }
    emit(d, &e);
}

static bool take_one(struct kvt_device *d) {
    struct kvt_ask ask;
    struct kvt_device_command c;
    if (!kvt_device_room(d->events, &d->events_full)) {
        return false;
    }
    if (kvt_queue_pop(d->asks, &ask)) {
        answer_ask(d, &ask);
        return true;
    }
    if (kvt_queue_pop(d->control_commands, &c)) {
        carry_out(d, &c);
        return true;
    }
    return false;
}

void *kvt_device_control_thread(void *argument) {
    struct kvt_device *d = argument;
    while (!kvt_device_stopping(d)) {
        uint32_t seen = kvt_bell_rings(&d->control_bell);
        if (!take_one(d) && !kvt_device_stopping(d)) {
            kvt_bell_wait(&d->control_bell, seen, KVT_FUTEX_FOREVER);
        }
    }
    return NULL;
}
