/* The host arena: chunks that come late, or not at all, and are poisoned as they come and go. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

enum { POISON_NEW = 0xa5, POISON_GONE = 0x5a };

void sim_host_open(struct sim *sim) {
    struct sim_host *h = &sim->host;
    uint64_t bytes = sim->config.host_budget_bytes;
    if (h->room < bytes) {
        free(h->memory);
        h->memory = sim_grow(NULL, bytes);
        h->room = bytes;
    }
    h->chunk_count = bytes / sim->config.host_chunk_bytes;
    h->chunks = sim_zeroed(h->chunk_count);
}

void sim_host_close(struct sim *sim) {
    free(sim->host.chunks);
    sim->host.chunks = NULL;
}

uint64_t sim_host_used(const struct sim *sim) {
    uint64_t used = 0;
    for (uint64_t i = 0; i < sim->host.chunk_count; i++) {
        used += sim->host.chunks[i] != SIM_CHUNK_ABSENT;
    }
    return used * sim->config.host_chunk_bytes;
}

/* All chunks of the range are in state `from`, and now in `to`. */
static void chunks_turn(struct sim *sim, uint64_t offset, uint64_t bytes, uint8_t from,
                        uint8_t to) {
    uint64_t size = sim->config.host_chunk_bytes;
    if (offset % size != 0 || bytes % size != 0 || bytes == 0 ||
        offset + bytes > sim->host.chunk_count * size) {
        sim_fail(sim, "host: chunks [%llu, +%llu) are not there", (unsigned long long)offset,
                 (unsigned long long)bytes);
    }
    for (uint64_t i = offset / size; i < (offset + bytes) / size; i++) {
        if (sim->host.chunks[i] != from) {
            sim_fail(sim, "host: chunk %llu is in state %u, not %u", (unsigned long long)i,
                     sim->host.chunks[i], from);
        }
        sim->host.chunks[i] = to;
    }
}

/* value: first chunk, number of chunks, and whether they came. */
static void on_grown(struct sim *sim, void *object, uint64_t value) {
    uint64_t size = sim->config.host_chunk_bytes;
    uint64_t offset = (value >> 32) * size;
    uint64_t bytes = ((value & 0xffffffff) >> 1) * size;
    bool refused = value & 1;
    chunks_turn(sim, offset, bytes, SIM_CHUNK_GROWING,
                refused ? SIM_CHUNK_ABSENT : SIM_CHUNK_READY);
    if (!refused) {
        memset(sim->host.memory + offset, POISON_NEW, bytes);
    }
    sim_clock(sim);
    kvt_engine_host_grown(sim->engine, offset, bytes, refused ? KVT_ENOMEM : 0);
    sim_actions(sim);
}

void sim_host_grow(struct sim *sim, const struct kvt_action *a) {
    sim_trace(sim, "host grows [%llu, +%llu)", (unsigned long long)a->offset,
              (unsigned long long)a->bytes);
    uint64_t size = sim->config.host_chunk_bytes;
    chunks_turn(sim, a->offset, a->bytes, SIM_CHUNK_ABSENT, SIM_CHUNK_GROWING);
    if (sim_host_used(sim) > sim->config.host_budget_bytes) {
        sim_fail(sim, "host: above its budget");
    }
    uint64_t delay_us =
        sim_fault(sim, SIM_HOST_DELAYED) ? sim_us(sim, 1000, 60000) : sim_us(sim, 5, 500);
    uint64_t refused = sim_fault(sim, SIM_HOST_REFUSED);
    sim_after(sim, delay_us, on_grown, NULL,
              (a->offset / size) << 32 | (a->bytes / size) << 1 | refused);
}

static void on_shrunk(struct sim *sim, void *object, uint64_t value) {
    uint64_t size = sim->config.host_chunk_bytes;
    uint64_t offset = (value >> 32) * size;
    uint64_t bytes = (value & 0xffffffff) * size;
    chunks_turn(sim, offset, bytes, SIM_CHUNK_SHRINKING, SIM_CHUNK_ABSENT);
    sim_clock(sim);
    kvt_engine_host_shrunk(sim->engine, offset, bytes);
    sim_actions(sim);
}

void sim_host_shrink(struct sim *sim, const struct kvt_action *a) {
    sim_trace(sim, "host shrinks [%llu, +%llu)", (unsigned long long)a->offset,
              (unsigned long long)a->bytes);
    uint64_t size = sim->config.host_chunk_bytes;
    chunks_turn(sim, a->offset, a->bytes, SIM_CHUNK_READY, SIM_CHUNK_SHRINKING);
    struct kvt_place place = {.tier = KVT_TIER_HOST, .offset = a->offset};
    sim_race_check(sim, &place, a->bytes, true, 0, -1, "the host arena shrinks");
    memset(sim->host.memory + a->offset, POISON_GONE, a->bytes);
    sim_after(sim, sim_us(sim, 5, 2000), on_shrunk, NULL,
              (a->offset / size) << 32 | a->bytes / size);
}

uint8_t *sim_host_at(struct sim *sim, uint64_t offset, uint64_t bytes, const char *what) {
    uint64_t size = sim->config.host_chunk_bytes;
    if (bytes > sim->host.chunk_count * size || offset > sim->host.chunk_count * size - bytes) {
        sim_fail(sim, "%s: host [%llu, +%llu) is outside the arena", what,
                 (unsigned long long)offset, (unsigned long long)bytes);
    }
    for (uint64_t i = offset / size; i * size < offset + bytes; i++) {
        if (sim->host.chunks[i] != SIM_CHUNK_READY) {
            sim_fail(sim, "%s: host [%llu, +%llu) lies in chunk %llu, which is not there", what,
                     (unsigned long long)offset, (unsigned long long)bytes, (unsigned long long)i);
        }
    }
    return sim->host.memory + offset;
}
