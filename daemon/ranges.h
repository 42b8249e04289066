/* Ranges of the host arena on their way: touched by the host's thread, then registered by every
 * device, then the engine hears; and back. Loop thread.
 */
#ifndef KVT_DAEMON_RANGES_H
#define KVT_DAEMON_RANGES_H

#include "daemon/tiers.h"

/* Events. They may call the engine: kvt_daemon_pump is due behind them. */
void kvt_ranges_host_event(struct kvt_tiers *t, const struct kvt_host_event *event);
void kvt_ranges_device_ready(struct kvt_tiers *t, uint32_t device, uint64_t offset, int code,
                             const char *text);
void kvt_ranges_device_gone(struct kvt_tiers *t, uint64_t offset);

/* Tries what the host's full queue did not take. true: nothing is left. */
bool kvt_ranges_retry(struct kvt_tiers *t);
void kvt_ranges_clear(struct kvt_tiers *t);

#endif
