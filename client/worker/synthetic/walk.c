/* One step of the synthetic worker: every byte that a piece offers is compared with the model, every
 * new token is written, and each listing must offer each token exactly once. */
#include "client/worker/synthetic/synth.h"

#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define LATE_MAX 128 /* pieces of a dense worker that are not handed back yet */

/* How often each row's tokens were offered in one listing of a layer. */
struct cover {
    uint64_t read_count;
    uint64_t read_sum; /* of token numbers: with the count, enough to notice one that is missing */
    uint64_t append_count;
};

struct walk {
    struct kvt_synth *s;
    struct kvt_synth_step *w;
    struct cover cover[KVT_SYNTH_ROWS_MAX];
    const struct kvt_piece *late[LATE_MAX];
    uint32_t late_count;
    bool hold;
};

uint64_t kvt_synth_now_ns(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

void kvt_synth_called(struct kvt_synth *s, struct kvt_synth_samples *kind, uint64_t begin_ns) {
    if (s->calls.kept) {
        kvt_synth_samples_keep(kind, (double)(kvt_synth_now_ns() - begin_ns) / 1000);
    }
}

static void sleep_us(int64_t us) {
    struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = (us % 1000000) * 1000};
    while (nanosleep(&t, &t) != 0) {}
}

__attribute__((format(printf, 3, 4))) static int wrong(struct walk *k, const struct kvt_piece *p,
                                                       const char *format, ...) {
    va_list args;
    va_start(args, format);
    (void)fprintf(stderr, "kvtier-synth: wrong: cache %u step %" PRIu64 " layer %u read by %u: ",
                  k->w->cache->id, k->s->steps_begun - 1, p->layer, p->reader);
    (void)vfprintf(stderr, format, args);
    (void)fputc('\n', stderr);
    va_end(args);
    k->s->totals.errors++;
    return KVT_SYNTH_FOUND_WRONG;
}

static uint32_t token_bytes(const struct kvt_synth *s, uint32_t layer, enum kvt_synth_plane plane) {
    const struct kvt_layer_shape *l = &s->layers[layer];
    uint32_t element_bytes = l->dtype == KVT_DTYPE_F32 ? 4 : 2;
    return l->kv_heads * (plane == KVT_SYNTH_K ? l->k_head_dim : l->v_head_dim) * element_bytes;
}

/* ---- libkvtier's calls, timed ----------------------------------------------------------------- */

static int next_piece(struct walk *k, const struct kvt_piece **p) {
    uint64_t begin_ns = kvt_synth_now_ns();
    int rc = kvt_step_piece(k->w->step, p);
    k->s->calls.layer_ns += kvt_synth_now_ns() - begin_ns;
    return rc;
}

static int wait_for(struct walk *k, const struct kvt_piece *p) {
    uint64_t begin_ns = kvt_synth_now_ns();
    int rc = kvt_piece_wait(k->w->step, p);
    uint64_t ns = kvt_synth_now_ns() - begin_ns;
    k->s->calls.layer_ns += ns;
    k->s->calls.wait_ns += ns;
    return rc;
}

static int hand_back(struct walk *k, const struct kvt_piece *p) {
    uint64_t begin_ns = kvt_synth_now_ns();
    int rc = kvt_piece_done(k->w->step, p);
    k->s->calls.layer_ns += kvt_synth_now_ns() - begin_ns;
    return rc;
}

/* Behind a layer's last piece. */
static void layer_ends(struct kvt_synth *s) {
    if (s->calls.kept) {
        kvt_synth_samples_keep(&s->calls.layers, (double)s->calls.layer_ns / 1000);
    }
    s->calls.layer_ns = 0;
}

/* ---- bytes ------------------------------------------------------------------------------------ */

static int check_plane(struct walk *k, const struct kvt_piece *p, uint32_t row, uint32_t first,
                       uint32_t count, enum kvt_synth_plane plane, const uint8_t *found) {
    struct kvt_synth *s = k->s;
    uint32_t bytes = token_bytes(s, p->layer, plane);
    uint8_t expected = 0;
    if (bytes == 0 || s->o->no_check) {
        return 0;
    }
    if (s->gpu != NULL) {
        s->totals.bytes_checked += (uint64_t)count * bytes;
        return kvt_synth_gpu_check(s->gpu, &k->w->cache->rows[row], first, count, p->layer, plane,
                                   bytes, found);
    }
    int64_t at = kvt_synth_compare(&k->w->cache->rows[row], first, count, p->layer, plane, bytes,
                                   found, &expected);
    s->totals.bytes_checked += (uint64_t)count * bytes;
    if (at < 0) {
        return 0;
    }
    return wrong(k, p,
                 "row %u token %" PRId64 " %s offset %" PRId64 ": expected 0x%02x, found 0x%02x"
                 " (piece %s, slot %u, generation %" PRIu64 ")",
                 row, first + at / bytes, plane == KVT_SYNTH_K ? "K" : "V", at % bytes, expected,
                 found[at], p->streamed != 0 ? "streamed" : "resident", p->slot, p->ready);
}

