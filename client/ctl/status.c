/* kvtierctl status, workers, caches. Lists come in parts, each asked for by its offset. */
#include "client/ctl/ctl.h"
#include "client/ctl/text.h"
#include "proto/uuid.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum list { DEVICES = 1, WORKERS = 2, CACHES = 4 };

/* Every reply of one look; the lists are spread over them. */
struct look {
    Kvt__Reply **replies;
    size_t count;
};

static void look_free(struct look *l) {
    for (size_t i = 0; i < l->count; i++) {
        kvt__reply__free_unpacked(l->replies[i], NULL);
    }
    free(l->replies);
    memset(l, 0, sizeof *l);
}

static int look_add(struct look *l, Kvt__Reply *reply) {
    Kvt__Reply **replies = realloc(l->replies, (l->count + 1) * sizeof *replies);
    if (replies == NULL) {
        kvt__reply__free_unpacked(reply, NULL);
        return KVT_CTL_ERROR;
    }
    l->replies = replies;
    l->replies[l->count++] = reply;
    return KVT_CTL_OK;
}

/* One list, in as many parts as it takes. */
static int look_at(struct kvt_ctl *ctl, enum list list, struct look *l) {
    uint32_t offset = 0;
    do {
        Kvt__Request r = KVT__REQUEST__INIT;
        Kvt__Status m = KVT__STATUS__INIT;
        Kvt__Reply *reply;
        m.devices = list == DEVICES;
        m.workers = list == WORKERS;
        m.caches = list == CACHES;
        m.offset = offset;
        r.body_case = KVT__REQUEST__BODY_STATUS;
        r.status = &m;
        int rc = kvt_ctl_ask(ctl, "STATUS", &r, KVT__REPLY__BODY_STATUS, &reply);
        if (rc != KVT_CTL_OK) {
            return rc;
        }
        uint32_t next = reply->status->next_offset;
        offset = next > offset ? next : 0;
        rc = look_add(l, reply);
        if (rc != KVT_CTL_OK) {
            return rc;
        }
    } while (offset != 0);
    return KVT_CTL_OK;
}

/* Runs `do_it` for each entry of a list over all replies. */
#define FOR_EACH(l, field, variable)                                                      \
    for (size_t reply_ = 0; reply_ < (l)->count; reply_++)                                \
        for (size_t i_ = 0; i_ < (l)->replies[reply_]->status->n_##field &&               \
                            ((variable) = (l)->replies[reply_]->status->field[i_], true); \
             i_++)

/* ---- words ------------------------------------------------------------------------------------ */

static const char *mode_name(uint32_t mode) {
    static const char *const names[] = {"?", "dynamic", "static", "offloaded", "offloaded-static"};
    return names[mode < sizeof names / sizeof names[0] ? mode : 0];
}

static const char *kind_name(uint32_t kind) {
    return kind == KVT_SEGMENT ? "segment" : kind == KVT_DENSE ? "dense" : "?";
}

/* ---- tables ----------------------------------------------------------------------------------- */

static void cell_text(struct kvt_ctl_table *t, const char *text) {
    char clean[64];
    kvt_ctl_cell(t, kvt_ctl_clean(text, clean, sizeof clean));
}

static void cell_size(struct kvt_ctl_table *t, uint64_t bytes) {
    char text[KVT_CTL_TEXT_BYTES];
    kvt_ctl_cell(t, kvt_ctl_size(bytes, text));
}

static void cell_count(struct kvt_ctl_table *t, uint64_t n) {
    char text[KVT_CTL_TEXT_BYTES];
    kvt_ctl_cell(t, kvt_ctl_count(n, text));
}

static void cell_speed(struct kvt_ctl_table *t, uint64_t bytes_per_s) {
    char text[KVT_CTL_TEXT_BYTES];
    if (bytes_per_s == 0) {
        kvt_ctl_cell(t, "-");
    } else {
        kvt_ctl_cellf(t, "%s/s", kvt_ctl_size(bytes_per_s, text));
    }
}

/* Frees the bar. */
static void cell_bar(struct kvt_ctl_table *t, char *bar) {
    kvt_ctl_cell(t, bar);
    free(bar);
}

static void print_tiers(const struct look *l) {
    struct kvt_ctl_table t = {.headers = {"TIER", ">CACHES", ">USED", ">BUDGET", "", ">PINNED",
                                          ">LINK TO", ">LINK FROM"}};
    const Kvt__Tier *tier;
    FOR_EACH(l, tiers, tier) {
        cell_text(&t, tier->name);
        cell_size(&t, tier->live_bytes);
        cell_size(&t, tier->used_bytes);
        cell_size(&t, tier->budget_bytes);
        cell_bar(&t, kvt_ctl_fill_bar(tier->used_bytes, tier->budget_bytes, 16));
        cell_size(&t, tier->pinned_by_dead_bytes);
        cell_speed(&t, tier->link_to_bytes_per_s);
        cell_speed(&t, tier->link_from_bytes_per_s);
    }
    kvt_ctl_table_print(&t, stdout);
}

