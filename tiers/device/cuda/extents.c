/* Extents of the cuda device; see extents.h.
 *
 * Key and pins work as in ../cpu/extents.c: the copy thread pins first and then reads the key, the
 * control thread takes the key away first and then reads the pins, so an extent that goes away under
 * a copy is noticed by one of the two.
 *
 * A VMM allocation's handle is released once it is exported and mapped: the mapping keeps the
 * memory, and so do the exported fd and every import. What an importer still maps after
 * kvt_cuda_extents_remove is not free; the engine removes only what nobody maps.
 */
#include "tiers/device/cuda/extents.h"

#include "proto/errors.h"
#include "proto/limits.h"
#include "tiers/engine/assert.h"
#include "tiers/host/machine.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EXTENTS_MAX = 65536 };
#define KEY_LIVE (UINT64_C(1) << 32)

struct extent {
    uint64_t key;  /* atomic */
    uint32_t pins; /* atomic, written by the copy thread */
    CUdeviceptr address;
    uint64_t bytes;
};

struct kvt_cuda_extents {
    struct kvt_cuda_extents_config config;
    const struct kvt_cuda_api *api;
    uint64_t used_bytes; /* control thread */
    struct extent extents[EXTENTS_MAX];
};

int kvt_cuda_extents_create(const struct kvt_cuda_extents_config *c,
                            struct kvt_cuda_extents **out) {
    struct kvt_cuda_extents *e = calloc(1, sizeof(*e));
    if (!e) {
        return -KVT_ENOMEM;
    }
    e->config = *c;
    e->api = c->api;
    *out = e;
    return 0;
}

static struct extent *extent_of(struct kvt_cuda_extents *e, uint32_t extent) {
    return &e->extents[extent % EXTENTS_MAX];
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
static CUresult release(const struct kvt_cuda_extents *e, const struct extent *x) {
    if (e->config.kind == KVT_EXTENT_IPC) {
        return e->api->cuMemFree(x->address);
    }
    CUresult error = e->api->cuMemUnmap(x->address, x->bytes);
    CUresult freed = e->api->cuMemAddressFree(x->address, x->bytes);
    return error != CUDA_SUCCESS ? error : freed;
}

/* ---- add and remove -------------------------------------------------------------------------- */

static int check(const struct kvt_cuda_extents *e, const struct extent *x, uint32_t extent,
                 uint64_t bytes, char *text) {
    char size[KVT_SIZE_TEXT_BYTES];
    char left[KVT_SIZE_TEXT_BYTES];
    char budget[KVT_SIZE_TEXT_BYTES];
    if (bytes == 0 || bytes % e->config.granule_bytes != 0) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device cuda: extent %u of %llu bytes: the size must be a multiple of %llu",
                 extent, (unsigned long long)bytes, (unsigned long long)e->config.granule_bytes);
        return -KVT_EINVAL;
    }
    if (x->key != 0) {
        snprintf(text, KVT_TEXT_BYTES, "device cuda: extent %u: its place is taken by extent %u",
                 extent, (uint32_t)x->key);
        return -KVT_EEXIST;
    }
    if (bytes > e->config.budget_bytes - e->used_bytes) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device cuda: extent of %s wanted, %s left of the budget of %s",
                 kvt_size_text(bytes, size),
                 kvt_size_text(e->config.budget_bytes - e->used_bytes, left),
                 kvt_size_text(e->config.budget_bytes, budget));
        return -KVT_EQUOTA;
    }
    return 0;
}

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
    struct extent *x = extent_of(e, extent);
    struct kvt_export export = {.fd = -1};
    struct extent made = {.bytes = bytes};
    int rc = check(e, x, extent, bytes, text);
    if (rc != 0) {
        return rc;
    }
    rc = e->config.kind == KVT_EXTENT_IPC ? ipc_create(e, bytes, &made.address, &export, text)
                                          : vmm_create(e, bytes, &made.address, &export, text);
    if (rc != 0) {
        return rc;
    }
    rc = zero(e, made.address, bytes, text);
    if (rc != 0) {
        (void)release(e, &made);
        if (export.fd >= 0) {
            close(export.fd);
        }
        return rc;
    }
    x->address = made.address;
    x->bytes = bytes;
    e->used_bytes += bytes;
    __atomic_store_n(&x->key, KEY_LIVE + extent, __ATOMIC_SEQ_CST);
    *out = export;
    return 0;
}

int kvt_cuda_extents_remove(struct kvt_cuda_extents *e, uint32_t extent, char *text) {
    struct extent *x = extent_of(e, extent);
    if (x->key != KEY_LIVE + extent) {
        snprintf(text, KVT_TEXT_BYTES, "device cuda: extent %u: %s", extent,
                 kvt_error_text(KVT_ENOENT));
        return -KVT_ENOENT;
    }
    __atomic_store_n(&x->key, 0, __ATOMIC_SEQ_CST);
    KVT_ASSERT(__atomic_load_n(&x->pins, __ATOMIC_SEQ_CST) == 0);
    CUresult error = release(e, x);
    e->used_bytes -= x->bytes;
    return error == CUDA_SUCCESS ? 0 : failed(e, "giving it back", x->bytes, error, text);
}

void kvt_cuda_extents_free(struct kvt_cuda_extents *e) {
    if (!e) {
        return;
    }
    for (uint32_t i = 0; e->used_bytes > 0 && i < EXTENTS_MAX; i++) {
        struct extent *x = &e->extents[i];
        if (x->key != 0) {
            e->used_bytes -= x->bytes;
            (void)release(e, x);
        }
    }
    free(e);
}

/* ---- copy thread ----------------------------------------------------------------------------- */

CUdeviceptr kvt_cuda_extents_pin(struct kvt_cuda_extents *e, uint32_t extent, uint64_t offset,
                                 uint64_t bytes) {
    struct extent *x = extent_of(e, extent);
    __atomic_add_fetch(&x->pins, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&x->key, __ATOMIC_SEQ_CST) == KEY_LIVE + extent && offset <= x->bytes &&
        bytes <= x->bytes - offset) {
        return x->address + offset;
    }
    kvt_cuda_extents_unpin(e, extent);
    return 0;
}

void kvt_cuda_extents_unpin(struct kvt_cuda_extents *e, uint32_t extent) {
    __atomic_sub_fetch(&extent_of(e, extent)->pins, 1, __ATOMIC_SEQ_CST);
}
