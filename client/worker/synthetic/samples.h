/* Times of what happens again and again, in the order in which it did, and what there is to say of
 * them. One thread; whoever has one owns it. */
#ifndef KVT_SYNTH_SAMPLES_H
#define KVT_SYNTH_SAMPLES_H

#include <stdbool.h>
#include <stdint.h>

struct kvt_synth_sample {
    double us;
    uint32_t index; /* which one it was, from 0 */
    bool first;     /* the first of a schedule */
    /* of a schedule's first step: */
    uint64_t moved_bytes; /* inside the device, before it */
    double begin_us;      /* the call that began the schedule */
};

struct kvt_synth_samples {
    struct kvt_synth_sample *list;
    uint32_t count;
    uint32_t capacity;
};

struct kvt_synth_summary {
    uint32_t count;
    double mean_us;
    double p10_us;
    double p50_us;
    double p90_us;
    double p99_us;
    double max_us;
};

/* At most a million are kept, and none when memory runs out. */
void kvt_synth_samples_keep(struct kvt_synth_samples *s, double us);
/* The same with what else is known; its index is set here. */
void kvt_synth_samples_keep_sample(struct kvt_synth_samples *s, struct kvt_synth_sample sample);
void kvt_synth_samples_forget(struct kvt_synth_samples *s);
void kvt_synth_samples_free(struct kvt_synth_samples *s);
/* Sorts them, the slowest last. All zero if there is none. */
void kvt_synth_samples_sum_up(struct kvt_synth_samples *s, struct kvt_synth_summary *out);

#endif