/* NULL: a tier without one. */
static const char *tier_uuid(const Kvt__Tier *tier, char *text) {
    return tier->uuid.len == KVT_UUID_BYTES ? kvt_uuid_text(tier->uuid.data, text) : NULL;
}

/* How a worker names a device: shown where there is a choice. */
static void print_uuids(const struct look *l) {
    const Kvt__Tier *tier;
    char uuid[KVT_UUID_TEXT_BYTES];
    char name[64];
    size_t devices = 0;
    FOR_EACH(l, tiers, tier) {
        devices += tier_uuid(tier, uuid) != NULL;
    }
    FOR_EACH(l, tiers, tier) {
        if (devices > 1 && tier_uuid(tier, uuid) != NULL) {
            (void)printf("uuid of %s: %s\n", kvt_ctl_clean(tier->name, name, sizeof name), uuid);
        }
    }
}

static void print_workers(const struct look *l) {
    struct kvt_ctl_table t = {.headers = {">SESSION", "NAME", ">PID", ">UID", "KIND", "DEVICE",
                                          "STATE", ">CACHES", ">ON DEVICE", ">ON HOST", ">IDLE",
                                          ">STEP", ">OF LINK"}};
    const Kvt__Worker *w;
    FOR_EACH(l, workers, w) {
        char idle[KVT_CTL_TEXT_BYTES];
        char step[KVT_CTL_TEXT_BYTES];
        kvt_ctl_cellf(&t, "%u", w->session);
        cell_text(&t, w->name);
        kvt_ctl_cellf(&t, "%u", w->pid);
        kvt_ctl_cellf(&t, "%u", w->uid);
        kvt_ctl_cell(&t, kind_name(w->kind));
        cell_text(&t, w->device);
        cell_text(&t, w->state);
        kvt_ctl_cellf(&t, "%u", w->caches);
        cell_size(&t, w->device_bytes);
        cell_size(&t, w->host_bytes);
        kvt_ctl_cell(&t, kvt_ctl_duration(w->idle_ms, idle));
        kvt_ctl_cell(&t, w->step_ns > 0 ? kvt_ctl_time(w->step_ns, step) : "-");
        if (w->ceiling_fraction > 0) {
            kvt_ctl_cellf(&t, "%.0f %%", 100 * w->ceiling_fraction);
        } else {
            kvt_ctl_cell(&t, "-");
        }
    }
    kvt_ctl_table_print(&t, stdout);
}

static void print_caches(const struct look *l) {
    struct kvt_ctl_table t = {.headers = {">CACHE", ">SESSION", "NAME", "MODE", ">ROWS", ">TOKENS",
                                          ">DEVICE", ">HOST", ">IN", ">OUT", ">STEPS", "LAYERS"}};
    const Kvt__Counters none = KVT__COUNTERS__INIT;
    const Kvt__Cache *c;
    FOR_EACH(l, caches, c) {
        const Kvt__Counters *n = c->counters != NULL ? c->counters : &none;
        kvt_ctl_cellf(&t, "%u", c->cache);
        kvt_ctl_cellf(&t, "%u", c->session);
        cell_text(&t, c->name);
        kvt_ctl_cell(&t, mode_name(c->mode));
        kvt_ctl_cellf(&t, "%u", c->rows);
        cell_count(&t, c->tokens_longest);
        cell_size(&t, c->device_bytes);
        cell_size(&t, c->host_bytes);
        cell_size(&t, n->to_device_bytes);
        cell_size(&t, n->from_device_bytes);
        cell_count(&t, n->steps_committed);
        cell_bar(&t, kvt_ctl_layers_bar(c->layers.data, c->layers.len));
    }
    kvt_ctl_table_print(&t, stdout);
}

static void print_legend(void) {
    bool blocks = kvt_ctl_has_blocks();
    (void)printf(
        "LAYERS: %s resident on the device, %s streamed from the host, . idle in the host\n",
        blocks ? "\xe2\x96\x88" : "#", blocks ? "\xe2\x96\x91" : "-");
}

/* ---- JSON ------------------------------------------------------------------------------------- */

