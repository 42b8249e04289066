/* Whether all that a program printed to stdout has arrived: asked once, at its end. What was only
 * buffered until then is written; a full disk shows here and nowhere else.
 */
#ifndef KVT_CLIENT_OUTPUT_H
#define KVT_CLIENT_OUTPUT_H

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

/* NULL: it has. Otherwise why not, for a person. */
static inline const char *kvt_output_failed(void) {
    errno = 0;
    if (fflush(stdout) == 0 && ferror(stdout) == 0) {
        return NULL;
    }
    return strerror(errno != 0 ? errno : EIO); /* an earlier write failed: nobody knows why */
}

#endif
