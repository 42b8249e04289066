/* Control requests over ZeroMQ: one at a time, matched to their reply by sequence.
 *
 * A request that is not answered within RESEND_MS (or a quarter of the timeout) is sent again with the same sequence: the front
 * may have been restarted with the message in its hands. The daemon answers a repeat from its store
 * and does not execute it twice; while it waits for its turn or for memory the daemon says so, and the
 * deadline begins anew. When it passes, what became of the request is unknown; so the session is
 * given up: its caches must not be used in a state that nobody knows.
 */
#include "client/lib/client.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

#define RESEND_MS 1000

/* ---- open and close --------------------------------------------------------------------------- */

static int set_int(void *socket, int option, int value) {
    return zmq_setsockopt(socket, option, &value, sizeof value);
}

static int configure(void *socket) {
    int64_t bytes_max = KVT_MESSAGE_BYTES_MAX;
    return set_int(socket, ZMQ_LINGER, 0) != 0 || set_int(socket, ZMQ_RECONNECT_IVL, 50) != 0 ||
                   set_int(socket, ZMQ_RECONNECT_IVL_MAX, 500) != 0 ||
                   zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &bytes_max, sizeof bytes_max) != 0
               ? -KVT_ESYS
               : 0;
}

int kvt_client_requests_open(struct kvt_client *c) {
    c->buffer = malloc(2 * KVT_MESSAGE_BYTES_MAX);
    if (c->buffer == NULL) {
        return kvt_client_fail(c, -KVT_ENOMEM, "attach: out of memory");
    }
    c->zmq_context = zmq_ctx_new();
    if (c->zmq_context == NULL) {
        return kvt_client_fail(c, -KVT_ESYS, "attach: zmq_ctx_new: %s", zmq_strerror(errno));
    }
    c->zmq_socket = zmq_socket(c->zmq_context, ZMQ_DEALER);
    if (c->zmq_socket == NULL || configure(c->zmq_socket) != 0 ||
        zmq_connect(c->zmq_socket, c->welcome.endpoint) != 0) {
        return kvt_client_fail(c, -KVT_ESYS, "attach: %s: %s", c->welcome.endpoint,
                               zmq_strerror(errno));
    }
    return 0;
}

void kvt_client_requests_close(struct kvt_client *c) {
    if (c->zmq_socket != NULL) {
        (void)zmq_close(c->zmq_socket);
        c->zmq_socket = NULL;
    }
    if (c->zmq_context != NULL) {
        (void)zmq_ctx_term(c->zmq_context);
        c->zmq_context = NULL;
    }
    free(c->buffer);
    c->buffer = NULL;
}

/* ---- sending ---------------------------------------------------------------------------------- */

/* Full queues (a front that is away) are no error: it is sent again later. */
static int transmit(struct kvt_client *c, struct kvt_client_call *call) {
    uint64_t resend_ms =
        c->request_timeout_ms / 4 < RESEND_MS ? c->request_timeout_ms / 4 : RESEND_MS;
    call->resend_ns = kvt_client_now_ns() + resend_ms * 1000000;
    while (zmq_send(c->zmq_socket, c->buffer, call->bytes, ZMQ_DONTWAIT) < 0) {
        if (errno == EAGAIN) {
            return 0;
        }
        if (errno != EINTR) {
            return kvt_client_fail(c, -KVT_ESYS, "%s: zmq_send: %s", call->what,
                                   zmq_strerror(errno));
        }
    }
    return 0;
}

/* When a daemon that says nothing from now on is given up. */
static uint64_t silent_at_ns(const struct kvt_client *c) {
    return kvt_client_now_ns() + (uint64_t)c->request_timeout_ms * 1000000;
}

int kvt_client_call_start(struct kvt_client *c, struct kvt_client_call *call, const char *what,
                          Kvt__Request *r) {
    int rc = kvt_client_check_usable(c);
    if (rc != 0) {
        return rc;
    }
    r->sequence = ++c->sequence;
    r->session = c->welcome.session;
    r->token.data = c->welcome.token;
    r->token.len = sizeof c->welcome.token;
    size_t bytes = kvt__request__get_packed_size(r);
    if (bytes > KVT_MESSAGE_BYTES_MAX) {
        return kvt_client_fail(c, -KVT_ETOOBIG, "%s: the request has %zu bytes; at most %d", what,
                               bytes, KVT_MESSAGE_BYTES_MAX);
    }
    (void)kvt__request__pack(r, c->buffer);
    call->what = what;
    call->sequence = r->sequence;
    call->bytes = bytes;
    call->deadline_ns = silent_at_ns(c);
    return transmit(c, call);
}

/* ---- receiving -------------------------------------------------------------------------------- */

/* A reply is one frame. 1: in the buffer, *bytes long; 0: nothing usable. */
static int receive_frame(struct kvt_client *c, size_t *bytes) {
    int more = 0;
    size_t more_size = sizeof more;
    uint8_t *buffer = c->buffer + KVT_MESSAGE_BYTES_MAX;
    int n = zmq_recv(c->zmq_socket, buffer, KVT_MESSAGE_BYTES_MAX, ZMQ_DONTWAIT);
    if (n < 0) {
        return 0;
    }
    bool whole = n <= KVT_MESSAGE_BYTES_MAX;
    while (zmq_getsockopt(c->zmq_socket, ZMQ_RCVMORE, &more, &more_size) == 0 && more != 0) {
        whole = false;
        if (zmq_recv(c->zmq_socket, NULL, 0, ZMQ_DONTWAIT) < 0) {
            break;
        }
    }
    *bytes = (size_t)n;
    return whole ? 1 : -1;
}

