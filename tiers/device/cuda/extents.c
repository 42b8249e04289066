/* Extents of the cuda device; see extents.h.
 *
 * A VMM allocation's handle is released once it is exported and mapped: the mapping keeps the
 * memory, and so do the exported fd and every import. What an importer still maps after
 * kvt_cuda_extents_remove is not free; the engine removes only what nobody maps.
 */
#include "tiers/device/cuda/extents.h"

#include "proto/errors.h"
#include "proto/limits.h"
#include "tiers/device/extent_table.h"
#include "tiers/host/machine.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct kvt_cuda_extents {
    struct kvt_cuda_extents_config config;
    const struct kvt_cuda_api *api;
    struct kvt_extent_table *table; /* addresses are the GPU's */
};

int kvt_cuda_extents_create(const struct kvt_cuda_extents_config *c,
                            struct kvt_cuda_extents **out) {
    struct kvt_extent_table_config t = {
        .what = "device cuda", .budget_bytes = c->budget_bytes, .granule_bytes = c->granule_bytes};
    struct kvt_cuda_extents *e = calloc(1, sizeof(*e));
    if (!e || kvt_extent_table_create(&t, &e->table) != 0) {
        free(e);
        return -KVT_ENOMEM;
    }
    e->config = *c;
    e->api = c->api;
    *out = e;
    return 0;
}

/* Writes the sentence and returns the code. Of memory that is not there: EQUOTA, which the engine
 * answers by making room. */
static int failed(const struct kvt_cuda_extents *e, const char *call, uint64_t bytes,
                  CUresult error, char *text) {
    char reason[KVT_CUDA_TEXT_BYTES];
    char size[KVT_SIZE_TEXT_BYTES];
    char left[KVT_SIZE_TEXT_BYTES];
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    if (error == CUDA_ERROR_OUT_OF_MEMORY) {
        (void)e->api->cuMemGetInfo(&free_bytes, &total_bytes);
        snprintf(text, KVT_TEXT_BYTES,
                 "device cuda: extent of %s wanted, the GPU has %s free, less than the budget "
                 "promises: other processes use it; lower [device] budget or stop them",
                 kvt_size_text(bytes, size), kvt_size_text(free_bytes, left));
        return -KVT_EQUOTA;
    }
    snprintf(text, KVT_TEXT_BYTES, "device cuda: extent of %s: %s: %s", kvt_size_text(bytes, size),
             call, kvt_cuda_error(e->api, error, reason));
    return -KVT_EDEVICE;
}

/* ---- the two kinds --------------------------------------------------------------------------- */

static void vmm_unmap(const struct kvt_cuda_extents *e, CUdeviceptr address, uint64_t bytes) {
    (void)e->api->cuMemUnmap(address, bytes);
    (void)e->api->cuMemAddressFree(address, bytes);
}

static int vmm_map(const struct kvt_cuda_extents *e, CUmemGenericAllocationHandle handle,
                   uint64_t bytes, CUdeviceptr *out, char *text) {
    CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE,
                                           .id = e->config.device},
                              .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUdeviceptr address = 0;
    const char *call = "cuMemAddressReserve";
    CUresult error = e->api->cuMemAddressReserve(&address, bytes, 0, 0, 0);
    if (error != CUDA_SUCCESS) {
        return failed(e, call, bytes, error, text);
    }
    call = "cuMemMap";
    error = e->api->cuMemMap(address, bytes, 0, handle, 0);
    if (error != CUDA_SUCCESS) {
        (void)e->api->cuMemAddressFree(address, bytes);
        return failed(e, call, bytes, error, text);
    }
    call = "cuMemSetAccess";
    error = e->api->cuMemSetAccess(address, bytes, &access, 1);
    if (error != CUDA_SUCCESS) {
        vmm_unmap(e, address, bytes);
        return failed(e, call, bytes, error, text);
    }
    *out = address;
    return 0;
}

