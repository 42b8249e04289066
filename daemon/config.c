/* Reading a configuration: file, then --set, then what options mean for each other. Everything is
 * collected in a copy that is handed out only if all of it is right.
 */
#include "daemon/config.h"
#include "daemon/units.h"
#include "proto/errors.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define LINE_BYTES_MAX  1024
#define OPTIONS_MAX     64
#define DEVICE_NAME_MAX 31
#define CHUNK_GRANULE   (UINT64_C(64) << 10)

struct parser {
    const char *name; /* file, for errors */
    unsigned line;    /* 0: not in the file */
    const char *set;  /* the --set being applied, or NULL */
    struct kvt_config config;
    char *text;
    /* where it was given; 0: not yet */
    unsigned section_line[KVT_SECTION_DEVICE];
    unsigned device_line[KVT_DEVICES_MAX];
    unsigned option_line[KVT_SECTION_DEVICE + KVT_DEVICES_MAX][OPTIONS_MAX];
    const char
        *option_set[KVT_SECTION_DEVICE + KVT_DEVICES_MAX][OPTIONS_MAX]; /* likewise by --set */
    /* the section that lines are read into */
    bool in_section;
    enum kvt_section section;
    uint32_t device;
};

static int fail(struct parser *p, const char *format, ...) __attribute__((format(printf, 2, 3)));

static int fail(struct parser *p, const char *format, ...) {
    int n = p->line > 0 ? snprintf(p->text, KVT_CONFIG_ERROR_BYTES, "%s:%u: ", p->name, p->line)
            : p->set != NULL ? snprintf(p->text, KVT_CONFIG_ERROR_BYTES, "--set %.256s: ", p->set)
                             : snprintf(p->text, KVT_CONFIG_ERROR_BYTES, "configuration: ");
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(p->text + n, KVT_CONFIG_ERROR_BYTES - (size_t)n, format, arguments);
    va_end(arguments);
    return -KVT_ECONFIG;
}

/* ---- names -------------------------------------------------------------------------------------- */

static const struct kvt_option *find_option(enum kvt_section section, const char *name) {
    for (uint32_t i = 0; i < kvt_option_count; i++) {
        if (kvt_options[i].section == section && strcmp(kvt_options[i].name, name) == 0) {
            return &kvt_options[i];
        }
    }
    return NULL;
}

static void list_options(enum kvt_section section, char *text, size_t size) {
    size_t used = 0;
    text[0] = '\0';
    for (uint32_t i = 0; i < kvt_option_count && used < size; i++) {
        if (kvt_options[i].section == section) {
            int n = snprintf(text + used, size - used, "%s%s", used == 0 ? "" : ", ",
                             kvt_options[i].name);
            used += n > 0 ? (size_t)n : 0;
        }
    }
}

static bool device_name_ok(const char *name) {
    size_t length =
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-");
    return length > 0 && length <= DEVICE_NAME_MAX && name[length] == '\0';
}

static int find_device(const struct kvt_config *c, const char *name) {
    for (uint32_t i = 0; i < c->device_count; i++) {
        if (strcmp(c->devices[i].name, name) == 0) {
            return (int)i;
        }
    }
    return -1;
}

static void set_defaults(enum kvt_section section, void *base) {
    for (uint32_t i = 0; i < kvt_option_count; i++) {
        if (kvt_options[i].section == section) {
            /* The unit test walks the table: every default is accepted by its own entry. */
            (void)kvt_option_store(&kvt_options[i], base, kvt_options[i].value);
        }
    }
}

/* Adds a device with defaults; returns its index or an error. */
static int add_device(struct parser *p, const char *name) {
    if (!device_name_ok(name)) {
        return fail(p,
                    "the device name \"%.64s\" is not usable; accepted: 1 to %d letters, digits, "
                    "- and _",
                    name, DEVICE_NAME_MAX);
    }
    if (p->config.device_count == KVT_DEVICES_MAX) {
        return fail(p, "[device %s]: there are %d devices already, the most that are accepted",
                    name, KVT_DEVICES_MAX);
    }
    struct kvt_config_device *d = &p->config.devices[p->config.device_count];
    set_defaults(KVT_SECTION_DEVICE, d);
    (void)snprintf(d->name, sizeof(d->name), "%s", name);
    return (int)p->config.device_count++;
}

/* ---- one option --------------------------------------------------------------------------------- */

