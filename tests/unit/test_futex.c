/* Bell and futexes: no ring and no store is lost, whoever is faster. The waits here have no time limit
 * of their own, so a lost one hangs until the runner ends it. */
#include "tests/support/cunit_run.h"
#include "tiers/host/bell.h"
#include "tiers/host/futex.h"

#include <CUnit/Basic.h>
#include <pthread.h>
#include <time.h>

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void test_waits_end_in_time(void) {
    uint32_t words[3] = {1, 2, 3};
    struct kvt_futex_watch watches[3];
    for (unsigned i = 0; i < 3; i++) {
        watches[i] =
            (struct kvt_futex_watch){.word = &words[i], .seen = words[i], .shared = i % 2 == 1};
    }
    uint64_t begin = now_us();
    kvt_futex_wait(&words[0], 1, 2000, false);
    CU_ASSERT_TRUE(now_us() - begin >= 2000);
    begin = now_us();
    kvt_futex_wait_any(watches, 3, 2000);
    CU_ASSERT_TRUE(now_us() - begin >= 2000);
    begin = now_us();
    kvt_futex_wait_any(watches, 1, 2000);
    CU_ASSERT_TRUE(now_us() - begin >= 2000);
    /* A word that has changed already: no sleep, or the test's time limit ends it. */
    kvt_futex_wait(&words[0], 0, KVT_FUTEX_FOREVER, false);
    watches[2].seen = 7;
    kvt_futex_wait_any(watches, 3, KVT_FUTEX_FOREVER);
    kvt_futex_forbid_waitv(true);
    kvt_futex_wait_any(watches, 3, KVT_FUTEX_FOREVER);
    watches[2].seen = 3;
    kvt_futex_wait_any(watches, 3, KVT_FUTEX_FOREVER); /* looks again after a while */
    kvt_futex_forbid_waitv(false);
}

/* Two threads take turns; each rings the other's bell. */
enum { TURNS = 20000 };
struct players {
    struct kvt_bell bells[2];
    uint32_t turn; /* atomic */
};

static void play(struct players *p, uint32_t me) {
    for (uint32_t i = 0; i < TURNS; i++) {
        for (;;) {
            uint32_t seen = kvt_bell_rings(&p->bells[me]);
            if (__atomic_load_n(&p->turn, __ATOMIC_ACQUIRE) % 2 == me) {
                break;
            }
            kvt_bell_wait(&p->bells[me], seen, KVT_FUTEX_FOREVER);
        }
        __atomic_add_fetch(&p->turn, 1, __ATOMIC_RELEASE);
        kvt_bell_ring(&p->bells[1 - me], 1);
    }
}

static void *play_second(void *argument) {
    play(argument, 1);
    return NULL;
}

static void test_no_ring_is_lost(void) {
    struct players p = {0};
    pthread_t thread;
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, play_second, &p), 0);
    play(&p, 0);
    pthread_join(thread, NULL);
    CU_ASSERT_EQUAL(p.turn, 2 * TURNS);
}

/* One waits on all words, the other changes one of them, each time another. */
enum { WORDS = 100, CHANGES = 5000 };
static uint32_t board[WORDS];
static uint32_t answered;

static void *change_words(void *unused) {
    (void)unused;
    for (uint32_t i = 0; i < CHANGES; i++) {
        uint32_t *word = &board[i * 37 % WORDS];
        __atomic_add_fetch(word, 1, __ATOMIC_SEQ_CST);
        kvt_futex_wake(word, 1, true);
        uint32_t seen;
        while ((seen = __atomic_load_n(&answered, __ATOMIC_SEQ_CST)) != i + 1) {
            kvt_futex_wait(&answered, seen, KVT_FUTEX_FOREVER, false);
        }
    }
    return NULL;
}

static void test_wait_any_sees_each_word(void) {
    pthread_t thread;
    uint32_t seen[WORDS] = {0};
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, change_words, NULL), 0);
    for (uint32_t changes = 0; changes < CHANGES;) {
        struct kvt_futex_watch watches[WORDS];
        for (uint32_t w = 0; w < WORDS; w++) {
            watches[w] =
                (struct kvt_futex_watch){.word = &board[w], .seen = seen[w], .shared = true};
        }
        kvt_futex_wait_any(watches, WORDS, KVT_FUTEX_FOREVER);
        for (uint32_t w = 0; w < WORDS; w++) {
            uint32_t value = __atomic_load_n(&board[w], __ATOMIC_SEQ_CST);
            if (value != seen[w]) {
                seen[w] = value;
                changes++;
                __atomic_store_n(&answered, changes, __ATOMIC_SEQ_CST);
                kvt_futex_wake(&answered, 1, false);
            }
        }
    }
    pthread_join(thread, NULL);
    CU_ASSERT_EQUAL(answered, CHANGES);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"waits end in time", test_waits_end_in_time},
        {"no ring is lost", test_no_ring_is_lost},
        {"wait_any sees each word", test_wait_any_sees_each_word},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("futex", tests);
}
