#include "proto/uuid.h"

#include <string.h>

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    if (c >= 'a' && c <= 'f') {
        return c - 'a' + 10;
    }
    if (c >= 'A' && c <= 'F') {
        return c - 'A' + 10;
    }
    return -1;
}

const char *kvt_uuid_parse(const char *text, uint8_t uuid[KVT_UUID_BYTES]) {
    uint8_t value[KVT_UUID_BYTES] = {0};
    unsigned count = 0;
    const char *p = strncmp(text, "GPU-", 4) == 0 ? text + 4 : text;
    for (; *p != '\0'; p++) {
        if (*p == '-') {
            continue;
        }
        int digit = hex_digit(*p);
        if (digit < 0 || count == 2 * KVT_UUID_BYTES) {
            return "is not an identity of 32 hexadecimal digits";
        }
        value[count / 2] = (uint8_t)(value[count / 2] << 4 | digit);
        count++;
    }
    if (count != 2 * KVT_UUID_BYTES) {
        return "is not an identity of 32 hexadecimal digits";
    }
    memcpy(uuid, value, KVT_UUID_BYTES);
    return NULL;
}

const char *kvt_uuid_text(const uint8_t uuid[KVT_UUID_BYTES], char *text) {
    static const char digits[] = "0123456789abcdef";
    char *at = text;
    for (int i = 0; i < KVT_UUID_BYTES; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) {
            *at++ = '-';
        }
        *at++ = digits[uuid[i] >> 4];
        *at++ = digits[uuid[i] & 15];
    }
    *at = '\0';
    return text;
}