/* "[device cpu0] budget", "[host] chunk": how errors name an option. */
static void section_text(const struct parser *p, enum kvt_section section, uint32_t device,
                         char *text, size_t size) {
    if (section == KVT_SECTION_DEVICE) {
        (void)snprintf(text, size, "[device %s]", p->config.devices[device].name);
    } else {
        (void)snprintf(text, size, "[%s]", kvt_section_names[section]);
    }
}

static int store(struct parser *p, enum kvt_section section, uint32_t device, const char *name,
                 const char *value) {
    char where[KVT_NAME_BYTES];
    char list[KVT_CONFIG_ERROR_BYTES / 2];
    section_text(p, section, device, where, sizeof(where));
    const struct kvt_option *o = find_option(section, name);
    if (o == NULL) {
        list_options(section, list, sizeof(list));
        return fail(p, "%s %.64s: unknown option; accepted: %s", where, name, list);
    }
    unsigned *given = &p->option_line[section + device][o - kvt_options];
    p->option_set[section + device][o - kvt_options] = p->set;
    if (p->line > 0) {
        if (*given > 0) {
            return fail(p, "%s %s: given twice, first in line %u", where, name, *given);
        }
        *given = p->line;
    }
    void *base =
        section == KVT_SECTION_DEVICE ? (void *)&p->config.devices[device] : (void *)&p->config;
    const char *wrong = kvt_option_store(o, base, value);
    if (wrong != NULL) {
        return fail(p, "%s %s = %.128s: the value %s; accepted: %s", where, name, value, wrong,
                    kvt_option_accepted(o, list, sizeof(list)));
    }
    return 0;
}

/* ---- the file ----------------------------------------------------------------------------------- */

/* Cuts white space at both ends, in place. */
static char *trim(char *s) {
    s += strspn(s, " \t\r");
    size_t length = strlen(s);
    while (length > 0 && strchr(" \t\r", s[length - 1]) != NULL) {
        s[--length] = '\0';
    }
    return s;
}

/* A comment begins at the line's start or behind white space. */
static void cut_comment(char *s) {
    for (char *p = s; *p != '\0'; p++) {
        if ((*p == '#' || *p == ';') && (p == s || p[-1] == ' ' || p[-1] == '\t')) {
            *p = '\0';
            return;
        }
    }
}

static int open_section(struct parser *p, char *header) {
    size_t length = strlen(header);
    if (length < 2 || header[length - 1] != ']') {
        return fail(p, "\"%.64s\" has no closing bracket", header);
    }
    header[length - 1] = '\0';
    char *name = trim(header + 1);
    p->in_section = true;
    if (strncmp(name, "device", 6) == 0 && (name[6] == ' ' || name[6] == '\t')) {
        name = trim(name + 6);
        int index = find_device(&p->config, name);
        if (index >= 0) {
            return fail(p, "[device %s]: given twice, first in line %u", name,
                        p->device_line[index]);
        }
        index = add_device(p, name);
        if (index < 0) {
            return index;
        }
        p->device_line[index] = p->line;
        p->section = KVT_SECTION_DEVICE;
        p->device = (uint32_t)index;
        return 0;
    }
    for (int s = 0; s < KVT_SECTION_DEVICE; s++) {
        if (strcmp(name, kvt_section_names[s]) != 0) {
            continue;
        }
        if (p->section_line[s] > 0) {
            return fail(p, "[%s]: given twice, first in line %u", name, p->section_line[s]);
        }
        p->section_line[s] = p->line;
        p->section = (enum kvt_section)s;
        p->device = 0;
        return 0;
    }
    return fail(p, "[%.64s]: unknown section; accepted: [daemon], [host], [device NAME]", name);
}

static int parse_line(struct parser *p, char *line) {
    cut_comment(line);
    line = trim(line);
    if (*line == '\0') {
        return 0;
    }
    if (*line == '[') {
        return open_section(p, line);
    }
    char *equals = strchr(line, '=');
    if (equals == NULL) {
        return fail(p, "\"%.64s\" is neither \"[section]\" nor \"option = value\"", line);
    }
    if (!p->in_section) {
        return fail(p, "\"%.64s\" stands before the first [section]", line);
    }
    *equals = '\0';
    return store(p, p->section, p->device, trim(line), trim(equals + 1));
}

