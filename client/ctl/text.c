#include "client/ctl/text.h"

#include <inttypes.h>
#include <langinfo.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* ---- numbers ---------------------------------------------------------------------------------- */

const char *kvt_ctl_size(uint64_t bytes, char *out) {
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    double value = (double)bytes;
    size_t unit = 0;
    while (value >= 1023.95 && unit + 1 < sizeof units / sizeof units[0]) {
        value /= 1024;
        unit++;
    }
    (void)snprintf(out, KVT_CTL_TEXT_BYTES, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
    return out;
}

bool kvt_ctl_size_parse(const char *text, uint64_t *bytes) {
    static const struct {
        const char *name;
        double scale;
    } units[] = {{"", 1},
                 {"B", 1},
                 {"KiB", 1024.0},
                 {"MiB", 1048576.0},
                 {"GiB", 1073741824.0},
                 {"TiB", 1099511627776.0}};
    char *end;
    if (text[0] < '0' || text[0] > '9') {
        return false;
    }
    double value = strtod(text, &end);
    while (*end == ' ') {
        end++;
    }
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
        if (strcmp(end, units[i].name) == 0 && value * units[i].scale < 1e18) {
            *bytes = (uint64_t)(value * units[i].scale);
            return true;
        }
    }
    return false;
}

const char *kvt_ctl_duration(uint64_t ms, char *out) {
    if (ms < 1000) {
        (void)snprintf(out, KVT_CTL_TEXT_BYTES, "%" PRIu64 " ms", ms);
    } else if (ms < 120000) {
        (void)snprintf(out, KVT_CTL_TEXT_BYTES, "%" PRIu64 " s", ms / 1000);
    } else if (ms < 7200000) {
        (void)snprintf(out, KVT_CTL_TEXT_BYTES, "%" PRIu64 " min", ms / 60000);
    } else {
        (void)snprintf(out, KVT_CTL_TEXT_BYTES, "%.1f h", (double)ms / 3600000);
    }
    return out;
}

const char *kvt_ctl_time(uint64_t ns, char *out) {
    static const char *const units[] = {"ns", "us", "ms", "s"};
    double value = (double)ns;
    size_t unit = 0;
    while (value >= 999.5 && unit + 1 < sizeof units / sizeof units[0]) {
        value /= 1000;
        unit++;
    }
    int digits = unit == 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
    (void)snprintf(out, KVT_CTL_TEXT_BYTES, "%.*f %s", digits, value, units[unit]);
    return out;
}

const char *kvt_ctl_count(uint64_t n, char *out) {
    char digits[24];
    int length = snprintf(digits, sizeof digits, "%" PRIu64, n);
    char *p = out;
    for (int i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0) {
            *p++ = ',';
        }
        *p++ = digits[i];
    }
    *p = '\0';
    return out;
}

/* ---- characters ------------------------------------------------------------------------------- */

/* Bytes of the UTF-8 character at `s`; 0: it is not one, or it is a control character. */
static size_t character(const unsigned char *s) {
    if (s[0] < 0x20 || s[0] == 0x7f) {
        return 0;
    }
    if (s[0] < 0x80) {
        return 1;
    }
    size_t n = s[0] >= 0xf0 && s[0] <= 0xf4   ? 4
               : s[0] >= 0xe0 && s[0] <= 0xef ? 3
               : s[0] >= 0xc2 && s[0] <= 0xdf ? 2
                                              : 0;
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    bool overlong = (s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xf0 && s[1] < 0x90);
    bool outside = (s[0] == 0xed && s[1] > 0x9f) || (s[0] == 0xf4 && s[1] > 0x8f);
    bool control = s[0] == 0xc2 && s[1] < 0xa0; /* C1: some terminals obey them */
    return overlong || outside || control ? 0 : n;
}

