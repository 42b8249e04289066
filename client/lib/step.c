/* The pieces of the current step: translated, waited for, given back. */
#include "client/lib/step.h"

#include "client/lib/client.h"

#include <stdlib.h>
#include <string.h>

#define EXTENT_TIMEOUT_MS 5000
#define EXTENT_LOOK_MS    100
#define RUNS_CHUNK        1024

static int malformed(struct kvt_step *s, int code, const char *text) {
    return kvt_client_fail(s->client, code, "STEP: cache %u: %s", s->cache->id, text);
}

/* ---- whether it can still succeed -------------------------------------------------------------- */

int kvt_client_step_stopped(void *step) {
    struct kvt_step *s = step;
    struct kvt_client *c = s->client;
    if (kvt_client_is_gone(c)) {
        return -KVT_EGONE;
    }
    uint64_t failed = kvt_client_counter_read(&c->page->failed);
    return failed >= s->first_step && failed != 0 && failed <= s->first_step + s->current
               ? -KVT_EFAILED
               : 0;
}

int kvt_client_step_check(struct kvt_step *s) {
    struct kvt_client *c = s->client;
    int rc = kvt_client_step_stopped(s);
    if (rc == -KVT_EGONE) {
        return kvt_client_fail_gone(c);
    }
    if (rc == -KVT_EFAILED && kvt_client_is_evicted(c)) {
        return kvt_client_fail_evicted(c);
    }
    if (rc == -KVT_EFAILED) {
        uint32_t aux = __atomic_load_n(&c->page->failed.aux, __ATOMIC_RELAXED);
        return kvt_client_fail(c, rc,
                               "step %llu of cache %u failed and was not committed: %s; abort it, "
                               "then its tokens can be appended again",
                               (unsigned long long)(s->first_step + s->current), s->cache->id,
                               kvt_error_text((int)aux));
    }
    return rc;
}

/* ---- addresses -------------------------------------------------------------------------------- */

/* Leading moves are done even when the schedule has failed: the daemon takes their targets for the
 * truth. Only a session of which nothing matters any more ends them. */
static int leading_check(struct kvt_step *s) {
    if (kvt_client_is_gone(s->client)) {
        return kvt_client_fail_gone(s->client);
    }
    return kvt_client_is_evicted(s->client) ? kvt_client_fail_evicted(s->client) : 0;
}

static int extent_check(struct kvt_step *s, bool leading) {
    return leading ? leading_check(s) : kvt_client_step_check(s);
}

/* Waits for the extent, as long as there is something to wait for: a worker that was evicted has
 * given its extents back. */
static int pin_extent(struct kvt_step *s, uint32_t id, bool leading, void **address,
                      uint64_t *bytes) {
    int rc = -KVT_ENOENT;
    for (int ms = 0; rc == -KVT_ENOENT && ms < EXTENT_TIMEOUT_MS; ms += EXTENT_LOOK_MS) {
        int stopped = extent_check(s, leading);
        if (stopped != 0) {
            return stopped;
        }
        rc = kvt_client_extents_pin(&s->client->extents, id, EXTENT_LOOK_MS, address, bytes);
    }
    if (rc == -KVT_EGONE) {
        return kvt_client_fail_gone(s->client);
    }
    return rc == 0
               ? 0
               : kvt_client_fail(s->client, rc == -KVT_ENOENT ? -KVT_EPROTO : rc,
                                 "STEP: cache %u: extent %u: %s%s%s", s->cache->id, id,
                                 rc == -KVT_ENOENT ? "the daemon never passed it"
                                                   : "it cannot be mapped",
                                 rc == -KVT_EDEVICE ? ": " : "",
                                 rc == -KVT_EDEVICE ? s->client->device->why(s->client->gpu) : "");
}

