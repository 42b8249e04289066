/* A device for tests and benches; see device_rig.h. */
#include "tests/support/device_rig.h"

#include "proto/errors.h"
#include "tiers/engine/assert.h"
#include "tiers/host/futex.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

void kvt_rig_start(struct kvt_rig *r, const struct kvt_rig_config *c) {
    char text[KVT_TEXT_BYTES];
    r->arena_bytes = c->arena_bytes;
    r->arena = mmap(NULL, c->arena_bytes, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    KVT_ASSERT(r->arena != MAP_FAILED);
    r->notify_fd = eventfd(0, EFD_CLOEXEC);
    KVT_ASSERT(r->notify_fd >= 0);
    struct kvt_device_config config = {
        .ops = c->ops,
        .driver = {.budget_bytes = c->budget_bytes,
                   .copy_threads = c->copy_threads,
                   .host_base = r->arena,
                   .host_bytes = c->arena_bytes},
        .issuer = {.sessions_max = c->sessions_max ? c->sessions_max : 4,
                   .inflight_max = c->inflight_max ? c->inflight_max : 8,
                   .cut_bytes = c->cut_bytes ? c->cut_bytes : 4u << 20,
                   .quantum_bytes = 16u << 20},
        .spin_us = c->spin_us,
        .notify_fd = r->notify_fd};
    int rc = kvt_device_start(&config, &r->device, text);
    KVT_ASSERT(rc == 0);
    rc = kvt_device_host_added(r->device, 0, c->arena_bytes, text);
    KVT_ASSERT(rc == 0);
}

void kvt_rig_stop(struct kvt_rig *r) {
    kvt_device_stop(r->device);
    close(r->notify_fd);
    munmap(r->arena, r->arena_bytes);
}

struct kvt_control_page *kvt_rig_page(void) {
    struct kvt_control_page *page = mmap(NULL, KVT_CONTROL_PAGE_BYTES, PROT_READ | PROT_WRITE,
                                         MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    KVT_ASSERT(page != MAP_FAILED);
    return page;
}

void kvt_rig_page_free(struct kvt_control_page *page) {
    munmap(page, KVT_CONTROL_PAGE_BYTES);
}

void kvt_rig_command(struct kvt_rig *r, const struct kvt_device_command *c) {
    int rc = 0;
    while ((rc = kvt_device_command(r->device, c)) == -KVT_EBUSY) {
        struct timespec pause = {.tv_nsec = 50000};
        nanosleep(&pause, NULL);
    }
    KVT_ASSERT(rc == 0);
}

void kvt_rig_submit(struct kvt_rig *r, struct kvt_program *p) {
    kvt_rig_command(r, &(struct kvt_device_command){
                           .kind = KVT_DEVICE_PROGRAM, .session = p->session, .program = p});
}

struct kvt_device_event kvt_rig_event(struct kvt_rig *r) {
    struct kvt_device_event e = {0};
    while (!kvt_device_event(r->device, &e)) {
        uint64_t count;
        ssize_t got = read(r->notify_fd, &count, sizeof(count));
        KVT_ASSERT(got == sizeof(count) || errno == EINTR);
    }
    return e;
}

uint8_t *kvt_rig_extent(struct kvt_rig *r, uint32_t extent, uint64_t bytes) {
    kvt_rig_command(r, &(struct kvt_device_command){
                           .kind = KVT_DEVICE_EXTENT_CREATE, .extent = extent, .bytes = bytes});
    struct kvt_device_event e = kvt_rig_event(r);
    KVT_ASSERT(e.kind == KVT_DEVICE_EXTENT_CREATED);
    KVT_ASSERT(e.code == 0);
    KVT_ASSERT(e.extent == extent);
    uint8_t *p =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, e.exported.fd, 0);
    KVT_ASSERT(p != MAP_FAILED);
    close(e.exported.fd);
    return p;
}

void kvt_rig_extent_destroy(struct kvt_rig *r, uint32_t extent) {
    kvt_rig_command(r, &(struct kvt_device_command){.kind = KVT_DEVICE_EXTENT_DESTROY,
                                                    .extent = extent});
    struct kvt_device_event e = kvt_rig_event(r);
    KVT_ASSERT(e.kind == KVT_DEVICE_EXTENT_DESTROYED);
    KVT_ASSERT(e.code == 0);
}

void kvt_rig_open(struct kvt_rig *r, uint32_t session, struct kvt_control_page *page) {
    kvt_rig_command(r, &(struct kvt_device_command){
                           .kind = KVT_DEVICE_SESSION_OPEN, .session = session, .page = page});
}

uint32_t kvt_rig_close(struct kvt_rig *r, uint32_t session) {
    uint32_t completions = 0;
    kvt_rig_command(r, &(struct kvt_device_command){.kind = KVT_DEVICE_SESSION_CLOSE,
                                                    .session = session});
    for (;;) {
        struct kvt_device_event e = kvt_rig_event(r);
        if (e.kind == KVT_DEVICE_DRAINED) {
            KVT_ASSERT(e.session == session);
            return completions;
        }
        KVT_ASSERT(e.kind == KVT_DEVICE_COMPLETION);
        completions++;
    }
}

struct kvt_program *kvt_rig_program(uint32_t session, uint32_t ops_max) {
    struct kvt_program *p = kvt_program_create(session, ops_max, ops_max, 2 * ops_max);
    KVT_ASSERT(p != NULL);
    return p;
}

struct kvt_op *kvt_rig_op(struct kvt_program *p, enum kvt_op_kind kind, uint64_t id, uint16_t slot,
                          struct kvt_place source, struct kvt_place target, uint64_t bytes) {
    struct kvt_op *op = &p->ops[p->op_count++];
    *op = (struct kvt_op){.id = id,
                          .kind = (uint8_t)kind,
                          .slot = slot,
                          .copy_first = p->copy_count,
                          .copy_count = bytes > 0,
                          .dep_first = p->dep_count};
    if (bytes > 0) {
        p->copies[p->copy_count++] =
            (struct kvt_copy){.source = source, .target = target, .bytes = bytes};
    }
    return op;
}

void kvt_rig_dep(struct kvt_program *p, uint64_t id) {
    p->deps[p->dep_count++] = id;
    p->ops[p->op_count - 1].dep_count++;
}

void kvt_rig_counter_wait(struct kvt_counter *c, uint64_t value, uint32_t spin_us) {
    struct timespec begin;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    while (!kvt_counter_reached(__atomic_load_n(&c->value, __ATOMIC_ACQUIRE), value)) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        int64_t spent_ns =
            (now.tv_sec - begin.tv_sec) * INT64_C(1000000000) + now.tv_nsec - begin.tv_nsec;
        if (spent_ns < (int64_t)spin_us * 1000) {
            continue;
        }
        uint32_t seen = __atomic_load_n(&c->wake, __ATOMIC_SEQ_CST);
        __atomic_store_n(&c->waiters, 1, __ATOMIC_SEQ_CST);
        if (!kvt_counter_reached(__atomic_load_n(&c->value, __ATOMIC_SEQ_CST), value)) {
            kvt_futex_wait(&c->wake, seen, KVT_FUTEX_FOREVER, true);
        }
        __atomic_store_n(&c->waiters, 0, __ATOMIC_SEQ_CST);
    }
}

