/* kvtierctl plan: what a cache would get, or how a running one does, before or while it runs. */
#include "client/ctl/ctl.h"
#include "client/ctl/text.h"
#include "client/shapes.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char kvt_ctl_plan_help[] =
    "plan: what a cache would get, or --cache ID: what a running one has; exit status 1 if it "
    "does\n"
    "not fit, and with --json \"fits\": false with the tier and what it lacks\n"
    "  --cache ID           a running cache instead of a shape\n"
    "  --shape NAME         tiny, smollm2-135m, smollm2-1.7b, llama-3.2-1b, qwen2.5-7b,\n"
    "                       llama-3-8b, llama-3-70b; or in numbers:\n"
    "  --layers N           layers\n"
    "  --kv-heads N         KV heads of a layer\n"
    "  --head-dim N         elements of a head's K and V (--k-head-dim, --v-head-dim: apart)\n"
    "  --dtype TYPE         f32, f16 or bf16 (f16)\n"
    "  --tokens N           a row's length to plan for (needed)\n"
    "  --rows N             sequences (1)\n"
    "  --append N           the most tokens that one step appends to a row (1)\n"
    "  --mode MODE          dynamic, static, offloaded or offloaded-static (dynamic)\n"
    "  --resident N         layers that may stay on the device\n"
    "  --piece-tokens N     tokens of a piece at most\n"
    "  --dense              for a dense worker (segment)\n"
    "  --device N           index of the device in the configuration (0)\n"
    "  --budget SIZE        device memory to plan with, as 512MiB (what is free now)\n";

struct wanted {
    uint64_t cache;
    uint64_t layers;
    uint64_t kv_heads;
    uint64_t k_head_dim;
    uint64_t v_head_dim;
    uint64_t dtype;
    uint64_t tokens;
    uint64_t rows;
    uint64_t append;
    uint64_t mode;
    uint64_t resident_plus_1;
    uint64_t piece_tokens;
    uint64_t kind;
    uint64_t device;
    uint64_t budget_bytes;
};

struct shape {
    const char *name;
    uint64_t layers;
    uint64_t kv_heads;
    uint64_t head_dim;
};

#define SHAPE(name, tied, layers, width, hidden, heads, kv_heads, k_dim, ...) \
    {name, layers, kv_heads, k_dim},
static const struct shape shapes[] = {KVT_SHAPES(SHAPE)};

/* ---- options ---------------------------------------------------------------------------------- */

static bool read_shape(const char *value, struct wanted *w) {
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        if (strcmp(value, shapes[i].name) == 0) {
            w->layers = shapes[i].layers;
            w->kv_heads = shapes[i].kv_heads;
            w->k_head_dim = w->v_head_dim = shapes[i].head_dim;
            return true;
        }
    }
    (void)kvt_ctl_usage("--shape: '%s' is unknown; accepted: %s", value, KVT_SHAPE_NAMES);
    return false;
}

/* `accepted` is the words for a person. */
static bool read_word(const char *name, const char *value, const char *const *words,
                      const char *accepted, uint64_t *out) {
    for (uint64_t i = 0; words[i] != NULL; i++) {
        if (strcmp(value, words[i]) == 0) {
            *out = i + 1;
            return true;
        }
    }
    (void)kvt_ctl_usage("%s: '%s' is unknown; accepted: %s", name, value, accepted);
    return false;
}

