#include "proto/text.h"

#include <stdio.h>

void kvt_text_format_list(char *text, size_t size, const char *format, va_list arguments) {
    if (text == NULL || size == 0) {
        return;
    }
    if (vsnprintf(text, size, format, arguments) < 0) {
        text[0] = 0;
    }
}

void kvt_text_format(char *text, size_t size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    kvt_text_format_list(text, size, format, arguments);
    va_end(arguments);
}
