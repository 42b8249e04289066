/* The attach socket: AF_UNIX SOCK_SEQPACKET, <runtime dir>/attach.sock. One packet is one message:
 * a kvt_attach_head and the struct of its type, little-endian, fixed size. It carries what ZeroMQ
 * cannot: the kernel's word on who the peer is, file descriptors, and the peer's hang-up.
 *
 *   client                               daemon
 *   HELLO                        ->
 *                                <-      WELCOME, with fds [control page, schedule ring]
 *                                        (role CONTROL: no fds) or REFUSE, then it closes
 *                                <-      EXTENT, with the extent's fd (kind FD), at any time, sent
 *                                        before the first reply that names the extent (which comes
 *                                        by another socket, and may be read first)
 *                                <-      RECLAIM
 *   RECLAIMED                    ->
 *
 * Either side ends the session by closing. A packet of another size than its type's, an unknown
 * type or one out of order ends the session: the daemon logs why. The client keeps every fd
 * close-on-exec. A client that is attached again and still maps extents of its former session acts
 * on RECLAIM for them as before: extents are named by (session, extent), and session numbers are
 * unique in one life of the daemon (boot_epoch tells its lives apart).
 */
#ifndef KVT_PROTO_ATTACH_H
#define KVT_PROTO_ATTACH_H

#include "proto/limits.h"

#include <assert.h>
#include <stdint.h>

#define KVT_ATTACH_MAGIC 0x4154564bu /* "KVTA" */

enum kvt_attach_type {
    KVT_ATTACH_HELLO = 1,
    KVT_ATTACH_WELCOME = 2,
    KVT_ATTACH_REFUSE = 3,
    KVT_ATTACH_EXTENT = 4,
    KVT_ATTACH_RECLAIM = 5,
    KVT_ATTACH_RECLAIMED = 6,
};

enum kvt_attach_role {
    KVT_ROLE_WORKER = 1,  /* owns caches; gets control page and ring */
    KVT_ROLE_CONTROL = 2, /* kvtierctl: asks and administers, owns nothing */
};

enum kvt_extent_kind {
    KVT_EXTENT_FD = 1,  /* memfd (cpu) or exported VMM allocation (cuda): mapped from the fd */
    KVT_EXTENT_IPC = 2, /* CUDA IPC memory handle in `handle` */
};

/* Feature bits: a session has those that both sides name. */
#define KVT_FEATURES_NONE UINT64_C(0)
/* Extents are GPU memory, and the worker can import it and wait on its GPU. A cuda device refuses
 * workers that do not name it. */
#define KVT_FEATURE_CUDA UINT64_C(1)
/* RECLAIM may be KVT_RECLAIM_KEEP_ADDRESS. Only with extents of kind FD. */
#define KVT_FEATURE_KEEP_ADDRESS UINT64_C(2)

struct kvt_attach_head {
    uint32_t magic;
    uint32_t type;  /* enum kvt_attach_type */
    uint32_t bytes; /* of the whole packet */
    uint32_t reserved;
};

struct kvt_attach_hello {
    struct kvt_attach_head head;
    uint32_t protocol_major;
    uint32_t protocol_minor;
    uint64_t features;
    uint32_t role;        /* enum kvt_attach_role */
    uint32_t worker_kind; /* enum kvt_worker_kind; 0 for role CONTROL */
    uint32_t extent_kind; /* enum kvt_extent_kind wanted; 0: the daemon chooses */
    uint32_t reserved;
    uint8_t device[KVT_UUID_BYTES]; /* all zero: the first device */
    char name[KVT_NAME_BYTES];      /* shown to people; need not be unique */
};

struct kvt_attach_welcome {
    struct kvt_attach_head head;
    uint32_t protocol_major;
    uint32_t protocol_minor;
    uint64_t features;
    uint64_t boot_epoch;
    uint64_t ring_bytes;
    uint32_t session;
    uint32_t block_tokens;
    uint32_t control_page_bytes;
    uint32_t extent_kind;
    uint8_t token[KVT_TOKEN_BYTES]; /* every ZeroMQ message carries it */
    uint8_t device[KVT_UUID_BYTES];
    char device_name[KVT_NAME_BYTES];
    char server_version[KVT_NAME_BYTES];
    char endpoint[128]; /* ZeroMQ endpoint of the ROUTER, "ipc://..." */
};

struct kvt_attach_refuse {
    struct kvt_attach_head head;
    uint32_t code; /* enum kvt_error */
    uint32_t protocol_major;
    uint32_t protocol_minor;
    uint32_t reserved;
    char text[KVT_TEXT_BYTES];
};

struct kvt_attach_extent {
    struct kvt_attach_head head;
    uint32_t session;
    uint32_t extent;
    uint32_t kind; /* enum kvt_extent_kind */
    uint32_t reserved;
    uint64_t bytes;
    uint8_t handle[64];
};

/* RECLAIM: unmap the extent, once nothing enqueued uses it. RECLAIMED: it is unmapped.
 * head.reserved is 0, or in RECLAIM KVT_RECLAIM_KEEP_ADDRESS: the range of addresses stays reserved, and
 * is the extent's again when another EXTENT brings memory for the same number. A RECLAIM without it
 * meanwhile gives up the range. */
#define KVT_RECLAIM_KEEP_ADDRESS 1u
struct kvt_attach_reclaim {
    struct kvt_attach_head head;
    uint32_t session;
    uint32_t extent;
};

/* Receive buffers hold the largest packet and one byte, so that a longer one is noticed. */
#define KVT_ATTACH_PACKET_BYTES_MAX 1024

static_assert(sizeof(struct kvt_attach_head) == 16, "fixed layout");
static_assert(sizeof(struct kvt_attach_hello) == 128, "fixed layout");
static_assert(sizeof(struct kvt_attach_welcome) == 352, "fixed layout");
static_assert(sizeof(struct kvt_attach_refuse) == 544, "fixed layout");
static_assert(sizeof(struct kvt_attach_extent) == 104, "fixed layout");
static_assert(sizeof(struct kvt_attach_reclaim) == 24, "fixed layout");

#endif