static int parse_file(struct parser *p, const char *bytes, size_t size) {
    char line[LINE_BYTES_MAX + 1];
    for (size_t at = 0; at < size;) {
        const char *end = memchr(bytes + at, '\n', size - at);
        size_t length = end == NULL ? size - at : (size_t)(end - bytes) - at;
        p->line++;
        if (length > LINE_BYTES_MAX) {
            return fail(p, "the line has %zu bytes; at most %d are accepted", length,
                        LINE_BYTES_MAX);
        }
        if (memchr(bytes + at, '\0', length) != NULL) {
            return fail(p, "the line holds a zero byte: this is not a text file");
        }
        memcpy(line, bytes + at, length);
        line[length] = '\0';
        int rc = parse_line(p, line);
        if (rc != 0) {
            return rc;
        }
        at += length + 1;
    }
    p->line = 0;
    return 0;
}

/* ---- --set -------------------------------------------------------------------------------------- */

static int apply_set(struct parser *p, const char *set) {
    char copy[LINE_BYTES_MAX + 1];
    if (strlen(set) > LINE_BYTES_MAX) {
        return fail(p, "--set: longer than %d bytes", LINE_BYTES_MAX);
    }
    p->set = set;
    (void)snprintf(copy, sizeof(copy), "%s", set);
    char *equals = strchr(copy, '=');
    if (equals != NULL) {
        *equals = '\0';
    }
    char *section = trim(copy);
    char *option = strrchr(section, '.');
    if (equals == NULL || option == NULL) {
        return fail(p, "accepted: section.option=value, as daemon.log_level=debug, "
                       "host.budget=1GiB, device.NAME.budget=64MiB");
    }
    *option++ = '\0';
    char *value = trim(equals + 1);
    if (strncmp(section, "device.", 7) == 0) {
        int index = find_device(&p->config, section + 7);
        if (index < 0) {
            index = add_device(p, section + 7);
        }
        return index < 0 ? index : store(p, KVT_SECTION_DEVICE, (uint32_t)index, option, value);
    }
    for (int s = 0; s < KVT_SECTION_DEVICE; s++) {
        if (strcmp(section, kvt_section_names[s]) == 0) {
            return store(p, (enum kvt_section)s, 0, option, value);
        }
    }
    return fail(p, "unknown section; accepted: daemon, host, device.NAME");
}

/* ---- options together --------------------------------------------------------------------------- */

/* Errors name where the option was given, by --set or else in the file. false: it was not. */
static bool point_at(struct parser *p, enum kvt_section section, uint32_t device,
                     const char *name) {
    const struct kvt_option *o = find_option(section, name);
    p->set = p->option_set[section + device][o - kvt_options];
    p->line = p->set != NULL ? 0 : p->option_line[section + device][o - kvt_options];
    return p->set != NULL || p->line > 0;
}

static int too_large(struct parser *p, enum kvt_section section, uint32_t device, const char *name,
                     uint64_t bytes, uint64_t budget_bytes) {
    char a[KVT_UNIT_TEXT_BYTES];
    char b[KVT_UNIT_TEXT_BYTES];
    char where[KVT_NAME_BYTES];
    section_text(p, section, device, where, sizeof(where));
    (void)point_at(p, section, device, name);
    return fail(p, "%s %s = %s: larger than the budget of %s", where, name,
                kvt_size_exact(bytes, a), kvt_size_exact(budget_bytes, b));
}

static uint64_t clamp_size(uint64_t value, uint64_t low, uint64_t high) {
    value = value < low ? low : value > high ? high : value;
    return value & ~UINT64_C(4095);
}

static int check_device(struct parser *p, uint32_t index) {
    struct kvt_config_device *d = &p->config.devices[index];
    if (d->extent_bytes == 0) {
        d->extent_bytes = clamp_size(d->budget_bytes / 16, UINT64_C(64) << 10, UINT64_C(32) << 20);
    }
    if (d->piece_bytes == 0) {
        d->piece_bytes = clamp_size(d->budget_bytes / 16, UINT64_C(64) << 10, UINT64_C(32) << 20);
    }
    if (d->worker_max_bytes == 0) {
        d->worker_max_bytes = d->budget_bytes;
    }
    const struct {
        const char *name;
        uint64_t bytes;
    } within[] = {{"worker_max", d->worker_max_bytes},
                  {"extent_size", d->extent_bytes},
                  {"piece_size", d->piece_bytes}};
    for (size_t i = 0; i < sizeof(within) / sizeof(within[0]); i++) {
        if (within[i].bytes > d->budget_bytes) {
            return too_large(p, KVT_SECTION_DEVICE, index, within[i].name, within[i].bytes,
                             d->budget_bytes);
        }
    }
    return 0;
}

