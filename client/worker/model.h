/*
 * A Llama-family model: its shape and its weights, from a GGUF file or random.
 *
 * Weights stay as they are in the file and are dequantized as they are used; the
 * small vectors (norms) are f32 copies.
 */
#ifndef KVT_WORKER_MODEL_H
#define KVT_WORKER_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "client/worker/gguf.h"
#include "client/worker/matmul.h"

struct kvt_model_shape {
    uint32_t layers;
    uint32_t width;  /* of the residual stream */
    uint32_t hidden; /* of the feed-forward part */
    uint32_t heads, kv_heads;
    uint32_t k_dim, v_dim; /* of a head */
    uint32_t rope_dim;     /* of a head, turned */
    uint32_t vocabulary;
    uint32_t context; /* tokens that it was made for */
    float norm_epsilon;
    float rope_base;
    float rope_scale;
};

struct kvt_model_layer {
    float *attention_norm, *feed_norm; /* [width] */
    struct kvt_weight q, k, v, out;
    struct kvt_weight gate, up, down;
};

struct kvt_model {
    struct kvt_model_shape shape;
    struct kvt_model_layer *layers;
    struct kvt_weight embedding, output; /* the same one if tied */
    float *output_norm;
    double *rope_frequencies; /* [rope_dim / 2] */
    bool shares_layers;       /* random: all layers use one set of weights */
    float *vectors;           /* owns all norms */
    uint8_t *random;          /* owns random weights */
};

/*
 * Reads a model. layers cuts it short, 0: all; not more than it has.
 * Ownership: borrows the file's bytes until it is closed.
 * Errors: -KVT_ENOTSUP an architecture or feature this worker lacks, -KVT_EINVAL a
 * missing tensor or one of another shape, -KVT_ENOMEM.
 */
__attribute__((warn_unused_result)) int kvt_model_load(struct kvt_model **out,
                                                       const struct kvt_gguf *gguf, uint32_t layers,
                                                       char *err, size_t err_size);

/*
 * Random weights of a named shape, equal for equal seeds; layers 0: as many as the
 * shape has, otherwise so many, also more. Layers share one set if
 * the model would take more than half of the machine's memory (shares_layers).
 */
__attribute__((warn_unused_result)) int kvt_model_random(struct kvt_model **out, const char *shape,
                                                         uint32_t layers, uint64_t seed, char *err,
                                                         size_t err_size);

/* "tiny, smollm2-135m, ..." */
const char *kvt_model_random_names(void);
bool kvt_model_random_has(const char *shape);

void kvt_model_close(struct kvt_model *model);

/* The model without weights: tables for `shape`, sized. For the two above. */
__attribute__((warn_unused_result)) int kvt_model_alloc(struct kvt_model **out,
                                                        const struct kvt_model_shape *shape,
                                                        const float *rope_factors);

/* Bytes of all weights, each counted once. */
uint64_t kvt_model_bytes(const struct kvt_model *model);

#endif
