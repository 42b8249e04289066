#include "daemon/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

#define LINE_BYTES 1400

static _Atomic int level_max = KVT_LOG_INFO;

void kvt_log_set_level(enum kvt_log_level level) {
    atomic_store(&level_max, (int)level);
}

void kvt_log(enum kvt_log_level level, const char *format, ...) {
    static const char *const names[] = {"error", "warning", "info", "debug"};
    char line[LINE_BYTES];
    if ((int)level > atomic_load_explicit(&level_max, memory_order_relaxed)) {
        return;
    }
    int saved = errno;
    int used = snprintf(line, sizeof(line), "kvtierd: %s: ", names[level]);
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line + used, sizeof(line) - (size_t)used - 1, format, arguments);
    va_end(arguments);
    used += n < 0 ? 0 : n;
    if (used > LINE_BYTES - 2) {
        used = LINE_BYTES - 2;
    }
    for (int i = 0; i < used; i++) {
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f) {
            line[i] = '?';
        }
    }
    line[used++] = '\n';
    ssize_t written = write(STDERR_FILENO, line, (size_t)used);
    (void)written; /* a log that nobody takes is no reason to stop */
    errno = saved;
}
