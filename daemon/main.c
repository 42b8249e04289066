/* kvtierd: arguments. */
#include "daemon/daemon.h"
#include "daemon/log.h"
#include "tiers/engine/assert.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#define SETS_MAX      256
#define SET_BYTES_MAX 512

static const char help[] =
    "kvtierd: a service that keeps the KV caches of inference workers in the memory that suits\n"
    "them: device or host.\n"
    "\n"
    "  kvtierd [--config FILE] [--set SECTION.OPTION=VALUE]...\n"
    "\n"
    "  --config FILE          read FILE (- is standard input); without it,\n"
    "                         " KVT_CONFIG_DEFAULT_FILE " if it is there\n"
    "  --set S.O=VALUE        set an option, over the file: daemon.log_level=debug,\n"
    "                         host.budget=1GiB, device.NAME.budget=64MiB; as often as needed\n"
    "  --runtime-dir DIR      the same as --set daemon.runtime_dir=DIR\n"
    "  --log-level LEVEL      the same as --set daemon.log_level=LEVEL\n"
    "  --print-config         print a commented file with every option at its default, and end\n"
    "  --check-config         check the configuration as a start does, without starting, and end\n"
    "  --foreground           accepted; it always stays in the foreground\n"
    "  --version              print the version, and end\n"
    "  --help                 print this, and end\n"
    "\n"
    "It logs to standard error, says \"ready\" when workers may attach, and stops at SIGTERM or\n"
    "SIGINT. Exit status: 0 stopped; 1 start failed; 2 arguments or configuration; 3 another\n"
    "kvtierd serves the runtime directory; 4 a device is lost; 5 a stop did not end in time.\n"
    "See kvtierd(8), kvtierd.conf(5).\n";

struct arguments {
    const char *config;
    const char *sets[SETS_MAX];
    char texts[2][SET_BYTES_MAX]; /* of --runtime-dir and --log-level */
    uint32_t set_count;
    bool check;
};

static void assertion_failed(const char *file, int line, const char *condition) {
    kvt_log(KVT_LOG_ERROR, "%s:%d: assertion failed: %s; this is a bug", file, line, condition);
}

static int usage(const char *what, const char *value) {
    kvt_log(KVT_LOG_ERROR, "%s%s; kvtierd --help lists what is accepted", what, value);
    return KVT_EXIT_USAGE;
}

static int add_set(struct arguments *a, const char *set) {
    if (a->set_count == SETS_MAX) {
        return usage("more than 256 settings", "");
    }
    a->sets[a->set_count++] = set;
    return 0;
}

static int print(bool ok) {
    if (fflush(stdout) != 0 || !ok) {
        kvt_log(KVT_LOG_ERROR, "standard output cannot be written");
        return KVT_EXIT_FAILED;
    }
    return -1;
}

/* 0: go on; -1: end well; otherwise the exit status. */
static int parse(int argc, char **argv, struct arguments *a) {
    static const struct option options[] = {
        {"config", required_argument, NULL, 'c'},
        {"set", required_argument, NULL, 's'},
        {"runtime-dir", required_argument, NULL, 'r'},
        {"log-level", required_argument, NULL, 'l'},
        {"print-config", no_argument, NULL, 'p'},
        {"check-config", no_argument, NULL, 'k'},
        {"foreground", no_argument, NULL, 'f'},
        {"version", no_argument, NULL, 'v'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    int c;
    int rc = 0;
    opterr = 0;
    while (rc == 0 && (c = getopt_long(argc, argv, "+:h", options, NULL)) != -1) {
        switch (c) {
        case 'c':
            a->config = optarg;
            break;
        case 's':
            rc = add_set(a, optarg);
            break;
        case 'r':
        case 'l': {
            char *text = a->texts[c == 'l'];
            int n = snprintf(text, SET_BYTES_MAX, "daemon.%s=%s",
                             c == 'r' ? "runtime_dir" : "log_level", optarg);
            rc = n < SET_BYTES_MAX ? add_set(a, text) : usage("too long: ", argv[optind - 1]);
            break;
        }
        case 'p':
            kvt_config_print(stdout);
            return print(true);
        case 'k':
            a->check = true;
            break;
        case 'f':
            break;
        case 'v':
            return print(puts("kvtierd " KVT_VERSION) >= 0);
        case 'h':
            return print(fputs(help, stdout) >= 0);
        case ':':
            return usage("a value is missing behind ", argv[optind - 1]);
        default:
            return usage("unknown option ", argv[optind - 1]);
        }
    }
    if (rc == 0 && optind < argc) {
        return usage("unknown argument ", argv[optind]);
    }
    return rc;
}

/* What only a start can find: said where there is something of it. */
static int print_checked(const struct kvt_config *c) {
    bool ok = puts("the configuration is usable") >= 0;
    for (uint32_t i = 0; i < c->device_count; i++) {
        const char *driver = kvt_config_driver_name(&c->devices[i]);
        if (strcmp(driver, "cpu") != 0) {
            ok = printf("not checked: [device %s]: whether its %s driver and device are there, and "
                        "have the budget\n",
                        c->devices[i].name, driver) >= 0 &&
                 ok;
        }
    }
    return print(ok) < 0 ? 0 : KVT_EXIT_FAILED;
}

int main(int argc, char **argv) {
    static struct arguments a;
    static struct kvt_daemon d;
    char text[KVT_CONFIG_ERROR_BYTES];
    kvt_assert_hook_set(assertion_failed);
    int rc = parse(argc, argv, &a);
    if (rc != 0) {
        return rc < 0 ? 0 : rc;
    }
    struct kvt_config_source source = {.file = a.config, .sets = a.sets, .set_count = a.set_count};
    if (kvt_config_load(&source, &d.config, text) != 0) {
        kvt_log(KVT_LOG_ERROR, "%s", text);
        return KVT_EXIT_USAGE;
    }
    kvt_log_set_level((enum kvt_log_level)d.config.log_level);
    if (a.check) {
        return kvt_daemon_check(&d) != 0 ? KVT_EXIT_USAGE : print_checked(&d.config);
    }
    return kvt_daemon_run(&d);
}
