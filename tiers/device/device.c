/* A device as the daemon's loop uses it: start, stop, and the loop's ends of the queues. The
 * threads and what they hand to one another are in device_internal.h.
 */
#include "tiers/device/device.h"

#include "proto/errors.h"
#include "tiers/device/device_internal.h"
#include "tiers/engine/assert.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

void kvt_device_wake_copy_thread(struct kvt_device *d) {
    if (d->info.can_sleep) {
        d->ops->wake(d->driver);
    }
    kvt_bell_ring(&d->copy_bell, 1); /* a lost device does not sleep in its driver */
}

void kvt_device_notify(const struct kvt_device *d) {
    uint64_t one = 1;
    ssize_t written = write(d->config.notify_fd, &one, sizeof(one));
    (void)written; /* it fails only at its maximum, and then it is readable anyhow */
}

/* ---- start and stop -------------------------------------------------------------------------- */

static int create_queues(struct kvt_device *d) {
    uint32_t sessions_max = d->config.issuer.sessions_max;
    const struct {
        struct kvt_queue **queue;
        uint32_t message_bytes;
        uint32_t capacity;
    } wanted[] = {
        {&d->commands, sizeof(struct kvt_device_command), KVT_COMMANDS_MAX},
        {&d->control_commands, sizeof(struct kvt_device_command), KVT_COMMANDS_MAX},
        {&d->completions, sizeof(struct kvt_completion), KVT_COMPLETIONS_MAX},
        {&d->events, sizeof(struct kvt_device_event), KVT_EVENTS_MAX},
        {&d->asks, sizeof(struct kvt_ask), sessions_max + 1},
        {&d->answers, sizeof(struct kvt_page_answer), sessions_max},
    };
    for (unsigned i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        if (kvt_queue_create(wanted[i].message_bytes, wanted[i].capacity, wanted[i].queue) != 0) {
            return -KVT_ENOMEM;
        }
    }
    return 0;
}

int kvt_device_start(const struct kvt_device_config *c, struct kvt_device **out, char *text) {
    KVT_ASSERT(c->ops->abi == KVT_DRIVER_ABI);
    KVT_ASSERT(c->issuer.sessions_max > 0);
    if (c->issuer.inflight_max == 0 || c->issuer.inflight_max > KVT_DRIVER_INFLIGHT_MAX) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device %s: %u copies in flight asked for; 1 to %d are accepted", c->ops->name,
                 c->issuer.inflight_max, KVT_DRIVER_INFLIGHT_MAX);
        return -KVT_ECONFIG;
    }
    snprintf(text, KVT_TEXT_BYTES, "device %s: %s", c->ops->name, kvt_error_text(KVT_ENOMEM));
    struct kvt_device *d = calloc(1, sizeof(*d));
    if (!d) {
        return -KVT_ENOMEM;
    }
    d->config = *c;
    d->ops = c->ops;
    int rc = -KVT_ENOMEM;
    d->sessions = calloc(c->issuer.sessions_max, sizeof(d->sessions[0]));
    if (!d->sessions || create_queues(d) != 0) {
        goto fail;
    }
    rc = d->ops->open(&c->driver, &d->driver, &d->info, text);
    if (rc != 0) {
        goto fail;
    }
    d->config.issuer.post_behind = d->info.post_behind;
    rc = kvt_issuer_create(&d->config.issuer, &d->issuer);
    if (rc != 0) {
        goto fail;
    }
    rc = kvt_thread_start("kvt-control", kvt_device_control_thread, d, &d->control_thread);
    if (rc == 0) {
        d->control_started = true;
        rc = kvt_thread_start("kvt-copy", kvt_device_copy_thread, d, &d->copy_thread);
        d->copy_started = rc == 0;
    }
    if (rc != 0) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device %s: no thread could be started; raise the limit on tasks", c->ops->name);
        goto fail;
    }
    text[0] = '\0';
    *out = d;
    return 0;

fail:
    kvt_device_stop(d);
    return rc;
}

