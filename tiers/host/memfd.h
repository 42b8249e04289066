/* Memory files: what device extents, the host arena and other shared memory are made of. */
#ifndef KVT_HOST_MEMFD_H
#define KVT_HOST_MEMFD_H

#include <stdint.h>

/* A memfd of this size: close-on-exec, mode 0600, sealed against growing, shrinking and further
 * seals. Returns the fd (owned by the caller), or -KVT_ESYS with a sentence in
 * text[KVT_TEXT_BYTES] that begins with `what`. */
int kvt_memfd_create(const char *what, const char *name, uint64_t bytes, char *text)
    __attribute__((warn_unused_result));

/* Maps all of it read-write and shared, at an address that is a multiple of 2 MiB if it is at least
 * so large; NULL with errno set. Undo: munmap(address, bytes). */
void *kvt_memfd_map(int fd, uint64_t bytes) __attribute__((warn_unused_result));

#endif