static void json_counters(struct kvt_ctl_json *j, const Kvt__Counters *n) {
    Kvt__Counters none = KVT__COUNTERS__INIT;
    n = n != NULL ? n : &none;
    kvt_ctl_json_begin(j, "counters", '{');
    kvt_ctl_json_number(j, "to_device_bytes", n->to_device_bytes);
    kvt_ctl_json_number(j, "from_device_bytes", n->from_device_bytes);
    kvt_ctl_json_number(j, "prefetch_discarded_bytes", n->prefetch_discarded_bytes);
    kvt_ctl_json_number(j, "migrated_bytes", n->migrated_bytes);
    kvt_ctl_json_number(j, "compacted_bytes", n->compacted_bytes);
    kvt_ctl_json_number(j, "copied_on_write_bytes", n->copied_on_write_bytes);
    kvt_ctl_json_number(j, "steps_committed", n->steps_committed);
    kvt_ctl_json_number(j, "steps_failed", n->steps_failed);
    kvt_ctl_json_number(j, "tokens_appended", n->tokens_appended);
    kvt_ctl_json_end(j, '}');
}

static void json_tiers(struct kvt_ctl_json *j, const struct look *l) {
    const Kvt__Tier *t;
    char uuid[KVT_UUID_TEXT_BYTES];
    kvt_ctl_json_begin(j, "tiers", '[');
    FOR_EACH(l, tiers, t) {
        kvt_ctl_json_begin(j, NULL, '{');
        kvt_ctl_json_string(j, "name", t->name);
        if (tier_uuid(t, uuid) != NULL) {
            kvt_ctl_json_string(j, "uuid", uuid);
        }
        kvt_ctl_json_number(j, "budget_bytes", t->budget_bytes);
        kvt_ctl_json_number(j, "used_bytes", t->used_bytes);
        kvt_ctl_json_number(j, "live_bytes", t->live_bytes);
        kvt_ctl_json_number(j, "pinned_by_dead_bytes", t->pinned_by_dead_bytes);
        kvt_ctl_json_number(j, "link_to_bytes_per_s", t->link_to_bytes_per_s);
        kvt_ctl_json_number(j, "link_from_bytes_per_s", t->link_from_bytes_per_s);
        kvt_ctl_json_end(j, '}');
    }
    kvt_ctl_json_end(j, ']');
}

static void json_workers(struct kvt_ctl_json *j, const struct look *l) {
    const Kvt__Worker *w;
    kvt_ctl_json_begin(j, "workers", '[');
    FOR_EACH(l, workers, w) {
        kvt_ctl_json_begin(j, NULL, '{');
        kvt_ctl_json_number(j, "session", w->session);
        kvt_ctl_json_string(j, "name", w->name);
        kvt_ctl_json_number(j, "pid", w->pid);
        kvt_ctl_json_number(j, "uid", w->uid);
        kvt_ctl_json_string(j, "kind", kind_name(w->kind));
        kvt_ctl_json_string(j, "device", w->device);
        kvt_ctl_json_string(j, "state", w->state);
        kvt_ctl_json_number(j, "caches", w->caches);
        kvt_ctl_json_number(j, "device_bytes", w->device_bytes);
        kvt_ctl_json_number(j, "host_bytes", w->host_bytes);
        kvt_ctl_json_number(j, "idle_ms", w->idle_ms);
        kvt_ctl_json_number(j, "step_ns", w->step_ns);
        kvt_ctl_json_real(j, "ceiling_fraction", w->ceiling_fraction);
        json_counters(j, w->counters);
        kvt_ctl_json_end(j, '}');
    }
    kvt_ctl_json_end(j, ']');
}

static void json_caches(struct kvt_ctl_json *j, const struct look *l) {
    const Kvt__Cache *c;
    kvt_ctl_json_begin(j, "caches", '[');
    FOR_EACH(l, caches, c) {
        kvt_ctl_json_begin(j, NULL, '{');
        kvt_ctl_json_number(j, "cache", c->cache);
        kvt_ctl_json_number(j, "session", c->session);
        kvt_ctl_json_string(j, "name", c->name);
        kvt_ctl_json_string(j, "mode", mode_name(c->mode));
        kvt_ctl_json_number(j, "rows", c->rows);
        kvt_ctl_json_number(j, "tokens_longest", c->tokens_longest);
        kvt_ctl_json_number(j, "tokens_total", c->tokens_total);
        kvt_ctl_json_number(j, "device_bytes", c->device_bytes);
        kvt_ctl_json_number(j, "host_bytes", c->host_bytes);
        kvt_ctl_json_letters(j, "layers", c->layers.data, c->layers.len);
        kvt_ctl_json_number(j, "need_to_device_bytes", c->need_to_device_bytes);
        kvt_ctl_json_number(j, "need_from_device_bytes", c->need_from_device_bytes);
        json_counters(j, c->counters);
        kvt_ctl_json_end(j, '}');
    }
    kvt_ctl_json_end(j, ']');
}

/* ---- the commands ----------------------------------------------------------------------------- */

