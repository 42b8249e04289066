/* Anonymous mappings; see anonymous.h. What only makes them better is not missed where the kernel
 * refuses it: advice, and the name.
 */
#include "tiers/host/anonymous.h"

#include "proto/errors.h"
#include "tiers/engine/assert.h"

#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux 5.17. */
#ifndef PR_SET_VMA
#define PR_SET_VMA           0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

/* Linux 5.15. One call does not make libnuma worth its dependency. */
#define PREFERRED_MANY 5
#define NODES_MAX      65 /* bits of the mask, and one more, as mbind counts */

void *kvt_anonymous_map(const char *name, uint64_t bytes, bool huge) {
    KVT_ASSERT(bytes > 0);
    KVT_ASSERT(bytes % KVT_HUGE_PAGE_BYTES == 0);
    uint64_t all = bytes + KVT_HUGE_PAGE_BYTES;
    uint8_t *range =
        mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) {
        return NULL;
    }
    uint64_t before =
        (KVT_HUGE_PAGE_BYTES - (uintptr_t)range % KVT_HUGE_PAGE_BYTES) % KVT_HUGE_PAGE_BYTES;
    uint8_t *base = range + before;
    if (before > 0) {
        munmap(range, before);
    }
    munmap(base + bytes, all - before - bytes);
    (void)madvise(base, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    (void)madvise(base, bytes, MADV_DONTFORK); /* pinned pages would be copied at once */
    (void)madvise(base, bytes, MADV_DONTDUMP); /* other people's text has no place in a core file */
    (void)prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, base, bytes, name);
    return base;
}

int kvt_anonymous_prefer(void *address, uint64_t bytes, uint64_t nodes) {
    KVT_ASSERT(nodes != 0);
    unsigned long mask = nodes;
    long rc = syscall(SYS_mbind, address, bytes, PREFERRED_MANY, &mask, NODES_MAX, 0);
    return rc == 0 ? 0 : -KVT_ESYS;
}
