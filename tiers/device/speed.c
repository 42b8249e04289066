/* Measured copy speed; see speed.h. A sample is at least SAMPLE_BYTES and ends when the direction
 * falls idle or after SAMPLE_NS of work; each moves the published speed by an eighth. */
#include "tiers/device/speed.h"

#include "tiers/engine/assert.h"

#define SAMPLE_BYTES (UINT64_C(1) << 20)
#define SAMPLE_NS    (UINT64_C(5) * 1000 * 1000)

void kvt_speed_begin(struct kvt_speed *s, uint64_t now_ns) {
    if (s->in_flight++ == 0) {
        s->busy_since_ns = now_ns;
    }
}

void kvt_speed_end(struct kvt_speed *s, uint64_t bytes, uint64_t now_ns) {
    KVT_ASSERT(s->in_flight > 0);
    s->in_flight--;
    s->bytes += bytes;
    s->busy_ns += now_ns - s->busy_since_ns;
    s->busy_since_ns = now_ns;
    if (s->bytes < SAMPLE_BYTES || (s->in_flight > 0 && s->busy_ns < SAMPLE_NS)) {
        return;
    }
    double sample = (double)s->bytes * 1e9 / (double)(s->busy_ns > 0 ? s->busy_ns : 1);
    double before = (double)kvt_speed_get(s);
    double after = before == 0 ? sample : before + (sample - before) / 8;
    __atomic_store_n(&s->bytes_per_s, (uint64_t)after, __ATOMIC_RELAXED);
    s->bytes = 0;
    s->busy_ns = 0;
}
