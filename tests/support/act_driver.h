/* A driver for tests: the cpu driver, with switches that make it slow, refuse, or be lost. One
 * device at a time. */
#ifndef KVT_TESTS_ACT_DRIVER_H
#define KVT_TESTS_ACT_DRIVER_H

#include "tiers/device/device.h"

/* "atomic": may be changed while the device runs. */
struct kvt_act {
    bool can_sleep;
    bool post_behind; /* posts are done behind the copies of their stream, and given back by poll */
    bool posts_held;  /* atomic: with post_behind, no post is done */
    bool patient;     /* wait has no time limit: who misses a store hangs */
    uint32_t page_delay_us; /* page_added takes so long */
    bool page_refused;
    uint32_t copy_refused; /* atomic: so many copies are refused */
    bool copy_lost;        /* atomic */
    bool post_lost;        /* atomic */
    bool poll_lost;        /* atomic */
    uint32_t waits;        /* atomic: calls of wait */
    uint32_t pages;        /* atomic: added and not removed */
    uint32_t closed;
    bool hold;            /* atomic: extent_create waits */
    struct kvt_link link; /* what measuring finds */
    bool unmeasured;      /* measuring fails */
    uint32_t measured;    /* atomic: calls of measure */
};
extern struct kvt_act kvt_act;
extern const struct kvt_driver_ops kvt_act_driver_ops;

#endif
