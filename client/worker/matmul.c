/* See matmul.h. */
#include "client/worker/matmul.h"

#include <cblas.h>
#include <stdlib.h>

#include "client/worker/dequant.h"
#include "kernels/cpu_ops.h"
#include "proto/errors.h"

/* Weight rows of one item: enough work to be worth taking, little enough to share out evenly. */
#define FEW_ROWS   32u
#define PANEL_ROWS 256u
/* A panel of f32 should stay in a core's L2 beside the activations. */
#define PANEL_FLOATS (192u * 1024)

struct kvt_matmul {
    struct kvt_pool *pool;
    const struct kvt_cpu_ops *ops;
    size_t scratch_floats; /* of one thread */
    float *scratch;

    /* the running job */
    const struct kvt_product *products;
    uint32_t product_count;
    uint32_t count;
    uint32_t first_item[KVT_PRODUCTS_MAX + 1];
    uint32_t item_rows[KVT_PRODUCTS_MAX];
};

static uint32_t panel_rows(uint32_t columns) {
    uint32_t rows = PANEL_FLOATS / columns / 16 * 16;
    return rows < 16 ? 16 : rows > PANEL_ROWS ? PANEL_ROWS : rows;
}

int kvt_matmul_open(struct kvt_matmul **out, struct kvt_pool *pool, uint32_t columns_max) {
    struct kvt_matmul *m = calloc(1, sizeof(*m));
    if (!m)
        return -KVT_ENOMEM;
    openblas_set_num_threads(1);
    m->pool = pool;
    m->ops = kvt_cpu_ops();
    /* a panel of a narrower weight has at most PANEL_FLOATS, or PANEL_ROWS narrow rows */
    size_t panel = (size_t)panel_rows(columns_max) * columns_max;
    m->scratch_floats = panel > PANEL_FLOATS ? panel : PANEL_FLOATS;
    m->scratch_floats = (m->scratch_floats + 31) / 32 * 32;
    m->scratch =
        aligned_alloc(128, kvt_pool_threads(pool) * m->scratch_floats * sizeof(*m->scratch));
    if (!m->scratch) {
        free(m);
        return -KVT_ENOMEM;
    }
    *out = m;
    return 0;
}

void kvt_matmul_close(struct kvt_matmul *m) {
    if (!m)
        return;
    free(m->scratch);
    free(m);
}

void kvt_weight_row(const struct kvt_weight *weight, uint32_t row, float *out) {
    kvt_dequant(weight->type)(weight->data + row * weight->row_bytes, out, weight->columns);
}

void kvt_matmul_gemm(int b_transposed, uint32_t m, uint32_t n, uint32_t k, const float *a,
                     uint32_t lda, const float *b, uint32_t ldb, float *c, uint32_t ldc) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, b_transposed ? CblasTrans : CblasNoTrans, (int)m,
                (int)n, (int)k, 1.0f, a, (int)lda, b, (int)ldb, 0.0f, c, (int)ldc);
}

static void few(const struct kvt_matmul *m, const struct kvt_product *p, uint32_t row,
                uint32_t rows, float *scratch) {
    const struct kvt_weight *w = p->weight;
    kvt_dequant_fn dequant = kvt_dequant(w->type);
    for (uint32_t end = row + rows; row < end; row++) {
        const uint8_t *data = w->data + row * w->row_bytes;
        const float *values = scratch;
        if (w->type == KVT_TENSOR_F32)
            values = (const float *)(const void *)data;
        else
            dequant(data, scratch, w->columns);
        for (size_t i = 0; i < m->count; i++)
            p->y[i * w->rows + row] = m->ops->dot(values, p->x + i * w->columns, w->columns);
    }
}

static void many(const struct kvt_matmul *m, const struct kvt_product *p, uint32_t row,
                 uint32_t rows, float *scratch) {
    const struct kvt_weight *w = p->weight;
    const uint8_t *data = w->data + row * w->row_bytes;
    const float *values = scratch;
    if (w->type == KVT_TENSOR_F32)
        values = (const float *)(const void *)data;
    else
        kvt_dequant(w->type)(data, scratch, (size_t)rows * w->columns);
    kvt_matmul_gemm(1, m->count, rows, w->columns, p->x, w->columns, values, w->columns, p->y + row,
                    w->rows);
}

static void item_main(void *arg, uint32_t item, uint32_t thread) {
    const struct kvt_matmul *m = arg;
    float *scratch = m->scratch + thread * m->scratch_floats;
    uint32_t i = 0;
    while (item >= m->first_item[i + 1])
        i++;
    const struct kvt_product *p = &m->products[i];
    uint32_t row = (item - m->first_item[i]) * m->item_rows[i];
    uint32_t rows = p->weight->rows - row;
    rows = rows < m->item_rows[i] ? rows : m->item_rows[i];
    if (m->count <= KVT_MATMUL_FEW)
        few(m, p, row, rows, scratch);
    else
        many(m, p, row, rows, scratch);
}

void kvt_matmul_run(struct kvt_matmul *m, const struct kvt_product *products,
                    uint32_t product_count, uint32_t count) {
    m->products = products;
    m->product_count = product_count;
    m->count = count;
    m->first_item[0] = 0;
    for (uint32_t i = 0; i < product_count; i++) {
        const struct kvt_weight *w = products[i].weight;
        m->item_rows[i] = count <= KVT_MATMUL_FEW ? FEW_ROWS : panel_rows(w->columns);
        m->first_item[i + 1] = m->first_item[i] + (w->rows + m->item_rows[i] - 1) / m->item_rows[i];
    }
    kvt_pool_run(m->pool, m->first_item[product_count], item_main, m);
}
