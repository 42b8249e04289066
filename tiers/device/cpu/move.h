/* Copying memory at the machine's speed. Any thread. */
#ifndef KVT_DEVICE_CPU_MOVE_H
#define KVT_DEVICE_CPU_MOVE_H

#include <stdbool.h>
#include <stddef.h>

/* As memcpy; complete for every other thread that sees a later release store of this one. With
 * `streaming` the stores go past the caches: for copies that are too large to be found in them. */
void kvt_cpu_move(void *target, const void *source, size_t bytes, bool streaming);

#endif