/* -1: it is no option with a value; 0: read; otherwise the exit code. */
static int read_valued(struct kvt_ctl *ctl, int *at, struct wanted *w) {
    static const char *const dtypes[] = {"f32", "f16", "bf16", NULL};
    static const char *const modes[] = {"dynamic", "static", "offloaded", "offloaded-static", NULL};
    const struct {
        const char *name;
        uint64_t *out;
        uint64_t lowest;
        uint64_t highest;
    } numbers[] = {{"--cache", &w->cache, 1, UINT32_MAX},
                   {"--layers", &w->layers, 1, KVT_LAYERS_MAX},
                   {"--kv-heads", &w->kv_heads, 1, KVT_KV_HEADS_MAX},
                   {"--k-head-dim", &w->k_head_dim, 1, KVT_HEAD_DIM_MAX},
                   {"--v-head-dim", &w->v_head_dim, 0, KVT_HEAD_DIM_MAX},
                   {"--tokens", &w->tokens, 1, KVT_TOKENS_MAX},
                   {"--rows", &w->rows, 1, KVT_ROWS_MAX},
                   {"--append", &w->append, 1, KVT_APPEND_MAX},
                   {"--piece-tokens", &w->piece_tokens, 1, KVT_TOKENS_MAX},
                   {"--device", &w->device, 0, KVT_DEVICES_MAX - 1}};
    const char *value;
    bool bad = false;
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0] && !bad; i++) {
        if ((value = kvt_ctl_value(ctl, at, numbers[i].name, &bad)) != NULL) {
            return kvt_ctl_number(numbers[i].name, value, numbers[i].lowest, numbers[i].highest,
                                  numbers[i].out)
                       ? 0
                       : KVT_CTL_USAGE;
        }
    }
    bool good = true;
    uint64_t n;
    if (!bad && (value = kvt_ctl_value(ctl, at, "--shape", &bad)) != NULL) {
        good = read_shape(value, w);
    } else if (!bad && (value = kvt_ctl_value(ctl, at, "--head-dim", &bad)) != NULL) {
        good = kvt_ctl_number("--head-dim", value, 1, KVT_HEAD_DIM_MAX, &w->k_head_dim);
        w->v_head_dim = w->k_head_dim;
    } else if (!bad && (value = kvt_ctl_value(ctl, at, "--dtype", &bad)) != NULL) {
        good = read_word("--dtype", value, dtypes, "f32, f16, bf16", &w->dtype);
    } else if (!bad && (value = kvt_ctl_value(ctl, at, "--mode", &bad)) != NULL) {
        good = read_word("--mode", value, modes, "dynamic, static, offloaded, offloaded-static",
                         &w->mode);
    } else if (!bad && (value = kvt_ctl_value(ctl, at, "--resident", &bad)) != NULL) {
        good = kvt_ctl_number("--resident", value, 0, KVT_LAYERS_MAX, &n);
        w->resident_plus_1 = good ? n + 1 : 0;
    } else if (!bad && (value = kvt_ctl_value(ctl, at, "--budget", &bad)) != NULL) {
        good = kvt_ctl_size_parse(value, &w->budget_bytes);
        if (!good) {
            (void)kvt_ctl_usage("--budget: '%s' is not a size such as 512MiB", value);
        }
    } else {
        return bad ? KVT_CTL_USAGE : -1;
    }
    return good && !bad ? 0 : KVT_CTL_USAGE;
}

static int read_options(struct kvt_ctl *ctl, struct wanted *w) {
    int options = 0;
    for (int i = 0; i < ctl->argc; i++, options++) {
        if (strcmp(ctl->argv[i], "--dense") == 0) {
            w->kind = KVT_DENSE;
            continue;
        }
        int rc = read_valued(ctl, &i, w);
        if (rc != 0) {
            return rc > 0 ? rc : kvt_ctl_usage("plan: '%s' is unknown", ctl->argv[i]);
        }
    }
    if (w->cache != 0 && options > 1) {
        return kvt_ctl_usage("plan: --cache names a running cache: no other option goes with it");
    }
    if (w->cache == 0 && (w->layers == 0 || w->kv_heads == 0 || w->k_head_dim == 0)) {
        return kvt_ctl_usage("plan: --shape, or --layers, --kv-heads and --head-dim, or --cache");
    }
    if (w->cache == 0 && w->tokens == 0) {
        return kvt_ctl_usage("plan: --tokens is needed");
    }
    return KVT_CTL_OK;
}

/* ---- asking ----------------------------------------------------------------------------------- */

static int ask(struct kvt_ctl *ctl, const struct wanted *w, Kvt__Reply **reply) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Plan m = KVT__PLAN__INIT;
    Kvt__CacheOptions o = KVT__CACHE_OPTIONS__INIT;
    Kvt__Layer l = KVT__LAYER__INIT;
    Kvt__Layer *layers[] = {&l};
    l.kind = KVT_KIND_FULL;
    l.kv_heads = (uint32_t)w->kv_heads;
    l.k_head_dim = (uint32_t)w->k_head_dim;
    l.v_head_dim = (uint32_t)w->v_head_dim;
    l.dtype = (uint32_t)w->dtype;
    l.repeat = (uint32_t)w->layers;
    o.n_layers = 1;
    o.layers = layers;
    o.mode = (uint32_t)w->mode;
    o.rows = (uint32_t)w->rows;
    o.append_max = (uint32_t)w->append;
    o.tokens_max = (uint32_t)w->tokens;
    o.piece_tokens = (uint32_t)w->piece_tokens;
    o.resident_layers_max_plus_1 = (uint32_t)w->resident_plus_1;
    m.options = w->cache == 0 ? &o : NULL;
    m.cache = (uint32_t)w->cache;
    m.tokens = (uint32_t)w->tokens;
    m.worker_kind = (uint32_t)w->kind;
    m.device = (uint32_t)w->device;
    m.device_budget_bytes = w->budget_bytes;
    r.body_case = KVT__REQUEST__BODY_PLAN;
    r.plan = &m;
    return kvt_ctl_ask(ctl, "PLAN", &r, KVT__REPLY__BODY_PLAN, reply);
}

