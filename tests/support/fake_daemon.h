/* A daemon for the client library's tests, in a thread of the test: attach socket, ROUTER, control
 * page, ring and extents are real, what it answers is up to the test. One client at a time, except
 * that connections after the first are welcomed as well (the latest one gets what is sent).
 */
#ifndef KVT_TESTS_FAKE_DAEMON_H
#define KVT_TESTS_FAKE_DAEMON_H

#include "proto/attach.h"
#include "proto/control_page.h"
#include "proto/errors.h"
#include "proto/kvtier.pb-c.h"
#include "proto/schedule.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FAKE_EPOCH      UINT64_C(0x1122334455667788)
#define FAKE_RING_BYTES 65536
#define FAKE_EXTENTS    16

struct fake_extent {
    uint32_t id;
    int fd;
    uint8_t *memory;
    uint64_t bytes;
};

struct fake_daemon {
    char dir[100];
    struct kvt_attach_welcome welcome; /* as it will be sent; change it before attaching */
    uint32_t refuse_code;              /* not 0: REFUSE with this */
    int fds_sent;                      /* 2; fewer or more to see it refused */
    bool mute;                         /* accepts, and does not answer HELLO */

    struct kvt_control_page *page;
    uint8_t *ring;
    struct fake_extent extents[FAKE_EXTENTS];
    uint32_t extent_count;

    /* Fills the reply; false: no answer. Runs in the fake's thread. NULL: fake_answer. */
    bool (*answer)(struct fake_daemon *f, const Kvt__Request *q, Kvt__Reply *r);
    int ignore;           /* so many requests are left unanswered first */
    uint32_t requests;    /* received */
    uint64_t sequence;    /* of the last one */
    uint32_t repeats;     /* requests whose sequence had come before */
    uint64_t reply_epoch; /* FAKE_EPOCH */
    uint32_t reply_extra; /* not 0: the reply has another frame */
    bool reply_garbage;

    /* STEP and ACQUIRE are answered with this. */
    uint64_t first_step;
    uint32_t steps;
    uint64_t ring_offset;
    uint64_t ring_bytes;
    uint32_t lengths[8];
    uint32_t length_count;
    uint32_t step_code; /* not 0: STEP fails with this */

    uint32_t last_body;
    uint32_t last_rows;     /* rows of the last STEP */
    uint64_t abort_first;   /* first_step of the last ABORT; 0: there was none */
    bool abort_before_step; /* `step` had been posted before `failed` was set: a mistake */

    pthread_mutex_t lock; /* held while anything is answered; guards what follows */
    uint32_t reclaimed[64];
    uint32_t reclaimed_session[64];
    uint32_t reclaimed_count;
    uint32_t hellos;
    struct kvt_attach_hello hello;

    int listen_fd;
    int connection;
    int wake_fd;
    bool stop;
    void *context;
    void *router;
    pthread_t thread;
};

/* What the fake's thread wrote is seen behind this call, and what the test wrote before it is seen by
 * the fake's thread when it answers the next request or packet. */
void fake_sync(struct fake_daemon *f);
/* An assignment that the fake's thread sees when it answers next. */
#define FAKE_SET(f, assignment)                 \
    do {                                        \
        (void)pthread_mutex_lock(&(f)->lock);   \
        assignment;                             \
        (void)pthread_mutex_unlock(&(f)->lock); \
    } while (0)
/* Makes a directory and begins to answer. */
void fake_start(struct fake_daemon *f);
void fake_stop(struct fake_daemon *f);
/* Closes the connection, as a dying daemon does. */
void fake_hangup(struct fake_daemon *f);
/* The default answers. */
bool fake_answer(struct fake_daemon *f, const Kvt__Request *q, Kvt__Reply *r);

/* Makes an extent and passes it to the client. Returns its memory. */
uint8_t *fake_extent(struct fake_daemon *f, uint32_t id, uint64_t bytes);
void fake_send_extent(struct fake_daemon *f, uint32_t id, uint64_t bytes, int fd, uint32_t session);
void fake_reclaim(struct fake_daemon *f, uint32_t session, uint32_t id);
/* ... and keep its addresses. */
void fake_reclaim_keep(struct fake_daemon *f, uint32_t session, uint32_t id);
/* Forgets what was given back so far. */
void fake_reclaimed_forget(struct fake_daemon *f);
void fake_send_bytes(struct fake_daemon *f, const void *bytes, size_t size);
/* Whether RECLAIMED for it comes within the time. */
bool fake_reclaimed(struct fake_daemon *f, uint32_t session, uint32_t id, int timeout_ms);

/* Posts as the daemon does: value, wake word, futex. */
void fake_post(struct kvt_counter *c, uint64_t value);
bool fake_await(const struct kvt_counter *c, uint64_t value, int timeout_ms);
void fake_sleep_ms(int ms);

/* ---- schedules -------------------------------------------------------------------------------- */

/* Arrays to be filled and written into the ring by fake_schedule. */
struct fake_schedule {
    uint32_t cache;
    uint64_t first_step;
    uint32_t steps_count;
    struct kvt_sched_step steps[8];
    uint32_t moves_count;
    uint32_t moves_leading;
    struct kvt_sched_move moves[8];
    uint32_t pieces_count;
    struct kvt_sched_piece pieces[32];
    uint32_t runs_count;
    struct kvt_sched_run runs[32];
    uint32_t rows_count;
    uint32_t rows[32];
};

/* Writes it at `at` and returns its bytes. */
uint32_t fake_schedule_write(const struct fake_schedule *s, uint8_t *at);
/* Writes it at the ring's begin and makes STEP answer with it; rows have `length` tokens. */
void fake_schedule(struct fake_daemon *f, const struct fake_schedule *s, uint32_t rows,
                   uint32_t length);

#endif
