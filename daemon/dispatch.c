#include "daemon/dispatch.h"
#include "daemon/daemon.h"
#include "daemon/log.h"
#include "daemon/status.h"
#include "tiers/engine/assert.h"

#include <stdio.h>
#include <string.h>

/* ---- replies --------------------------------------------------------------------------------------- */

/* Packs into d->reply; what does not fit becomes an error. Returns the size. */
static size_t pack(struct kvt_daemon *d, Kvt__Reply *reply) {
    reply->boot_epoch = d->boot_epoch;
    size_t size = kvt__reply__get_packed_size(reply);
    if (size > sizeof(d->reply)) {
        kvt_log(KVT_LOG_ERROR, "a reply of %zu bytes exceeds the protocol's limit", size);
        Kvt__Reply error = KVT__REPLY__INIT;
        error.sequence = reply->sequence;
        error.boot_epoch = d->boot_epoch;
        error.code = KVT_ETOOBIG;
        error.text = (char *)"the reply is larger than a message may be; ask for less at a time";
        return kvt__reply__pack(&error, d->reply);
    }
    return kvt__reply__pack(reply, d->reply);
}

static void send_stray(struct kvt_daemon *d, const struct kvt_identity *to, uint64_t sequence,
                       int code, const char *text) {
    Kvt__Reply reply = KVT__REPLY__INIT;
    reply.sequence = sequence;
    reply.code = (uint32_t)(code < 0 ? -code : code);
    reply.text = (char *)text;
    size_t size = pack(d, &reply);
    kvt_front_send(&d->front, to, d->reply, size);
}

static void send_reply(struct kvt_session *s, const struct kvt_identity *to, Kvt__Reply *reply,
                       bool keep) {
    struct kvt_daemon *d = s->daemon;
    size_t size = pack(d, reply);
    if (keep) {
        kvt_requests_keep(&s->requests, reply->sequence, d->reply, (uint32_t)size);
    }
    kvt_session_send_reply(s, to, d->reply, size);
}

static void send_error(struct kvt_session *s, const struct kvt_identity *to, uint64_t sequence,
                       int code, const char *text) {
    Kvt__Reply reply = KVT__REPLY__INIT;
    reply.sequence = sequence;
    reply.code = (uint32_t)(code < 0 ? -code : code);
    reply.text = (char *)(text[0] != '\0' ? text : kvt_error_text(code));
    send_reply(s, to, &reply, false);
}

static void send_working(struct kvt_session *s, const struct kvt_identity *to, uint64_t sequence) {
    Kvt__Reply reply = KVT__REPLY__INIT;
    reply.sequence = sequence;
    reply.working = true;
    send_reply(s, to, &reply, false);
}

void kvt_dispatch_answer(struct kvt_session *s, const struct kvt_answer *answer) {
    struct kvt_pending request;
    Kvt__Reply reply = KVT__REPLY__INIT;
    Kvt__Created created = KVT__CREATED__INIT;
    Kvt__Schedule schedule = KVT__SCHEDULE__INIT;
    Kvt__CacheInfo cache = KVT__CACHE_INFO__INIT;
    bool known = kvt_requests_take(&s->requests, answer->tag, &request);
    KVT_ASSERT(known);
    if (s->phase != KVT_PHASE_OPEN) {
        return;
    }
    reply.sequence = answer->tag;
    reply.code = answer->code;
    reply.text = (char *)answer->text;
    if (answer->code != 0) {
        if (answer->text[0] == '\0') {
            reply.text = (char *)kvt_error_text((int)answer->code);
        }
    } else if (request.body == KVT__REQUEST__BODY_CREATE) {
        created.cache = answer->cache;
        created.slots = answer->slots;
        created.slot_bytes = answer->slot_bytes;
        created.resident_layers = answer->resident_layers;
        reply.body_case = KVT__REPLY__BODY_CREATED;
        reply.created = &created;
    } else if (request.body == KVT__REQUEST__BODY_STEP ||
               request.body == KVT__REQUEST__BODY_ACQUIRE) {
        schedule.cache = answer->cache;
        schedule.first_step = answer->first_step;
        schedule.steps = answer->steps;
        schedule.ring_offset = answer->ring_offset;
        schedule.ring_bytes = answer->ring_bytes;
        schedule.n_lengths = answer->length_count;
        schedule.lengths = (uint32_t *)answer->lengths;
        reply.body_case = KVT__REPLY__BODY_SCHEDULE;
        reply.schedule = &schedule;
    } else if (request.body != KVT__REQUEST__BODY_CLOSE) {
        cache.cache = answer->cache;
        cache.n_lengths = answer->length_count;
        cache.lengths = (uint32_t *)answer->lengths;
        cache.committed_step = answer->committed_step;
        reply.body_case = KVT__REPLY__BODY_CACHE;
        reply.cache = &cache;
    }
    send_reply(s, &request.identity, &reply, true);
}

/* ---- requests that change something ------------------------------------------------------------------ */

