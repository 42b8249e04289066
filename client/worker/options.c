/* See options.h. To add an option: a field there, a line here. */
#include "client/worker/options.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/worker/fail.h"
#include "client/worker/model.h"
#include "client/worker/pool.h"
#include "proto/errors.h"
#include "proto/limits.h"

enum kind { HEADING, FLAG, TEXT, TEXTS, U32, U64, I64, REAL, CHOICE, UUID };

struct option {
    const char *name;
    enum kind kind;
    const char *value; /* how --help calls it; of a CHOICE: the choices, a|b|c */
    size_t offset;
    double least, most; /* of a number; most: bytes of a text, 0: any */
    const char *fallback;
    const char *help;
};

#define AT(field) offsetof(struct kvt_options, field)

static const struct option table[] = {
    {NULL, HEADING, NULL, 0, 0, 0, NULL, "Model"},
    {"--model", TEXT, "FILE", AT(model), 0, 0, NULL, "a GGUF file of the Llama family"},
    {"--random", TEXT, "SHAPE", AT(random), 0, 0, NULL, "random weights of a named shape instead"},
    {"--layers", U32, "N", AT(layers), 1, KVT_LAYERS_MAX, NULL,
     "use only the first N layers; with --random: have N layers"},
    {NULL, HEADING, NULL, 0, 0, 0, NULL, "Prompt"},
    {"--prompt", TEXTS, "TEXT", AT(prompts), 0, 0, NULL,
     "text to go on from; may be given again: each is a row"},
    {"--prompt-file", TEXTS, "FILE", AT(prompt_files), 0, 0, NULL, "the same from a file"},
    {"--ids", TEXTS, "LIST", AT(ids), 0, 0, NULL, "the same as token ids: 1,2,3"},
    {"--prompt-tokens", U32, "N", AT(prompt_tokens), 1, 1 << 30, NULL,
     "cut each prompt after N tokens; with --random and no prompt: N random ones"},
    {"--chat", FLAG, NULL, AT(chat), 0, 0, NULL, "put the prompt into the model's chat template"},
    {"--system", TEXT, "TEXT", AT(system), 0, 0, NULL, "system text for --chat"},
    {"--special", FLAG, NULL, AT(special), 0, 0, NULL,
     "names of control tokens in the prompt become those tokens"},
    {NULL, HEADING, NULL, 0, 0, 0, NULL, "Generation"},
    {"-n", U32, "N", AT(generate), 0, 1 << 30, "128", "tokens to generate at most"},
    {"--ignore-end", FLAG, NULL, AT(ignore_end), 0, 0, NULL, "go on behind the end of the text"},
    {"--temp", REAL, "T", AT(temperature), 0, 100, "0", "temperature; 0: always the likeliest"},
    {"--top-k", U32, "K", AT(top_k), 0, 1 << 24, "40", "sample among the K likeliest; 0: all"},
    {"--top-p", REAL, "P", AT(top_p), 0, 1, "0.95", "sample among the likeliest that have P"},
    {"--seed", U64, "N", AT(seed), 0, 0, "1", "of sampling and of --random"},
    {"--rows", U32, "N", AT(rows), 1, KVT_ROWS_MAX, "1",
     "continuations of each prompt, side by side"},
    {NULL, HEADING, NULL, 0, 0, 0, NULL, "Computation"},
    {"--threads", U32, "N", AT(threads), 1, KVT_POOL_THREADS_MAX, NULL, "default: all CPUs"},
    {"--chunk", U32, "N", AT(chunk), 1, 65536, "256", "prompt tokens of a row in one step"},
    {"--steps-ahead", U32, "N", AT(steps_ahead), 1, KVT_STEPS_AHEAD_MAX, "16",
     "decode steps to ask the daemon for at once"},
    {"--context", U32, "N", AT(context), 1, 1 << 30, NULL, "tokens of a row; default: the model's"},
    {NULL, HEADING, NULL, 0, 0, 0, NULL, "K and V"},
    {"--runtime-dir", TEXT, "DIR", AT(runtime_dir), 0, 0, NULL,
     "of kvtierd; default: $KVTIER_RUNTIME_DIR or /run/kvtierd"},
    {"--device", UUID, "UUID", AT(device), 0, 0, NULL,
     "the daemon's device to work on; kvtierctl status lists them; default: its first"},
    {"--name", TEXT, "TEXT", AT(name), 0, KVT_NAME_BYTES - 1, NULL,
     "what kvtierctl calls this worker"},
    {"--mode", CHOICE, "dynamic|static|offloaded|offloaded-static", AT(mode), 0, 0, "dynamic",
     "how the daemon keeps them"},
    {"--resident-layers", I64, "N", AT(resident_layers), -1, KVT_LAYERS_MAX, "-1",
     "at most N layers stay on the device; -1: as the mode says"},
    {"--piece-tokens", U32, "N", AT(piece_tokens), 0, 1 << 30, "0",
     "tokens of a piece, a multiple of 256; 0: chosen for you"},
    {"--kv-dtype", CHOICE, "f16|bf16|f32", AT(kv_dtype), 0, 0, "f16", "how they are stored"},
    {"--local", FLAG, NULL, AT(local), 0, 0, NULL, "no daemon: keep them in this process"},
    {NULL, HEADING, NULL, 0, 0, 0, NULL, "Output"},
    {"--json", FLAG, NULL, AT(json), 0, 0, NULL, "one JSON object with texts, ids and speeds"},
    {"--progress", CHOICE, "auto|always|never", AT(progress), 0, 0, "auto",
     "progress on stderr; auto: if it is a terminal"},
    {"--dump-logits", TEXT, "FILE", AT(dump_logits), 0, 0, NULL,
     "write the f32 logits of every step's last tokens"},
    {"--help", FLAG, NULL, AT(help), 0, 0, NULL, "this text"},
    {"--version", FLAG, NULL, AT(version), 0, 0, NULL, "the version"},
};
#define TABLE_COUNT (sizeof(table) / sizeof(table[0]))

