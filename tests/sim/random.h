/* Randomness of one run: xoshiro256**, seeded by splitmix64. Nothing else may be random. */
#ifndef KVT_SIM_RANDOM_H
#define KVT_SIM_RANDOM_H

#include <stdbool.h>
#include <stdint.h>

struct sim_random {
    uint64_t s[4];
};

/* A 64-bit mixer: splitmix64's finalizer. */
static inline uint64_t sim_mix(uint64_t x) {
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static inline void sim_random_seed(struct sim_random *r, uint64_t seed) {
    for (int i = 0; i < 4; i++) {
        seed = sim_mix(seed + (uint64_t)i);
        r->s[i] = seed;
    }
}

static inline uint64_t sim_random_next(struct sim_random *r) {
    uint64_t *s = r->s;
    uint64_t x = s[1] * 5;
    uint64_t result = ((x << 7) | (x >> 57)) * 9;
    uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = (s[3] << 45) | (s[3] >> 19);
    return result;
}

/* 0 .. n - 1; 0 if n is 0. */
static inline uint64_t sim_below(struct sim_random *r, uint64_t n) {
    return n == 0 ? 0 : sim_random_next(r) % n;
}

/* low .. high, both included. */
static inline uint64_t sim_between(struct sim_random *r, uint64_t low, uint64_t high) {
    return low + sim_below(r, high - low + 1);
}

static inline bool sim_chance(struct sim_random *r, uint32_t per_mille) {
    return sim_below(r, 1000) < per_mille;
}

#endif
