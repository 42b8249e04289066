#include "proto/errors.h"

const char *kvt_error_text(int code) {
    switch (code < 0 ? -(unsigned)code : (unsigned)code) {
    case KVT_OK:
        return "success";
#define KVT_ERROR_CASE(name, number, text) \
    case KVT_##name:                       \
        return text;
        KVT_ERRORS(KVT_ERROR_CASE)
#undef KVT_ERROR_CASE
    default:
        return "unknown error";
    }
}

const char *kvt_error_name(int code) {
    switch (code < 0 ? -(unsigned)code : (unsigned)code) {
    case KVT_OK:
        return "KVT_OK";
#define KVT_ERROR_CASE(name, number, text) \
    case KVT_##name:                       \
        return "KVT_" #name;
        KVT_ERRORS(KVT_ERROR_CASE)
#undef KVT_ERROR_CASE
    default:
        return "KVT_E?";
    }
}