static int vmm_create(const struct kvt_cuda_extents *e, uint64_t bytes, CUdeviceptr *address,
                      struct kvt_export *out, char *text) {
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE,
                                             .id = e->config.device}};
    CUmemGenericAllocationHandle handle;
    int fd = -1;
    CUresult error = e->api->cuMemCreate(&handle, bytes, &prop, 0);
    if (error != CUDA_SUCCESS) {
        return failed(e, "cuMemCreate", bytes, error, text);
    }
    int rc = vmm_map(e, handle, bytes, address, text);
    if (rc == 0) {
        error = e->api->cuMemExportToShareableHandle(&fd, handle,
                                                     CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
        if (error != CUDA_SUCCESS) {
            vmm_unmap(e, *address, bytes);
            rc = failed(e, "cuMemExportToShareableHandle", bytes, error, text);
        }
    }
    (void)e->api->cuMemRelease(handle);
    if (rc == 0) {
        (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
        *out = (struct kvt_export){.kind = KVT_EXTENT_FD, .fd = fd};
    }
    return rc;
}

static int ipc_create(const struct kvt_cuda_extents *e, uint64_t bytes, CUdeviceptr *address,
                      struct kvt_export *out, char *text) {
    CUipcMemHandle handle;
    struct kvt_export export = {.kind = KVT_EXTENT_IPC, .fd = -1};
    static_assert(sizeof(handle) == sizeof(export.handle), "an IPC handle fits its field");
    CUresult error = e->api->cuMemAlloc(address, bytes);
    if (error != CUDA_SUCCESS) {
        return failed(e, "cuMemAlloc", bytes, error, text);
    }
    error = e->api->cuIpcGetMemHandle(&handle, *address);
    if (error != CUDA_SUCCESS) {
        (void)e->api->cuMemFree(*address);
        return failed(e, "cuIpcGetMemHandle", bytes, error, text);
    }
    memcpy(export.handle, &handle, sizeof(handle));
    *out = export;
    return 0;
}

/* 0, or what failed. */
static CUresult release(const struct kvt_cuda_extents *e, CUdeviceptr address, uint64_t bytes) {
    if (e->config.kind == KVT_EXTENT_IPC) {
        return e->api->cuMemFree(address);
    }
    CUresult error = e->api->cuMemUnmap(address, bytes);
    CUresult freed = e->api->cuMemAddressFree(address, bytes);
    return error != CUDA_SUCCESS ? error : freed;
}

/* ---- add and remove -------------------------------------------------------------------------- */

/* Before anybody else can see it: it may hold another tenant's bytes. */
static int zero(const struct kvt_cuda_extents *e, CUdeviceptr address, uint64_t bytes, char *text) {
    CUresult error = e->api->cuMemsetD8Async(address, 0, bytes, e->config.stream);
    if (error == CUDA_SUCCESS) {
        error = e->api->cuStreamSynchronize(e->config.stream);
    }
    return error == CUDA_SUCCESS ? 0 : failed(e, "zeroing", bytes, error, text);
}

int kvt_cuda_extents_add(struct kvt_cuda_extents *e, uint32_t extent, uint64_t bytes,
                         struct kvt_export *out, char *text) {
    struct kvt_export export = {.fd = -1};
    CUdeviceptr address = 0;
    int rc = kvt_extent_table_check(e->table, extent, bytes, text);
    if (rc != 0) {
        return rc;
    }
    rc = e->config.kind == KVT_EXTENT_IPC ? ipc_create(e, bytes, &address, &export, text)
                                          : vmm_create(e, bytes, &address, &export, text);
    if (rc != 0) {
        return rc;
    }
    rc = zero(e, address, bytes, text);
    if (rc != 0) {
        (void)release(e, address, bytes);
        if (export.fd >= 0) {
            close(export.fd);
        }
        return rc;
    }
    kvt_extent_table_put(e->table, extent, address, bytes);
    *out = export;
    return 0;
}

int kvt_cuda_extents_remove(struct kvt_cuda_extents *e, uint32_t extent, char *text) {
    uint64_t address;
    uint64_t bytes;
    int rc = kvt_extent_table_take(e->table, extent, &address, &bytes, text);
    if (rc != 0) {
        return rc;
    }
    CUresult error = release(e, address, bytes);
    return error == CUDA_SUCCESS ? 0 : failed(e, "giving it back", bytes, error, text);
}

void kvt_cuda_extents_free(struct kvt_cuda_extents *e) {
    uint64_t address;
    uint64_t bytes;
    if (!e) {
        return;
    }
    while (kvt_extent_table_take_any(e->table, &address, &bytes) == 0) {
        (void)release(e, address, bytes);
    }
    kvt_extent_table_free(e->table);
    free(e);
}

/* ---- copy thread ----------------------------------------------------------------------------- */

CUdeviceptr kvt_cuda_extents_pin(struct kvt_cuda_extents *e, uint32_t extent, uint64_t offset,
                                 uint64_t bytes) {
    return kvt_extent_table_pin(e->table, extent, offset, bytes);
}

void kvt_cuda_extents_unpin(struct kvt_cuda_extents *e, uint32_t extent) {
    kvt_extent_table_unpin(e->table, extent);
}
