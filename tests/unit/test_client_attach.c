/* Attaching to a fake daemon in every way that can go wrong, and the requests that follow. */
#include "client/kvtier.h"
#include "client/lib/client.h"
#include "tests/support/cunit_run.h"
#include "tests/support/fake_daemon.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static struct fake_daemon fake;
static struct kvt_client *client;

static int attach(int timeout_ms, int request_timeout_ms) {
    struct kvt_attach_options o = {.runtime_dir = fake.dir,
                                   .worker = KVT_SEGMENT,
                                   .name = "tester",
                                   .timeout_ms = timeout_ms,
                                   .request_timeout_ms = request_timeout_ms};
    int rc = kvt_attach(&o, &client);
    fake_sync(&fake);
    return rc;
}

static void detach_and_stop(void) {
    kvt_detach(client);
    client = NULL;
    fake_stop(&fake);
}

static bool message_has(const char *what) {
    bool has = strstr(kvt_error_message(client), what) != NULL;
    if (!has) {
        (void)printf("\n    message: %s\n", kvt_error_message(client));
    }
    return has;
}

/* Open descriptors; of those that exec would pass on with `inheritable`. */
static int count_fds(bool inheritable) {
    int n = 0;
    for (int fd = 0; fd < 256; fd++) {
        int flags = fcntl(fd, F_GETFD);
        n += flags != -1 && (!inheritable || (flags & FD_CLOEXEC) == 0);
    }
    return n;
}

static uint32_t count_extents(void) {
    (void)pthread_mutex_lock(&client->extents.lock);
    uint32_t n = client->extents.count;
    (void)pthread_mutex_unlock(&client->extents.lock);
    return n;
}

/* ---- the handshake ---------------------------------------------------------------------------- */

static void test_attach_and_ping(void) {
    double us = -1;
    fake_start(&fake);
    int before = count_fds(false);
    int inheritable = count_fds(true);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    CU_ASSERT_STRING_EQUAL(fake.hello.name, "tester");
    CU_ASSERT_EQUAL(fake.hello.worker_kind, KVT_SEGMENT);
    CU_ASSERT_EQUAL(fake.hello.role, KVT_ROLE_WORKER);
    CU_ASSERT_EQUAL(fake.hello.protocol_major, KVT_PROTOCOL_MAJOR);
    CU_ASSERT_EQUAL(kvt_ping(client, &us), 0);
    CU_ASSERT(us > 0 && us < 5e6);
    (void)fake_extent(&fake, 7, 4096);
    for (int i = 0; i < 1000 && count_extents() == 0; i++) {
        fake_sleep_ms(1);
    }
    CU_ASSERT_EQUAL(count_extents(), 1); /* received, not mapped: its descriptor is open */
    CU_ASSERT_EQUAL(count_fds(true), inheritable);
    kvt_detach(client);
    client = NULL;
    fake_sleep_ms(50);
    /* Of the fake: its end of the extent, and the connection until its thread has closed it. */
    CU_ASSERT(count_fds(false) <= before + 2);
    fake_stop(&fake);
}

static void test_no_daemon(void) {
    struct kvt_attach_options o = {
        .runtime_dir = "/nonexistent", .worker = KVT_SEGMENT, .timeout_ms = 100};
    uint64_t start_ns = kvt_client_now_ns();
    CU_ASSERT_EQUAL(kvt_attach(&o, &client), -KVT_EGONE);
    CU_ASSERT(kvt_client_now_ns() - start_ns >= 100000000);
    CU_ASSERT(message_has("/nonexistent/attach.sock: No such file"));
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_ESTATE);
    CU_ASSERT(message_has("not attached"));
    kvt_detach(client);
}

static void test_long_path(void) {
    char dir[300];
    memset(dir, 'd', sizeof dir);
    dir[0] = '/';
    dir[sizeof dir - 1] = '\0';
    struct kvt_attach_options o = {.runtime_dir = dir, .worker = KVT_SEGMENT};
    CU_ASSERT_EQUAL(kvt_attach(&o, &client), -KVT_EINVAL);
    CU_ASSERT(message_has("has 311 bytes; at most 107"));
    kvt_detach(client);
}

