/* What a client can ask about itself: statistics of a cache, and a round trip. */
#include "client/lib/client.h"

#include <string.h>

static void fill(struct kvt_cache_stat *out, const Kvt__Cache *m) {
    *out = (struct kvt_cache_stat){
        .mode = m->mode,
        .rows = m->rows,
        .tokens_longest = m->tokens_longest,
        .device_bytes = m->device_bytes,
        .host_bytes = m->host_bytes,
        .need_to_device_bytes = m->need_to_device_bytes,
        .need_from_device_bytes = m->need_from_device_bytes,
    };
    if (m->counters != NULL) {
        out->to_device_bytes = m->counters->to_device_bytes;
        out->from_device_bytes = m->counters->from_device_bytes;
        out->prefetch_discarded_bytes = m->counters->prefetch_discarded_bytes;
        out->migrated_bytes = m->counters->migrated_bytes;
        out->copied_on_write_bytes = m->counters->copied_on_write_bytes;
        out->steps_committed = m->counters->steps_committed;
    }
    size_t n = m->layers.len < sizeof out->layers ? m->layers.len : sizeof out->layers - 1;
    if (n > 0) {
        memcpy(out->layers, m->layers.data, n);
    }
    out->layer_count = (uint32_t)m->layers.len;
}

/* Looks through one part of the list. 1: found; 0: *offset is the next part's, 0 if there is none. */
static int look(struct kvt_client *c, uint32_t cache, uint32_t *offset,
                struct kvt_cache_stat *out) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Status m = KVT__STATUS__INIT;
    Kvt__Reply *reply;
    m.caches = 1;
    m.offset = *offset;
    r.body_case = KVT__REQUEST__BODY_STATUS;
    r.status = &m;
    int rc = kvt_client_request(c, "STATUS", &r, KVT__REPLY__BODY_STATUS, &reply);
    if (rc != 0) {
        return rc;
    }
    const Kvt__StatusReply *s = reply->status;
    for (size_t i = 0; i < s->n_caches && rc == 0; i++) {
        if (s->caches[i]->cache == cache && s->caches[i]->session == c->welcome.session) {
            fill(out, s->caches[i]);
            rc = 1;
        }
    }
    *offset = s->next_offset > *offset ? s->next_offset : 0;
    kvt__reply__free_unpacked(reply, NULL);
    return rc;
}

int kvt_cache_stat(struct kvt_client *c, uint32_t cache, struct kvt_cache_stat *out) {
    uint32_t offset = 0;
    if (kvt_client_cache_find(c, cache) == NULL) {
        return -KVT_ENOENT;
    }
    do {
        int rc = look(c, cache, &offset, out);
        if (rc != 0) {
            return rc < 0 ? rc : 0;
        }
    } while (offset != 0);
    if (kvt_client_is_evicted(c)) {
        return kvt_client_fail_evicted(c);
    }
    return kvt_client_fail(c, -KVT_ENOENT, "STATUS: the daemon does not list cache %u", cache);
}

int kvt_ping(struct kvt_client *c, double *us) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Ping m = KVT__PING__INIT;
    Kvt__Reply *reply;
    r.body_case = KVT__REQUEST__BODY_PING;
    r.ping = &m;
    uint64_t start_ns = kvt_client_now_ns();
    int rc = kvt_client_request(c, "PING", &r, KVT__REPLY__BODY_PING, &reply);
    if (rc != 0) {
        return rc;
    }
    if (us != NULL) {
        *us = (double)(kvt_client_now_ns() - start_ns) / 1000;
    }
    kvt__reply__free_unpacked(reply, NULL);
    return 0;
}
