#include "client/lib/extents.h"

#include "proto/attach.h"
#include "proto/errors.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define INDEX_SIZE_FIRST 64 /* a power of two; kept at least twice the entries */

/* ---- the index: open addressing, rebuilt when entries go ---------------------------------------- */

static uint32_t slot_of(const struct kvt_client_extents *t, uint32_t id) {
    return (id * UINT32_C(2654435761)) & (t->index_size - 1);
}

static struct kvt_client_extent *find(struct kvt_client_extents *t, uint32_t id) {
    for (uint32_t i = slot_of(t, id); t->index[i] != 0; i = (i + 1) & (t->index_size - 1)) {
        struct kvt_client_extent *e = &t->entries[t->index[i] - 1];
        if (e->id == id) {
            return e;
        }
    }
    return NULL;
}

static void index_insert(struct kvt_client_extents *t, uint32_t entry) {
    uint32_t i = slot_of(t, t->entries[entry].id);
    while (t->index[i] != 0) {
        i = (i + 1) & (t->index_size - 1);
    }
    t->index[i] = entry + 1;
}

static void index_rebuild(struct kvt_client_extents *t) {
    memset(t->index, 0, t->index_size * sizeof *t->index);
    for (uint32_t i = 0; i < t->count; i++) {
        index_insert(t, i);
    }
}

static int grow(struct kvt_client_extents *t) {
    uint32_t capacity = t->capacity == 0 ? INDEX_SIZE_FIRST / 2 : 2 * t->capacity;
    struct kvt_client_extent *entries = realloc(t->entries, capacity * sizeof *entries);
    if (entries == NULL) {
        return -KVT_ENOMEM;
    }
    t->entries = entries;
    uint32_t *pins = realloc(t->pins, capacity * sizeof *pins);
    if (pins == NULL) {
        return -KVT_ENOMEM;
    }
    t->pins = pins;
    uint32_t *index = calloc(2 * (size_t)capacity, sizeof *index);
    if (index == NULL) {
        return -KVT_ENOMEM;
    }
    free(t->index);
    t->index = index;
    t->index_size = 2 * capacity;
    t->capacity = capacity;
    index_rebuild(t);
    return 0;
}

/* ---- life ------------------------------------------------------------------------------------- */

int kvt_client_extents_init(struct kvt_client_extents *t, const struct kvt_client_device_ops *ops,
                            struct kvt_client_gpu *gpu) {
    memset(t, 0, sizeof *t);
    t->ops = ops;
    t->gpu = gpu;
    pthread_condattr_t attr;
    (void)pthread_condattr_init(&attr);
    (void)pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    (void)pthread_mutex_init(&t->lock, NULL);
    (void)pthread_cond_init(&t->added, &attr);
    (void)pthread_condattr_destroy(&attr);
    return grow(t);
}

/* Unmaps and forgets; the last entry takes its place. Lock held. */
static void forget(struct kvt_client_extents *t, struct kvt_client_extent *e) {
    if (e->mapped) {
        t->ops->unmap(t->gpu, e->address, e->import.bytes);
    } else if (e->address != NULL) {
        t->ops->unreserve(t->gpu, e->address, e->import.bytes);
    }
    if (e->import.fd >= 0) {
        (void)close(e->import.fd);
    }
    *e = t->entries[--t->count];
    index_rebuild(t);
}

/* Unmaps it, and keeps its addresses. If the device refuses, it cannot be used any more: elsewhere it would
 * not be what its user knows. Lock held. */
static void vacate(struct kvt_client_extents *t, struct kvt_client_extent *e) {
    if (e->mapped && t->ops->vacate(t->gpu, e->address, e->import.bytes) != 0) {
        t->ops->unmap(t->gpu, e->address, e->import.bytes);
        e->address = NULL;
        e->lost = true;
    }
    if (e->import.fd >= 0) {
        (void)close(e->import.fd);
        e->import.fd = -1;
    }
    e->mapped = e->reclaim = false;
    e->vacant = true;
    e->used_until = 0;
}

/* What the daemon asked for. Lock held. */
static void give_back(struct kvt_client_extents *t, struct kvt_client_extent *e, bool keep) {
    if (keep) {
        vacate(t, e);
    } else {
        forget(t, e);
    }
}

bool kvt_client_extents_take(struct kvt_client_extents *t, uint32_t *id) {
    (void)pthread_mutex_lock(&t->lock);
    bool found = t->count > 0;
    if (found) {
        *id = t->entries[t->count - 1].id;
        forget(t, &t->entries[t->count - 1]);
    }
    (void)pthread_mutex_unlock(&t->lock);
    return found;
}

void kvt_client_extents_free(struct kvt_client_extents *t) {
    uint32_t id;
    if (t->ops == NULL) {
        return; /* never initialised */
    }
    while (t->index != NULL && kvt_client_extents_take(t, &id)) {}
    (void)pthread_cond_destroy(&t->added);
    (void)pthread_mutex_destroy(&t->lock);
    free(t->entries);
    free(t->index);
    free(t->pins);
    memset(t, 0, sizeof *t);
}

void kvt_client_extents_close(struct kvt_client_extents *t) {
    (void)pthread_mutex_lock(&t->lock);
    t->closed = true;
    (void)pthread_cond_broadcast(&t->added);
    (void)pthread_mutex_unlock(&t->lock);
}

/* ---- the library's thread --------------------------------------------------------------------- */

