/* Identities of devices as people write them: 32 hexadecimal digits, with or without dashes, "GPU-" before
 * them if they like. Pure; any thread.
 */
#ifndef KVT_PROTO_UUID_H
#define KVT_PROTO_UUID_H

#include "proto/limits.h"

#include <stdint.h>

#define KVT_UUID_TEXT_BYTES 37 /* with dashes and the closing NUL */

/* What is wrong with the text; NULL: nothing, and uuid is set. */
const char *kvt_uuid_parse(const char *text, uint8_t uuid[KVT_UUID_BYTES]);
/* 8-4-4-4-12 digits. Returns text, which has room for KVT_UUID_TEXT_BYTES. */
const char *kvt_uuid_text(const uint8_t uuid[KVT_UUID_BYTES], char *text);

#endif
