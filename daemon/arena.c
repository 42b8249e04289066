#include "daemon/arena.h"
#include "proto/errors.h"

#include <stdlib.h>
#include <string.h>

#define ALIGN 16u

static void *allocate(void *data, size_t size) {
    struct kvt_arena *a = data;
    size_t room = a->size - a->used;
    size_t rounded = (size + ALIGN - 1) & ~(size_t)(ALIGN - 1);
    if (size > room || rounded > room) {
        a->exhausted = true;
        return NULL;
    }
    void *memory = a->memory + a->used;
    a->used += rounded;
    return memory;
}

static void release(void *data, void *pointer) {
    (void)data; /* all at once, by kvt_arena_reset */
    (void)pointer;
}

int kvt_arena_init(struct kvt_arena *a, size_t size) {
    memset(a, 0, sizeof(*a));
    a->memory = malloc(size);
    if (a->memory == NULL) {
        return -KVT_ENOMEM;
    }
    a->size = size & ~(size_t)(ALIGN - 1);
    a->allocator = (ProtobufCAllocator){.alloc = allocate, .free = release, .allocator_data = a};
    return 0;
}

void kvt_arena_destroy(struct kvt_arena *a) {
    free(a->memory);
    a->memory = NULL;
}

void kvt_arena_reset(struct kvt_arena *a) {
    a->used = 0;
    a->exhausted = false;
}

void *kvt_arena_alloc(struct kvt_arena *a, size_t size) {
    void *memory = allocate(a, size);
    if (memory != NULL) {
        memset(memory, 0, size);
    }
    return memory;
}
