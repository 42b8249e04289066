/* What file and random models have in common; see model.h. */
#include "client/worker/model.h"

#include <stdlib.h>

#include "kernels/rope_ref.h"
#include "proto/errors.h"

int kvt_model_alloc(struct kvt_model **out, const struct kvt_model_shape *shape,
                    const float *rope_factors) {
    struct kvt_model *m = calloc(1, sizeof(*m));
    if (!m)
        return -KVT_ENOMEM;
    m->shape = *shape;
    m->layers = calloc(shape->layers, sizeof(*m->layers));
    m->vectors = calloc((2 * (size_t)shape->layers + 1) * shape->width, sizeof(*m->vectors));
    m->rope_frequencies = calloc(shape->rope_dim / 2 + 1, sizeof(*m->rope_frequencies));
    if (!m->layers || !m->vectors || !m->rope_frequencies) {
        kvt_model_close(m);
        return -KVT_ENOMEM;
    }
    kvt_rope_frequencies_ref(shape->rope_base, shape->rope_scale, rope_factors, shape->rope_dim,
                             m->rope_frequencies);
    for (size_t i = 0; i < shape->layers; i++) {
        m->layers[i].attention_norm = m->vectors + 2 * i * shape->width;
        m->layers[i].feed_norm = m->vectors + (2 * i + 1) * shape->width;
    }
    m->output_norm = m->vectors + 2 * (size_t)shape->layers * shape->width;
    *out = m;
    return 0;
}

void kvt_model_close(struct kvt_model *m) {
    if (!m)
        return;
    free(m->layers);
    free(m->vectors);
    free(m->rope_frequencies);
    free(m->random);
    free(m);
}

static uint64_t weight_bytes(const struct kvt_weight *w) {
    return (uint64_t)w->rows * w->row_bytes;
}

uint64_t kvt_model_bytes(const struct kvt_model *m) {
    uint64_t bytes = weight_bytes(&m->embedding);
    uint32_t sets = m->shares_layers ? 1 : m->shape.layers;
    if (m->output.data != m->embedding.data)
        bytes += weight_bytes(&m->output);
    for (uint32_t i = 0; i < sets; i++) {
        const struct kvt_model_layer *l = &m->layers[i];
        bytes += weight_bytes(&l->q) + weight_bytes(&l->k) + weight_bytes(&l->v) +
                 weight_bytes(&l->out) + weight_bytes(&l->gate) + weight_bytes(&l->up) +
                 weight_bytes(&l->down);
    }
    return bytes;
}
