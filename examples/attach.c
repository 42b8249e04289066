/* Attaches to kvtierd, creates a cache of four layers, runs a prompt and some decode steps over it,
 * and closes. A model would compute K and V and attend where this one writes and reads numbers.
 *
 *     cc attach.c $(pkg-config --cflags --libs kvtier) -o attach && ./attach
 */
#include <kvtier.h>

#include <stdio.h>
#include <stdlib.h>

#define LAYERS 4
#define DIM    8 /* floats of a token's K, and of its V */

static struct kvt_client *client;

static void must(int rc) {
    if (rc < 0) {
        fprintf(stderr, "%s: %s\n", kvt_error_name(rc), kvt_error_message(client));
        exit(1);
    }
}

/* One layer's piece: write the new tokens, then read all of them, the new ones too. */
static double attend(const struct kvt_piece *p) {
    double sum = 0;
    for (uint32_t r = 0; r < p->run_count; r++) {
        const struct kvt_run *run = &p->runs[r];
        float *k = run->k, *v = run->v;
        for (uint32_t i = run->read_count * DIM; i < (run->read_count + run->append_count) * DIM;
             i++)
            k[i] = v[i] = 1.0f;
        for (uint32_t i = 0; i < (run->read_count + run->append_count) * DIM; i++)
            sum += k[i] * v[i];
    }
    return sum / DIM;
}

int main(void) {
    struct kvt_layer_shape layers[LAYERS];
    for (int i = 0; i < LAYERS; i++)
        layers[i] = (struct kvt_layer_shape){.kind = KVT_KIND_FULL,
                                             .kv_heads = 1,
                                             .dtype = KVT_DTYPE_F32,
                                             .k_head_dim = DIM,
                                             .v_head_dim = DIM};
    struct kvt_cache_create_options options = {.layers = layers,
                                               .layer_count = LAYERS,
                                               .mode = KVT_OFFLOADED,
                                               .append_max = 100,
                                               .resident_layers_max = -1,
                                               .name = "example"};
    uint32_t cache;
    must(kvt_attach(&(struct kvt_attach_options){.worker = KVT_SEGMENT}, &client));
    must(kvt_cache_create(client, &options, &cache));

    for (uint32_t done = 0; done < 10;) { /* a prompt of 100 tokens, then nine steps of one token */
        struct kvt_step *step;
        must(kvt_step_begin(client, cache, NULL, 0, done == 0 ? 100 : 1, done == 0 ? 1 : 10 - done,
                            &step));
        for (uint32_t left = kvt_step_left(step); left > 0; left--, done++) {
            const struct kvt_piece *piece;
            double tokens = 0; /* seen by all layers together */
            int rc;
            while ((rc = kvt_step_piece(step, &piece)) == 1) {
                must(kvt_piece_wait(step, piece)); /* its bytes are on the device */
                tokens += attend(piece);
                must(kvt_piece_done(step, piece)); /* they may go */
            }
            must(rc);
            must(kvt_step_end(step)); /* the new tokens are committed */
            printf("step %u: each layer attended to %.0f tokens\n", done, tokens / LAYERS);
        }
    }
    must(kvt_cache_close(client, cache));
    kvt_detach(client);
    return 0;
}
