/* The worker's GPU. Everything is enqueued on the stream that the worker named at attach, in the
 * order of the calls; see device.h and kvtier.h, "On a GPU".
 *
 * The control page is registered with the worker's own context, so that its stream can wait for
 * `ready` and write `done` and `step`. It is unregistered only when the stream is idle: while one
 * waits for a counter, cuMemHostUnregister would stall.
 */
#include "client/lib/device.h"

#include "client/kvtier.h"
#include "proto/attach.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if KVT_WITH_CUDA

#include "cuda/cuda_api.h"

struct kvt_client_gpu {
    const struct kvt_cuda_api *api;
    CUstream stream; /* the worker's; borrowed */
    CUcontext context;
    CUdevice device;
    uint32_t extent_kind; /* of every extent of the session: the first one told */
    struct kvt_control_page *page;
    CUdeviceptr page_gpu; /* the same, as the GPU sees it; 0: not registered */
    char why[KVT_CUDA_TEXT_BYTES + 64];
};

/* The worker's context is usually current on its own thread, and never on the library's. */
static bool enter(const struct kvt_client_gpu *g) {
    CUcontext now = NULL;
    if (g->api->cuCtxGetCurrent(&now) == CUDA_SUCCESS && now == g->context) {
        return false;
    }
    return g->api->cuCtxPushCurrent(g->context) == CUDA_SUCCESS;
}

static void leave(const struct kvt_client_gpu *g, bool entered) {
    CUcontext before;
    if (entered) {
        (void)g->api->cuCtxPopCurrent(&before);
    }
}

static int failed(struct kvt_client_gpu *g, const char *call, CUresult error) {
    char text[KVT_CUDA_TEXT_BYTES];
    (void)snprintf(g->why, sizeof g->why, "%s: %s", call, kvt_cuda_error(g->api, error, text));
    return -KVT_EDEVICE;
}

/* ---- open and close --------------------------------------------------------------------------- */

static int refuse(struct kvt_client_gpu *g, const char *call, CUresult error, char *text) {
    (void)failed(g, call, error);
    (void)snprintf(text, KVT_TEXT_BYTES, "%s", g->why);
    return -KVT_EDEVICE;
}

/* The stream's context and GPU. */
static int look_at_stream(struct kvt_client_gpu *g, char *text) {
    CUresult error = g->api->cuStreamGetCtx(g->stream, &g->context);
    if (error != CUDA_SUCCESS || g->context == NULL) {
        char reason[KVT_CUDA_TEXT_BYTES];
        (void)snprintf(text, KVT_TEXT_BYTES,
                       "`stream` belongs to no context: %s; give a CUstream, or make a context "
                       "current for the default stream",
                       kvt_cuda_error(g->api, error, reason));
        return -KVT_EINVAL;
    }
    bool entered = enter(g);
    error = g->api->cuCtxGetDevice(&g->device);
    leave(g, entered);
    return error == CUDA_SUCCESS ? 0 : refuse(g, "cuCtxGetDevice", error, text);
}

/* What the worker names, if it names something, is the stream's GPU. */
static int check_uuid(struct kvt_client_gpu *g, uint8_t *uuid, char *text) {
    static const uint8_t any[KVT_UUID_BYTES];
    CUuuid own;
    CUresult error = g->api->cuDeviceGetUuid(&own, g->device);
    if (error != CUDA_SUCCESS) {
        return refuse(g, "cuDeviceGetUuid", error, text);
    }
    if (memcmp(uuid, any, sizeof any) != 0 && memcmp(uuid, own.bytes, KVT_UUID_BYTES) != 0) {
        char name[KVT_CUDA_UUID_TEXT_BYTES];
        kvt_cuda_uuid_text((const uint8_t *)own.bytes, name);
        (void)snprintf(text, KVT_TEXT_BYTES,
                       "the stream's GPU is %s, another one is named; leave `device` NULL", name);
        return -KVT_EINVAL;
    }
    memcpy(uuid, own.bytes, KVT_UUID_BYTES);
    return 0;
}

static int cuda_open(void *stream, uint8_t *uuid, struct kvt_client_gpu **out, char *text) {
    char why[KVT_CUDA_TEXT_BYTES] = "";
    struct kvt_client_gpu *g = calloc(1, sizeof *g);
    int rc = -KVT_ENOTSUP;
    if (g == NULL) {
        (void)snprintf(text, KVT_TEXT_BYTES, "out of memory");
        return -KVT_ENOMEM;
    }
    g->stream = stream;
    g->api = kvt_cuda_open(why);
    if (g->api == NULL) {
        (void)snprintf(text, KVT_TEXT_BYTES, "%s", why);
        goto fail;
    }
    rc = look_at_stream(g, text);
    if (rc == 0) {
        rc = check_uuid(g, uuid, text);
    }
    if (rc == 0 && kvt_cuda_check_stream_values(g->api, g->device, why) != CUDA_SUCCESS) {
        (void)snprintf(text, KVT_TEXT_BYTES, "%s", why);
        rc = -KVT_ENOTSUP;
    }
    if (rc != 0) {
        goto fail;
    }
    *out = g;
    return 0;

fail:
    free(g);
    return rc;
}

