/* The embedded driver through its table of functions: extents and their budget, the second check of
 * every place, small and large copies by threads, posts and sleeping. */
#include "proto/errors.h"
#include "tests/support/cunit_run.h"
#include "tiers/device/counter.h"
#include "tiers/device/device.h"

#include <CUnit/Basic.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define KIB   UINT64_C(1024)
#define MIB   (1024 * KIB)
#define ARENA (64 * MIB)

static const struct kvt_driver_ops *const ops = &kvt_cpu_driver_ops;
static struct kvt_driver *driver;
static struct kvt_driver_info info;
static uint8_t *arena;
static char text[KVT_TEXT_BYTES];

static void start(uint64_t budget_bytes, uint32_t copy_threads) {
    arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CU_ASSERT_TRUE_FATAL(arena != MAP_FAILED);
    struct kvt_driver_config c = {.budget_bytes = budget_bytes,
                                  .copy_threads = copy_threads,
                                  .uuid = {1, 2, 3},
                                  .host_base = arena,
                                  .host_bytes = ARENA};
    CU_ASSERT_EQUAL_FATAL(ops->open(&c, &driver, &info, text), 0);
    CU_ASSERT_EQUAL(ops->host_added(driver, 0, ARENA, text), 0);
}

static void stop(void) {
    ops->close(driver);
    munmap(arena, ARENA);
}

/* Creates an extent and maps it as a worker would. */
static uint8_t *extent(uint32_t id, uint64_t bytes) {
    struct kvt_export e = {0};
    CU_ASSERT_EQUAL_FATAL(ops->extent_create(driver, id, bytes, &e, text), 0);
    CU_ASSERT_EQUAL(e.kind, KVT_EXTENT_FD);
    uint8_t *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, e.fd, 0);
    CU_ASSERT_TRUE_FATAL(p != MAP_FAILED);
    close(e.fd);
    return p;
}

static struct kvt_place on_device(uint32_t id, uint64_t offset) {
    return (struct kvt_place){.tier = KVT_TIER_GPU, .extent = id, .offset = offset};
}

static struct kvt_place on_host(uint64_t offset) {
    return (struct kvt_place){.tier = KVT_TIER_HOST, .offset = offset};
}

static int copy(struct kvt_place source, struct kvt_place target, uint64_t bytes, uint32_t tag) {
    struct kvt_copy c = {.source = source, .target = target, .bytes = bytes};
    return ops->copy(driver, 0, &c, tag);
}

/* Waits until `count` copies are complete; returns a bit for each tag below 64. */
static uint64_t finish(uint32_t count) {
    uint64_t seen = 0;
    while (count > 0) {
        uint32_t tags[3];
        bool ok[3];
        int n = ops->poll(driver, tags, ok, 3);
        for (int i = 0; i < n; i++) {
            CU_ASSERT_TRUE(ok[i]);
            CU_ASSERT_EQUAL(seen & UINT64_C(1) << tags[i], 0);
            seen |= UINT64_C(1) << tags[i];
        }
        count -= (uint32_t)n;
        if (count > 0 && n == 0) {
            ops->wait(driver, NULL, NULL, 0, KVT_FUTEX_FOREVER);
        }
    }
    return seen;
}

static void scramble(uint8_t *p, uint64_t bytes, uint64_t seed) {
    for (uint64_t i = 0; i < bytes; i++) {
        seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
        p[i] = (uint8_t)(seed >> 56);
    }
}

/* ---- extents ----------------------------------------------------------------------------------- */

static void test_info(void) {
    start(16 * MIB, 1);
    CU_ASSERT_STRING_EQUAL(info.name, "cpu");
    CU_ASSERT_EQUAL(info.uuid[2], 3);
    CU_ASSERT_EQUAL(info.granule_bytes, 4096);
    CU_ASSERT_EQUAL(info.free_bytes, 16 * MIB);
    CU_ASSERT_TRUE(info.can_sleep);
    CU_ASSERT_FALSE(info.post_behind);
    stop();
}

