/* A model from a GGUF file: its shape from the metadata, every tensor checked against it. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "client/worker/dequant.h"
#include "client/worker/fail.h"
#include "client/worker/model.h"
#include "proto/errors.h"

/* Larger than any model; keeps products of two far from overflow. */
#define DIMENSION_MAX  (1u << 20)
#define VOCABULARY_MAX (1u << 24)
#define CONTEXT_MAX    (1u << 30)

struct loading {
    const struct kvt_gguf *gguf;
    const char *name; /* of the file */
    char *err;
    size_t err_size;
};

/* ------------------------------------------------------------------ metadata */

/* A count in [1, max]; absent: `fallback`, or an error if that is 0. */
static int count_of(const struct loading *l, const char *key, uint32_t max, uint32_t fallback,
                    uint32_t *out) {
    int rc = kvt_gguf_u32(l->gguf, key, out);
    if (rc == -KVT_ENOENT && fallback > 0) {
        *out = fallback;
        return 0;
    }
    if (rc == -KVT_ENOENT)
        return kvt_fail(-KVT_EINVAL, l->err, l->err_size,
                        "%s: lacks %s, which a Llama model has; convert the model again", l->name,
                        key);
    if (rc || *out == 0 || *out > max)
        return kvt_fail(-KVT_EINVAL, l->err, l->err_size,
                        "%s: %s is not a number from 1 to %" PRIu32 "; convert the model again",
                        l->name, key, max);
    return 0;
}

static int real_of(const struct loading *l, const char *key, float fallback, float *out) {
    int rc = kvt_gguf_f32(l->gguf, key, out);
    if (rc == -KVT_ENOENT && fallback > 0) {
        *out = fallback;
        return 0;
    }
    if (rc || !(*out > 0) || *out > 1e12f)
        return kvt_fail(-KVT_EINVAL, l->err, l->err_size,
                        "%s: %s is not a positive number; convert the model again", l->name, key);
    return 0;
}

static int unsupported(const struct loading *l, const char *what,
                       const struct kvt_gguf_string *text, const char *supported) {
    return kvt_fail(-KVT_ENOTSUP, l->err, l->err_size,
                    "%s: %s \"%.*s\" is not supported; supported is %s; use another model", l->name,
                    what, text->size < 60 ? (int)text->size : 60, text->data, supported);
}

static int check_features(const struct loading *l, struct kvt_model_shape *shape) {
    struct kvt_gguf_string text;
    uint32_t experts = 0;
    if (kvt_gguf_text(l->gguf, "general.architecture", &text))
        return kvt_fail(-KVT_EINVAL, l->err, l->err_size,
                        "%s: names no architecture (general.architecture); convert the model again",
                        l->name);
    if (text.size != 5 || memcmp(text.data, "llama", 5) != 0)
        return unsupported(l, "architecture", &text, "\"llama\"");
    if (kvt_gguf_u32(l->gguf, "llama.expert_count", &experts) == 0 && experts > 0)
        return kvt_fail(-KVT_ENOTSUP, l->err, l->err_size,
                        "%s: is a mixture of %" PRIu32
                        " experts, which is not supported; use a dense Llama model",
                        l->name, experts);
    shape->rope_scale = 1;
    if (kvt_gguf_text(l->gguf, "llama.rope.scaling.type", &text))
        return 0;
    if (text.size == 6 && memcmp(text.data, "linear", 6) == 0)
        return real_of(l, "llama.rope.scaling.factor", 1, &shape->rope_scale);
    if (text.size == 4 && memcmp(text.data, "none", 4) == 0)
        return 0;
    return unsupported(l, "RoPE scaling", &text, "\"linear\" and \"none\"");
}

