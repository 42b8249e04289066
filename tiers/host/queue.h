/* A bounded queue of fixed-size messages between two threads: one pushes, one pops, neither waits.
 * What the pusher wrote before a push is visible to the popper after the pop. Waking the other side
 * is the caller's (bell.h, eventfd).
 */
#ifndef KVT_HOST_QUEUE_H
#define KVT_HOST_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

struct kvt_queue;

/* Room for `capacity` messages (rounded up to a power of two) of message_bytes each. */
int kvt_queue_create(uint32_t message_bytes, uint32_t capacity, struct kvt_queue **out)
    __attribute__((warn_unused_result));
/* NULL is allowed. Messages that are left are forgotten. */
void kvt_queue_free(struct kvt_queue *q);

/* Pushing thread. false: full, nothing was written. */
bool kvt_queue_push(struct kvt_queue *q, const void *message) __attribute__((warn_unused_result));
/* Pushing thread. Whether a push would succeed. */
bool kvt_queue_has_room(struct kvt_queue *q);

/* Popping thread. false: empty, *out is as it was. */
bool kvt_queue_pop(struct kvt_queue *q, void *out);
/* Popping thread. Whether a pop would succeed. */
bool kvt_queue_has_message(struct kvt_queue *q);

#endif
