/* The planner: which layers stay resident, and what a step will cost.
 *
 * A decode step reads the layers in a fixed cycle, where least-recently-used never hits: the best
 * is a fixed set. Sets are nested, by a fixed order: layers that later layers read first, then by
 * bit reversal, which spreads every prefix of the order evenly over the layers, so that the link
 * works while resident layers compute.
 */
#include "tiers/engine/state.h"

static uint32_t reversed(uint32_t value, uint32_t bits) {
    uint32_t result = 0;
    for (uint32_t i = 0; i < bits; i++) {
        result = (result << 1) | ((value >> i) & 1);
    }
    return result;
}

void plan_priority(uint32_t layer_count, const struct kvt_layer_layout *layers, uint32_t *order) {
    uint32_t count = 0;
    for (uint32_t l = 0; l < layer_count; l++) {
        if (layers[l].last_reader > l) {
            order[count++] = l;
        }
    }
    uint32_t bits = 0;
    while ((1u << bits) < layer_count) {
        bits++;
    }
    for (uint32_t i = 0; i < (1u << bits); i++) {
        uint32_t l = reversed(i, bits);
        if (l < layer_count && layers[l].last_reader <= l) {
            order[count++] = l;
        }
    }
    KVT_ASSERT(count == layer_count);
}

/* How many layers may be resident: all, or as many as CREATE said; an offloaded cache that was told
 * nothing keeps none, and a static one keeps all whatever it was told. */
uint32_t resident_layers_most(uint32_t mode, uint32_t layer_count, uint32_t resident_layers_max) {
    if (mode == KVT_MODE_STATIC) {
        return layer_count;
    }
    if (resident_layers_max == UINT32_MAX && mode_is_offloaded(mode)) {
        return 0;
    }
    return resident_layers_max < layer_count ? resident_layers_max : layer_count;
}

static uint64_t add(uint64_t a, uint64_t b) {
    return a + b < KVT_BYTES_HUGE ? a + b : KVT_BYTES_HUGE;
}

