/* Registering ranges of the host arena with CUDA, so that copies run at the bus's speed and beside
 * the host's threads. Any thread with the context current, several at once.
 */
#ifndef KVT_DEVICE_CUDA_HOST_REGISTER_H
#define KVT_DEVICE_CUDA_HOST_REGISTER_H

#include "cuda/cuda_api.h"
#include "tiers/device/cuda/host_map.h"

/* As one registration. -KVT_EINVAL: not pages of the arena, or there already; -KVT_ENOMEM: CUDA
 * refuses, with its reason in text[KVT_TEXT_BYTES]. */
int kvt_host_register(const struct kvt_cuda_api *api, struct kvt_host_map *map, uint8_t *base,
                      uint64_t offset, uint64_t bytes, char *text)
    __attribute__((warn_unused_result));

/* The range is one that was registered, or several. -KVT_EINVAL: its ends cut one. */
int kvt_host_unregister(const struct kvt_cuda_api *api, struct kvt_host_map *map, uint8_t *base,
                        uint64_t offset, uint64_t bytes, char *text)
    __attribute__((warn_unused_result));
void kvt_host_unregister_all(const struct kvt_cuda_api *api, struct kvt_host_map *map,
                             uint8_t *base);

#endif
