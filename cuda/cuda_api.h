/* The CUDA driver API, opened at run time: the daemon's plug-in, the client library and GPU workers
 * share this table. Nothing here is linked with libcuda, so whatever includes it starts on a machine
 * without a driver and says why it cannot go on.
 *
 * Calls go through the table: api->cuMemAlloc(...). Names are those of cuda.h, which maps each to its
 * current version; the table's members and the symbols that are looked up are mapped alike.
 *
 * Thread: any. What a call does to the calling thread (current context, stalls) is CUDA's.
 */
#ifndef KVT_CUDA_CUDA_API_H
#define KVT_CUDA_CUDA_API_H

#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

#define KVT_CUDA_FUNCTIONS(X)         \
    X(cuInit)                         \
    X(cuGetErrorName)                 \
    X(cuGetErrorString)               \
    X(cuDeviceGetCount)               \
    X(cuDeviceGet)                    \
    X(cuDeviceGetName)                \
    X(cuDeviceGetUuid)                \
    X(cuDeviceGetAttribute)           \
    X(cuDeviceTotalMem)               \
    X(cuDevicePrimaryCtxSetFlags)     \
    X(cuDevicePrimaryCtxRetain)       \
    X(cuDevicePrimaryCtxRelease)      \
    X(cuCtxSetCurrent)                \
    X(cuCtxGetCurrent)                \
    X(cuCtxPushCurrent)               \
    X(cuCtxPopCurrent)                \
    X(cuCtxGetDevice)                 \
    X(cuMemGetInfo)                   \
    X(cuMemAlloc)                     \
    X(cuMemFree)                      \
    X(cuMemHostAlloc)                 \
    X(cuMemFreeHost)                  \
    X(cuMemHostRegister)              \
    X(cuMemHostUnregister)            \
    X(cuMemHostGetDevicePointer)      \
    X(cuMemcpyAsync)                  \
    X(cuMemcpyHtoDAsync)              \
    X(cuMemcpyDtoDAsync)              \
    X(cuMemsetD8Async)                \
    X(cuIpcGetMemHandle)              \
    X(cuIpcOpenMemHandle)             \
    X(cuIpcCloseMemHandle)            \
    X(cuMemGetAllocationGranularity)  \
    X(cuMemCreate)                    \
    X(cuMemRelease)                   \
    X(cuMemExportToShareableHandle)   \
    X(cuMemImportFromShareableHandle) \
    X(cuMemAddressReserve)            \
    X(cuMemAddressFree)               \
    X(cuMemMap)                       \
    X(cuMemUnmap)                     \
    X(cuMemSetAccess)                 \
    X(cuStreamCreate)                 \
    X(cuStreamDestroy)                \
    X(cuStreamGetCtx)                 \
    X(cuStreamQuery)                  \
    X(cuStreamSynchronize)            \
    X(cuStreamWaitValue64)            \
    X(cuStreamWriteValue64)           \
    X(cuStreamBatchMemOp)             \
    X(cuEventCreate)                  \
    X(cuEventDestroy)                 \
    X(cuEventRecord)                  \
    X(cuEventElapsedTime)             \
    X(cuModuleLoadData)               \
    X(cuModuleUnload)                 \
    X(cuModuleGetFunction)            \
    X(cuLaunchKernel)

/* Of drivers that have it (R580, and built with the headers of CUDA 13); NULL: not there. */
#if CUDA_VERSION >= 13000
#define KVT_CUDA_OPTIONAL(X) X(cuMemcpyBatchAsync)
#else
#define KVT_CUDA_OPTIONAL(X)
#endif

struct kvt_cuda_api {
#define KVT_CUDA_MEMBER(f) __typeof__(&f) f;
    KVT_CUDA_FUNCTIONS(KVT_CUDA_MEMBER)
    KVT_CUDA_OPTIONAL(KVT_CUDA_MEMBER)
#undef KVT_CUDA_MEMBER
};

#define KVT_CUDA_TEXT_BYTES 192 /* of every text that this module writes, NUL included */

/* Opens libcuda.so.1 and initialises it, once a process; what failed then fails again. NULL: *text
 * has the reason and what to do about it. fork(2) afterwards leaves the child without CUDA, as
 * always; exec is fine. */
const struct kvt_cuda_api *kvt_cuda_open(char text[KVT_CUDA_TEXT_BYTES]);

/* "CUDA_ERROR_INVALID_VALUE (invalid argument)" */
const char *kvt_cuda_error(const struct kvt_cuda_api *api, CUresult error,
                           char text[KVT_CUDA_TEXT_BYTES]);

/* The GPU with this UUID (16 bytes); NULL or all zero: the first. CUDA_SUCCESS, or
 * CUDA_ERROR_INVALID_DEVICE with a text that names the GPUs that there are. */
CUresult kvt_cuda_find(const struct kvt_cuda_api *api, const uint8_t *uuid, CUdevice *out,
                       char text[KVT_CUDA_TEXT_BYTES]);

/* Whether streams of the GPU can wait for and write 64-bit values, on which everything is built:
 * CUDA_SUCCESS, or CUDA_ERROR_NOT_SUPPORTED with a text. */
CUresult kvt_cuda_check_stream_values(const struct kvt_cuda_api *api, CUdevice device,
                                      char text[KVT_CUDA_TEXT_BYTES]);

/* "GPU-12345678-..." */
#define KVT_CUDA_UUID_TEXT_BYTES 41
void kvt_cuda_uuid_text(const uint8_t uuid[16], char text[KVT_CUDA_UUID_TEXT_BYTES]);

#endif
