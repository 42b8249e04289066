/* How fast a GPU's copy engines go, by its own events. Control thread, context current. */
#ifndef KVT_DEVICE_CUDA_MEASURE_H
#define KVT_DEVICE_CUDA_MEASURE_H

#include "cuda/cuda_api.h"
#include "tiers/device/device.h"

/* Copies to and fro between GPU memory and pinned memory, which are allocated for it: up to 16 MiB
 * each, at most `bytes_max`. With less than 2 MiB nothing is measured. On the stream nothing else may
 * be under way. -KVT_EQUOTA or -KVT_EDEVICE. */
int kvt_cuda_measure(const struct kvt_cuda_api *api, CUstream stream, uint64_t bytes_max,
                     struct kvt_link *out, char *text) __attribute__((warn_unused_result));

#endif
