/* Finds a driver by its name: the embedded one, or a plug-in opened at run time. A plug-in is never
 * closed again: its threads and its driver's may outlive a device. */
#include "proto/errors.h"
#include "tiers/device/device.h"

#include <ctype.h>
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static bool is_name(const char *name) {
    for (const char *c = name; *c != '\0'; c++) {
        if (!isalnum((unsigned char)*c) && *c != '_' && *c != '-') {
            return false;
        }
    }
    return *name != '\0' && strlen(name) < KVT_NAME_BYTES;
}

static bool is_complete(const struct kvt_driver_ops *o) {
    return o->name && o->open && o->close && o->extent_create && o->extent_destroy &&
           o->host_added && o->host_removed && o->page_added && o->page_removed && o->copy &&
           o->post && o->poll && o->wait && o->wake;
}

static int open_plugin(const char *name, const char *path, const struct kvt_driver_ops **out,
                       char *text) {
    if (access(path, F_OK) != 0) {
        snprintf(
            text, KVT_TEXT_BYTES,
            "device driver %s: %.300s is not there; install that plug-in, or set plugin_dir to "
            "where it is",
            name, path);
        return -KVT_ENOTSUP;
    }
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(text, KVT_TEXT_BYTES, "device driver %s: cannot be loaded: %.400s", name,
                 dlerror());
        return -KVT_ENOTSUP;
    }
    void *symbol = dlsym(library, "kvt_driver_ops_get");
    kvt_driver_ops_get_fn get = NULL;
    memcpy(&get, &symbol, sizeof(get)); /* ISO C has no cast from an object to a function */
    const struct kvt_driver_ops *ops = get ? get() : NULL;
    if (!ops) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device driver %s: %.300s is no driver plug-in: it has no kvt_driver_ops_get",
                 name, path);
        goto close_library;
    }
    if (ops->abi != KVT_DRIVER_ABI) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device driver %s: %.300s was built for driver interface %u, this daemon has %u; "
                 "install both from one version",
                 name, path, ops->abi, KVT_DRIVER_ABI);
        goto close_library;
    }
    if (!is_complete(ops) || strcmp(ops->name, name) != 0) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device driver %s: %.300s is not that driver, or lacks a function", name, path);
        goto close_library;
    }
    *out = ops;
    return 0;

close_library:
    dlclose(library);
    return -KVT_ENOTSUP;
}

int kvt_driver_find(const char *name, const char *plugin_dir, const struct kvt_driver_ops **out,
                    char *text) {
    char path[PATH_MAX];
    if (strcmp(name, kvt_cpu_driver_ops.name) == 0) {
        *out = &kvt_cpu_driver_ops;
        return 0;
    }
    if (!is_name(name)) {
        snprintf(text, KVT_TEXT_BYTES,
                 "device driver \"%.100s\": a name has letters, digits, '-' and '_'", name);
        return -KVT_ENOTSUP;
    }
    int n = snprintf(path, sizeof(path), "%s/kvtier-%s.so", plugin_dir ? plugin_dir : "", name);
    if (!plugin_dir || plugin_dir[0] == '\0' || n < 0 || (size_t)n >= sizeof(path)) {
        snprintf(text, KVT_TEXT_BYTES, "device driver %s: %s; \"cpu\" needs no plug-in", name,
                 plugin_dir && plugin_dir[0] ? "plugin_dir is too long" : "plugin_dir is not set");
        return -KVT_ENOTSUP;
    }
    return open_plugin(name, path, out, text);
}
