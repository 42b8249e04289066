/* Caches: create, close, edits of rows, statistics. Each call is one request. */
#include "client/lib/client.h"

#include "proto/layout.h"

#include <stdlib.h>
#include <string.h>

#define LEAVE_TIMEOUT_MS 2000

/* ---- the table -------------------------------------------------------------------------------- */

struct kvt_client_cache *kvt_client_cache_find(struct kvt_client *c, uint32_t id) {
    for (uint32_t i = 0; i < c->cache_count; i++) {
        if (c->caches[i]->id == id) {
            return c->caches[i];
        }
    }
    (void)kvt_client_fail(c, -KVT_ENOENT, "cache %u is not a cache of this client", id);
    return NULL;
}

static void release_layout(struct kvt_client_layout *l) {
    if (l != NULL && --l->references == 0) {
        free(l);
    }
}

static void forget_at(struct kvt_client *c, uint32_t i) {
    release_layout(c->caches[i]->layout);
    free(c->caches[i]);
    c->caches[i] = c->caches[--c->cache_count];
}

static void forget(struct kvt_client *c, uint32_t id) {
    for (uint32_t i = 0; i < c->cache_count; i++) {
        if (c->caches[i]->id == id) {
            forget_at(c, i);
            return;
        }
    }
}

void kvt_client_caches_free(struct kvt_client *c) {
    while (c->cache_count > 0) {
        forget_at(c, c->cache_count - 1);
    }
}

/* Room is made before the request, so that no cache is left without an entry. */
static int reserve(struct kvt_client *c, struct kvt_client_layout *layout,
                   struct kvt_client_cache **out) {
    if (c->cache_count == KVT_CACHES_MAX) {
        return kvt_client_fail(c, -KVT_EBUSY, "this client has %d caches already; close one",
                               KVT_CACHES_MAX);
    }
    struct kvt_client_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL) {
        return kvt_client_fail(c, -KVT_ENOMEM, "out of memory");
    }
    cache->layout = layout;
    *out = cache;
    return 0;
}

static void enter(struct kvt_client *c, struct kvt_client_cache *cache, uint32_t id,
                  uint32_t rows) {
    cache->id = id;
    cache->rows = rows;
    cache->layout->references++;
    c->caches[c->cache_count++] = cache;
}

/* ---- create and close ------------------------------------------------------------------------- */

static int copy_layout(struct kvt_client *c, const struct kvt_cache_create_options *o,
                       struct kvt_client_layout **out) {
    if (o->layers == NULL || o->layer_count < 1 || o->layer_count > KVT_LAYERS_MAX) {
        return kvt_client_fail(c, -KVT_EINVAL, "CREATE: %u layers; accepted is 1 to %d",
                               o->layer_count, KVT_LAYERS_MAX);
    }
    struct kvt_client_layout *l = malloc(sizeof *l + o->layer_count * sizeof l->layers[0]);
    if (l == NULL) {
        return kvt_client_fail(c, -KVT_ENOMEM, "CREATE: out of memory");
    }
    l->references = 0;
    l->layer_count = o->layer_count;
    memcpy(l->layers, o->layers, o->layer_count * sizeof l->layers[0]);
    for (uint32_t i = 0; i < l->layer_count; i++) {
        if (l->layers[i].last_reader == 0) {
            l->layers[i].last_reader = i;
        }
        /* The library computes addresses with it; the daemon checks everything else. */
        if (kvt_dtype_bytes(l->layers[i].dtype) == 0) {
            free(l);
            return kvt_client_fail(c, -KVT_EINVAL,
                                   "CREATE: layer %u: dtype is %u; accepted is KVT_DTYPE_F32 (1), "
                                   "KVT_DTYPE_F16 (2) or KVT_DTYPE_BF16 (3)",
                                   i, o->layers[i].dtype);
        }
    }
    *out = l;
    return 0;
}

static Kvt__Layer layer_message(const struct kvt_layer_shape *l, uint32_t index) {
    Kvt__Layer m = KVT__LAYER__INIT;
    m.kind = l->kind;
    m.kv_heads = l->kv_heads;
    m.k_head_dim = l->k_head_dim;
    m.v_head_dim = l->v_head_dim;
    m.dtype = l->dtype;
    m.last_reader_plus_1 = l->last_reader == index ? 0 : l->last_reader + 1;
    m.repeat = 1;
    return m;
}

static bool same_shape(const Kvt__Layer *a, const Kvt__Layer *b) {
    return a->kind == b->kind && a->kv_heads == b->kv_heads && a->k_head_dim == b->k_head_dim &&
           a->v_head_dim == b->v_head_dim && a->dtype == b->dtype && a->last_reader_plus_1 == 0 &&
           b->last_reader_plus_1 == 0;
}

/* Equal neighbours become one message with a repeat. Returns how many there are. */
static uint32_t layer_messages(const struct kvt_client_layout *l, Kvt__Layer *messages,
                               Kvt__Layer **pointers) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < l->layer_count; i++) {
        Kvt__Layer m = layer_message(&l->layers[i], i);
        if (n > 0 && same_shape(&messages[n - 1], &m)) {
            messages[n - 1].repeat++;
            continue;
        }
        messages[n] = m;
        pointers[n] = &messages[n];
        n++;
    }
    return n;
}

