/* Log lines on standard error: "kvtierd: warning: text". Control characters are replaced, so that
 * text from outside cannot forge a line. Any thread; one write(2) a line.
 */
#ifndef KVT_DAEMON_LOG_H
#define KVT_DAEMON_LOG_H

/* Numbers are the index of [daemon] log_level. */
enum kvt_log_level {
    KVT_LOG_ERROR = 0,
    KVT_LOG_WARNING = 1,
    KVT_LOG_INFO = 2,
    KVT_LOG_DEBUG = 3,
};

void kvt_log_set_level(enum kvt_log_level level);
void kvt_log(enum kvt_log_level level, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
