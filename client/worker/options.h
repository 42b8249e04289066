/* Command line of kvtier-run: one table gives parsing, ranges, defaults and --help. */
#ifndef KVT_WORKER_OPTIONS_H
#define KVT_WORKER_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/uuid.h"

#define KVT_PROMPTS_MAX 64

struct kvt_texts {
    const char *items[KVT_PROMPTS_MAX];
    uint32_t count;
};

struct kvt_options {
    const char *model;
    const char *random;
    struct kvt_texts prompts;
    struct kvt_texts prompt_files;
    struct kvt_texts ids;
    const char *system;
    bool chat;
    bool special;
    uint32_t prompt_tokens; /* 0: all */
    uint32_t generate;
    bool ignore_end;
    double temperature;
    uint32_t top_k;
    double top_p;
    uint64_t seed;
    uint32_t rows;
    uint32_t chunk;
    uint32_t steps_ahead;
    uint32_t threads; /* 0: all CPUs */
    uint32_t context; /* 0: the model's */
    uint32_t layers;  /* 0: all */
    const char *kv_dtype;
    bool local;
    const char *runtime_dir;
    const char *name;
    bool has_device;
    uint8_t device[KVT_UUID_BYTES];
    const char *mode;
    uint32_t piece_tokens; /* 0: the holder of K and V chooses */
    int64_t resident_layers;
    bool json;
    const char *progress;
    const char *dump_logits;
    bool help;
    bool version;
};

/*
 * Ownership: texts borrow from argv. -KVT_EINVAL: the text says which argument is
 * wrong, why and what it may be.
 */
__attribute__((warn_unused_result)) int kvt_options_parse(struct kvt_options *options, int argc,
                                                          char **argv, char *err, size_t err_size);

void kvt_options_help(void);

#endif
