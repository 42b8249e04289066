/* Measured copy speed; see speed.h. A sample is at least SAMPLE_BYTES and ends when the direction
 * falls idle or after SAMPLE_NS of work. Only copies that began in it count: of others a part was
 * moved before.
 *
 * So a sample is never faster than the link. It is slower where copies are small, the copy thread is
 * late, or the other direction works at the same time. Hence a faster sample moves the published
 * speed by an eighth, and a slower one says nothing.
 */
#include "tiers/device/speed.h"

#include "tiers/engine/assert.h"

#define SAMPLE_BYTES (UINT64_C(1) << 20)
#define SAMPLE_NS    (UINT64_C(50) * 1000 * 1000)

uint32_t kvt_speed_begin(struct kvt_speed *s, uint64_t now_ns) {
    if (s->in_flight++ == 0) {
        s->busy_since_ns = now_ns;
    }
    return s->sample;
}

void kvt_speed_end(struct kvt_speed *s, uint32_t sample, uint64_t bytes, uint64_t now_ns) {
    KVT_ASSERT(s->in_flight > 0);
    s->in_flight--;
    s->bytes += sample == s->sample ? bytes : 0;
    s->busy_ns += now_ns - s->busy_since_ns;
    s->busy_since_ns = now_ns;
    if (s->bytes < SAMPLE_BYTES || (s->in_flight > 0 && s->busy_ns < SAMPLE_NS)) {
        return;
    }
    double seen = (double)s->bytes * 1e9 / (double)(s->busy_ns > 0 ? s->busy_ns : 1);
    double before = (double)kvt_speed_get(s);
    if (seen > before) {
        double after = before == 0 ? seen : before + (seen - before) / 8;
        __atomic_store_n(&s->bytes_per_s, (uint64_t)after, __ATOMIC_RELAXED);
    }
    s->sample++;
    s->bytes = 0;
    s->busy_ns = 0;
}
