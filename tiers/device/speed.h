/* How fast copies can go in one direction, measured while they run: bytes over the time in which at
 * least one copy of that direction was in flight. It is meant as a ceiling, so it only rises.
 * Owner: the copy thread; kvt_speed_get: any.
 */
#ifndef KVT_DEVICE_SPEED_H
#define KVT_DEVICE_SPEED_H

#include <stdint.h>

/* Smaller copies say more about the hand-over than about the link: they do not count. */
#define KVT_SPEED_BYTES_MIN (UINT64_C(64) << 10)

struct kvt_speed {
    uint32_t in_flight;
    uint64_t busy_since_ns; /* while in_flight > 0 */
    uint64_t busy_ns;
    uint64_t bytes;       /* of the sample */
    uint32_t sample;      /* its number */
    uint64_t bytes_per_s; /* atomic; 0: not yet known */
};

/* Before the first copy: what is known of the link; 0: nothing. */
static inline void kvt_speed_start(struct kvt_speed *s, uint64_t bytes_per_s) {
    __atomic_store_n(&s->bytes_per_s, bytes_per_s, __ATOMIC_RELAXED);
}

/* A copy is submitted: the sample in which it began. */
uint32_t kvt_speed_begin(struct kvt_speed *s, uint64_t now_ns);
/* It has completed. */
void kvt_speed_end(struct kvt_speed *s, uint32_t sample, uint64_t bytes, uint64_t now_ns);

static inline uint64_t kvt_speed_get(const struct kvt_speed *s) {
    return __atomic_load_n(&s->bytes_per_s, __ATOMIC_RELAXED);
}

#endif