static uint64_t least_of(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

/* Sizes of one layer at the planned length. */
struct layer_cost {
    uint64_t gpu_bytes;  /* if resident */
    uint64_t host_bytes; /* if streamed */
    uint64_t step_bytes; /* towards the device, if streamed */
    uint64_t slot_bytes;
};

static struct layer_cost layer_cost(const struct kvt_engine *e, const struct kvt_plan_request *r,
                                    const struct kvt_layer_layout *l, uint32_t piece_tokens) {
    uint64_t token = (uint64_t)kvt_layer_k_token_bytes(l) + kvt_layer_v_token_bytes(l);
    uint64_t rows = r->options->rows;
    bool is_static =
        r->options->mode == KVT_MODE_STATIC || r->options->mode == KVT_MODE_OFFLOADED_STATIC;
    uint64_t room = is_static ? r->options->tokens_max : r->tokens;
    uint64_t tokens = round_up(room, e->config.block_tokens);
    if (is_static && r->worker_kind == KVT_WORKER_SEGMENT) {
        tokens += e->config.block_tokens; /* a copied tail beside the old one */
    }
    uint64_t whole = size_of(rows, tokens, token);
    return (struct layer_cost){
        .gpu_bytes = whole,
        .host_bytes = whole,
        .step_bytes = size_of(rows, r->tokens, token),
        .slot_bytes = r->worker_kind == KVT_WORKER_DENSE ? whole : size_of(1, piece_tokens, token)};
}

/* Three, and one for each streamed layer that a dense worker holds for later readers at the same
 * time; 0 if nothing is streamed. A static cache, which restarts its slots each step, avoids a
 * remainder of 1. `resident` NULL: none is. */
uint32_t plan_slots(const struct kvt_layer_layout *layers, uint32_t layer_count,
                    const bool *resident, bool dense, bool is_static) {
    uint32_t ends[KVT_LAYERS_MAX + 1] = {0}; /* held layers whose last reader was the one before */
    uint32_t streamed = 0;
    uint32_t held = 0;
    uint32_t held_most = 0;
    for (uint32_t l = 0; l < layer_count; l++) {
        held -= ends[l];
        held_most = held > held_most ? held : held_most;
        if (resident != NULL && resident[l]) {
            continue;
        }
        streamed++;
        if (dense && layers[l].last_reader > l) {
            held++;
            ends[layers[l].last_reader + 1]++;
        }
    }
    if (streamed == 0) {
        return 0;
    }
    uint32_t slots = 3 + held_most;
    slots += is_static && streamed % slots == 1;
    return slots;
}

/* A dense worker holds a streamed layer until its last reader, and any layer may come to be
 * streamed: the slots for that, and the one that a static cache may add, must be there. */
int plan_slots_check(const struct kvt_layer_layout *layers, uint32_t layer_count, bool dense,
                     uint32_t mode, const char *what, char *text, uint32_t size) {
    uint32_t slots = plan_slots(layers, layer_count, NULL, dense, false) + 1;
    if (mode == KVT_MODE_STATIC || slots <= KVT_SLOTS_MAX) {
        return 0;
    }
    kvt_text_format(text, size,
                    "%s: the layout has %u layers that wait for later readers at one time; "
                    "a dense worker may have %u, unless the mode is static",
                    what, slots - 4, KVT_SLOTS_MAX - 4);
    return -KVT_ENOTSUP;
}

/* Tokens of a segment worker's streamed piece: whole blocks, at least one. `wanted` 0: as many as
 * the device's piece size holds. */
uint32_t plan_piece_tokens(const struct kvt_engine *e, const struct kvt_layer_layout *layers,
                           uint32_t layer_count, uint32_t device, uint32_t wanted) {
    uint64_t token_bytes = 1;
    for (uint32_t l = 0; l < layer_count; l++) {
        uint64_t bytes =
            (uint64_t)kvt_layer_k_token_bytes(&layers[l]) + kvt_layer_v_token_bytes(&layers[l]);
        token_bytes = bytes > token_bytes ? bytes : token_bytes;
    }
    uint64_t tokens = wanted != 0 ? wanted : e->devices[device].config.piece_bytes / token_bytes;
    tokens = tokens < KVT_TOKENS_MAX ? tokens : KVT_TOKENS_MAX;
    tokens = tokens / e->config.block_tokens * e->config.block_tokens;
    return tokens < e->config.block_tokens ? e->config.block_tokens : (uint32_t)tokens;
}

/* Fills `out` for a resident set of the first `count` layers of the order. */
static void plan_at(const struct kvt_plan_request *r, const struct layer_cost *costs,
                    const uint32_t *order, uint32_t count, struct kvt_plan *out) {
    bool resident[KVT_LAYERS_MAX] = {false};
    for (uint32_t i = 0; i < count; i++) {
        resident[order[i]] = true;
    }
    *out = (struct kvt_plan){.resident_layers = count};
    for (uint32_t l = 0; l < r->layout->layer_count; l++) {
        const struct kvt_layer_layout *layer = &r->layout->layers[l];
        struct layer_cost cost = costs[l];
        out->layers[l] = resident[l] ? 'R' : 'S';
        if (resident[l]) {
            out->device_bytes = add(out->device_bytes, cost.gpu_bytes);
            continue;
        }
        uint64_t listings = r->worker_kind == KVT_WORKER_SEGMENT ? layer->last_reader - l + 1 : 1;
        out->host_bytes = add(out->host_bytes, cost.host_bytes);
        out->to_device_bytes_per_step =
            add(out->to_device_bytes_per_step, size_of(1, cost.step_bytes, listings));
        out->to_device_bytes_per_step += /* re-reads bring the step's own tokens, too */
            (listings - 1) * r->options->rows *
            ((uint64_t)kvt_layer_k_token_bytes(layer) + kvt_layer_v_token_bytes(layer));
        out->from_device_bytes_per_step +=
            (uint64_t)r->options->rows *
            ((uint64_t)kvt_layer_k_token_bytes(layer) + kvt_layer_v_token_bytes(layer));
        out->slot_bytes = cost.slot_bytes > out->slot_bytes ? cost.slot_bytes : out->slot_bytes;
    }
    out->slots = plan_slots(r->layout->layers, r->layout->layer_count, resident,
                            r->worker_kind == KVT_WORKER_DENSE,
                            r->options->mode == KVT_MODE_OFFLOADED_STATIC);
    out->device_bytes = add(out->device_bytes, size_of(1, out->slots, out->slot_bytes));
}

/* The largest resident set that fits into the budget, in *out, or else the one that needs least of
 * the device; returns what the latter needs. */
static uint64_t plan_best(const struct kvt_engine *e, const struct kvt_plan_request *r,
                          uint32_t piece_tokens, uint64_t budget, struct kvt_plan *out) {
    const struct kvt_cache_options *o = r->options;
    uint32_t layer_count = r->layout->layer_count;
    uint32_t order[KVT_LAYERS_MAX];
    plan_priority(layer_count, r->layout->layers, order);
    uint32_t most = resident_layers_most(o->mode, layer_count, o->resident_layers_max);
    uint32_t least = o->mode == KVT_MODE_STATIC ? most : 0;
    struct layer_cost costs[KVT_LAYERS_MAX];
    for (uint32_t l = 0; l < layer_count; l++) {
        costs[l] = layer_cost(e, r, &r->layout->layers[l], piece_tokens);
    }
    uint64_t smallest = UINT64_MAX;
    uint32_t smallest_count = most;
    for (uint32_t count = most;; count--) {
        plan_at(r, costs, order, count, out);
        if (out->device_bytes < smallest) {
            smallest = out->device_bytes;
            smallest_count = count;
        }
        if (out->device_bytes <= budget) {
            return smallest;
        }
        if (count == least) {
            plan_at(r, costs, order, smallest_count, out);
            return smallest;
        }
    }
}

/* What is short on the device: `plan` needs least of it. */
static void device_lacks(const struct kvt_engine *e, const struct kvt_plan_request *r,
                         const struct kvt_plan *plan, uint32_t piece_tokens, uint64_t budget,
                         struct kvt_plan *out) {
    struct kvt_plan smaller;
    uint32_t piece = (uint32_t)round_up(KVT_SPLIT_TOKENS, e->config.block_tokens);
    out->lacks.tier = KVT_TIER_GPU;
    out->lacks.need_bytes = plan->device_bytes;
    out->lacks.available_bytes = budget;
    out->lacks.piece_tokens = 0;
    out->lacks.piece_need_bytes = 0;
    if (r->worker_kind == KVT_WORKER_SEGMENT && plan->slots > 0 && piece < piece_tokens) {
        out->lacks.piece_tokens = piece;
        out->lacks.piece_need_bytes = plan_best(e, r, piece, 0, &smaller);
    }
    out->lacks.by_tokens = r->worker_kind == KVT_WORKER_DENSE || plan->slots == 0;
}

int kvt_engine_plan(const struct kvt_engine *e, const struct kvt_plan_request *r,
                    struct kvt_plan *out, char *text, uint32_t size) {
    int rc = kvt_layout_check(r->layout, text, size);
    if (rc != 0) {
        return rc;
    }
    if (r->device >= e->config.device_count) {
        kvt_text_format(text, size, "plan: device %u; there are %u", r->device,
                        e->config.device_count);
        return -KVT_EINVAL;
    }
    const struct kvt_cache_options *o = r->options;
    if (o->rows < 1 || o->rows > KVT_ROWS_MAX || r->tokens < 1 || r->tokens > KVT_TOKENS_MAX ||
        o->tokens_max > KVT_TOKENS_MAX) {
        kvt_text_format(text, size,
                        "plan: %u rows of %u tokens (capacity %u); accepted is 1 to "
                        "1024 rows and 1 to 2147483392 tokens",
                        o->rows, r->tokens, o->tokens_max);
        return -KVT_EINVAL;
    }
    rc = plan_slots_check(r->layout->layers, r->layout->layer_count,
                          r->worker_kind == KVT_WORKER_DENSE, o->mode, "plan", text, size);
    if (rc != 0) {
        return rc;
    }
    const struct device *d = &e->devices[r->device];
    uint64_t budget = r->device_budget_bytes != 0 ? r->device_budget_bytes
                                                  : least_of(d->config.budget_bytes - d->used_bytes,
                                                             d->config.worker_max_bytes);
    uint64_t host =
        least_of(e->config.host_budget_bytes - e->host.live_bytes, e->config.host_worker_max_bytes);
    uint32_t piece_tokens =
        plan_piece_tokens(e, r->layout->layers, r->layout->layer_count, r->device, o->piece_tokens);
    struct kvt_plan plan;
    (void)plan_best(e, r, piece_tokens, budget, &plan);
    if (plan.device_bytes > budget || plan.host_bytes > host) {
        bool device_short = plan.device_bytes > budget;
        if (device_short) {
            device_lacks(e, r, &plan, piece_tokens, budget, out);
        } else {
            out->lacks.tier = KVT_TIER_HOST;
            out->lacks.need_bytes = plan.host_bytes;
            out->lacks.available_bytes = host;
            out->lacks.piece_tokens = 0;
            out->lacks.by_tokens = true;
        }
        uint64_t limit =
            device_short ? d->config.worker_max_bytes : e->config.host_worker_max_bytes;
        uint64_t whole = device_short ? d->config.budget_bytes : e->config.host_budget_bytes;
        bool asked = device_short && r->device_budget_bytes != 0;
        out->lacks.worker_max_bytes =
            !asked && limit == out->lacks.available_bytes && limit < whole ? limit : 0;
        kvt_text_format(text, size,
                        "plan: %s memory: %llu bytes needed, %llu in the budget; raise the budget, "
                        "shorten the context or take fewer rows",
                        device_short ? "device" : "host", (unsigned long long)out->lacks.need_bytes,
                        (unsigned long long)out->lacks.available_bytes);
        return -KVT_EQUOTA;
    }
    *out = plan;
    return 0;
}
