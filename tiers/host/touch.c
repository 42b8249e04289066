/* First touch; see touch.h. MADV_POPULATE_WRITE (Linux 5.14) faults pages in as a store would and
 * reports failure as an error.
 */
#include "tiers/host/touch.h"

#include "proto/errors.h"
#include "proto/limits.h"
#include "tiers/host/machine.h"
#include "tiers/host/thread.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { THREADS_MAX = 64 };
#define PART_BYTES_MIN (UINT64_C(8) << 20) /* less is not worth a thread */
#define PART_ALIGN     (UINT64_C(2) << 20)

struct part {
    pthread_t thread;
    uint8_t *address;
    uint64_t bytes;
    int error; /* errno */
};

static void *touch_part(void *argument) {
    struct part *p = argument;
    int rc = 0;
    do {
        rc = madvise(p->address, p->bytes, MADV_POPULATE_WRITE);
    } while (rc != 0 && (errno == EINTR || errno == EAGAIN));
    p->error = rc == 0 ? 0 : errno;
    return NULL;
}

static int touch_failed(const char *what, uint64_t bytes, int error, char *text) {
    char size[KVT_SIZE_TEXT_BYTES];
    snprintf(text, KVT_TEXT_BYTES, "%s: %s of memory could not be had: %s", what,
             kvt_size_text(bytes, size), strerror(error));
    return error == ENOMEM || error == EFAULT || error == ENOSPC ? -KVT_ENOMEM : -KVT_ESYS;
}

int kvt_touch(const char *what, void *address, uint64_t bytes, uint32_t threads, char *text) {
    struct part parts[THREADS_MAX];
    uint64_t count = bytes / PART_BYTES_MIN;
    count = count < threads ? count : threads;
    count = count < THREADS_MAX ? count : THREADS_MAX;
    count = count == 0 ? 1 : count;
    uint64_t each = (bytes / count + PART_ALIGN - 1) / PART_ALIGN * PART_ALIGN;

    unsigned used = 0;
    for (uint64_t done = 0; done < bytes; used++) {
        uint64_t left = bytes - done;
        parts[used] =
            (struct part){.address = (uint8_t *)address + done, .bytes = left < each ? left : each};
        done += parts[used].bytes;
    }
    unsigned started = 1; /* this thread does the first part, and those that got no thread */
    while (started < used && kvt_thread_start("kvt-touch", touch_part, &parts[started],
                                              &parts[started].thread) == 0) {
        started++;
    }
    touch_part(&parts[0]);
    for (unsigned i = started; i < used; i++) {
        touch_part(&parts[i]);
    }
    for (unsigned i = 1; i < started; i++) {
        pthread_join(parts[i].thread, NULL);
    }
    for (unsigned i = 0; i < used; i++) {
        if (parts[i].error != 0) {
            return touch_failed(what, bytes, parts[i].error, text);
        }
    }
    return 0;
}

int kvt_untouch(const char *what, void *address, uint64_t bytes, char *text) {
    if (madvise(address, bytes, MADV_DONTNEED) != 0) {
        snprintf(text, KVT_TEXT_BYTES, "%s: memory could not be given back: %s", what,
                 strerror(errno));
        return -KVT_ESYS;
    }
    return 0;
}
