#include "tiers/engine/assert.h"

#include <stddef.h>

static kvt_assert_hook hook_now;

void kvt_assert_hook_set(kvt_assert_hook hook) {
    hook_now = hook;
}

void kvt_assert_failed(const char *file, int line, const char *condition) {
    if (hook_now != NULL) {
        hook_now(file, line, condition);
    }
    __builtin_trap();
}