static int read_shape(const struct loading *l, struct kvt_model_shape *s) {
    const struct kvt_gguf_tensor *embedding = kvt_gguf_tensor_find(l->gguf, "token_embd.weight");
    uint32_t head_dim;
    int rc = check_features(l, s);
    if (rc == 0)
        rc = count_of(l, "llama.block_count", DIMENSION_MAX, 0, &s->layers);
    if (rc == 0)
        rc = count_of(l, "llama.embedding_length", DIMENSION_MAX, 0, &s->width);
    if (rc == 0)
        rc = count_of(l, "llama.feed_forward_length", DIMENSION_MAX, 0, &s->hidden);
    if (rc == 0)
        rc = count_of(l, "llama.attention.head_count", DIMENSION_MAX, 0, &s->heads);
    if (rc == 0)
        rc = count_of(l, "llama.attention.head_count_kv", DIMENSION_MAX, s->heads, &s->kv_heads);
    if (rc == 0)
        rc = count_of(l, "llama.context_length", CONTEXT_MAX, 0, &s->context);
    if (rc == 0)
        rc = real_of(l, "llama.attention.layer_norm_rms_epsilon", 0, &s->norm_epsilon);
    if (rc == 0)
        rc = real_of(l, "llama.rope.freq_base", 10000, &s->rope_base);
    if (rc)
        return rc;
    head_dim = s->width / s->heads ? s->width / s->heads : 1;
    rc = count_of(l, "llama.attention.key_length", DIMENSION_MAX, head_dim, &s->k_dim);
    if (rc == 0)
        rc = count_of(l, "llama.attention.value_length", DIMENSION_MAX, head_dim, &s->v_dim);
    if (rc == 0)
        rc = count_of(l, "llama.rope.dimension_count", DIMENSION_MAX, s->k_dim, &s->rope_dim);
    if (rc)
        return rc;
    if (!embedding || embedding->dims[1] > VOCABULARY_MAX)
        return kvt_fail(-KVT_EINVAL, l->err, l->err_size,
                        "%s: has no usable tensor token_embd.weight; convert the model again",
                        l->name);
    s->vocabulary = (uint32_t)embedding->dims[1];
    if (s->heads % s->kv_heads != 0 || s->rope_dim > s->k_dim || s->rope_dim % 2 != 0 ||
        (uint64_t)s->heads * (s->k_dim > s->v_dim ? s->k_dim : s->v_dim) > DIMENSION_MAX)
        return kvt_fail(-KVT_EINVAL, l->err, l->err_size,
                        "%s: its heads do not fit together (%" PRIu32 " heads, %" PRIu32
                        " KV heads of %" PRIu32 " and %" PRIu32 ", %" PRIu32
                        " of them turned); convert the model again",
                        l->name, s->heads, s->kv_heads, s->k_dim, s->v_dim, s->rope_dim);
    return 0;
}

/* ------------------------------------------------------------------ tensors */

static int find(const struct loading *l, const char *name, uint64_t columns, uint64_t rows,
                const struct kvt_gguf_tensor **out) {
    const struct kvt_gguf_tensor *t = kvt_gguf_tensor_find(l->gguf, name);
    if (!t)
        return kvt_fail(-KVT_EINVAL, l->err, l->err_size,
                        "%s: lacks tensor %s; it is no complete Llama model; convert it again",
                        l->name, name);
    if (t->dims[0] != columns || t->dims[1] != rows || t->dims[2] != 1 || t->dims[3] != 1)
        return kvt_fail(-KVT_EINVAL, l->err, l->err_size,
                        "%s: tensor %s is %" PRIu64 " x %" PRIu64 ", but the model's shape wants "
                        "%" PRIu64 " x %" PRIu64 "; convert the model again",
                        l->name, name, t->dims[0], t->dims[1], columns, rows);
    *out = t;
    return 0;
}

static int take_weight(const struct loading *l, const char *name, uint32_t columns, uint32_t rows,
                       struct kvt_weight *out) {
    const struct kvt_gguf_tensor *t = NULL;
    int rc = find(l, name, columns, rows, &t);
    if (rc == 0)
        *out = (struct kvt_weight){t->type, rows, columns, t->size_bytes / rows, t->data};
    return rc;
}

static int take_vector(const struct loading *l, const char *name, uint32_t count, float *out) {
    const struct kvt_gguf_tensor *t = NULL;
    int rc = find(l, name, count, 1, &t);
    if (rc == 0)
        kvt_dequant(t->type)(t->data, out, count);
    return rc;
}

