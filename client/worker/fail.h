/*
 * Error texts of kvtier-run.
 *
 * A function that can fail takes `char *err, size_t err_size` and returns 0 or
 * a negative code of proto/errors.h; the text says what failed, on what, why and what to do.
 */
#ifndef KVT_WORKER_FAIL_H
#define KVT_WORKER_FAIL_H

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

/* Writes the text and returns `code`, so that `return kvt_fail(...)` reads well. */
__attribute__((format(printf, 4, 5))) static inline int kvt_fail(int code, char *err,
                                                                 size_t err_size,
                                                                 const char *format, ...) {
    if (err && err_size > 0) {
        va_list args;
        va_start(args, format);
        (void)vsnprintf(err, err_size, format, args);
        va_end(args);
    }
    return code;
}

#endif
