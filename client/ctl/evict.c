/* kvtierctl evict and version. */
#include "client/ctl/ctl.h"
#include "client/ctl/text.h"

#include <stdio.h>
#include <string.h>

static int ask(struct kvt_ctl *ctl, uint32_t session, bool kill, Kvt__Reply **reply) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Evict m = KVT__EVICT__INIT;
    m.session = session;
    m.kill = kill;
    r.body_case = KVT__REQUEST__BODY_EVICT;
    r.evict = &m;
    return kvt_ctl_ask(ctl, "EVICT", &r, KVT__REPLY__BODY_EVICTED, reply);
}

static void show(const struct kvt_ctl *ctl, uint32_t session, bool kill, const Kvt__Evicted *e) {
    char a[KVT_CTL_TEXT_BYTES];
    char b[KVT_CTL_TEXT_BYTES];
    if (ctl->json) {
        struct kvt_ctl_json j = {.out = stdout};
        kvt_ctl_json_begin(&j, NULL, '{');
        kvt_ctl_json_number(&j, "session", session);
        kvt_ctl_json_number(&j, "host_bytes", e->host_bytes);
        kvt_ctl_json_number(&j, "device_bytes", e->device_bytes);
        kvt_ctl_json_number(&j, "pinned_bytes", e->pinned_bytes);
        kvt_ctl_json_number(&j, "draining_bytes", e->draining_bytes);
        kvt_ctl_json_end(&j, '}');
        (void)fputc('\n', stdout);
        return;
    }
    (void)printf("session %u evicted: host %s, device %s freed\n", session,
                 kvt_ctl_size(e->host_bytes, a), kvt_ctl_size(e->device_bytes, b));
    if (e->draining_bytes > 0) {
        (void)printf("%s of the host memory follow when copies that are under way have ended\n",
                     kvt_ctl_size(e->draining_bytes, a));
    }
    if (e->pinned_bytes > 0 && kill) {
        (void)printf("%s of device memory follow when the process has ended\n",
                     kvt_ctl_size(e->pinned_bytes, a));
    } else if (e->pinned_bytes > 0) {
        (void)printf("%s of device memory are still mapped by the worker; they are free when it "
                     "unmaps them or ends (kvtierctl evict %u --kill)\n",
                     kvt_ctl_size(e->pinned_bytes, a), session);
    }
}

int kvt_ctl_evict(struct kvt_ctl *ctl) {
    uint64_t session = 0;
    bool kill = false;
    for (int i = 0; i < ctl->argc; i++) {
        if (strcmp(ctl->argv[i], "--kill") == 0) {
            kill = true;
        } else if (ctl->argv[i][0] == '-' || session != 0) {
            return kvt_ctl_usage("evict: '%s' is unknown here", ctl->argv[i]);
        } else if (!kvt_ctl_number("evict", ctl->argv[i], 1, UINT32_MAX, &session)) {
            return KVT_CTL_USAGE;
        }
    }
    if (session == 0) {
        return kvt_ctl_usage(
            "evict: the worker's SESSION is needed, as 'kvtierctl workers' shows it");
    }
    Kvt__Reply *reply;
    int rc = kvt_ctl_attach(ctl);
    if (rc == KVT_CTL_OK) {
        rc = ask(ctl, (uint32_t)session, kill, &reply);
    }
    if (rc == KVT_CTL_OK) {
        show(ctl, (uint32_t)session, kill, reply->evicted);
        kvt__reply__free_unpacked(reply, NULL);
    }
    return rc;
}

static void show_version(const struct kvt_ctl *ctl, const struct kvt_attach_welcome *w) {
    char protocol[KVT_CTL_TEXT_BYTES];
    (void)snprintf(protocol, sizeof protocol, "%d.%d", KVT_PROTOCOL_MAJOR, KVT_PROTOCOL_MINOR);
    if (ctl->json) {
        struct kvt_ctl_json j = {.out = stdout};
        kvt_ctl_json_begin(&j, NULL, '{');
        kvt_ctl_json_string(&j, "kvtierctl", kvt_version());
        kvt_ctl_json_string(&j, "protocol", protocol);
        kvt_ctl_json_string(&j, "kvtierd", w != NULL ? w->server_version : "");
        kvt_ctl_json_end(&j, '}');
        (void)fputc('\n', stdout);
        return;
    }
    char version[KVT_NAME_BYTES];
    (void)printf("kvtierctl %s, protocol %s\n", kvt_version(), protocol);
    if (w != NULL) {
        (void)printf("kvtierd %s, protocol %u.%u\n",
                     kvt_ctl_clean(w->server_version, version, sizeof version), w->protocol_major,
                     w->protocol_minor);
    }
}

/* Its own version even if nobody answers. */
int kvt_ctl_version(struct kvt_ctl *ctl) {
    if (ctl->argc > 0) {
        return kvt_ctl_usage("version: '%s' is unknown here", ctl->argv[0]);
    }
    int rc = kvt_ctl_attach(ctl);
    show_version(ctl, rc == KVT_CTL_OK ? &ctl->client->welcome : NULL);
    return rc;
}
