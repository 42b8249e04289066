/* Start order, the pump between engine and everything else, stop order.
 *
 * Start: signals, limits, lock and sockets, loop, host memory and devices, engine, front. When the
 * front is ready the attach socket is served, and "ready" is said.
 * Stop: new sessions are refused, those that are there hung up; when no device holds anything of
 * them any more (or stop_timeout has passed) everything is taken down in the reverse order.
 */
#include "daemon/daemon.h"
#include "daemon/actions.h"
#include "daemon/dispatch.h"
#include "daemon/log.h"
#include "daemon/notify.h"
#include "daemon/ranges.h"
#include "daemon/units.h"
#include "tiers/engine/assert.h"

#include <errno.h>
#include <grp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#define FRONT_FAILURES_MAX 5 /* before the first "ready": then it will not be */
/* So late for a timer that the process was stopped, and not only busy. */
#define STOPPED_MS 500

/* ---- the pump ------------------------------------------------------------------------------------------ */

void kvt_daemon_pump(struct kvt_daemon *d) {
    struct kvt_action action;
    for (;;) {
        while (kvt_engine_action(d->engine, &action)) {
            kvt_action_carry_out(d, &action);
        }
        struct kvt_session *s = d->settle;
        if (s == NULL) {
            return;
        }
        d->settle = s->settle_next;
        kvt_session_settle(s);
    }
}

/* The engine knows the time of what happens next. Time in which this process was stopped does not
 * count: nobody had the chance to keep a deadline. */
static void before_events(void *context) {
    struct kvt_daemon *d = context;
    uint64_t known_ms = d->ticked_ms + d->stopped_ms;
    uint64_t due_ms =
        d->engine_timer.deadline_ms > known_ms ? d->engine_timer.deadline_ms : known_ms;
    uint64_t now_ms = kvt_now_ms();
    if (due_ms < now_ms && now_ms - due_ms > STOPPED_MS) {
        d->stopped_ms += now_ms - due_ms;
    }
    now_ms -= d->stopped_ms;
    if (now_ms != d->ticked_ms) {
        d->ticked_ms = now_ms;
        kvt_engine_tick(d->engine, now_ms);
        kvt_daemon_pump(d);
    }
}

static void after_events(void *context) {
    struct kvt_daemon *d = context;
    if (!d->announced && !d->stopping && d->front.failures >= FRONT_FAILURES_MAX) {
        kvt_log(KVT_LOG_ERROR, "%s: ended %d times before it was ready", d->front.program,
                FRONT_FAILURES_MAX);
        kvt_daemon_stop(d, KVT_EXIT_FAILED);
    }
    if (d->stopping && d->tiers.sessions_draining == 0) {
        kvt_loop_stop(&d->loop);
    }
    uint64_t engine_ms = kvt_engine_deadline_ms(d->engine);
    d->engine_timer.deadline_ms = engine_ms == UINT64_MAX ? UINT64_MAX : engine_ms + d->stopped_ms;
}

static void engine_timer_fired(void *context, uint64_t now_ms) {
    (void)context; /* before_events has told the engine */
    (void)now_ms;
}

/* ---- stopping ------------------------------------------------------------------------------------------ */

void kvt_daemon_stop(struct kvt_daemon *d, int exit_status) {
    if (d->stopping) {
        kvt_loop_stop(&d->loop);
        return;
    }
    d->stopping = true;
    d->exit_status = exit_status;
    kvt_notify("STOPPING=1");
    d->stop_timer.deadline_ms = kvt_now_ms() + d->config.stop_timeout_us / 1000;
    for (uint32_t i = 0; i < d->sessions.capacity; i++) {
        if (d->sessions.all[i].phase == KVT_PHASE_OPEN) {
            kvt_session_hangup_later(&d->sessions.all[i], "the daemon stops");
        }
    }
    kvt_daemon_pump(d);
}

