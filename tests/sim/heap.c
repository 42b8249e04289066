/* Allocations of the engine and the issuers, any of which may fail. The simulator is linked with
 * --wrap=malloc,calloc,realloc: so they are met here, in the code as it is shipped. What the simulator
 * needs for itself comes by sim_grow and sim_zeroed, and does not fail.
 */
#include "tests/sim/sim.h"

#include <stdlib.h>

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *memory, size_t bytes);

static struct sim *armed; /* whose allocations may fail; NULL: none */

void sim_heap_arm(struct sim *sim) {
    armed = sim;
}

static bool fails(void) {
    if (!armed || armed->fault_per_mille[SIM_ALLOCATION_FAILED] == 0 ||
        !sim_fault(armed, SIM_ALLOCATION_FAILED)) {
        return false;
    }
    sim_trace(armed, "an allocation fails"); /* a good place for a breakpoint */
    return true;
}

void *__wrap_malloc(size_t bytes) {
    return fails() ? NULL : __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t size) {
    return fails() ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *memory, size_t bytes) {
    return fails() ? NULL : __real_realloc(memory, bytes);
}

void *sim_grow(void *memory, size_t bytes) {
    void *grown = __real_realloc(memory, bytes);
    if (!grown) {
        abort();
    }
    return grown;
}

void *sim_zeroed(size_t bytes) {
    void *memory = __real_calloc(1, bytes);
    if (!memory) {
        abort();
    }
    return memory;
}
