/* The daemon's state, whole. One owner thread, the loop, which never blocks on a peer, a device or
 * a disk. Folder map:
 *
 *   main.c        arguments                                 config*.c, units.c  the configuration
 *   loop.c        epoll and timers                         runtime.c           directory, lock, sockets
 *   attach.c      attach socket, peers, hang-up, death     packet.c            its packets
 *   session.c     the table of sessions                    requests.c          repeats of requests
 *   front_link.c  kvtierd-front                            request.c           Request, checked
 *   dispatch.c    requests to the engine, replies          status.c            STATUS, PLAN, EVICT
 *   daemon.c      start and stop order
 *   actions.c     the engine's actions, carried out        tiers.c             devices and host memory
 */
#ifndef KVT_DAEMON_DAEMON_H
#define KVT_DAEMON_DAEMON_H

#include "daemon/arena.h"
#include "daemon/attach.h"
#include "daemon/config.h"
#include "daemon/front_link.h"
#include "daemon/loop.h"
#include "daemon/request.h"
#include "daemon/runtime.h"
#include "daemon/session.h"
#include "daemon/tiers.h"
#include "tiers/engine/engine.h"

#define KVT_EXIT_FAILED 1 /* start failed: the machine, permissions, memory */
#define KVT_EXIT_USAGE  2 /* arguments or configuration */
#define KVT_EXIT_TAKEN  3 /* another daemon serves the runtime directory */
#define KVT_EXIT_DEVICE 4 /* a device is lost: start again */
#define KVT_EXIT_STUCK  5 /* a clean stop did not end in time */

struct kvt_daemon {
    struct kvt_config config;
    struct kvt_runtime runtime;
    char endpoint[8 + KVT_SOCKET_PATH_BYTES];
    uint64_t boot_epoch; /* random: tells the daemon's lives apart */
    uint64_t started_ms;
    gid_t admin_group; /* (gid_t)-1: none */
    struct kvt_loop loop;
    struct kvt_sessions sessions;
    struct kvt_attach attach;
    struct kvt_front front;
    struct kvt_tiers tiers;
    struct kvt_engine *engine;
    struct kvt_timer engine_timer;
    struct kvt_timer stop_timer;
    int signal_fd;
    struct kvt_watch signal_watch;
    uint64_t ticked_ms;         /* the time that the engine knows */
    uint64_t stopped_ms;        /* in all; the engine does not count it */
    struct kvt_session *settle; /* sessions to settle once no action is pending */
    struct kvt_arena arena;     /* of the message at hand */
    struct kvt_request_buffers request;
    uint8_t reply[KVT_MESSAGE_BYTES_MAX];
    bool announced; /* "ready" was said */
    bool stopping;
    int exit_status;
};

/* What a start would find wrong with the configuration, as far as that is seen without making or opening
 * anything; logged. `d` is zeroed but for its config. */
int kvt_daemon_check(struct kvt_daemon *d);
/* Starts everything, serves until it is told to stop, and takes everything down. `d` is zeroed but
 * for its config. Returns the exit status; errors were logged. */
int kvt_daemon_run(struct kvt_daemon *d);

/* Carries out what the engine asks for, hangs up whom it shall, until there is nothing left. Behind
 * every call of the engine that is not const. */
void kvt_daemon_pump(struct kvt_daemon *d);

/* Ends the daemon cleanly: no new sessions, those that are there are hung up, copies that are under
 * way end. Once more: at once. */
void kvt_daemon_stop(struct kvt_daemon *d, int exit_status);

#endif
