/* Ranges of the host arena on their way. The host's threads touch them and make them known to every
 * device, then the engine hears; and back. Loop thread, but for what the host's threads call.
 */
#ifndef KVT_DAEMON_RANGES_H
#define KVT_DAEMON_RANGES_H

#include "daemon/tiers.h"

/* For kvt_host_config; context is the kvt_tiers. The host's threads. */
int kvt_ranges_added(void *context, uint64_t offset, uint64_t bytes, char *text);
int kvt_ranges_removed(void *context, uint64_t offset, uint64_t bytes, char *text);

/* The engine has been made: notes what it keeps from the start, to report it when it has come. */
void kvt_ranges_keep_begin(struct kvt_tiers *t);
/* An event. It may call the engine: kvt_daemon_pump is due behind it. */
void kvt_ranges_host_event(struct kvt_tiers *t, const struct kvt_host_event *event);

/* Tries what the host's full queue did not take. true: nothing is left. */
bool kvt_ranges_retry(struct kvt_tiers *t);
void kvt_ranges_clear(struct kvt_tiers *t);

#endif
