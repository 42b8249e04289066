/* The range allocator against an array of bytes. */
#include "proto/errors.h"
#include "tests/support/cunit_run.h"
#include "tiers/engine/ranges.h"

#include <stdlib.h>

enum { SIZE = 4096, HELD = 200 };

static struct kvt_ranges r;
static uint8_t state[SIZE]; /* 0: not there, 1: free, 2: allocated */

static struct { uint64_t offset, bytes; } held[HELD];
static uint32_t held_count;

static uint64_t random_state = 1;

static uint32_t below(uint32_t limit) {
    random_state = random_state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)(((random_state >> 33) * limit) >> 31);
}

static void mark(uint64_t offset, uint64_t bytes, uint8_t from, uint8_t to) {
    for (uint64_t i = offset; i < offset + bytes; i++) {
        CU_ASSERT_EQUAL_FATAL(state[i], from);
        state[i] = to;
    }
}

/* Free ranges are the maximal stretches of free bytes, in order. */
static void check(void) {
    uint32_t at = 0;
    uint64_t free_bytes = 0;
    for (uint32_t i = 0; i < SIZE;) {
        uint32_t begin = i;
        while (i < SIZE && state[i] == 1) {
            i++;
        }
        if (i > begin) {
            CU_ASSERT_TRUE_FATAL(at < r.count);
            CU_ASSERT_EQUAL_FATAL(r.free[at].offset, begin);
            CU_ASSERT_EQUAL_FATAL(r.free[at].bytes, i - begin);
            free_bytes += i - begin;
            at++;
        } else {
            i++;
        }
    }
    CU_ASSERT_EQUAL_FATAL(at, r.count);
    CU_ASSERT_EQUAL_FATAL(free_bytes, r.free_bytes);
    CU_ASSERT_EQUAL_FATAL(held_count, r.allocations);
    CU_ASSERT_TRUE_FATAL(r.capacity > r.count + r.allocations || r.capacity == 0);
}

static bool fits_somewhere(uint64_t bytes, uint64_t align) {
    for (uint64_t start = 0; start + bytes <= SIZE; start += align) {
        uint64_t n = 0;
        while (n < bytes && state[start + n] == 1) {
            n++;
        }
        if (n == bytes) {
            return true;
        }
    }
    return false;
}

static void allocate(void) {
    uint64_t align = UINT64_C(1) << below(7);
    uint64_t bytes = 1 + below(below(4) == 0 ? 600 : 60);
    uint64_t offset = 0;
    int rc = kvt_ranges_alloc(&r, bytes, align, &offset);
    if (rc == 0) {
        CU_ASSERT_EQUAL_FATAL(offset % align, 0);
        mark(offset, bytes, 1, 2);
        held[held_count].offset = offset;
        held[held_count++].bytes = bytes;
    } else {
        CU_ASSERT_EQUAL_FATAL(rc, -KVT_EQUOTA);
        CU_ASSERT_FALSE_FATAL(fits_somewhere(bytes, align));
    }
}

static void give_back(uint32_t at) {
    kvt_ranges_free(&r, held[at].offset, held[at].bytes);
    mark(held[at].offset, held[at].bytes, 2, 1);
    held[at] = held[--held_count];
}

/* A chunk comes, or goes if all of it is free. */
static void chunk(void) {
    uint64_t bytes = 256;
    uint64_t offset = below(SIZE / 256) * bytes;
    bool is_free = true;
    for (uint64_t i = offset; i < offset + bytes; i++) {
        is_free &= state[i] == 1;
    }
    CU_ASSERT_EQUAL_FATAL(kvt_ranges_is_free(&r, offset, bytes), is_free);
    if (state[offset] == 0) {
        CU_ASSERT_EQUAL_FATAL(kvt_ranges_add(&r, offset, bytes), 0);
        mark(offset, bytes, 0, 1);
    } else if (is_free && below(4) == 0) {
        CU_ASSERT_EQUAL_FATAL(kvt_ranges_remove(&r, offset, bytes), 0);
        mark(offset, bytes, 1, 0);
    }
}

static void test_against_bytes(void) {
    kvt_ranges_init(&r);
    for (uint32_t i = 0; i < 20000; i++) {
        uint32_t what = below(10);
        if (what == 0) {
            chunk();
        } else if (what < 6 && held_count < HELD) {
            allocate();
        } else if (held_count > 0) {
            give_back(below(held_count));
        }
        if (i % 16 == 0) {
            check();
        }
    }
    while (held_count > 0) {
        give_back(held_count - 1);
    }
    check();
    kvt_ranges_destroy(&r);
}

/* Near the end of the address space nothing wraps. */
static void test_huge(void) {
    uint64_t offset = 0;
    kvt_ranges_init(&r);
    CU_ASSERT_EQUAL(kvt_ranges_alloc(&r, 1, 1, &offset), -KVT_EQUOTA);
    CU_ASSERT_EQUAL(kvt_ranges_add(&r, UINT64_MAX - 8192, 8192), 0);
    CU_ASSERT_EQUAL(kvt_ranges_alloc(&r, UINT64_MAX, 1, &offset), -KVT_EQUOTA);
    CU_ASSERT_EQUAL(kvt_ranges_alloc(&r, UINT64_MAX - 4096, 256, &offset), -KVT_EQUOTA);
    CU_ASSERT_EQUAL(kvt_ranges_alloc(&r, 8193, 1, &offset), -KVT_EQUOTA);
    CU_ASSERT_EQUAL(kvt_ranges_alloc(&r, 16, UINT64_C(1) << 63, &offset), -KVT_EQUOTA);
    CU_ASSERT_EQUAL(kvt_ranges_alloc(&r, 8192, 1, &offset), 0);
    CU_ASSERT_EQUAL(offset, UINT64_MAX - 8192);
    kvt_ranges_free(&r, offset, 8192);
    CU_ASSERT_EQUAL(r.count, 1);
    kvt_ranges_destroy(&r);
}

int main(void) {
    CU_TestInfo tests[] = {{"against an array of bytes", test_against_bytes},
                           {"huge sizes", test_huge},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("ranges", tests);
}
