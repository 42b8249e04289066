#include "client/worker/synthetic/samples.h"

#include <stdlib.h>
#include <string.h>

#define KEPT_MAX (1u << 20)

void kvt_synth_samples_keep_sample(struct kvt_synth_samples *s, struct kvt_synth_sample sample) {
    if (s->count == s->capacity) {
        uint32_t capacity = s->capacity == 0 ? 1024 : 2 * s->capacity;
        struct kvt_synth_sample *list =
            capacity > KEPT_MAX ? NULL : realloc(s->list, capacity * sizeof *list);
        if (list == NULL) {
            return;
        }
        s->list = list;
        s->capacity = capacity;
    }
    sample.index = s->count;
    s->list[s->count++] = sample;
}

void kvt_synth_samples_keep(struct kvt_synth_samples *s, double us) {
    kvt_synth_samples_keep_sample(s, (struct kvt_synth_sample){.us = us});
}

void kvt_synth_samples_forget(struct kvt_synth_samples *s) {
    s->count = 0;
}

void kvt_synth_samples_free(struct kvt_synth_samples *s) {
    free(s->list);
    memset(s, 0, sizeof *s);
}

static int compare(const void *a, const void *b) {
    double x = ((const struct kvt_synth_sample *)a)->us;
    double y = ((const struct kvt_synth_sample *)b)->us;
    return (x > y) - (x < y);
}

void kvt_synth_samples_sum_up(struct kvt_synth_samples *s, struct kvt_synth_summary *out) {
    uint32_t n = s->count;
    memset(out, 0, sizeof *out);
    if (n == 0) {
        return;
    }
    qsort(s->list, n, sizeof *s->list, compare);
    out->count = n;
    out->p10_us = s->list[n / 10].us;
    out->p50_us = s->list[n / 2].us;
    out->p90_us = s->list[n - 1 - n / 10].us;
    out->p99_us = s->list[n - 1 - n / 100].us;
    out->max_us = s->list[n - 1].us;
    for (uint32_t i = 0; i < n; i++) {
        out->mean_us += s->list[i].us / n;
    }
}
