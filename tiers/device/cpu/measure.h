/* How fast the cpu device's copies go. Control thread. */
#ifndef KVT_DEVICE_CPU_MEASURE_H
#define KVT_DEVICE_CPU_MEASURE_H

#include "tiers/device/cpu/extents.h"
#include "tiers/device/device.h"

/* Copies to and fro inside an extent that it makes, of 1 MiB for each of the `threads`, at least 2 and
 * at most 16, as far as budget_bytes goes. There must be no extent yet. With less than 1 MiB nothing
 * is measured. Host and device are memory alike: both directions get one number. */
int kvt_cpu_measure(struct kvt_extents *e, uint64_t budget_bytes, uint32_t threads,
                    struct kvt_link *out, char *text) __attribute__((warn_unused_result));

#endif