static void test_options(void) {
    struct kvt_attach_options o = {.runtime_dir = "/nonexistent", .worker = 3};
    CU_ASSERT_EQUAL(kvt_attach(&o, &client), -KVT_EINVAL);
    CU_ASSERT(message_has("worker is 3; accepted is KVT_SEGMENT (1) or KVT_DENSE (2)"));
    kvt_detach(client);
}

static void test_runtime_dir_from_environment(void) {
    struct kvt_attach_options o = {.worker = KVT_DENSE};
    fake_start(&fake);
    (void)setenv("KVTIER_RUNTIME_DIR", fake.dir, 1);
    CU_ASSERT_EQUAL(kvt_attach(&o, &client), 0);
    (void)unsetenv("KVTIER_RUNTIME_DIR");
    detach_and_stop();
}

static void *start_late(void *argument) {
    (void)argument;
    fake_sleep_ms(100);
    FAKE_SET(&fake, fake.refuse_code = 0);
    return NULL;
}

static void test_refused(void) {
    fake_start(&fake);
    FAKE_SET(&fake, fake.refuse_code = KVT_EVERSION);
    CU_ASSERT_EQUAL(attach(1000, 0), -KVT_EVERSION);
    CU_ASSERT(message_has("the fake refuses (this library speaks protocol 1.0, the daemon 7.3)"));
    kvt_detach(client);
    FAKE_SET(&fake, fake.refuse_code = KVT_EBUSY);
    CU_ASSERT_EQUAL(attach(1000, 0), -KVT_EBUSY);
    CU_ASSERT(message_has("attach: refused: the fake refuses"));
    kvt_detach(client);
    FAKE_SET(&fake, fake.refuse_code = 4711);
    CU_ASSERT_EQUAL(attach(1000, 0), -KVT_EPROTO);
    detach_and_stop();
}

/* A daemon that is stopping, or not quite there, says EGONE: it is waited for. */
static void test_wait_for_daemon(void) {
    pthread_t thread;
    fake_start(&fake);
    FAKE_SET(&fake, fake.refuse_code = KVT_EGONE);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, start_late, NULL), 0);
    CU_ASSERT_EQUAL(attach(10000, 0), 0);
    (void)pthread_join(thread, NULL);
    CU_ASSERT(fake.hellos > 1);
    detach_and_stop();
}

static void test_mute(void) {
    fake_start(&fake);
    FAKE_SET(&fake, fake.mute = true);
    CU_ASSERT_EQUAL(attach(100, 0), -KVT_ETIMEDOUT);
    CU_ASSERT(message_has("did not answer in time"));
    detach_and_stop();
}

static void welcome_wrong(const char *what) {
    fake_sync(&fake);
    CU_ASSERT_NOT_EQUAL(attach(300, 0), 0);
    CU_ASSERT(message_has(what));
    detach_and_stop();
}

static void test_welcome_wrong(void) {
    fake_start(&fake);
    FAKE_SET(&fake, fake.welcome.protocol_major = 2);
    welcome_wrong("the daemon speaks protocol 2.0, this library 1.0");
    fake_start(&fake);
    FAKE_SET(&fake, fake.welcome.control_page_bytes = 4096);
    welcome_wrong("a control page of 4096 bytes");
    fake_start(&fake);
    FAKE_SET(&fake, fake.welcome.ring_bytes = FAKE_RING_BYTES + 1);
    welcome_wrong("cannot be mapped");
    fake_start(&fake);
    FAKE_SET(&fake, fake.fds_sent = 1);
    welcome_wrong("WELCOME with 1 fds");
    fake_start(&fake);
    FAKE_SET(&fake, fake.fds_sent = 3);
    welcome_wrong("malformed");
    fake_start(&fake);
    (void)snprintf(fake.welcome.endpoint, 128, "tcp://127.0.0.1:1");
    welcome_wrong("takes ipc:// only");
    fake_start(&fake);
    FAKE_SET(&fake, fake.welcome.head.type = KVT_ATTACH_RECLAIMED);
    welcome_wrong("malformed");
    fake_start(&fake);
    FAKE_SET(&fake, fake.welcome.head.bytes = 351);
    welcome_wrong("malformed");
}

