/* A driver plug-in that is the cpu driver until the file $KVT_LOSE_DEVICE is there; then the device is
 * lost in the call that the file names: copy, post or poll. It goes by the name of cuda.
 *
 * A device that is lost writes nothing more: copies that the cpu driver has begun end before the loss
 * is told, and nobody hears of them.
 *
 * Thread: the copy thread.
 */
#include "proto/errors.h"
#include "tiers/device/device.h"

#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct kvt_driver_ops *const cpu = &kvt_cpu_driver_ops;
static uint32_t in_flight;

static bool asked_for(const char *call) {
    char word[16] = "";
    const char *path = getenv("KVT_LOSE_DEVICE");
    int fd = path != NULL ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) {
        return false;
    }
    ssize_t n = read(fd, word, sizeof(word) - 1);
    (void)close(fd);
    return n > 0 && strcmp(word, call) == 0;
}

/* Whether the device is lost in this call. */
static bool lost_in(const char *call, struct kvt_driver *d) {
    uint32_t tags[KVT_DRIVER_INFLIGHT_MAX];
    bool ok[KVT_DRIVER_INFLIGHT_MAX];
    if (!asked_for(call)) {
        return false;
    }
    while (in_flight > 0) {
        in_flight -= (uint32_t)cpu->poll(d, tags, ok, KVT_DRIVER_INFLIGHT_MAX);
        (void)sched_yield();
    }
    return true;
}

static int lossy_copy(struct kvt_driver *d, uint32_t stream, const struct kvt_copy *c,
                      uint32_t tag) {
    int rc = lost_in("copy", d) ? -KVT_EDEVICE : cpu->copy(d, stream, c, tag);
    in_flight += rc == 0;
    return rc;
}

static int lossy_post(struct kvt_driver *d, uint32_t stream, uint32_t session, uint32_t slot,
                      uint64_t value, uint32_t tag) {
    return lost_in("post", d) ? -KVT_EDEVICE : cpu->post(d, stream, session, slot, value, tag);
}

static int lossy_poll(struct kvt_driver *d, uint32_t *tags, bool *ok, uint32_t max) {
    int count = lost_in("poll", d) ? -KVT_EDEVICE : cpu->poll(d, tags, ok, max);
    in_flight -= count > 0 ? (uint32_t)count : 0;
    return count;
}

__attribute__((visibility("default"))) const struct kvt_driver_ops *kvt_driver_ops_get(void);

const struct kvt_driver_ops *kvt_driver_ops_get(void) {
    static struct kvt_driver_ops ops;
    ops = kvt_cpu_driver_ops;
    ops.name = "cuda";
    ops.copy = lossy_copy;
    ops.post = lossy_post;
    ops.poll = lossy_poll;
    return &ops;
}
