/* Packets that the daemon sends on the attach socket, as the library receives them: any bytes, any
 * number of file descriptors. The first byte says how many. */
#include "client/lib/packet.h"
#include "proto/errors.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define FDS_MAX 5 /* more than the library has room for */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int holds) {
    if (!holds) {
        abort();
    }
}

static void send_packet(int to, const uint8_t *bytes, size_t size, uint32_t count, int fd) {
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(FDS_MAX * sizeof(int))];
    } control = {.space = {0}};
    struct iovec v = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = size};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    if (count > 0) {
        m.msg_control = &control;
        m.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *h = CMSG_FIRSTHDR(&m);
        h->cmsg_level = SOL_SOCKET;
        h->cmsg_type = SCM_RIGHTS;
        h->cmsg_len = CMSG_LEN(count * sizeof(int));
        for (uint32_t i = 0; i < count; i++) {
            memcpy(CMSG_DATA(h) + i * sizeof fd, &fd, sizeof fd);
        }
    }
    must(sendmsg(to, &m, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0);
}

static int count_open(void) {
    int count = 0;
    for (int fd = 0; fd < 32; fd++) {
        count += fcntl(fd, F_GETFD) != -1;
    }
    return count;
}

static uint32_t bytes_of(uint32_t type) {
    switch (type) {
    case KVT_ATTACH_WELCOME:
        return 352;
    case KVT_ATTACH_REFUSE:
        return 544;
    case KVT_ATTACH_EXTENT:
        return 104;
    case KVT_ATTACH_RECLAIM:
        return 24;
    default:
        return 0;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    int pair[2];
    if (size < 2 || size > 4096) {
        return 0;
    }
    uint32_t count = data[0] % (FDS_MAX + 1);
    must(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    int before = count_open();
    send_packet(pair[0], data + 1, size - 1, count, pair[0]);

    struct kvt_client_packet *p = malloc(sizeof *p); /* a write beyond it is seen */
    must(p != NULL);
    memset(p, 0xee, sizeof *p);
    int rc = kvt_client_packet_receive(pair[1], p);
    if (rc == 1) {
        must(p->head.magic == KVT_ATTACH_MAGIC && p->head.bytes == size - 1 &&
             bytes_of(p->head.type) == size - 1 && p->fd_count == count &&
             count <= KVT_CLIENT_PACKET_FDS_MAX && memcmp(p->bytes, data + 1, size - 1) == 0);
        kvt_client_packet_close_fds(p);
    } else {
        must(rc == -KVT_EPROTO);
    }
    must(count_open() == before);
    must(kvt_client_packet_receive(pair[1], p) == 0); /* one packet, one message */
    free(p);
    (void)close(pair[0]);
    (void)close(pair[1]);
    return 0;
}
