/* The configuration. One table (config_table.c) has every option with section, type, unit, range,
 * default and prose; parsing, checks, `kvtierd --print-config`, the man page and the tests are
 * driven by it.
 *
 * All of it is parsed and checked before any of it applies: kvt_config_load writes *out only on
 * success. Errors name file, line, option, value and what is accepted. Pure but for reading the
 * file; any thread.
 *
 * The file: lines "[section]", "option = value", "# comment"; sections daemon, host, and
 * "device NAME", one for each device. A section or an option that is there twice is an error.
 */
#ifndef KVT_DAEMON_CONFIG_H
#define KVT_DAEMON_CONFIG_H

#include "proto/limits.h"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define KVT_SIZE_NONE             UINT64_MAX
#define KVT_CONFIG_TEXT_BYTES     256 /* of a text value, with the closing NUL */
#define KVT_CONFIG_ERROR_BYTES    1024
#define KVT_CONFIG_FILE_BYTES_MAX (1u << 20)
#define KVT_CONFIG_DEFAULT_FILE   "/etc/kvtierd/kvtierd.conf"

struct kvt_config_device {
    char name[KVT_NAME_BYTES];
    uint32_t driver;              /* index into the choices: see kvt_config_driver_name */
    uint8_t uuid[KVT_UUID_BYTES]; /* all zero: the driver's or one made from the name */
    uint64_t budget_bytes;
    uint64_t worker_max_bytes; /* never 0 after kvt_config_load */
    uint64_t extent_bytes;     /* never 0 after kvt_config_load */
    uint64_t piece_bytes;      /* never 0 after kvt_config_load */
    uint64_t cut_bytes;
    uint64_t quantum_bytes;
    uint64_t inflight_bytes;
    uint32_t copy_threads;
    uint64_t spin_us;
    uint32_t extent_kind; /* enum kvt_extent_kind; 0: the driver's first choice */
};

struct kvt_config {
    /* [daemon] */
    char runtime_dir[KVT_CONFIG_TEXT_BYTES];
    uint32_t log_level; /* enum kvt_log_level */
    uint32_t sessions_max;
    uint32_t caches_max;
    uint32_t block_tokens;
    uint64_t idle_after_us;
    uint64_t reclaim_deadline_us;
    uint64_t stop_timeout_us;
    uint64_t ring_bytes;
    char admin_group[KVT_CONFIG_TEXT_BYTES];
    char socket_group[KVT_CONFIG_TEXT_BYTES];
    char front_program[KVT_CONFIG_TEXT_BYTES];
    uint64_t front_memory_bytes;
    char plugin_dir[KVT_CONFIG_TEXT_BYTES];
    /* [host] */
    uint64_t host_budget_bytes;
    uint64_t host_worker_max_bytes;  /* never 0 after kvt_config_load */
    uint64_t host_preallocate_bytes; /* 0: as the devices like it; KVT_SIZE_NONE */
    uint64_t host_chunk_bytes;
    uint32_t host_touch_threads; /* 0: by the number of CPUs */
    /* [device NAME], in the order of the file */
    uint32_t device_count;
    struct kvt_config_device devices[KVT_DEVICES_MAX];
};

struct kvt_config_source {
    const char *file;        /* NULL: KVT_CONFIG_DEFAULT_FILE if it exists, otherwise defaults */
    const char *const *sets; /* "section.option=value", "device.NAME.option=value"; the last wins */
    uint32_t set_count;
};

/* -KVT_ECONFIG with a sentence in text[KVT_CONFIG_ERROR_BYTES]. */
int kvt_config_load(const struct kvt_config_source *source, struct kvt_config *out, char *text)
    __attribute__((warn_unused_result));

/* The same from memory; `name` stands for the file in errors. */
int kvt_config_parse(const char *bytes, size_t size, const char *name, const char *const *sets,
                     uint32_t set_count, struct kvt_config *out, char *text)
    __attribute__((warn_unused_result));

const char *kvt_config_driver_name(const struct kvt_config_device *d);

/* A commented file with every option at its default. */
void kvt_config_print(FILE *stream);

/* ---- the table --------------------------------------------------------------------------------- */

enum kvt_section { KVT_SECTION_DAEMON = 0, KVT_SECTION_HOST = 1, KVT_SECTION_DEVICE = 2 };
#define KVT_SECTIONS 3

enum kvt_option_type {
    KVT_OPTION_SIZE,       /* uint64_t, bytes */
    KVT_OPTION_SIZE_AUTO,  /* the same, or "auto": 0 */
    KVT_OPTION_SIZE_NONE,  /* the same, or "auto": 0, or "none": KVT_SIZE_NONE */
    KVT_OPTION_DURATION,   /* uint64_t, microseconds */
    KVT_OPTION_COUNT,      /* uint32_t */
    KVT_OPTION_COUNT_AUTO, /* the same, or "auto": 0 */
    KVT_OPTION_POWER_OF_2, /* uint32_t */
    KVT_OPTION_TEXT,       /* char[KVT_CONFIG_TEXT_BYTES] */
    KVT_OPTION_PATH,       /* the same: absolute, or empty where the default is */
    KVT_OPTION_CHOICE,     /* uint32_t, index into the choices */
    KVT_OPTION_UUID,       /* uint8_t[KVT_UUID_BYTES], or empty: zeroes */
};

struct kvt_option {
    enum kvt_section section;
    const char *name;
    enum kvt_option_type type;
    size_t offset; /* in struct kvt_config or struct kvt_config_device */
    uint64_t min;  /* in the stored unit */
    uint64_t max;
    const char *value;   /* the default, as the file would have it */
    const char *choices; /* CHOICE: "one|two" */
    const char *prose;   /* sentences; lines are broken where it is printed */
};

extern const struct kvt_option kvt_options[];
extern const uint32_t kvt_option_count;
extern const char *const kvt_section_names[KVT_SECTIONS]; /* "daemon" ... */
extern const char *const kvt_section_prose[KVT_SECTIONS];

/* "1MiB to 16TiB", "256 to 4096, a power of 2", "error, warning ...". Returns text[size]. */
const char *kvt_option_accepted(const struct kvt_option *o, char *text, size_t size);

/* Stores `value` into the struct at `base`. NULL, or what is wrong with it. */
const char *kvt_option_store(const struct kvt_option *o, void *base, const char *value);

#endif
