/* What a control request costs: PING through the library, the front and the daemon, beside a bare
 * ZeroMQ echo (DEALER -> ROUTER, ipc, messages of the same size) between two processes. Blocks of
 * both take turns. And how long a fork of 131,072 tokens takes to be answered, and what a piece costs
 * through kvtierd and the library.
 *
 * Needs a running daemon: KVTIER_RUNTIME_DIR. Prints one line of JSON.
 */
#include "tests/bench/stats.h"
#include "tests/bench/worker.h"

#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zmq.h>

enum {
    BLOCKS = 15,
    TRIPS = 400,
    FORKS = 201,
    TOKENS = 131072,
    MESSAGE_BYTES = 64,
    LAYERS = 32,
    STEPS = 8,
    SCHEDULES = 101
};

/* ---- the bare echo -------------------------------------------------------------------------------- */

static void echo_serve(const char *endpoint) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    void *context = zmq_ctx_new();
    void *router = zmq_socket(context, ZMQ_ROUTER);
    if (zmq_bind(router, endpoint) != 0) {
        _exit(1);
    }
    for (;;) {
        char identity[256];
        char message[MESSAGE_BYTES];
        int identity_bytes = zmq_recv(router, identity, sizeof(identity), 0);
        int bytes = zmq_recv(router, message, sizeof(message), 0);
        if (identity_bytes > 0 && bytes >= 0) {
            zmq_send(router, identity, (size_t)identity_bytes, ZMQ_SNDMORE);
            zmq_send(router, message, (size_t)bytes, 0);
        }
    }
}

static double echo_us(void *dealer) {
    char message[MESSAGE_BYTES] = {0};
    double began = kvt_bench_now_s();
    if (zmq_send(dealer, message, sizeof(message), 0) < 0 ||
        zmq_recv(dealer, message, sizeof(message), 0) < 0) {
        fprintf(stderr, "bench_control: the echo failed: %s\n", zmq_strerror(zmq_errno()));
        exit(1);
    }
    return (kvt_bench_now_s() - began) * 1e6;
}

/* ---- pairs ------------------------------------------------------------------------------------------ */

static double percentile(double *sorted, int count, double part) {
    return sorted[(int)(part * (count - 1))];
}

static void pairs(struct kvt_client *client, void *dealer) {
    static double ping[TRIPS], echo[TRIPS];
    double p50[BLOCKS], p99[BLOCKS], ping50[BLOCKS], ping99[BLOCKS], echo50[BLOCKS], echo99[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) {
        for (int i = 0; i < TRIPS; i++) {
            kvt_bench_must(client, kvt_ping(client, &ping[i]));
            echo[i] = echo_us(dealer);
        }
        qsort(ping, TRIPS, sizeof(ping[0]), kvt_compare_doubles);
        qsort(echo, TRIPS, sizeof(echo[0]), kvt_compare_doubles);
        ping50[b] = percentile(ping, TRIPS, 0.5);
        ping99[b] = percentile(ping, TRIPS, 0.99);
        echo50[b] = percentile(echo, TRIPS, 0.5);
        echo99[b] = percentile(echo, TRIPS, 0.99);
        p50[b] = ping50[b] / echo50[b];
        p99[b] = ping99[b] / echo99[b];
    }
    kvt_interval_print("request_p50_us", kvt_median_interval(ping50, BLOCKS));
    printf(", ");
    kvt_interval_print("request_p99_us", kvt_median_interval(ping99, BLOCKS));
    printf(", ");
    kvt_interval_print("echo_p50_us", kvt_median_interval(echo50, BLOCKS));
    printf(", ");
    kvt_interval_print("echo_p99_us", kvt_median_interval(echo99, BLOCKS));
    printf(", ");
    kvt_interval_print("ratio_p50", kvt_median_interval(p50, BLOCKS));
    printf(", ");
    kvt_interval_print("ratio_p99", kvt_median_interval(p99, BLOCKS));
}

/* ---- fork --------------------------------------------------------------------------------------------- */