/* ---- packets while attached ------------------------------------------------------------------- */

static bool soon_gone(void) {
    for (int i = 0; i < 3000 && !kvt_client_is_gone(client); i++) {
        fake_sleep_ms(1);
    }
    return kvt_client_is_gone(client);
}

/* The library's thread says first that the session is over, then poisons the page. */
static bool soon_poisoned(const struct kvt_counter *counter) {
    for (int i = 0; i < 3000 && kvt_client_counter_read(counter) != KVT_POISON; i++) {
        fake_sleep_ms(1);
    }
    return kvt_client_counter_read(counter) == KVT_POISON;
}

static void test_hangup(void) {
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    fake_hangup(&fake);
    CU_ASSERT(soon_gone());
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EGONE);
    CU_ASSERT(message_has("session 5: the daemon ended the session or died"));
    CU_ASSERT(soon_poisoned(&client->page->ready[9]));
    detach_and_stop();
}

static void packet_wrong(const void *bytes, size_t size) {
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    fake_send_bytes(&fake, bytes, size);
    CU_ASSERT(soon_gone());
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EGONE);
    CU_ASSERT(message_has("does not understand"));
    detach_and_stop();
}

static void test_packets_wrong(void) {
    struct kvt_attach_reclaim r = {
        .head = {.magic = KVT_ATTACH_MAGIC, .type = KVT_ATTACH_RECLAIM, .bytes = sizeof r}};
    uint8_t longest[KVT_ATTACH_PACKET_BYTES_MAX + 1] = {0};
    packet_wrong("x", 1);
    packet_wrong(longest, sizeof longest);
    r.head.magic++;
    packet_wrong(&r, sizeof r);
    r.head.magic--;
    r.head.bytes++;
    packet_wrong(&r, sizeof r);
    r.head.bytes--;
    r.head.type = KVT_ATTACH_EXTENT; /* of another size */
    packet_wrong(&r, sizeof r);
    struct kvt_attach_extent e = {
        .head = {.magic = KVT_ATTACH_MAGIC, .type = KVT_ATTACH_EXTENT, .bytes = sizeof e},
        .session = 5,
        .kind = KVT_EXTENT_FD,
        .bytes = 4096}; /* without its fd */
    packet_wrong(&e, sizeof e);
}

static void test_reclaim_unknown(void) {
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    fake_reclaim(&fake, 5, 1234);  /* never passed, or given back already */
    fake_reclaim(&fake, 99, 1234); /* a former session, of which nothing is left */
    CU_ASSERT(fake_reclaimed(&fake, 5, 1234, 3000));
    CU_ASSERT(fake_reclaimed(&fake, 99, 1234, 3000));
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), 0);
    detach_and_stop();
}

/* The process lives on, so the daemon is told extent by extent. */
static void test_detach_gives_back(void) {
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    (void)fake_extent(&fake, 7, 4096);
    (void)fake_extent(&fake, 8, 4096);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), 0);
    kvt_detach(client);
    client = NULL;
    CU_ASSERT(fake_reclaimed(&fake, 5, 7, 3000));
    CU_ASSERT(fake_reclaimed(&fake, 5, 8, 3000));
    fake_stop(&fake);
}

