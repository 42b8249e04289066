/* The device driver interface, and the device as the daemon sees it.
 *
 * A driver (cpu: embedded; cuda: a plug-in opened at run time) implements struct kvt_driver_ops. A
 * kvt_device wraps one with two threads:
 *   copy thread     owns the issuer; submits copies and posts, polls counters, collects completions
 *   control thread  calls that may block: extents are created and destroyed here
 * The daemon's loop talks to both through bounded queues of fixed-size messages and an eventfd.
 *
 * Nothing above this header knows which driver it is.
 */
#ifndef KVT_DEVICE_DEVICE_H
#define KVT_DEVICE_DEVICE_H

#include "proto/attach.h"
#include "proto/control_page.h"
#include "tiers/engine/issuer.h"
#include "tiers/engine/program.h"

#include <stdbool.h>
#include <stdint.h>

/* ---- what a driver implements ----------------------------------------------------------------- */

#define KVT_DRIVER_ABI          4
#define KVT_DRIVER_INFLIGHT_MAX 256                           /* copies in flight */
#define KVT_DRIVER_TAGS_MAX     (2 * KVT_DRIVER_INFLIGHT_MAX) /* tags of copies and posts: below it */

struct kvt_driver_config {
    uint64_t budget_bytes;
    uint32_t copy_threads;        /* cpu: threads that copy */
    uint32_t extent_kind;         /* enum kvt_extent_kind; 0: the driver's first choice */
    uint8_t uuid[KVT_UUID_BYTES]; /* cuda: the GPU wanted; cpu: the identity to have */
    void *host_base;              /* the host arena; offsets of KVT_TIER_HOST are relative to it */
    uint64_t host_bytes;          /* reserved address range; what is usable arrives by host_added */
};

struct kvt_driver_info {
    char name[KVT_NAME_BYTES];
    uint8_t uuid[KVT_UUID_BYTES];
    uint64_t granule_bytes;
    uint64_t free_bytes; /* now, by the device's own account */
    uint32_t extent_kind;
    uint64_t features; /* KVT_FEATURE_... that a worker must name to use its extents */
    bool post_behind;  /* see issuer.h */
    bool pins_host; /* host_added pins memory, which takes its time: better at start than later */
    int numa_node;  /* of this machine, nearest to the device; -1: unknown, or no matter */
    bool can_sleep; /* `wait` may sleep on counters; otherwise the copy thread polls */
};

/* How another process gets an extent: an fd (owned by the receiver), or a handle. */
struct kvt_export {
    uint32_t kind; /* enum kvt_extent_kind */
    int fd;        /* FD; otherwise -1 */
    uint8_t handle[64];
};

/* How fast large copies go with nothing beside them. 0: not measured. */
struct kvt_link {
    uint64_t to_bytes_per_s; /* towards the device */
    uint64_t from_bytes_per_s;
};

struct kvt_driver; /* the driver's own state */

/* All return 0 or a negative kvt_error; a text for people goes to text[KVT_TEXT_BYTES]. */
struct kvt_driver_ops {
    uint32_t abi; /* KVT_DRIVER_ABI */
    const char *name;
    int (*open)(const struct kvt_driver_config *c, struct kvt_driver **out,
                struct kvt_driver_info *info, char *text);
    void (*close)(struct kvt_driver *d);

    /* Control thread. `extent` is the engine's id; its low 16 bits are an index below 65536. The
     * memory is zeroed. A destroyed extent has no copies in flight and no importer left. */
    int (*extent_create)(struct kvt_driver *d, uint32_t extent, uint64_t bytes,
                         struct kvt_export *out, char *text);
    int (*extent_destroy)(struct kvt_driver *d, uint32_t extent, char *text);
    /* Any thread of the host's, several at once for ranges that do not overlap. The range of the host
     * arena is there (or goes away): register it for DMA. What is removed is a range that was added, or
     * several. */
    int (*host_added)(struct kvt_driver *d, uint64_t offset, uint64_t bytes, char *text);
    int (*host_removed)(struct kvt_driver *d, uint64_t offset, uint64_t bytes, char *text);
    /* A session's control page, mapped by the daemon: register it, so that posts can reach it. */
    int (*page_added)(struct kvt_driver *d, uint32_t session, struct kvt_control_page *page,
                      char *text);
    void (*page_removed)(struct kvt_driver *d, uint32_t session);

    /* Copy thread. -KVT_EDEVICE: the device is lost, nothing works any more. Another error of
     * `copy`: this copy was refused, and not one byte of it moved. */
    int (*copy)(struct kvt_driver *d, uint32_t stream, const struct kvt_copy *c, uint32_t tag);
    /* Without post_behind it is done when this returns, and `tag` has no meaning. With post_behind
     * it is done behind everything that was submitted to the stream before, and then `poll` gives
     * its tag back like a copy's: until then the page may still be written. */
    int (*post)(struct kvt_driver *d, uint32_t stream, uint32_t session, uint32_t slot,
                uint64_t value, uint32_t tag);
    /* Takes up to `max` finished copies and posts, in any order: tags[i], ok[i]. Returns how many. */
    int (*poll)(struct kvt_driver *d, uint32_t *tags, bool *ok, uint32_t max);
    /* Sleeps until a copy finishes, one of the counters' wake words differs from `seen`, the wake
     * function is called, or timeout_us has passed. Only if can_sleep. */
    void (*wait)(struct kvt_driver *d, const struct kvt_counter *const *counters,
                 const uint32_t *seen, uint32_t count, uint32_t timeout_us);
    /* Any thread: ends a `wait`, now or the next one. */
    void (*wake)(struct kvt_driver *d);
    /* Control thread, at most once and before the first extent, so that nothing else is copied:
     * measures the link, in some milliseconds. What it needs for that is within the budget, and given
     * back when this returns; where the budget is too small to say anything, *out says 0. NULL is
     * allowed. */
    int (*measure)(struct kvt_driver *d, struct kvt_link *out, char *text);
    /* Control thread, after the copy thread got -KVT_EDEVICE: what the device said of it, into
     * text[KVT_TEXT_BYTES]. NULL is allowed. */
    void (*explain)(struct kvt_driver *d, char *text);
};

