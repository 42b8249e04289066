/* Extents of the cuda device: GPU memory inside a budget, shared with another process as the fd of a
 * VMM allocation or as a CUDA IPC handle.
 *
 * The control thread adds and removes, the copy thread looks up. An extent with a copy in flight is
 * not removed: that is an invariant of the engine (it asks only when nothing is in flight), asserted
 * here.
 */
#ifndef KVT_DEVICE_CUDA_EXTENTS_H
#define KVT_DEVICE_CUDA_EXTENTS_H

#include "cuda/cuda_api.h"
#include "tiers/device/device.h"

struct kvt_cuda_extents;

struct kvt_cuda_extents_config {
    const struct kvt_cuda_api *api;
    CUdevice device;
    CUstream stream; /* for zeroing: nothing else is under way on it; borrowed */
    uint32_t kind;   /* enum kvt_extent_kind */
    uint64_t budget_bytes;
    uint64_t granule_bytes;
};

int kvt_cuda_extents_create(const struct kvt_cuda_extents_config *c, struct kvt_cuda_extents **out)
    __attribute__((warn_unused_result));
/* Frees the memory of all that are left; what an importer maps stays until it unmaps. */
void kvt_cuda_extents_free(struct kvt_cuda_extents *e);

/* Control thread, context current. Errors, with a sentence in text[KVT_TEXT_BYTES]: -KVT_EINVAL
 * (size), -KVT_EEXIST (an extent with these low 16 bits is there), -KVT_EQUOTA (budget, or the GPU
 * has no memory left), -KVT_EDEVICE. */
int kvt_cuda_extents_add(struct kvt_cuda_extents *e, uint32_t extent, uint64_t bytes,
                         struct kvt_export *out, char *text) __attribute__((warn_unused_result));
int kvt_cuda_extents_remove(struct kvt_cuda_extents *e, uint32_t extent, char *text)
    __attribute__((warn_unused_result));

/* Copy thread. The address of a range, which stays until it is unpinned; 0: no such extent, or not
 * inside it. */
CUdeviceptr kvt_cuda_extents_pin(struct kvt_cuda_extents *e, uint32_t extent, uint64_t offset,
                                 uint64_t bytes);
void kvt_cuda_extents_unpin(struct kvt_cuda_extents *e, uint32_t extent);

#endif