const char *kvt_ctl_clean(const char *text, char *out, size_t size) {
    size_t used = 0;
    for (const unsigned char *s = (const unsigned char *)text; *s != '\0';) {
        size_t n = character(s);
        if (used + (n > 0 ? n : 1) >= size) {
            break;
        }
        if (n == 0) {
            out[used++] = '?';
            s++;
        } else {
            memcpy(out + used, s, n);
            used += n;
            s += n;
        }
    }
    out[used] = '\0';
    return out;
}

/* Columns that a cleaned text takes: characters, not bytes. */
static size_t columns_of(const char *text) {
    size_t n = 0;
    for (; *text != '\0'; text++) {
        n += ((unsigned char)*text & 0xc0) != 0x80;
    }
    return n;
}

/* ---- bars ------------------------------------------------------------------------------------- */

bool kvt_ctl_has_blocks(void) {
    return strcmp(nl_langinfo(CODESET), "UTF-8") == 0;
}

static const char *layer_mark(uint8_t layer, bool blocks) {
    switch (layer) {
    case 'R':
        return blocks ? "\xe2\x96\x88" : "#"; /* full block */
    case 'S':
        return blocks ? "\xe2\x96\x91" : "-"; /* light shade */
    case 'I':
        return ".";
    default:
        return "?";
    }
}

char *kvt_ctl_layers_bar(const uint8_t *layers, size_t count) {
    bool blocks = kvt_ctl_has_blocks();
    char *bar = malloc(3 * count + 1);
    size_t used = 0;
    for (size_t i = 0; bar != NULL && i < count; i++) {
        const char *mark = layer_mark(layers[i], blocks);
        memcpy(bar + used, mark, strlen(mark));
        used += strlen(mark);
    }
    if (bar != NULL) {
        bar[used] = '\0';
    }
    return bar;
}

char *kvt_ctl_fill_bar(uint64_t used, uint64_t budget, uint32_t width) {
    double part = budget > 0 ? (double)used / (double)budget : 0;
    uint32_t full = part >= 1 ? width : (uint32_t)(part * width + 0.5);
    uint8_t *marks = malloc(width);
    if (marks == NULL) {
        return NULL;
    }
    memset(marks, 'S', width);
    memset(marks, 'R', full);
    char *bar = kvt_ctl_layers_bar(marks, width);
    free(marks);
    return bar;
}

/* ---- tables ----------------------------------------------------------------------------------- */

static void count_columns(struct kvt_ctl_table *t) {
    while (t->columns < KVT_CTL_COLUMNS_MAX && t->headers[t->columns] != NULL) {
        t->columns++;
    }
}

/* Takes over `text`, which malloc made. */
static void add_cell(struct kvt_ctl_table *t, char *text) {
    if (t->used == t->capacity && text != NULL) {
        uint32_t capacity = t->capacity == 0 ? 64 : 2 * t->capacity;
        char **cells = realloc(t->cells, capacity * sizeof *cells);
        if (cells == NULL) {
            free(text);
            text = NULL;
        } else {
            t->cells = cells;
            t->capacity = capacity;
        }
    }
    if (text == NULL) {
        t->out_of_memory = true;
        return;
    }
    t->cells[t->used++] = text;
}

void kvt_ctl_cell(struct kvt_ctl_table *t, const char *text) {
    add_cell(t, text != NULL ? strdup(text) : NULL);
}

void kvt_ctl_cellf(struct kvt_ctl_table *t, const char *format, ...) {
    char *text = NULL;
    va_list args;
    va_start(args, format);
    if (vasprintf(&text, format, args) < 0) {
        text = NULL;
    }
    va_end(args);
    add_cell(t, text);
}

/* The last column is not padded, so that no line ends in spaces. */
static void print_cell(FILE *out, const char *text, size_t width, bool right, bool last) {
    int pad = (int)(width - columns_of(text));
    if (right) {
        (void)fprintf(out, "%*s%s", pad, "", text);
    } else if (last) {
        (void)fputs(text, out);
    } else {
        (void)fprintf(out, "%s%*s", text, pad, "");
    }
    (void)fputs(last ? "\n" : "  ", out);
}

