#include "client/worker/synthetic/options.h"

#include "client/kvtier.h"
#include "proto/uuid.h"

#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum kind { FLAG, NUMBER, WORD, TEXT, SHARED, UUID };

struct word {
    const char *word;
    int64_t value;
};

static const struct word modes[] = {{"dynamic", KVT_DYNAMIC},
                                    {"static", KVT_STATIC},
                                    {"offloaded", KVT_OFFLOADED},
                                    {"offloaded-static", KVT_OFFLOADED_STATIC},
                                    {NULL, 0}};
static const struct word dtypes[] = {
    {"f32", KVT_DTYPE_F32}, {"f16", KVT_DTYPE_F16}, {"bf16", KVT_DTYPE_BF16}, {NULL, 0}};

static const struct word device_kinds[] = {
    {"cpu", KVT_DEVICE_CPU}, {"cuda", KVT_DEVICE_CUDA}, {NULL, 0}};

struct option {
    const char *name;
    const char *argument; /* shown in --help; NULL: none */
    enum kind kind;
    size_t offset;
    int64_t lowest;
    int64_t highest;
    const struct word *words;
    const char *text;
};

#define AT(field) offsetof(struct kvt_synth_options, field)
#define N(name_, field, low, high, text_)                                                   \
    {                                                                                       \
        .name = name_, .argument = "N", .kind = NUMBER, .offset = AT(field), .lowest = low, \
        .highest = high, .text = text_                                                      \
    }
#define F(name_, field, text_) \
    { .name = name_, .kind = FLAG, .offset = AT(field), .text = text_ }
#define SECTION(text_) \
    { .name = NULL, .text = text_ }

static const struct option table[] = {
    SECTION("Where and who"),
    {.name = "runtime-dir",
     .argument = "DIR",
     .kind = TEXT,
     .offset = AT(runtime_dir),
     .text = "the daemon's directory ($KVTIER_RUNTIME_DIR, /run/kvtierd)"},
    {.name = "name",
     .argument = "TEXT",
     .kind = TEXT,
     .offset = AT(name),
     .text = "shown by kvtierctl (kvtier-synth)"},
    {.name = "device-kind",
     .argument = "cpu|cuda",
     .kind = WORD,
     .offset = AT(device_kind),
     .words = device_kinds,
     .text = "what computes: cuda checks and writes on a GPU, on its stream (cpu)"},
    {.name = "device",
     .argument = "UUID",
     .kind = UUID,
     .text = "the device to work on, 32 hexadecimal digits (the daemon's first)"},
    N("seed", seed, 0, INT64_MAX, "of everything that is random (1)"),
    F("dense", dense, "be a dense worker, whose done comes one layer late (segment)"),
    SECTION("Layout"),
    {.name = "mode",
     .argument = "MODE",
     .kind = WORD,
     .offset = AT(mode),
     .words = modes,
     .text = "dynamic, static, offloaded or offloaded-static (dynamic)"},
    N("layers", layers, 1, 1024, "layers (4)"),
    N("heads", heads, 1, 1024, "KV heads of a layer (2)"),
    N("k-dim", k_dim, 1, 65536, "elements of a head's K (16)"),
    N("v-dim", v_dim, 0, 65536, "elements of a head's V; 0: no V (16)"),
    {.name = "dtype",
     .argument = "TYPE",
     .kind = WORD,
     .offset = AT(dtype),
     .words = dtypes,
     .text = "f32, f16 or bf16 (f16)"},
    {.name = "shared",
     .argument = "A:B",
     .kind = SHARED,
     .offset = 0,
     .text = "layers up to B read layer A's K and V too; may be repeated"},
    N("rows", rows, 1, 1024, "sequences (1)"),
    N("tokens-max", tokens_max, 0, INT32_MAX, "a row's capacity (prompt + tokens)"),
    N("piece-tokens", piece_tokens, 0, INT32_MAX, "tokens a piece at most; 0: the daemon's (0)"),
    N("resident", resident, -1, 1024, "layers that may stay on the device; -1: the mode's (-1)"),
    SECTION("Work"),
    N("prompt", prompt, 0, INT32_MAX, "tokens of the prompt (600)"),
    N("chunk", chunk, 1, 1048576, "tokens of the prompt a step (256)"),
    N("tokens", tokens, 0, INT32_MAX, "tokens to generate behind the prompt (64)"),
    N("append", append, 1, 1048576, "tokens that a generating step appends (1)"),
    N("ahead", ahead, 1, 64, "steps of one schedule when generating (1)"),
    F("ragged", ragged, "rows take part at random and differ in length"),
    N("rounds", rounds, 1, INT32_MAX, "do all of it so many times, with fresh caches (1)"),
    N("seconds", seconds, 0, INT32_MAX, "begin rounds until so much time has passed; 0: off (0)"),
    SECTION("At random, percent before each schedule (0)"),
    N("crop", crop, 0, 100, "crop rows"),
    N("fork", fork, 0, 100, "fork the cache"),
    N("reorder", reorder, 0, 100, "reorder rows, with repetition"),
    N("repeat", repeat, 0, 100, "double the rows"),
    N("select", select, 0, 100, "keep some rows"),
    N("reset", reset, 0, 100, "back to length 0"),
    N("abort", abort, 0, 100, "abort the schedule somewhere"),
    N("caches", caches, 1, 64, "caches at most: beyond it, one is closed (3)"),
    N("rows-max", rows_max, 1, 1024, "rows at most, for --repeat (8)"),
    SECTION("Behaviour"),
    F("limit", limit,
      "GPU: measure the bus with the bytes of a step, before and behind the generation"),
    F("bare", bare, "GPU: measure a resident step's kernels without libkvtier, likewise"),
    F("no-check", no_check, "write and hand back without looking at the bytes"),
    N("compute-us", compute_us, 0, INT32_MAX, "time that attending to a layer takes (0)"),
    N("hold-step", hold_step, -1, INT32_MAX,
      "stop in the middle of this step, counted from 0 (-1)"),
    N("hold-ms", hold_ms, 0, INT32_MAX, "how long; 0: SIGSTOP itself (0)"),
    F("re-attach", re_attach, "when the daemon goes away, attach again and start over"),
    F("progress", progress, "a line on stderr for each schedule"),
    F("turns", turns, "a schedule of the generation waits for a line on stdin"),
};
#define OPTIONS (sizeof table / sizeof table[0])

