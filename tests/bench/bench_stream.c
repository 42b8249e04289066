/* Bytes per second streamed through kvtierd and libkvtier to a worker that computes nothing, over a
 * plain memcpy of as many bytes in pieces of the same size by as many threads. In pairs; prints one
 * line of JSON. Time is all of it: STEP, the waits, and the wait for the commit of the schedule
 * before.
 *
 * Needs a running daemon with room for LAYERS x 16 MiB on the host and 3 x 16 MiB on the device, and
 * THREADS copy threads: KVTIER_RUNTIME_DIR.
 */
#include "tests/bench/plain_copy.h"
#include "tests/bench/worker.h"

#include <string.h>
#include <sys/mman.h>

/* A layer is one piece: 4,096 tokens of 8 KV heads, K and V of 128 bf16 each, 4 KiB a token. */
enum { PAIRS = 21, LAYERS = 16, STEPS = 4, SLOTS = 3, THREADS = 2, TOKENS_MAX = 4096 };
enum { PROMPT = TOKENS_MAX - PAIRS * STEPS };
#define TOKEN_BYTES UINT64_C(4096)
#define PIECE_BYTES (TOKENS_MAX * TOKEN_BYTES)

static uint8_t *source, *target;

static void walk(struct kvt_client *client, uint32_t cache, uint32_t tokens, uint32_t steps) {
    struct kvt_step *step;
    kvt_bench_must(client, kvt_step_begin(client, cache, NULL, 0, tokens, steps, &step));
    if (kvt_step_left(step) != steps) {
        fprintf(stderr, "bench_stream: %u steps wanted, %u granted\n", steps, kvt_step_left(step));
        exit(1);
    }
    kvt_bench_walk(client, step);
}

static uint64_t to_device(struct kvt_client *client, uint32_t cache) {
    struct kvt_cache_stat stat;
    kvt_bench_must(client, kvt_cache_settle(client, cache, 10000));
    kvt_bench_must(client, kvt_cache_stat(client, cache, &stat));
    return stat.to_device_bytes;
}

static double plain(void) {
    return kvt_plain_copy_run(&(struct kvt_plain_copy){.source = source,
                                                       .target = target,
                                                       .piece_bytes = PIECE_BYTES,
                                                       .pieces = STEPS * LAYERS,
                                                       .distinct = LAYERS,
                                                       .slots = SLOTS,
                                                       .threads = THREADS});
}

static double streamed(struct kvt_client *client, uint32_t cache, double *bytes) {
    uint64_t before = to_device(client, cache);
    double begin = kvt_bench_now_s();
    walk(client, cache, 1, STEPS);
    double seconds = kvt_bench_now_s() - begin;
    *bytes = (double)(to_device(client, cache) - before);
    return *bytes / seconds / 1e9;
}

int main(void) {
    struct kvt_layer_shape layers[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        layers[i] = (struct kvt_layer_shape){.kind = KVT_KIND_FULL,
                                             .kv_heads = 8,
                                             .k_head_dim = 128,
                                             .v_head_dim = 128,
                                             .dtype = KVT_DTYPE_BF16};
    }
    struct kvt_cache_create_options o = {.layers = layers,
                                         .layer_count = LAYERS,
                                         .mode = KVT_OFFLOADED,
                                         .append_max = PROMPT,
                                         .piece_tokens = TOKENS_MAX,
                                         .resident_layers_max = -1,
                                         .name = "stream"};
    struct kvt_client *client;
    uint32_t cache;
    kvt_bench_must(NULL, kvt_attach(&(struct kvt_attach_options){.worker = KVT_SEGMENT}, &client));
    kvt_bench_must(client, kvt_cache_create(client, &o, &cache));
    source = mmap(NULL, LAYERS * PIECE_BYTES, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    target = mmap(NULL, SLOTS * PIECE_BYTES, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (source == MAP_FAILED || target == MAP_FAILED) {
        fprintf(stderr, "bench_stream: no memory for the peer\n");
        return 1;
    }
    memset(source, 1, LAYERS * PIECE_BYTES);
    walk(client, cache, PROMPT, 1);
    double ours[PAIRS], theirs[PAIRS], ratios[PAIRS], of_need[PAIRS], bytes;
    for (int i = 0; i < PAIRS; i++) {
        theirs[i] = i % 2 == 0 ? plain() : 0;
        ours[i] = streamed(client, cache, &bytes);
        theirs[i] = i % 2 == 1 ? plain() : theirs[i];
        ratios[i] = ours[i] / theirs[i];
        of_need[i] = bytes / ((double)STEPS * LAYERS * (PROMPT + i * STEPS) * TOKEN_BYTES);
    }
    kvt_bench_must(client, kvt_cache_close(client, cache));
    kvt_detach(client);

    printf("{\"bench\": \"stream\", \"unit\": \"GB/s\", \"peer\": \"threaded memcpy\", ");
    kvt_interval_print("ours", kvt_median_interval(ours, PAIRS));
    printf(", ");
    kvt_interval_print("theirs", kvt_median_interval(theirs, PAIRS));
    printf(", ");
    kvt_interval_print("ratio", kvt_median_interval(ratios, PAIRS));
    printf(", ");
    kvt_interval_print("bytes_over_need", kvt_median_interval(of_need, PAIRS));
    printf("}\n");
    return 0;
}
