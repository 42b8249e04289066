/* Which ranges of the host arena are registered with CUDA, and where one registration ends and the
 * next begins: CUDA refuses a copy that crosses such a border, so copies are split there.
 *
 * Whoever changes it or asks for what is not there holds the lock of host_register.c. The copy thread
 * reads without it: only ranges that are there since an event said so.
 */
#ifndef KVT_DEVICE_CUDA_HOST_MAP_H
#define KVT_DEVICE_CUDA_HOST_MAP_H

#include <stdbool.h>
#include <stdint.h>

#define KVT_CUDA_PAGE_BYTES 4096

struct kvt_host_map;

/* For an arena of `bytes`; empty. -KVT_ENOMEM. */
int kvt_host_map_create(uint64_t bytes, struct kvt_host_map **out)
    __attribute__((warn_unused_result));
void kvt_host_map_free(struct kvt_host_map *m);

/* Whether the range is made of whole pages of the arena. */
bool kvt_host_map_fits(const struct kvt_host_map *m, uint64_t offset, uint64_t bytes);
/* Whether no page of a range that fits is there. */
bool kvt_host_map_none(const struct kvt_host_map *m, uint64_t offset, uint64_t bytes);

/* One registration came or went. */
void kvt_host_map_set(struct kvt_host_map *m, uint64_t offset, uint64_t bytes, bool there);

/* Copy thread. Of [offset, offset + bytes), how many bytes lie in the registration of the first one;
 * 0: it is not there. */
uint64_t kvt_host_map_run(const struct kvt_host_map *m, uint64_t offset, uint64_t bytes);
/* Whether a registration begins at this page. */
bool kvt_host_map_begins(const struct kvt_host_map *m, uint64_t offset);
/* The first one that begins at *offset or behind it: moves *offset there. false: there is none. */
bool kvt_host_map_next(const struct kvt_host_map *m, uint64_t *offset);

#endif
