/* STATUS, PLAN, EVICT. Administrators see and evict everything, others what their user owns.
 * Replies are built in the daemon's arena, and live until the next message. Loop thread.
 */
#ifndef KVT_DAEMON_STATUS_H
#define KVT_DAEMON_STATUS_H

#include "daemon/session.h"
#include "proto/kvtier.pb-c.h"

/* The part of the list that begins at offset (workers first, then caches) and fits a message. */
int kvt_status_report(struct kvt_session *s, const Kvt__Status *m, Kvt__StatusReply **out)
    __attribute__((warn_unused_result));
/* Sets out->plan, or out->shortage if it does not fit (-KVT_EQUOTA). */
int kvt_status_plan(struct kvt_session *s, const Kvt__Plan *m, Kvt__Reply *out, char *text)
    __attribute__((warn_unused_result));
/* Calls the engine: `s` may be hung up afterwards. */
int kvt_status_evict(struct kvt_session *s, const Kvt__Evict *m, Kvt__Evicted *out, char *text)
    __attribute__((warn_unused_result));

#endif
