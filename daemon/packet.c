#include "daemon/packet.h"
#include "proto/layout.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

struct kvt_attach_head kvt_attach_head_make(enum kvt_attach_type type, size_t bytes) {
    return (struct kvt_attach_head){
        .magic = KVT_ATTACH_MAGIC, .type = (uint32_t)type, .bytes = (uint32_t)bytes};
}

void kvt_refuse_make(struct kvt_attach_refuse *refuse, int code, const char *format, ...) {
    memset(refuse, 0, sizeof(*refuse));
    refuse->head = kvt_attach_head_make(KVT_ATTACH_REFUSE, sizeof(*refuse));
    refuse->code = (uint32_t)(code < 0 ? -code : code);
    refuse->protocol_major = KVT_PROTOCOL_MAJOR;
    refuse->protocol_minor = KVT_PROTOCOL_MINOR;
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(refuse->text, sizeof(refuse->text), format, arguments);
    va_end(arguments);
}

#define REFUSE(refuse, code, ...) (kvt_refuse_make(refuse, code, __VA_ARGS__), -(code))

static int check_fields(const struct kvt_attach_hello *h, struct kvt_attach_refuse *refuse) {
    if (h->role != KVT_ROLE_WORKER && h->role != KVT_ROLE_CONTROL) {
        return REFUSE(refuse, KVT_EINVAL, "attach: role is %u; accepted is 1 (worker), 2 (control)",
                      h->role);
    }
    if (h->role == KVT_ROLE_WORKER && h->worker_kind != KVT_WORKER_SEGMENT &&
        h->worker_kind != KVT_WORKER_DENSE) {
        return REFUSE(refuse, KVT_EINVAL,
                      "attach: worker_kind is %u; accepted is 1 (segment), 2 (dense)",
                      h->worker_kind);
    }
    if (h->role == KVT_ROLE_CONTROL && h->worker_kind != 0) {
        return REFUSE(refuse, KVT_EINVAL,
                      "attach: worker_kind is %u; accepted is 0 for the role control",
                      h->worker_kind);
    }
    if (h->extent_kind > KVT_EXTENT_IPC) {
        return REFUSE(refuse, KVT_EINVAL,
                      "attach: extent_kind is %u; accepted is 0 (any), 1 (fd), 2 (ipc)",
                      h->extent_kind);
    }
    if (memchr(h->name, '\0', sizeof(h->name)) == NULL) {
        return REFUSE(refuse, KVT_EINVAL, "attach: the name has no closing NUL");
    }
    return 0;
}

int kvt_hello_check(const void *bytes, size_t size, struct kvt_attach_hello *out,
                    struct kvt_attach_refuse *refuse) {
    struct kvt_attach_hello h;
    size_t versions = offsetof(struct kvt_attach_hello, features);
    if (size < versions) {
        return REFUSE(refuse, KVT_EPROTO, "attach: a packet of %zu bytes is no HELLO", size);
    }
    memset(&h, 0, sizeof(h));
    memcpy(&h, bytes, size < sizeof(h) ? size : sizeof(h));
    if (h.head.magic != KVT_ATTACH_MAGIC || h.head.type != KVT_ATTACH_HELLO) {
        return REFUSE(refuse, KVT_EPROTO, "attach: the first packet is no HELLO");
    }
    if (h.protocol_major != KVT_PROTOCOL_MAJOR) {
        return REFUSE(refuse, KVT_EVERSION,
                      "attach: kvtierd " KVT_VERSION " speaks protocol %d.%d, the client speaks "
                      "%u.%u; use daemon and library of the same major version",
                      KVT_PROTOCOL_MAJOR, KVT_PROTOCOL_MINOR, h.protocol_major, h.protocol_minor);
    }
    if (size != sizeof(h) || h.head.bytes != sizeof(h)) {
        return REFUSE(refuse, KVT_EPROTO, "attach: HELLO has %zu bytes and says %u; it has %zu",
                      size, h.head.bytes, sizeof(h));
    }
    int rc = check_fields(&h, refuse);
    if (rc == 0) {
        *out = h;
    }
    return rc;
}

int kvt_reclaimed_check(const void *bytes, size_t size, struct kvt_attach_reclaim *out) {
    struct kvt_attach_reclaim r;
    if (size != sizeof(r)) {
        return -KVT_EPROTO;
    }
    memcpy(&r, bytes, sizeof(r));
    if (r.head.magic != KVT_ATTACH_MAGIC || r.head.type != KVT_ATTACH_RECLAIMED ||
        r.head.bytes != sizeof(r)) {
        return -KVT_EPROTO;
    }
    *out = r;
    return 0;
}
