/* The cuda driver: GPU memory, copies by the GPU's copy engines, posts by its streams. A plug-in
 * (kvtier-cuda.so), which opens libcuda at run time.
 *
 * Threads: as device.h says. The copy thread owns streams, flights and `why`; the control thread owns
 * extents; the host's threads register. They share the tables of extents, host ranges and control
 * pages, in which an entry is used only after the event that says that it is there.
 *
 * Two streams: 0 towards the GPU, 1 away from it. A fill's post is a stream write behind its last
 * copy, so it needs no reaction of the host. Nothing of the daemon ever waits on the GPU for a
 * counter that a worker writes: while a stream waits, calls such as cuMemFree and
 * cuMemHostUnregister stall the calling thread, and a worker that hangs would stall the daemon.
 *
 * A post stores `value` only and does not touch the counter's wake word: the worker's GPU waits for
 * `ready` by polling (proto/control_page.h), and so must a CPU that wants to.
 *
 * One copy is one cuMemcpy: the engine has joined neighbouring blocks before, into runs of MiB, which
 * neither 2-D nor batched copies would make faster.
 *
 * Copies inside the host arena (tails that are copied on write) are made by a thread: CUDA would do
 * them in the calling one. Their order is that of the issuer's gates, so they need no stream.
 *
 * Every place is checked here once more, after the engine. What CUDA refuses all the same is a lost
 * device: its state is then unknown, and the daemon is restarted.
 */
#include "cuda/cuda_api.h"
#include "proto/errors.h"
#include "tiers/device/cpu/pool.h"
#include "tiers/device/cuda/extents.h"
#include "tiers/device/cuda/host_map.h"
#include "tiers/device/cuda/host_register.h"
#include "tiers/device/cuda/measure.h"
#include "tiers/device/cuda/streams.h"
#include "tiers/device/device.h"
#include "tiers/engine/assert.h"
#include "tiers/host/machine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SESSIONS_MAX = 65536, STREAMS = 2 };
#define IPC_GRANULE_BYTES (UINT64_C(2) << 20)
/* Nothing came back for so long: ask CUDA whether the GPU is well. */
#define QUIET_NS   (UINT64_C(50) * 1000 * 1000)
#define WAIT_US    50
#define READY_STEP sizeof(struct kvt_counter)

struct page {
    struct kvt_control_page *page; /* control thread; borrowed */
    CUdeviceptr gpu;               /* atomic; 0: not there */
};

struct flight {
    bool is_copy;
    struct kvt_place source;
    struct kvt_place target;
};

struct kvt_driver {
    const struct kvt_cuda_api *api;
    CUdevice device;
    CUcontext context;      /* the GPU's primary one */
    uint64_t measure_bytes; /* what measuring may take of device and host memory: of each */
    uint8_t *host_base;
    struct kvt_host_map *host;
    struct kvt_cuda_extents *extents;
    CUstream control_stream; /* zeroing, measuring */
    struct kvt_cuda_stream streams[STREAMS];
    struct kvt_pool *pool; /* copies inside the host arena */
    struct kvt_bell pool_bell;
    struct flight flights[KVT_DRIVER_TAGS_MAX]; /* by tag */
    uint64_t quiet_since_ns;                    /* 0: something came back just now */
    char why[KVT_TEXT_BYTES];                   /* the device is lost: what CUDA said */
    struct page pages[SESSIONS_MAX];
};

/* Contexts are current a thread. */
static __thread CUcontext current;

static void enter(const struct kvt_driver *d) {
    if (current != d->context && d->api->cuCtxSetCurrent(d->context) == CUDA_SUCCESS) {
        current = d->context;
    }
}