static void test_extents_are_private_sealed_zeroed_and_there(void) {
    start(16 * MIB, 2);
    struct kvt_export e = {0};
    struct stat st;
    CU_ASSERT_EQUAL_FATAL(ops->extent_create(driver, 5, 3 * MIB, &e, text), 0);
    CU_ASSERT_EQUAL(fstat(e.fd, &st), 0);
    CU_ASSERT_EQUAL(st.st_mode & 0777, 0600);
    CU_ASSERT_EQUAL(st.st_blocks * 512, (blkcnt_t)(3 * MIB)); /* reserved, not promised */
    CU_ASSERT_TRUE(fcntl(e.fd, F_GETFD) & FD_CLOEXEC);
    CU_ASSERT_EQUAL(ftruncate(e.fd, 0), -1);
    CU_ASSERT_EQUAL(ftruncate(e.fd, (off_t)(32 * MIB)), -1);
    CU_ASSERT_EQUAL(fcntl(e.fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
    uint8_t *p = mmap(NULL, 3 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, e.fd, 0);
    CU_ASSERT_TRUE_FATAL(p != MAP_FAILED);
    uint64_t sum = 0;
    for (uint64_t i = 0; i < 3 * MIB; i++) {
        sum += p[i];
    }
    CU_ASSERT_EQUAL(sum, 0);
    memset(p, 7, 3 * MIB);
    /* An importer that does not let go keeps an empty file, not the memory. */
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 5, text), 0);
    CU_ASSERT_EQUAL(fstat(e.fd, &st), 0);
    CU_ASSERT_EQUAL(st.st_blocks, 0);
    CU_ASSERT_EQUAL(p[3 * MIB - 1], 0);
    munmap(p, 3 * MIB);
    close(e.fd);
    p = extent(5, 3 * MIB);
    CU_ASSERT_EQUAL(p[0], 0);
    munmap(p, 3 * MIB);
    stop();
}

static void test_budget_and_ids(void) {
    start(1 * MIB, 1);
    struct kvt_export e = {.fd = -7};
    munmap(extent(1, 512 * KIB), 512 * KIB);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 2, 512 * KIB + 4096, &e, text), -KVT_EQUOTA);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "516 KiB"));
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "512 KiB"));
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "1 MiB"));
    CU_ASSERT_EQUAL(ops->extent_create(driver, 2, UINT64_MAX / 4096 * 4096, &e, text), -KVT_EQUOTA);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 2, 100, &e, text), -KVT_EINVAL);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 2, 0, &e, text), -KVT_EINVAL);
    CU_ASSERT_EQUAL(ops->extent_create(driver, 0x10001, 4096, &e, text), -KVT_EEXIST);
    CU_ASSERT_EQUAL(e.fd, -7); /* written on success only */
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 0x10001, text), -KVT_ENOENT);
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 1, text), 0);
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 1, text), -KVT_ENOENT);
    munmap(extent(0x10001, 1 * MIB), 1 * MIB); /* all of it is free again */
    /* The former owner of the index is not served. */
    CU_ASSERT_EQUAL(copy(on_device(1, 0), on_host(0), 4096, 0), -KVT_EINVAL);
    CU_ASSERT_EQUAL(copy(on_device(0x10001, 0), on_host(0), 4096, 0), 0);
    CU_ASSERT_EQUAL(finish(1), 1);
    stop();
}

static void test_refuses_a_budget_above_the_machine(void) {
    struct kvt_driver_config c = {.budget_bytes = UINT64_MAX / 2};
    CU_ASSERT_EQUAL(ops->open(&c, &driver, &info, text), -KVT_ECONFIG);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "lower the device's budget"));
    c = (struct kvt_driver_config){.budget_bytes = MIB, .extent_kind = KVT_EXTENT_IPC};
    CU_ASSERT_EQUAL(ops->open(&c, &driver, &info, text), -KVT_ENOTSUP);
}

/* ---- copies ------------------------------------------------------------------------------------ */