static void fill_options(Kvt__CacheOptions *m, const struct kvt_cache_create_options *o) {
    m->mode = o->mode;
    m->rows = o->rows > 0 ? o->rows : 1;
    m->tokens_max = o->tokens_max;
    m->append_max = o->append_max > 0 ? o->append_max : 1;
    m->piece_tokens = o->piece_tokens;
    m->resident_layers_max_plus_1 =
        o->resident_layers_max < 0 ? 0 : (uint32_t)o->resident_layers_max + 1;
    m->name = (char *)(uintptr_t)(o->name != NULL ? o->name : "");
    if (o->fingerprint != NULL) {
        m->fingerprint.data = (uint8_t *)(uintptr_t)o->fingerprint;
        m->fingerprint.len = KVT_FINGERPRINT_BYTES;
    }
}

static int send_create(struct kvt_client *c, const struct kvt_cache_create_options *o,
                       const struct kvt_client_layout *layout, Kvt__Reply **reply) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Create create = KVT__CREATE__INIT;
    Kvt__CacheOptions options = KVT__CACHE_OPTIONS__INIT;
    Kvt__Layer *messages = calloc(layout->layer_count, sizeof *messages);
    Kvt__Layer **pointers = calloc(layout->layer_count, sizeof *pointers);
    int rc = kvt_client_fail(c, -KVT_ENOMEM, "CREATE: out of memory");
    if (messages != NULL && pointers != NULL) {
        fill_options(&options, o);
        options.n_layers = layer_messages(layout, messages, pointers);
        options.layers = pointers;
        create.options = &options;
        r.body_case = KVT__REQUEST__BODY_CREATE;
        r.create = &create;
        rc = kvt_client_request(c, "CREATE", &r, KVT__REPLY__BODY_CREATED, reply);
    }
    free(messages);
    free(pointers);
    return rc;
}

int kvt_cache_create(struct kvt_client *c, const struct kvt_cache_create_options *o,
                     uint32_t *cache) {
    struct kvt_client_layout *layout = NULL;
    struct kvt_client_cache *entry = NULL;
    Kvt__Reply *reply;
    if (o->resident_layers_max > KVT_LAYERS_MAX) {
        return kvt_client_fail(c, -KVT_EINVAL,
                               "CREATE: resident_layers_max is %lld; accepted is -1 to %d",
                               (long long)o->resident_layers_max, KVT_LAYERS_MAX);
    }
    int rc = copy_layout(c, o, &layout);
    if (rc == 0) {
        rc = reserve(c, layout, &entry);
    }
    if (rc == 0) {
        rc = send_create(c, o, layout, &reply);
    }
    if (rc != 0) {
        free(entry);
        free(layout);
        return rc;
    }
    enter(c, entry, reply->created->cache, o->rows > 0 ? o->rows : 1);
    *cache = entry->id;
    kvt__reply__free_unpacked(reply, NULL);
    return 0;
}

static int send_close(struct kvt_client *c, uint32_t cache) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Close m = KVT__CLOSE__INIT;
    Kvt__Reply *reply;
    m.cache = cache;
    r.body_case = KVT__REQUEST__BODY_CLOSE;
    r.close = &m;
    int rc = kvt_client_request(c, "CLOSE", &r, KVT__REPLY__BODY__NOT_SET, &reply);
    if (rc == 0) {
        kvt__reply__free_unpacked(reply, NULL);
    }
    return rc;
}

int kvt_cache_close(struct kvt_client *c, uint32_t cache) {
    struct kvt_client_cache *own = kvt_client_cache_find(c, cache);
    if (own == NULL) {
        return -KVT_ENOENT;
    }
    if (c->step.client != NULL && c->step.cache == own) {
        return kvt_client_fail(c, -KVT_ESTATE,
                               "CLOSE: cache %u has an open step; end or abort it first", cache);
    }
    int rc = send_close(c, cache);
    /* Whatever the daemon said about it, it has no use any more; a full queue can be tried again. */
    if (rc != -KVT_EBUSY) {
        forget(c, cache);
    }
    return rc;
}

void kvt_client_leave(struct kvt_client *c) {
    if (c->zmq_socket == NULL || kvt_client_is_gone(c)) {
        return;
    }
    if (c->request_timeout_ms > LEAVE_TIMEOUT_MS) {
        c->request_timeout_ms = LEAVE_TIMEOUT_MS;
    }
    c->leaving = true;
    (void)kvt_step_abort(&c->step);
    while (c->cache_count > 0 && !kvt_client_is_gone(c)) {
        uint32_t id = c->caches[c->cache_count - 1]->id;
        (void)send_close(c, id);
        forget(c, id);
    }
}

/* ---- rows ------------------------------------------------------------------------------------- */

