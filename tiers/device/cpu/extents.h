/* Extents of the cpu device: sealed memory files inside a budget.
 *
 * The control thread adds and removes, the copy thread pins. A pinned extent is not removed: that
 * is an invariant of the engine (it asks only when no copy is in flight), asserted here.
 */
#ifndef KVT_DEVICE_CPU_EXTENTS_H
#define KVT_DEVICE_CPU_EXTENTS_H

#include <stdint.h>

struct kvt_extents;

int kvt_extents_create(uint64_t budget_bytes, uint32_t touch_threads, struct kvt_extents **out)
    __attribute__((warn_unused_result));
/* Unmaps all that are left. NULL is allowed. */
void kvt_extents_free(struct kvt_extents *e);

/* Control thread. Makes an extent of zeroed memory that is all there, and hands over an fd of it.
 * Errors, with a sentence in text[KVT_TEXT_BYTES]: -KVT_EINVAL (size), -KVT_EEXIST (an extent with
 * these low 16 bits is there), -KVT_EQUOTA, -KVT_ENOMEM, -KVT_ESYS. */
int kvt_extents_add(struct kvt_extents *e, uint32_t extent, uint64_t bytes, int *fd, char *text)
    __attribute__((warn_unused_result));
/* Control thread. Its memory is the kernel's again, whoever still maps it, and reads as zeroes there.
 * -KVT_ENOENT; -KVT_ESYS: it is removed, but memory that is mapped elsewhere stays there. */
int kvt_extents_remove(struct kvt_extents *e, uint32_t extent, char *text)
    __attribute__((warn_unused_result));

/* Copy thread. The address of a range, which stays until it is unpinned; NULL: no such extent, or
 * not inside it. */
uint8_t *kvt_extents_pin(struct kvt_extents *e, uint32_t extent, uint64_t offset, uint64_t bytes);
void kvt_extents_unpin(struct kvt_extents *e, uint32_t extent);

#endif
