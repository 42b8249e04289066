/* First touch of memory and giving it back, so that lack of memory is an answer here and not a signal
 * later. */
#ifndef KVT_HOST_TOUCH_H
#define KVT_HOST_TOUCH_H

#include <stdint.h>

/* Makes the pages of a mapping present and writable, with up to `threads` threads. Page-aligned.
 * -KVT_ENOMEM or -KVT_ESYS with a sentence in text[KVT_TEXT_BYTES] that begins with `what`; then some
 * of the range may be present. */
int kvt_touch(const char *what, void *address, uint64_t bytes, uint32_t threads, char *text)
    __attribute__((warn_unused_result));

/* Gives the pages of a private mapping back to the kernel: it reads as zeroes afterwards. -KVT_ESYS. */
int kvt_untouch(const char *what, void *address, uint64_t bytes, char *text)
    __attribute__((warn_unused_result));

#endif