/* The former session's client is still there: what it maps is unmapped through the later one. */
static void test_reclaim_of_former_session(void) {
    struct kvt_client *former;
    void *address;
    uint64_t bytes;
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    former = client;
    (void)fake_extent(&fake, 7, 4096);
    (void)fake_extent(&fake, 8, 4096);
    CU_ASSERT_EQUAL(kvt_client_extents_pin(&former->extents, 7, 3000, &address, &bytes), 0);
    CU_ASSERT_EQUAL(kvt_client_extents_pin(&former->extents, 8, 3000, &address, &bytes), 0);
    fake_hangup(&fake);
    CU_ASSERT(soon_gone());
    FAKE_SET(&fake, fake.welcome.session = 6);
    CU_ASSERT_EQUAL_FATAL(attach(3000, 0), 0);
    fake_reclaim(&fake, 5, 8);
    CU_ASSERT_FALSE(fake_reclaimed(&fake, 5, 8, 150)); /* an open step uses it */
    (void)kvt_client_extents_unpin(&former->extents, 0);
    CU_ASSERT(fake_reclaimed(&fake, 5, 8, 3000));
    fake_reclaim(&fake, 5, 7);
    CU_ASSERT(fake_reclaimed(&fake, 5, 7, 3000));
    CU_ASSERT_EQUAL(former->extents.count, 0);
    kvt_detach(former);
    detach_and_stop();
}

/* ---- requests --------------------------------------------------------------------------------- */

static void test_sent_again(void) {
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 10000), 0);
    FAKE_SET(&fake, fake.ignore = 2);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), 0);
    fake_sync(&fake);
    CU_ASSERT_EQUAL(fake.requests, 3);
    CU_ASSERT_EQUAL(fake.repeats, 2); /* with the same sequence */
    detach_and_stop();
}

static void test_silence(void) {
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 300), 0);
    FAKE_SET(&fake, fake.ignore = 1000);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EGONE);
    CU_ASSERT(message_has("PING: the daemon did not answer for 300 ms"));
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EGONE);
    CU_ASSERT(message_has("left a request unanswered"));
    detach_and_stop();
}

static void *hang_up_soon(void *argument) {
    (void)argument;
    fake_sleep_ms(50);
    fake_hangup(&fake);
    return NULL;
}

static void test_hangup_ends_request(void) {
    pthread_t thread;
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    FAKE_SET(&fake, fake.ignore = 1000);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, hang_up_soon, NULL), 0);
    uint64_t start_ns = kvt_client_now_ns();
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EGONE);
    CU_ASSERT(kvt_client_now_ns() - start_ns < UINT64_C(900000000)); /* not the next repeat */
    (void)pthread_join(thread, NULL);
    detach_and_stop();
}

static void test_other_epoch(void) {
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    FAKE_SET(&fake, fake.reply_epoch = FAKE_EPOCH + 1);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EGONE);
    CU_ASSERT(message_has("the daemon was restarted"));
    detach_and_stop();
}

static bool answer_stale(struct fake_daemon *f, const Kvt__Request *q, Kvt__Reply *r) {
    if (f->requests == 1) {
        r->sequence--; /* an answer to something else: it is dropped */
    }
    return fake_answer(f, q, r);
}

static bool answer_error(struct fake_daemon *f, const Kvt__Request *q, Kvt__Reply *r) {
    (void)f;
    r->code = (uint32_t)(q->sequence == 1 ? KVT_EQUOTA : 999);
    r->text = (char *)(uintptr_t) "host: 3 GiB needed, 1 GiB in the budget";
    return true;
}

static void test_replies(void) {
    fake_start(&fake);
    FAKE_SET(&fake, fake.answer = answer_stale);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), 0);
    fake_sync(&fake);
    CU_ASSERT_EQUAL(fake.requests, 2);
    detach_and_stop();

    fake_start(&fake);
    FAKE_SET(&fake, fake.answer = answer_error);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EQUOTA);
    CU_ASSERT_STRING_EQUAL(kvt_error_message(client), "host: 3 GiB needed, 1 GiB in the budget");
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EPROTO); /* a code of a later version */
    detach_and_stop();

    fake_start(&fake);
    FAKE_SET(&fake, fake.reply_extra = 1);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EPROTO);
    CU_ASSERT(message_has("several frames"));
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EGONE);
    detach_and_stop();

    fake_start(&fake);
    FAKE_SET(&fake, fake.reply_garbage = true);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EPROTO);
    CU_ASSERT(message_has("malformed"));
    detach_and_stop();
}