static int cuda_page(struct kvt_client_gpu *g, struct kvt_control_page *page, char *text) {
    const char *call = "cuMemHostRegister";
    bool entered = enter(g);
    CUresult error =
        g->api->cuMemHostRegister(page, KVT_CONTROL_PAGE_BYTES,
                                  CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
    if (error == CUDA_SUCCESS) {
        call = "cuMemHostGetDevicePointer";
        error = g->api->cuMemHostGetDevicePointer(&g->page_gpu, page, 0);
        if (error != CUDA_SUCCESS) {
            g->page_gpu = 0;
            (void)g->api->cuMemHostUnregister(page);
        }
    }
    leave(g, entered);
    g->page = page;
    return error == CUDA_SUCCESS ? 0 : refuse(g, call, error, text);
}

static void cuda_close(struct kvt_client_gpu *g) {
    if (g == NULL) {
        return;
    }
    if (g->page_gpu != 0) {
        bool entered = enter(g);
        (void)g->api->cuMemHostUnregister(g->page);
        leave(g, entered);
    }
    free(g);
}

/* ---- extents ---------------------------------------------------------------------------------- */

static CUresult map_allocation(const struct kvt_client_gpu *g, CUmemGenericAllocationHandle handle,
                               uint64_t bytes, CUdeviceptr *address) {
    CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = g->device},
                              .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUdeviceptr at = *address;
    CUresult error =
        at == 0 ? g->api->cuMemAddressReserve(&at, bytes, 0, 0, 0) : (CUresult)CUDA_SUCCESS;
    if (error != CUDA_SUCCESS) {
        return error;
    }
    error = g->api->cuMemMap(at, bytes, 0, handle, 0);
    if (error == CUDA_SUCCESS) {
        error = g->api->cuMemSetAccess(at, bytes, &access, 1);
        if (error != CUDA_SUCCESS) {
            (void)g->api->cuMemUnmap(at, bytes);
        }
    }
    if (error != CUDA_SUCCESS && *address == 0) {
        (void)g->api->cuMemAddressFree(at, bytes);
    }
    *address = error == CUDA_SUCCESS ? at : *address;
    return error;
}

