#include "client/ctl/ctl.h"
#include "client/output.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failed(struct kvt_ctl *ctl, int rc) {
    ctl->error = rc;
    (void)fprintf(stderr, "kvtierctl: %s\n", kvt_error_message(ctl->client));
    return rc == -KVT_EGONE || rc == -KVT_ETIMEDOUT ? KVT_CTL_NO_DAEMON
           : rc == -KVT_EINVAL                      ? KVT_CTL_USAGE
                                                    : KVT_CTL_ERROR;
}

int kvt_ctl_attach(struct kvt_ctl *ctl) {
    struct kvt_client_options o = {
        .runtime_dir = ctl->runtime_dir,
        .role = KVT_ROLE_CONTROL,
        .name = "kvtierctl",
        .timeout_ms = ctl->timeout_ms,
        .request_timeout_ms = ctl->timeout_ms,
    };
    int rc = kvt_client_open(&o, &ctl->client);
    return rc == 0 ? KVT_CTL_OK : failed(ctl, rc);
}

int kvt_ctl_ask(struct kvt_ctl *ctl, const char *what, Kvt__Request *r, Kvt__Reply__BodyCase body,
                Kvt__Reply **reply) {
    int rc = kvt_client_request(ctl->client, what, r, body, reply);
    if (rc == 0) {
        return KVT_CTL_OK;
    }
    /* What the daemon finds wrong with a request is its answer, not a mistake in typing. */
    return failed(ctl, rc) == KVT_CTL_NO_DAEMON ? KVT_CTL_NO_DAEMON : KVT_CTL_ERROR;
}

int kvt_ctl_flush(struct kvt_ctl *ctl) {
    const char *why = kvt_output_failed();
    if (why == NULL) {
        return KVT_CTL_OK;
    }
    if (!ctl->output_failed) {
        (void)fprintf(stderr, "kvtierctl: the output cannot be written: %s\n", why);
    }
    ctl->output_failed = true;
    return KVT_CTL_ERROR;
}

int kvt_ctl_usage(const char *format, ...) {
    va_list args;
    va_start(args, format);
    (void)fputs("kvtierctl: ", stderr);
    (void)vfprintf(stderr, format, args);
    (void)fputs("; kvtierctl --help lists commands and options\n", stderr);
    va_end(args);
    return KVT_CTL_USAGE;
}

const char *kvt_ctl_value(struct kvt_ctl *ctl, int *at, const char *name, bool *bad) {
    const char *argument = ctl->argv[*at];
    size_t length = strlen(name);
    if (strncmp(argument, name, length) != 0) {
        return NULL;
    }
    if (argument[length] == '=') {
        return argument + length + 1;
    }
    if (argument[length] != '\0') {
        return NULL;
    }
    if (*at + 1 == ctl->argc) {
        (void)kvt_ctl_usage("%s needs a value", name);
        *bad = true;
        return NULL;
    }
    return ctl->argv[++*at];
}

bool kvt_ctl_number(const char *name, const char *text, uint64_t lowest, uint64_t highest,
                    uint64_t *out) {
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0 || n < lowest || n > highest) {
        (void)kvt_ctl_usage("%s: '%s' is not a number from %" PRIu64 " to %" PRIu64, name, text,
                            lowest, highest);
        return false;
    }
    *out = n;
    return true;
}
