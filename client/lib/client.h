/* The inside of a client: what the files of this folder share, and what kvtierctl may use.
 *
 * Threads. The user's thread owns everything except what is listed here; the library's thread
 * serves the attach socket. Both touch: the extent table (its lock), the control page (atomics),
 * `gone`, `stopping` and `interrupted` (atomics), and `registry_lock` below.
 *
 * Lock order: registry_lock (session.c: list of this process's clients) before an extent table's
 * lock. Neither is held while waiting for the daemon.
 *
 * Fork: every call that sends, or touches what a child does not have (control page, ring, extents),
 * asks kvt_client_check_own first; a child gets -KVT_ESTATE.
 */
#ifndef KVT_CLIENT_CLIENT_H
#define KVT_CLIENT_CLIENT_H

#include "client/kvtier.h"
#include "client/lib/counter.h"
#include "client/lib/device.h"
#include "client/lib/extents.h"
#include "client/lib/process.h"
#include "client/lib/step.h"
#include "proto/attach.h"
#include "proto/errors.h"
#include "proto/kvtier.pb-c.h"

#include <stdbool.h>

/* Why a session is over; the first reason stands. */
enum kvt_client_gone {
    KVT_GONE_NOT = 0,
    KVT_GONE_HANGUP,      /* the daemon closed the attach socket, or died */
    KVT_GONE_RESTART,     /* a reply carried another boot epoch */
    KVT_GONE_SILENT,      /* a request was not answered in time: what became of it is unknown */
    KVT_GONE_PROTOCOL,    /* the daemon sent what this library does not understand */
    KVT_GONE_DEVICE,      /* this process's GPU does not work any more */
    KVT_GONE_INTERRUPTED, /* kvt_interrupt */
};

/* A layout is shared by a cache and its forks. */
struct kvt_client_layout {
    uint32_t references;
    uint32_t layer_count;
    struct kvt_layer_shape layers[]; /* last_reader filled in */
};

/* Steps that were ended and then failed. */
struct kvt_client_lost {
    uint32_t cache; /* of which they were */
    uint64_t first; /* 0: nothing was lost */
    uint64_t last;
    int code;     /* positive: why */
    uint32_t row; /* the first of `rows` rows that miss tokens */
    uint32_t rows;
    uint64_t tokens; /* of `row` that are not there */
};

struct kvt_client_cache {
    uint32_t id;
    uint32_t rows;
    uint64_t ended; /* the last step that was ended, if nobody knows yet what became of it; or 0 */
    struct kvt_client_lost lost; /* not yet told */
    struct kvt_client_layout *layout;
};

/* What the plan lacks that was refused last, as the daemon says. */
struct kvt_client_shortage {
    char tier[KVT_NAME_BYTES]; /* empty: it said nothing */
    uint64_t need_bytes;
    uint64_t available_bytes;
    uint64_t budget_bytes;
    uint64_t worker_max_bytes; /* 0: the budget is what is short */
};

struct kvt_client {
    struct kvt_client *next; /* registry */
    struct kvt_client_process process;
    uint32_t role; /* enum kvt_attach_role */
    int worker;    /* KVT_SEGMENT or KVT_DENSE */
    int request_timeout_ms;
    bool leaving; /* it waits no longer than that, whatever the daemon says */
    char message[KVT_TEXT_BYTES + 256];

    struct kvt_attach_welcome welcome;
    int attach_fd;
    int wake_fd; /* eventfd: the library's thread looks around */
    int gone_fd; /* eventfd: written once when the session is over, never read */
    struct kvt_control_page *page;
    const void *ring;
    uint32_t gone;        /* enum kvt_client_gone; atomic */
    uint32_t stopping;    /* atomic */
    uint32_t interrupted; /* kvt_interrupt was called; atomic */
    pthread_t thread;
    bool thread_runs;
    const struct kvt_client_device_ops *device;
    struct kvt_client_gpu *gpu;          /* its state */
    uint8_t device_uuid[KVT_UUID_BYTES]; /* asked for in HELLO; all zero: the daemon's first */
    uint64_t posted_step;                /* the last one whose number was posted */
    struct kvt_client_extents extents;

    void *zmq_context;
    void *zmq_socket;
    uint64_t sequence;
    struct kvt_client_shortage shortage;
    uint8_t *buffer; /* KVT_MESSAGE_BYTES_MAX for the request, as much for the reply */

    struct kvt_client_cache *caches[KVT_CACHES_MAX];
    uint32_t cache_count;
    struct kvt_step step;
    struct kvt_client_spin spin;
    struct kvt_client_spin settle_spin;
};

/* ---- error.c ---------------------------------------------------------------------------------- */

/* Writes the message and returns `code`. */
__attribute__((format(printf, 3, 4))) int kvt_client_fail(struct kvt_client *c, int code,
                                                          const char *format, ...);