static void check_copies(uint32_t copy_threads) {
    static const uint64_t sizes[] = {
        1, 3, 64, 4096, 64 * KIB, 64 * KIB + 1, 255 * KIB, MIB - 1, MIB + 12345, 9 * MIB + 7};
    start(32 * MIB, copy_threads);
    uint8_t *p = extent(3, 20 * MIB);
    for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        uint64_t n = sizes[i];
        scramble(arena, n + 200, i + 1);
        memset(p, 0, n + 200);
        /* Odd offsets on both sides; what lies beside the target stays as it was. */
        CU_ASSERT_EQUAL(copy(on_host(13), on_device(3, 77), n, i), 0);
        CU_ASSERT_EQUAL(finish(1), UINT64_C(1) << i);
        CU_ASSERT_EQUAL(memcmp(p + 77, arena + 13, n), 0);
        CU_ASSERT_EQUAL(p[76], 0);
        CU_ASSERT_EQUAL(p[77 + n], 0);
        /* And on: device to device, device to host, host to host. */
        CU_ASSERT_EQUAL(copy(on_device(3, 77), on_device(3, 10 * MIB + 5), n, 60), 0);
        CU_ASSERT_EQUAL(finish(1), UINT64_C(1) << 60);
        CU_ASSERT_EQUAL(copy(on_device(3, 10 * MIB + 5), on_host(20 * MIB + 1), n, 61), 0);
        CU_ASSERT_EQUAL(finish(1), UINT64_C(1) << 61);
        CU_ASSERT_EQUAL(copy(on_host(20 * MIB + 1), on_host(40 * MIB), n, 62), 0);
        CU_ASSERT_EQUAL(finish(1), UINT64_C(1) << 62);
        CU_ASSERT_EQUAL(memcmp(arena + 40 * MIB, arena + 13, n), 0);
    }
    munmap(p, 20 * MIB);
    stop();
}

static void test_copies_without_threads(void) {
    check_copies(0);
}

static void test_copies_with_one_thread(void) {
    check_copies(1);
}

static void test_copies_with_three_threads(void) {
    check_copies(3);
}

/* Tags are used again as soon as they come back, while the threads may still look at them. */
static void test_many_copies_in_flight(void) {
    enum { TAGS = 48, COPIES = 3000 };
    const uint64_t each = 512 * KIB;
    start(32 * MIB, 3);
    uint8_t *p = extent(9, TAGS * each);
    scramble(arena, TAGS * each, 42);
    uint64_t sizes[TAGS] = {0};
    uint64_t wrong = 0;
    uint32_t begun = 0;
    uint32_t ended = 0;
    uint64_t random = 7;
    while (ended < COPIES) {
        for (uint32_t tag = 0; tag < TAGS && begun < COPIES; tag++) {
            if (sizes[tag] == 0) {
                random = random * UINT64_C(6364136223846793005) + 1442695040888963407;
                sizes[tag] = 1 + (random >> 33) % each;
                p[tag * each] = (uint8_t)~arena[tag * each];
                p[tag * each + sizes[tag] - 1] = (uint8_t)~arena[tag * each + sizes[tag] - 1];
                wrong += copy(on_host(tag * each), on_device(9, tag * each), sizes[tag], tag) != 0;
                begun++;
            }
        }
        uint32_t tags[8];
        bool ok[8];
        int n = ops->poll(driver, tags, ok, 8);
        for (int i = 0; i < n; i++) {
            uint32_t tag = tags[i];
            wrong += sizes[tag] == 0 || !ok[i] ||
                     memcmp(p + tag * each, arena + tag * each, sizes[tag]) != 0;
            memset(p + tag * each, 0, sizes[tag]);
            sizes[tag] = 0;
            ended++;
        }
        if (n == 0) {
            ops->wait(driver, NULL, NULL, 0, KVT_FUTEX_FOREVER);
        }
    }
    CU_ASSERT_EQUAL(wrong, 0);
    munmap(p, TAGS * each);
    stop();
}

