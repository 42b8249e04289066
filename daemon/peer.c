/* Who is at the other end of an attach connection: the kernel's word, and nothing else. */
#include "daemon/peer.h"
#include "daemon/daemon.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77 /* Linux 6.5 */
#endif
#define GROUPS_MAX 1024

static bool in_group(int fd, const struct ucred *cred, gid_t group) {
    gid_t groups[GROUPS_MAX];
    socklen_t size = sizeof(groups);
    if (group == (gid_t)-1) {
        return false;
    }
    if (cred->gid == group) {
        return true;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &size) != 0) {
        return false;
    }
    for (size_t i = 0; i < size / sizeof(groups[0]); i++) {
        if (groups[i] == group) {
            return true;
        }
    }
    return false;
}

/* A pidfd of that process and no other. Before Linux 6.5 it is opened by number, and the number is
 * checked again afterwards: the process lives, is that user's, and still holds the connection. */
static int open_pidfd(int fd, const struct ucred *cred) {
    int pid_fd = -1;
    socklen_t size = sizeof(pid_fd);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pid_fd, &size) == 0) {
        return pid_fd;
    }
    pid_fd = (int)syscall(SYS_pidfd_open, cred->pid, 0);
    if (pid_fd < 0) {
        return -1;
    }
    char path[32];
    struct stat status;
    struct pollfd peer = {.fd = fd, .events = POLLRDHUP};
    (void)snprintf(path, sizeof(path), "/proc/%ld", (long)cred->pid);
    if (stat(path, &status) != 0 || status.st_uid != cred->uid || poll(&peer, 1, 0) != 0 ||
        kvt_pidfd_ended(pid_fd)) {
        (void)close(pid_fd);
        errno = ESRCH;
        return -1;
    }
    return pid_fd;
}

bool kvt_pidfd_ended(int pid_fd) {
    struct pollfd process = {.fd = pid_fd, .events = POLLIN};
    return poll(&process, 1, 0) != 0;
}

int kvt_peer_identify(int fd, gid_t admin_group, struct kvt_peer *out) {
    struct ucred cred;
    socklen_t size = sizeof(cred);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &size) != 0 || cred.pid <= 0) {
        return -KVT_EPERM;
    }
    int pid_fd = open_pidfd(fd, &cred);
    if (pid_fd < 0) {
        return -KVT_ESYS;
    }
    *out = (struct kvt_peer){
        .uid = cred.uid,
        .gid = cred.gid,
        .pid = cred.pid,
        .pid_fd = pid_fd,
        .admin = cred.uid == 0 || cred.uid == geteuid() || in_group(fd, &cred, admin_group),
    };
    return 0;
}