static void test_two_daemons(void) {
    static struct fake_daemon second;
    struct kvt_client *other;
    fake_start(&fake);
    fake_start(&second);
    FAKE_SET(&second, second.welcome.token[0] ^= 1);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    struct kvt_attach_options o = {.runtime_dir = second.dir, .worker = KVT_DENSE};
    CU_ASSERT_EQUAL_FATAL(kvt_attach(&o, &other), 0);
    CU_ASSERT_EQUAL(kvt_ping(other, NULL), 0);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), 0);
    fake_hangup(&fake);
    CU_ASSERT(soon_gone());
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), -KVT_EGONE);
    CU_ASSERT_EQUAL(kvt_ping(other, NULL), 0);
    CU_ASSERT_STRING_EQUAL(kvt_error_message(other), "");
    kvt_detach(other);
    fake_stop(&second);
    detach_and_stop();
}

/* A child has no mappings and must not speak for its parent. */
static void test_fork(void) {
    int status = -1;
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    pid_t child = fork();
    if (child == 0) {
        int rc = kvt_ping(client, NULL);
        kvt_detach(client);
        _exit(rc == -KVT_ESTATE ? 0 : 1);
    }
    CU_ASSERT_EQUAL(waitpid(child, &status, 0), child);
    CU_ASSERT_EQUAL(status, 0);
    CU_ASSERT_EQUAL(kvt_ping(client, NULL), 0);
    detach_and_stop();
}

static bool connected(void) {
    (void)pthread_mutex_lock(&fake.lock);
    bool yes = fake.connection >= 0;
    (void)pthread_mutex_unlock(&fake.lock);
    return yes;
}

/* A child that lives on holds the socket, too; the session ends all the same. */
static void test_detach_with_child(void) {
    fake_start(&fake);
    CU_ASSERT_EQUAL_FATAL(attach(0, 0), 0);
    pid_t child = fork();
    if (child == 0) {
        (void)alarm(30);
        for (;;) {
            (void)pause();
        }
    }
    CU_ASSERT_FATAL(child > 0);
    CU_ASSERT(connected());
    kvt_detach(client);
    client = NULL;
    for (int ms = 0; ms < 2000 && connected(); ms++) {
        fake_sleep_ms(1);
    }
    CU_ASSERT_FALSE(connected());
    (void)kill(child, SIGKILL);
    CU_ASSERT_EQUAL(waitpid(child, NULL, 0), child);
    fake_stop(&fake);
}

int main(void) {
    CU_TestInfo tests[] = {{"attach and ping", test_attach_and_ping},
                           {"no daemon", test_no_daemon},
                           {"long path", test_long_path},
                           {"options", test_options},
                           {"directory from the environment", test_runtime_dir_from_environment},
                           {"refused", test_refused},
                           {"wait for the daemon", test_wait_for_daemon},
                           {"no answer to HELLO", test_mute},
                           {"wrong WELCOME", test_welcome_wrong},
                           {"hang-up", test_hangup},
                           {"wrong packets", test_packets_wrong},
                           {"RECLAIM of nothing", test_reclaim_unknown},
                           {"detach gives extents back", test_detach_gives_back},
                           {"RECLAIM of a former session", test_reclaim_of_former_session},
                           {"a request is sent again", test_sent_again},
                           {"silence", test_silence},
                           {"hang-up ends a request", test_hangup_ends_request},
                           {"another epoch", test_other_epoch},
                           {"replies", test_replies},
                           {"two daemons", test_two_daemons},
                           {"fork", test_fork},
                           {"detach while a child lives", test_detach_with_child},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("client attach", tests);
}