static int wrong(const struct option *o, const char *value, char *err, size_t err_size) {
    if (o->kind == CHOICE)
        return kvt_fail(-KVT_EINVAL, err, err_size, "%s %s: is none of %s", o->name, value,
                        o->value);
    if (o->kind == UUID)
        return kvt_fail(-KVT_EINVAL, err, err_size,
                        "%s %s: is not an identity of 32 hexadecimal digits, with or without "
                        "dashes",
                        o->name, value);
    if (o->kind == U64)
        return kvt_fail(-KVT_EINVAL, err, err_size, "%s %s: is not a whole number", o->name, value);
    return kvt_fail(-KVT_EINVAL, err, err_size, "%s %s: is not a %snumber from %.0f to %.0f",
                    o->name, value, o->kind == REAL ? "" : "whole ", o->least, o->most);
}

static bool is_choice(const char *choices, const char *value) {
    size_t length = strlen(value);
    for (const char *at = choices; at; at = strchr(at, '|') ? strchr(at, '|') + 1 : NULL)
        if (length > 0 && strncmp(at, value, length) == 0 && (at[length] == '|' || !at[length]))
            return true;
    return false;
}

static int set(struct kvt_options *options, const struct option *o, const char *value, char *err,
               size_t err_size) {
    void *at = (char *)options + o->offset;
    char *end = NULL;
    errno = 0;
    switch (o->kind) {
    case FLAG:
        *(bool *)at = true;
        return 0;
    case CHOICE:
        if (!is_choice(o->value, value))
            return wrong(o, value, err, err_size);
        *(const char **)at = value;
        return 0;
    case TEXT:
        if (o->most > 0 && (double)strlen(value) > o->most)
            return kvt_fail(-KVT_EINVAL, err, err_size,
                            "%s %.20s...: has %zu bytes; at most %.0f "
                            "are possible",
                            o->name, value, strlen(value), o->most);
        *(const char **)at = value;
        return 0;
    case TEXTS: {
        struct kvt_texts *texts = at;
        if (texts->count == KVT_PROMPTS_MAX)
            return kvt_fail(-KVT_EINVAL, err, err_size, "%s: may be given %d times", o->name,
                            KVT_PROMPTS_MAX);
        texts->items[texts->count++] = value;
        return 0;
    }
    case UUID:
        if (kvt_uuid_parse(value, at) != NULL)
            return wrong(o, value, err, err_size);
        options->has_device = true;
        return 0;
    case REAL: {
        double number = strtod(value, &end);
        if (end == value || *end || errno || !(number >= o->least && number <= o->most))
            return wrong(o, value, err, err_size);
        *(double *)at = number;
        return 0;
    }
    case U64: {
        uint64_t number = strtoull(value, &end, 10);
        if (end == value || *end || errno || strchr(value, '-'))
            return wrong(o, value, err, err_size);
        *(uint64_t *)at = number;
        return 0;
    }
    default: {
        long long number = strtoll(value, &end, 10);
        if (end == value || *end || errno || (double)number < o->least || (double)number > o->most)
            return wrong(o, value, err, err_size);
        if (o->kind == U32)
            *(uint32_t *)at = (uint32_t)number;
        else
            *(int64_t *)at = number;
        return 0;
    }
    }
}

/* The option that an argument names, "--name" or "--name=value"; *value is behind the "=". */
static const struct option *find(const char *argument, const char **value) {
    const char *equals = strncmp(argument, "--", 2) == 0 ? strchr(argument, '=') : NULL;
    size_t length = equals ? (size_t)(equals - argument) : strlen(argument);
    *value = equals ? equals + 1 : NULL;
    for (size_t i = 0; i < TABLE_COUNT; i++)
        if (table[i].kind != HEADING && strlen(table[i].name) == length &&
            strncmp(table[i].name, argument, length) == 0)
            return &table[i];
    return NULL;
}

/* Where a list stops being one of token ids; NULL: nowhere. Which ids there are, the model says. */
static const char *list_fault(const char *list) {
    const char *at = list;
    do {
        char *end;
        at += strspn(at, " ");
        errno = 0;
        unsigned long long id = strtoull(at, &end, 10);
        if (*at < '0' || *at > '9' || errno || id > UINT32_MAX || (*end && *end != ','))
            return at;
        at = *end ? end + 1 : end;
    } while (*at);
    return NULL;
}

