/* How fast a worker steps, and how much of the time its device's link needs for what it moves. Loop
 * thread.
 *
 * Averages over its recent steps, of bytes and time alike: so prompts, which move little and compute
 * much, count with both.
 */
#ifndef KVT_DAEMON_PACE_H
#define KVT_DAEMON_PACE_H

#include "tiers/device/device.h"

struct kvt_pace {
    uint64_t committed_ns; /* time of the last commit; 0: none */
    uint64_t to_total;     /* of the worker's counters, then */
    uint64_t from_total;
    uint64_t step_ns; /* averages of a step: time between commits; 0: not known */
    uint64_t to_bytes;
    uint64_t from_bytes;
};

/* A step was committed; the worker has moved so many bytes since it attached. */
void kvt_pace_committed(struct kvt_pace *p, uint64_t now_ns, uint64_t to_total,
                        uint64_t from_total);
/* Time that the link needs for its steps / time that they take; 0: not known, or they move nothing. */
double kvt_pace_of_ceiling(const struct kvt_pace *p, const struct kvt_link *link);

/* Time of so many bytes over a link; 0 for a link that is not known. */
uint64_t kvt_link_ns(uint64_t bytes, uint64_t bytes_per_s);
/* Both directions beside each other: that of the slower. */
uint64_t kvt_link_step_ns(const struct kvt_link *link, uint64_t to_bytes, uint64_t from_bytes);

#endif
