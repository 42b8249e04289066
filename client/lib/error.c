#include "client/lib/client.h"

#include <stdarg.h>
#include <stdio.h>

int kvt_client_fail(struct kvt_client *c, int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    (void)vsnprintf(c->message, sizeof c->message, format, args);
    va_end(args);
    return code;
}

int kvt_client_fail_evicted(struct kvt_client *c) {
    return kvt_client_fail(c, -KVT_EEVICTED,
                           "the worker was evicted by an administrator; detach and attach again");
}

int kvt_client_fail_gone(struct kvt_client *c) {
    static const char *const reasons[] = {
        [KVT_GONE_NOT] = "it was never attached",
        [KVT_GONE_HANGUP] = "the daemon ended the session or died",
        [KVT_GONE_RESTART] = "the daemon was restarted",
        [KVT_GONE_SILENT] = "the daemon left a request unanswered",
        [KVT_GONE_PROTOCOL] = "the daemon sent what this library does not understand",
        [KVT_GONE_DEVICE] = "the GPU of this process failed, which must be started again",
        [KVT_GONE_INTERRUPTED] = "it was interrupted",
    };
    return kvt_client_fail(c, -KVT_EGONE,
                           "session %u: %s; its caches are gone: detach, attach again, start over",
                           c->welcome.session,
                           reasons[__atomic_load_n(&c->gone, __ATOMIC_ACQUIRE)]);
}

int kvt_client_check_own(struct kvt_client *c) {
    if (kvt_client_process_is_this(&c->process)) {
        return 0;
    }
    return kvt_client_fail(c, -KVT_ESTATE,
                           "this client belongs to process %d and cannot be used in a child",
                           (int)c->process.pid);
}

int kvt_client_fail_device(struct kvt_client *c) {
    kvt_client_set_gone(c, KVT_GONE_DEVICE);
    return kvt_client_fail(c, -KVT_EDEVICE,
                           "session %u: device %s: %s; this process can use the GPU no more: start "
                           "it again",
                           c->welcome.session, c->device->name, c->device->why(c->gpu));
}

int kvt_client_check_usable(struct kvt_client *c) {
    int rc = kvt_client_check_own(c);
    if (rc != 0) {
        return rc;
    }
    if (c->zmq_socket == NULL) {
        return kvt_client_fail(c, -KVT_ESTATE, "this client is not attached");
    }
    return kvt_client_is_gone(c) ? kvt_client_fail_gone(c) : 0;
}

const char *kvt_error_message(const struct kvt_client *c) {
    if (c == NULL) {
        return "out of memory: not even the client could be allocated";
    }
    return c->message;
}

const char *kvt_version(void) {
    return KVT_VERSION;
}