/* Both threads have ended: what they still had is given back. */
static void give_back(struct kvt_device *d) {
    struct kvt_device_command c;
    struct kvt_device_event e;
    struct kvt_page_answer a;
    struct kvt_ask ask;
    while (d->commands && kvt_queue_pop(d->commands, &c)) {
        kvt_program_free(c.kind == KVT_DEVICE_PROGRAM ? c.program : NULL);
    }
    for (uint32_t i = 0; i < d->held_count; i++) {
        kvt_program_free(d->held[i].kind == KVT_DEVICE_PROGRAM ? d->held[i].program : NULL);
    }
    while (d->events && kvt_queue_pop(d->events, &e)) {
        if (e.exported.fd >= 0) {
            close(e.exported.fd);
        }
    }
    while (d->answers && kvt_queue_pop(d->answers, &a)) {
        d->sessions[a.session].state = KVT_DEVICE_SESSION_OPENED;
        d->sessions[a.session].failed = a.code != 0;
    }
    while (d->asks && kvt_queue_pop(d->asks, &ask)) {
        if (ask.kind == KVT_ASK_PAGE_REMOVE && !ask.failed) {
            d->ops->page_removed(d->driver, ask.session);
        }
    }
    for (uint32_t s = 0; d->sessions && s < d->config.issuer.sessions_max; s++) {
        uint32_t state = d->sessions[s].state;
        if ((state == KVT_DEVICE_SESSION_OPENED || state == KVT_DEVICE_SESSION_CLOSING) &&
            !d->sessions[s].failed) {
            d->ops->page_removed(d->driver, s);
        }
    }
}

void kvt_device_stop(struct kvt_device *d) {
    if (!d) {
        return;
    }
    __atomic_store_n(&d->stop, true, __ATOMIC_RELEASE);
    if (d->copy_started) {
        kvt_device_wake_copy_thread(d);
        pthread_join(d->copy_thread, NULL);
    }
    if (d->control_started) {
        kvt_bell_ring(&d->control_bell, 1);
        pthread_join(d->control_thread, NULL);
    }
    give_back(d);
    kvt_issuer_free(d->issuer);
    if (d->driver) {
        d->ops->close(d->driver);
    }
    kvt_queue_free(d->commands);
    kvt_queue_free(d->control_commands);
    kvt_queue_free(d->completions);
    kvt_queue_free(d->events);
    kvt_queue_free(d->asks);
    kvt_queue_free(d->answers);
    free(d->sessions);
    free(d);
}

const struct kvt_driver_info *kvt_device_info(const struct kvt_device *d) {
    return &d->info;
}

int kvt_device_host_added(struct kvt_device *d, uint64_t offset, uint64_t bytes, char *text) {
    return d->ops->host_added(d->driver, offset, bytes, text);
}

int kvt_device_host_removed(struct kvt_device *d, uint64_t offset, uint64_t bytes, char *text) {
    return d->ops->host_removed(d->driver, offset, bytes, text);
}

/* ---- the loop's ends of the queues ----------------------------------------------------------- */

int kvt_device_command(struct kvt_device *d, const struct kvt_device_command *c) {
    switch (c->kind) {
    case KVT_DEVICE_PROGRAM:
        KVT_ASSERT(c->program != NULL);
        KVT_ASSERT(c->program->session == c->session);
        /* fall through */
    case KVT_DEVICE_CANCEL:
    case KVT_DEVICE_SESSION_OPEN:
    case KVT_DEVICE_SESSION_CLOSE:
        KVT_ASSERT(c->session < d->config.issuer.sessions_max);
        if (!kvt_queue_push(d->commands, c)) {
            return -KVT_EBUSY;
        }
        kvt_device_wake_copy_thread(d);
        return 0;
    default:
        KVT_ASSERT(c->kind >= KVT_DEVICE_EXTENT_CREATE);
        KVT_ASSERT(c->kind <= KVT_DEVICE_MEASURE);
        if (!kvt_queue_push(d->control_commands, c)) {
            return -KVT_EBUSY;
        }
        kvt_bell_ring(&d->control_bell, 1);
        return 0;
    }
}

static bool take_completion(struct kvt_device *d, struct kvt_device_event *out) {
    struct kvt_completion c;
    if (!kvt_queue_pop(d->completions, &c)) {
        return false;
    }
    if (__atomic_load_n(&d->completions_full, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&d->completions_full, false, __ATOMIC_SEQ_CST);
        kvt_device_wake_copy_thread(d);
    }
    out->kind = KVT_DEVICE_COMPLETION;
    out->session = c.session;
    out->completion = c;
    return true;
}

bool kvt_device_event(struct kvt_device *d, struct kvt_device_event *out) {
    if (take_completion(d, out)) {
        return true;
    }
    if (!kvt_queue_has_message(d->events)) {
        return false;
    }
    if (take_completion(d, out)) { /* pushed before the event: a session's last ones */
        return true;
    }
    kvt_queue_pop(d->events, out);
    if (__atomic_load_n(&d->events_full, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&d->events_full, false, __ATOMIC_SEQ_CST);
        kvt_bell_ring(&d->control_bell, 1);
    }
    return true;
}

void kvt_device_link(const struct kvt_device *d, struct kvt_link *out) {
    out->to_bytes_per_s = kvt_speed_get(&d->speed_to);
    out->from_bytes_per_s = kvt_speed_get(&d->speed_from);
}