/* The embedded driver: memfd extents, copy threads, futexes. */
extern const struct kvt_driver_ops kvt_cpu_driver_ops;

/* A plug-in exports this function under the name "kvt_driver_ops_get". */
typedef const struct kvt_driver_ops *(*kvt_driver_ops_get_fn)(void);

/* Finds a driver: "cpu", or <plugin_dir>/kvtier-<name>.so by dlopen, which stays open.
 * -KVT_ENOTSUP with the reason in text[KVT_TEXT_BYTES]. */
int kvt_driver_find(const char *name, const char *plugin_dir, const struct kvt_driver_ops **out,
                    char *text) __attribute__((warn_unused_result));

/* ---- the device as the daemon's loop uses it -------------------------------------------------- */

struct kvt_device;

struct kvt_device_config {
    const struct kvt_driver_ops *ops;
    struct kvt_driver_config driver;
    struct kvt_issuer_config issuer; /* post_behind is taken from the driver */
    uint32_t spin_us;                /* how long the copy thread looks again before it sleeps */
    int notify_fd;                   /* eventfd, written when events wait; borrowed */
};

enum kvt_device_command_kind {
    KVT_DEVICE_PROGRAM = 1,    /* program: handed over */
    KVT_DEVICE_CANCEL,         /* session, value = first operation */
    KVT_DEVICE_SESSION_OPEN,   /* session, page: borrowed until DRAINED was taken */
    KVT_DEVICE_SESSION_CLOSE,  /* session */
    KVT_DEVICE_EXTENT_CREATE,  /* extent, bytes */
    KVT_DEVICE_EXTENT_DESTROY, /* extent */
    KVT_DEVICE_MEASURE,        /* the link; before the first extent, and once at most */
};

struct kvt_device_command {
    uint32_t kind;
    uint32_t session;
    uint32_t extent;
    uint64_t value;
    uint64_t bytes;
    struct kvt_program *program;
    struct kvt_control_page *page;
};

enum kvt_device_event_kind {
    KVT_DEVICE_COMPLETION = 1,   /* completion */
    KVT_DEVICE_DRAINED,          /* session: closed, nothing in flight, page no longer used */
    KVT_DEVICE_EXTENT_CREATED,   /* extent, code, exported (fd owned by the taker) */
    KVT_DEVICE_EXTENT_DESTROYED, /* extent */
    KVT_DEVICE_LOST,             /* code, text: nothing works any more */
    KVT_DEVICE_SESSION_FAILED,   /* session, code, text: its page could not be registered. Copies
                                    complete as KVT_FAILED, nothing is posted: end the session */
    KVT_DEVICE_MEASURED,         /* code, link: answer to MEASURE. A failure, with its text, leaves
                                    the link unknown and everything else as it is */
};

struct kvt_device_event {
    uint32_t kind;
    uint32_t session;
    uint32_t extent;
    int code;
    uint64_t bytes;
    struct kvt_completion completion;
    struct kvt_export exported;
    struct kvt_link link;
    char text[KVT_TEXT_BYTES];
};

/* Opens the driver and starts both threads. Not for the loop of a running daemon: it may block. */
int kvt_device_start(const struct kvt_device_config *c, struct kvt_device **out, char *text)
    __attribute__((warn_unused_result));
/* Stops the threads; programs that are left are freed without completions. NULL is allowed. */
void kvt_device_stop(struct kvt_device *d);
const struct kvt_driver_info *kvt_device_info(const struct kvt_device *d);

/* The driver's host_added and host_removed: see there. */
int kvt_device_host_added(struct kvt_device *d, uint64_t offset, uint64_t bytes, char *text)
    __attribute__((warn_unused_result));
int kvt_device_host_removed(struct kvt_device *d, uint64_t offset, uint64_t bytes, char *text)
    __attribute__((warn_unused_result));

/* Loop thread. -KVT_EBUSY: the queue is full; keep the command and try again after events. */
int kvt_device_command(struct kvt_device *d, const struct kvt_device_command *c)
    __attribute__((warn_unused_result));
/* Loop thread. Takes the next event; false: none. */
bool kvt_device_event(struct kvt_device *d, struct kvt_device_event *out);

/* What the link can do: as measured at the start, or as copies were seen to go since, if that is
 * more; 0: not yet known. Any thread. */
void kvt_device_link(const struct kvt_device *d, struct kvt_link *out);

#endif
