/* Attaches to kvtierd, creates a cache of four layers, runs a prompt and some decode steps over it,
 * and closes. A model would compute K and V and attend where this one writes and reads numbers.
 *     cc attach.c $(pkg-config --cflags --libs kvtier) -o attach && ./attach */
#include <kvtier.h>
#include <stdio.h>
#include <stdlib.h>

enum { LAYERS = 4, DIM = 8 }; /* DIM: floats of a token's K, and of its V */
static struct kvt_client *client;

static int must(int rc) {
    if (rc < 0) {
        fprintf(stderr, "%s: %s\n", kvt_error_name(rc), kvt_error_message(client));
        exit(1);
    }
    return rc;
}

/* One layer's piece: write the new tokens, then read all of them, the new ones too. */
static double attend(const struct kvt_piece *p) {
    double sum = 0;
    for (uint32_t r = 0; r < p->run_count; r++) {
        const struct kvt_run *run = &p->runs[r];
        float *k = run->k, *v = run->v;
        uint32_t old = run->read_count * DIM, all = old + run->append_count * DIM;
        for (uint32_t i = old; i < all; i++)
            k[i] = v[i] = 1.0f;
        for (uint32_t i = 0; i < all; i++)
            sum += k[i] * v[i];
    }
    return sum / DIM;
}

int main(void) {
    struct kvt_layer_shape layers[LAYERS];
    for (int i = 0; i < LAYERS; i++) /* heads, elements of K and of V, type */
        layers[i] = (struct kvt_layer_shape){KVT_KIND_FULL, 1, DIM, DIM, KVT_DTYPE_F32, 0};
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
        uint32_t tokens = done == 0 ? 100 : 1, steps = done == 0 ? 1 : 10 - done;
        must(kvt_step_begin(client, cache, NULL, 0, tokens, steps, &step));
        for (uint32_t left = kvt_step_left(step); left > 0; left--, done++) {
            const struct kvt_piece *piece;
            double seen = 0; /* tokens, by all layers together */
            while (must(kvt_step_piece(step, &piece)) == 1) {
                must(kvt_piece_wait(step, piece)); /* its bytes are on the device */
                seen += attend(piece);
                must(kvt_piece_done(step, piece)); /* they may go */
            }
            must(kvt_step_end(step)); /* the results may be used */
            printf("step %u: each layer attended to %.0f tokens\n", done, seen / LAYERS);
        }
    }
    must(kvt_cache_close(client, cache));
    kvt_detach(client);
    return 0;
}
