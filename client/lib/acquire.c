/* A layer at a time, on the machinery of steps. */
#include "client/lib/client.h"

#include <stdlib.h>
#include <string.h>

/* The step is given up; the message of what failed stays. */
static int give_up(struct kvt_client *c, int code) {
    char message[sizeof c->message];
    memcpy(message, c->message, sizeof message);
    (void)kvt_step_abort(&c->step);
    memcpy(c->message, message, sizeof message);
    return code;
}

static int open_or_check(struct kvt_client *c, uint32_t cache, uint32_t layer, uint32_t tokens) {
    struct kvt_step *s = &c->step;
    if (s->client == NULL) {
        struct kvt_client_step_options o = {
            .cache = cache, .tokens = tokens, .steps = 1, .acquire = true};
        if (layer != 0) {
            return kvt_client_fail(c, -KVT_ESTATE, "ACQUIRE: layer %u before layer 0", layer);
        }
        int rc = kvt_client_step_open(c, &o);
        if (rc == 0) {
            s->acquire.used = true;
            s->acquire.held = false;
            s->acquire.layer = 0;
        }
        return rc;
    }
    if (!s->acquire.used || s->cache->id != cache) {
        return kvt_client_fail(c, -KVT_ESTATE, "ACQUIRE: another step is open, on cache %u",
                               s->cache->id);
    }
    if (s->acquire.held || layer != s->acquire.layer) {
        return kvt_client_fail(c, -KVT_ESTATE, "ACQUIRE: layer %u; layer %u is to be %s", layer,
                               s->acquire.layer, s->acquire.held ? "committed first" : "acquired");
    }
    return 0;
}

static int remember(struct kvt_step *s, uint32_t count, const struct kvt_piece *p) {
    if (count == s->acquire.capacity) {
        uint32_t capacity = s->acquire.capacity == 0 ? 16 : 2 * s->acquire.capacity;
        const struct kvt_piece **pieces =
            realloc(s->acquire.pieces, capacity * sizeof *s->acquire.pieces);
        if (pieces == NULL) {
            return kvt_client_fail(s->client, -KVT_ENOMEM, "ACQUIRE: out of memory");
        }
        s->acquire.pieces = pieces;
        s->acquire.capacity = capacity;
    }
    s->acquire.pieces[count] = p;
    return 0;
}

/* Takes the layer's pieces, all of which must be there at the same time. */
static int gather(struct kvt_step *s, uint32_t layer, uint32_t *count) {
    uint64_t generation[KVT_SLOTS_MAX] = {0};
    uint32_t n = 0;
    while (kvt_client_step_next_reader(s) == layer) {
        const struct kvt_piece *p;
        int rc = kvt_step_piece(s, &p);
        if (rc != 1) {
            return rc;
        }
        if (p->streamed != 0) {
            if (generation[p->slot] != 0 && generation[p->slot] != p->ready) {
                return kvt_client_fail(
                    s->client, -KVT_ENOTSUP,
                    "ACQUIRE: layer %u comes in more pieces than there are slots; "
                    "use kvt_step_begin and kvt_step_piece",
                    layer);
            }
            generation[p->slot] = p->ready;
        }
        rc = remember(s, n, p);
        if (rc != 0) {
            return rc;
        }
        n++;
    }
    *count = n;
    return 0;
}

int kvt_acquire(struct kvt_client *c, uint32_t cache, uint32_t layer, uint32_t tokens,
                const struct kvt_piece *const **pieces, uint32_t *count) {
    struct kvt_step *s = &c->step;
    uint32_t n = 0;
    int rc = kvt_client_check_own(c);
    if (rc == 0) {
        rc = open_or_check(c, cache, layer, tokens);
    }
    if (rc != 0) {
        return rc; /* a call out of order leaves the step as it is */
    }
    rc = gather(s, layer, &n);
    for (uint32_t i = 0; rc == 0 && i < n; i++) {
        rc = kvt_piece_wait(s, s->acquire.pieces[i]);
    }
    if (rc != 0) {
        return give_up(c, rc);
    }
    s->acquire.held = true;
    *pieces = s->acquire.pieces;
    *count = n;
    return 0;
}

int kvt_commit(struct kvt_client *c, uint32_t cache, uint32_t layer) {
    struct kvt_step *s = &c->step;
    int rc = kvt_client_check_own(c);
    if (rc != 0) {
        return rc;
    }
    if (s->client == NULL || !s->acquire.used || s->cache->id != cache || !s->acquire.held ||
        s->acquire.layer != layer) {
        return kvt_client_fail(c, -KVT_ESTATE, "COMMIT: layer %u of cache %u is not acquired",
                               layer, cache);
    }
    for (uint32_t i = 0; i < s->taken; i++) {
        const struct kvt_piece *p = &s->pieces[i].piece;
        rc = p->last_reader <= layer ? kvt_piece_done(s, p) : 0;
        if (rc != 0) {
            return give_up(c, rc);
        }
    }
    s->acquire.held = false;
    s->acquire.layer = layer + 1;
    if (s->acquire.layer < s->cache->layout->layer_count) {
        return 0;
    }
    rc = kvt_step_end(s);
    return rc == 0 || s->client == NULL ? rc : give_up(c, rc);
}

int kvt_acquire_abort(struct kvt_client *c, uint32_t cache) {
    struct kvt_step *s = &c->step;
    if (s->client == NULL || !s->acquire.used || s->cache->id != cache) {
        return 0;
    }
    return kvt_step_abort(s);
}
