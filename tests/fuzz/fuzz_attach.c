/* Fuzzes the packets of the attach socket: a connection's first, and those of a session. */
#include "daemon/packet.h"

#include <stdint.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct kvt_attach_hello h;
    struct kvt_attach_refuse no;
    struct kvt_attach_reclaim r;
    memset(&no, 0xee, sizeof(no));
    int rc = kvt_hello_check(data, size, &h, &no);
    if (rc == 0) {
        if (size != sizeof(h) || memchr(h.name, '\0', sizeof(h.name)) == NULL) {
            __builtin_trap();
        }
    } else if (rc > 0 || no.code != (uint32_t)-rc || no.head.bytes != sizeof(no) ||
               memchr(no.text, '\0', sizeof(no.text)) == NULL) {
        __builtin_trap();
    }
    if (kvt_reclaimed_check(data, size, &r) == 0 && size != sizeof(r)) {
        __builtin_trap();
    }
    return 0;
}
