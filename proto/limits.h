/* Limits of the protocol. A peer that exceeds one gets -KVT_EINVAL or -KVT_ETOOBIG, never a crash.
 * They may grow in a later minor version, never shrink.
 */
#ifndef KVT_PROTO_LIMITS_H
#define KVT_PROTO_LIMITS_H

#define KVT_PROTOCOL_MAJOR 1 /* differs: attach is refused, both versions named */
#define KVT_PROTOCOL_MINOR 0 /* differs: the smaller one and the agreed feature bits hold */

#define KVT_MESSAGE_BYTES_MAX 65536 /* one frame of a control message, either direction */
#define KVT_LAYERS_MAX        1024
#define KVT_ROWS_MAX          1024       /* rows of a cache */
#define KVT_KV_HEADS_MAX      1024       /* KV heads of a layer */
#define KVT_HEAD_DIM_MAX      65536      /* elements of one head's K or V of a token */
#define KVT_TOKENS_MAX        0x7fffff00 /* tokens of a row */
#define KVT_TOKEN_BYTES_MAX   (1u << 24) /* K and V of one token of one layer */
#define KVT_APPEND_MAX        1048576    /* tokens that one step appends to one row */
#define KVT_STEPS_AHEAD_MAX   64         /* steps of one schedule */
#define KVT_CACHES_MAX        256        /* caches of a session */
#define KVT_SLOTS_MAX         64         /* slots of a session */
#define KVT_EXTENTS_MAX       4096       /* device extents of a session */
#define KVT_DEVICES_MAX       16
#define KVT_REQUESTS_MAX      64  /* requests of a session that wait their turn */
#define KVT_SPLIT_TOKENS      256 /* attention's fixed split: pieces are whole numbers of it */
#define KVT_BLOCK_TOKENS_MIN  KVT_SPLIT_TOKENS
#define KVT_BLOCK_TOKENS_MAX  4096 /* block_tokens is a power of two between the two */
#define KVT_NAME_BYTES        64   /* names of workers and devices, with the closing NUL */
#define KVT_TEXT_BYTES        512  /* a person-readable reason, with the closing NUL */
#define KVT_TOKEN_BYTES       16   /* session token */
#define KVT_UUID_BYTES        16   /* device identity */
#define KVT_FINGERPRINT_BYTES 32   /* model and tokenizer identity */

#endif
