/* The loop: epoll, timers on the monotonic clock, one thread. Everything of the daemon that is not
 * a copy or a blocking call of a device happens in its callbacks, which never block.
 *
 * A watch belongs to the one who adds it and lives until it is removed. A watch may be removed in
 * any callback; its own callback is not called again, not even for an event of the same batch.
 */
#ifndef KVT_DAEMON_LOOP_H
#define KVT_DAEMON_LOOP_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>

#define KVT_LOOP_BATCH 64

struct kvt_watch {
    void (*ready)(void *context, uint32_t events); /* EPOLLIN, EPOLLOUT, EPOLLHUP ... */
    void *context;
    int fd; /* borrowed; -1: not added */
};

struct kvt_timer {
    void (*fire)(void *context, uint64_t now_ms);
    void *context;
    uint64_t deadline_ms; /* UINT64_MAX: not set. Cleared before fire is called */
    struct kvt_timer *next;
};

struct kvt_loop {
    int epoll_fd;
    int timer_fd;
    struct kvt_watch timer_watch;
    struct kvt_timer *timers;
    uint64_t armed_ms; /* what timer_fd is set to */
    struct epoll_event batch[KVT_LOOP_BATCH];
    int batch_count;
    int batch_at;
    bool stop;
};

/* 0 or -KVT_ESYS with errno. */
int kvt_loop_init(struct kvt_loop *l) __attribute__((warn_unused_result));
void kvt_loop_destroy(struct kvt_loop *l);

/* `w` has ready and context set. 0 or -KVT_ESYS with errno. */
int kvt_loop_add(struct kvt_loop *l, struct kvt_watch *w, int fd, uint32_t events)
    __attribute__((warn_unused_result));
void kvt_loop_change(struct kvt_loop *l, struct kvt_watch *w, uint32_t events);
/* Does not close the fd. A watch that was not added is left alone. */
void kvt_loop_remove(struct kvt_loop *l, struct kvt_watch *w);

/* Timers are added once, at start, with fire and context set. */
void kvt_loop_add_timer(struct kvt_loop *l, struct kvt_timer *t);

/* Until kvt_loop_stop. `before` is called when something has happened, before anybody hears of it;
 * `after` when all have heard, before the loop sleeps. */
void kvt_loop_run(struct kvt_loop *l, void (*before)(void *context), void (*after)(void *context),
                  void *context);
void kvt_loop_stop(struct kvt_loop *l);

uint64_t kvt_now_ms(void); /* CLOCK_MONOTONIC: never jumps, stands still in suspend */
uint64_t kvt_now_ns(void);

#endif
