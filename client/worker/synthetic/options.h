/* Options of kvtier-synth. One table (options.c) parses them and prints --help. */
#ifndef KVT_SYNTH_OPTIONS_H
#define KVT_SYNTH_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#define KVT_SYNTH_SHARED_MAX 64

/* How a program of this project ends; man/kvtier-synth.1 says the same. */
enum kvt_synth_exit {
    KVT_SYNTH_OK = 0,
    KVT_SYNTH_WRONG = 1, /* a byte, a length or a listing was not what it must be */
    KVT_SYNTH_USAGE = 2,
    KVT_SYNTH_ERROR = 3, /* the daemon refused something, or is gone */
};

struct kvt_synth_options {
    const char *runtime_dir;
    const char *name;
    int64_t seed;
    bool dense;
    bool has_device;
    int64_t device_kind; /* KVT_DEVICE_... */
    uint8_t device[16];  /* UUID */

    int64_t mode; /* KVT_DYNAMIC ... */
    int64_t layers;
    int64_t heads;
    int64_t k_dim;
    int64_t v_dim;
    int64_t dtype;                               /* KVT_DTYPE_... */
    uint32_t shared_layer[KVT_SYNTH_SHARED_MAX]; /* whose K and V ... */
    uint32_t shared_last[KVT_SYNTH_SHARED_MAX];  /* ... are read until this layer */
    uint32_t shared_count;
    int64_t rows;
    int64_t tokens_max;
    int64_t piece_tokens;
    int64_t resident;

    int64_t prompt;
    int64_t chunk;
    int64_t tokens;
    int64_t append;
    int64_t ahead;
    bool ragged;
    int64_t rounds;
    int64_t seconds;

    int64_t crop; /* percent, before each schedule */
    int64_t fork;
    int64_t reorder;
    int64_t repeat;
    int64_t select;
    int64_t reset;
    int64_t abort; /* percent of schedules */
    int64_t caches;
    int64_t rows_max;

    bool no_check;
    bool limit;
    bool bare;
    int64_t compute_us;
    int64_t hold_step; /* -1: never */
    int64_t hold_ms;   /* 0: SIGSTOP */
    bool re_attach;
    bool progress;
    bool turns;
};

/* Returns -1 to go on, or the status to exit with: help was printed, or a mistake was. */
int kvt_synth_options_parse(struct kvt_synth_options *o, int argc, char **argv);

#endif