/* ---- showing ---------------------------------------------------------------------------------- */

static void show_json(const Kvt__PlanReply *p, bool running) {
    struct kvt_ctl_json j = {.out = stdout};
    kvt_ctl_json_begin(&j, NULL, '{');
    kvt_ctl_json_bool(&j, "fits", true);
    kvt_ctl_json_number(&j, "resident_layers", p->resident_layers);
    kvt_ctl_json_number(&j, "slots", p->slots);
    kvt_ctl_json_number(&j, "slot_bytes", p->slot_bytes);
    kvt_ctl_json_number(&j, "device_bytes", p->device_bytes);
    kvt_ctl_json_number(&j, "host_bytes", p->host_bytes);
    kvt_ctl_json_number(&j, "to_device_bytes_per_step", p->to_device_bytes_per_step);
    kvt_ctl_json_number(&j, "from_device_bytes_per_step", p->from_device_bytes_per_step);
    kvt_ctl_json_number(&j, "link_bytes_per_s", p->link_bytes_per_s);
    kvt_ctl_json_number(&j, "link_from_bytes_per_s", p->link_from_bytes_per_s);
    kvt_ctl_json_number(&j, "to_device_ns_per_step", p->to_device_ns_per_step);
    kvt_ctl_json_number(&j, "from_device_ns_per_step", p->from_device_ns_per_step);
    kvt_ctl_json_real(&j, "steps_per_s_max", p->steps_per_s_max);
    kvt_ctl_json_real(&j, "tokens_per_s_max", p->tokens_per_s_max);
    if (running) {
        kvt_ctl_json_number(&j, "step_ns", p->step_ns);
        kvt_ctl_json_number(&j, "link_workers", p->link_workers);
    }
    kvt_ctl_json_real(&j, "ceiling_fraction", p->ceiling_fraction);
    kvt_ctl_json_letters(&j, "layers", p->layers.data, p->layers.len);
    kvt_ctl_json_end(&j, '}');
    (void)fputc('\n', stdout);
}

/* What the link says to it, and no more: computing is not planned. */
static void show_ceiling(const Kvt__PlanReply *p) {
    char a[KVT_CTL_TEXT_BYTES];
    char b[KVT_CTL_TEXT_BYTES];
    if (p->to_device_bytes_per_step == 0 && p->from_device_bytes_per_step == 0) {
        (void)printf("ceiling       the link sets none: nothing is streamed\n");
    } else if (p->steps_per_s_max > 0) {
        (void)printf("that takes    %s to the device, beside it %s from it\n",
                     kvt_ctl_time(p->to_device_ns_per_step, a),
                     kvt_ctl_time(p->from_device_ns_per_step, b));
        (void)printf("ceiling       %.1f steps/s, %.1f tokens/s with one a row, by the link alone: "
                     "computing may take longer\n",
                     p->steps_per_s_max, p->tokens_per_s_max);
    } else {
        (void)printf("ceiling       not known before the link is measured\n");
    }
}

/* Of a running cache. */
static void show_achieved(const Kvt__PlanReply *p) {
    char a[KVT_CTL_TEXT_BYTES];
    if (p->step_ns > 0) {
        (void)printf("steps take    %s, the worker's recent average\n",
                     kvt_ctl_time(p->step_ns, a));
    }
    if (p->ceiling_fraction > 0) {
        (void)printf("achieved      %.0f %% of the ceiling", 100 * p->ceiling_fraction);
        if (p->link_workers > 1) {
            (void)printf("; %u workers share the link, a fair share is %.0f %%", p->link_workers,
                         100.0 / p->link_workers);
        }
        (void)printf("\n");
    }
}

