#include "daemon/status.h"
#include "daemon/daemon.h"
#include "daemon/log.h"
#include "daemon/units.h"
#include "tiers/engine/assert.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A list's part is ended before the message is full: the largest entry has some 1,400 bytes. */
#define PART_BYTES  (KVT_MESSAGE_BYTES_MAX - 4096)
#define ENTRIES_MAX 512
/* A worker that has not stepped for so long leaves the link to the others. */
#define ACTIVE_MS 1000

/* ---- copies in the arena ------------------------------------------------------------------------------ */

static char *copy_text(struct kvt_arena *a, const char *text) {
    size_t size = strlen(text) + 1;
    char *copy = kvt_arena_alloc(a, size);
    if (copy != NULL) {
        memcpy(copy, text, size);
    }
    return copy;
}

static Kvt__Counters *copy_counters(struct kvt_arena *a, const struct kvt_counters *c) {
    Kvt__Counters *m = kvt_arena_alloc(a, sizeof(*m));
    if (m != NULL) {
        kvt__counters__init(m);
        m->to_device_bytes = c->to_device_bytes;
        m->from_device_bytes = c->from_device_bytes;
        m->prefetch_discarded_bytes = c->prefetch_discarded_bytes;
        m->migrated_bytes = c->migrated_bytes;
        m->copied_on_write_bytes = c->copied_on_write_bytes;
        m->steps_committed = c->steps_committed;
        m->steps_failed = c->steps_failed;
        m->tokens_appended = c->tokens_appended;
        m->compacted_bytes = c->compacted_bytes;
    }
    return m;
}

/* ---- STATUS -------------------------------------------------------------------------------------------- */

static bool may_see(const struct kvt_session *asker, const struct kvt_session *other) {
    return asker->peer.admin || asker->peer.uid == other->peer.uid;
}

/* The session that the engine knows by that number; NULL: none that the asker may see. */
static const struct kvt_session *visible(const struct kvt_session *asker, uint32_t engine) {
    const struct kvt_session *s = kvt_session_by_engine(&asker->daemon->sessions, engine);
    return s != NULL && may_see(asker, s) ? s : NULL;
}

/* `link` and `uuid`: NULL for the host. */
static bool add_tier(struct kvt_arena *a, Kvt__StatusReply *r, const char *name,
                     const struct kvt_tier_info *info, const struct kvt_link *link,
                     const uint8_t *uuid) {
    Kvt__Tier *m = kvt_arena_alloc(a, sizeof(*m));
    if (m == NULL) {
        return false;
    }
    kvt__tier__init(m);
    m->name = copy_text(a, name);
    m->budget_bytes = info->budget_bytes;
    m->used_bytes = info->used_bytes;
    m->live_bytes = info->live_bytes;
    m->pinned_by_dead_bytes = info->pinned_dead_bytes;
    m->link_to_bytes_per_s = link != NULL ? link->to_bytes_per_s : 0;
    m->link_from_bytes_per_s = link != NULL ? link->from_bytes_per_s : 0;
    if (uuid != NULL) {
        m->uuid.data = (uint8_t *)uuid; /* only packed */
        m->uuid.len = KVT_UUID_BYTES;
    }
    r->tiers[r->n_tiers++] = m;
    return m->name != NULL;
}

static bool report_tiers(struct kvt_daemon *d, Kvt__StatusReply *r) {
    struct kvt_tier_info info;
    struct kvt_link link;
    r->tiers = kvt_arena_alloc(&d->arena, (KVT_DEVICES_MAX + 1) * sizeof(struct Kvt__Tier *));
    if (r->tiers == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < d->tiers.device_count; i++) {
        kvt_engine_device_info(d->engine, i, &info);
        kvt_device_link(d->tiers.devices[i].device, &link);
        const uint8_t *uuid = kvt_device_info(d->tiers.devices[i].device)->uuid;
        if (!add_tier(&d->arena, r, d->config.devices[i].name, &info, &link, uuid)) {
            return false;
        }
    }
    kvt_engine_host_info(d->engine, &info);
    return add_tier(&d->arena, r, "host", &info, NULL, NULL);
}

static const char *state_name(const struct kvt_session *s, uint32_t state) {
    if (s->phase == KVT_PHASE_DEAD) {
        return "dead";
    }
    return state == KVT_SESSION_IDLE ? "idle" : state == KVT_SESSION_STEP ? "step" : "reclaiming";
}

