/* Fuzzes the configuration: the file, and from a zero byte on settings as of --set, a line each. */
#include "daemon/config.h"
#include "proto/errors.h"

#include <string.h>

#define SETS_MAX 8

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const struct kvt_config *c) {
    /* What was accepted is inside its range, whatever the bytes were. */
    if (c->device_count < 1 || c->device_count > KVT_DEVICES_MAX || c->sessions_max < 1 ||
        c->sessions_max > 4096 || c->host_chunk_bytes > c->host_budget_bytes) {
        __builtin_trap();
    }
    for (uint32_t i = 0; i < c->device_count; i++) {
        const struct kvt_config_device *d = &c->devices[i];
        if (d->name[0] == '\0' || d->extent_bytes == 0 || d->extent_bytes > d->budget_bytes ||
            d->piece_bytes == 0 || d->piece_bytes > d->budget_bytes || d->driver > 1) {
            __builtin_trap();
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char sets[4096];
    static struct kvt_config config;
    const char *list[SETS_MAX];
    uint32_t count = 0;
    char text[KVT_CONFIG_ERROR_BYTES] = "";
    const uint8_t *zero = size == 0 ? NULL : memchr(data, '\0', size);
    size_t file = zero == NULL ? size : (size_t)(zero - data);
    if (zero != NULL) {
        size_t rest = size - file - 1;
        rest = rest < sizeof(sets) ? rest : sizeof(sets) - 1;
        memcpy(sets, zero + 1, rest);
        sets[rest] = '\0';
        for (char *line = sets; line != NULL && count < SETS_MAX; count++) {
            list[count] = strsep(&line, "\n");
        }
    }
    int rc = kvt_config_parse((const char *)data, file, "fuzz", list, count, &config, text);
    if (rc == 0) {
        check(&config);
    } else if (rc != -KVT_ECONFIG || text[0] == '\0' || memchr(text, '\0', sizeof(text)) == NULL) {
        __builtin_trap();
    }
    return 0;
}
