#include "tiers/device/cuda/host_register.h"

#include "proto/errors.h"
#include "proto/limits.h"
#include "tiers/host/machine.h"
#include "tiers/host/thread.h"

#include <stdio.h>

enum { THREADS_MAX = 4 };
#define PIECE_BYTES_MIN (UINT64_C(64) << 20) /* less is not worth a thread */
#define PIECE_ALIGN     (UINT64_C(2) << 20)

struct piece {
    pthread_t thread;
    const struct kvt_cuda_api *api;
    CUcontext context;
    uint8_t *address;
    uint64_t bytes;
    CUresult error;
};

static void register_piece(struct piece *p) {
    p->error = p->api->cuMemHostRegister(p->address, p->bytes, CU_MEMHOSTREGISTER_PORTABLE);
}

static void *run(void *argument) {
    struct piece *p = argument;
    p->error = p->api->cuCtxSetCurrent(p->context);
    if (p->error == CUDA_SUCCESS) {
        register_piece(p);
    }
    return NULL;
}

/* The first is done by this thread, and those that got none. */
static void register_all(struct piece *pieces, unsigned count) {
    unsigned started = 1;
    while (started < count &&
           kvt_thread_start("kvt-register", run, &pieces[started], &pieces[started].thread) == 0) {
        started++;
    }
    register_piece(&pieces[0]);
    for (unsigned i = started; i < count; i++) {
        register_piece(&pieces[i]);
    }
    for (unsigned i = 1; i < started; i++) {
        pthread_join(pieces[i].thread, NULL);
    }
}

static int outside(uint64_t offset, uint64_t bytes, const char *why, char *text) {
    snprintf(text, KVT_TEXT_BYTES, "device cuda: host memory at %llu, %llu bytes, %s",
             (unsigned long long)offset, (unsigned long long)bytes, why);
    return -KVT_EINVAL;
}

int kvt_host_register(const struct kvt_cuda_api *api, CUcontext context, struct kvt_host_map *map,
                      uint8_t *base, uint64_t offset, uint64_t bytes, char *text) {
    struct piece pieces[THREADS_MAX];
    if (!kvt_host_map_fits(map, offset, bytes)) {
        return outside(offset, bytes, "is not made of pages of the arena", text);
    }
    if (!kvt_host_map_none(map, offset, bytes)) {
        return outside(offset, bytes, "is registered already", text);
    }
    uint64_t each = (bytes / THREADS_MAX + PIECE_ALIGN - 1) / PIECE_ALIGN * PIECE_ALIGN;
    each = each > PIECE_BYTES_MIN ? each : PIECE_BYTES_MIN;
    unsigned count = 0;
    for (uint64_t at = 0; at < bytes; at += each) {
        pieces[count++] = (struct piece){.api = api,
                                         .context = context,
                                         .address = base + offset + at,
                                         .bytes = bytes - at < each ? bytes - at : each};
    }
    register_all(pieces, count);
    for (unsigned i = 0; i < count; i++) {
        if (pieces[i].error == CUDA_SUCCESS) {
            continue;
        }
        char reason[KVT_CUDA_TEXT_BYTES];
        char size[KVT_SIZE_TEXT_BYTES];
        snprintf(text, KVT_TEXT_BYTES,
                 "device cuda: %s of host memory cannot be registered: cuMemHostRegister: %s; "
                 "lower [host] budget, or raise LimitMEMLOCK of kvtierd",
                 kvt_size_text(bytes, size), kvt_cuda_error(api, pieces[i].error, reason));
        for (unsigned n = 0; n < count; n++) {
            if (pieces[n].error == CUDA_SUCCESS) {
                (void)api->cuMemHostUnregister(pieces[n].address);
            }
        }
        return -KVT_ENOMEM;
    }
    for (unsigned i = 0; i < count; i++) {
        kvt_host_map_set(map, (uint64_t)(pieces[i].address - base), pieces[i].bytes, true);
    }
    return 0;
}

/* Bytes of the registration that begins at `offset`, if it ends inside of the range. */
static uint64_t whole_piece(const struct kvt_host_map *map, uint64_t offset, uint64_t bytes) {
    if (!kvt_host_map_begins(map, offset)) {
        return 0;
    }
    uint64_t run = kvt_host_map_run(map, offset, bytes);
    uint64_t beyond = kvt_host_map_run(map, offset, run + 1); /* 0 at the end of the arena */
    return beyond == run + 1 ? 0 : run;
}

int kvt_host_unregister(const struct kvt_cuda_api *api, struct kvt_host_map *map, uint8_t *base,
                        uint64_t offset, uint64_t bytes, char *text) {
    uint64_t piece;
    if (!kvt_host_map_fits(map, offset, bytes)) {
        return outside(offset, bytes, "is not made of pages of the arena", text);
    }
    for (uint64_t at = 0; at < bytes; at += piece) {
        piece = whole_piece(map, offset + at, bytes - at);
        if (piece == 0) {
            return outside(offset, bytes, "is not made of ranges that were registered", text);
        }
    }
    for (uint64_t at = 0; at < bytes; at += piece) {
        piece = whole_piece(map, offset + at, bytes - at);
        kvt_host_map_set(map, offset + at, piece, false);
        CUresult error = api->cuMemHostUnregister(base + offset + at);
        if (error != CUDA_SUCCESS) {
            char reason[KVT_CUDA_TEXT_BYTES];
            snprintf(text, KVT_TEXT_BYTES, "device cuda: cuMemHostUnregister: %s",
                     kvt_cuda_error(api, error, reason));
            return -KVT_EDEVICE;
        }
    }
    return 0;
}

void kvt_host_unregister_all(const struct kvt_cuda_api *api, struct kvt_host_map *map,
                             uint8_t *base) {
    uint64_t offset = 0;
    while (kvt_host_map_next(map, &offset)) {
        (void)api->cuMemHostUnregister(base + offset);
        offset += KVT_CUDA_PAGE_BYTES;
    }
}
