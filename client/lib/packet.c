#include "client/lib/packet.h"

#include "proto/errors.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

void kvt_client_packet_close_fds(struct kvt_client_packet *p) {
    for (uint32_t i = 0; i < p->fd_count; i++) {
        if (p->fds[i] >= 0) {
            (void)close(p->fds[i]);
            p->fds[i] = -1;
        }
    }
    p->fd_count = 0;
}

/* What the daemon may send, and with how many bytes. */
static uint32_t bytes_of_type(uint32_t type) {
    switch (type) {
    case KVT_ATTACH_WELCOME:
        return sizeof(struct kvt_attach_welcome);
    case KVT_ATTACH_REFUSE:
        return sizeof(struct kvt_attach_refuse);
    case KVT_ATTACH_EXTENT:
        return sizeof(struct kvt_attach_extent);
    case KVT_ATTACH_RECLAIM:
        return sizeof(struct kvt_attach_reclaim);
    default:
        return 0;
    }
}

/* Takes all fds there are: those beyond KVT_CLIENT_PACKET_FDS_MAX are closed at once. */
static int take_fds(struct msghdr *m, struct kvt_client_packet *p) {
    int excess = 0;
    for (struct cmsghdr *h = CMSG_FIRSTHDR(m); h != NULL; h = CMSG_NXTHDR(m, h)) {
        if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        size_t count = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(h) + i * sizeof fd, sizeof fd);
            if (p->fd_count < KVT_CLIENT_PACKET_FDS_MAX) {
                p->fds[p->fd_count++] = fd;
            } else {
                (void)close(fd);
                excess++;
            }
        }
    }
    return excess > 0 || (m->msg_flags & MSG_CTRUNC) != 0 ? -KVT_EPROTO : 0;
}

int kvt_client_packet_receive(int fd, struct kvt_client_packet *p) {
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(int) * (KVT_CLIENT_PACKET_FDS_MAX + 2))];
    } control;
    struct iovec v = {.iov_base = p->bytes, .iov_len = sizeof p->bytes};
    struct msghdr m = {
        .msg_iov = &v, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    p->fd_count = 0;
    for (int i = 0; i < KVT_CLIENT_PACKET_FDS_MAX; i++) {
        p->fds[i] = -1;
    }
    ssize_t n;
    do {
        n = recvmsg(fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (n < 0 && errno == EINTR);
    if (n < 0) {
        return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -KVT_EGONE;
    }
    if (n == 0) {
        return -KVT_EGONE;
    }
    int rc = take_fds(&m, p);
    if (rc != 0 || (size_t)n < sizeof p->head || p->head.magic != KVT_ATTACH_MAGIC ||
        p->head.bytes != (size_t)n || bytes_of_type(p->head.type) != (size_t)n) {
        kvt_client_packet_close_fds(p);
        return -KVT_EPROTO;
    }
    return 1;
}

int kvt_client_packet_send(int fd, const void *packet, uint32_t bytes) {
    ssize_t n;
    do {
        n = send(fd, packet, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (n < 0 && errno == EINTR);
    if (n >= 0) {
        return 0;
    }
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS ? -KVT_EBUSY : -KVT_EGONE;
}