static int use_extent(struct kvt_step *s, uint32_t id, bool leading, uint8_t **address,
                      uint64_t *bytes) {
    if (!s->extent.known || s->extent.id != id) {
        void *p = NULL;
        uint64_t n = 0;
        int rc = pin_extent(s, id, leading, &p, &n);
        if (rc != 0) {
            return rc;
        }
        s->extent.known = true;
        s->extent.id = id;
        s->extent.address = p;
        s->extent.bytes = n;
    }
    *address = s->extent.address;
    *bytes = s->extent.bytes;
    return 0;
}

static int move_once(struct kvt_step *s, uint32_t index, bool leading) {
    char text[KVT_TEXT_BYTES];
    struct kvt_sched_move m;
    uint8_t *source;
    uint8_t *target;
    uint64_t source_bytes;
    uint64_t target_bytes;
    int rc = kvt_schedule_view_move(&s->view, index, &m, text);
    if (rc != 0) {
        return malformed(s, rc, text);
    }
    rc = use_extent(s, m.source_extent, leading, &source, &source_bytes);
    if (rc == 0) {
        rc = use_extent(s, m.target_extent, leading, &target, &target_bytes);
    }
    if (rc != 0) {
        return rc;
    }
    rc = kvt_schedule_move_fits(&m, source_bytes, target_bytes, text);
    if (rc != 0) {
        return malformed(s, rc, text);
    }
    rc = s->client->device->move(s->client->gpu, target + m.target_offset, source + m.source_offset,
                                 m.bytes);
    return rc == 0 ? 0 : kvt_client_fail_device(s->client);
}

