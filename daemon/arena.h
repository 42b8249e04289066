/* A bounded allocator for one message: memory of one piece, handed out from its beginning and taken
 * back all at once. What a message unpacks to cannot exceed it, whatever its bytes say.
 */
#ifndef KVT_DAEMON_ARENA_H
#define KVT_DAEMON_ARENA_H

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>

#define KVT_ARENA_BYTES (1u << 20)

struct kvt_arena {
    unsigned char *memory;
    size_t size;
    size_t used;
    bool exhausted; /* something was refused since the last reset */
    ProtobufCAllocator allocator;
};

/* Returns 0 or -KVT_ENOMEM. The arena does not move after it. */
int kvt_arena_init(struct kvt_arena *a, size_t size) __attribute__((warn_unused_result));
void kvt_arena_destroy(struct kvt_arena *a);
void kvt_arena_reset(struct kvt_arena *a);
/* Zeroed, aligned for any type; NULL: it does not fit. */
void *kvt_arena_alloc(struct kvt_arena *a, size_t size);

#endif
