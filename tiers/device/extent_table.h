/* Which extents a device has, where, and how much of the budget they take: what drivers share.
 *
 * The control thread checks, puts and takes; the copy thread pins. A pinned extent is not taken: that
 * is an invariant of the engine (it asks only when no copy is in flight), asserted here. An address is
 * whatever the driver copies with, never 0.
 */
#ifndef KVT_DEVICE_EXTENT_TABLE_H
#define KVT_DEVICE_EXTENT_TABLE_H

#include <stdint.h>

struct kvt_extent_table;

struct kvt_extent_table_config {
    const char *what; /* begins every sentence: "device cpu"; borrowed */
    uint64_t budget_bytes;
    uint64_t granule_bytes; /* sizes are multiples of it */
};

int kvt_extent_table_create(const struct kvt_extent_table_config *c, struct kvt_extent_table **out)
    __attribute__((warn_unused_result));
/* NULL is allowed. */
void kvt_extent_table_free(struct kvt_extent_table *t);

/* Control thread. Refuses what cannot be, before anything is made, with a sentence in
 * text[KVT_TEXT_BYTES]: -KVT_EINVAL (size), -KVT_EEXIST (an extent with these low 16 bits is there),
 * -KVT_EQUOTA. */
int kvt_extent_table_check(const struct kvt_extent_table *t, uint32_t extent, uint64_t bytes,
                           char *text) __attribute__((warn_unused_result));
/* Control thread. What was checked is there now, and can be pinned. */
void kvt_extent_table_put(struct kvt_extent_table *t, uint32_t extent, uint64_t address,
                          uint64_t bytes);
/* Control thread. It is there no more, and its address and size are the caller's to give back.
 * -KVT_ENOENT with a sentence. */
int kvt_extent_table_take(struct kvt_extent_table *t, uint32_t extent, uint64_t *address,
                          uint64_t *bytes, char *text) __attribute__((warn_unused_result));
/* At the end, when no thread copies any more. Takes any one that is left, pinned or not; -KVT_ENOENT:
 * none is. */
int kvt_extent_table_take_any(struct kvt_extent_table *t, uint64_t *address, uint64_t *bytes)
    __attribute__((warn_unused_result));

/* Copy thread. The address of a range, which stays until it is unpinned; 0: no such extent, or not
 * inside it. */
uint64_t kvt_extent_table_pin(struct kvt_extent_table *t, uint32_t extent, uint64_t offset,
                              uint64_t bytes);
void kvt_extent_table_unpin(struct kvt_extent_table *t, uint32_t extent);

#endif