static void leave(const struct kvt_driver *d) {
    (void)d->api->cuCtxSetCurrent(NULL);
    current = NULL;
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* ---- opening --------------------------------------------------------------------------------- */

static void cuda_close(struct kvt_driver *d) {
    if (!d) {
        return;
    }
    kvt_pool_free(d->pool);
    if (d->context) {
        enter(d);
        for (int i = 0; i < STREAMS; i++) {
            kvt_cuda_stream_free(&d->streams[i]);
        }
        kvt_cuda_extents_free(d->extents);
        if (d->control_stream) {
            (void)d->api->cuStreamDestroy(d->control_stream);
        }
        if (d->host) {
            kvt_host_unregister_all(d->api, d->host, d->host_base);
        }
        leave(d);
        (void)d->api->cuDevicePrimaryCtxRelease(d->device);
    }
    kvt_host_map_free(d->host);
    free(d);
}

/* Writes the sentence and returns the code. */
static int refused(const struct kvt_driver *d, const char *call, CUresult error, char *text) {
    char reason[KVT_CUDA_TEXT_BYTES];
    snprintf(text, KVT_TEXT_BYTES, "device cuda: %s: %s", call,
             kvt_cuda_error(d->api, error, reason));
    return error == CUDA_ERROR_OUT_OF_MEMORY ? -KVT_EQUOTA : -KVT_EDEVICE;
}

static int find_gpu(struct kvt_driver *d, const uint8_t *uuid, char *text) {
    char why[KVT_CUDA_TEXT_BYTES] = "";
    int rc = -KVT_ENOTSUP;
    d->api = kvt_cuda_open(why);
    if (d->api && kvt_cuda_find(d->api, uuid, &d->device, why) != CUDA_SUCCESS) {
        rc = -KVT_ENOENT;
    } else if (d->api && kvt_cuda_check_stream_values(d->api, d->device, why) == CUDA_SUCCESS) {
        return 0;
    }
    snprintf(text, KVT_TEXT_BYTES, "device cuda: %s", why);
    return rc;
}

/* Threads of the daemon that wait for the GPU sleep: its copy thread never does. */
static int take_context(struct kvt_driver *d, char *text) {
    /* Another user of the primary context in this process may have set its flags: then they stay. */
    (void)d->api->cuDevicePrimaryCtxSetFlags(d->device, CU_CTX_SCHED_BLOCKING_SYNC);
    CUresult error = d->api->cuDevicePrimaryCtxRetain(&d->context, d->device);
    if (error != CUDA_SUCCESS) {
        d->context = NULL;
        return refused(d, "cuDevicePrimaryCtxRetain", error, text);
    }
    enter(d);
    return 0;
}

static int choose_kind(const struct kvt_driver *d, uint32_t wanted, uint32_t *kind, char *text) {
    int vmm = 0;
    int posix = 0;
    (void)d->api->cuDeviceGetAttribute(
        &vmm, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, d->device);
    (void)d->api->cuDeviceGetAttribute(
        &posix, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, d->device);
    bool fd_works = vmm != 0 && posix != 0;
    if (wanted == KVT_EXTENT_FD && !fd_works) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device cuda: this GPU and driver cannot share memory by file descriptor; set "
                 "extent_kind = ipc");
        return -KVT_ENOTSUP;
    }
    *kind = wanted != 0 ? wanted : fd_works ? KVT_EXTENT_FD : KVT_EXTENT_IPC;
    return 0;
}

static int granule(const struct kvt_driver *d, uint32_t kind, uint64_t *bytes, char *text) {
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = d->device}};
    size_t found = 0;
    *bytes = IPC_GRANULE_BYTES; /* what cuMemAlloc takes whole, so that a handle names it alone */
    if (kind == KVT_EXTENT_IPC) {
        return 0;
    }
    CUresult error =
        d->api->cuMemGetAllocationGranularity(&found, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    if (error != CUDA_SUCCESS) {
        return refused(d, "cuMemGetAllocationGranularity", error, text);
    }
    *bytes = found > IPC_GRANULE_BYTES ? found : IPC_GRANULE_BYTES;
    return 0;
}

