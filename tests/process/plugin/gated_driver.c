/* A driver plug-in that is the cpu driver, except that it refuses every control page, and not before the
 * file $KVT_REFUSE_PAGES is there, and cannot measure its link. It goes by the name of cuda.
 *
 * Thread: the control thread.
 */
#include "proto/errors.h"
#include "proto/limits.h"
#include "tiers/device/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static int gated_page_added(struct kvt_driver *d, uint32_t session, struct kvt_control_page *page,
                            char *text) {
    const char *path = getenv("KVT_REFUSE_PAGES");
    (void)d;
    (void)page;
    while (path != NULL && access(path, F_OK) != 0) {
        (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    (void)snprintf(text, KVT_TEXT_BYTES, "no page today for session %u", session);
    return -KVT_EDEVICE;
}

static int no_measure(struct kvt_driver *d, struct kvt_link *out, char *text) {
    (void)d;
    (void)out;
    (void)snprintf(text, KVT_TEXT_BYTES, "no clock today");
    return -KVT_ESYS;
}

__attribute__((visibility("default"))) const struct kvt_driver_ops *kvt_driver_ops_get(void);

const struct kvt_driver_ops *kvt_driver_ops_get(void) {
    static struct kvt_driver_ops ops;
    ops = kvt_cpu_driver_ops;
    ops.name = "cuda";
    ops.page_added = gated_page_added;
    ops.measure = no_measure;
    return &ops;
}
