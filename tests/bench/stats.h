/* Medians with their 95% interval, and a line of JSON for tests/bench. */
#ifndef KVT_TESTS_BENCH_STATS_H
#define KVT_TESTS_BENCH_STATS_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

struct kvt_interval {
    double low;
    double median;
    double high;
};

static inline int kvt_compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts the values. The interval is between order statistics: it needs no assumption on how the
 * values are distributed (Source: Conover, Practical Nonparametric Statistics, 3.2). */
static inline struct kvt_interval kvt_median_interval(double *values, int count) {
    qsort(values, (size_t)count, sizeof(values[0]), kvt_compare_doubles);
    int low = (int)floor((count - 1.96 * sqrt(count)) / 2);
    low = low < 0 ? 0 : low;
    double median = count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
    return (struct kvt_interval){values[low], median, values[count - 1 - low]};
}

/* "name": {"median": 1.5, "low": 1.2, "high": 1.9} */
static inline void kvt_interval_print(const char *name, struct kvt_interval i) {
    printf("\"%s\": {\"median\": %.4g, \"low\": %.4g, \"high\": %.4g}", name, i.median, i.low,
           i.high);
}

static inline double kvt_bench_now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

#endif