static void test_refuses_places_that_are_not_there(void) {
    start(32 * MIB, 2);
    uint8_t *p = extent(3, 1 * MIB);
    const struct {
        struct kvt_place source;
        struct kvt_place target;
        uint64_t bytes;
    } refused[] = {
        {on_host(0), on_device(3, 0), 1 * MIB + 1},     /* longer than the extent */
        {on_host(0), on_device(3, 1 * MIB - 10), 11},   /* over its end */
        {on_host(0), on_device(3, UINT64_MAX - 4), 16}, /* around the end of numbers */
        {on_host(0), on_device(3, 4096), UINT64_MAX},   /* the same with the length */
        {on_host(0), on_device(4, 0), 16},              /* no such extent */
        {on_host(0), on_device(0x10003, 0), 16},        /* another of the same index */
        {on_host(ARENA - 8), on_device(3, 0), 16},      /* over the arena's end */
        {on_host(UINT64_MAX - 4), on_device(3, 0), 16}, /* around */
        {on_host(0), {.tier = KVT_TIER_NVME}, 16},      /* not memory */
        {{.tier = 17}, on_device(3, 0), 16},            /* not anything */
        {on_host(0), on_host(10), 11},                  /* overlap */
        {on_device(3, 100), on_device(3, 50), 100},     /* overlap */
    };
    memset(p, 0x5a, 1 * MIB);
    for (unsigned i = 0; i < sizeof(refused) / sizeof(refused[0]); i++) {
        CU_ASSERT_EQUAL(copy(refused[i].source, refused[i].target, refused[i].bytes, 0),
                        -KVT_EINVAL);
    }
    CU_ASSERT_EQUAL(p[0], 0x5a);
    CU_ASSERT_EQUAL(p[1 * MIB - 1], 0x5a);
    uint32_t tag;
    bool ok;
    CU_ASSERT_EQUAL(ops->poll(driver, &tag, &ok, 1), 0);
    /* None of them left the extent pinned. */
    CU_ASSERT_EQUAL(ops->extent_destroy(driver, 3, text), 0);
    munmap(p, 1 * MIB);
    stop();
}

static void test_host_memory_comes_and_goes(void) {
    start(1 * MIB, 1);
    munmap(extent(3, 512 * KIB), 512 * KIB);
    CU_ASSERT_EQUAL(ops->host_removed(driver, 8192, 4096, text), 0);
    CU_ASSERT_EQUAL(copy(on_host(4096), on_device(3, 0), 4097, 0), -KVT_EINVAL);
    CU_ASSERT_EQUAL(copy(on_device(3, 0), on_host(12287), 2, 0), -KVT_EINVAL);
    CU_ASSERT_EQUAL(copy(on_host(0), on_device(3, 0), 512 * KIB, 0), -KVT_EINVAL);
    CU_ASSERT_EQUAL(copy(on_host(4096), on_device(3, 0), 4096, 0), 0);
    CU_ASSERT_EQUAL(finish(1), 1);
    CU_ASSERT_EQUAL(copy(on_host(12288), on_device(3, 0), 256 * KIB, 0), 0);
    CU_ASSERT_EQUAL(finish(1), 1);
    CU_ASSERT_EQUAL(ops->host_added(driver, 8192, 4096, text), 0);
    CU_ASSERT_EQUAL(copy(on_host(0), on_device(3, 0), 512 * KIB, 0), 0);
    CU_ASSERT_EQUAL(finish(1), 1);
    CU_ASSERT_EQUAL(ops->host_removed(driver, 0, ARENA, text), 0);
    CU_ASSERT_EQUAL(copy(on_host(ARENA - 1), on_device(3, 0), 1, 0), -KVT_EINVAL);
    CU_ASSERT_EQUAL(ops->host_added(driver, 0, ARENA + 4096, text), -KVT_EINVAL);
    CU_ASSERT_EQUAL(ops->host_added(driver, 100, 4096, text), -KVT_EINVAL);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "device cpu"));
    stop();
}

/* ---- the link ---------------------------------------------------------------------------------- */

