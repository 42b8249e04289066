/* Who is at the other end of an attach connection, by the kernel's word. Loop thread. */
#ifndef KVT_DAEMON_PEER_H
#define KVT_DAEMON_PEER_H

#include "daemon/session.h"

/* 0; -KVT_EPERM: the kernel does not say (a process of another pid namespace); -KVT_ESYS: the
 * process is gone, or no descriptor is left (errno). out->pid_fd is owned by the caller. */
int kvt_peer_identify(int fd, gid_t admin_group, struct kvt_peer *out)
    __attribute__((warn_unused_result));

bool kvt_pidfd_ended(int pid_fd);

#endif
