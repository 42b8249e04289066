/* Private memory that no file stands behind: what the host arena is made of. Nobody but this process
 * maps it, the kernel gives it huge pages where it may, and a fork does not copy its page tables.
 */
#ifndef KVT_HOST_ANONYMOUS_H
#define KVT_HOST_ANONYMOUS_H

#include <stdbool.h>
#include <stdint.h>

#define KVT_HUGE_PAGE_BYTES (UINT64_C(2) << 20)

/* Maps `bytes`, a multiple of KVT_HUGE_PAGE_BYTES, at such an address: zeroes, no memory yet. `name`
 * is what /proc/PID/smaps shows where the kernel can. huge: ask for huge pages; otherwise none, so
 * that touching a page brings that page alone. NULL with errno set. Undo: munmap(address, bytes). */
void *kvt_anonymous_map(const char *name, uint64_t bytes, bool huge)
    __attribute__((warn_unused_result));

/* Memory of these NUMA nodes (a bit each) is preferred for what of the mapping is touched from here on.
 * 0 or -KVT_ESYS with errno set: then it comes from wherever it is touched. */
int kvt_anonymous_prefer(void *address, uint64_t bytes, uint64_t nodes)
    __attribute__((warn_unused_result));

#endif