static Kvt__Worker *make_worker(struct kvt_daemon *d, const struct kvt_session *s,
                                const struct kvt_session_info *info) {
    Kvt__Worker *m = kvt_arena_alloc(&d->arena, sizeof(*m));
    struct kvt_link link;
    if (m == NULL) {
        return NULL;
    }
    kvt__worker__init(m);
    m->session = s->id;
    m->name = copy_text(&d->arena, s->name);
    m->uid = s->peer.uid;
    m->pid = (uint32_t)s->peer.pid;
    m->kind = s->worker_kind;
    m->device = copy_text(&d->arena, d->config.devices[s->device].name);
    m->state = copy_text(&d->arena, state_name(s, info->state));
    m->device_bytes = info->device_bytes;
    m->host_bytes = info->host_bytes;
    m->caches = info->cache_count;
    m->idle_ms = info->idle_ms;
    kvt_device_link(d->tiers.devices[s->device].device, &link);
    m->step_ns = s->pace.step_ns;
    m->ceiling_fraction = kvt_pace_of_ceiling(&s->pace, &link);
    m->counters = copy_counters(&d->arena, &info->counters);
    bool whole = m->name != NULL && m->device != NULL && m->state != NULL && m->counters != NULL;
    return whole ? m : NULL;
}

static Kvt__Cache *make_cache(struct kvt_daemon *d, const struct kvt_session *s,
                              const struct kvt_cache_info *info) {
    Kvt__Cache *m = kvt_arena_alloc(&d->arena, sizeof(*m));
    if (m == NULL) {
        return NULL;
    }
    kvt__cache__init(m);
    m->cache = info->cache;
    m->session = s->id;
    m->name = copy_text(&d->arena, info->name);
    m->mode = info->mode;
    m->rows = info->rows;
    m->tokens_longest = info->tokens_longest;
    m->tokens_total = info->tokens_total;
    m->device_bytes = info->device_bytes;
    m->host_bytes = info->host_bytes;
    m->layers.len = info->layer_count;
    m->layers.data = kvt_arena_alloc(&d->arena, info->layer_count);
    m->counters = copy_counters(&d->arena, &info->counters);
    m->need_to_device_bytes = info->need_to_device_bytes;
    m->need_from_device_bytes = info->need_from_device_bytes;
    if (m->name == NULL || m->layers.data == NULL || m->counters == NULL) {
        return NULL;
    }
    memcpy(m->layers.data, info->layers, info->layer_count);
    return m;
}

/* The part of a list that one reply has: entries before the offset are passed over, and the first one
 * that finds it full begins the next part. */
struct part {
    Kvt__StatusReply *reply;
    uint32_t offset;
    uint32_t index;
    uint32_t count;
    size_t bytes;
    bool full;
};

static bool has_room(struct part *p, bool room) {
    if (!room) {
        p->full = true;
        p->reply->next_offset = p->index - 1;
    }
    return room;
}

/* Whether the next entry of the list belongs to the part. */
static bool wanted(struct part *p) {
    p->index++;
    return p->index > p->offset && !p->full && has_room(p, p->count < ENTRIES_MAX);
}

/* Whether there is room for a wanted entry, which is counted then. */
static bool fits(struct part *p, const ProtobufCMessage *entry) {
    size_t bytes = protobuf_c_message_get_packed_size(entry) + 4;
    if (!has_room(p, p->bytes + bytes <= PART_BYTES)) {
        return false;
    }
    p->bytes += bytes;
    p->count++;
    return true;
}

static bool report_workers(struct kvt_session *asker, bool listed, struct part *p,
                           struct kvt_counters *sum) {
    struct kvt_daemon *d = asker->daemon;
    Kvt__StatusReply *r = p->reply;
    struct kvt_session_info info;
    r->workers = kvt_arena_alloc(&d->arena, ENTRIES_MAX * sizeof(struct Kvt__Worker *));
    if (r->workers == NULL) {
        return false;
    }
    for (uint32_t at = 0; kvt_engine_session_info(d->engine, &at, &info);) {
        const struct kvt_session *s = visible(asker, info.session);
        if (s == NULL) {
            continue;
        }
        kvt_counters_add(sum, &info.counters);
        if (!listed || !wanted(p)) {
            continue;
        }
        Kvt__Worker *m = make_worker(d, s, &info);
        if (m == NULL) {
            return false;
        }
        if (fits(p, &m->base)) {
            r->workers[r->n_workers++] = m;
        }
    }
    return true;
}

