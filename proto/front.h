/* Between kvtierd and kvtierd-front: a SEQPACKET socket pair that the daemon makes. One packet is a
 * kvt_front_head and `bytes` bytes of payload, little-endian. Both sides check every field of every
 * packet: the front is in touch with whoever may connect, so the daemon does not believe it, and a
 * packet that is not right ends the front, which is started again.
 *
 *   front                                daemon
 *   READY                        ->      the ROUTER is bound
 *   MESSAGE (from identity)      ->
 *                                <-      MESSAGE (to identity)
 *
 * Identities are those that the ROUTER gives: 5 bytes, of one life of the front.
 */
#ifndef KVT_PROTO_FRONT_H
#define KVT_PROTO_FRONT_H

#include "proto/limits.h"

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KVT_FRONT_MAGIC          0x4654564bu /* "KVTF" */
#define KVT_FRONT_IDENTITY_BYTES 5
#define KVT_FRONT_PAIR_FD        3 /* file descriptors of kvtierd-front at its start */
#define KVT_FRONT_LISTEN_FD      4

enum kvt_front_type { KVT_FRONT_READY = 1, KVT_FRONT_MESSAGE = 2 };

struct kvt_front_head {
    uint32_t magic;
    uint32_t type;  /* enum kvt_front_type */
    uint32_t bytes; /* of the payload; MESSAGE: 1 to KVT_MESSAGE_BYTES_MAX, READY: 0 */
    uint8_t identity[KVT_FRONT_IDENTITY_BYTES]; /* MESSAGE */
    uint8_t reserved[3];                        /* 0 */
};
static_assert(sizeof(struct kvt_front_head) == 20, "fixed layout");

#define KVT_FRONT_PACKET_BYTES_MAX (sizeof(struct kvt_front_head) + KVT_MESSAGE_BYTES_MAX)

/* Whether `size` received bytes are one whole packet. */
static inline bool kvt_front_packet_ok(const struct kvt_front_head *head, size_t size) {
    if (size < sizeof(*head) || head->magic != KVT_FRONT_MAGIC) {
        return false;
    }
    if (head->reserved[0] != 0 || head->reserved[1] != 0 || head->reserved[2] != 0) {
        return false;
    }
    if (head->bytes != size - sizeof(*head)) {
        return false;
    }
    if (head->type == KVT_FRONT_READY) {
        return head->bytes == 0;
    }
    return head->type == KVT_FRONT_MESSAGE && head->bytes >= 1 &&
           head->bytes <= KVT_MESSAGE_BYTES_MAX;
}

#endif