/* Each time in all the budget that it may take, and nothing of it is left. */
static void check_measure(uint64_t budget_bytes, uint32_t copy_threads, bool measured) {
    struct kvt_link link = {7, 7};
    start(budget_bytes, copy_threads);
    CU_ASSERT_EQUAL(ops->measure(driver, &link, text), 0);
    if (measured) {
        CU_ASSERT_TRUE(link.to_bytes_per_s > 16 * MIB);
        CU_ASSERT_TRUE(link.to_bytes_per_s < UINT64_C(1) << 44);
        CU_ASSERT_TRUE(link.from_bytes_per_s > 16 * MIB);
    } else {
        CU_ASSERT_EQUAL(link.to_bytes_per_s, 0);
        CU_ASSERT_EQUAL(link.from_bytes_per_s, 0);
    }
    munmap(extent(1, budget_bytes), budget_bytes);
    stop();
}

static void test_measure(void) {
    check_measure(16 * MIB, 0, true);
    check_measure(16 * MIB, 2, true);
    check_measure(32 * MIB, 20, true);
    check_measure(MIB, 2, true);
    check_measure(MIB - 4096, 2, false); /* too little to say anything */
}

/* Memory is taken from the budget: what is not there is an error, and no crash. */
static void test_measure_without_memory(void) {
    struct kvt_link link = {7, 7};
    start(4 * MIB, 2);
    munmap(extent(2, 3 * MIB), 3 * MIB);
    CU_ASSERT_EQUAL(ops->measure(driver, &link, text), -KVT_EQUOTA);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "extent of 2 MiB wanted, 1 MiB left"));
    CU_ASSERT_EQUAL(link.to_bytes_per_s, 7); /* written on success only */
    munmap(extent(1, 1 * MIB), 1 * MIB);
    stop();
}

/* ---- posts and sleep --------------------------------------------------------------------------- */

static struct kvt_control_page page;

static void test_posts(void) {
    memset(&page, 0, sizeof(page));
    start(1 * MIB, 1);
    CU_ASSERT_EQUAL(ops->post(driver, 0, 3, 5, 9, 0), -KVT_ESTATE);
    CU_ASSERT_EQUAL(ops->page_added(driver, 65536, &page, text), -KVT_EINVAL);
    CU_ASSERT_EQUAL(ops->page_added(driver, 3, &page, text), 0);
    CU_ASSERT_EQUAL(ops->post(driver, 0, 3, 5, 9, 0), 0);
    CU_ASSERT_EQUAL(page.ready[5].value, 9);
    CU_ASSERT_EQUAL(page.ready[5].wake, 1);
    CU_ASSERT_EQUAL(ops->post(driver, 0, 4, 5, 10, 0), -KVT_ESTATE);
    ops->page_removed(driver, 3);
    CU_ASSERT_EQUAL(ops->post(driver, 0, 3, 5, 10, 0), -KVT_ESTATE);
    CU_ASSERT_EQUAL(page.ready[5].value, 9);
    stop();
}

/* A worker that answers each `ready` with `done`; the copy thread sleeps without a time limit. */
enum { TURNS = 20000 };

static void *answer(void *argument) {
    struct kvt_control_page *p = argument;
    for (uint64_t g = 1; g <= TURNS; g++) {
        struct kvt_counter *c = &p->ready[g % KVT_SLOTS_MAX];
        for (;;) {
            uint32_t seen = __atomic_load_n(&c->wake, __ATOMIC_SEQ_CST);
            __atomic_store_n(&c->waiters, 1, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&c->value, __ATOMIC_ACQUIRE) == g) {
                break;
            }
            kvt_futex_wait(&c->wake, seen, KVT_FUTEX_FOREVER, true);
        }
        __atomic_store_n(&c->waiters, 0, __ATOMIC_SEQ_CST);
        kvt_counter_post(&p->done[g % KVT_SLOTS_MAX], g);
    }
    return NULL;
}

