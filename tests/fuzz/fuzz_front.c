/* Fuzzes the packets between the daemon and its front. */
#include "proto/front.h"

#include <stdint.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct kvt_front_head head;
    memset(&head, 0, sizeof(head));
    memcpy(&head, data, size < sizeof(head) ? size : sizeof(head));
    if (kvt_front_packet_ok(&head, size)) {
        /* What was accepted may be read: the payload lies inside of what came. */
        if (sizeof(head) + head.bytes != size || size > KVT_FRONT_PACKET_BYTES_MAX) {
            __builtin_trap();
        }
    }
    return 0;
}
