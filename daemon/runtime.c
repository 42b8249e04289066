#include "daemon/runtime.h"
#include "proto/errors.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define BACKLOG 256

static int make_path(const char *dir, const char *name, char path[KVT_SOCKET_PATH_BYTES],
                     char *text) {
    int n = snprintf(path, KVT_SOCKET_PATH_BYTES, "%s/%s", dir, name);
    if (n < 0 || (size_t)n >= KVT_SOCKET_PATH_BYTES) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES,
                       "[daemon] runtime_dir = %s: the socket path %s/%s has %d bytes, and the "
                       "system accepts %zu; choose a shorter directory",
                       dir, dir, name, n, KVT_SOCKET_PATH_BYTES - 1);
        return -KVT_ECONFIG;
    }
    return 0;
}

static int system_error(char *text, const char *path, const char *what) {
    int error = errno;
    const char *hint = error == EACCES || error == EPERM
                           ? "; run as the directory's owner, or choose another "
                             "[daemon] runtime_dir"
                       : error == ENOENT ? "; make the folder above it first"
                       : error == EROFS  ? "; choose another [daemon] runtime_dir"
                                         : "";
    (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "%s: cannot %s: %s%s", path, what, strerror(error),
                   hint);
    return -KVT_ESYS;
}

/* Whether the folder above `dir` is there, though the system says that something is not. */
static bool has_parent(const char *dir) {
    char parent[KVT_CONFIG_TEXT_BYTES];
    struct stat status;
    (void)snprintf(parent, sizeof(parent), "%s", dir);
    char *slash = strrchr(parent, '/');
    if (slash == NULL) {
        return true;
    }
    slash[slash == parent] = '\0';
    return stat(parent, &status) == 0 && S_ISDIR(status.st_mode);
}

/* What is there is a directory, and nobody else may write to it. */
static int check_directory(const char *dir, const struct stat *status, char *text) {
    if (!S_ISDIR(status->st_mode)) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES,
                       "[daemon] runtime_dir = %s: not a directory; choose another", dir);
        return -KVT_ECONFIG;
    }
    if ((status->st_mode & 022) != 0 || (status->st_uid != geteuid() && status->st_uid != 0)) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES,
                       "[daemon] runtime_dir = %s: others may write to it (mode %04o, owner %u), "
                       "and could put sockets of their own there; chmod 0750, and let the "
                       "daemon's user own it",
                       dir, (unsigned)status->st_mode & 07777, (unsigned)status->st_uid);
        return -KVT_ECONFIG;
    }
    return 0;
}

static int open_directory(const char *dir, gid_t group, char *text) {
    bool made = mkdir(dir, 0750) == 0;
    if (!made && errno == ENOENT && has_parent(dir)) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES,
                       "%s: cannot be made: the file system there takes no directories; choose "
                       "another [daemon] runtime_dir",
                       dir);
        return -KVT_ESYS;
    }
    if (!made && errno != EEXIST) {
        return system_error(text, dir, "be made");
    }
    if (made && (chmod(dir, 0750) != 0 || (group != (gid_t)-1 && chown(dir, (uid_t)-1, group)))) {
        return system_error(text, dir, "get its mode and group");
    }
    struct stat status;
    if (stat(dir, &status) != 0) {
        return system_error(text, dir, "be looked at");
    }
    return check_directory(dir, &status, text);
}

/* The pid of the process that holds the lock, by the kernel's word; 0: unknown. */
static long lock_holder(int fd) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK && lock.l_pid > 0) {
        return (long)lock.l_pid;
    }
    return 0;
}

static int take_lock(const char *dir, int *out, char *text) {
    char path[KVT_CONFIG_TEXT_BYTES + 8];
    (void)snprintf(path, sizeof(path), "%s/lock", dir);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) {
        return system_error(text, path, "be opened");
    }
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(fd, F_SETLK, &lock) != 0) {
        int error = errno;
        long pid = lock_holder(fd);
        (void)close(fd);
        if (error != EACCES && error != EAGAIN) {
            errno = error;
            return system_error(text, path, "be locked");
        }
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES,
                       "%s: another kvtierd serves this directory, with pid %ld; stop it, or "
                       "choose another [daemon] runtime_dir",
                       dir, pid);
        return -KVT_EEXIST;
    }
    char pid[32];
    int n = snprintf(pid, sizeof(pid), "%ld\n", (long)getpid());
    if (ftruncate(fd, 0) != 0 || pwrite(fd, pid, (size_t)n, 0) != n) {
        int rc = system_error(text, path, "be written");
        (void)close(fd);
        return rc;
    }
    *out = fd;
    return 0;
}