static void print_help(void) {
    (void)printf("usage: kvtier-synth [OPTION]...\n\n"
                 "A worker without a model: every token that it appends has bytes that follow from "
                 "a random\n"
                 "number of the token's own, and every byte that it is given to read is checked "
                 "against that.\n"
                 "One JSON line at the end. Exit status: 0 all right, 1 something was wrong (said "
                 "on stderr),\n"
                 "2 usage, 3 the daemon refused or is gone.\n");
    for (size_t i = 0; i < OPTIONS; i++) {
        const struct option *t = &table[i];
        char left[40];
        if (t->name == NULL) {
            (void)printf("\n%s\n", t->text);
            continue;
        }
        (void)snprintf(left, sizeof left, "--%s %s", t->name,
                       t->argument != NULL ? t->argument : "");
        (void)printf("  %-22s %s\n", left, t->text);
    }
    (void)printf("\n  %-22s %s\n  %-22s %s\n", "--help", "this", "--version", "the version");
}

static int mistake(const char *option, const char *value, const char *accepted) {
    (void)fprintf(stderr, "kvtier-synth: --%s: '%s' is not accepted; %s\n", option, value,
                  accepted);
    return KVT_SYNTH_USAGE;
}

static int parse_number(const struct option *t, const char *value, int64_t *out) {
    char accepted[80];
    char *end;
    errno = 0;
    long long n = strtoll(value, &end, 10);
    if (errno != 0 || end == value || *end != '\0' || n < t->lowest || n > t->highest) {
        (void)snprintf(accepted, sizeof accepted, "a number from %" PRId64 " to %" PRId64 " is",
                       t->lowest, t->highest);
        return mistake(t->name, value, accepted);
    }
    *out = n;
    return -1;
}

static int parse_word(const struct option *t, const char *value, int64_t *out) {
    for (const struct word *w = t->words; w->word != NULL; w++) {
        if (strcmp(w->word, value) == 0) {
            *out = w->value;
            return -1;
        }
    }
    return mistake(t->name, value, t->text);
}