static int check_together(struct parser *p) {
    struct kvt_config *c = &p->config;
    char a[KVT_UNIT_TEXT_BYTES];
    bool chunk_given = point_at(p, KVT_SECTION_HOST, 0, "chunk");
    if (c->host_chunk_bytes % CHUNK_GRANULE != 0) {
        return fail(p, "[host] chunk = %s: not a multiple of 64KiB",
                    kvt_size_exact(c->host_chunk_bytes, a));
    }
    if (c->host_chunk_bytes > c->host_budget_bytes && !chunk_given) {
        c->host_chunk_bytes = c->host_budget_bytes / CHUNK_GRANULE * CHUNK_GRANULE;
    }
    if (c->host_worker_max_bytes == 0) {
        c->host_worker_max_bytes = c->host_budget_bytes;
    }
    uint64_t preallocate =
        c->host_preallocate_bytes != KVT_SIZE_NONE ? c->host_preallocate_bytes : 0;
    const struct {
        const char *name;
        uint64_t bytes;
    } within[] = {{"chunk", c->host_chunk_bytes},
                  {"worker_max", c->host_worker_max_bytes},
                  {"preallocate", preallocate}};
    for (size_t i = 0; i < sizeof(within) / sizeof(within[0]); i++) {
        if (within[i].bytes > c->host_budget_bytes) {
            return too_large(p, KVT_SECTION_HOST, 0, within[i].name, within[i].bytes,
                             c->host_budget_bytes);
        }
    }
    for (uint32_t i = 0; i < c->device_count; i++) {
        int rc = check_device(p, i);
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

int kvt_config_parse(const char *bytes, size_t size, const char *name, const char *const *sets,
                     uint32_t set_count, struct kvt_config *out, char *text) {
    struct parser *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "%s: out of memory", name);
        return -KVT_ENOMEM;
    }
    p->name = name;
    p->text = text;
    set_defaults(KVT_SECTION_DAEMON, &p->config);
    set_defaults(KVT_SECTION_HOST, &p->config);
    int rc = parse_file(p, bytes, size);
    for (uint32_t i = 0; i < set_count && rc == 0; i++) {
        rc = apply_set(p, sets[i]);
    }
    if (rc == 0 && p->config.device_count == 0) {
        rc = add_device(p, "cpu0");
        rc = rc < 0 ? rc : 0;
    }
    if (rc == 0) {
        rc = check_together(p);
    }
    if (rc == 0) {
        *out = p->config;
    }
    free(p);
    return rc;
}

int kvt_config_load(const struct kvt_config_source *source, struct kvt_config *out, char *text) {
    const char *name = source->file != NULL ? source->file : KVT_CONFIG_DEFAULT_FILE;
    bool standard_input = strcmp(name, "-") == 0;
    FILE *stream = standard_input ? stdin : fopen(name, "re");
    if (standard_input) {
        name = "standard input";
    }
    if (stream == NULL) {
        if (source->file == NULL && errno == ENOENT) {
            return kvt_config_parse("", 0, name, source->sets, source->set_count, out, text);
        }
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "%s: cannot be opened: %s", name,
                       strerror(errno));
        return -KVT_ECONFIG;
    }
    int rc = -KVT_ECONFIG;
    char *bytes = malloc(KVT_CONFIG_FILE_BYTES_MAX + 1);
    size_t size = bytes == NULL ? 0 : fread(bytes, 1, KVT_CONFIG_FILE_BYTES_MAX + 1, stream);
    if (bytes == NULL) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "%s: out of memory", name);
    } else if (ferror(stream) != 0) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "%s: cannot be read: %s", name,
                       strerror(errno));
    } else if (size > KVT_CONFIG_FILE_BYTES_MAX) {
        (void)snprintf(text, KVT_CONFIG_ERROR_BYTES, "%s: larger than 1 MiB", name);
    } else {
        rc = kvt_config_parse(bytes, size, name, source->sets, source->set_count, out, text);
    }
    free(bytes);
    if (!standard_input) {
        (void)fclose(stream);
    }
    return rc;
}