/* false: it was answered, or is being carried out. */
static bool admit(struct kvt_session *s, const struct kvt_identity *from, const Kvt__Request *m) {
    const struct kvt_kept_reply *kept = NULL;
    switch (kvt_requests_admit(&s->requests, m->sequence, (uint32_t)m->body_case, from, &kept)) {
    case KVT_ADMIT_NEW:
        return true;
    case KVT_ADMIT_WAITING:
        send_working(s, from, m->sequence);
        return false;
    case KVT_ADMIT_REPEAT:
        kvt_session_send_reply(s, from, kept->bytes, kept->size);
        return false;
    case KVT_ADMIT_STALE:
        send_error(s, from, m->sequence, -KVT_EPROTO,
                   "the sequence was used before, and its reply is not kept any more; sequences "
                   "grow");
        return false;
    case KVT_ADMIT_FULL:
        send_error(s, from, m->sequence, -KVT_EBUSY,
                   "64 requests of the session wait for their answers; wait for some");
        return false;
    }
    return false;
}

static void ask_engine(struct kvt_session *s, const struct kvt_identity *from,
                       const Kvt__Request *m) {
    struct kvt_daemon *d = s->daemon;
    struct kvt_request request;
    char text[KVT_TEXT_BYTES] = "";
    int rc = kvt_request_read(m, &d->request, &request, text);
    if (rc == 0 && s->engine < 0) {
        rc = -KVT_EPERM;
        (void)snprintf(text, sizeof(text),
                       "a session of the role control owns no caches; attach "
                       "as a worker");
    }
    if (rc != 0) {
        send_error(s, from, m->sequence, rc, text);
        return;
    }
    if (!admit(s, from, m)) {
        return;
    }
    request.session = (uint32_t)s->engine;
    request.tag = m->sequence;
    kvt_engine_request(d->engine, &request);
    kvt_daemon_pump(d);
}

static void evict(struct kvt_session *s, const struct kvt_identity *from, const Kvt__Request *m) {
    struct kvt_pending request;
    Kvt__Reply reply = KVT__REPLY__INIT;
    Kvt__Evicted evicted = KVT__EVICTED__INIT;
    char text[KVT_TEXT_BYTES] = "";
    if (!admit(s, from, m)) {
        return;
    }
    uint32_t id = s->id;
    int rc = kvt_status_evict(s, m->evict, &evicted, text);
    /* A session may evict itself, and be hung up by it. */
    if (s->phase != KVT_PHASE_OPEN || s->id != id ||
        !kvt_requests_take(&s->requests, m->sequence, &request)) {
        return;
    }
    reply.sequence = m->sequence;
    reply.code = (uint32_t)-rc;
    reply.text = text;
    if (rc == 0) {
        reply.body_case = KVT__REPLY__BODY_EVICTED;
        reply.evicted = &evicted;
    }
    send_reply(s, &request.identity, &reply, true);
}

/* ---- requests that only ask ---------------------------------------------------------------------------- */

/* They are carried out as often as they come, so their sequences are not remembered. */
static void ask(struct kvt_session *s, const struct kvt_identity *from, const Kvt__Request *m) {
    Kvt__Reply reply = KVT__REPLY__INIT;
    char text[KVT_TEXT_BYTES] = "";
    int rc = 0;
    reply.sequence = m->sequence;
    if (m->body_case == KVT__REQUEST__BODY_PING) {
        reply.body_case = KVT__REPLY__BODY_PING;
        reply.ping = m->ping;
    } else if (m->body_case == KVT__REQUEST__BODY_STATUS) {
        rc = kvt_status_report(s, m->status, &reply.status);
        reply.body_case = KVT__REPLY__BODY_STATUS;
    } else {
        rc = kvt_status_plan(s, m->plan, &reply, text);
        reply.body_case = KVT__REPLY__BODY_PLAN;
    }
    if (rc != 0) { /* without a body; what a plan lacks stays */
        reply.body_case = KVT__REPLY__BODY__NOT_SET;
        reply.code = (uint32_t)-rc;
        reply.text = text[0] != '\0' ? text : (char *)kvt_error_text(rc);
    }
    send_reply(s, from, &reply, false);
}

/* ---- a message ------------------------------------------------------------------------------------------ */

/* The session that a message names, if its token is right. */
static struct kvt_session *authenticate(struct kvt_daemon *d, const struct kvt_identity *from,
                                        const Kvt__Request *m) {
    struct kvt_session *s = kvt_session_by_id(&d->sessions, m->session);
    if (s == NULL || s->phase != KVT_PHASE_OPEN) {
        send_stray(d, from, m->sequence, -KVT_EGONE,
                   "no such session is attached to this daemon; attach again");
        return NULL;
    }
    if (m->token.len != KVT_TOKEN_BYTES || !kvt_token_equal(m->token.data, s->token)) {
        send_stray(d, from, m->sequence, -KVT_EPERM, "the token is not that of the session");
        return NULL;
    }
    return s;
}

void kvt_dispatch_message(void *context, const struct kvt_identity *from, const uint8_t *bytes,
                          size_t size) {
    struct kvt_daemon *d = context;
    int code = 0;
    const Kvt__Request *m = kvt_request_unpack(&d->arena, bytes, size, &code);
    if (m == NULL) {
        send_stray(d, from, 0, code,
                   code == -KVT_ETOOBIG ? "the request unpacks to more than 1 MiB"
                                        : "the message is no request");
        return;
    }
    struct kvt_session *s = authenticate(d, from, m);
    if (s == NULL) {
        return;
    }
    switch (m->body_case) {
    case KVT__REQUEST__BODY_PING:
    case KVT__REQUEST__BODY_STATUS:
    case KVT__REQUEST__BODY_PLAN:
        ask(s, from, m);
        break;
    case KVT__REQUEST__BODY_EVICT:
        evict(s, from, m);
        break;
    default:
        ask_engine(s, from, m);
        break;
    }
}