static void play_turns(bool forbid_waitv, uint32_t turns) {
    pthread_t thread;
    memset(&page, 0, sizeof(page));
    start(1 * MIB, 1);
    kvt_futex_forbid_waitv(forbid_waitv);
    CU_ASSERT_EQUAL(ops->page_added(driver, 0, &page, text), 0);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, answer, &page), 0);
    for (uint64_t g = 1; g <= TURNS; g++) {
        const struct kvt_counter *counters[KVT_SLOTS_MAX];
        uint32_t seen[KVT_SLOTS_MAX];
        CU_ASSERT_EQUAL(ops->post(driver, 0, 0, (uint32_t)(g % KVT_SLOTS_MAX), g, 0), 0);
        for (;;) {
            for (uint32_t s = 0; s < KVT_SLOTS_MAX; s++) {
                counters[s] = &page.done[s];
                seen[s] = __atomic_load_n(&page.done[s].wake, __ATOMIC_SEQ_CST);
            }
            if (__atomic_load_n(&page.done[g % KVT_SLOTS_MAX].value, __ATOMIC_ACQUIRE) == g) {
                break;
            }
            /* After `turns` the fallback's patience would make the test long: spin then. */
            if (g <= turns) {
                ops->wait(driver, counters, seen, KVT_SLOTS_MAX, KVT_FUTEX_FOREVER);
            }
        }
    }
    pthread_join(thread, NULL);
    kvt_futex_forbid_waitv(false);
    for (uint32_t s = 0; s < KVT_SLOTS_MAX; s++) {
        CU_ASSERT_EQUAL(page.done[s].waiters, 0);
    }
    stop();
}

static void test_no_store_is_lost(void) {
    play_turns(false, TURNS);
}

static void test_no_store_is_lost_without_waitv(void) {
    play_turns(true, 1000);
}

static void *wake_later(void *unused) {
    (void)unused;
    ops->wake(driver);
    return NULL;
}

static void test_wake_ends_this_wait_or_the_next(void) {
    start(1 * MIB, 1);
    ops->wake(driver);
    ops->wait(driver, NULL, NULL, 0, KVT_FUTEX_FOREVER);
    for (unsigned i = 0; i < 500; i++) {
        pthread_t thread;
        CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, wake_later, NULL), 0);
        ops->wait(driver, NULL, NULL, 0, KVT_FUTEX_FOREVER);
        pthread_join(thread, NULL);
    }
    ops->wait(driver, NULL, NULL, 0, 1000); /* nobody wakes: the time does */
    /* More counters than the kernel can watch: looks again by itself. */
    static struct kvt_counter many[300];
    const struct kvt_counter *counters[300];
    uint32_t seen[300] = {0};
    for (unsigned i = 0; i < 300; i++) {
        counters[i] = &many[i];
    }
    ops->wait(driver, counters, seen, 300, KVT_FUTEX_FOREVER);
    CU_ASSERT_EQUAL(many[0].waiters, 0);
    stop();
}

int main(void) {
    CU_TestInfo tests[] = {
        {"info", test_info},
        {"extents are private, sealed, zeroed and there",
         test_extents_are_private_sealed_zeroed_and_there},
        {"budget and ids", test_budget_and_ids},
        {"refuses a budget above the machine", test_refuses_a_budget_above_the_machine},
        {"copies without threads", test_copies_without_threads},
        {"copies with one thread", test_copies_with_one_thread},
        {"copies with three threads", test_copies_with_three_threads},
        {"many copies in flight", test_many_copies_in_flight},
        {"refuses places that are not there", test_refuses_places_that_are_not_there},
        {"host memory comes and goes", test_host_memory_comes_and_goes},
        {"measure", test_measure},
        {"measure without memory", test_measure_without_memory},
        {"posts", test_posts},
        {"no store is lost", test_no_store_is_lost},
        {"no store is lost without FUTEX_WAITV", test_no_store_is_lost_without_waitv},
        {"wake ends this wait or the next", test_wake_ends_this_wait_or_the_next},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("cpu driver", tests);
}
