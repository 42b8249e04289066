/* The control page: the counters by which a worker's forward pass and the daemon's copies meet
 * without messages. One per session, a memfd (0600, sealed) that both processes map read-write.
 *
 * Fixed little-endian layout. Each counter has a cache line of its own.
 *
 *   counter     written by   meaning
 *   ready[s]    daemon       generation whose fill is complete in slot s
 *   done[s]     worker       generation that the worker has finished with in slot s
 *   step        worker       number of the last step whose work, on all streams, is complete
 *   committed   daemon       number of the last step that was committed
 *   failed      daemon       0, or the first step of the open schedule that will not commit;
 *                            `aux` then holds the positive error code. Back to 0 with the next
 *                            schedule.
 *
 * All but `failed` only grow. They are compared by cyclic signed difference: (int64_t)(value - wanted) >= 0,
 * which is also what the GPU's stream wait does. A dead peer's counters are set to
 * value + KVT_POISON, so that every waiter goes on and then looks at what happened.
 *
 * A waiter on a CPU reads `wake`, checks `value`, and sleeps on `wake` with FUTEX_WAIT (shared).
 * A CPU that stores a value stores `value` (release), increments `wake`, and calls FUTEX_WAKE if
 * `waiters` is not 0. A GPU stores only `value`: its waiter polls. `waiters` is set (and left set
 * until the wait is over) by a waiter before it looks at `value` for the last time.
 *
 * The daemon never trusts what a worker may write: done[s] counts only while it equals the generation
 * that is in slot s, and `step` is compared only with steps that were scheduled.
 */
#ifndef KVT_PROTO_CONTROL_PAGE_H
#define KVT_PROTO_CONTROL_PAGE_H

#include "proto/limits.h"

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define KVT_CONTROL_PAGE_MAGIC   0x5054564bu /* "KVTP" */
#define KVT_CONTROL_PAGE_VERSION 1
#define KVT_POISON               (UINT64_C(1) << 62)

struct kvt_counter {
    uint64_t value;
    uint32_t wake;    /* incremented after every store by a CPU */
    uint32_t waiters; /* not 0: somebody may sleep on `wake` */
    uint32_t aux;     /* `failed`: positive error code; otherwise 0 */
    uint32_t reserved[11];
};

struct kvt_control_page {
    uint32_t magic;
    uint32_t version;
    uint32_t bytes;
    uint32_t slots_max;
    uint64_t boot_epoch;
    uint32_t session;
    uint32_t reserved[9];
    struct kvt_counter step;
    struct kvt_counter committed;
    struct kvt_counter failed;
    struct kvt_counter ready[KVT_SLOTS_MAX];
    struct kvt_counter done[KVT_SLOTS_MAX];
};

static_assert(sizeof(struct kvt_counter) == 64, "a counter is one cache line");
static_assert(offsetof(struct kvt_counter, wake) == 8, "wake follows value");
static_assert(offsetof(struct kvt_control_page, step) == 64, "header is one cache line");
static_assert(offsetof(struct kvt_control_page, ready) == 256, "ready[0]");
static_assert(offsetof(struct kvt_control_page, done) == 256 + 64 * KVT_SLOTS_MAX, "done[0]");
static_assert(sizeof(struct kvt_control_page) == 256 + 128 * KVT_SLOTS_MAX, "page size");

/* Bytes of the memfd: the struct rounded up to whole pages. */
#define KVT_CONTROL_PAGE_BYTES 12288
static_assert(sizeof(struct kvt_control_page) <= KVT_CONTROL_PAGE_BYTES, "fits its memfd");

/* Whether a counter that reads `value` has reached `wanted`. */
static inline int kvt_counter_reached(uint64_t value, uint64_t wanted) {
    return (int64_t)(value - wanted) >= 0;
}

#endif
