/* Sentences for people, into buffers of fixed size. */
#ifndef KVT_PROTO_TEXT_H
#define KVT_PROTO_TEXT_H

#include <stdarg.h>
#include <stddef.h>

/* Formats like snprintf into text[size], cut at the end; always closed with NUL. text NULL or
 * size 0: nothing. Pure. */
void kvt_text_format(char *text, size_t size, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

void kvt_text_format_list(char *text, size_t size, const char *format, va_list arguments)
    __attribute__((format(printf, 3, 0)));

#endif
