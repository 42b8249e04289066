#include "daemon/loop.h"
#include "proto/errors.h"
#include "tiers/engine/assert.h"

#include <errno.h>
#include <string.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

uint64_t kvt_now_ns(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t kvt_now_ms(void) {
    return kvt_now_ns() / 1000000u;
}

static void timer_ready(void *context, uint32_t events) {
    struct kvt_loop *l = context;
    uint64_t count;
    ssize_t n = read(l->timer_fd, &count, sizeof(count));
    (void)n; /* what is due is found by looking at every timer */
    (void)events;
    l->armed_ms = UINT64_MAX;
}

int kvt_loop_init(struct kvt_loop *l) {
    memset(l, 0, sizeof(*l));
    l->armed_ms = UINT64_MAX;
    l->timer_fd = -1;
    l->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (l->epoll_fd < 0) {
        return -KVT_ESYS;
    }
    l->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    l->timer_watch = (struct kvt_watch){.ready = timer_ready, .context = l, .fd = -1};
    if (l->timer_fd < 0 || kvt_loop_add(l, &l->timer_watch, l->timer_fd, EPOLLIN) != 0) {
        kvt_loop_destroy(l);
        return -KVT_ESYS;
    }
    return 0;
}

void kvt_loop_destroy(struct kvt_loop *l) {
    if (l->timer_fd >= 0) {
        (void)close(l->timer_fd);
    }
    if (l->epoll_fd >= 0) {
        (void)close(l->epoll_fd);
    }
    l->timer_fd = -1;
    l->epoll_fd = -1;
}

int kvt_loop_add(struct kvt_loop *l, struct kvt_watch *w, int fd, uint32_t events) {
    KVT_ASSERT(w->ready != NULL);
    struct epoll_event event = {.events = events, .data.ptr = w};
    if (epoll_ctl(l->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        return -KVT_ESYS;
    }
    w->fd = fd;
    return 0;
}

void kvt_loop_change(struct kvt_loop *l, struct kvt_watch *w, uint32_t events) {
    KVT_ASSERT(w->fd >= 0);
    struct epoll_event event = {.events = events, .data.ptr = w};
    int rc = epoll_ctl(l->epoll_fd, EPOLL_CTL_MOD, w->fd, &event);
    KVT_ASSERT(rc == 0);
}

void kvt_loop_remove(struct kvt_loop *l, struct kvt_watch *w) {
    if (w->fd < 0) {
        return;
    }
    (void)epoll_ctl(l->epoll_fd, EPOLL_CTL_DEL, w->fd, NULL);
    w->fd = -1;
    for (int i = l->batch_at; i < l->batch_count; i++) {
        if (l->batch[i].data.ptr == w) {
            l->batch[i].data.ptr = NULL;
        }
    }
}

void kvt_loop_add_timer(struct kvt_loop *l, struct kvt_timer *t) {
    KVT_ASSERT(t->fire != NULL);
    t->deadline_ms = UINT64_MAX;
    t->next = l->timers;
    l->timers = t;
}

static void arm(struct kvt_loop *l) {
    uint64_t first = UINT64_MAX;
    for (const struct kvt_timer *t = l->timers; t != NULL; t = t->next) {
        first = t->deadline_ms < first ? t->deadline_ms : first;
    }
    if (first == l->armed_ms) {
        return;
    }
    struct itimerspec when = {{0, 0}, {0, 0}};
    if (first != UINT64_MAX) {
        when.it_value.tv_sec = (time_t)(first / 1000);
        when.it_value.tv_nsec = (long)(first % 1000) * 1000000 + 1; /* 0 would disarm it */
    }
    int rc = timerfd_settime(l->timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
    KVT_ASSERT(rc == 0);
    l->armed_ms = first;
}

static void fire_due(struct kvt_loop *l) {
    uint64_t now_ms = kvt_now_ms();
    for (struct kvt_timer *t = l->timers; t != NULL; t = t->next) {
        if (t->deadline_ms <= now_ms) {
            t->deadline_ms = UINT64_MAX;
            t->fire(t->context, now_ms);
        }
    }
}

void kvt_loop_run(struct kvt_loop *l, void (*before)(void *context), void (*after)(void *context),
                  void *context) {
    while (!l->stop) {
        after(context);
        arm(l);
        l->batch_count = l->stop ? 0 : epoll_wait(l->epoll_fd, l->batch, KVT_LOOP_BATCH, -1);
        before(context);
        for (l->batch_at = 0; l->batch_at < l->batch_count;) {
            struct epoll_event *event = &l->batch[l->batch_at++];
            struct kvt_watch *w = event->data.ptr;
            if (w != NULL) {
                w->ready(w->context, event->events);
            }
        }
        l->batch_count = 0;
        l->batch_at = 0;
        fire_due(l);
    }
}

void kvt_loop_stop(struct kvt_loop *l) {
    l->stop = true;
}
