/* From a control message's bytes to a request that was checked: every field against its range,
 * before anything is allocated for it. What depends on a cache's state is the engine's to check.
 * Pure; loop thread.
 */
#ifndef KVT_DAEMON_REQUEST_H
#define KVT_DAEMON_REQUEST_H

#include "daemon/arena.h"
#include "proto/kvtier.pb-c.h"
#include "tiers/engine/engine.h"

/* Room for what a request points to; reused by the next one. */
struct kvt_request_buffers {
    struct kvt_layout layout;
    struct kvt_cache_options options;
    uint32_t rows[KVT_ROWS_MAX];
    uint32_t values[KVT_ROWS_MAX];
};

/* Unpacks into the arena, which is reset first. NULL: -KVT_EPROTO or -KVT_ETOOBIG in *code. */
Kvt__Request *kvt_request_unpack(struct kvt_arena *arena, const uint8_t *bytes, size_t size,
                                 int *code);

/* CREATE to RESET as the engine takes them; session and tag are left to the caller. 0, or a
 * negative code with a sentence in text[KVT_TEXT_BYTES]. */
int kvt_request_read(const Kvt__Request *m, struct kvt_request_buffers *b, struct kvt_request *out,
                     char *text) __attribute__((warn_unused_result));

/* CacheOptions of CREATE and PLAN, into buffers' layout and options. */
int kvt_cache_options_read(const Kvt__CacheOptions *m, struct kvt_request_buffers *b, char *text)
    __attribute__((warn_unused_result));

#endif
