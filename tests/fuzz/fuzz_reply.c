/* Replies of any bytes, and behind STEP schedules of any bytes: what the library makes of them goes
 * through its own calls. A byte that chooses the call, two with the reply's length, the reply, and
 * what the ring holds. A reply is not lost if its sequence and epoch are 1. */
#include "client/lib/client.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zmq.h>

#define RING_BYTES   4096
#define EXTENT_BYTES 65536

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct kvt_client client;
static struct kvt_control_page page;
static uint64_t ring[RING_BYTES / 8];
static void *daemon_socket;

static void must(int holds) {
    if (!holds) {
        abort();
    }
}

static void start(void) {
    struct kvt_client_import extent = {.kind = KVT_EXTENT_FD, .bytes = EXTENT_BYTES};
    kvt_client_process_init(&client.process);
    client.worker = KVT_SEGMENT;
    client.attach_fd = -1;
    client.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    client.gone_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    client.page = &page;
    client.ring = ring;
    client.device = &kvt_client_device_cpu;
    client.welcome.boot_epoch = 1;
    client.welcome.session = 1;
    client.welcome.ring_bytes = RING_BYTES;
    client.buffer = malloc(2 * KVT_MESSAGE_BYTES_MAX);
    client.zmq_context = zmq_ctx_new();
    client.zmq_socket = zmq_socket(client.zmq_context, ZMQ_DEALER);
    daemon_socket = zmq_socket(client.zmq_context, ZMQ_DEALER);
    must(client.buffer != NULL && zmq_bind(daemon_socket, "inproc://fuzz") == 0 &&
         zmq_connect(client.zmq_socket, "inproc://fuzz") == 0);
    extent.fd = memfd_create("extent", MFD_CLOEXEC);
    must(extent.fd >= 0 && ftruncate(extent.fd, EXTENT_BYTES) == 0);
    must(kvt_client_extents_init(&client.extents, client.device, NULL) == 0);
    must(kvt_client_extents_add(&client.extents, 100, &extent) == 0);
    kvt_client_extents_close(&client.extents); /* none is waited for */
}

/* One cache of two layers and two rows, in a session that nothing has happened to. */
static void reset(void) {
    uint64_t ignored;
    client.gone = KVT_GONE_NOT;
    while (read(client.gone_fd, &ignored, sizeof ignored) > 0) {}
    client.sequence = 0;
    client.message[0] = '\0';
    memset(&page, 0, sizeof page);
    for (uint32_t i = 0; i < KVT_SLOTS_MAX; i++) {
        page.ready[i].value = KVT_POISON - 1; /* no wait is long */
    }
    while (zmq_recv(daemon_socket, NULL, 0, ZMQ_DONTWAIT) >= 0) {}
    while (zmq_recv(client.zmq_socket, NULL, 0, ZMQ_DONTWAIT) >= 0) {}

    struct kvt_client_cache *cache = calloc(1, sizeof *cache);
    struct kvt_client_layout *layout = calloc(1, sizeof *layout + 2 * sizeof layout->layers[0]);
    must(cache != NULL && layout != NULL);
    layout->references = 1;
    layout->layer_count = 2;
    layout->layers[0] = (struct kvt_layer_shape){
        .kind = 1, .kv_heads = 1, .k_head_dim = 4, .v_head_dim = 2, .dtype = KVT_DTYPE_F16};
    layout->layers[1] = (struct kvt_layer_shape){
        .kind = 1, .kv_heads = 1, .k_head_dim = 4, .dtype = KVT_DTYPE_F16, .last_reader = 1};
    cache->id = 1;
    cache->rows = 2;
    cache->layout = layout;
    client.caches[0] = cache;
    client.cache_count = 1;
}

static void walk(struct kvt_step *s) {
    const struct kvt_piece *p;
    for (uint32_t i = 0; i < 256 && kvt_step_piece(s, &p) == 1; i++) {
        if (kvt_piece_wait(s, p) == 0) {
            for (uint32_t j = 0; j < p->run_count && j < 64; j++) { /* as a worker would */
                const struct kvt_run *r = &p->runs[j];
                memset(r->k, 1, ((size_t)r->read_count + r->append_count) * 8);
                must(r->rows[0] < KVT_ROWS_MAX);
            }
        }
        (void)!kvt_piece_done(s, p);
    }
    (void)!kvt_step_end(s);
}

static void call(uint8_t which) {
    const uint32_t rows[2] = {1, 0};
    const struct kvt_piece *const *pieces;
    struct kvt_step *s;
    struct kvt_cache_stat stat;
    uint32_t n;
    struct kvt_cache_create_options o = {.layers = client.caches[0]->layout->layers,
                                         .layer_count = 2,
                                         .mode = KVT_DYNAMIC,
                                         .resident_layers_max = -1};
    switch (which % 8) {
    case 0:
        (void)!kvt_ping(&client, NULL);
        break;
    case 1:
        (void)!kvt_cache_create(&client, &o, &n);
        break;
    case 2:
        (void)!kvt_cache_fork(&client, 1, rows, 2, &n);
        break;
    case 3:
        (void)!kvt_cache_reorder(&client, 1, rows, 2);
        break;
    case 4:
        if (kvt_cache_stat(&client, 1, &stat) == 0) {
            must(memchr(stat.layers, '\0', sizeof stat.layers) != NULL);
        }
        break;
    case 5:
        if (kvt_acquire(&client, 1, 0, 1, &pieces, &n) == 0) {
            (void)!kvt_commit(&client, 1, 0);
        }
        break;
    default:
        client.worker = which % 8 == 6 ? KVT_SEGMENT : KVT_DENSE;
        if (kvt_step_begin(&client, 1, NULL, 0, 1, 2, &s) == 0) {
            if (client.worker == KVT_SEGMENT) {
                walk(s);
            }
        }
        client.worker = KVT_SEGMENT;
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (client.page == NULL) {
        start();
    }
    if (size < 3 || size - 3 > KVT_MESSAGE_BYTES_MAX) {
        return 0;
    }
    reset();
    size_t bytes = data[1] | (size_t)data[2] << 8;
    bytes = bytes < size - 3 ? bytes : size - 3;
    size_t left = size - 3 - bytes;
    memset(ring, 0, sizeof ring);
    if (left > 0) {
        memcpy(ring, data + 3 + bytes, left < RING_BYTES ? left : RING_BYTES);
    }
    must(zmq_send(daemon_socket, data + 3, bytes, 0) >= 0);
    call(data[0]);
    must(memchr(client.message, '\0', sizeof client.message) != NULL);
    (void)kvt_step_abort(&client.step); /* its request finds no answer, and ends the session */
    must(client.step.client == NULL);
    kvt_client_step_free(&client.step);
    kvt_client_caches_free(&client);
    return 0;
}