static const char *header(const struct kvt_ctl_table *t, uint32_t column, bool *right) {
    const char *h = t->headers[column];
    *right = h[0] == '>';
    return *right ? h + 1 : h;
}

static void print_rows(const struct kvt_ctl_table *t, FILE *out) {
    size_t widths[KVT_CTL_COLUMNS_MAX];
    bool right;
    for (uint32_t c = 0; c < t->columns; c++) {
        widths[c] = columns_of(header(t, c, &right));
        for (uint32_t i = c; i < t->used; i += t->columns) {
            size_t n = columns_of(t->cells[i]);
            widths[c] = n > widths[c] ? n : widths[c];
        }
    }
    for (uint32_t c = 0; c < t->columns; c++) {
        const char *h = header(t, c, &right);
        print_cell(out, h, widths[c], right, c + 1 == t->columns);
    }
    for (uint32_t i = 0; i < t->used; i++) {
        uint32_t c = i % t->columns;
        (void)header(t, c, &right);
        print_cell(out, t->cells[i], widths[c], right, c + 1 == t->columns);
    }
}

void kvt_ctl_table_print(struct kvt_ctl_table *t, FILE *out) {
    count_columns(t);
    if (t->out_of_memory) {
        (void)fputs("(out of memory)\n", out);
    } else {
        print_rows(t, out);
    }
    for (uint32_t i = 0; i < t->used; i++) {
        free(t->cells[i]);
    }
    free(t->cells);
    t->cells = NULL;
    t->used = t->capacity = 0;
}

/* ---- JSON ------------------------------------------------------------------------------------- */

static void quote(FILE *out, const char *text) {
    (void)fputc('"', out);
    for (const unsigned char *s = (const unsigned char *)text; *s != '\0';) {
        size_t n = character(s);
        if (n == 0 && *s < 0x80) {
            (void)fprintf(out, "\\u%04x", *s);
        } else if (n == 0) {
            (void)fputs("\\ufffd", out);
        } else if (*s == '"' || *s == '\\') {
            (void)fprintf(out, "\\%c", *s);
        } else {
            (void)fwrite(s, 1, n, out);
        }
        s += n > 0 ? n : 1;
    }
    (void)fputc('"', out);
}

static void lead(struct kvt_ctl_json *j, const char *name) {
    if (j->comma) {
        (void)fputs(", ", j->out);
    }
    j->comma = true;
    if (name != NULL) {
        quote(j->out, name);
        (void)fputs(": ", j->out);
    }
}

void kvt_ctl_json_begin(struct kvt_ctl_json *j, const char *name, char bracket) {
    lead(j, name);
    (void)fputc(bracket, j->out);
    j->comma = false;
}

void kvt_ctl_json_end(struct kvt_ctl_json *j, char bracket) {
    (void)fputc(bracket, j->out);
    j->comma = true;
}

void kvt_ctl_json_string(struct kvt_ctl_json *j, const char *name, const char *value) {
    lead(j, name);
    quote(j->out, value != NULL ? value : "");
}

void kvt_ctl_json_number(struct kvt_ctl_json *j, const char *name, uint64_t value) {
    lead(j, name);
    (void)fprintf(j->out, "%" PRIu64, value);
}

void kvt_ctl_json_bool(struct kvt_ctl_json *j, const char *name, bool value) {
    lead(j, name);
    (void)fputs(value ? "true" : "false", j->out);
}

void kvt_ctl_json_letters(struct kvt_ctl_json *j, const char *name, const uint8_t *letters,
                          size_t count) {
    char *text = calloc(count + 1, 1);
    if (text != NULL && count > 0) {
        memcpy(text, letters, count);
    }
    kvt_ctl_json_string(j, name, text);
    free(text);
}

void kvt_ctl_json_real(struct kvt_ctl_json *j, const char *name, double value) {
    lead(j, name);
    if (value == value && value < 1e300 && value > -1e300) {
        (void)fprintf(j->out, "%.6g", value);
    } else {
        (void)fputs("null", j->out);
    }
}