static int take_layer(const struct loading *l, const struct kvt_model_shape *s, uint32_t index,
                      struct kvt_model_layer *layer) {
    const struct {
        const char *part;
        uint32_t columns, rows;
        struct kvt_weight *to;
    } parts[] = {
        {"attn_q", s->width, s->heads * s->k_dim, &layer->q},
        {"attn_k", s->width, s->kv_heads * s->k_dim, &layer->k},
        {"attn_v", s->width, s->kv_heads * s->v_dim, &layer->v},
        {"attn_output", s->heads * s->v_dim, s->width, &layer->out},
        {"ffn_gate", s->width, s->hidden, &layer->gate},
        {"ffn_up", s->width, s->hidden, &layer->up},
        {"ffn_down", s->hidden, s->width, &layer->down},
    };
    char name[64];
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < sizeof(parts) / sizeof(parts[0]); i++) {
        snprintf(name, sizeof(name), "blk.%" PRIu32 ".%s.bias", index, parts[i].part);
        if (kvt_gguf_tensor_find(l->gguf, name))
            return kvt_fail(-KVT_ENOTSUP, l->err, l->err_size,
                            "%s: has a bias (%s), which is not supported; use another model",
                            l->name, name);
        snprintf(name, sizeof(name), "blk.%" PRIu32 ".%s.weight", index, parts[i].part);
        rc = take_weight(l, name, parts[i].columns, parts[i].rows, parts[i].to);
    }
    snprintf(name, sizeof(name), "blk.%" PRIu32 ".attn_norm.weight", index);
    if (rc == 0)
        rc = take_vector(l, name, s->width, layer->attention_norm);
    snprintf(name, sizeof(name), "blk.%" PRIu32 ".ffn_norm.weight", index);
    if (rc == 0)
        rc = take_vector(l, name, s->width, layer->feed_norm);
    return rc;
}

/* Llama 3's long-context factors, if the file has them. Owned by the caller. */
static int take_rope_factors(const struct loading *l, uint32_t rope_dim, float **out) {
    *out = NULL;
    if (!kvt_gguf_tensor_find(l->gguf, "rope_freqs.weight"))
        return 0;
    *out = calloc(rope_dim / 2 + 1, sizeof(**out));
    if (!*out)
        return kvt_fail(-KVT_ENOMEM, l->err, l->err_size, "%s: out of memory", l->name);
    int rc = take_vector(l, "rope_freqs.weight", rope_dim / 2, *out);
    for (uint32_t i = 0; rc == 0 && i < rope_dim / 2; i++)
        if (!((*out)[i] > 0))
            rc = kvt_fail(-KVT_EINVAL, l->err, l->err_size,
                          "%s: rope_freqs.weight holds a factor that is not positive; convert the "
                          "model again",
                          l->name);
    return rc;
}

int kvt_model_load(struct kvt_model **out, const struct kvt_gguf *gguf, uint32_t layers, char *err,
                   size_t err_size) {
    struct loading l = {gguf, kvt_gguf_name(gguf), err, err_size};
    struct kvt_model_shape shape = {0};
    struct kvt_model *m = NULL;
    float *factors = NULL;
    int rc = read_shape(&l, &shape);
    if (rc)
        return rc;
    if (layers > shape.layers)
        return kvt_fail(-KVT_EINVAL, err, err_size,
                        "%s: has %" PRIu32 " layers; --layers %" PRIu32 " is more", l.name,
                        shape.layers, layers);
    if (layers > 0)
        shape.layers = layers;
    /* the tables are sized by the file's word, so it must hold the last layer */
    char last[64];
    snprintf(last, sizeof(last), "blk.%" PRIu32 ".attn_norm.weight", shape.layers - 1);
    const struct kvt_gguf_tensor *tensor = NULL;
    rc = find(&l, last, shape.width, 1, &tensor);
    if (rc == 0)
        rc = take_rope_factors(&l, shape.rope_dim, &factors);
    if (rc)
        goto out;
    rc = kvt_model_alloc(&m, &shape, factors);
    if (rc) {
        kvt_fail(rc, err, err_size, "%s: out of memory", l.name);
        goto out;
    }
    for (uint32_t i = 0; rc == 0 && i < shape.layers; i++)
        rc = take_layer(&l, &shape, i, &m->layers[i]);
    if (rc == 0)
        rc = take_vector(&l, "output_norm.weight", shape.width, m->output_norm);
    if (rc == 0)
        rc = take_weight(&l, "token_embd.weight", shape.width, shape.vocabulary, &m->embedding);
    m->output = m->embedding;
    if (rc == 0 && kvt_gguf_tensor_find(gguf, "output.weight"))
        rc = take_weight(&l, "output.weight", shape.width, shape.vocabulary, &m->output);
out:
    free(factors);
    if (rc)
        kvt_model_close(m);
    else
        *out = m;
    return rc;
}