static void forks(struct kvt_client *client) {
    struct kvt_layer_shape layer = {.kind = KVT_KIND_FULL,
                                    .kv_heads = 1,
                                    .k_head_dim = 4,
                                    .v_head_dim = 4,
                                    .dtype = KVT_DTYPE_F16};
    struct kvt_cache_create_options o = {.layers = &layer,
                                         .layer_count = 1,
                                         .mode = KVT_OFFLOADED,
                                         .append_max = TOKENS,
                                         .resident_layers_max = -1,
                                         .name = "fork"};
    uint32_t cache;
    struct kvt_step *step;
    kvt_bench_must(client, kvt_cache_create(client, &o, &cache));
    kvt_bench_must(client, kvt_step_begin(client, cache, NULL, 0, TOKENS, 1, &step));
    kvt_bench_walk(client, step);
    kvt_bench_must(client, kvt_cache_settle(client, cache, 10000));
    static double us[FORKS];
    for (int i = 0; i < FORKS; i++) {
        uint32_t forked;
        double began = kvt_bench_now_s();
        kvt_bench_must(client, kvt_cache_fork(client, cache, NULL, 0, &forked));
        us[i] = (kvt_bench_now_s() - began) * 1e6;
        kvt_bench_must(client, kvt_cache_close(client, forked));
    }
    printf(", ");
    kvt_interval_print("fork_131072_tokens_us", kvt_median_interval(us, FORKS));
}

/* ---- pieces ------------------------------------------------------------------------------------------- */

/* What a piece costs through the library, with a worker that computes nothing and pieces of a few
 * bytes: schedules of 8 steps over 32 streamed layers, the time of each divided by its pieces. */
static void pieces(struct kvt_client *client) {
    struct kvt_layer_shape layers[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        layers[i] = (struct kvt_layer_shape){.kind = KVT_KIND_FULL,
                                             .kv_heads = 1,
                                             .k_head_dim = 4,
                                             .v_head_dim = 4,
                                             .dtype = KVT_DTYPE_F16};
    }
    struct kvt_cache_create_options o = {.layers = layers,
                                         .layer_count = LAYERS,
                                         .mode = KVT_OFFLOADED,
                                         .append_max = 1,
                                         .resident_layers_max = -1,
                                         .name = "pieces"};
    uint32_t cache;
    kvt_bench_must(client, kvt_cache_create(client, &o, &cache));
    static double us[SCHEDULES], request_us[SCHEDULES];
    for (int i = 0; i < SCHEDULES; i++) {
        struct kvt_step *step;
        double asked = kvt_bench_now_s();
        kvt_bench_must(client, kvt_step_begin(client, cache, NULL, 0, 1, STEPS, &step));
        double began = kvt_bench_now_s();
        kvt_bench_walk(client, step);
        us[i] = (kvt_bench_now_s() - began) * 1e6 / (STEPS * LAYERS);
        request_us[i] = (began - asked) * 1e6;
    }
    kvt_bench_must(client, kvt_cache_close(client, cache));
    printf(", ");
    kvt_interval_print("piece_through_kvtierd_us", kvt_median_interval(us, SCHEDULES));
    printf(", ");
    kvt_interval_print("step_request_us", kvt_median_interval(request_us, SCHEDULES));
}

int main(void) {
    char directory[] = "/tmp/kvb.XXXXXX";
    char endpoint[64];
    if (mkdtemp(directory) == NULL) {
        return 1;
    }
    snprintf(endpoint, sizeof(endpoint), "ipc://%s/echo", directory);
    pid_t server = fork();
    if (server == 0) {
        echo_serve(endpoint);
    }
    void *context = zmq_ctx_new();
    void *dealer = zmq_socket(context, ZMQ_DEALER);
    int limit_ms = 10000;
    zmq_setsockopt(dealer, ZMQ_RCVTIMEO, &limit_ms, sizeof(limit_ms));
    zmq_connect(dealer, endpoint);
    struct kvt_client *client;
    kvt_bench_must(NULL, kvt_attach(&(struct kvt_attach_options){.worker = KVT_SEGMENT}, &client));
    (void)echo_us(dealer); /* connected */
    printf("{\"bench\": \"control\", ");
    pairs(client, dealer);
    forks(client);
    pieces(client);
    printf("}\n");
    kvt_detach(client);
    zmq_close(dealer);
    zmq_ctx_term(context);
    kill(server, SIGKILL);
    waitpid(server, NULL, 0);
    unlink(endpoint + strlen("ipc://"));
    rmdir(directory);
    return 0;
}