static int add(struct kvt_client_extents *t, uint32_t id, const struct kvt_client_import *import) {
    struct kvt_client_extent *e = find(t, id);
    if (e != NULL && e->vacant && e->import.bytes == import->bytes) {
        e->import = *import;
        e->vacant = false;
        (void)pthread_cond_broadcast(&t->added);
        return 0;
    }
    if (e != NULL) {
        return -KVT_EEXIST;
    }
    if (t->count == KVT_EXTENTS_MAX) {
        return -KVT_EBUSY;
    }
    if (t->count == t->capacity) {
        int rc = grow(t);
        if (rc != 0) {
            return rc;
        }
    }
    t->entries[t->count] = (struct kvt_client_extent){.id = id, .import = *import};
    index_insert(t, t->count);
    t->count++;
    (void)pthread_cond_broadcast(&t->added);
    return 0;
}

int kvt_client_extents_add(struct kvt_client_extents *t, uint32_t id,
                           const struct kvt_client_import *import) {
    (void)pthread_mutex_lock(&t->lock);
    int rc = add(t, id, import);
    (void)pthread_mutex_unlock(&t->lock);
    if (rc != 0 && import->fd >= 0) {
        (void)close(import->fd);
    }
    return rc;
}

/* Nothing of this process uses it, on the device either. */
static bool is_free(const struct kvt_client_extents *t, const struct kvt_client_extent *e) {
    return !e->pinned && (e->used_until == 0 || t->step == NULL ||
                          t->ops->passed(t->gpu, t->step, e->used_until));
}

bool kvt_client_extents_reclaim(struct kvt_client_extents *t, uint32_t id, bool keep) {
    (void)pthread_mutex_lock(&t->lock);
    struct kvt_client_extent *e = find(t, id);
    bool free_now = e == NULL || is_free(t, e);
    if (!free_now) {
        e->reclaim = true;
        e->keep = keep;
    } else if (e != NULL) {
        give_back(t, e, keep);
    }
    (void)pthread_mutex_unlock(&t->lock);
    return free_now;
}

bool kvt_client_extents_reclaimable(struct kvt_client_extents *t, uint32_t *id) {
    bool found = false;
    (void)pthread_mutex_lock(&t->lock);
    for (uint32_t i = 0; i < t->count && !found; i++) {
        if (t->entries[i].reclaim && is_free(t, &t->entries[i])) {
            *id = t->entries[i].id;
            give_back(t, &t->entries[i], t->entries[i].keep);
            found = true;
        }
    }
    (void)pthread_mutex_unlock(&t->lock);
    return found;
}

bool kvt_client_extents_draining(struct kvt_client_extents *t) {
    bool any = false;
    (void)pthread_mutex_lock(&t->lock);
    for (uint32_t i = 0; i < t->count && !any; i++) {
        any = t->entries[i].reclaim && !t->entries[i].pinned;
    }
    (void)pthread_mutex_unlock(&t->lock);
    return any;
}

/* ---- the client's user ------------------------------------------------------------------------ */

static struct kvt_client_extent *find_filled(struct kvt_client_extents *t, uint32_t id) {
    struct kvt_client_extent *e = find(t, id);
    return e != NULL && !e->vacant ? e : NULL;
}

/* The reply that names an extent may overtake the packet that brings it: they come by two sockets.
 * Lock held. */
static struct kvt_client_extent *await(struct kvt_client_extents *t, uint32_t id, int timeout_ms) {
    struct kvt_client_extent *e = find_filled(t, id);
    if (e != NULL) {
        return e;
    }
    struct timespec deadline;
    (void)clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline.tv_sec += timeout_ms / 1000;
    deadline.tv_nsec += (timeout_ms % 1000) * 1000000L;
    if (deadline.tv_nsec >= 1000000000L) {
        deadline.tv_sec++;
        deadline.tv_nsec -= 1000000000L;
    }
    while (e == NULL && !t->closed &&
           pthread_cond_timedwait(&t->added, &t->lock, &deadline) != ETIMEDOUT) {
        e = find_filled(t, id);
    }
    return e;
}

static int pin(struct kvt_client_extents *t, struct kvt_client_extent *e) {
    if (e->lost) {
        return -KVT_EDEVICE;
    }
    if (!e->mapped) {
        int rc = t->ops->map(t->gpu, &e->import, &e->address);
        if (rc != 0) {
            return rc;
        }
        e->mapped = true;
        if (e->import.fd >= 0) {
            (void)close(e->import.fd);
            e->import.fd = -1;
        }
    }
    if (!e->pinned) {
        e->pinned = true;
        t->pins[t->pin_count++] = e->id;
    }
    return 0;
}

int kvt_client_extents_pin(struct kvt_client_extents *t, uint32_t id, int timeout_ms,
                           void **address, uint64_t *bytes) {
    (void)pthread_mutex_lock(&t->lock);
    struct kvt_client_extent *e = await(t, id, timeout_ms);
    int rc = e == NULL ? (t->closed ? -KVT_EGONE : -KVT_ENOENT) : pin(t, e);
    if (rc == 0) {
        *address = e->address;
        *bytes = e->import.bytes;
    }
    (void)pthread_mutex_unlock(&t->lock);
    return rc;
}

bool kvt_client_extents_unpin(struct kvt_client_extents *t, uint64_t step) {
    bool wanted = false;
    (void)pthread_mutex_lock(&t->lock);
    for (uint32_t i = 0; i < t->pin_count; i++) {
        struct kvt_client_extent *e = find(t, t->pins[i]);
        if (e != NULL) {
            e->pinned = false;
            e->used_until = step;
            wanted |= e->reclaim;
        }
    }
    t->pin_count = 0;
    (void)pthread_mutex_unlock(&t->lock);
    return wanted;
}
