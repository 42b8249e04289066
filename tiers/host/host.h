/* The host tier: one arena of private memory with a hard budget, mapped once at full size and touched
 * piece by piece. The engine decides which ranges exist; a thread of this module brings them up (first
 * touch in parallel) and gives them back to the kernel, so that they read as zeroes when they come
 * again. Registration for DMA is the device driver's (host_added).
 */
#ifndef KVT_HOST_HOST_H
#define KVT_HOST_HOST_H

#include "proto/limits.h"

#include <stdbool.h>
#include <stdint.h>

struct kvt_host;

struct kvt_host_config {
    uint64_t budget_bytes;
    bool huge_pages; /* every range is made of whole ones, 2 MiB: use them where the kernel can */
    uint32_t touch_threads;
    int notify_fd; /* eventfd, written when events wait; borrowed */
};

struct kvt_host_event {
    bool grown; /* or shrunk */
    int code;   /* 0, or why the range is not there */
    uint64_t offset;
    uint64_t bytes;
    char text[KVT_TEXT_BYTES];
};

/* Refuses politely, naming the numbers, when the budget exceeds the machine's memory or a limit
 * (-KVT_ECONFIG), or the kernel does not let so much be mapped (-KVT_ENOMEM). The address is a
 * multiple of 2 MiB. */
int kvt_host_start(const struct kvt_host_config *c, struct kvt_host **out, char *text)
    __attribute__((warn_unused_result));
void kvt_host_stop(struct kvt_host *h);
void *kvt_host_base(const struct kvt_host *h);

/* Loop thread; page-aligned ranges that do not overlap one under way. -KVT_EBUSY: queue full. A
 * range that could not be brought up (code -KVT_ENOMEM, -KVT_ESYS) holds no memory. */
int kvt_host_grow(struct kvt_host *h, uint64_t offset, uint64_t bytes)
    __attribute__((warn_unused_result));
int kvt_host_shrink(struct kvt_host *h, uint64_t offset, uint64_t bytes)
    __attribute__((warn_unused_result));
bool kvt_host_event(struct kvt_host *h, struct kvt_host_event *out);

#endif