static int check_budget(const struct kvt_driver *d, uint64_t budget_bytes, char *text) {
    char budget[KVT_SIZE_TEXT_BYTES];
    char total[KVT_SIZE_TEXT_BYTES];
    size_t total_bytes = 0;
    CUresult error = d->api->cuDeviceTotalMem(&total_bytes, d->device);
    if (error != CUDA_SUCCESS) {
        return refused(d, "cuDeviceTotalMem", error, text);
    }
    if (budget_bytes > total_bytes) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device cuda: the device's budget is %s, the GPU has %s; lower it",
                 kvt_size_text(budget_bytes, budget), kvt_size_text(total_bytes, total));
        return -KVT_ECONFIG;
    }
    return 0;
}

static int make_streams(struct kvt_driver *d, char *text) {
    const char *call = "cuStreamCreate";
    CUresult error = d->api->cuStreamCreate(&d->control_stream, CU_STREAM_NON_BLOCKING);
    for (int i = 0; i < STREAMS && error == CUDA_SUCCESS; i++) {
        error = kvt_cuda_stream_create(d->api, &d->streams[i], &call);
    }
    return error == CUDA_SUCCESS ? 0 : refused(d, call, error, text);
}

/* Says in info what this GPU is. */
static int describe(const struct kvt_driver *d, uint32_t kind, uint64_t granule_bytes,
                    struct kvt_driver_info *info, char *text) {
    CUuuid uuid;
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    CUresult error = d->api->cuDeviceGetUuid(&uuid, d->device);
    if (error != CUDA_SUCCESS) {
        return refused(d, "cuDeviceGetUuid", error, text);
    }
    error = d->api->cuMemGetInfo(&free_bytes, &total_bytes);
    if (error != CUDA_SUCCESS) {
        return refused(d, "cuMemGetInfo", error, text);
    }
    int node = -1; /* CUDA's word where the system has none */
    if (d->api->cuDeviceGetAttribute(&node, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, d->device) !=
        CUDA_SUCCESS) {
        node = -1;
    }
    *info = (struct kvt_driver_info){.name = "cuda",
                                     .granule_bytes = granule_bytes,
                                     .free_bytes = free_bytes,
                                     .extent_kind = kind,
                                     .features = KVT_FEATURE_CUDA,
                                     .post_behind = true,
                                     .pins_host = true,
                                     .numa_node = node,
                                     .can_sleep = false};
    memcpy(info->uuid, uuid.bytes, sizeof(info->uuid));
    return 0;
}

static int furnish(struct kvt_driver *d, const struct kvt_driver_config *c,
                   struct kvt_driver_info *info, char *text) {
    struct kvt_cuda_extents_config e = {.api = d->api, .budget_bytes = c->budget_bytes};
    int rc = check_budget(d, c->budget_bytes, text);
    if (rc == 0) {
        rc = choose_kind(d, c->extent_kind, &e.kind, text);
    }
    if (rc == 0) {
        rc = take_context(d, text);
    }
    if (rc == 0) {
        rc = granule(d, e.kind, &e.granule_bytes, text);
    }
    if (rc == 0) {
        rc = make_streams(d, text);
    }
    if (rc == 0) {
        rc = describe(d, e.kind, e.granule_bytes, info, text);
    }
    if (rc != 0) {
        return rc;
    }
    e.device = d->device;
    e.stream = d->control_stream;
    rc = kvt_cuda_extents_create(&e, &d->extents);
    if (rc == 0) {
        rc = kvt_host_map_create(c->host_bytes, &d->host);
    }
    if (rc == 0) {
        rc = kvt_pool_create(1, &d->pool_bell, &d->pool);
    }
    if (rc != 0) {
        snprintf(text, KVT_TEXT_BYTES, "device cuda: %s", kvt_error_text(rc));
    }
    return rc;
}

static int cuda_open(const struct kvt_driver_config *c, struct kvt_driver **out,
                     struct kvt_driver_info *info, char *text) {
    struct kvt_driver *d = calloc(1, sizeof(*d));
    if (!d) {
        snprintf(text, KVT_TEXT_BYTES, "device cuda: %s", kvt_error_text(KVT_ENOMEM));
        return -KVT_ENOMEM;
    }
    d->measure_bytes = c->budget_bytes < c->host_bytes ? c->budget_bytes : c->host_bytes;
    d->host_base = c->host_base;
    int rc = find_gpu(d, c->uuid, text);
    if (rc == 0) {
        rc = furnish(d, c, info, text);
    }
    if (rc != 0) {
        cuda_close(d);
        return rc;
    }
    leave(d); /* the caller is not one of the device's threads */
    *out = d;
    return 0;
}

