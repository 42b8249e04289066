/* Futex calls, thinly: how threads and processes of this machine sleep on a 32-bit word.
 *
 * A waiter reads the word, looks at what it waits for, and sleeps only if the word still is what it
 * read. Every wait may end early; the caller looks again. All functions: any thread.
 */
#ifndef KVT_HOST_FUTEX_H
#define KVT_HOST_FUTEX_H

#include <stdbool.h>
#include <stdint.h>

#define KVT_FUTEX_FOREVER   UINT32_MAX /* a timeout_us without end */
#define KVT_FUTEX_WATCH_MAX 128        /* words of one kvt_futex_wait_any: the kernel's limit */

struct kvt_futex_watch {
    const uint32_t *word;
    uint32_t seen;
    bool shared; /* the word lies in memory that another process maps */
};

/* Sleeps while *word == seen, at most timeout_us. */
void kvt_futex_wait(const uint32_t *word, uint32_t seen, uint32_t timeout_us, bool shared);

/* Wakes up to `count` sleepers of the word. */
void kvt_futex_wake(const uint32_t *word, uint32_t count, bool shared);

/* Sleeps while every word is what was seen of it, at most timeout_us. Limits: 1 to
 * KVT_FUTEX_WATCH_MAX words. Where the kernel has no FUTEX_WAITV it sleeps on the first word and
 * looks at the others every KVT_FUTEX_POLL_US. */
#define KVT_FUTEX_POLL_US 100
void kvt_futex_wait_any(const struct kvt_futex_watch *watches, uint32_t count, uint32_t timeout_us);

/* Tests: behave as on a kernel without FUTEX_WAITV. */
void kvt_futex_forbid_waitv(bool forbidden);

#endif