static int parse_shared(struct kvt_synth_options *o, const char *value) {
    unsigned layer;
    unsigned last;
    int used = 0;
    if (sscanf(value, "%u:%u%n", &layer, &last, &used) != 2 || value[used] != '\0' ||
        last <= layer || o->shared_count == KVT_SYNTH_SHARED_MAX) {
        return mistake("shared", value, "LAYER:LATER is, as in 0:2, at most 64 times");
    }
    o->shared_layer[o->shared_count] = layer;
    o->shared_last[o->shared_count] = last;
    o->shared_count++;
    return -1;
}

static int parse_uuid(struct kvt_synth_options *o, const char *value) {
    if (kvt_uuid_parse(value, o->device) != NULL) {
        return mistake("device", value, "32 hexadecimal digits are, with or without dashes");
    }
    o->has_device = true;
    return -1;
}

static int apply(struct kvt_synth_options *o, const struct option *t, const char *value) {
    void *field = (char *)o + t->offset;
    switch (t->kind) {
    case FLAG:
        *(bool *)field = true;
        return -1;
    case TEXT:
        *(const char **)field = value;
        return -1;
    case NUMBER:
        return parse_number(t, value, field);
    case WORD:
        return parse_word(t, value, field);
    case SHARED:
        return parse_shared(o, value);
    case UUID:
        return parse_uuid(o, value);
    }
    return -1;
}

/* --name VALUE or --name=VALUE. */
static int parse_one(struct kvt_synth_options *o, int argc, char **argv, int *at) {
    const char *argument = argv[*at];
    size_t length = strcspn(argument, "=");
    for (size_t i = 0; i < OPTIONS && strncmp(argument, "--", 2) == 0; i++) {
        const struct option *t = &table[i];
        if (t->name == NULL || strlen(t->name) != length - 2 ||
            strncmp(t->name, argument + 2, length - 2) != 0) {
            continue;
        }
        const char *value = argument[length] == '=' ? argument + length + 1 : NULL;
        if (t->argument != NULL && value == NULL) {
            if (*at + 1 == argc) {
                (void)fprintf(stderr, "kvtier-synth: --%s needs a value\n", t->name);
                return KVT_SYNTH_USAGE;
            }
            value = argv[++*at];
        } else if (t->argument == NULL && value != NULL) {
            return mistake(t->name, value, "it takes no value");
        }
        return apply(o, t, value);
    }
    (void)fprintf(stderr, "kvtier-synth: '%s' is unknown; --help lists the options\n", argument);
    return KVT_SYNTH_USAGE;
}

static int check(struct kvt_synth_options *o) {
    for (uint32_t i = 0; i < o->shared_count; i++) {
        if (o->shared_last[i] >= o->layers) {
            (void)fprintf(stderr, "kvtier-synth: --shared %u:%u: there are %" PRId64 " layers\n",
                          o->shared_layer[i], o->shared_last[i], o->layers);
            return KVT_SYNTH_USAGE;
        }
    }
    if (o->tokens_max == 0) {
        int64_t measured =
            (o->limit || o->bare) + (int64_t)o->bare; /* steps beside the generation */
        o->tokens_max = o->prompt + o->tokens + measured * o->append;
        o->tokens_max = o->tokens_max > 0 ? o->tokens_max : 1;
    }
    return -1;
}

int kvt_synth_options_parse(struct kvt_synth_options *o, int argc, char **argv) {
    *o = (struct kvt_synth_options){.name = "kvtier-synth",
                                    .seed = 1,
                                    .mode = KVT_DYNAMIC,
                                    .layers = 4,
                                    .heads = 2,
                                    .k_dim = 16,
                                    .v_dim = 16,
                                    .dtype = KVT_DTYPE_F16,
                                    .rows = 1,
                                    .resident = -1,
                                    .prompt = 600,
                                    .chunk = 256,
                                    .tokens = 64,
                                    .append = 1,
                                    .ahead = 1,
                                    .rounds = 1,
                                    .caches = 3,
                                    .rows_max = 8,
                                    .hold_step = -1};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            print_help();
            return KVT_SYNTH_OK;
        }
        if (strcmp(argv[i], "--version") == 0) {
            (void)printf("kvtier-synth %s\n", kvt_version());
            return KVT_SYNTH_OK;
        }
        int status = parse_one(o, argc, argv, &i);
        if (status >= 0) {
            return status;
        }
    }
    return check(o);
}
