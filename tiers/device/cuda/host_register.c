/* Devices of one daemon share the arena, and CUDA takes each range once a process (PORTABLE: for all
 * contexts): so registrations are counted, by address, for all devices together.
 */
#include "tiers/device/cuda/host_register.h"

#include "proto/errors.h"
#include "proto/limits.h"
#include "tiers/engine/assert.h"
#include "tiers/host/machine.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- what is registered in this process ------------------------------------------------------- */

struct registration {
    uint8_t *address; /* NULL: a free entry */
    uint32_t users;   /* devices */
    bool busy;        /* somebody registers or unregisters it just now */
};

/* Held for a look at the table, or at a device's map; never during a call into CUDA. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct registration *table;
static uint32_t table_size;

/* The entry of the address, once nobody is busy with it; NULL: there is none. Lock held. */
static struct registration *find(const uint8_t *address) {
    for (uint32_t i = 0; i < table_size; i++) {
        if (table[i].address != address) {
            continue;
        }
        if (!table[i].busy) {
            return &table[i];
        }
        pthread_cond_wait(&changed, &lock);
        i = UINT32_MAX; /* the table may be another one now: from the start */
    }
    return NULL;
}

/* Lock held. */
static void add_busy(uint8_t *address) {
    uint32_t i = 0;
    while (i < table_size && table[i].address) {
        i++;
    }
    if (i == table_size) {
        uint32_t size = table_size ? 2 * table_size : 64;
        table = realloc(table, size * sizeof(*table));
        KVT_ASSERT(table != NULL);
        for (uint32_t n = table_size; n < size; n++) {
            table[n] = (struct registration){.address = NULL};
        }
        table_size = size;
    }
    table[i] = (struct registration){.address = address, .users = 1, .busy = true};
}

/* It is registered (or not any more). */
static void settle(const uint8_t *address, bool registered) {
    pthread_mutex_lock(&lock);
    for (uint32_t i = 0; i < table_size; i++) {
        if (table[i].address == address) {
            table[i].busy = false;
            table[i].address = registered ? table[i].address : NULL;
        }
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static CUresult range_share(const struct kvt_cuda_api *api, uint8_t *address, uint64_t bytes) {
    pthread_mutex_lock(&lock);
    struct registration *r = find(address);
    if (r) {
        r->users++;
    } else {
        add_busy(address);
    }
    pthread_mutex_unlock(&lock);
    if (r) {
        return CUDA_SUCCESS;
    }
    CUresult error = api->cuMemHostRegister(address, bytes, CU_MEMHOSTREGISTER_PORTABLE);
    settle(address, error == CUDA_SUCCESS);
    return error;
}

static CUresult range_unshare(const struct kvt_cuda_api *api, uint8_t *address) {
    pthread_mutex_lock(&lock);
    struct registration *r = find(address);
    KVT_ASSERT(r != NULL);
    bool last = --r->users == 0;
    r->busy = last;
    pthread_mutex_unlock(&lock);
    if (!last) {
        return CUDA_SUCCESS;
    }
    CUresult error = api->cuMemHostUnregister(address);
    settle(address, false);
    return error;
}

/* ---- ranges ------------------------------------------------------------------------------------ */

static int outside(uint64_t offset, uint64_t bytes, const char *why, char *text) {
    snprintf(text, KVT_TEXT_BYTES, "device cuda: host memory at %llu, %llu bytes, %s",
             (unsigned long long)offset, (unsigned long long)bytes, why);
    return -KVT_EINVAL;
}

static void map_set(struct kvt_host_map *map, uint64_t offset, uint64_t bytes, bool there) {
    pthread_mutex_lock(&lock);
    kvt_host_map_set(map, offset, bytes, there);
    pthread_mutex_unlock(&lock);
}

int kvt_host_register(const struct kvt_cuda_api *api, struct kvt_host_map *map, uint8_t *base,
                      uint64_t offset, uint64_t bytes, char *text) {
    if (!kvt_host_map_fits(map, offset, bytes)) {
        return outside(offset, bytes, "is not made of pages of the arena", text);
    }
    pthread_mutex_lock(&lock);
    bool none = kvt_host_map_none(map, offset, bytes);
    pthread_mutex_unlock(&lock);
    if (!none) {
        return outside(offset, bytes, "is registered already", text);
    }
    CUresult error = range_share(api, base + offset, bytes);
    if (error != CUDA_SUCCESS) {
        char reason[KVT_CUDA_TEXT_BYTES];
        char size[KVT_SIZE_TEXT_BYTES];
        snprintf(text, KVT_TEXT_BYTES,
                 "device cuda: %s of host memory cannot be registered: cuMemHostRegister: %s; "
                 "lower [host] preallocate or budget, or raise LimitMEMLOCK of kvtierd",
                 kvt_size_text(bytes, size), kvt_cuda_error(api, error, reason));
        return -KVT_ENOMEM;
    }
    map_set(map, offset, bytes, true);
    return 0;
}

/* Bytes of the registration that begins at `offset`, if it ends inside of the range. Lock held. */
static uint64_t whole_piece(const struct kvt_host_map *map, uint64_t offset, uint64_t bytes) {
    if (!kvt_host_map_begins(map, offset)) {
        return 0;
    }
    uint64_t run = kvt_host_map_run(map, offset, bytes);
    uint64_t beyond = kvt_host_map_run(map, offset, run + 1); /* 0 at the end of the arena */
    return beyond == run + 1 ? 0 : run;
}

static bool whole_pieces(const struct kvt_host_map *map, uint64_t offset, uint64_t bytes) {
    uint64_t piece = 1;
    pthread_mutex_lock(&lock);
    for (uint64_t at = 0; at < bytes && piece > 0; at += piece) {
        piece = whole_piece(map, offset + at, bytes - at);
    }
    pthread_mutex_unlock(&lock);
    return piece > 0;
}

int kvt_host_unregister(const struct kvt_cuda_api *api, struct kvt_host_map *map, uint8_t *base,
                        uint64_t offset, uint64_t bytes, char *text) {
    uint64_t piece;
    if (!kvt_host_map_fits(map, offset, bytes)) {
        return outside(offset, bytes, "is not made of pages of the arena", text);
    }
    if (!whole_pieces(map, offset, bytes)) {
        return outside(offset, bytes, "is not made of ranges that were registered", text);
    }
    for (uint64_t at = 0; at < bytes; at += piece) {
        pthread_mutex_lock(&lock);
        piece = whole_piece(map, offset + at, bytes - at);
        kvt_host_map_set(map, offset + at, piece, false);
        pthread_mutex_unlock(&lock);
        CUresult error = range_unshare(api, base + offset + at);
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
        (void)range_unshare(api, base + offset);
        offset += KVT_CUDA_PAGE_BYTES;
    }
}
