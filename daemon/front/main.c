/* kvtierd-front is started by kvtierd, with the pair and the listening socket as descriptors 3 and
 * 4. It ends when the daemon does: by the end of the pair, and by the kernel's word.
 */
#include "daemon/front/front.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

static const char help[] =
    "kvtierd-front: the ZeroMQ side of kvtierd, which starts it. Not for use by hand.\n"
    "\n"
    "  kvtierd-front --endpoint ipc://PATH --memory BYTES --parent PID\n";

static bool number(const char *text, uint64_t *out) {
    char *rest = NULL;
    errno = 0;
    unsigned long long value = strtoull(text, &rest, 10);
    if (errno != 0 || rest == text || *rest != '\0') {
        return false;
    }
    *out = value;
    return true;
}

static bool is_seqpacket(int fd) {
    int type = 0;
    socklen_t size = sizeof(type);
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_SEQPACKET;
}

int main(int argc, char **argv) {
    struct kvt_front_options options = {0};
    uint64_t parent = 0;
    for (int i = 1; i < argc; i += 2) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(argv[i], "--help") == 0) {
            (void)fputs(help, stdout);
            return 0;
        }
        if (strcmp(argv[i], "--version") == 0) {
            (void)puts("kvtierd-front " KVT_VERSION);
            return 0;
        }
        bool ok = false;
        if (strcmp(argv[i], "--endpoint") == 0) {
            options.endpoint = value;
            ok = strncmp(value, "ipc://", 6) == 0;
        } else if (strcmp(argv[i], "--memory") == 0) {
            ok = number(value, &options.memory_bytes) && options.memory_bytes > 0;
        } else if (strcmp(argv[i], "--parent") == 0) {
            ok = number(value, &parent) && parent > 0;
        }
        if (!ok) {
            kvt_front_log("error", "argument %s %s is not usable; it is started by kvtierd",
                          argv[i], value);
            return KVT_FRONT_EXIT_USAGE;
        }
    }
    if (options.endpoint == NULL || options.memory_bytes == 0 || parent == 0 ||
        !is_seqpacket(KVT_FRONT_PAIR_FD)) {
        kvt_front_log("error", "it is started by kvtierd, not by hand");
        return KVT_FRONT_EXIT_USAGE;
    }
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    if ((uint64_t)getppid() != parent) {
        return 0; /* the daemon died before the line above */
    }
    /* A terminal's Ctrl-C and a service manager's TERM are for the daemon, which lets its sessions
     * end first; the front ends with it. */
    (void)signal(SIGINT, SIG_IGN);
    (void)signal(SIGTERM, SIG_IGN);
    (void)signal(SIGHUP, SIG_IGN);
    (void)signal(SIGPIPE, SIG_IGN);
    return kvt_front_run(&options);
}
