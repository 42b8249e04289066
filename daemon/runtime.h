/* The runtime directory: lock file, sockets. Order at start: lock first, then what a dead daemon
 * left is removed, then the sockets are bound; so a second daemon ends and the first is unharmed.
 * The sockets are 0660 in a directory of 0750. Loop thread, at start and stop.
 */
#ifndef KVT_DAEMON_RUNTIME_H
#define KVT_DAEMON_RUNTIME_H

#include "daemon/config.h"

#include <sys/un.h>

#define KVT_SOCKET_PATH_BYTES sizeof(((struct sockaddr_un *)0)->sun_path)

struct kvt_runtime {
    char attach_path[KVT_SOCKET_PATH_BYTES];
    char front_path[KVT_SOCKET_PATH_BYTES];
    int lock_fd; /* all owned; -1: none */
    int attach_fd;
    int front_fd;
};

/* -KVT_EEXIST: another daemon serves the directory (the text has its pid); -KVT_ECONFIG,
 * -KVT_ESYS: the text[KVT_CONFIG_ERROR_BYTES] says what to do. */
int kvt_runtime_open(const struct kvt_config *c, struct kvt_runtime *out, char *text)
    __attribute__((warn_unused_result));
/* What kvt_runtime_open finds wrong, as far as that is seen without making anything. */
int kvt_runtime_check(const struct kvt_config *c, char *text) __attribute__((warn_unused_result));
/* Removes the sockets; the lock file stays, since removing it would race with the next daemon. */
void kvt_runtime_close(struct kvt_runtime *r);

#endif