/* What is wrong whatever the model. */
static int check_values(const struct kvt_options *o, uint32_t prompts, char *err, size_t err_size) {
    for (uint32_t i = 0; i < o->ids.count; i++) {
        const char *fault = list_fault(o->ids.items[i]);
        if (fault)
            return kvt_fail(-KVT_EINVAL, err, err_size,
                            "--ids: \"%.20s\" does not begin with a token id; write ids like 1,2,3",
                            fault);
    }
    if (o->piece_tokens % KVT_SPLIT_TOKENS != 0)
        return kvt_fail(-KVT_EINVAL, err, err_size,
                        "--piece-tokens %" PRIu32 ": is not a multiple of %d", o->piece_tokens,
                        KVT_SPLIT_TOKENS);
    if (prompts * o->rows > KVT_ROWS_MAX)
        return kvt_fail(-KVT_EINVAL, err, err_size,
                        "--rows %" PRIu32 ": of %" PRIu32 " prompts are %" PRIu32
                        " rows; at most %d are possible",
                        o->rows, prompts, prompts * o->rows, KVT_ROWS_MAX);
    if (o->random && !kvt_model_random_has(o->random))
        return kvt_fail(-KVT_EINVAL, err, err_size, "--random %s: no such shape; there are %s",
                        o->random, kvt_model_random_names());
    return 0;
}

static int check(const struct kvt_options *o, char *err, size_t err_size) {
    uint32_t prompts = o->prompts.count + o->prompt_files.count + o->ids.count;
    if (!o->model == !o->random)
        return kvt_fail(-KVT_EINVAL, err, err_size,
                        o->model ? "--model and --random: give one of them"
                                 : "no model: give --model FILE or --random SHAPE (one of %s)",
                        kvt_model_random_names());
    if (prompts > KVT_PROMPTS_MAX)
        return kvt_fail(-KVT_EINVAL, err, err_size, "%" PRIu32 " prompts: at most %d", prompts,
                        KVT_PROMPTS_MAX);
    if (prompts == 0 && !(o->random && o->prompt_tokens > 0))
        return kvt_fail(-KVT_EINVAL, err, err_size,
                        "no prompt: give --prompt, --prompt-file or --ids%s",
                        o->random ? ", or --prompt-tokens N for random ones" : "");
    if (o->random && (o->prompts.count > 0 || o->prompt_files.count > 0 || o->chat))
        return kvt_fail(-KVT_EINVAL, err, err_size,
                        "--random: has no tokenizer, so it takes --ids or --prompt-tokens N");
    if (o->system && !o->chat)
        return kvt_fail(-KVT_EINVAL, err, err_size, "--system: needs --chat");
    return check_values(o, prompts > 0 ? prompts : 1, err, err_size);
}

int kvt_options_parse(struct kvt_options *options, int argc, char **argv, char *err,
                      size_t err_size) {
    *options = (struct kvt_options){0};
    for (size_t i = 0; i < TABLE_COUNT; i++)
        if (table[i].fallback && set(options, &table[i], table[i].fallback, err, err_size))
            return -KVT_EINVAL;
    for (int i = 1; i < argc; i++) {
        const char *value;
        const struct option *o = find(argv[i], &value);
        if (!o)
            return kvt_fail(-KVT_EINVAL, err, err_size,
                            "%s: no such option; kvtier-run --help lists them", argv[i]);
        if (o->kind == FLAG && value)
            return kvt_fail(-KVT_EINVAL, err, err_size, "%s: takes no value", o->name);
        if (o->kind != FLAG && !value && ++i == argc)
            return kvt_fail(-KVT_EINVAL, err, err_size, "%s: lacks its value (%s)", o->name,
                            o->value);
        int rc = set(options, o, value ? value : argv[i], err, err_size);
        if (rc)
            return rc;
    }
    return options->help || options->version ? 0 : check(options, err, err_size);
}

void kvt_options_help(void) {
    printf("kvtier-run: generates text with a Llama-family model whose K and V kvtierd keeps\n\n"
           "    kvtier-run --model FILE --prompt TEXT [options]\n"
           "    kvtier-run --random SHAPE --prompt-tokens N [options]\n");
    for (size_t i = 0; i < TABLE_COUNT; i++) {
        const struct option *o = &table[i];
        char left[80];
        if (o->kind == HEADING) {
            printf("\n%s\n", o->help);
            continue;
        }
        snprintf(left, sizeof(left), "%s %s", o->name, o->value ? o->value : "");
        printf(strlen(left) > 26 ? "  %s\n  %-27s" : "  %-27s", left, "");
        printf("%s", o->help);
        if (o->fallback)
            printf(" (default %s)", o->fallback);
        putchar('\n');
    }
    printf(
        "\nSHAPE is one of %s.\n"
        "The text goes to stdout, everything else to stderr. Exit status: 0 done, 1 failed (also\n"
        "if the output cannot be written), 2 wrong usage, 130 interrupted.\n",
        kvt_model_random_names());
}