struct kvt_program *kvt_rig_stream_program(const struct kvt_rig_stream *s) {
    struct kvt_program *p = kvt_rig_program(s->session, KVT_RIG_STREAM_OPS(s));
    for (uint32_t i = 0; i < s->pieces; i++) {
        uint16_t slot = (uint16_t)(i % s->slots);
        uint64_t place = slot * kvt_rig_slot_bytes(s);
        uint64_t generation = KVT_RIG_GENERATION(s, i);
        struct kvt_op *op = kvt_rig_op(p, KVT_OP_FILL, 2 * i + 1, slot,
                                       kvt_on_host(i % s->distinct * s->piece_bytes),
                                       kvt_on_device(s->extent, place), s->piece_bytes);
        op->generation = generation;
        op->done_wait = generation - 1;
        if (i >= s->slots) {
            kvt_rig_dep(p, 2 * (i - s->slots) + 2);
        }
        op = kvt_rig_op(p, KVT_OP_WRITEBACK, 2 * i + 2, slot,
                        kvt_on_device(s->extent, place + s->piece_bytes),
                        kvt_on_host(s->append_offset + i * s->append_bytes), s->append_bytes);
        op->generation = generation;
    }
    struct kvt_op *op =
        kvt_rig_op(p, KVT_OP_STEP, 2 * s->pieces + 1, 0, kvt_on_host(0), kvt_on_host(0), 0);
    op->step_wait = 1;
    kvt_rig_dep(p, 2 * s->pieces); /* the last write-back, as the engine would */
    return p;
}
