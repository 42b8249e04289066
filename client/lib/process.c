#include "client/lib/process.h"

#include <sys/mman.h>

#define MARK_BYTES 4096 /* the kernel rounds up */

void kvt_client_process_init(struct kvt_client_process *p) {
    *p = (struct kvt_client_process){.pid = getpid()};
    uint32_t *mark =
        mmap(NULL, MARK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mark == MAP_FAILED) {
        return;
    }
    if (madvise(mark, MARK_BYTES, MADV_WIPEONFORK) != 0) {
        (void)munmap(mark, MARK_BYTES);
        return;
    }
    *mark = 1;
    p->mark = mark;
}

void kvt_client_process_free(struct kvt_client_process *p) {
    if (p->mark != NULL) {
        (void)munmap((void *)(uintptr_t)p->mark, MARK_BYTES);
        p->mark = NULL;
    }
}
