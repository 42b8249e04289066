/* kvtierd-front: the ZeroMQ ROUTER, nothing else. Whoever may connect to it can make libzmq abort
 * (accept() without file descriptors) or eat memory (an endless multipart message is not seen by
 * the application), so it is a process of its own: that costs a reconnect, never a cache. It knows
 * nothing of what messages mean.
 *
 * Checks: one payload frame behind the identity, at most 64 KiB; file descriptors and memory in
 * use. With half of its descriptors in use it stops accepting until some are free; with too much
 * memory it ends and is started again. Nobody is waited for: what a peer does not take is dropped
 * (clients ask again), and if the daemon is slow the ROUTER is not read.
 *
 * Owner: the main thread; libzmq has one I/O thread of its own.
 */
#ifndef KVT_FRONT_FRONT_H
#define KVT_FRONT_FRONT_H

#include "proto/front.h"

#include <stdbool.h>
#include <stdint.h>

#define KVT_FRONT_EXIT_FAILED 1
#define KVT_FRONT_EXIT_USAGE  2
#define KVT_FRONT_EXIT_MEMORY 12
#define KVT_FRONT_FDS_MIN     64

struct kvt_front_options {
    const char *endpoint; /* "ipc://..." */
    uint64_t memory_bytes;
};

/* Serves until the daemon's end of the pair is closed. Returns the exit status. */
int kvt_front_run(const struct kvt_front_options *o);

/* Peers that broke the rule of one frame: nothing of theirs is read any more. A small table, in
 * which the oldest is forgotten first: remembering is thrift, not safety. */
#define KVT_BAD_PEERS_MAX 128
struct kvt_bad_peers {
    uint8_t identity[KVT_BAD_PEERS_MAX][KVT_FRONT_IDENTITY_BYTES];
    uint32_t count;
    uint32_t next;
};
bool kvt_bad_peers_has(const struct kvt_bad_peers *b, const uint8_t *identity);
void kvt_bad_peers_add(struct kvt_bad_peers *b, const uint8_t *identity);

/* What this process uses now. 0: unknown. */
uint64_t kvt_front_memory_used(void);
uint32_t kvt_front_fds_used(void);

void kvt_front_log(const char *level, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