static void keep_shortage(struct kvt_client *c, const Kvt__Shortage *m) {
    c->shortage = (struct kvt_client_shortage){.tier = ""};
    if (m != NULL) {
        (void)snprintf(c->shortage.tier, sizeof c->shortage.tier, "%s", m->tier);
        c->shortage.need_bytes = m->need_bytes;
        c->shortage.available_bytes = m->available_bytes;
        c->shortage.budget_bytes = m->budget_bytes;
        c->shortage.worker_max_bytes = m->worker_max_bytes;
    }
}

/* Unpacks. Replies to earlier requests (answers to repeats) are dropped. 0: not for this call. */
static int unpack(struct kvt_client *c, struct kvt_client_call *call, size_t bytes,
                  Kvt__Reply **out) {
    Kvt__Reply *r = kvt__reply__unpack(NULL, bytes, c->buffer + KVT_MESSAGE_BYTES_MAX);
    if (r == NULL) {
        kvt_client_set_gone(c, KVT_GONE_PROTOCOL);
        return kvt_client_fail(c, -KVT_EPROTO, "%s: the reply is malformed", call->what);
    }
    int rc = 1;
    if (r->boot_epoch != c->welcome.boot_epoch) {
        kvt_client_set_gone(c, KVT_GONE_RESTART);
        rc = kvt_client_fail_gone(c);
    } else if (r->sequence != call->sequence) {
        rc = 0;
    } else if (r->working) {
        call->deadline_ns = c->leaving ? call->deadline_ns : silent_at_ns(c);
        rc = 0;
    } else if (r->code != 0) {
        int code = r->code <= KVT_ESYS ? -(int)r->code : -KVT_EPROTO;
        keep_shortage(c, r->shortage);
        bool told = r->text != NULL && r->text[0] != '\0'; /* it names the request itself */
        rc = told ? kvt_client_fail(c, code, "%s", r->text)
                  : kvt_client_fail(c, code, "%s: %s", call->what, kvt_error_text(code));
    }
    if (rc == 1) {
        *out = r;
    } else {
        kvt__reply__free_unpacked(r, NULL);
    }
    return rc;
}

static int receive(struct kvt_client *c, struct kvt_client_call *call, Kvt__Reply **reply) {
    for (;;) {
        size_t bytes;
        int rc = receive_frame(c, &bytes);
        if (rc == 0) {
            return 0;
        }
        if (rc < 0) {
            kvt_client_set_gone(c, KVT_GONE_PROTOCOL);
            return kvt_client_fail(c, -KVT_EPROTO,
                                   "%s: the reply is longer than %d bytes or in "
                                   "several frames",
                                   call->what, KVT_MESSAGE_BYTES_MAX);
        }
        rc = unpack(c, call, bytes, reply);
        if (rc != 0) {
            return rc;
        }
    }
}

/* Milliseconds until there is something else to do than to wait. */
static long wait_for(const struct kvt_client_call *call, int wait_ms, uint64_t now_ns) {
    uint64_t until_ns = call->resend_ns < call->deadline_ns ? call->resend_ns : call->deadline_ns;
    uint64_t ms = now_ns >= until_ns ? 0 : (until_ns - now_ns + 999999) / 1000000;
    return wait_ms >= 0 && (uint64_t)wait_ms < ms ? wait_ms : (long)ms;
}

int kvt_client_call_poll(struct kvt_client *c, struct kvt_client_call *call, int wait_ms,
                         Kvt__Reply **reply) {
    zmq_pollitem_t items[2] = {{.socket = c->zmq_socket, .events = ZMQ_POLLIN},
                               {.fd = c->gone_fd, .events = ZMQ_POLLIN}};
    (void)zmq_poll(items, 2, wait_for(call, wait_ms, kvt_client_now_ns()));
    int rc = receive(c, call, reply);
    if (rc != 0) {
        return rc;
    }
    if (kvt_client_is_gone(c)) {
        return kvt_client_fail_gone(c);
    }
    uint64_t now_ns = kvt_client_now_ns();
    if (now_ns >= call->deadline_ns) {
        kvt_client_set_gone(c, KVT_GONE_SILENT);
        return kvt_client_fail(c, -KVT_EGONE,
                               "%s: the daemon did not answer for %d ms; the session is given up: "
                               "detach, attach again, start over",
                               call->what, c->request_timeout_ms);
    }
    return now_ns >= call->resend_ns ? transmit(c, call) : 0;
}

int kvt_client_request(struct kvt_client *c, const char *what, Kvt__Request *r,
                       Kvt__Reply__BodyCase body, Kvt__Reply **reply) {
    struct kvt_client_call call;
    Kvt__Reply *answer = NULL;
    int rc = kvt_client_call_start(c, &call, what, r);
    while (rc == 0) {
        rc = kvt_client_call_poll(c, &call, -1, &answer);
    }
    if (rc < 0) {
        return rc;
    }
    if (body != KVT__REPLY__BODY__NOT_SET && answer->body_case != body) {
        kvt__reply__free_unpacked(answer, NULL);
        kvt_client_set_gone(c, KVT_GONE_PROTOCOL);
        return kvt_client_fail(c, -KVT_EPROTO, "%s: the reply is of another kind", what);
    }
    *reply = answer;
    return 0;
}