/* The message for a session that is over; returns -KVT_EGONE. */
int kvt_client_fail_gone(struct kvt_client *c);
/* -KVT_EEVICTED, with its message. */
int kvt_client_fail_evicted(struct kvt_client *c);
/* 0, or -KVT_ESTATE with its message: this is a forked child. */
int kvt_client_check_own(struct kvt_client *c) KVTIER_CHECK;
/* The device failed: the session is over. -KVT_EDEVICE, with its message. User's thread. */
int kvt_client_fail_device(struct kvt_client *c);
/* 0, or why nothing can be sent: never attached, in a forked child, or the session is over. */
int kvt_client_check_usable(struct kvt_client *c) KVTIER_CHECK;

/* ---- attach.c --------------------------------------------------------------------------------- */

struct kvt_client_options {
    const char *runtime_dir; /* NULL: $KVTIER_RUNTIME_DIR, or /run/kvtierd */
    uint32_t role;           /* enum kvt_attach_role */
    int worker;              /* 0 for role CONTROL */
    const char *name;
    const uint8_t *device;
    int device_kind; /* KVT_DEVICE_... */
    void *stream;
    bool wait; /* for a daemon that is not there yet */
    int timeout_ms;
    int request_timeout_ms;
};

/* As kvt_attach, for either role. */
int kvt_client_open(const struct kvt_client_options *o, struct kvt_client **out) KVTIER_CHECK;

/* ---- session.c -------------------------------------------------------------------------------- */

int kvt_client_thread_start(struct kvt_client *c) KVTIER_CHECK;
/* Ends the thread, unmaps every extent and tells the daemon so. */
void kvt_client_thread_stop(struct kvt_client *c);
/* The session is over: waits end, calls return -KVT_EGONE. Any thread. */
void kvt_client_set_gone(struct kvt_client *c, enum kvt_client_gone reason);
static inline bool kvt_client_is_gone(struct kvt_client *c) {
    return __atomic_load_n(&c->gone, __ATOMIC_ACQUIRE) != KVT_GONE_NOT;
}
/* Whether an administrator has evicted this worker. Any call that fails says so from then on. */
static inline bool kvt_client_is_evicted(struct kvt_client *c) {
    return kvt_client_counter_read(&c->page->failed) != 0 &&
           __atomic_load_n(&c->page->failed.aux, __ATOMIC_RELAXED) == KVT_EEVICTED;
}
/* Lets the library's thread look for extents that became free. */
void kvt_client_thread_wake(struct kvt_client *c);

/* ---- request.c -------------------------------------------------------------------------------- */

int kvt_client_requests_open(struct kvt_client *c) KVTIER_CHECK;
void kvt_client_requests_close(struct kvt_client *c);

/* One request under way. */
struct kvt_client_call {
    const char *what; /* "STEP", for messages */
    uint64_t sequence;
    size_t bytes;
    uint64_t resend_ns;
    uint64_t deadline_ns;
};

/* Sends `r` (session, token and sequence are filled in). */
int kvt_client_call_start(struct kvt_client *c, struct kvt_client_call *call, const char *what,
                          Kvt__Request *r) KVTIER_CHECK;
/* Waits up to wait_ms: 1 and *reply (free it with kvt__reply__free_unpacked), 0: not yet, negative:
 * failed, also when the daemon answered with an error, whose text is in the message then. */
int kvt_client_call_poll(struct kvt_client *c, struct kvt_client_call *call, int wait_ms,
                         Kvt__Reply **reply) KVTIER_CHECK;
/* Both until the end. `body` is the reply's expected case; 0: any. */
int kvt_client_request(struct kvt_client *c, const char *what, Kvt__Request *r,
                       Kvt__Reply__BodyCase body, Kvt__Reply **reply) KVTIER_CHECK;

/* ---- settle.c --------------------------------------------------------------------------------- */

/* Notes what became of ended steps, as far as it is known. */
void kvt_client_settle_look(struct kvt_client *c);
/* Waits until it is known of all of them; a loss is no error here. */
int kvt_client_settle_await(struct kvt_client *c) KVTIER_CHECK;
/* -KVT_EFAILED, with its message, if the cache lost steps and nobody was told. */
int kvt_client_settle_tell(struct kvt_client *c, struct kvt_client_cache *cache) KVTIER_CHECK;

/* ---- cache.c ---------------------------------------------------------------------------------- */

/* NULL: none of this client's; the message says so. */
struct kvt_client_cache *kvt_client_cache_find(struct kvt_client *c, uint32_t id);
/* Gives up an open step and closes every cache, as far as the daemon answers. */
void kvt_client_leave(struct kvt_client *c);
void kvt_client_caches_free(struct kvt_client *c);

#endif