static int check_tokens(struct walk *k, const struct kvt_piece *p, uint32_t row, uint32_t first,
                        uint32_t count, const void *k_plane, const void *v_plane) {
    int rc = check_plane(k, p, row, first, count, KVT_SYNTH_K, k_plane);
    return rc != 0 ? rc : check_plane(k, p, row, first, count, KVT_SYNTH_V, v_plane);
}

static int write_tokens(struct walk *k, const struct kvt_piece *p, uint32_t row, uint32_t first,
                        uint32_t count, uint8_t *k_plane, uint8_t *v_plane) {
    const struct kvt_synth_row *r = &k->w->cache->rows[row];
    uint32_t k_bytes = token_bytes(k->s, p->layer, KVT_SYNTH_K);
    uint32_t v_bytes = token_bytes(k->s, p->layer, KVT_SYNTH_V);
    k->s->totals.bytes_written += (uint64_t)count * (k_bytes + v_bytes);
    if (k->s->gpu != NULL) {
        int rc = kvt_synth_gpu_write(k->s->gpu, r, first, count, p->layer, KVT_SYNTH_K, k_bytes,
                                     k_plane);
        return rc != 0 ? rc
                       : kvt_synth_gpu_write(k->s->gpu, r, first, count, p->layer, KVT_SYNTH_V,
                                             v_bytes, v_plane);
    }
    kvt_synth_bytes(r, first, count, p->layer, KVT_SYNTH_K, k_bytes, k_plane);
    if (v_bytes > 0) {
        kvt_synth_bytes(r, first, count, p->layer, KVT_SYNTH_V, v_bytes, v_plane);
    }
    return 0;
}

/* ---- segment workers: runs -------------------------------------------------------------------- */

/* Whether every row of the run has the same tokens there, so that checking one checks all. */
static int check_shared(struct walk *k, const struct kvt_piece *p, const struct kvt_run *r) {
    const struct kvt_synth_cache *c = k->w->cache;
    const struct kvt_synth_row *first = &c->rows[r->rows[0]];
    for (uint32_t i = 0; i < r->row_count; i++) {
        uint32_t row = r->rows[i];
        if (row >= c->row_count || !k->w->takes_part[row]) {
            return wrong(k, p, "row %u does not take part in the step", row);
        }
        if (r->read_count > 0 && (uint64_t)r->token_begin + r->read_count > k->w->before[row]) {
            return wrong(k, p, "row %u: tokens %u to %u are offered, it has %u", row,
                         r->token_begin, r->token_begin + r->read_count, k->w->before[row]);
        }
        if (r->read_count > 0 &&
            memcmp(first->ids + r->token_begin, c->rows[row].ids + r->token_begin,
                   r->read_count * sizeof first->ids[0]) != 0) {
            return wrong(k, p,
                         "rows %u and %u are offered the same tokens %u to %u and differ there",
                         r->rows[0], row, r->token_begin, r->token_begin + r->read_count);
        }
        struct cover *v = &k->cover[row];
        v->read_count += r->read_count;
        v->read_sum +=
            (uint64_t)r->read_count * (2 * (uint64_t)r->token_begin + r->read_count - 1) / 2;
    }
    return 0;
}

static int do_append(struct walk *k, const struct kvt_piece *p, const struct kvt_run *r) {
    uint32_t row = r->rows[0];
    uint32_t first = r->token_begin + r->read_count;
    uint64_t k_skip = (uint64_t)r->read_count * token_bytes(k->s, p->layer, KVT_SYNTH_K);
    uint64_t v_skip = (uint64_t)r->read_count * token_bytes(k->s, p->layer, KVT_SYNTH_V);
    if (first < k->w->before[row] ||
        first + r->append_count > k->w->before[row] + k->w->append[row]) {
        return wrong(k, p, "row %u: tokens %u to %u are to be appended; it has %u and %u come", row,
                     first, first + r->append_count, k->w->before[row], k->w->append[row]);
    }
    k->cover[row].append_count += r->append_count;
    uint8_t *v_plane = r->v != NULL ? (uint8_t *)r->v + v_skip : NULL;
    if (p->reader != p->layer) {
        return check_tokens(k, p, row, first, r->append_count, (uint8_t *)r->k + k_skip, v_plane);
    }
    return write_tokens(k, p, row, first, r->append_count, (uint8_t *)r->k + k_skip, v_plane);
}