static bool report_caches(struct kvt_session *asker, struct part *p) {
    struct kvt_daemon *d = asker->daemon;
    Kvt__StatusReply *r = p->reply;
    static struct kvt_cache_info info; /* large; one thread */
    r->caches = kvt_arena_alloc(&d->arena, ENTRIES_MAX * sizeof(struct Kvt__Cache *));
    if (r->caches == NULL) {
        return false;
    }
    for (uint32_t at = 0; !p->full && kvt_engine_cache_info(d->engine, &at, &info);) {
        const struct kvt_session *s = visible(asker, info.session);
        if (s == NULL || !wanted(p)) {
            continue;
        }
        Kvt__Cache *m = make_cache(d, s, &info);
        if (m == NULL) {
            return false;
        }
        if (fits(p, &m->base)) {
            r->caches[r->n_caches++] = m;
        }
    }
    return true;
}

int kvt_status_report(struct kvt_session *s, const Kvt__Status *m, Kvt__StatusReply **out) {
    struct kvt_daemon *d = s->daemon;
    struct kvt_counters sum = {0};
    if (s->peer.admin) { /* of all since the start; others see what their own workers do now */
        kvt_engine_ended_counters(d->engine, &sum);
    }
    Kvt__StatusReply *r = kvt_arena_alloc(&d->arena, sizeof(*r));
    struct part part = {.reply = r, .offset = m->offset};
    if (r == NULL) {
        return -KVT_ENOMEM;
    }
    kvt__status_reply__init(r);
    r->version = (char *)KVT_VERSION;
    r->uptime_ms = kvt_now_ms() - d->started_ms;
    bool ok = !m->devices || report_tiers(d, r);
    ok = ok && report_workers(s, m->workers, &part, &sum);
    ok = ok && (!m->caches || report_caches(s, &part));
    r->counters = copy_counters(&d->arena, &sum);
    if (!ok || r->counters == NULL) {
        return -KVT_ENOMEM;
    }
    *out = r;
    return 0;
}

/* ---- PLAN ------------------------------------------------------------------------------------------------ */

static bool find_cache(const struct kvt_session *asker, uint32_t cache,
                       struct kvt_cache_info *info) {
    struct kvt_daemon *d = asker->daemon;
    for (uint32_t at = 0; kvt_engine_cache_info(d->engine, &at, info);) {
        if (info->cache == cache) {
            return visible(asker, info->session) != NULL;
        }
    }
    return false;
}

/* What the link allows, whatever is computed. */
static void add_ceiling(const struct kvt_link *link, uint32_t rows, Kvt__PlanReply *r) {
    r->link_bytes_per_s = link->to_bytes_per_s;
    r->link_from_bytes_per_s = link->from_bytes_per_s;
    r->to_device_ns_per_step = kvt_link_ns(r->to_device_bytes_per_step, link->to_bytes_per_s);
    r->from_device_ns_per_step = kvt_link_ns(r->from_device_bytes_per_step, link->from_bytes_per_s);
    uint64_t step_ns =
        kvt_link_step_ns(link, r->to_device_bytes_per_step, r->from_device_bytes_per_step);
    if (step_ns > 0) {
        r->steps_per_s_max = 1e9 / (double)step_ns;
        r->tokens_per_s_max = rows * r->steps_per_s_max;
    }
}

/* Workers that step on the device and moved something in it lately. */
static uint32_t link_workers(struct kvt_daemon *d, uint32_t device) {
    struct kvt_session_info info;
    uint32_t count = 0;
    for (uint32_t at = 0; kvt_engine_session_info(d->engine, &at, &info);) {
        const struct kvt_session *s = kvt_session_by_engine(&d->sessions, info.session);
        bool active = info.state == KVT_SESSION_STEP || info.idle_ms < ACTIVE_MS;
        count += s != NULL && info.device == device && active && s->pace.to_bytes > 0;
    }
    return count;
}

static int set_layers(struct kvt_daemon *d, const uint8_t *layers, uint32_t count,
                      Kvt__PlanReply *r) {
    r->layers.data = kvt_arena_alloc(&d->arena, count);
    if (r->layers.data == NULL) {
        return -KVT_ENOMEM;
    }
    memcpy(r->layers.data, layers, count);
    r->layers.len = count;
    return 0;
}

