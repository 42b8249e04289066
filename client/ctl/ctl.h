/* What the commands of kvtierctl share. One thread. */
#ifndef KVT_CTL_CTL_H
#define KVT_CTL_CTL_H

#include "client/lib/client.h"

#include <stdbool.h>

/* Exit codes; man/kvtierctl.1 says the same. */
enum kvt_ctl_exit {
    KVT_CTL_OK = 0,
    KVT_CTL_ERROR = 1,     /* the daemon answered with an error, permission denied, no output */
    KVT_CTL_USAGE = 2,     /* unknown command or option, value out of range */
    KVT_CTL_NO_DAEMON = 3, /* nobody answers */
};

struct kvt_ctl {
    const char *runtime_dir;
    bool json;
    int timeout_ms;
    struct kvt_client *client; /* attached by kvt_ctl_attach */
    int error;                 /* of the last call that failed: a kvt_error, negative */
    bool output_failed;        /* and that has been printed */
    int argc;                  /* the command's own arguments, without its name */
    char **argv;
};

/* Attaches in the control role. KVT_CTL_OK, or the exit code; the reason has been printed. */
int kvt_ctl_attach(struct kvt_ctl *ctl);
/* Sends; KVT_CTL_OK and *reply, or the exit code; the reason has been printed. */
int kvt_ctl_ask(struct kvt_ctl *ctl, const char *what, Kvt__Request *r, Kvt__Reply__BodyCase body,
                Kvt__Reply **reply);
/* Writes out what was printed so far. KVT_CTL_OK, or KVT_CTL_ERROR; the reason is printed once. */
int kvt_ctl_flush(struct kvt_ctl *ctl);
/* Prints "kvtierctl: ..." and returns KVT_CTL_USAGE. */
__attribute__((format(printf, 1, 2))) int kvt_ctl_usage(const char *format, ...);
/* The next argument's value if argv[*at] is `name` or `name=VALUE`; NULL: it is another one. A
 * missing value is printed and *bad set. */
const char *kvt_ctl_value(struct kvt_ctl *ctl, int *at, const char *name, bool *bad);
/* Whether `text` is a whole number in the range; otherwise it is printed. */
bool kvt_ctl_number(const char *name, const char *text, uint64_t lowest, uint64_t highest,
                    uint64_t *out);

/* The commands. Each returns an exit code. */
int kvt_ctl_status(struct kvt_ctl *ctl);
int kvt_ctl_workers(struct kvt_ctl *ctl);
int kvt_ctl_caches(struct kvt_ctl *ctl);
int kvt_ctl_plan(struct kvt_ctl *ctl);
int kvt_ctl_evict(struct kvt_ctl *ctl);
int kvt_ctl_version(struct kvt_ctl *ctl);

extern const char kvt_ctl_plan_help[];

#endif
