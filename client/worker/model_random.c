/*
 * Random weights of a named shape: for tests, and for measuring models that are
 * not at hand. Q8_0 with uniform values, scaled so that activations keep their size.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/shapes.h"
#include "client/worker/dequant.h"
#include "client/worker/fail.h"
#include "client/worker/model.h"
#include "client/worker/sample.h"
#include "kernels/half.h"
#include "proto/errors.h"

#define BLOCK       32u
#define BLOCK_BYTES 34u

struct named_shape {
    const char *name;
    bool tied;
    struct kvt_model_shape shape;
};

#define SHAPE(name, tied, layers, width, hidden, heads, kv_heads, k, v, turned, words, context, \
              eps, base)                                                                        \
    {name,                                                                                      \
     tied,                                                                                      \
     {layers, width, hidden, heads, kv_heads, k, v, turned, words, context, eps, base, 1}},
static const struct named_shape shapes[] = {KVT_SHAPES(SHAPE)};

const char *kvt_model_random_names(void) {
    return KVT_SHAPE_NAMES;
}

bool kvt_model_random_has(const char *name) {
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        if (strcmp(name, shapes[i].name) == 0)
            return true;
    return false;
}

/* Where the next weight goes; NULL while bytes are only counted. */
struct filling {
    uint8_t *at;
    uint64_t bytes;
    uint64_t state;
};

static void fill_weight(struct filling *f, uint32_t columns, uint32_t rows, struct kvt_weight *w) {
    size_t row_bytes = (size_t)columns / BLOCK * BLOCK_BYTES;
    uint64_t bytes = (uint64_t)rows * row_bytes;
    f->bytes += bytes;
    if (!f->at)
        return;
    *w = (struct kvt_weight){KVT_TENSOR_Q8_0, rows, columns, row_bytes, f->at};
    /* uniform in [-128, 127] has deviation 74; the sum over a row shall have 1 */
    uint16_t scale = kvt_f16_of_f32(1.0f / (74.0f * sqrtf((float)columns)));
    for (uint64_t i = 0; i < bytes; i += BLOCK_BYTES) {
        memcpy(f->at + i, &scale, sizeof(scale));
        for (size_t k = 0; k < 4; k++) {
            uint64_t bits = kvt_random_next(&f->state);
            memcpy(f->at + i + 2 + 8 * k, &bits, sizeof(bits));
        }
    }
    f->at += bytes;
}

static void fill_layer(struct filling *f, const struct kvt_model_shape *s,
                       struct kvt_model_layer *l) {
    fill_weight(f, s->width, s->heads * s->k_dim, &l->q);
    fill_weight(f, s->width, s->kv_heads * s->k_dim, &l->k);
    fill_weight(f, s->width, s->kv_heads * s->v_dim, &l->v);
    fill_weight(f, s->heads * s->v_dim, s->width, &l->out);
    fill_weight(f, s->width, s->hidden, &l->gate);
    fill_weight(f, s->width, s->hidden, &l->up);
    fill_weight(f, s->hidden, s->width, &l->down);
}

static void fill(struct filling *f, struct kvt_model *m, bool tied) {
    const struct kvt_model_shape *s = &m->shape;
    for (uint32_t i = 0; i < (m->shares_layers ? 1 : s->layers); i++)
        fill_layer(f, s, &m->layers[i]);
    fill_weight(f, s->width, s->vocabulary, &m->embedding);
    m->output = m->embedding;
    if (!tied)
        fill_weight(f, s->width, s->vocabulary, &m->output);
}

static int fill_all(struct kvt_model *m, bool tied, uint64_t seed, const char *name, char *err,
                    size_t err_size) {
    uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    struct filling count = {NULL, 0, 0};
    fill(&count, m, tied);
    if (count.bytes > memory / 2) {
        m->shares_layers = true;
        count.bytes = 0;
        fill(&count, m, tied);
    }
    m->random = malloc(count.bytes);
    if (!m->random || count.bytes > memory)
        return kvt_fail(-KVT_ENOMEM, err, err_size,
                        "--random %s: %" PRIu64 " MiB of weights do not fit in this machine's "
                        "%" PRIu64 " MiB; choose a smaller shape",
                        name, count.bytes >> 20, memory >> 20);
    struct filling f = {m->random, 0, seed};
    fill(&f, m, tied);
    for (uint32_t i = 1; m->shares_layers && i < m->shape.layers; i++) {
        struct kvt_model_layer norms = m->layers[i];
        m->layers[i] = m->layers[0];
        m->layers[i].attention_norm = norms.attention_norm;
        m->layers[i].feed_norm = norms.feed_norm;
    }
    for (size_t i = 0; i < (2 * (size_t)m->shape.layers + 1) * m->shape.width; i++)
        m->vectors[i] = 1;
    return 0;
}

int kvt_model_random(struct kvt_model **out, const char *name, uint32_t layers, uint64_t seed,
                     char *err, size_t err_size) {
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        struct kvt_model_shape shape = shapes[i].shape;
        struct kvt_model *m = NULL;
        if (strcmp(name, shapes[i].name) != 0)
            continue;
        if (layers > 0)
            shape.layers = layers;
        int rc = kvt_model_alloc(&m, &shape, NULL);
        if (rc)
            return kvt_fail(rc, err, err_size, "--random %s: out of memory", name);
        rc = fill_all(m, shapes[i].tied, seed, name, err, err_size);
        if (rc)
            kvt_model_close(m);
        else
            *out = m;
        return rc;
    }
    return kvt_fail(-KVT_EINVAL, err, err_size, "--random %s: no such shape; there are %s", name,
                    kvt_model_random_names());
}