static int bind_socket(const char *path, int type, gid_t group, int *out, char *text) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, path, strlen(path) + 1);
    struct stat status;
    if (lstat(path, &status) == 0) {
        if (!S_ISSOCK(status.st_mode)) {
            (void)snprintf(text, KVT_CONFIG_ERROR_BYTES,
                           "%s: is there and is not a socket; move it away", path);
            return -KVT_ECONFIG;
        }
        if (unlink(path) != 0) {
            return system_error(text, path, "be removed");
        }
    }
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return system_error(text, path, "be made");
    }
    mode_t mask = umask(0777); /* nobody connects before mode and group are right */
    int rc = bind(fd, (struct sockaddr *)&address, sizeof(address));
    (void)umask(mask);
    if (rc != 0) {
        rc = system_error(text, path, "be bound");
    } else if ((group != (gid_t)-1 && chown(path, (uid_t)-1, group) != 0) ||
               chmod(path, 0660) != 0) {
        rc = system_error(text, path, "get its mode and group");
    } else if (listen(fd, BACKLOG) != 0) {
        rc = system_error(text, path, "be listened on");
    }
    if (rc != 0) {
        (void)close(fd);
        return rc;
    }
    *out = fd;
    return 0;
}

static int find_group(const struct kvt_config *c, gid_t *out, char *text) {
    *out = (gid_t)-1;
    if (c->socket_group[0] == '\0') {
        return 0;
    }
    const struct group *group = getgrnam(c->socket_group);
    if (group == NULL) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES,
                       "[daemon] socket_group = %s: there is no such group", c->socket_group);
        return -KVT_ECONFIG;
    }
    *out = group->gr_gid;
    return 0;
}

int kvt_runtime_check(const struct kvt_config *c, char *text) {
    char path[KVT_SOCKET_PATH_BYTES];
    gid_t group;
    struct stat status;
    int rc = make_path(c->runtime_dir, "attach.sock", path, text);
    rc = rc == 0 ? find_group(c, &group, text) : rc;
    if (rc != 0) {
        return rc;
    }
    if (stat(c->runtime_dir, &status) == 0) {
        return check_directory(c->runtime_dir, &status, text);
    }
    if (errno == ENOENT && has_parent(c->runtime_dir)) {
        return 0; /* start makes it */
    }
    return system_error(text, c->runtime_dir, "be made");
}

int kvt_runtime_open(const struct kvt_config *c, struct kvt_runtime *out, char *text) {
    struct kvt_runtime r = {.lock_fd = -1, .attach_fd = -1, .front_fd = -1};
    gid_t group = (gid_t)-1;
    int rc = make_path(c->runtime_dir, "attach.sock", r.attach_path, text);
    if (rc == 0) {
        rc = make_path(c->runtime_dir, "front.sock", r.front_path, text);
    }
    if (rc == 0) {
        rc = find_group(c, &group, text);
    }
    if (rc == 0) {
        rc = open_directory(c->runtime_dir, group, text);
    }
    if (rc == 0) {
        rc = take_lock(c->runtime_dir, &r.lock_fd, text);
    }
    if (rc == 0) {
        rc = bind_socket(r.front_path, SOCK_STREAM, group, &r.front_fd, text);
    }
    if (rc == 0) {
        rc = bind_socket(r.attach_path, SOCK_SEQPACKET, group, &r.attach_fd, text);
    }
    if (rc != 0) {
        kvt_runtime_close(&r);
        return rc;
    }
    *out = r;
    return 0;
}

void kvt_runtime_close(struct kvt_runtime *r) {
    if (r->attach_fd >= 0) {
        (void)unlink(r->attach_path);
        (void)close(r->attach_fd);
        r->attach_fd = -1;
    }
    if (r->front_fd >= 0) {
        (void)unlink(r->front_path);
        (void)close(r->front_fd);
        r->front_fd = -1;
    }
    if (r->lock_fd >= 0) {
        (void)close(r->lock_fd);
        r->lock_fd = -1;
    }
}