static int move_all(struct kvt_step *s, uint32_t first, uint32_t count, bool leading) {
    for (uint32_t i = 0; i < count; i++) {
        int rc = move_once(s, first + i, leading);
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

int kvt_client_step_lead(struct kvt_step *s) {
    s->extent.known = false;
    return move_all(s, 0, s->view.header.moves_leading, true);
}

/* ---- translation ------------------------------------------------------------------------------ */

/* Room for `count` runs next to each other. */
static struct kvt_run *take_runs(struct kvt_step *s, uint32_t count) {
    struct kvt_client_runs *chunk = s->runs;
    while (chunk != NULL && chunk->capacity - chunk->used < count) {
        chunk = chunk->next;
    }
    if (chunk == NULL) {
        uint32_t capacity = count > RUNS_CHUNK ? count : RUNS_CHUNK;
        chunk = malloc(sizeof *chunk + capacity * sizeof chunk->runs[0]);
        if (chunk == NULL) {
            return NULL;
        }
        chunk->capacity = capacity;
        chunk->used = 0;
        chunk->next = s->runs;
        s->runs = chunk;
    }
    struct kvt_run *runs = &chunk->runs[chunk->used];
    chunk->used += count;
    return runs;
}

static int translate_run(struct kvt_step *s, const struct kvt_sched_piece *p, uint32_t index,
                         uint8_t *address, uint64_t extent_bytes, struct kvt_run *out) {
    char text[KVT_TEXT_BYTES];
    struct kvt_sched_run r;
    const uint32_t *rows;
    int rc = kvt_schedule_view_run(&s->view, index, &r, &rows, text);
    if (rc == 0) {
        rc = kvt_schedule_run_fits(&s->view, p, &r, extent_bytes, text);
    }
    if (rc != 0) {
        return malformed(s, rc, text);
    }
    *out = (struct kvt_run){
        .rows = rows,
        .row_count = r.row_count,
        .token_begin = r.token_begin,
        .read_count = r.read_count,
        .append_count = r.append_count,
        .k = address + r.k_offset,
        .v = s->view.shape.layers[p->layer].v_head_dim != 0 ? address + r.v_offset : NULL,
    };
    return 0;
}

static int translate_planes(struct kvt_step *s, const struct kvt_sched_piece *p, uint8_t *address,
                            uint64_t extent_bytes, struct kvt_piece *out) {
    char text[KVT_TEXT_BYTES];
    int rc = kvt_schedule_planes_fit(&s->view, p, extent_bytes, text);
    if (rc != 0) {
        return malformed(s, rc, text);
    }
    out->k = address + p->k_offset;
    out->v = s->view.shape.layers[p->layer].v_head_dim != 0 ? address + p->v_offset : NULL;
    out->k_row_bytes = p->k_row_bytes;
    out->v_row_bytes = p->v_row_bytes;
    out->token_capacity = p->token_capacity;
    return 0;
}

static int translate(struct kvt_step *s, const struct kvt_sched_piece *p,
                     struct kvt_client_piece *out) {
    uint8_t *address;
    uint64_t extent_bytes;
    bool streamed = (p->flags & KVT_PIECE_STREAMED) != 0;
    int rc = use_extent(s, p->extent, false, &address, &extent_bytes);
    if (rc != 0) {
        return rc;
    }
    struct kvt_run *runs = take_runs(s, p->run_count);
    if (runs == NULL) {
        return kvt_client_fail(s->client, -KVT_ENOMEM, "STEP: out of memory");
    }
    for (uint32_t i = 0; i < p->run_count; i++) {
        rc = translate_run(s, p, p->run_first + i, address, extent_bytes, &runs[i]);
        if (rc != 0) {
            return rc;
        }
    }
    *out = (struct kvt_client_piece){
        .piece = {.layer = p->layer,
                  .reader = p->reader,
                  .last_reader = p->last_reader,
                  .streamed = streamed,
                  .last = (p->flags & KVT_PIECE_LAST) != 0,
                  .slot = streamed ? p->slot : 0,
                  .ready = streamed ? p->ready : 0,
                  .done = streamed ? p->done : 0,
                  .run_count = p->run_count,
                  .runs = runs},
        .move_first = p->move_first,
        .move_count = p->move_count,
    };
    if (s->client->worker == KVT_DENSE) {
        return translate_planes(s, p, address, extent_bytes, &out->piece);
    }
    return 0;
}

/* ---- walking ---------------------------------------------------------------------------------- */

int kvt_client_step_start(struct kvt_step *s, uint32_t index) {
    char text[KVT_TEXT_BYTES];
    struct kvt_sched_step step;
    s->current = index;
    s->taken = 0;
    s->extent.known = false;
    for (struct kvt_client_runs *r = s->runs; r != NULL; r = r->next) {
        r->used = 0;
    }
    s->step = (struct kvt_sched_step){.step = s->first_step + index};
    int rc = kvt_schedule_view_step(&s->view, index, &step, text);
    if (rc != 0) {
        return malformed(s, rc, text);
    }
    if (step.piece_count > s->piece_capacity) {
        struct kvt_client_piece *pieces = realloc(s->pieces, step.piece_count * sizeof *s->pieces);
        if (pieces == NULL) {
            return kvt_client_fail(s->client, -KVT_ENOMEM, "STEP: out of memory");
        }
        s->pieces = pieces;
        s->piece_capacity = step.piece_count;
    }
    s->step = step;
    return 0;
}

int kvt_step_piece(struct kvt_step *s, const struct kvt_piece **p) {
    char text[KVT_TEXT_BYTES];
    struct kvt_sched_piece piece;
    if (s->client == NULL) {
        return -KVT_ESTATE;
    }
    int rc = kvt_client_check_own(s->client);
    if (rc != 0) {
        return rc;
    }
    if (s->taken == s->step.piece_count) {
        return 0;
    }
    rc = kvt_schedule_view_piece(&s->view, s->step.piece_first + s->taken, &piece, text);
    if (rc != 0) {
        return malformed(s, rc, text);
    }
    rc = translate(s, &piece, &s->pieces[s->taken]);
    if (rc != 0) {
        return rc;
    }
    *p = &s->pieces[s->taken].piece;
    s->taken++;
    return 1;
}

uint32_t kvt_client_step_next_reader(const struct kvt_step *s) {
    char text[KVT_TEXT_BYTES];
    struct kvt_sched_piece p;
    if (s->taken == s->step.piece_count ||
        kvt_schedule_view_piece(&s->view, s->step.piece_first + s->taken, &p, text) != 0) {
        return UINT32_MAX;
    }
    return p.reader;
}

uint32_t kvt_step_left(const struct kvt_step *s) {
    return s->client == NULL ? 0 : s->steps - s->current;
}

uint32_t kvt_step_length(const struct kvt_step *s, uint32_t row) {
    if (s->client == NULL || row >= s->row_count) {
        return 0;
    }
    return s->lengths[row] + s->current * s->appends[row];
}

/* The piece behind the user's pointer, if it is one of the current step. */
static struct kvt_client_piece *own_piece(struct kvt_step *s, const struct kvt_piece *p) {
    uintptr_t first = (uintptr_t)s->pieces;
    uintptr_t at = (uintptr_t)p;
    if (s->client == NULL || at < first || (at - first) % sizeof s->pieces[0] != 0 ||
        (at - first) / sizeof s->pieces[0] >= s->taken) {
        return NULL;
    }
    return &s->pieces[(at - first) / sizeof s->pieces[0]];
}

static int not_own(struct kvt_step *s) {
    return s->client == NULL ? -KVT_ESTATE
                             : kvt_client_fail(s->client, -KVT_EINVAL,
                                               "the piece is not one of the current step");
}

int kvt_piece_wait(struct kvt_step *s, const struct kvt_piece *p) {
    struct kvt_client_piece *own = own_piece(s, p);
    if (own == NULL) {
        return not_own(s);
    }
    struct kvt_client *c = s->client;
    int rc = kvt_client_check_own(c);
    if (rc != 0) {
        return rc;
    }
    rc = p->streamed != 0 ? c->device->wait(c->gpu, &c->page->ready[p->slot], p->ready, &c->spin,
                                            kvt_client_step_stopped, s)
                          : kvt_client_step_stopped(s);
    if (rc == -KVT_EDEVICE) {
        return kvt_client_fail_device(c);
    }
    if (rc != 0) {
        return kvt_client_step_check(s);
    }
    if (!own->moved) {
        rc = move_all(s, own->move_first, own->move_count, false);
        own->moved = rc == 0;
    }
    return rc;
}

int kvt_piece_done(struct kvt_step *s, const struct kvt_piece *p) {
    struct kvt_client_piece *own = own_piece(s, p);
    if (own == NULL) {
        return not_own(s);
    }
    int rc = kvt_client_check_own(s->client);
    if (rc != 0 || own->done) {
        return rc;
    }
    own->done = true;
    struct kvt_client *c = s->client;
    rc = p->streamed != 0 ? c->device->post(c->gpu, &c->page->done[p->slot], p->done) : 0;
    return rc == 0 ? 0 : kvt_client_fail_device(c);
}

uint32_t kvt_client_step_streamed(const struct kvt_step *s) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < s->taken; i++) {
        count += s->pieces[i].piece.streamed != 0;
    }
    return count;
}

uint32_t kvt_client_step_not_done(const struct kvt_step *s) {
    char text[KVT_TEXT_BYTES];
    struct kvt_sched_piece p;
    uint32_t count = 0;
    for (uint32_t i = 0; i < s->taken; i++) {
        count += s->pieces[i].piece.streamed != 0 && !s->pieces[i].done;
    }
    for (uint32_t i = s->taken; i < s->step.piece_count; i++) {
        count += kvt_schedule_view_piece(&s->view, s->step.piece_first + i, &p, text) == 0 &&
                 (p.flags & KVT_PIECE_STREAMED) != 0;
    }
    return count;
}

void kvt_client_step_free(struct kvt_step *s) {
    while (s->runs != NULL) {
        struct kvt_client_runs *next = s->runs->next;
        free(s->runs);
        s->runs = next;
    }
    free(s->pieces);
    free(s->lengths);
    free(s->appends);
    free(s->acquire.pieces);
    memset(s, 0, sizeof *s);
}
