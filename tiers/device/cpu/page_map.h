/* Which pages of the host arena are there: a bit for each 4 KiB. Written by any thread, read by the
 * copy thread; a range is only read after the event that says that it was added.
 */
#ifndef KVT_DEVICE_CPU_PAGE_MAP_H
#define KVT_DEVICE_CPU_PAGE_MAP_H

#include <stdbool.h>
#include <stdint.h>

#define KVT_CPU_PAGE_BYTES 4096

struct kvt_page_map;

/* For an arena of `bytes`; empty. */
int kvt_page_map_create(uint64_t bytes, struct kvt_page_map **out)
    __attribute__((warn_unused_result));
void kvt_page_map_free(struct kvt_page_map *m);

/* Whole pages. Returns false if the range is not in the arena, or not made of whole pages. */
bool kvt_page_map_set(struct kvt_page_map *m, uint64_t offset, uint64_t bytes, bool there);

/* Whether every byte of the range is there. */
bool kvt_page_map_holds(const struct kvt_page_map *m, uint64_t offset, uint64_t bytes);

#endif
