/* Fuzzes control messages: unpacked in the bounded arena, every field checked; what passes is a
 * request that the engine may be given. */
#include "daemon/request.h"
#include "proto/front.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_request(const struct kvt_request *r) {
    if (r->kind < KVT_REQUEST_CREATE || r->kind > KVT_REQUEST_RESET || r->count > KVT_ROWS_MAX) {
        __builtin_trap();
    }
    /* Everything that it points to is there. */
    uint32_t sum = 0;
    for (uint32_t i = 0; i < r->count; i++) {
        sum += r->rows != NULL ? r->rows[i] : 0;
        sum += r->values != NULL ? r->values[i] : 0;
    }
    __asm__ volatile("" : : "r"(sum)); /* read, not optimised away */
    if (r->kind == KVT_REQUEST_CREATE) {
        char text[KVT_TEXT_BYTES];
        if (kvt_layout_check(r->layout, text, sizeof(text)) != 0 || r->options->rows < 1 ||
            memchr(r->options->name, '\0', sizeof(r->options->name)) == NULL) {
            __builtin_trap();
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct kvt_arena arena;
    static struct kvt_request_buffers buffers;
    struct kvt_request request;
    char text[KVT_TEXT_BYTES] = "";
    int code = 0;
    if (arena.memory == NULL && kvt_arena_init(&arena, KVT_ARENA_BYTES) != 0) {
        return 0;
    }
    if (size > KVT_MESSAGE_BYTES_MAX) {
        return 0; /* the front lets none through */
    }
    const Kvt__Request *m = kvt_request_unpack(&arena, data, size, &code);
    if (arena.used > arena.size || (m == NULL && code != -KVT_EPROTO && code != -KVT_ETOOBIG)) {
        __builtin_trap();
    }
    if (m == NULL) {
        return 0;
    }
    int rc = kvt_request_read(m, &buffers, &request, text);
    if (rc == 0) {
        check_request(&request);
    } else if (rc > 0 || text[0] == '\0') {
        __builtin_trap();
    }
    if (m->body_case == KVT__REQUEST__BODY_PLAN) {
        (void)!kvt_cache_options_read(m->plan->options, &buffers, text);
    }
    return 0;
}