static int plan_running(struct kvt_session *asker, uint32_t cache, Kvt__PlanReply *r, char *text) {
    struct kvt_daemon *d = asker->daemon;
    static struct kvt_cache_info info; /* large; one thread */
    if (!find_cache(asker, cache, &info)) {
        (void)snprintf(text, KVT_TEXT_BYTES, "plan: there is no cache %u that you may see", cache);
        return -KVT_ENOENT;
    }
    const struct kvt_session *s = kvt_session_by_engine(&d->sessions, info.session);
    for (uint32_t i = 0; i < info.layer_count; i++) {
        r->resident_layers += info.layers[i] == 'R';
    }
    r->device_bytes = info.device_bytes;
    r->host_bytes = info.host_bytes;
    r->slots = info.slots;
    r->slot_bytes = info.slot_bytes;
    r->to_device_bytes_per_step = info.need_to_device_bytes;
    r->from_device_bytes_per_step = info.need_from_device_bytes;
    struct kvt_link link;
    kvt_device_link(d->tiers.devices[s->device].device, &link);
    add_ceiling(&link, info.rows, r);
    r->step_ns = s->pace.step_ns;
    r->ceiling_fraction = kvt_pace_of_ceiling(&s->pace, &link);
    r->link_workers = link_workers(d, s->device);
    return set_layers(d, info.layers, info.layer_count, r);
}

/* The engine says which tier is short, and of how much: in fields for programs, in sizes and with what to
 * change for a person. Without room for the fields the sentence alone goes. */
static void explain_shortage(struct kvt_daemon *d, uint32_t device, const struct kvt_plan *plan,
                             Kvt__Reply *out, char *text) {
    char need_text[KVT_UNIT_TEXT_BYTES];
    char free_text[KVT_UNIT_TEXT_BYTES];
    char budget_text[KVT_UNIT_TEXT_BYTES];
    struct kvt_tier_info info;
    bool on_device = plan->lacks.tier == KVT_TIER_GPU;
    const char *name = on_device ? d->config.devices[device].name : "host";
    if (on_device) {
        kvt_engine_device_info(d->engine, device, &info);
    } else {
        kvt_engine_host_info(d->engine, &info);
    }
    (void)snprintf(text, KVT_TEXT_BYTES,
                   "plan: does not fit into %s: %" PRIu64 " bytes (%s) needed, %" PRIu64
                   " (%s) to plan with, the budget is %" PRIu64 " (%s); raise [%s%s] %s%s",
                   name, plan->lacks.need_bytes, kvt_size_about(plan->lacks.need_bytes, need_text),
                   plan->lacks.available_bytes,
                   kvt_size_about(plan->lacks.available_bytes, free_text), info.budget_bytes,
                   kvt_size_about(info.budget_bytes, budget_text), on_device ? "device " : "", name,
                   plan->lacks.worker_max_bytes != 0 ? "worker_max" : "budget",
                   plan->lacks.by_tokens ? ", shorten the context or take fewer rows" : "");
    if (on_device && plan->lacks.piece_tokens != 0) {
        size_t used = strlen(text);
        bool enough = plan->lacks.piece_need_bytes <= plan->lacks.available_bytes;
        (void)snprintf(text + used, KVT_TEXT_BYTES - used,
                       "%s smaller pieces: with those of %u tokens %" PRIu64 " bytes (%s) %s",
                       enough ? ", or take" : " and take", plan->lacks.piece_tokens,
                       plan->lacks.piece_need_bytes,
                       kvt_size_about(plan->lacks.piece_need_bytes, need_text),
                       enough ? "suffice" : "would suffice");
    }
    Kvt__Shortage *m = kvt_arena_alloc(&d->arena, sizeof(*m));
    if (m == NULL) {
        return;
    }
    kvt__shortage__init(m);
    m->tier = copy_text(&d->arena, name);
    m->need_bytes = plan->lacks.need_bytes;
    m->available_bytes = plan->lacks.available_bytes;
    m->budget_bytes = info.budget_bytes;
    m->worker_max_bytes = plan->lacks.worker_max_bytes;
    out->shortage = m->tier != NULL ? m : NULL;
}

