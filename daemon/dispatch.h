/* Messages of the front: who asks, whether he may, what it is; to the engine and back. Loop thread.
 */
#ifndef KVT_DAEMON_DISPATCH_H
#define KVT_DAEMON_DISPATCH_H

#include "daemon/session.h"
#include "proto/kvtier.pb-c.h"
#include "tiers/engine/engine.h"

/* A message from a peer of the front; context is the daemon. */
void kvt_dispatch_message(void *context, const struct kvt_identity *from, const uint8_t *bytes,
                          size_t size);
/* The engine's answer to a request of the session. Does not call the engine. */
void kvt_dispatch_answer(struct kvt_session *s, const struct kvt_answer *answer);

#endif
