/* Numbers as people write them: sizes ("64MiB", "1.5GiB"), durations ("500ms", "2s"). Pure; any
 * thread. Identities: proto/uuid.h.
 */
#ifndef KVT_DAEMON_UNITS_H
#define KVT_DAEMON_UNITS_H

#include "proto/uuid.h"

#include <stddef.h>
#include <stdint.h>

/* What is wrong with a text; NULL: nothing. Units B, KiB, MiB, GiB, TiB; one is always needed, so
 * that a line cut short ("16" of "16GiB") is noticed. */
const char *kvt_size_parse(const char *text, uint64_t *bytes);
/* Units us, ms, s, min, h. */
const char *kvt_duration_parse(const char *text, uint64_t *us);
const char *kvt_count_parse(const char *text, uint64_t *count);

/* The shortest exact text: "64MiB", "100B". text has room for 32 bytes. Returns text. */
const char *kvt_size_exact(uint64_t bytes, char *text);
const char *kvt_duration_exact(uint64_t us, char *text);
/* Rounded to a tenth of the largest fitting unit, for sentences: "23.4 GiB". */
const char *kvt_size_about(uint64_t bytes, char *text);
#define KVT_UNIT_TEXT_BYTES 32

#endif