static int plan_new(struct kvt_session *asker, const Kvt__Plan *m, Kvt__PlanReply *r,
                    Kvt__Reply *out, char *text) {
    struct kvt_daemon *d = asker->daemon;
    static struct kvt_plan plan; /* large; one thread */
    int rc = kvt_cache_options_read(m->options, &d->request, text);
    if (rc != 0) {
        return rc;
    }
    uint32_t kind = m->worker_kind == 0 ? (uint32_t)KVT_WORKER_SEGMENT : m->worker_kind;
    if (kind != KVT_WORKER_SEGMENT && kind != KVT_WORKER_DENSE) {
        (void)snprintf(text, KVT_TEXT_BYTES,
                       "plan: worker_kind is %u; accepted is 1 (segment), 2 (dense)", kind);
        return -KVT_EINVAL;
    }
    if (m->device >= d->tiers.device_count) {
        (void)snprintf(text, KVT_TEXT_BYTES, "plan: device is %u; the daemon has %u, from 0 on",
                       m->device, d->tiers.device_count);
        return -KVT_EINVAL;
    }
    if (m->tokens < 1 || m->tokens > KVT_TOKENS_MAX) {
        (void)snprintf(text, KVT_TEXT_BYTES, "plan: tokens are %u; accepted is 1 to 2147483392",
                       m->tokens);
        return -KVT_EINVAL;
    }
    struct kvt_plan_request request = {
        .layout = &d->request.layout,
        .options = &d->request.options,
        .tokens = m->tokens,
        .worker_kind = kind,
        .device = m->device,
        .device_budget_bytes = m->device_budget_bytes,
    };
    rc = kvt_engine_plan(d->engine, &request, &plan, text, KVT_TEXT_BYTES);
    if (rc == -KVT_EQUOTA) {
        explain_shortage(d, m->device, &plan, out, text);
    }
    if (rc != 0) {
        return rc;
    }
    r->resident_layers = plan.resident_layers;
    r->slots = plan.slots;
    r->slot_bytes = plan.slot_bytes;
    r->device_bytes = plan.device_bytes;
    r->host_bytes = plan.host_bytes;
    r->to_device_bytes_per_step = plan.to_device_bytes_per_step;
    r->from_device_bytes_per_step = plan.from_device_bytes_per_step;
    struct kvt_link link;
    kvt_device_link(d->tiers.devices[m->device].device, &link);
    add_ceiling(&link, d->request.options.rows, r);
    return set_layers(d, plan.layers, d->request.layout.layer_count, r);
}

int kvt_status_plan(struct kvt_session *s, const Kvt__Plan *m, Kvt__Reply *out, char *text) {
    Kvt__PlanReply *r = kvt_arena_alloc(&s->daemon->arena, sizeof(*r));
    if (r == NULL) {
        return -KVT_ENOMEM;
    }
    kvt__plan_reply__init(r);
    int rc = m->cache != 0 ? plan_running(s, m->cache, r, text) : plan_new(s, m, r, out, text);
    if (rc == 0) {
        out->plan = r;
    }
    return rc;
}

/* ---- EVICT ------------------------------------------------------------------------------------------------ */

static bool session_info(struct kvt_daemon *d, uint32_t engine, struct kvt_session_info *info) {
    uint32_t at = engine;
    return kvt_engine_session_info(d->engine, &at, info) && info->session == engine;
}

int kvt_status_evict(struct kvt_session *s, const Kvt__Evict *m, Kvt__Evicted *out, char *text) {
    struct kvt_daemon *d = s->daemon;
    struct kvt_session_info before;
    struct kvt_session_info after;
    const struct kvt_session *target = kvt_session_by_id(&d->sessions, m->session);
    if (target == NULL || target->engine < 0 || !may_see(s, target)) {
        /* One text for both: whether another user's session exists is not told. */
        (void)snprintf(text, KVT_TEXT_BYTES,
                       "evict: there is no worker with session %u that you may evict", m->session);
        return -KVT_ENOENT;
    }
    uint32_t engine = (uint32_t)target->engine;
    if (!session_info(d, engine, &before)) {
        (void)snprintf(text, KVT_TEXT_BYTES, "evict: session %u is gone", m->session);
        return -KVT_ENOENT;
    }
    kvt_log(KVT_LOG_INFO, "session %u: \"%s\", pid %ld, is evicted%s by pid %ld, uid %ld",
            target->id, target->name, (long)target->peer.pid, m->kill ? " and killed" : "",
            (long)s->peer.pid, (long)s->peer.uid);
    int error = 0;
    if (m->kill && target->phase != KVT_PHASE_DEAD &&
        syscall(SYS_pidfd_send_signal, target->peer.pid_fd, SIGKILL, NULL, 0) != 0) {
        error = errno;
    }
    kvt_engine_session_evict(d->engine, engine);
    kvt_daemon_pump(d);
    if (error != 0 && error != ESRCH) {
        (void)snprintf(text, KVT_TEXT_BYTES,
                       "evict: session %u is evicted, and its process cannot be killed: %s",
                       m->session, strerror(error));
        return -KVT_EPERM;
    }
    memset(&after, 0, sizeof(after));
    if (!session_info(d, engine, &after)) {
        memset(&after, 0, sizeof(after));
    }
    /* All of the host's goes without the worker, though perhaps not before its copies have ended. */
    out->host_bytes = before.host_bytes;
    out->draining_bytes = after.host_bytes;
    out->device_bytes = before.device_bytes - after.device_bytes;
    out->pinned_bytes = after.device_bytes;
    return 0;
}
