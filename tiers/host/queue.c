/* The queue between two threads; see queue.h.
 *
 * `pushed` and `popped` count messages and only grow; they wrap around at 2^32, which the unsigned
 * difference does not mind. Each side keeps the last value that it has seen of the other's counter,
 * so that it reads the other's cache line only when the queue looks full (or empty).
 */
#include "tiers/host/queue.h"

#include "proto/errors.h"
#include "tiers/engine/assert.h"

#include <stdlib.h>
#include <string.h>

#define CACHE_LINE_BYTES 64

struct kvt_queue {
    uint32_t message_bytes;
    uint32_t mask;
    uint8_t *messages;
    struct {
        uint32_t pushed; /* atomic */
        uint32_t popped_seen;
    } __attribute__((aligned(CACHE_LINE_BYTES))) pusher;
    struct {
        uint32_t popped; /* atomic */
        uint32_t pushed_seen;
    } __attribute__((aligned(CACHE_LINE_BYTES))) popper;
};

int kvt_queue_create(uint32_t message_bytes, uint32_t capacity, struct kvt_queue **out) {
    KVT_ASSERT(message_bytes > 0);
    KVT_ASSERT(capacity > 0);
    KVT_ASSERT(capacity <= UINT32_C(1) << 24);
    uint32_t rounded = 1;
    while (rounded < capacity) {
        rounded *= 2;
    }
    struct kvt_queue *q = aligned_alloc(CACHE_LINE_BYTES, sizeof(*q));
    if (!q) {
        return -KVT_ENOMEM;
    }
    memset(q, 0, sizeof(*q));
    q->message_bytes = message_bytes;
    q->mask = rounded - 1;
    q->messages = calloc(rounded, message_bytes);
    if (!q->messages) {
        free(q);
        return -KVT_ENOMEM;
    }
    *out = q;
    return 0;
}

void kvt_queue_free(struct kvt_queue *q) {
    if (q) {
        free(q->messages);
        free(q);
    }
}

static uint8_t *message_at(struct kvt_queue *q, uint32_t count) {
    return q->messages + (size_t)(count & q->mask) * q->message_bytes;
}

bool kvt_queue_has_room(struct kvt_queue *q) {
    uint32_t pushed = __atomic_load_n(&q->pusher.pushed, __ATOMIC_RELAXED);
    if (pushed - q->pusher.popped_seen <= q->mask) {
        return true;
    }
    q->pusher.popped_seen = __atomic_load_n(&q->popper.popped, __ATOMIC_SEQ_CST);
    return pushed - q->pusher.popped_seen <= q->mask;
}

bool kvt_queue_push(struct kvt_queue *q, const void *message) {
    if (!kvt_queue_has_room(q)) {
        return false;
    }
    uint32_t pushed = __atomic_load_n(&q->pusher.pushed, __ATOMIC_RELAXED);
    memcpy(message_at(q, pushed), message, q->message_bytes);
    __atomic_store_n(&q->pusher.pushed, pushed + 1, __ATOMIC_SEQ_CST);
    return true;
}

bool kvt_queue_has_message(struct kvt_queue *q) {
    uint32_t popped = __atomic_load_n(&q->popper.popped, __ATOMIC_RELAXED);
    if (popped != q->popper.pushed_seen) {
        return true;
    }
    q->popper.pushed_seen = __atomic_load_n(&q->pusher.pushed, __ATOMIC_SEQ_CST);
    return popped != q->popper.pushed_seen;
}

bool kvt_queue_pop(struct kvt_queue *q, void *out) {
    if (!kvt_queue_has_message(q)) {
        return false;
    }
    uint32_t popped = __atomic_load_n(&q->popper.popped, __ATOMIC_RELAXED);
    memcpy(out, message_at(q, popped), q->message_bytes);
    __atomic_store_n(&q->popper.popped, popped + 1, __ATOMIC_SEQ_CST);
    return true;
}
