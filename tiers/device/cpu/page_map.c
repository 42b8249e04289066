/* Which pages of the host arena are there; see page_map.h. */
#include "tiers/device/cpu/page_map.h"

#include "proto/errors.h"

#include <stdlib.h>

struct kvt_page_map {
    uint64_t bytes;
    uint64_t words[]; /* atomic; bit p % 64 of word p / 64: page p */
};

int kvt_page_map_create(uint64_t bytes, struct kvt_page_map **out) {
    uint64_t words = bytes / KVT_CPU_PAGE_BYTES / 64 + 1;
    struct kvt_page_map *m = calloc(1, sizeof(*m) + words * sizeof(m->words[0]));
    if (!m) {
        return -KVT_ENOMEM;
    }
    m->bytes = bytes;
    *out = m;
    return 0;
}

void kvt_page_map_free(struct kvt_page_map *m) {
    free(m);
}

static bool inside(const struct kvt_page_map *m, uint64_t offset, uint64_t bytes) {
    return offset <= m->bytes && bytes <= m->bytes - offset;
}

/* The bits of word `w` that pages [first, last] have. */
static uint64_t mask_of(uint64_t w, uint64_t first, uint64_t last) {
    uint64_t mask = UINT64_MAX;
    if (w == first / 64) {
        mask &= UINT64_MAX << first % 64;
    }
    if (w == last / 64) {
        mask &= UINT64_MAX >> (63 - last % 64);
    }
    return mask;
}

bool kvt_page_map_set(struct kvt_page_map *m, uint64_t offset, uint64_t bytes, bool there) {
    if (!inside(m, offset, bytes) || offset % KVT_CPU_PAGE_BYTES != 0 ||
        bytes % KVT_CPU_PAGE_BYTES != 0) {
        return false;
    }
    if (bytes == 0) {
        return true;
    }
    uint64_t first = offset / KVT_CPU_PAGE_BYTES;
    uint64_t last = (offset + bytes - 1) / KVT_CPU_PAGE_BYTES;
    for (uint64_t w = first / 64; w <= last / 64; w++) {
        uint64_t mask = mask_of(w, first, last);
        if (there) {
            __atomic_fetch_or(&m->words[w], mask, __ATOMIC_RELAXED);
        } else {
            __atomic_fetch_and(&m->words[w], ~mask, __ATOMIC_RELAXED);
        }
    }
    return true;
}

bool kvt_page_map_holds(const struct kvt_page_map *m, uint64_t offset, uint64_t bytes) {
    if (!inside(m, offset, bytes)) {
        return false;
    }
    if (bytes == 0) {
        return true;
    }
    uint64_t first = offset / KVT_CPU_PAGE_BYTES;
    uint64_t last = (offset + bytes - 1) / KVT_CPU_PAGE_BYTES;
    for (uint64_t w = first / 64; w <= last / 64; w++) {
        uint64_t mask = mask_of(w, first, last);
        if ((__atomic_load_n(&m->words[w], __ATOMIC_RELAXED) & mask) != mask) {
            return false;
        }
    }
    return true;
}
