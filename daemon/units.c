#include "daemon/units.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

struct unit {
    const char *name;
    uint64_t factor;
};

/* Largest first. */
static const struct unit size_units[] = {
    {"TiB", UINT64_C(1) << 40},
    {"GiB", UINT64_C(1) << 30},
    {"MiB", UINT64_C(1) << 20},
    {"KiB", UINT64_C(1) << 10},
    {"B", 1},
};
static const struct unit duration_units[] = {
    {"h", UINT64_C(3600000000)}, {"min", 60000000}, {"s", 1000000}, {"ms", 1000}, {"us", 1},
};
#define UNITS 5

#define FRACTION_DIGITS_MAX 9

static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

/* number * factor / scale, or false if it does not fit or is not whole. */
static const char *scaled(uint64_t whole, uint64_t fraction, uint64_t scale, uint64_t factor,
                          uint64_t *out) {
    unsigned __int128 value = (unsigned __int128)whole * factor;
    unsigned __int128 rest = (unsigned __int128)fraction * factor;
    value += rest / scale; /* what is below one byte or microsecond is cut off */
    if (value > UINT64_MAX) {
        return "is too large";
    }
    *out = (uint64_t)value;
    return NULL;
}

static const char *parse(const char *text, const struct unit *units, uint64_t *out) {
    const char *p = text;
    uint64_t whole = 0;
    uint64_t fraction = 0;
    uint64_t scale = 1;
    int digits = 0;
    if (!is_digit(*p)) {
        return "does not begin with a number";
    }
    for (; is_digit(*p); p++) {
        if (whole > (UINT64_MAX - 9) / 10) {
            return "is too large";
        }
        whole = whole * 10 + (uint64_t)(*p - '0');
    }
    if (*p == '.') {
        for (p++; is_digit(*p); p++) {
            if (++digits > FRACTION_DIGITS_MAX) {
                return "has too many digits behind the point";
            }
            fraction = fraction * 10 + (uint64_t)(*p - '0');
            scale *= 10;
        }
        if (digits == 0) {
            return "has no digit behind the point";
        }
    }
    while (*p == ' ') {
        p++;
    }
    if (*p == '\0') {
        return "has no unit";
    }
    for (int i = 0; i < UNITS; i++) {
        if (strcmp(p, units[i].name) == 0) {
            return scaled(whole, fraction, scale, units[i].factor, out);
        }
    }
    return "has an unknown unit";
}

const char *kvt_size_parse(const char *text, uint64_t *bytes) {
    return parse(text, size_units, bytes);
}

const char *kvt_duration_parse(const char *text, uint64_t *us) {
    return parse(text, duration_units, us);
}

const char *kvt_count_parse(const char *text, uint64_t *count) {
    uint64_t value = 0;
    if (*text == '\0') {
        return "is empty";
    }
    for (const char *p = text; *p != '\0'; p++) {
        if (!is_digit(*p)) {
            return "is not a whole number";
        }
        if (value > (UINT64_MAX - 9) / 10) {
            return "is too large";
        }
        value = value * 10 + (uint64_t)(*p - '0');
    }
    *count = value;
    return NULL;
}

static const char *exact_text(uint64_t value, const struct unit *units, char *text) {
    int i = 0;
    while (i < UNITS - 1 && (value == 0 || value % units[i].factor != 0)) {
        i++;
    }
    (void)snprintf(text, KVT_UNIT_TEXT_BYTES, "%" PRIu64 "%s", value / units[i].factor,
                   units[i].name);
    return text;
}

const char *kvt_size_exact(uint64_t bytes, char *text) {
    return exact_text(bytes, size_units, text);
}

const char *kvt_duration_exact(uint64_t us, char *text) {
    return exact_text(us, duration_units, text);
}

const char *kvt_size_about(uint64_t bytes, char *text) {
    int i = 0;
    while (i < UNITS - 1 && bytes < size_units[i].factor) {
        i++;
    }
    if (i == UNITS - 1) {
        (void)snprintf(text, KVT_UNIT_TEXT_BYTES, "%" PRIu64 " B", bytes);
    } else {
        (void)snprintf(text, KVT_UNIT_TEXT_BYTES, "%.1f %s",
                       (double)bytes / (double)size_units[i].factor, size_units[i].name);
    }
    return text;
}