static void show_json(const struct look *l, unsigned lists) {
    struct kvt_ctl_json j = {.out = stdout};
    const Kvt__StatusReply *first = l->replies[0]->status;
    kvt_ctl_json_begin(&j, NULL, '{');
    if ((lists & DEVICES) != 0) {
        kvt_ctl_json_string(&j, "version", first->version);
        kvt_ctl_json_number(&j, "uptime_ms", first->uptime_ms);
        json_tiers(&j, l);
        json_counters(&j, first->counters);
    }
    if ((lists & WORKERS) != 0) {
        json_workers(&j, l);
    }
    if ((lists & CACHES) != 0) {
        json_caches(&j, l);
    }
    kvt_ctl_json_end(&j, '}');
    (void)fputc('\n', stdout);
}

static void print_summary(const Kvt__StatusReply *s) {
    char a[KVT_CTL_TEXT_BYTES];
    char b[KVT_CTL_TEXT_BYTES];
    char version[64];
    (void)printf("kvtierd %s, up %s\n", kvt_ctl_clean(s->version, version, sizeof version),
                 kvt_ctl_duration(s->uptime_ms, a));
    if (s->counters != NULL) {
        (void)printf("moved to devices %s, from devices %s; ",
                     kvt_ctl_size(s->counters->to_device_bytes, a),
                     kvt_ctl_size(s->counters->from_device_bytes, b));
        (void)printf("steps %s", kvt_ctl_count(s->counters->steps_committed, a));
        (void)printf(" (%s failed)\n", kvt_ctl_count(s->counters->steps_failed, a));
    }
}

static void show_tables(const struct look *l, unsigned lists) {
    bool all = (lists & DEVICES) != 0;
    if (all) {
        print_summary(l->replies[0]->status);
        (void)fputc('\n', stdout);
        print_tiers(l);
        print_uuids(l);
    }
    if ((lists & WORKERS) != 0) {
        (void)fputs(all ? "\n" : "", stdout);
        print_workers(l);
    }
    if ((lists & CACHES) != 0) {
        (void)fputs(all ? "\n" : "", stdout);
        print_caches(l);
        print_legend();
    }
}

static int look_and_show(struct kvt_ctl *ctl, unsigned lists, bool clear) {
    struct look l = {0};
    int rc = KVT_CTL_OK;
    for (unsigned list = DEVICES; list <= CACHES && rc == KVT_CTL_OK; list <<= 1) {
        if ((lists & list) != 0) {
            rc = look_at(ctl, (enum list)list, &l);
        }
    }
    if (rc == KVT_CTL_OK) {
        (void)fputs(clear ? "\033[H\033[2J" : "", stdout);
        if (ctl->json) {
            show_json(&l, lists);
        } else {
            show_tables(&l, lists);
        }
        rc = kvt_ctl_flush(ctl);
    }
    look_free(&l);
    return rc;
}

/* --watch, --watch SECONDS or --watch=SECONDS; 0: not asked for. */
static int read_watch(struct kvt_ctl *ctl, uint64_t *seconds) {
    *seconds = 0;
    for (int i = 0; i < ctl->argc; i++) {
        const char *a = ctl->argv[i];
        const char *value = strncmp(a, "--watch=", 8) == 0 ? a + 8 : NULL;
        if (strcmp(a, "--watch") != 0 && value == NULL) {
            return kvt_ctl_usage("'%s' is unknown here", a);
        }
        if (value == NULL && i + 1 < ctl->argc && ctl->argv[i + 1][0] != '-') {
            value = ctl->argv[++i];
        }
        *seconds = 2;
        if (value != NULL && !kvt_ctl_number("--watch", value, 1, 86400, seconds)) {
            return KVT_CTL_USAGE;
        }
    }
    return KVT_CTL_OK;
}

int kvt_ctl_status(struct kvt_ctl *ctl) {
    uint64_t seconds;
    int rc = read_watch(ctl, &seconds);
    if (rc == KVT_CTL_OK) {
        rc = kvt_ctl_attach(ctl);
    }
    bool clear = seconds > 0 && !ctl->json && isatty(STDOUT_FILENO);
    while (rc == KVT_CTL_OK) {
        rc = look_and_show(ctl, DEVICES | WORKERS | CACHES, clear);
        if (seconds == 0) {
            break;
        }
        (void)sleep((unsigned)seconds);
    }
    return rc;
}

static int list_only(struct kvt_ctl *ctl, unsigned lists) {
    if (ctl->argc > 0) {
        return kvt_ctl_usage("'%s' is unknown here", ctl->argv[0]);
    }
    int rc = kvt_ctl_attach(ctl);
    return rc != KVT_CTL_OK ? rc : look_and_show(ctl, lists, false);
}

int kvt_ctl_workers(struct kvt_ctl *ctl) {
    return list_only(ctl, WORKERS);
}

int kvt_ctl_caches(struct kvt_ctl *ctl) {
    return list_only(ctl, CACHES);
}
