#include "daemon/requests.h"

#include <stdlib.h>
#include <string.h>

enum kvt_admission kvt_requests_admit(struct kvt_requests *r, uint64_t sequence, uint32_t body,
                                      const struct kvt_identity *identity,
                                      const struct kvt_kept_reply **kept) {
    struct kvt_pending *room = NULL;
    for (uint32_t i = 0; i < KVT_REQUESTS_MAX; i++) {
        struct kvt_pending *p = &r->pending[i];
        if (!p->used) {
            room = room == NULL ? p : room;
        } else if (p->sequence == sequence) {
            p->identity = *identity;
            return KVT_ADMIT_WAITING;
        }
    }
    if (r->any && sequence <= r->highest) {
        for (uint32_t i = 0; i < KVT_REPLIES_KEPT; i++) {
            if (r->kept[i].bytes != NULL && r->kept[i].sequence == sequence) {
                *kept = &r->kept[i];
                return KVT_ADMIT_REPEAT;
            }
        }
        return KVT_ADMIT_STALE;
    }
    if (room == NULL) {
        return KVT_ADMIT_FULL;
    }
    *room = (struct kvt_pending){
        .used = true, .body = body, .sequence = sequence, .identity = *identity};
    r->any = true;
    r->highest = sequence;
    return KVT_ADMIT_NEW;
}

bool kvt_requests_take(struct kvt_requests *r, uint64_t sequence, struct kvt_pending *out) {
    for (uint32_t i = 0; i < KVT_REQUESTS_MAX; i++) {
        if (r->pending[i].used && r->pending[i].sequence == sequence) {
            *out = r->pending[i];
            r->pending[i].used = false;
            return true;
        }
    }
    return false;
}

void kvt_requests_keep(struct kvt_requests *r, uint64_t sequence, const uint8_t *bytes,
                       uint32_t size) {
    struct kvt_kept_reply *kept = &r->kept[r->kept_next];
    r->kept_next = (r->kept_next + 1) % KVT_REPLIES_KEPT;
    free(kept->bytes);
    kept->bytes = malloc(size);
    if (kept->bytes == NULL) {
        return;
    }
    memcpy(kept->bytes, bytes, size);
    kept->size = size;
    kept->sequence = sequence;
}

void kvt_requests_clear(struct kvt_requests *r) {
    for (uint32_t i = 0; i < KVT_REPLIES_KEPT; i++) {
        free(r->kept[i].bytes);
    }
    memset(r, 0, sizeof(*r));
}