static int do_runs(struct walk *k, const struct kvt_piece *p) {
    for (uint32_t i = 0; i < p->run_count; i++) {
        const struct kvt_run *r = &p->runs[i];
        /* A layer read again offers this step's tokens as tokens to read, or as appended ones. */
        struct kvt_run old = *r;
        uint32_t before = k->w->before[r->rows[0]];
        if (p->reader != p->layer && r->token_begin + r->read_count > before) {
            old.read_count = r->token_begin < before ? before - r->token_begin : 0;
            old.append_count = r->token_begin + r->read_count + r->append_count - before;
            if (r->token_begin > before) {
                old.append_count = r->read_count + r->append_count;
            }
        }
        int rc = check_shared(k, p, &old);
        if (rc == 0) {
            rc = check_tokens(k, p, r->rows[0], old.token_begin, old.read_count, r->k, r->v);
        }
        if (rc == 0 && old.append_count > 0) {
            rc = do_append(k, p, &old);
        }
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

/* After a listing's last piece: each row that takes part was offered all that it has. */
static int check_cover(struct walk *k, const struct kvt_piece *p) {
    for (uint32_t i = 0; i < k->w->row_count; i++) {
        uint32_t row = k->w->rows[i];
        uint64_t n = k->w->before[row];
        struct cover v = k->cover[row];
        if (v.read_count != n || v.read_sum != (n == 0 ? 0 : n * (n - 1) / 2)) {
            return wrong(k, p, "row %u has %" PRIu64 " tokens; %" PRIu64 " were offered, %s", row,
                         n, v.read_count,
                         v.read_count == n ? "not each of them once" : "too many or few");
        }
        if (v.append_count != k->w->append[row]) {
            return wrong(k, p, "row %u appends %u tokens; there was room for %" PRIu64, row,
                         k->w->append[row], v.append_count);
        }
    }
    memset(k->cover, 0, sizeof k->cover);
    return 0;
}

/* ---- dense workers: planes -------------------------------------------------------------------- */

static int do_planes(struct walk *k, const struct kvt_piece *p, bool again) {
    uint32_t k_bytes = token_bytes(k->s, p->layer, KVT_SYNTH_K);
    uint32_t v_bytes = token_bytes(k->s, p->layer, KVT_SYNTH_V);
    for (uint32_t i = 0; i < k->w->row_count; i++) {
        uint32_t row = k->w->rows[i];
        uint32_t before = k->w->before[row];
        uint32_t append = k->w->append[row];
        uint8_t *k_plane = (uint8_t *)p->k + i * p->k_row_bytes;
        uint8_t *v_plane = p->v != NULL ? (uint8_t *)p->v + i * p->v_row_bytes : NULL;
        if (before + append > p->token_capacity) {
            return wrong(k, p, "row %u: room for %u tokens; %u and %u are needed", row,
                         p->token_capacity, before, append);
        }
        uint32_t check = again ? before + append : before;
        int rc = check_tokens(k, p, row, 0, check, k_plane, v_plane);
        if (rc != 0) {
            return rc;
        }
        if (!again && append > 0) {
            rc = write_tokens(k, p, row, before, append, k_plane + (uint64_t)before * k_bytes,
                              v_plane != NULL ? v_plane + (uint64_t)before * v_bytes : NULL);
        }
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

/* Hands back what no layer from `layer` on reads: late, when the next layer begins, as frameworks
 * do. Until then the bytes must stay, so they are looked at again. */
static int hand_back_late(struct walk *k, uint32_t layer) {
    for (uint32_t i = 0; i < k->late_count;) {
        const struct kvt_piece *p = k->late[i];
        if (p->last_reader >= layer) {
            i++;
            continue;
        }
        int rc = do_planes(k, p, true);
        if (rc == 0) {
            rc = hand_back(k, p);
        }
        if (rc != 0) {
            return rc;
        }
        k->late[i] = k->late[--k->late_count];
    }
    return 0;
}

/* Planes that are elsewhere than in the schedule before were moved when this one began, with what the
 * rows had. */
static void count_moved(struct walk *k, const struct kvt_piece *p) {
    struct kvt_synth *s = k->s;
    uint64_t bytes = token_bytes(s, p->layer, KVT_SYNTH_K) + token_bytes(s, p->layer, KVT_SYNTH_V);
    const void *before = s->planes_cache == k->w->cache->id ? s->planes[p->layer] : NULL;
    for (uint32_t i = 0; i < k->w->cache->row_count && before != NULL && before != p->k; i++) {
        s->schedule_moved_bytes += k->w->before[i] * bytes;
    }
    s->planes[p->layer] = p->k;
}

static int dense_piece(struct walk *k, const struct kvt_piece *p) {
    int rc = do_planes(k, p, false);
    if (p->streamed != 0) {
        k->s->planes[p->layer] = NULL; /* it comes back by migration */
    } else {
        count_moved(k, p);
    }
    if (rc == 0 && k->late_count == LATE_MAX) {
        return wrong(k, p, "%d pieces are held for later readers", LATE_MAX);
    }
    if (rc == 0) {
        k->late[k->late_count++] = p;
    }
    return rc;
}

/* ---- the walk --------------------------------------------------------------------------------- */

static int segment_piece(struct walk *k, const struct kvt_piece *p) {
    int rc = do_runs(k, p);
    if (rc == 0 && p->last != 0) {
        rc = check_cover(k, p);
    }
    return rc != 0 ? rc : hand_back(k, p);
}

static void hold(struct walk *k) {
    if (!k->hold) {
        return;
    }
    k->hold = false;
    if (k->s->o->hold_ms > 0) {
        sleep_us(k->s->o->hold_ms * 1000);
    } else {
        (void)raise(SIGSTOP);
    }
}

/* Static caches promise that a layer stays where it was. */
static void note_address(struct walk *k, const struct kvt_piece *p) {
    struct kvt_synth *s = k->s;
    const struct kvt_run *r = p->run_count > 0 ? &p->runs[0] : NULL;
    const void *address = s->o->dense ? p->k : r != NULL && r->token_begin == 0 ? r->k : NULL;
    if (address == NULL || p->layer != p->reader ||
        (!s->o->dense && (r->row_count == 0 || r->rows[0] != 0))) {
        return;
    }
    if (s->address_cache != k->w->cache->id) {
        s->address_cache = k->w->cache->id;
        memset(s->address, 0, (size_t)s->o->layers * sizeof *s->address);
    }
    s->totals.address_changes += s->address[p->layer] != NULL && s->address[p->layer] != address;
    s->address[p->layer] = address;
}

static int one_piece(struct walk *k, const struct kvt_piece *p) {
    struct kvt_synth *s = k->s;
    int rc = hand_back_late(k, p->reader);
    if (rc != 0) {
        return rc;
    }
    rc = wait_for(k, p);
    s->totals.pieces++;
    s->totals.streamed_pieces += p->streamed;
    if (rc != 0) {
        return rc;
    }
    hold(k);
    note_address(k, p);
    if (s->o->compute_us > 0 && p->last != 0 && s->gpu != NULL) {
        rc = kvt_synth_gpu_spin(s->gpu, (uint32_t)s->o->compute_us);
        if (rc != 0) {
            return rc;
        }
    } else if (s->o->compute_us > 0 && p->last != 0) {
        sleep_us(s->o->compute_us);
    }
    rc = s->o->dense ? dense_piece(k, p) : segment_piece(k, p);
    if (p->last != 0) {
        layer_ends(s);
    }
    return rc;
}

int kvt_synth_walk(struct kvt_synth *s, struct kvt_synth_step *w) {
    static struct walk k; /* large, and there is one */
    const struct kvt_piece *p;
    int rc;
    memset(&k, 0, sizeof k);
    k.s = s;
    k.w = w;
    k.hold = (int64_t)s->steps_begun == s->o->hold_step;
    s->steps_begun++;
    s->calls.layer_ns = 0;
    w->aborted = w->abort_after == 0;
    for (int64_t n = 0; !w->aborted && (rc = next_piece(&k, &p)) != 0;) {
        if (rc == 1) {
            rc = one_piece(&k, p);
        }
        if (rc != 0) {
            return rc;
        }
        w->aborted = ++n == w->abort_after;
    }
    if (w->aborted) {
        memset(s->planes, 0, sizeof s->planes); /* of some layers it is not known */
    }
    s->planes_cache = w->cache->id;
    return w->aborted ? 0 : hand_back_late(&k, UINT32_MAX);
}
