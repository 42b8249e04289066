/* The two threads of a device, and what they and the loop hand to one another.
 *
 *           commands                    asks (pages, loss)
 *     loop ----------> copy thread ---------------------------> control thread
 *       |  <----------            <---------------------------        |   ^
 *       |  completions              answers (a page is there)         |   |
 *       |                                                    events   |   | control_commands
 *       +<------------------------------------------------------------+   +---- loop
 *
 * Each arrow is a queue with one pusher and one popper. A copy thread never waits for room:
 *   completions  what does not fit stays in the issuer, bounded by the programs it holds
 *   asks         at most one a session is under way, and one loss: there is room for all
 *   answers      at most one a session is under way
 *
 * Order of a session's life. OPEN goes to the copy thread, which asks for the page to be
 * registered, and holds the session's commands until the answer. CLOSE drains the issuer; then the
 * page is unregistered; then the loop gets DRAINED. What a session completed before is popped before
 * that, since kvt_device_event looks at completions once more after it has seen an event.
 */
#ifndef KVT_DEVICE_DEVICE_INTERNAL_H
#define KVT_DEVICE_DEVICE_INTERNAL_H

#include "tiers/device/device.h"
#include "tiers/device/speed.h"
#include "tiers/host/bell.h"
#include "tiers/host/queue.h"
#include "tiers/host/thread.h"

enum {
    KVT_COMMANDS_MAX = 1024,
    KVT_COMPLETIONS_MAX = 4096,
    KVT_EVENTS_MAX = 256,
    KVT_HELD_MAX = 256, /* commands that wait for their session's page */
};

enum kvt_ask_kind { KVT_ASK_PAGE_ADD = 1, KVT_ASK_PAGE_REMOVE, KVT_ASK_LOST };

struct kvt_ask {
    uint32_t kind; /* enum kvt_ask_kind */
    uint32_t session;
    int code;         /* LOST */
    const char *what; /* LOST: what failed */
    bool failed;      /* PAGE_REMOVE: it was never there */
    struct kvt_control_page *page;
};

struct kvt_page_answer {
    uint32_t session;
    int code;
};

enum kvt_device_session_state {
    KVT_DEVICE_SESSION_CLOSED = 0,
    KVT_DEVICE_SESSION_OPENING, /* its page is being registered */
    KVT_DEVICE_SESSION_OPENED,
    KVT_DEVICE_SESSION_CLOSING, /* the issuer drains it */
};

struct kvt_device_session {
    uint32_t state; /* enum kvt_device_session_state */
    bool failed;    /* its page could not be registered: nothing of it is submitted */
    struct kvt_control_page *page;
};

/* A copy that the driver has, or a post behind copies; by tag. */
struct kvt_device_flight {
    bool used;
    uint64_t bytes;          /* 0: a post */
    struct kvt_speed *speed; /* that it counts to, or NULL */
    uint32_t sample;         /* of that speed, in which it began */
};

struct kvt_device {
    struct kvt_device_config config; /* as are ops, driver and info: fixed while threads run */
    const struct kvt_driver_ops *ops;
    struct kvt_driver *driver;
    struct kvt_driver_info info;

    struct kvt_queue *commands;         /* loop -> copy: struct kvt_device_command */
    struct kvt_queue *control_commands; /* loop -> control: struct kvt_device_command */
    struct kvt_queue *completions;      /* copy -> loop: struct kvt_completion */
    struct kvt_queue *events;           /* control -> loop: struct kvt_device_event */
    struct kvt_queue *asks;             /* copy -> control: struct kvt_ask */
    struct kvt_queue *answers;          /* control -> copy: struct kvt_page_answer */
    bool completions_full;              /* atomic: the copy thread wants to hear of room */
    bool events_full;                   /* atomic: the control thread wants to hear of room */
    bool stop;                          /* atomic */
    struct kvt_bell copy_bell;          /* for a copy thread that cannot sleep in its driver */
    struct kvt_bell control_bell;
    bool copy_started;
    bool control_started;
    pthread_t copy_thread;
    pthread_t control_thread;
    struct kvt_speed speed_to;
    struct kvt_speed speed_from;

    /* The copy thread's own. */
    struct kvt_issuer *issuer;
    struct kvt_device_session *sessions;
    struct kvt_device_command held[KVT_HELD_MAX];
    uint32_t held_count;
    struct kvt_device_flight flights[KVT_DRIVER_TAGS_MAX];
    uint32_t in_flight;
    bool lost;
    uint64_t untold_since_ns; /* the first event that the loop has not been told of; 0: none */
    bool untold_hurry;        /* and one of them is waited for */
};

void *kvt_device_copy_thread(void *device);
void *kvt_device_control_thread(void *device);

/* Any thread. */
void kvt_device_wake_copy_thread(struct kvt_device *d);
/* Tells the loop that events wait. */
void kvt_device_notify(const struct kvt_device *d);

static inline bool kvt_device_stopping(const struct kvt_device *d) {
    return __atomic_load_n(&d->stop, __ATOMIC_ACQUIRE);
}

/* Pusher of a queue towards the loop: whether there is room. If not, `full` is left set, and the
 * loop wakes the pusher when it has taken something. */
static inline bool kvt_device_room(struct kvt_queue *q, bool *full) {
    if (kvt_queue_has_room(q)) {
        return true;
    }
    __atomic_store_n(full, true, __ATOMIC_SEQ_CST);
    return kvt_queue_has_room(q); /* the loop pops and then looks at `full` */
}

#endif