static void show_text(const Kvt__PlanReply *p) {
    char a[KVT_CTL_TEXT_BYTES];
    char b[KVT_CTL_TEXT_BYTES];
    char *bar = kvt_ctl_layers_bar(p->layers.data, p->layers.len);
    (void)printf("layers        %zu, of which %u stay on the device  %s\n", p->layers.len,
                 p->resident_layers, bar != NULL ? bar : "");
    free(bar);
    (void)printf("slots         %u of %s\n", p->slots, kvt_ctl_size(p->slot_bytes, a));
    (void)printf("memory        device %s, host %s\n", kvt_ctl_size(p->device_bytes, a),
                 kvt_ctl_size(p->host_bytes, b));
    (void)printf("a step moves  %s to the device, %s from it\n",
                 kvt_ctl_size(p->to_device_bytes_per_step, a),
                 kvt_ctl_size(p->from_device_bytes_per_step, b));
    if (p->link_bytes_per_s > 0) {
        (void)printf("link          %s/s to the device, %s/s from it, measured\n",
                     kvt_ctl_size(p->link_bytes_per_s, a),
                     kvt_ctl_size(p->link_from_bytes_per_s, b));
    } else {
        (void)printf("link          not measured yet\n");
    }
    show_ceiling(p);
    show_achieved(p);
}

static void show_shortage_json(const struct kvt_client *client) {
    const struct kvt_client_shortage *lacks = &client->shortage;
    struct kvt_ctl_json j = {.out = stdout};
    kvt_ctl_json_begin(&j, NULL, '{');
    kvt_ctl_json_bool(&j, "fits", false);
    if (lacks->tier[0] != '\0') {
        kvt_ctl_json_string(&j, "tier", lacks->tier);
        kvt_ctl_json_number(&j, "need_bytes", lacks->need_bytes);
        kvt_ctl_json_number(&j, "available_bytes", lacks->available_bytes);
        kvt_ctl_json_number(&j, "budget_bytes", lacks->budget_bytes);
        if (lacks->worker_max_bytes != 0) {
            kvt_ctl_json_number(&j, "worker_max_bytes", lacks->worker_max_bytes);
        }
    }
    kvt_ctl_json_string(&j, "error", kvt_error_message(client));
    kvt_ctl_json_end(&j, '}');
    (void)fputc('\n', stdout);
}

/* Behind the daemon's sentence on what does not fit: how much K and V there is, wherever it lies. */
static void explain_size(const struct wanted *w) {
    char all[KVT_CTL_TEXT_BYTES];
    char token[KVT_CTL_TEXT_BYTES];
    uint64_t element_bytes = w->dtype == KVT_DTYPE_F32 ? 4 : 2;
    uint64_t token_bytes =
        w->layers * w->kv_heads * (w->k_head_dim + w->v_head_dim) * element_bytes;
    double total = (double)token_bytes * (double)w->tokens * (double)w->rows;
    (void)fprintf(stderr, "kvtierctl: K and V take %s: %s a token in all %u layers\n",
                  kvt_ctl_size(total < 1e18 ? (uint64_t)total : UINT64_MAX, all),
                  kvt_ctl_size(token_bytes, token), (unsigned)w->layers);
}

int kvt_ctl_plan(struct kvt_ctl *ctl) {
    struct wanted w = {
        .dtype = KVT_DTYPE_F16, .rows = 1, .append = 1, .mode = KVT_DYNAMIC, .kind = KVT_SEGMENT};
    Kvt__Reply *reply;
    int rc = read_options(ctl, &w);
    if (rc == KVT_CTL_OK) {
        rc = kvt_ctl_attach(ctl);
    }
    if (rc == KVT_CTL_OK) {
        rc = ask(ctl, &w, &reply);
        if (rc == KVT_CTL_ERROR && ctl->error == -KVT_EQUOTA) {
            explain_size(&w);
            if (ctl->json) {
                show_shortage_json(ctl->client);
            }
        }
    }
    if (rc != KVT_CTL_OK) {
        return rc;
    }
    if (ctl->json) {
        show_json(reply->plan, w.cache != 0);
    } else {
        show_text(reply->plan);
    }
    kvt__reply__free_unpacked(reply, NULL);
    return KVT_CTL_OK;
}