/* The mapping keeps the memory: neither the fd nor the handle is needed any more. */
static CUresult map_fd(const struct kvt_client_gpu *g, int fd, uint64_t bytes,
                       CUdeviceptr *address) {
    CUmemGenericAllocationHandle handle;
    CUresult error =
        g->api->cuMemImportFromShareableHandle(&handle, (void *)(uintptr_t)fd,
                                               CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (error == CUDA_SUCCESS) {
        error = map_allocation(g, handle, bytes, address);
        (void)g->api->cuMemRelease(handle);
    }
    return error;
}

static CUresult map_ipc(const struct kvt_client_gpu *g, const uint8_t *bytes,
                        CUdeviceptr *address) {
    CUipcMemHandle handle;
    memcpy(&handle, bytes, sizeof handle);
    return g->api->cuIpcOpenMemHandle(address, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
}

static int cuda_map(struct kvt_client_gpu *g, const struct kvt_client_import *import,
                    void **address) {
    CUdeviceptr p = (CUdeviceptr)(uintptr_t)*address;
    CUresult error = CUDA_ERROR_INVALID_VALUE;
    if (g->extent_kind != 0 && g->extent_kind != import->kind) {
        return -KVT_EPROTO; /* WELCOME names one kind for all */
    }
    bool entered = enter(g);
    if (import->kind == KVT_EXTENT_FD) {
        error = map_fd(g, import->fd, import->bytes, &p);
    } else if (import->kind == KVT_EXTENT_IPC) {
        error = map_ipc(g, import->handle, &p);
    }
    leave(g, entered);
    if (error != CUDA_SUCCESS) {
        return failed(g, "an extent cannot be imported", error);
    }
    g->extent_kind = import->kind;
    *address = (void *)(uintptr_t)p;
    return 0;
}

static void cuda_unmap(struct kvt_client_gpu *g, void *address, uint64_t bytes) {
    CUdeviceptr p = (CUdeviceptr)(uintptr_t)address;
    bool entered = enter(g);
    if (g->extent_kind == KVT_EXTENT_IPC) {
        (void)g->api->cuIpcCloseMemHandle(p);
    } else if (g->api->cuMemUnmap(p, bytes) == CUDA_SUCCESS) {
        (void)g->api->cuMemAddressFree(p, bytes);
    }
    leave(g, entered);
}

static int cuda_vacate(struct kvt_client_gpu *g, void *address, uint64_t bytes) {
    bool entered = enter(g);
    CUresult error = g->extent_kind == KVT_EXTENT_FD
                         ? g->api->cuMemUnmap((CUdeviceptr)(uintptr_t)address, bytes)
                         : CUDA_ERROR_INVALID_VALUE;
    leave(g, entered);
    return error == CUDA_SUCCESS ? 0 : failed(g, "cuMemUnmap", error);
}

static void cuda_unreserve(struct kvt_client_gpu *g, void *address, uint64_t bytes) {
    bool entered = enter(g);
    (void)g->api->cuMemAddressFree((CUdeviceptr)(uintptr_t)address, bytes);
    leave(g, entered);
}

/* ---- the stream ------------------------------------------------------------------------------- */

static int cuda_move(struct kvt_client_gpu *g, void *target, const void *source, uint64_t bytes) {
    bool entered = enter(g);
    CUresult error = g->api->cuMemcpyDtoDAsync((CUdeviceptr)(uintptr_t)target,
                                               (CUdeviceptr)(uintptr_t)source, bytes, g->stream);
    leave(g, entered);
    return error == CUDA_SUCCESS ? 0 : failed(g, "cuMemcpyDtoDAsync", error);
}

static CUdeviceptr on_gpu(const struct kvt_client_gpu *g, const struct kvt_counter *c) {
    return g->page_gpu + (uint64_t)((const char *)&c->value - (const char *)g->page);
}

static int cuda_wait(struct kvt_client_gpu *g, struct kvt_counter *c, uint64_t value,
                     struct kvt_client_spin *spin, int (*stop)(void *), void *argument) {
    (void)spin;
    int rc = stop(argument);
    if (rc != 0) {
        return rc;
    }
    bool entered = enter(g);
    CUresult error =
        g->api->cuStreamWaitValue64(g->stream, on_gpu(g, c), value, CU_STREAM_WAIT_VALUE_GEQ);
    leave(g, entered);
    return error == CUDA_SUCCESS ? 0 : failed(g, "cuStreamWaitValue64", error);
}

static int cuda_post(struct kvt_client_gpu *g, struct kvt_counter *c, uint64_t value) {
    bool entered = enter(g);
    CUresult error =
        g->api->cuStreamWriteValue64(g->stream, on_gpu(g, c), value, CU_STREAM_WRITE_VALUE_DEFAULT);
    leave(g, entered);
    return error == CUDA_SUCCESS ? 0 : failed(g, "cuStreamWriteValue64", error);
}

static bool cuda_busy(struct kvt_client_gpu *g) {
    bool entered = enter(g);
    CUresult error = g->api->cuStreamQuery(g->stream);
    leave(g, entered);
    return error == CUDA_ERROR_NOT_READY; /* a GPU that failed does nothing any more */
}

static bool cuda_passed(struct kvt_client_gpu *g, const struct kvt_counter *c, uint64_t value) {
    uint64_t now = kvt_client_counter_read(c);
    /* Poison says nothing of the stream; nor do posts of a GPU that failed. */
    if (now < KVT_POISON && kvt_counter_reached(now, value)) {
        return true;
    }
    return !cuda_busy(g);
}

static void cuda_drain(struct kvt_client_gpu *g) {
    bool entered = enter(g);
    (void)g->api->cuStreamSynchronize(g->stream);
    leave(g, entered);
}

static const char *cuda_why(const struct kvt_client_gpu *g) {
    return g->why;
}

#else

static int cuda_open(void *stream, uint8_t *uuid, struct kvt_client_gpu **out, char *text) {
    (void)stream;
    (void)uuid;
    (void)out;
    (void)snprintf(text, KVT_TEXT_BYTES,
                   "this libkvtier was built without CUDA; install nvcc and cuda.h and build it "
                   "again");
    return -KVT_ENOTSUP;
}

static void cuda_close(struct kvt_client_gpu *g) {
    (void)g;
}

#endif

const struct kvt_client_device_ops kvt_client_device_cuda = {
    .name = "cuda",
    .extent_kind = 0, /* both */
    .features = KVT_FEATURE_CUDA | KVT_FEATURE_KEEP_ADDRESS,
    .open = cuda_open,
    .close = cuda_close,
#if KVT_WITH_CUDA
    .page = cuda_page,
    .map = cuda_map,
    .unmap = cuda_unmap,
    .vacate = cuda_vacate,
    .unreserve = cuda_unreserve,
    .move = cuda_move,
    .wait = cuda_wait,
    .post = cuda_post,
    .store = cuda_post, /* its writes wake nobody anyway */
    .busy = cuda_busy,
    .passed = cuda_passed,
    .drain = cuda_drain,
    .why = cuda_why,
#endif
};
