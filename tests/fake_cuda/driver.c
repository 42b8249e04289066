/* A libcuda.so.1 without a GPU, so that the cuda plug-in, libkvtier's cuda device and kvtier-synth
 * run where there is none: put its folder into LD_LIBRARY_PATH. Device memory is a memfd, a stream is
 * a thread, kernels are C functions found by their names.
 *
 * It copies the properties that the code must get right:
 *   - a stream does things in its order, whatever the caller does meanwhile
 *   - a copy between the host and the GPU that crosses the border of two registrations is refused
 *   - host memory that streams wait on or write to must be registered
 *   - while any stream of the process waits for a counter, cuMemFree, cuMemHostUnregister,
 *     cuIpcCloseMemHandle and a kernel's first launch stall the calling thread
 *   - about 1,020 operations fit behind a wait; then the submitting call waits
 *   - an import keeps the memory; an IPC handle cannot be opened by the process that made it
 *   - fd imports have a size, and mapping more of it fails
 * Every error is what the real one would answer; misuse that the real one leaves undefined aborts.
 *
 * FAKE_CUDA_MEMORY: bytes of each GPU (1 GiB). FAKE_CUDA_TAKEN: of these, by other processes (0). FAKE_CUDA_GPUS: how many (1; their UUIDs are 16 times
 * 0xa0 + index). FAKE_CUDA_FAIL_AFTER: the GPU is lost after so many copies. FAKE_CUDA_NO_VALUES: no
 * stream memory operations. FAKE_CUDA_GIB_S: speed of a copy. FAKE_CUDA_PINNED: bytes of host memory
 * that can be registered. FAKE_CUDA_NODE: the NUMA node near the GPUs (-1).
 */
#include "tests/fake_cuda/fake_cuda.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { GPUS_MAX = 8, RANGES_MAX = 65536, GRANULE = 2 << 20 };

void fake_must(bool holds, const char *what) {
    if (!holds) {
        (void)fprintf(stderr, "fake cuda: %s\n", what);
        abort();
    }
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
uint32_t fake_waiting;
bool fake_lost;

uint64_t fake_setting(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text != NULL ? strtoull(text, NULL, 0) : otherwise;
}

void fake_pause_us(long us) {
    struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000};
    (void)nanosleep(&t, NULL);
}

void fake_stall(void) {
    while (__atomic_load_n(&fake_waiting, __ATOMIC_ACQUIRE) > 0) {
        fake_pause_us(20);
    }
}

/* ---- GPUs and contexts ------------------------------------------------------------------------- */

struct CUctx_st {
    int device;
    uint32_t retained;
};
static struct CUctx_st contexts[GPUS_MAX];
static __thread CUcontext stack[8];
static __thread int depth;

static int gpus(void) {
    return (int)fake_setting("FAKE_CUDA_GPUS", 1);
}