/* ---- control thread -------------------------------------------------------------------------- */

static int cuda_measure(struct kvt_driver *d, struct kvt_link *out, char *text) {
    enter(d);
    return kvt_cuda_measure(d->api, d->control_stream, d->measure_bytes, out, text);
}

static int cuda_extent_create(struct kvt_driver *d, uint32_t extent, uint64_t bytes,
                              struct kvt_export *out, char *text) {
    enter(d);
    return kvt_cuda_extents_add(d->extents, extent, bytes, out, text);
}

static int cuda_extent_destroy(struct kvt_driver *d, uint32_t extent, char *text) {
    enter(d);
    return kvt_cuda_extents_remove(d->extents, extent, text);
}

static int cuda_page_added(struct kvt_driver *d, uint32_t session, struct kvt_control_page *page,
                           char *text) {
    if (session >= SESSIONS_MAX) {
        snprintf(text, KVT_TEXT_BYTES, "device cuda: session %u: there can be %d", session,
                 SESSIONS_MAX);
        return -KVT_EINVAL;
    }
    struct page *p = &d->pages[session];
    CUdeviceptr gpu = 0;
    enter(d);
    CUresult error =
        d->api->cuMemHostRegister(page, KVT_CONTROL_PAGE_BYTES,
                                  CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
    if (error != CUDA_SUCCESS) {
        return refused(d, "a control page cannot be registered: cuMemHostRegister", error, text);
    }
    error = d->api->cuMemHostGetDevicePointer(&gpu, page, 0);
    if (error != CUDA_SUCCESS) {
        (void)d->api->cuMemHostUnregister(page);
        return refused(d, "a control page cannot be mapped: cuMemHostGetDevicePointer", error,
                       text);
    }
    p->page = page;
    __atomic_store_n(&p->gpu, gpu, __ATOMIC_RELEASE);
    return 0;
}

static void cuda_page_removed(struct kvt_driver *d, uint32_t session) {
    KVT_ASSERT(session < SESSIONS_MAX);
    struct page *p = &d->pages[session];
    enter(d);
    __atomic_store_n(&p->gpu, 0, __ATOMIC_RELEASE);
    (void)d->api->cuMemHostUnregister(p->page);
    p->page = NULL;
}

/* ---- the host's threads ----------------------------------------------------------------------- */

static int cuda_host_added(struct kvt_driver *d, uint64_t offset, uint64_t bytes, char *text) {
    enter(d);
    return kvt_host_register(d->api, d->host, d->host_base, offset, bytes, text);
}

static int cuda_host_removed(struct kvt_driver *d, uint64_t offset, uint64_t bytes, char *text) {
    enter(d);
    return kvt_host_unregister(d->api, d->host, d->host_base, offset, bytes, text);
}

/* ---- copy thread ----------------------------------------------------------------------------- */

static int lost(struct kvt_driver *d, const char *call, CUresult error) {
    char reason[KVT_CUDA_TEXT_BYTES];
    snprintf(d->why, sizeof(d->why), "%s: %s", call, kvt_cuda_error(d->api, error, reason));
    return -KVT_EDEVICE;
}

static void cuda_explain(struct kvt_driver *d, char *text) {
    snprintf(text, KVT_TEXT_BYTES, "%s", d->why);
}

static bool is_on_gpu(const struct kvt_place *p) {
    return p->tier == KVT_TIER_GPU;
}

/* Bytes of a copy at `at` that need no border of registrations crossed; 0: not all of it is there. */
static uint64_t run_of(const struct kvt_driver *d, const struct kvt_copy *c, uint64_t at) {
    uint64_t bytes = c->bytes - at;
    if (!is_on_gpu(&c->source)) {
        bytes = kvt_host_map_run(d->host, c->source.offset + at, bytes);
    }
    if (!is_on_gpu(&c->target)) {
        bytes = kvt_host_map_run(d->host, c->target.offset + at, bytes);
    }
    return bytes;
}

static bool host_is_there(const struct kvt_driver *d, const struct kvt_copy *c) {
    uint64_t bytes = 1;
    for (uint64_t at = 0; at < c->bytes && bytes > 0; at += bytes) {
        bytes = run_of(d, c, at);
    }
    return bytes > 0;
}

static bool is_valid(const struct kvt_driver *d, const struct kvt_copy *c) {
    if (c->source.tier > KVT_TIER_HOST || c->target.tier > KVT_TIER_HOST || c->bytes == 0) {
        return false;
    }
    uint64_t apart = c->source.offset < c->target.offset ? c->target.offset - c->source.offset
                                                         : c->source.offset - c->target.offset;
    bool one_place = c->source.tier == c->target.tier &&
                     (!is_on_gpu(&c->source) || c->source.extent == c->target.extent);
    return !(one_place && apart < c->bytes) && host_is_there(d, c);
}

/* *address: of a place on the GPU. Undo: unpin. */
static bool pin(struct kvt_driver *d, const struct kvt_place *p, uint64_t bytes,
                CUdeviceptr *address) {
    if (!is_on_gpu(p)) {
        return true;
    }
    *address = kvt_cuda_extents_pin(d->extents, p->extent, p->offset, bytes);
    return *address != 0;
}

static void unpin(struct kvt_driver *d, const struct kvt_place *p) {
    if (is_on_gpu(p)) {
        kvt_cuda_extents_unpin(d->extents, p->extent);
    }
}

/* Host memory has the same address for the GPU: it was registered so. */
static CUresult enqueue(struct kvt_driver *d, uint32_t stream, const struct kvt_copy *c,
                        CUdeviceptr source, CUdeviceptr target) {
    CUdeviceptr host = (CUdeviceptr)(uintptr_t)d->host_base;
    CUdeviceptr from = is_on_gpu(&c->source) ? source : host + c->source.offset;
    CUdeviceptr to = is_on_gpu(&c->target) ? target : host + c->target.offset;
    CUresult error = CUDA_SUCCESS;
    uint64_t bytes;
    for (uint64_t at = 0; at < c->bytes && error == CUDA_SUCCESS; at += bytes) {
        bytes = run_of(d, c, at);
        error = kvt_cuda_stream_copy(&d->streams[stream], to + at, from + at, bytes);
    }
    return error;
}

static int cuda_copy(struct kvt_driver *d, uint32_t stream, const struct kvt_copy *c,
                     uint32_t tag) {
    KVT_ASSERT(tag < KVT_DRIVER_TAGS_MAX);
    KVT_ASSERT(stream < STREAMS);
    CUdeviceptr source = 0;
    CUdeviceptr target = 0;
    if (!is_valid(d, c) || !pin(d, &c->source, c->bytes, &source)) {
        return -KVT_EINVAL;
    }
    if (!pin(d, &c->target, c->bytes, &target)) {
        unpin(d, &c->source);
        return -KVT_EINVAL;
    }
    d->flights[tag] = (struct flight){.is_copy = true, .source = c->source, .target = c->target};
    if (!is_on_gpu(&c->source) && !is_on_gpu(&c->target)) {
        kvt_pool_submit(d->pool, tag, d->host_base + c->target.offset,
                        d->host_base + c->source.offset, c->bytes);
        return 0;
    }
    enter(d);
    CUresult error = enqueue(d, stream, c, source, target);
    if (error != CUDA_SUCCESS) {
        return lost(d, "a copy was refused", error);
    }
    kvt_cuda_stream_mark(&d->streams[stream], tag);
    return 0;
}

static int cuda_post(struct kvt_driver *d, uint32_t stream, uint32_t session, uint32_t slot,
                     uint64_t value, uint32_t tag) {
    KVT_ASSERT(tag < KVT_DRIVER_TAGS_MAX);
    KVT_ASSERT(stream < STREAMS);
    KVT_ASSERT(session < SESSIONS_MAX);
    KVT_ASSERT(slot < KVT_SLOTS_MAX);
    CUdeviceptr page = __atomic_load_n(&d->pages[session].gpu, __ATOMIC_ACQUIRE);
    if (page == 0) {
        return -KVT_ESTATE;
    }
    d->flights[tag].is_copy = false;
    enter(d);
    CUdeviceptr address = page + offsetof(struct kvt_control_page, ready) + slot * READY_STEP +
                          offsetof(struct kvt_counter, value);
    CUresult error = kvt_cuda_stream_post(&d->streams[stream], address, value, tag);
    return error == CUDA_SUCCESS ? 0 : lost(d, "cuStreamBatchMemOp", error);
}

/* Work is under way and nothing comes back: a GPU that has died would let us wait for ever. */
static int look_after(struct kvt_driver *d) {
    uint64_t now = now_ns();
    if (d->quiet_since_ns == 0) {
        d->quiet_since_ns = now;
    }
    if (now - d->quiet_since_ns < QUIET_NS) {
        return 0;
    }
    d->quiet_since_ns = now;
    enter(d);
    for (int i = 0; i < STREAMS; i++) {
        CUresult error = d->api->cuStreamQuery(d->streams[i].stream);
        if (error != CUDA_SUCCESS && error != CUDA_ERROR_NOT_READY) {
            return lost(d, "cuStreamQuery", error);
        }
    }
    return 0;
}

static int cuda_poll(struct kvt_driver *d, uint32_t *tags, bool *ok, uint32_t max) {
    bool busy = false;
    enter(d);
    for (int i = 0; i < STREAMS; i++) {
        CUresult error = kvt_cuda_stream_flush(&d->streams[i]);
        if (error != CUDA_SUCCESS) {
            return lost(d, "cuStreamWriteValue64", error);
        }
    }
    uint32_t count = kvt_pool_collect(d->pool, tags, max);
    for (int i = 0; i < STREAMS; i++) {
        count += kvt_cuda_stream_take(&d->streams[i], tags + count, max - count);
        busy |= kvt_cuda_stream_busy(&d->streams[i]);
    }
    for (uint32_t i = 0; i < count; i++) {
        struct flight *f = &d->flights[tags[i]];
        ok[i] = true;
        if (f->is_copy) {
            unpin(d, &f->source);
            unpin(d, &f->target);
        }
    }
    if (count > 0 || !busy) {
        d->quiet_since_ns = 0;
        return (int)count;
    }
    return look_after(d);
}

/* can_sleep is false, so nobody calls it; it is here for whoever takes the interface by its word. */
static void cuda_wait(struct kvt_driver *d, const struct kvt_counter *const *counters,
                      const uint32_t *seen, uint32_t count, uint32_t timeout_us) {
    (void)d;
    (void)counters;
    (void)seen;
    (void)count;
    struct timespec t = {.tv_nsec = (timeout_us < WAIT_US ? timeout_us : WAIT_US) * 1000L};
    nanosleep(&t, NULL);
}

static void cuda_wake(struct kvt_driver *d) {
    (void)d;
}

__attribute__((visibility("default"))) const struct kvt_driver_ops *kvt_driver_ops_get(void);

const struct kvt_driver_ops *kvt_driver_ops_get(void) {
    static const struct kvt_driver_ops ops = {
        .abi = KVT_DRIVER_ABI,
        .name = "cuda",
        .open = cuda_open,
        .close = cuda_close,
        .extent_create = cuda_extent_create,
        .extent_destroy = cuda_extent_destroy,
        .host_added = cuda_host_added,
        .host_removed = cuda_host_removed,
        .page_added = cuda_page_added,
        .page_removed = cuda_page_removed,
        .copy = cuda_copy,
        .post = cuda_post,
        .poll = cuda_poll,
        .wait = cuda_wait,
        .wake = cuda_wake,
        .measure = cuda_measure,
        .explain = cuda_explain,
    };
    return &ops;
}
