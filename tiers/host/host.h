/* The host tier: one arena of private memory with a hard budget, mapped once at full size and brought
 * up range by range. The engine decides which ranges exist. Threads of this module touch them for the
 * first time and make them known to whoever needs it (`added`: a device registers them for DMA), each
 * thread a part at a time, so that both go on beside each other; and they give them back to the
 * kernel, so that they read as zeroes when they come again.
 */
#ifndef KVT_HOST_HOST_H
#define KVT_HOST_HOST_H

#include "proto/limits.h"

#include <stdbool.h>
#include <stdint.h>

struct kvt_host;

#define KVT_HOST_THREADS_MAX 64
#define KVT_HOST_PART_BYTES  (UINT64_C(64) << 20) /* larger ranges are brought up in parts */

struct kvt_host_config {
    uint64_t budget_bytes;
    bool huge_pages;  /* every range is made of whole ones, 2 MiB: use them where the kernel can */
    uint32_t threads; /* that bring ranges up; 0: by the number of CPUs */
    int notify_fd;    /* eventfd, written when events wait; borrowed */
    /* What else it takes for a range to be usable, and undoing it. Called by the threads, several at
     * once for parts that do not overlap: not before the first kvt_host_grow, not after kvt_host_stop.
     * 0 or a negative code with a sentence in text[KVT_TEXT_BYTES]. NULL: nothing. */
    int (*added)(void *context, uint64_t offset, uint64_t bytes, char *text);
    int (*removed)(void *context, uint64_t offset, uint64_t bytes, char *text);
    void *context;
};

struct kvt_host_event {
    bool grown; /* or shrunk */
    int code;   /* 0, or why the range is not there */
    uint64_t offset;
    uint64_t bytes;
    uint64_t huge_bytes; /* grown: of these, in huge pages */
    char text[KVT_TEXT_BYTES];
};

/* Refuses politely, naming the numbers, when the budget exceeds the machine's memory or a limit
 * (-KVT_ECONFIG), or the kernel does not let so much be mapped (-KVT_ENOMEM). The address is a
 * multiple of 2 MiB. */
int kvt_host_start(const struct kvt_host_config *c, struct kvt_host **out, char *text)
    __attribute__((warn_unused_result));
/* Ends the threads: between this and kvt_host_free who uses the memory can let go of it. Idempotent. */
void kvt_host_stop(struct kvt_host *h);
/* Stops it, too. NULL is allowed. */
void kvt_host_free(struct kvt_host *h);
/* Before the first kvt_host_grow: memory of these NUMA nodes (a bit each) is preferred. -KVT_ESYS with a
 * sentence in text[KVT_TEXT_BYTES]. */
int kvt_host_prefer(struct kvt_host *h, uint64_t nodes, char *text)
    __attribute__((warn_unused_result));
void *kvt_host_base(const struct kvt_host *h);

/* Loop thread; page-aligned ranges that do not overlap one under way. -KVT_EBUSY: queue full. They are
 * done in no certain order. What is shrunk is one range that was grown, or part of one, in its own
 * borders; or several. A range that could not be brought up (code -KVT_ENOMEM, -KVT_ESYS, or what
 * `added` said) holds no memory. */
int kvt_host_grow(struct kvt_host *h, uint64_t offset, uint64_t bytes)
    __attribute__((warn_unused_result));
int kvt_host_shrink(struct kvt_host *h, uint64_t offset, uint64_t bytes)
    __attribute__((warn_unused_result));
bool kvt_host_event(struct kvt_host *h, struct kvt_host_event *out);

#endif