CUresult fake_here(void) {
    if (__atomic_load_n(&fake_lost, __ATOMIC_ACQUIRE)) {
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    return depth > 0 && stack[depth - 1] != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUcontext fake_context(void) {
    return stack[depth - 1];
}

EXPORT CUresult cuInit(unsigned int flags) {
    (void)flags;
    return gpus() > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_FAKE";
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    (void)error;
    *text = "as the fake driver says";
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    *count = gpus();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return ordinal < gpus() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    (void)snprintf(name, (size_t)length, "Fake GPU %d", device);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    memset(uuid, 0xa0 + device, sizeof *uuid);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    *value = 1;
    if (attribute == CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS) {
        *value = getenv("FAKE_CUDA_NO_VALUES") == NULL;
    } else if (attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) {
        *value = 2;
    } else if (attribute == CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID) {
        *value = (int)fake_setting("FAKE_CUDA_NODE", UINT64_MAX);
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    (void)device;
    *bytes = fake_setting("FAKE_CUDA_MEMORY", 1u << 30);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxSetFlags(CUdevice device, unsigned int flags) {
    (void)device;
    (void)flags;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    contexts[device].device = device;
    contexts[device].retained++;
    *context = &contexts[device];
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    fake_must(contexts[device].retained-- > 0, "a context is released too often");
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    if (depth == 0) {
        depth = 1;
    }
    stack[depth - 1] = context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = depth > 0 ? stack[depth - 1] : NULL;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent(CUcontext context) {
    fake_must(depth < 8, "contexts are pushed and not popped");
    stack[depth++] = context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent(CUcontext *context) {
    fake_must(depth > 0, "a context is popped that was not pushed");
    *context = stack[--depth];
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    NEED_CONTEXT();
    *device = stack[depth - 1]->device;
    return CUDA_SUCCESS;
}

/* ---- memory ------------------------------------------------------------------------------------ */

/* What addresses are: a GPU's, or the host's and pinned. */
struct range {
    uint8_t *base; /* NULL: free entry */
    uint64_t bytes;
    int fd; /* of cuMemAlloc */
    bool pinned;
    bool imported;
    bool charged; /* a VMM allocation of this process */
};
static struct range ranges[RANGES_MAX];
static uint32_t ranges_top;
static uint64_t used_bytes;       /* by this process */
static uint64_t registered_bytes; /* lock */

static uint64_t taken_bytes(void) {
    return fake_setting("FAKE_CUDA_TAKEN", 0);
}

static struct range *find(uint64_t address) {
    for (uint32_t i = 0; i < ranges_top; i++) {
        struct range *r = &ranges[i];
        if (r->base != NULL && address >= (uintptr_t)r->base &&
            address < (uintptr_t)r->base + r->bytes) {
            return r;
        }
    }
    return NULL;
}

static void add(struct range r) {
    for (uint32_t i = 0; i < RANGES_MAX; i++) {
        if (ranges[i].base == NULL) {
            ranges[i] = r;
            ranges_top = i >= ranges_top ? i + 1 : ranges_top;
            return;
        }
    }
    fake_must(false, "too many ranges");
}

bool fake_inside(uint64_t address, uint64_t bytes, bool pinned) {
    (void)pthread_mutex_lock(&lock);
    const struct range *r = find(address);
    bool ok = r != NULL && r->pinned == pinned && address + bytes <= (uintptr_t)r->base + r->bytes;
    (void)pthread_mutex_unlock(&lock);
    return ok;
}

bool fake_host_is_fine(const void *host, size_t bytes) {
    uintptr_t first = (uintptr_t)host;
    (void)pthread_mutex_lock(&lock);
    const struct range *a = find(first);
    const struct range *b = find(first + bytes - 1);
    (void)pthread_mutex_unlock(&lock);
    return a == b && (a == NULL || a->pinned);
}

static bool take(uint64_t base, struct range *out) {
    (void)pthread_mutex_lock(&lock);
    struct range *r = find(base);
    bool ok = r != NULL && (uintptr_t)r->base == base;
    if (ok) {
        *out = *r;
        r->base = NULL;
    }
    (void)pthread_mutex_unlock(&lock);
    return ok;
}

static void add_locked(struct range r) {
    (void)pthread_mutex_lock(&lock);
    add(r);
    (void)pthread_mutex_unlock(&lock);
}

static int new_memory(uint64_t bytes) {
    int fd = memfd_create("fake-gpu", MFD_CLOEXEC);
    fake_must(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "no memory");
    return fd;
}

static uint8_t *map(int fd, uint64_t bytes) {
    uint8_t *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    fake_must(p != MAP_FAILED, "no addresses");
    return p;
}

static CUresult reserve(uint64_t bytes) {
    size_t total;
    (void)cuDeviceTotalMem(&total, 0);
    if (__atomic_add_fetch(&used_bytes, bytes, __ATOMIC_SEQ_CST) > total - taken_bytes()) {
        (void)__atomic_sub_fetch(&used_bytes, bytes, __ATOMIC_SEQ_CST);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetInfo(size_t *left, size_t *total) {
    NEED_CONTEXT();
    (void)cuDeviceTotalMem(total, 0);
    *left = *total - taken_bytes() - __atomic_load_n(&used_bytes, __ATOMIC_SEQ_CST);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) {
    NEED_CONTEXT();
    CUresult error = reserve(bytes);
    if (error == CUDA_SUCCESS) {
        int fd = new_memory(bytes);
        uint8_t *base = map(fd, bytes);
        memset(base, 0xee, bytes); /* somebody else's bytes */
        add_locked((struct range){.base = base, .bytes = bytes, .fd = fd});
        *address = (uintptr_t)base;
    }
    return error;
}

EXPORT CUresult cuMemFree(CUdeviceptr address) {
    struct range r;
    NEED_CONTEXT();
    fake_stall();
    if (!take(address, &r)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    fake_must(!r.imported && !r.pinned, "cuMemFree of what is not from cuMemAlloc");
    (void)munmap(r.base, r.bytes);
    (void)close(r.fd);
    (void)__atomic_sub_fetch(&used_bytes, r.bytes, __ATOMIC_SEQ_CST);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned int flags) {
    (void)flags;
    NEED_CONTEXT();
    *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fake_must(*address != MAP_FAILED, "no memory");
    add_locked((struct range){.base = *address, .bytes = bytes, .fd = -1, .pinned = true});
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemFreeHost(void *address) {
    struct range r;
    NEED_CONTEXT();
    fake_stall();
    fake_must(take((uintptr_t)address, &r) && r.pinned, "cuMemFreeHost of what is not pinned");
    (void)munmap(r.base, r.bytes);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostRegister(void *address, size_t bytes, unsigned int flags) {
    (void)flags;
    NEED_CONTEXT();
    if ((uintptr_t)address % 4096 != 0 || bytes == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    (void)pthread_mutex_lock(&lock);
    bool there = find((uintptr_t)address) != NULL || find((uintptr_t)address + bytes - 1) != NULL;
    bool full = registered_bytes + bytes > fake_setting("FAKE_CUDA_PINNED", UINT64_MAX / 2);
    if (!there && !full) {
        add((struct range){.base = address, .bytes = bytes, .fd = -1, .pinned = true});
        registered_bytes += bytes;
    }
    (void)pthread_mutex_unlock(&lock);
    return there  ? CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
           : full ? CUDA_ERROR_OUT_OF_MEMORY
                  : CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostUnregister(void *address) {
    struct range r;
    NEED_CONTEXT();
    fake_stall();
    if (!take((uintptr_t)address, &r) || !r.pinned) {
        return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    }
    (void)pthread_mutex_lock(&lock);
    registered_bytes -= r.bytes;
    (void)pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostGetDevicePointer(CUdeviceptr *out, void *address, unsigned int flags) {
    (void)flags;
    NEED_CONTEXT();
    *out = (uintptr_t)address;
    return fake_inside(*out, 1, true) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* ---- sharing ------------------------------------------------------------------------------------- */

struct ipc {
    int pid;
    int fd;
    uint64_t bytes;
};

EXPORT CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    NEED_CONTEXT();
    (void)pthread_mutex_lock(&lock);
    const struct range *r = find(address);
    fake_must(r != NULL && r->fd >= 0 && (uintptr_t)r->base == address,
              "no handle for that address");
    struct ipc i = {.pid = getpid(), .fd = r->fd, .bytes = r->bytes};
    (void)pthread_mutex_unlock(&lock);
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &i, sizeof i);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuIpcOpenMemHandle(CUdeviceptr *address, CUipcMemHandle handle,
                                   unsigned int flags) {
    struct ipc i;
    char path[64];
    (void)flags;
    NEED_CONTEXT();
    memcpy(&i, &handle, sizeof i);
    if (i.pid == getpid()) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    (void)snprintf(path, sizeof path, "/proc/%d/fd/%d", i.pid, i.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    uint8_t *base = map(fd, i.bytes);
    (void)close(fd);
    add_locked((struct range){.base = base, .bytes = i.bytes, .fd = -1, .imported = true});
    *address = (uintptr_t)base;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
    struct range r;
    NEED_CONTEXT();
    fake_stall();
    if (!take(address, &r)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    fake_must(r.imported, "cuIpcCloseMemHandle of what was not opened");
    (void)munmap(r.base, r.bytes);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *prop,
                                              CUmemAllocationGranularity_flags which) {
    (void)prop;
    (void)which;
    *bytes = GRANULE;
    return CUDA_SUCCESS;
}

/* A handle is an fd + 1. Memory is charged to the process that created it, until it unmaps it. */
static bool created[65536]; /* by fd; atomic */

EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes,
                            const CUmemAllocationProp *prop, unsigned long long flags) {
    (void)flags;
    NEED_CONTEXT();
    if (bytes % GRANULE != 0 ||
        prop->requestedHandleTypes != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    CUresult error = reserve(bytes);
    if (error == CUDA_SUCCESS) {
        int fd = new_memory(bytes);
        uint8_t *base = map(fd, bytes);
        memset(base, 0xee, bytes);
        (void)munmap(base, bytes);
        fake_must(fd < 65536, "too many handles");
        __atomic_store_n(&created[fd], true, __ATOMIC_SEQ_CST);
        *handle = (CUmemGenericAllocationHandle)fd + 1;
    }
    return error;
}

EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    fake_must(handle > 0 && handle <= 65536, "cuMemRelease of no handle");
    /* Before the number is free for others. */
    __atomic_store_n(&created[handle - 1], false, __ATOMIC_SEQ_CST);
    fake_must(close((int)handle - 1) == 0, "cuMemRelease of no handle");
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemExportToShareableHandle(void *out, CUmemGenericAllocationHandle handle,
                                             CUmemAllocationHandleType type,
                                             unsigned long long flags) {
    (void)type;
    (void)flags;
    int fd = dup((int)handle - 1);
    memcpy(out, &fd, sizeof fd);
    return fd >= 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *os,
                                               CUmemAllocationHandleType type) {
    (void)type;
    NEED_CONTEXT();
    int fd = fcntl((int)(uintptr_t)os, F_DUPFD_CLOEXEC, 3);
    *handle = (CUmemGenericAllocationHandle)fd + 1;
    return fd >= 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment,
                                    CUdeviceptr wanted, unsigned long long flags) {
    (void)alignment;
    (void)wanted;
    (void)flags;
    void *p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *address = (uintptr_t)p;
    return p != MAP_FAILED && bytes % GRANULE == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    return munmap((void *)(uintptr_t)address, bytes) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset,
                         CUmemGenericAllocationHandle handle, unsigned long long flags) {
    struct stat st;
    (void)flags;
    int fd = (int)handle - 1;
    if (fstat(fd, &st) != 0 || (uint64_t)st.st_size < offset + bytes) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    void *p = mmap((void *)(uintptr_t)address, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, fd,
                   (off_t)offset);
    if (p == MAP_FAILED) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    add_locked((struct range){.base = p,
                              .bytes = bytes,
                              .fd = -1,
                              .charged = __atomic_load_n(&created[fd], __ATOMIC_SEQ_CST)});
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *access,
                               size_t count) {
    (void)access;
    (void)count;
    return mprotect((void *)(uintptr_t)address, bytes, PROT_READ | PROT_WRITE) == 0
               ? CUDA_SUCCESS
               : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    struct range r;
    if (!take(address, &r) || r.bytes != bytes) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    void *p = mmap(r.base, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    fake_must(p != MAP_FAILED, "cuMemUnmap");
    (void)__atomic_sub_fetch(&used_bytes, r.charged ? bytes : 0, __ATOMIC_SEQ_CST);
    return CUDA_SUCCESS;
}
