/* Text for people and for programs: sizes, bars, tables, JSON. Names that come from workers are
 * cleaned: nothing that they hold reaches a terminal as a control character.
 */
#ifndef KVT_CTL_TEXT_H
#define KVT_CTL_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define KVT_CTL_TEXT_BYTES 32

/* "1.5 GiB", "0 B": out has room for KVT_CTL_TEXT_BYTES. Returns out. */
const char *kvt_ctl_size(uint64_t bytes, char *out);
/* "1.5GiB", "64 MiB", "1000": false for anything else. */
bool kvt_ctl_size_parse(const char *text, uint64_t *bytes);
/* "350 ms", "12 s", "3 min", "2.5 h". */
const char *kvt_ctl_duration(uint64_t ms, char *out);
/* "850 ns", "2.31 us", "70.3 ms", "120 s". */
const char *kvt_ctl_time(uint64_t ns, char *out);
/* "1,234,567". */
const char *kvt_ctl_count(uint64_t n, char *out);

/* Copies, with '?' for control characters and for what is not UTF-8. Returns out. */
const char *kvt_ctl_clean(const char *text, char *out, size_t size);

/* Whether the terminal's character set has block characters (UTF-8). */
bool kvt_ctl_has_blocks(void);
/* One character a layer from 'R' resident, 'S' streamed, 'I' idle; malloc'ed, NULL: no memory. */
char *kvt_ctl_layers_bar(const uint8_t *layers, size_t count);
/* `width` characters, filled in proportion; malloc'ed. */
char *kvt_ctl_fill_bar(uint64_t used, uint64_t budget, uint32_t width);

/* ---- tables ----------------------------------------------------------------------------------- */

#define KVT_CTL_COLUMNS_MAX 13

struct kvt_ctl_table {
    const char *headers[KVT_CTL_COLUMNS_MAX]; /* NULL ends; a leading '>' aligns to the right */
    char **cells;
    uint32_t columns;
    uint32_t used;
    uint32_t capacity;
    bool out_of_memory;
};

/* Copies `text` into the next cell, left to right, row by row. */
void kvt_ctl_cell(struct kvt_ctl_table *t, const char *text);
__attribute__((format(printf, 2, 3))) void kvt_ctl_cellf(struct kvt_ctl_table *t,
                                                         const char *format, ...);
/* Prints header and rows, and frees the cells. */
void kvt_ctl_table_print(struct kvt_ctl_table *t, FILE *out);

/* ---- JSON ------------------------------------------------------------------------------------- */

/* Writes one document; commas are its own business. `name` NULL inside arrays. */
struct kvt_ctl_json {
    FILE *out;
    bool comma;
};
void kvt_ctl_json_begin(struct kvt_ctl_json *j, const char *name, char bracket);
void kvt_ctl_json_end(struct kvt_ctl_json *j, char bracket);
void kvt_ctl_json_string(struct kvt_ctl_json *j, const char *name, const char *value);
void kvt_ctl_json_number(struct kvt_ctl_json *j, const char *name, uint64_t value);
void kvt_ctl_json_bool(struct kvt_ctl_json *j, const char *name, bool value);
/* A string of `count` letters that no NUL ends. */
void kvt_ctl_json_letters(struct kvt_ctl_json *j, const char *name, const uint8_t *letters,
                          size_t count);
void kvt_ctl_json_real(struct kvt_ctl_json *j, const char *name, double value);

#endif