/* Sends an edit of a cache of this client; the answer's rows become the cache's. */
static int edit(struct kvt_client *c, const char *what, uint32_t cache, Kvt__Request *r) {
    struct kvt_client_cache *own = kvt_client_cache_find(c, cache);
    Kvt__Reply *reply;
    if (own == NULL) {
        return -KVT_ENOENT;
    }
    if (c->step.client != NULL && c->step.cache == own) {
        return kvt_client_fail(c, -KVT_ESTATE,
                               "%s: cache %u has an open step; end or abort it first", what, cache);
    }
    int rc = kvt_client_request(c, what, r, KVT__REPLY__BODY_CACHE, &reply);
    if (rc == 0) {
        own->rows = (uint32_t)reply->cache->n_lengths;
        kvt__reply__free_unpacked(reply, NULL);
    }
    return rc;
}

static int edit_rows(struct kvt_client *c, const char *what, uint32_t cache, const uint32_t *rows,
                     uint32_t count, Kvt__Request__BodyCase body) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Rows m = KVT__ROWS__INIT;
    if (rows == NULL || count < 1 || count > KVT_ROWS_MAX) {
        return kvt_client_fail(c, -KVT_EINVAL, "%s: %u rows; accepted is 1 to %d", what, count,
                               KVT_ROWS_MAX);
    }
    m.cache = cache;
    m.n_rows = count;
    m.rows = (uint32_t *)(uintptr_t)rows;
    r.body_case = body;
    if (body == KVT__REQUEST__BODY_REORDER) {
        r.reorder = &m;
    } else {
        r.select = &m;
    }
    return edit(c, what, cache, &r);
}

int kvt_cache_reorder(struct kvt_client *c, uint32_t cache, const uint32_t *rows, uint32_t count) {
    return edit_rows(c, "REORDER", cache, rows, count, KVT__REQUEST__BODY_REORDER);
}

int kvt_cache_select(struct kvt_client *c, uint32_t cache, const uint32_t *rows, uint32_t count) {
    return edit_rows(c, "SELECT", cache, rows, count, KVT__REQUEST__BODY_SELECT);
}

int kvt_cache_repeat(struct kvt_client *c, uint32_t cache, uint32_t times) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Repeat m = KVT__REPEAT__INIT;
    m.cache = cache;
    m.times = times;
    r.body_case = KVT__REQUEST__BODY_REPEAT;
    r.repeat = &m;
    return edit(c, "REPEAT", cache, &r);
}

int kvt_cache_crop(struct kvt_client *c, uint32_t cache, const uint32_t *lengths, uint32_t count) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Crop m = KVT__CROP__INIT;
    if (lengths == NULL || count < 1 || count > KVT_ROWS_MAX) {
        return kvt_client_fail(c, -KVT_EINVAL, "CROP: %u lengths; accepted is 1 to %d", count,
                               KVT_ROWS_MAX);
    }
    m.cache = cache;
    m.n_lengths = count;
    m.lengths = (uint32_t *)(uintptr_t)lengths;
    r.body_case = KVT__REQUEST__BODY_CROP;
    r.crop = &m;
    return edit(c, "CROP", cache, &r);
}

int kvt_cache_reset(struct kvt_client *c, uint32_t cache) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__CacheRef m = KVT__CACHE_REF__INIT;
    m.cache = cache;
    r.body_case = KVT__REQUEST__BODY_RESET;
    r.reset = &m;
    int rc = edit(c, "RESET", cache, &r);
    if (rc == 0) { /* nothing is missing any more */
        struct kvt_client_cache *own = kvt_client_cache_find(c, cache);
        own->ended = 0;
        own->lost.first = 0;
    }
    return rc;
}

int kvt_cache_fork(struct kvt_client *c, uint32_t cache, const uint32_t *rows, uint32_t count,
                   uint32_t *forked) {
    Kvt__Request r = KVT__REQUEST__INIT;
    Kvt__Fork m = KVT__FORK__INIT;
    Kvt__Reply *reply;
    struct kvt_client_cache *entry = NULL;
    struct kvt_client_cache *own = kvt_client_cache_find(c, cache);
    if (own == NULL) {
        return -KVT_ENOENT;
    }
    if (rows != NULL && (count < 1 || count > KVT_ROWS_MAX)) {
        return kvt_client_fail(c, -KVT_EINVAL, "FORK: %u rows; accepted is 1 to %d", count,
                               KVT_ROWS_MAX);
    }
    int rc = reserve(c, own->layout, &entry);
    if (rc != 0) {
        return rc;
    }
    m.cache = cache;
    m.n_rows = rows != NULL ? count : 0;
    m.rows = (uint32_t *)(uintptr_t)rows;
    r.body_case = KVT__REQUEST__BODY_FORK;
    r.fork = &m;
    rc = kvt_client_request(c, "FORK", &r, KVT__REPLY__BODY_CACHE, &reply);
    if (rc != 0) {
        free(entry);
        return rc;
    }
    enter(c, entry, reply->cache->cache, (uint32_t)reply->cache->n_lengths);
    kvt_client_settle_look(c); /* the answer came behind the last step */
    entry->ended = own->ended;
    entry->lost = own->lost; /* what is missing there is missing in the copy */
    *forked = entry->id;
    kvt__reply__free_unpacked(reply, NULL);
    return 0;
}
