/* Two bits a page: it is there; a registration begins with it. */
#include "tiers/device/cuda/host_map.h"

#include "proto/errors.h"
#include "tiers/engine/assert.h"

#include <stdlib.h>

struct kvt_host_map {
    uint64_t bytes;
    uint64_t *there;  /* atomic words */
    uint64_t *begins; /* atomic words */
};

int kvt_host_map_create(uint64_t bytes, struct kvt_host_map **out) {
    struct kvt_host_map *m = calloc(1, sizeof(*m));
    if (!m) {
        return -KVT_ENOMEM;
    }
    uint64_t words = bytes / KVT_CUDA_PAGE_BYTES / 64 + 1;
    m->bytes = bytes;
    m->there = calloc(words, sizeof(*m->there));
    m->begins = calloc(words, sizeof(*m->begins));
    if (!m->there || !m->begins) {
        kvt_host_map_free(m);
        return -KVT_ENOMEM;
    }
    *out = m;
    return 0;
}

void kvt_host_map_free(struct kvt_host_map *m) {
    if (m) {
        free(m->there);
        free(m->begins);
        free(m);
    }
}

static bool test(const uint64_t *map, uint64_t page) {
    return (__atomic_load_n(&map[page / 64], __ATOMIC_ACQUIRE) >> (page % 64) & 1) != 0;
}

/* Pages of one word. */
static void change(uint64_t *map, uint64_t page, uint64_t count, bool set) {
    uint64_t bits = (count == 64 ? UINT64_MAX : (UINT64_C(1) << count) - 1) << (page % 64);
    if (set) {
        __atomic_fetch_or(&map[page / 64], bits, __ATOMIC_RELEASE);
    } else {
        __atomic_fetch_and(&map[page / 64], ~bits, __ATOMIC_RELEASE);
    }
}

bool kvt_host_map_fits(const struct kvt_host_map *m, uint64_t offset, uint64_t bytes) {
    return bytes > 0 && offset % KVT_CUDA_PAGE_BYTES == 0 && bytes % KVT_CUDA_PAGE_BYTES == 0 &&
           offset <= m->bytes && bytes <= m->bytes - offset;
}

bool kvt_host_map_none(const struct kvt_host_map *m, uint64_t offset, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += KVT_CUDA_PAGE_BYTES) {
        if (test(m->there, (offset + at) / KVT_CUDA_PAGE_BYTES)) {
            return false;
        }
    }
    return true;
}

void kvt_host_map_set(struct kvt_host_map *m, uint64_t offset, uint64_t bytes, bool there) {
    KVT_ASSERT(kvt_host_map_fits(m, offset, bytes));
    uint64_t page = offset / KVT_CUDA_PAGE_BYTES;
    uint64_t end = page + bytes / KVT_CUDA_PAGE_BYTES;
    change(m->begins, page, 1, there);
    for (uint64_t count; page < end; page += count) {
        count = 64 - page % 64;
        count = count < end - page ? count : end - page;
        change(m->there, page, count, there);
    }
}

bool kvt_host_map_begins(const struct kvt_host_map *m, uint64_t offset) {
    return offset < m->bytes && test(m->begins, offset / KVT_CUDA_PAGE_BYTES);
}

bool kvt_host_map_next(const struct kvt_host_map *m, uint64_t *offset) {
    uint64_t pages = m->bytes / KVT_CUDA_PAGE_BYTES;
    for (uint64_t page = *offset / KVT_CUDA_PAGE_BYTES; page < pages; page++) {
        uint64_t word = __atomic_load_n(&m->begins[page / 64], __ATOMIC_ACQUIRE) >> (page % 64);
        if (word == 0) {
            page |= 63; /* nothing in the rest of this word */
            continue;
        }
        *offset = (page + (uint64_t)__builtin_ctzll(word)) * KVT_CUDA_PAGE_BYTES;
        return true;
    }
    return false;
}

uint64_t kvt_host_map_run(const struct kvt_host_map *m, uint64_t offset, uint64_t bytes) {
    if (bytes == 0 || offset > m->bytes || bytes > m->bytes - offset) {
        return 0;
    }
    uint64_t page = offset / KVT_CUDA_PAGE_BYTES;
    uint64_t last = (offset + bytes - 1) / KVT_CUDA_PAGE_BYTES;
    if (!test(m->there, page)) {
        return 0;
    }
    for (page++; page <= last; page++) {
        uint64_t word = page / 64;
        if (page % 64 == 0 && last - page >= 64 &&
            __atomic_load_n(&m->begins[word], __ATOMIC_ACQUIRE) == 0 &&
            __atomic_load_n(&m->there[word], __ATOMIC_ACQUIRE) == UINT64_MAX) {
            page += 63; /* a word at a time: a copy of 16 MiB has 4,096 pages */
        } else if (test(m->begins, page) || !test(m->there, page)) {
            return page * KVT_CUDA_PAGE_BYTES - offset;
        }
    }
    return bytes;
}