static void stop_timer_fired(void *context, uint64_t now_ms) {
    struct kvt_daemon *d = context;
    (void)now_ms;
    kvt_log(KVT_LOG_WARNING, "copies of %u sessions did not end in time: leaving without them",
            d->tiers.sessions_draining);
    d->exit_status = d->exit_status == 0 ? KVT_EXIT_STUCK : d->exit_status;
    kvt_loop_stop(&d->loop);
}

static void signal_ready(void *context, uint32_t events) {
    struct kvt_daemon *d = context;
    struct signalfd_siginfo info;
    (void)events;
    while (read(d->signal_fd, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
        if (info.ssi_signo == SIGHUP) {
            kvt_log(KVT_LOG_INFO, "SIGHUP: the configuration is read at start only");
            continue;
        }
        kvt_log(KVT_LOG_INFO, "%s: stopping%s", info.ssi_signo == SIGTERM ? "SIGTERM" : "SIGINT",
                d->stopping ? " at once" : "");
        kvt_daemon_stop(d, 0);
    }
}

/* ---- starting ------------------------------------------------------------------------------------------ */

static int system_failure(const char *what) {
    kvt_log(KVT_LOG_ERROR, "%s: %s", what, strerror(errno));
    return -KVT_ESYS;
}

static int set_process(struct kvt_daemon *d) {
    sigset_t signals;
    struct rlimit files;
    (void)sigemptyset(&signals);
    (void)sigaddset(&signals, SIGTERM);
    (void)sigaddset(&signals, SIGINT);
    (void)sigaddset(&signals, SIGHUP);
    (void)signal(SIGPIPE, SIG_IGN);
    (void)umask(077);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    /* Before any thread is started, so that all inherit it. */
    if (sigprocmask(SIG_BLOCK, &signals, NULL) != 0) {
        return system_failure("signals");
    }
    d->signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    d->signal_watch = (struct kvt_watch){.ready = signal_ready, .context = d, .fd = -1};
    if (d->signal_fd < 0) {
        return system_failure("signalfd");
    }
    if (getrandom(&d->boot_epoch, sizeof(d->boot_epoch), 0) != (ssize_t)sizeof(d->boot_epoch)) {
        return system_failure("getrandom");
    }
    d->started_ms = kvt_now_ms();
    return 0;
}

static int find_admin_group(const struct kvt_config *c, gid_t *out, char *text) {
    *out = (gid_t)-1;
    if (c->admin_group[0] == '\0') {
        return 0;
    }
    const struct group *group = getgrnam(c->admin_group);
    if (group == NULL) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES,
                       "[daemon] admin_group = %s: there is no such group", c->admin_group);
        return -KVT_ECONFIG;
    }
    *out = group->gr_gid;
    return 0;
}

static int create_engine(struct kvt_daemon *d) {
    const struct kvt_config *c = &d->config;
    struct kvt_engine_config e = {
        .device_count = c->device_count,
        .host_budget_bytes = c->host_budget_bytes,
        .host_worker_max_bytes = c->host_worker_max_bytes,
        .host_chunk_bytes = c->host_chunk_bytes,
        .host_keep_bytes = kvt_tiers_keep_bytes(&d->tiers),
        .host_range_bytes = KVT_HOST_PART_BYTES,
        .block_tokens = c->block_tokens,
        .sessions_max = c->sessions_max,
        .caches_max = c->caches_max,
        .idle_after_ms = (uint32_t)(c->idle_after_us / 1000),
        .reclaim_deadline_ms = (uint32_t)(c->reclaim_deadline_us / 1000),
    };
    for (uint32_t i = 0; i < c->device_count; i++) {
        e.devices[i] = (struct kvt_engine_device){
            .budget_bytes = c->devices[i].budget_bytes,
            .worker_max_bytes = c->devices[i].worker_max_bytes,
            .granule_bytes = kvt_device_info(d->tiers.devices[i].device)->granule_bytes,
            .extent_bytes = c->devices[i].extent_bytes,
            .piece_bytes = c->devices[i].piece_bytes,
        };
    }
    int rc = kvt_engine_create(&e, &d->engine);
    if (rc != 0) {
        kvt_log(KVT_LOG_ERROR, "the engine cannot be made from this configuration: %s",
                kvt_error_text(rc));
        return rc;
    }
    kvt_ranges_keep_begin(&d->tiers);
    kvt_daemon_pump(d);
    return 0;
}

