/* What the front watches: its own use of memory and file descriptors, and peers that misbehaved. */
#include "daemon/front/front.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

bool kvt_bad_peers_has(const struct kvt_bad_peers *b, const uint8_t *identity) {
    for (uint32_t i = 0; i < b->count; i++) {
        if (memcmp(b->identity[i], identity, KVT_FRONT_IDENTITY_BYTES) == 0) {
            return true;
        }
    }
    return false;
}

void kvt_bad_peers_add(struct kvt_bad_peers *b, const uint8_t *identity) {
    if (kvt_bad_peers_has(b, identity)) {
        return;
    }
    memcpy(b->identity[b->next], identity, KVT_FRONT_IDENTITY_BYTES);
    b->next = (b->next + 1) % KVT_BAD_PEERS_MAX;
    if (b->count < KVT_BAD_PEERS_MAX) {
        b->count++;
    }
}

uint64_t kvt_front_memory_used(void) {
    char text[128];
    int fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return 0;
    }
    ssize_t n = read(fd, text, sizeof(text) - 1);
    (void)close(fd);
    text[n < 0 ? 0 : n] = '\0';
    char *end = NULL;
    (void)strtoull(text, &end, 10); /* size; the second number is what is resident */
    return (uint64_t)strtoull(end, NULL, 10) * (uint64_t)sysconf(_SC_PAGESIZE);
}

uint32_t kvt_front_fds_used(void) {
    struct stat status;
    if (stat("/proc/self/fd", &status) == 0 && status.st_size > 0) {
        return (uint32_t)status.st_size; /* Linux 6.2 and later count them here */
    }
    DIR *directory = opendir("/proc/self/fd");
    uint32_t count = 0;
    if (directory == NULL) {
        return 0;
    }
    while (readdir(directory) != NULL) {
        count++;
    }
    (void)closedir(directory);
    return count < 3 ? 0 : count - 3; /* ".", "..", and the directory's own */
}

void kvt_front_log(const char *level, const char *format, ...) {
    char line[512];
    int used = snprintf(line, sizeof(line), "kvtierd-front: %s: ", level);
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line + used, sizeof(line) - (size_t)used - 1, format, arguments);
    va_end(arguments);
    used += n < 0 ? 0 : n;
    if (used > (int)sizeof(line) - 2) {
        used = (int)sizeof(line) - 2;
    }
    line[used++] = '\n';
    ssize_t written = write(STDERR_FILENO, line, (size_t)used);
    (void)written;
}
