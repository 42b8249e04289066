#include "daemon/pace.h"

#define PAUSE_NS UINT64_C(2000000000) /* no step, but a worker that did nothing: begins anew */

static uint64_t average(uint64_t before, uint64_t now) {
    return (before * 7 + now) / 8;
}

void kvt_pace_committed(struct kvt_pace *p, uint64_t now_ns, uint64_t to_total,
                        uint64_t from_total) {
    uint64_t took_ns = now_ns - p->committed_ns;
    uint64_t to_bytes = to_total - p->to_total;
    uint64_t from_bytes = from_total - p->from_total;
    bool begins = p->committed_ns == 0 || took_ns > PAUSE_NS;
    bool first = p->step_ns == 0;
    p->step_ns = begins ? 0 : first ? took_ns : average(p->step_ns, took_ns);
    p->to_bytes = begins ? 0 : first ? to_bytes : average(p->to_bytes, to_bytes);
    p->from_bytes = begins ? 0 : first ? from_bytes : average(p->from_bytes, from_bytes);
    p->committed_ns = now_ns;
    p->to_total = to_total;
    p->from_total = from_total;
}

double kvt_pace_of_ceiling(const struct kvt_pace *p, const struct kvt_link *link) {
    uint64_t link_ns = kvt_link_step_ns(link, p->to_bytes, p->from_bytes);
    return p->step_ns > 0 ? (double)link_ns / (double)p->step_ns : 0;
}

uint64_t kvt_link_ns(uint64_t bytes, uint64_t bytes_per_s) {
    return bytes_per_s > 0 ? (uint64_t)((double)bytes * 1e9 / (double)bytes_per_s) : 0;
}

uint64_t kvt_link_step_ns(const struct kvt_link *link, uint64_t to_bytes, uint64_t from_bytes) {
    uint64_t to_ns = kvt_link_ns(to_bytes, link->to_bytes_per_s);
    uint64_t from_ns = kvt_link_ns(from_bytes, link->from_bytes_per_s);
    return to_ns > from_ns ? to_ns : from_ns;
}
