/* Packets of the attach socket, as bytes: checked and made here, sent and received elsewhere. Pure;
 * any thread. Nothing in a packet is believed before it is checked.
 */
#ifndef KVT_DAEMON_PACKET_H
#define KVT_DAEMON_PACKET_H

#include "proto/attach.h"
#include "proto/errors.h"

#include <stddef.h>

/* A HELLO: 0, or a negative code with *refuse filled in. Versions come first: a HELLO of another
 * major version has a length of its own, and gets an answer that names both versions. */
int kvt_hello_check(const void *bytes, size_t size, struct kvt_attach_hello *out,
                    struct kvt_attach_refuse *refuse) __attribute__((warn_unused_result));

/* Anything that an attached client may send: RECLAIMED. 0 or -KVT_EPROTO. */
int kvt_reclaimed_check(const void *bytes, size_t size, struct kvt_attach_reclaim *out)
    __attribute__((warn_unused_result));

struct kvt_attach_head kvt_attach_head_make(enum kvt_attach_type type, size_t bytes);
/* Fills in *refuse. */
void kvt_refuse_make(struct kvt_attach_refuse *refuse, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