/* kvtierd-front beside this program, unless the configuration names another. */
static void find_front(struct kvt_daemon *d) {
    char *path = d->config.front_program;
    if (path[0] != '\0') {
        return;
    }
    ssize_t n = readlink("/proc/self/exe", path, KVT_CONFIG_TEXT_BYTES - 16);
    path[n < 0 ? 0 : n] = '\0';
    char *slash = strrchr(path, '/');
    size_t used = slash == NULL ? 0 : (size_t)(slash - path) + 1;
    (void)snprintf(path + used, KVT_CONFIG_TEXT_BYTES - used, "kvtierd-front");
}

static void announce_device(const struct kvt_daemon *d, uint32_t device) {
    const struct kvt_config_device *c = &d->config.devices[device];
    uint64_t free_bytes = kvt_device_info(d->tiers.devices[device].device)->free_bytes;
    char budget[KVT_UNIT_TEXT_BYTES];
    char left[KVT_UNIT_TEXT_BYTES];
    char uuid[KVT_UUID_TEXT_BYTES];
    kvt_log(KVT_LOG_INFO, "device %s: %s, budget %s, uuid %s", c->name, kvt_config_driver_name(c),
            kvt_size_exact(c->budget_bytes, budget),
            kvt_uuid_text(kvt_device_info(d->tiers.devices[device].device)->uuid, uuid));
    if (free_bytes < c->budget_bytes) {
        kvt_log(KVT_LOG_WARNING,
                "device %s: %s of its memory are free, less than its budget: other processes have "
                "the rest, maybe workers of a daemon before; caches get what is there",
                c->name, kvt_size_about(free_bytes, left));
    }
}

static void front_ready(void *context) {
    struct kvt_daemon *d = context;
    char host[KVT_UNIT_TEXT_BYTES];
    if (d->announced) {
        kvt_log(KVT_LOG_INFO, "kvtierd-front is ready again");
        return;
    }
    if (kvt_attach_start(&d->attach, d) != 0) {
        (void)system_failure("attach socket");
        kvt_daemon_stop(d, KVT_EXIT_FAILED);
        return;
    }
    d->announced = true;
    for (uint32_t i = 0; i < d->config.device_count; i++) {
        announce_device(d, i);
    }
    kvt_log(KVT_LOG_INFO, "ready: kvtierd %s, pid %ld, serves %s; host budget %s", KVT_VERSION,
            (long)getpid(), d->config.runtime_dir,
            kvt_size_exact(d->config.host_budget_bytes, host));
    kvt_notify("READY=1");
    kvt_tiers_measure(&d->tiers); /* not earlier: the start would share its cores with it */
}

static int start_front(struct kvt_daemon *d) {
    find_front(d);
    (void)snprintf(d->endpoint, sizeof(d->endpoint), "ipc://%s", d->runtime.front_path);
    d->front.loop = &d->loop;
    d->front.program = d->config.front_program;
    d->front.endpoint = d->endpoint;
    d->front.memory_bytes = d->config.front_memory_bytes;
    d->front.listen_fd = d->runtime.front_fd;
    d->front.on_ready = front_ready;
    d->front.on_message = kvt_dispatch_message;
    d->front.context = d;
    if (kvt_front_start(&d->front) != 0) {
        kvt_log(KVT_LOG_ERROR, "%s: cannot be started: %s; see [daemon] front_program",
                d->front.program, strerror(errno));
        return -KVT_ESYS;
    }
    return 0;
}

