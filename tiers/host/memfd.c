/* Memory files; see memfd.h. A memfd has mode 0777 at first, and another user who holds a read-only
 * descriptor could open it again for writing through /proc: hence 0600.
 */
#include "tiers/host/memfd.h"

#include "proto/errors.h"
#include "proto/limits.h"
#include "tiers/host/machine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAP_ALIGN (UINT64_C(2) << 20)

int kvt_memfd_create(const char *what, const char *name, uint64_t bytes, char *text) {
    char size[KVT_SIZE_TEXT_BYTES];
    const char *step = "memfd_create";
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        goto fail;
    }
    step = "fchmod";
    if (fchmod(fd, 0600) != 0) {
        goto fail;
    }
    step = "ftruncate";
    if (ftruncate(fd, (off_t)bytes) != 0) {
        goto fail;
    }
    step = "sealing";
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0) {
        goto fail;
    }
    return fd;

fail:
    snprintf(text, KVT_TEXT_BYTES, "%s: a memory file of %s could not be made: %s: %s", what,
             kvt_size_text(bytes, size), step, strerror(errno));
    if (fd >= 0) {
        close(fd);
    }
    return -KVT_ESYS;
}

void *kvt_memfd_map(int fd, uint64_t bytes) {
    uint64_t spare = bytes >= MAP_ALIGN ? MAP_ALIGN : 0;
    uint8_t *range =
        mmap(NULL, bytes + spare, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) {
        return NULL;
    }
    uint64_t before = spare ? (MAP_ALIGN - (uintptr_t)range % MAP_ALIGN) % MAP_ALIGN : 0;
    uint8_t *base = mmap(range + before, bytes, PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0);
    if (base == MAP_FAILED) {
        int error = errno;
        munmap(range, bytes + spare);
        errno = error;
        return NULL;
    }
    if (before > 0) {
        munmap(range, before);
    }
    if (spare > before) { /* whole pages, since the sizes are */
        uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
        uint64_t mapped = (bytes + page - 1) / page * page;
        uint64_t all = (bytes + spare + page - 1) / page * page;
        munmap(base + mapped, all - before - mapped);
    }
    if (bytes % MAP_ALIGN == 0) { /* a shorter file would get a page larger than itself */
        (void)madvise(base, bytes, MADV_HUGEPAGE);
    }
    (void)madvise(base, bytes, MADV_DONTDUMP); /* other people's text has no place in a core file */
    return base;
}
