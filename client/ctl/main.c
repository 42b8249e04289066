/* kvtierctl: looks at a running kvtierd and administers it. man/kvtierctl.1 */
#include "client/ctl/ctl.h"

#include <locale.h>
#include <stdio.h>
#include <string.h>

struct command {
    const char *name;
    int (*run)(struct kvt_ctl *);
};

static const struct command commands[] = {{"status", kvt_ctl_status}, {"workers", kvt_ctl_workers},
                                          {"caches", kvt_ctl_caches}, {"plan", kvt_ctl_plan},
                                          {"evict", kvt_ctl_evict},   {"version", kvt_ctl_version}};

static void print_help(void) {
    (void)printf(
        "usage: kvtierctl [OPTION]... COMMAND [ARGUMENT]...\n\n"
        "commands\n"
        "  status [--watch [S]]  tiers, workers and caches; with --watch every S seconds (2)\n"
        "  workers               who is attached, with how much memory\n"
        "  caches                each cache: where its layers are, what it has moved\n"
        "  plan ...              what a cache would get, or what a running one achieves\n"
        "  evict SESSION         free the caches of a worker; --kill ends its process too, which\n"
        "                        frees the device memory that it still maps\n"
        "  version               versions of this program and of the daemon\n\n"
        "options\n"
        "  --runtime-dir DIR     the daemon's directory ($KVTIER_RUNTIME_DIR, /run/kvtierd)\n"
        "  --json                one JSON object a look, for programs; sizes in bytes\n"
        "  --timeout S           seconds to wait for an answer (5)\n"
        "  --help                this\n\n"
        "Root, the daemon's user and its admin group see and evict everything, others their "
        "own.\n\n"
        "%s\n"
        "exit status: 0 all right; 1 an error: the daemon's answer, no permission to ask it, "
        "output\n"
        "that cannot be written, or a plan that does not fit; 2 usage; 3 no daemon\n",
        kvt_ctl_plan_help);
}

/* Takes out what is meant for every command, wherever it stands. -1: go on. */
static int read_common(struct kvt_ctl *ctl) {
    int kept = 0;
    for (int i = 0; i < ctl->argc; i++) {
        bool bad = false;
        const char *value;
        uint64_t seconds;
        if (strcmp(ctl->argv[i], "--help") == 0 || strcmp(ctl->argv[i], "-h") == 0) {
            print_help();
            return KVT_CTL_OK;
        }
        if (strcmp(ctl->argv[i], "--json") == 0) {
            ctl->json = true;
        } else if ((value = kvt_ctl_value(ctl, &i, "--runtime-dir", &bad)) != NULL) {
            ctl->runtime_dir = value;
        } else if (!bad && (value = kvt_ctl_value(ctl, &i, "--timeout", &bad)) != NULL) {
            if (!kvt_ctl_number("--timeout", value, 1, 3600, &seconds)) {
                return KVT_CTL_USAGE;
            }
            ctl->timeout_ms = (int)seconds * 1000;
        } else if (bad) {
            return KVT_CTL_USAGE;
        } else {
            ctl->argv[kept++] = ctl->argv[i];
        }
    }
    ctl->argc = kept;
    return -1;
}

static int run(struct kvt_ctl *ctl) {
    int status = read_common(ctl);
    if (status >= 0) {
        return status;
    }
    if (ctl->argc == 0) {
        return kvt_ctl_usage("a command is needed");
    }
    const char *name = ctl->argv[0];
    ctl->argc--;
    ctl->argv++;
    if (strcmp(name, "--version") == 0) {
        (void)printf("kvtierctl %s\n", kvt_version());
        return KVT_CTL_OK;
    }
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        if (strcmp(name, commands[i].name) == 0) {
            status = commands[i].run(ctl);
            kvt_detach(ctl->client);
            return status;
        }
    }
    return kvt_ctl_usage(name[0] == '-' ? "option '%s' is unknown" : "command '%s' is unknown",
                         name);
}

int main(int argc, char **argv) {
    struct kvt_ctl ctl = {.timeout_ms = 5000, .argc = argc - 1, .argv = argv + 1};
    (void)setlocale(LC_CTYPE, "");
    int status = run(&ctl);
    int written = kvt_ctl_flush(&ctl);
    return status != KVT_CTL_OK ? status : written;
}
