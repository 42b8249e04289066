/* Packets of the attach socket (proto/attach.h), received and sent. Pure framing: what a packet
 * means is for the caller. Any thread.
 */
#ifndef KVT_CLIENT_PACKET_H
#define KVT_CLIENT_PACKET_H

#include "proto/attach.h"

#include <stdint.h>

#define KVT_CLIENT_PACKET_FDS_MAX 2

struct kvt_client_packet {
    union {
        struct kvt_attach_head head;
        struct kvt_attach_welcome welcome;
        struct kvt_attach_refuse refuse;
        struct kvt_attach_extent extent;
        struct kvt_attach_reclaim reclaim;
        uint8_t bytes[KVT_ATTACH_PACKET_BYTES_MAX + 1];
    };
    int fds[KVT_CLIENT_PACKET_FDS_MAX]; /* owned; -1: none */
    uint32_t fd_count;
};

/* 1: a packet whose magic, type and size agree; 0: none there now; -KVT_EGONE: hang-up; -KVT_EPROTO:
 * anything else, and then no fd is left open. Does not block. */
int kvt_client_packet_receive(int fd, struct kvt_client_packet *p)
    __attribute__((warn_unused_result));
void kvt_client_packet_close_fds(struct kvt_client_packet *p);

/* 0, -KVT_EBUSY: no room now, -KVT_EGONE. Does not block. */
int kvt_client_packet_send(int fd, const void *packet, uint32_t bytes)
    __attribute__((warn_unused_result));

#endif
