#include "cuda/cuda_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define LIBRARY "libcuda.so.1"

#define STRING_OF(f) #f
#define STRING(f)    STRING_OF(f)
#define NEEDED(f)    {STRING(f), offsetof(struct kvt_cuda_api, f), true},
#define OPTIONAL(f)  {STRING(f), offsetof(struct kvt_cuda_api, f), false},

static const struct {
    const char *symbol;
    size_t offset;
    bool needed;
} functions[] = {KVT_CUDA_FUNCTIONS(NEEDED) KVT_CUDA_OPTIONAL(OPTIONAL)};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct kvt_cuda_api table;
static char why_not[KVT_CUDA_TEXT_BYTES]; /* empty: it is open */

static void open_library(void) {
    void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        (void)snprintf(why_not, sizeof why_not,
                       "%.80s; install the NVIDIA driver (R570 or later), or use the cpu device",
                       dlerror());
        return;
    }
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        void *symbol = dlsym(library, functions[i].symbol);
        if (symbol == NULL && functions[i].needed) {
            (void)snprintf(why_not, sizeof why_not,
                           LIBRARY " has no %s: the NVIDIA driver is too old; install R570 or "
                                   "later",
                           functions[i].symbol);
            (void)dlclose(library);
            return;
        }
        memcpy((char *)&table + functions[i].offset, &symbol, sizeof symbol);
    }
    CUresult error = table.cuInit(0);
    if (error != CUDA_SUCCESS) {
        char text[KVT_CUDA_TEXT_BYTES];
        (void)snprintf(why_not, sizeof why_not,
                       "cuInit: %.90s; nvidia-smi says whether the driver sees a GPU",
                       kvt_cuda_error(&table, error, text));
    }
    /* The library stays: its threads do. */
}

const struct kvt_cuda_api *kvt_cuda_open(char text[KVT_CUDA_TEXT_BYTES]) {
    (void)pthread_once(&once, open_library);
    if (why_not[0] == '\0') {
        return &table;
    }
    memcpy(text, why_not, sizeof why_not);
    return NULL;
}

const char *kvt_cuda_error(const struct kvt_cuda_api *api, CUresult error,
                           char text[KVT_CUDA_TEXT_BYTES]) {
    const char *name = NULL;
    const char *prose = NULL;
    (void)api->cuGetErrorName(error, &name);
    (void)api->cuGetErrorString(error, &prose);
    (void)snprintf(text, KVT_CUDA_TEXT_BYTES, "%s %d (%s)", name != NULL ? name : "CUDA error",
                   (int)error, prose != NULL ? prose : "unknown to this driver");
    return text;
}

void kvt_cuda_uuid_text(const uint8_t uuid[16], char text[KVT_CUDA_UUID_TEXT_BYTES]) {
    size_t at = (size_t)snprintf(text, KVT_CUDA_UUID_TEXT_BYTES, "GPU");
    for (int i = 0; i < 16; i++) {
        const char *dash = i == 0 || i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "";
        at += (size_t)snprintf(text + at, KVT_CUDA_UUID_TEXT_BYTES - at, "%s%02x", dash, uuid[i]);
    }
}

CUresult kvt_cuda_find(const struct kvt_cuda_api *api, const uint8_t *uuid, CUdevice *out,
                       char text[KVT_CUDA_TEXT_BYTES]) {
    static const uint8_t any[16];
    char reason[KVT_CUDA_TEXT_BYTES];
    char name[KVT_CUDA_UUID_TEXT_BYTES];
    CUuuid first = {{0}};
    int count = 0;
    CUresult error = api->cuDeviceGetCount(&count);
    for (int i = 0; error == CUDA_SUCCESS && i < count; i++) {
        CUuuid found;
        CUdevice device;
        error = api->cuDeviceGet(&device, i);
        if (error == CUDA_SUCCESS) {
            error = api->cuDeviceGetUuid(&found, device);
        }
        if (error != CUDA_SUCCESS) {
            break;
        }
        if (uuid == NULL || memcmp(uuid, any, sizeof any) == 0 ||
            memcmp(uuid, found.bytes, sizeof found.bytes) == 0) {
            *out = device;
            return CUDA_SUCCESS;
        }
        first = i == 0 ? found : first;
    }
    if (error != CUDA_SUCCESS) {
        (void)snprintf(text, KVT_CUDA_TEXT_BYTES, "the GPUs cannot be listed: %.140s",
                       kvt_cuda_error(api, error, reason));
        return error;
    }
    kvt_cuda_uuid_text((const uint8_t *)first.bytes, name);
    (void)snprintf(text, KVT_CUDA_TEXT_BYTES,
                   "no GPU has that UUID; there are %d, the first is %s (nvidia-smi -L lists them; "
                   "CUDA_VISIBLE_DEVICES hides some)",
                   count, name);
    return count == 0 ? CUDA_ERROR_NO_DEVICE : CUDA_ERROR_INVALID_DEVICE;
}

CUresult kvt_cuda_check_stream_values(const struct kvt_cuda_api *api, CUdevice device,
                                      char text[KVT_CUDA_TEXT_BYTES]) {
    char name[80] = "this GPU";
    int supported = 0;
    CUresult error =
        api->cuDeviceGetAttribute(&supported, CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS,
                                  device);
    if (error == CUDA_SUCCESS && supported != 0) {
        return CUDA_SUCCESS;
    }
    (void)api->cuDeviceGetName(name, sizeof name, device);
    (void)snprintf(text, KVT_CUDA_TEXT_BYTES,
                   "%.60s: its driver has no 64-bit stream memory operations "
                   "(cuStreamWaitValue64), which are needed; update the NVIDIA driver",
                   name);
    return CUDA_ERROR_NOT_SUPPORTED;
}
