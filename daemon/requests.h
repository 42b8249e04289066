/* The requests of one session: those that wait for their answer, and the last replies. A reply that
 * was lost (the front died, a queue was full) is asked for again by the client with the same
 * sequence; the request is not carried out twice. Pure; loop thread.
 *
 * Rules. Sequences of requests that change something grow. One that waits is only noted to come
 * from a new identity. One whose reply is kept gets it again. Older ones are refused.
 */
#ifndef KVT_DAEMON_REQUESTS_H
#define KVT_DAEMON_REQUESTS_H

#include "proto/front.h"

#include <stdbool.h>
#include <stdint.h>

#define KVT_REPLIES_KEPT 8

/* Where a reply goes: a peer of one life of the front. */
struct kvt_identity {
    uint32_t life;
    uint8_t bytes[KVT_FRONT_IDENTITY_BYTES];
};

struct kvt_pending {
    bool used;
    uint32_t body; /* of the request: what kind of reply is due */
    uint64_t sequence;
    struct kvt_identity identity;
};

struct kvt_kept_reply {
    uint64_t sequence;
    uint8_t *bytes; /* owned; NULL: none */
    uint32_t size;
};

struct kvt_requests {
    struct kvt_pending pending[KVT_REQUESTS_MAX];
    struct kvt_kept_reply kept[KVT_REPLIES_KEPT];
    uint32_t kept_next;
    bool any; /* `highest` is one that came */
    uint64_t highest;
};

enum kvt_admission {
    KVT_ADMIT_NEW,     /* carry it out */
    KVT_ADMIT_WAITING, /* it is being carried out */
    KVT_ADMIT_REPEAT,  /* *kept is its reply */
    KVT_ADMIT_STALE,   /* its reply is not kept any more */
    KVT_ADMIT_FULL,    /* too many wait */
};

enum kvt_admission kvt_requests_admit(struct kvt_requests *r, uint64_t sequence, uint32_t body,
                                      const struct kvt_identity *identity,
                                      const struct kvt_kept_reply **kept);
/* Takes the waiting request out of the table into *out; false: there is none with this sequence. */
bool kvt_requests_take(struct kvt_requests *r, uint64_t sequence, struct kvt_pending *out);
/* Keeps a copy of a reply. Without memory it is not kept, and a repeat is refused as stale. */
void kvt_requests_keep(struct kvt_requests *r, uint64_t sequence, const uint8_t *bytes,
                       uint32_t size);
void kvt_requests_clear(struct kvt_requests *r);

#endif