static int start(struct kvt_daemon *d) {
    char text[KVT_CONFIG_ERROR_BYTES] = "";
    int rc = set_process(d);
    if (rc != 0) {
        return rc;
    }
    rc = find_admin_group(&d->config, &d->admin_group, text);
    if (rc == 0) {
        rc = kvt_runtime_open(&d->config, &d->runtime, text);
    }
    if (rc == 0) {
        rc = kvt_loop_init(&d->loop);
    }
    if (rc == 0) {
        rc = kvt_loop_add(&d->loop, &d->signal_watch, d->signal_fd, EPOLLIN);
    }
    if (rc == 0) {
        d->engine_timer = (struct kvt_timer){.fire = engine_timer_fired, .context = d};
        d->stop_timer = (struct kvt_timer){.fire = stop_timer_fired, .context = d};
        kvt_loop_add_timer(&d->loop, &d->engine_timer);
        kvt_loop_add_timer(&d->loop, &d->stop_timer);
        rc = kvt_sessions_init(&d->sessions, d, d->config.sessions_max);
    }
    if (rc == 0) {
        rc = kvt_arena_init(&d->arena, KVT_ARENA_BYTES);
    }
    if (rc == 0) {
        rc = kvt_tiers_start(&d->tiers, d, text);
    }
    if (rc != 0) {
        kvt_log(KVT_LOG_ERROR, "%s", text[0] != '\0' ? text : kvt_error_text(rc));
        return rc;
    }
    rc = create_engine(d);
    return rc != 0 ? rc : start_front(d);
}

/* Takes down what there is, whole or half. */
static void take_down(struct kvt_daemon *d) {
    if (d->front.loop != NULL) {
        kvt_front_stop(&d->front);
    }
    kvt_attach_stop(&d->attach);
    for (uint32_t i = 0; i < d->sessions.capacity; i++) {
        if (d->sessions.all[i].phase != KVT_PHASE_FREE) {
            kvt_session_unwatch(&d->sessions.all[i]);
        }
    }
    kvt_tiers_stop(&d->tiers);
    kvt_engine_free(d->engine);
    kvt_sessions_destroy(&d->sessions); /* behind the devices, which read control pages */
    kvt_arena_destroy(&d->arena);
    kvt_loop_destroy(&d->loop);
    if (d->signal_fd >= 0) {
        (void)close(d->signal_fd);
    }
    kvt_runtime_close(&d->runtime);
}

int kvt_daemon_check(struct kvt_daemon *d) {
    char text[KVT_CONFIG_ERROR_BYTES] = "";
    gid_t group;
    int rc = find_admin_group(&d->config, &group, text);
    rc = rc == 0 ? kvt_runtime_check(&d->config, text) : rc;
    rc = rc == 0 ? kvt_tiers_check(&d->config, text) : rc;
    find_front(d);
    if (rc == 0 && access(d->config.front_program, X_OK) != 0) {
        (void)snprintf(text, sizeof(text), "%s: cannot be started: %s; see [daemon] front_program",
                       d->config.front_program, strerror(errno));
        rc = -KVT_ECONFIG;
    }
    if (rc != 0) {
        kvt_log(KVT_LOG_ERROR, "%s", text);
    }
    return rc;
}

int kvt_daemon_run(struct kvt_daemon *d) {
    d->signal_fd = -1;
    d->loop.epoll_fd = -1;
    d->loop.timer_fd = -1;
    d->runtime = (struct kvt_runtime){.lock_fd = -1, .attach_fd = -1, .front_fd = -1};
    int rc = start(d);
    if (rc == 0) {
        kvt_loop_run(&d->loop, before_events, after_events, d);
    } else {
        d->exit_status = rc == -KVT_ECONFIG  ? KVT_EXIT_USAGE
                         : rc == -KVT_EEXIST ? KVT_EXIT_TAKEN
                                             : KVT_EXIT_FAILED;
    }
    take_down(d);
    if (rc == 0) {
        kvt_log(KVT_LOG_INFO, "stopped");
    }
    return d->exit_status;
}
