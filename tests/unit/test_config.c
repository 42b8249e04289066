/* The configuration: units, the table walked from end to end, files, --set, and what errors say. */
#include "daemon/config.h"
#include "daemon/units.h"
#include "proto/errors.h"
#include "tests/support/cunit_run.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct kvt_config config;
static char text[KVT_CONFIG_ERROR_BYTES];

static int parse(const char *file) {
    text[0] = '\0';
    return kvt_config_parse(file, strlen(file), "f.conf", NULL, 0, &config, text);
}

static int set(const char *one) {
    text[0] = '\0';
    return kvt_config_parse("", 0, "f.conf", &one, 1, &config, text);
}

/* The file is refused, and the whole sentence is this. */
static void refused(const char *file, const char *sentence) {
    int rc = parse(file);
    CU_ASSERT_EQUAL(rc, -KVT_ECONFIG);
    CU_ASSERT_STRING_EQUAL(text, sentence);
    if (strcmp(text, sentence) != 0) {
        printf("\n    is:     %s\n    wanted: %s\n", text, sentence);
    }
}

static void test_units(void) {
    uint64_t v = 0;
    CU_ASSERT_PTR_NULL(kvt_size_parse("64MiB", &v));
    CU_ASSERT_EQUAL(v, UINT64_C(64) << 20);
    CU_ASSERT_PTR_NULL(kvt_size_parse("1.5GiB", &v));
    CU_ASSERT_EQUAL(v, UINT64_C(3) << 29);
    CU_ASSERT_PTR_NULL(kvt_size_parse("4096 B", &v));
    CU_ASSERT_EQUAL(v, 4096);
    CU_ASSERT_PTR_NULL(kvt_size_parse("16777215.999TiB", &v));
    CU_ASSERT_PTR_NULL(kvt_duration_parse("500ms", &v));
    CU_ASSERT_EQUAL(v, 500000);
    CU_ASSERT_PTR_NULL(kvt_duration_parse("0.5s", &v));
    CU_ASSERT_EQUAL(v, 500000);
    CU_ASSERT_PTR_NULL(kvt_duration_parse("2h", &v));
    CU_ASSERT_EQUAL(v, UINT64_C(7200000000));
    static const char *const bad[] = {"",
                                      "16",
                                      "MiB",
                                      "-1MiB",
                                      "1.MiB",
                                      "1..5MiB",
                                      "1MB",
                                      "1mib",
                                      "1 MiB ",
                                      "0x10B",
                                      "1e3B",
                                      "16777216TiB",
                                      "99999999999999999999B",
                                      "1.0000000001KiB",
                                      "1MiB1"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        v = 7;
        CU_ASSERT_PTR_NOT_NULL(kvt_size_parse(bad[i], &v));
        CU_ASSERT_EQUAL(v, 7);
    }
    CU_ASSERT_STRING_EQUAL(kvt_size_parse("16", &v), "has no unit");
    CU_ASSERT_STRING_EQUAL(kvt_size_parse("16MB", &v), "has an unknown unit");
    CU_ASSERT_PTR_NOT_NULL(kvt_duration_parse("5", &v));
    CU_ASSERT_PTR_NOT_NULL(kvt_duration_parse("5MiB", &v));
    CU_ASSERT_PTR_NOT_NULL(kvt_count_parse("", &v));
    CU_ASSERT_PTR_NOT_NULL(kvt_count_parse("1.5", &v));
    CU_ASSERT_PTR_NOT_NULL(kvt_count_parse("99999999999999999999", &v));
}

static void test_unit_texts(void) {
    char t[KVT_UNIT_TEXT_BYTES];
    CU_ASSERT_STRING_EQUAL(kvt_size_exact(UINT64_C(64) << 20, t), "64MiB");
    CU_ASSERT_STRING_EQUAL(kvt_size_exact(1537, t), "1537B");
    CU_ASSERT_STRING_EQUAL(kvt_size_exact(0, t), "0B");
    CU_ASSERT_STRING_EQUAL(kvt_duration_exact(1500000, t), "1500ms");
    CU_ASSERT_STRING_EQUAL(kvt_size_about(UINT64_C(25) << 30, t), "25.0 GiB");
    CU_ASSERT_STRING_EQUAL(kvt_size_about(12, t), "12 B");
}

static void test_uuid(void) {
    uint8_t u[KVT_UUID_BYTES] = {0};
    CU_ASSERT_PTR_NULL(kvt_uuid_parse("GPU-00112233-4455-6677-8899-aabbccddeeFF", u));
    CU_ASSERT_EQUAL(u[0], 0x00);
    CU_ASSERT_EQUAL(u[1], 0x11);
    CU_ASSERT_EQUAL(u[15], 0xff);
    CU_ASSERT_PTR_NOT_NULL(kvt_uuid_parse("00112233", u));
    CU_ASSERT_PTR_NOT_NULL(kvt_uuid_parse("00112233445566778899aabbccddeeff0", u));
    CU_ASSERT_PTR_NOT_NULL(kvt_uuid_parse("g0112233445566778899aabbccddeeff", u));
    CU_ASSERT_EQUAL(u[1], 0x11);
}

/* The table itself: no name twice, defaults that their own entries accept, prose. */
static void test_table(void) {
    struct kvt_config scratch;
    struct kvt_config_device device;
    for (uint32_t i = 0; i < kvt_option_count; i++) {
        const struct kvt_option *o = &kvt_options[i];
        void *base = o->section == KVT_SECTION_DEVICE ? (void *)&device : (void *)&scratch;
        CU_ASSERT_PTR_NULL(kvt_option_store(o, base, o->value));
        CU_ASSERT(strlen(o->prose) > 20);
        CU_ASSERT(o->prose[strlen(o->prose) - 1] == '.');
        CU_ASSERT((o->type == KVT_OPTION_CHOICE) == (o->choices != NULL));
        for (uint32_t j = 0; j < i; j++) {
            CU_ASSERT(o->section != kvt_options[j].section ||
                      strcmp(o->name, kvt_options[j].name) != 0);
            CU_ASSERT(o->section != kvt_options[j].section || o->offset != kvt_options[j].offset);
        }
    }
}

/* Both ends of every numeric range are accepted, one more or less is not. */
static void test_ranges(void) {
    for (uint32_t i = 0; i < kvt_option_count; i++) {
        const struct kvt_option *o = &kvt_options[i];
        struct kvt_config scratch;
        struct kvt_config_device device;
        void *base = o->section == KVT_SECTION_DEVICE ? (void *)&device : (void *)&scratch;
        const char *unit = o->type == KVT_OPTION_SIZE || o->type == KVT_OPTION_SIZE_AUTO     ? "B"
                           : o->type == KVT_OPTION_DURATION                                  ? "us"
                           : o->type == KVT_OPTION_COUNT || o->type == KVT_OPTION_COUNT_AUTO ? ""
                                                                                             : NULL;
        if (unit == NULL) {
            continue;
        }
        char value[64];
        (void)snprintf(value, sizeof(value), "%llu%s", (unsigned long long)o->min, unit);
        CU_ASSERT_PTR_NULL(kvt_option_store(o, base, value));
        (void)snprintf(value, sizeof(value), "%llu%s", (unsigned long long)o->max, unit);
        CU_ASSERT_PTR_NULL(kvt_option_store(o, base, value));
        (void)snprintf(value, sizeof(value), "%llu%s", (unsigned long long)o->max + 1, unit);
        CU_ASSERT_PTR_NOT_NULL(kvt_option_store(o, base, value));
        if (o->min > 0) {
            (void)snprintf(value, sizeof(value), "%llu%s", (unsigned long long)o->min - 1, unit);
            CU_ASSERT_PTR_NOT_NULL(kvt_option_store(o, base, value));
        }
    }
}

static void test_defaults(void) {
    CU_ASSERT_EQUAL(parse(""), 0);
    CU_ASSERT_STRING_EQUAL(config.runtime_dir, "/run/kvtierd");
    CU_ASSERT_EQUAL(config.block_tokens, 256);
    CU_ASSERT_EQUAL(config.idle_after_us, 5000000);
    CU_ASSERT_EQUAL(config.device_count, 1);
    CU_ASSERT_EQUAL(config.host_touch_threads, 0);
    CU_ASSERT_EQUAL(config.host_preallocate_bytes, 0);
    CU_ASSERT_EQUAL(parse("[host]\npreallocate = none\n"), 0);
    CU_ASSERT_EQUAL(config.host_preallocate_bytes, KVT_SIZE_NONE);
    CU_ASSERT_EQUAL(parse("[host]\npreallocate = 1GiB\n"), 0);
    CU_ASSERT_EQUAL(config.host_preallocate_bytes, UINT64_C(1) << 30);
    CU_ASSERT_EQUAL(parse(""), 0);
    CU_ASSERT_STRING_EQUAL(config.devices[0].name, "cpu0");
    CU_ASSERT_STRING_EQUAL(kvt_config_driver_name(&config.devices[0]), "cpu");
    CU_ASSERT_EQUAL(config.devices[0].extent_bytes, UINT64_C(16) << 20);
    CU_ASSERT_EQUAL(config.devices[0].piece_bytes, UINT64_C(16) << 20);
}

/* What --print-config prints is the default configuration, and mentions every option. */
static void test_print(void) {
    char *printed = NULL;
    size_t size = 0;
    FILE *stream = open_memstream(&printed, &size);
    CU_ASSERT_PTR_NOT_NULL_FATAL(stream);
    kvt_config_print(stream);
    (void)fclose(stream);
    CU_ASSERT_EQUAL(parse(""), 0);
    struct kvt_config defaults = config;
    CU_ASSERT_EQUAL(parse(printed), 0);
    CU_ASSERT_STRING_EQUAL(text, "");
    CU_ASSERT_EQUAL(memcmp(&defaults, &config, sizeof(config)), 0);
    for (uint32_t i = 0; i < kvt_option_count; i++) {
        char line[KVT_CONFIG_TEXT_BYTES];
        (void)snprintf(line, sizeof(line), "\n%s =", kvt_options[i].name);
        CU_ASSERT_PTR_NOT_NULL(strstr(printed, line));
    }
    free(printed);
}

static void test_file(void) {
    CU_ASSERT_EQUAL(parse("# a comment\n"
                          "[daemon]\n"
                          "  log_level=debug   # why\n"
                          "sessions_max = 4096\r\n"
                          "\n"
                          "[ host ]\n"
                          "budget = 1.5GiB\n"
                          "; another comment\n"
                          "[device gpu-0]\n"
                          "driver = cuda\n"
                          "uuid = GPU-00112233-4455-6677-8899-aabbccddeeff\n"
                          "budget = 64 GiB\n"
                          "[device cpu_1]\n"
                          "budget = 1MiB"),
                    0);
    CU_ASSERT_STRING_EQUAL(text, "");
    CU_ASSERT_EQUAL(config.log_level, 3);
    CU_ASSERT_EQUAL(config.sessions_max, 4096);
    CU_ASSERT_EQUAL(config.host_budget_bytes, UINT64_C(3) << 29);
    CU_ASSERT_EQUAL(config.device_count, 2);
    CU_ASSERT_STRING_EQUAL(config.devices[0].name, "gpu-0");
    CU_ASSERT_STRING_EQUAL(kvt_config_driver_name(&config.devices[0]), "cuda");
    CU_ASSERT_EQUAL(config.devices[0].uuid[15], 0xff);
    CU_ASSERT_EQUAL(config.devices[0].extent_bytes, UINT64_C(32) << 20);
    CU_ASSERT_EQUAL(config.devices[1].budget_bytes, UINT64_C(1) << 20);
    CU_ASSERT_EQUAL(config.devices[1].extent_bytes, UINT64_C(64) << 10);
}

static void test_errors(void) {
    refused("[host]\nbudget = 16\n",
            "f.conf:2: [host] budget = 16: the value has no unit; accepted: 64KiB to 64TiB, with a "
            "unit: B, KiB, MiB, GiB, TiB");
    refused("[device gpu0]\n\nbudget = 12GB\n",
            "f.conf:3: [device gpu0] budget = 12GB: the value has an unknown unit; accepted: 64KiB "
            "to 64TiB, with a unit: B, KiB, MiB, GiB, TiB");
    refused("[daemon]\nidle_after = 1ms\n",
            "f.conf:2: [daemon] idle_after = 1ms: the value is outside the accepted range; "
            "accepted: 10ms to 24h, with a unit: us, ms, s, min, h");
    refused("[daemon]\nblock_tokens = 300\n",
            "f.conf:2: [daemon] block_tokens = 300: the value is not a power of 2; accepted: 256 "
            "to 4096, a power of 2");
    refused("[daemon]\nlog_level = loud\n",
            "f.conf:2: [daemon] log_level = loud: the value is not one of the choices; accepted: "
            "error, warning, info, debug");
    refused("[daemon]\nruntime_dir = run\n",
            "f.conf:2: [daemon] runtime_dir = run: the value is not an absolute path; accepted: "
            "an absolute path of at most 255 bytes");
    refused("[host]\nbudgets = 1GiB\n",
            "f.conf:2: [host] budgets: unknown option; accepted: budget, worker_max, "
            "preallocate, chunk, touch_threads");
    refused("[hosts]\n", "f.conf:1: [hosts]: unknown section; accepted: [daemon], [host], [device "
                         "NAME]");
    refused("[host]\nbudget = 1GiB\nbudget = 2GiB\n",
            "f.conf:3: [host] budget: given twice, first in line 2");
    refused("[host]\n[daemon]\n[host]\n", "f.conf:3: [host]: given twice, first in line 1");
    refused("[device a]\n[device a]\n", "f.conf:2: [device a]: given twice, first in line 1");
    refused("[device a b]\n", "f.conf:1: the device name \"a b\" is not usable; accepted: 1 to 31 "
                              "letters, digits, - and _");
    refused("budget = 1GiB\n", "f.conf:1: \"budget = 1GiB\" stands before the first [section]");
    refused("[host]\nbudget\n",
            "f.conf:2: \"budget\" is neither \"[section]\" nor \"option = value\"");
    refused("[host\n", "f.conf:1: \"[host\" has no closing bracket");
    refused("[host]\nchunk = 100KiB\n", "f.conf:2: [host] chunk = 100KiB: not a multiple of 64KiB");
    refused("[host]\nchunk = 2MiB\nbudget = 1MiB\n",
            "f.conf:2: [host] chunk = 2MiB: larger than the budget of 1MiB");
    refused("[host]\npreallocate = 2GiB\n",
            "f.conf:2: [host] preallocate = 2GiB: larger than the budget of 1GiB");
    refused("[host]\npreallocate = all\n",
            "f.conf:2: [host] preallocate = all: the value does not begin with a number; accepted: "
            "auto, "
            "none, or 64KiB to 64TiB, with a unit: B, KiB, MiB, GiB, TiB");
    refused("[host]\nworker_max = 2GiB\n",
            "f.conf:2: [host] worker_max = 2GiB: larger than the budget of 1GiB");
    refused("[device a]\nworker_max = 2MiB\nbudget = 1MiB\n",
            "f.conf:2: [device a] worker_max = 2MiB: larger than the budget of 1MiB");
    refused("[device a]\npiece_size = 2MiB\nbudget = 1MiB\n",
            "f.conf:2: [device a] piece_size = 2MiB: larger than the budget of 1MiB");
    refused("[device a]\nextent_size = 2MiB\nbudget = 1MiB\n",
            "f.conf:2: [device a] extent_size = 2MiB: larger than the budget of 1MiB");
}

static void test_odd_bytes(void) {
    static const char zero[] = "[host]\nbud\0get = 1GiB\n";
    CU_ASSERT_EQUAL(kvt_config_parse(zero, sizeof(zero) - 1, "f.conf", NULL, 0, &config, text),
                    -KVT_ECONFIG);
    CU_ASSERT_STRING_EQUAL(text, "f.conf:2: the line holds a zero byte: this is not a text file");
    char line[2000];
    memset(line, 'x', sizeof(line));
    CU_ASSERT_EQUAL(kvt_config_parse(line, sizeof(line), "f.conf", NULL, 0, &config, text),
                    -KVT_ECONFIG);
    CU_ASSERT_STRING_EQUAL(text, "f.conf:1: the line has 2000 bytes; at most 1024 are accepted");
    char many[4096] = "";
    for (int i = 0; i <= KVT_DEVICES_MAX; i++) {
        (void)snprintf(many + strlen(many), sizeof(many) - strlen(many), "[device d%d]\n", i);
    }
    CU_ASSERT_EQUAL(parse(many), -KVT_ECONFIG);
    CU_ASSERT_STRING_EQUAL(text, "f.conf:17: [device d16]: there are 16 devices already, the most "
                                 "that are accepted");
}

/* Nothing of a file applies if a part of it is wrong. */
static void test_all_or_nothing(void) {
    memset(&config, 0x5a, sizeof(config));
    struct kvt_config before = config;
    CU_ASSERT_EQUAL(parse("[host]\nbudget = 2GiB\nchunk = 1\n"), -KVT_ECONFIG);
    CU_ASSERT_EQUAL(memcmp(&before, &config, sizeof(config)), 0);
}

/* The default chunk is no mistake of who gives a small budget. */
static void test_small_budget(void) {
    CU_ASSERT_EQUAL(set("host.budget=1MiB"), 0);
    CU_ASSERT_EQUAL(config.host_chunk_bytes, UINT64_C(1) << 20);
    CU_ASSERT_EQUAL(set("host.budget=100KiB"), 0);
    CU_ASSERT_EQUAL(config.host_chunk_bytes, UINT64_C(64) << 10);
    const char *const sets[] = {"host.chunk=2MiB", "host.budget=1MiB"};
    CU_ASSERT_EQUAL(kvt_config_parse("", 0, "f.conf", sets, 2, &config, text), -KVT_ECONFIG);
    CU_ASSERT_STRING_EQUAL(text, "--set host.chunk=2MiB: [host] chunk = 2MiB: larger than the "
                                 "budget of 1MiB");
}

static void test_sets(void) {
    CU_ASSERT_EQUAL(set("host.budget=2GiB"), 0);
    CU_ASSERT_EQUAL(config.host_budget_bytes, UINT64_C(2) << 30);
    CU_ASSERT_EQUAL(set(" device.x.budget = 2MiB "), 0);
    CU_ASSERT_EQUAL(config.device_count, 1);
    CU_ASSERT_STRING_EQUAL(config.devices[0].name, "x");
    CU_ASSERT_EQUAL(config.devices[0].budget_bytes, UINT64_C(2) << 20);
    const char *several[] = {"host.budget=1GiB", "device.a.budget=1MiB", "host.budget=3GiB",
                             "device.b.budget=2MiB"};
    static const char file[] = "[host]\nbudget=2GiB\n[device a]\nbudget=9MiB\n";
    CU_ASSERT_EQUAL(kvt_config_parse(file, strlen(file), "f", several, 4, &config, text), 0);
    CU_ASSERT_EQUAL(config.host_budget_bytes, UINT64_C(3) << 30);
    CU_ASSERT_EQUAL(config.device_count, 2);
    CU_ASSERT_EQUAL(config.devices[0].budget_bytes, UINT64_C(1) << 20);
    CU_ASSERT_EQUAL(set("host.budget"), -KVT_ECONFIG);
    CU_ASSERT_EQUAL(set("budget=1"), -KVT_ECONFIG);
    CU_ASSERT_EQUAL(set("device.budget=1MiB"), -KVT_ECONFIG);
    CU_ASSERT_EQUAL(set("disk.budget=1MiB"), -KVT_ECONFIG);
    CU_ASSERT_STRING_EQUAL(text, "--set disk.budget=1MiB: unknown section; accepted: daemon, "
                                 "host, device.NAME");
    CU_ASSERT_EQUAL(set("host.budget=5"), -KVT_ECONFIG);
    CU_ASSERT_STRING_EQUAL(text, "--set host.budget=5: [host] budget = 5: the value has no unit; "
                                 "accepted: 64KiB to 64TiB, with a unit: B, KiB, MiB, GiB, TiB");
}

static void test_load(void) {
    struct kvt_config_source source = {.file = "/nonexistent/kvtierd.conf"};
    CU_ASSERT_EQUAL(kvt_config_load(&source, &config, text), -KVT_ECONFIG);
    CU_ASSERT_STRING_EQUAL(
        text, "/nonexistent/kvtierd.conf: cannot be opened: No such file or directory");
    source.file = "/";
    CU_ASSERT_EQUAL(kvt_config_load(&source, &config, text), -KVT_ECONFIG);
    source.file = "/dev/zero";
    CU_ASSERT_EQUAL(kvt_config_load(&source, &config, text), -KVT_ECONFIG);
    CU_ASSERT_STRING_EQUAL(text, "/dev/zero: larger than 1 MiB");
}

/* The manual page, with roff's marks taken away, in one line. */
static char *read_page(const char *name) {
    const char *source = getenv("KVT_SOURCE");
    char path[512];
    (void)snprintf(path, sizeof(path), "%s/man/%s", source != NULL ? source : ".", name);
    FILE *stream = fopen(path, "re");
    if (stream == NULL) {
        return NULL;
    }
    char *page = calloc(1, 1 << 18);
    size_t size = page == NULL ? 0 : fread(page, 1, (1 << 18) - 1, stream);
    size_t used = 0;
    for (size_t i = 0; i < size; i++) {
        if (page[i] != '\\') {
            page[used++] = (char)(page[i] == '\n' ? ' ' : page[i]);
        }
    }
    if (page != NULL) {
        page[used] = '\0';
    }
    (void)fclose(stream);
    return page;
}

/* Every option has its entry: name, default, what is accepted, prose. */
static void test_manual(void) {
    char *page = read_page("kvtierd.conf.5");
    CU_ASSERT_PTR_NOT_NULL_FATAL(page);
    for (uint32_t i = 0; i < kvt_option_count; i++) {
        const struct kvt_option *o = &kvt_options[i];
        char accepted[KVT_CONFIG_TEXT_BYTES];
        char wanted[2048];
        (void)snprintf(wanted, sizeof(wanted), ".BR %s \" = %s\" %s Accepted: %s.", o->name,
                       o->value, o->prose, kvt_option_accepted(o, accepted, sizeof(accepted)));
        bool found = strstr(page, wanted) != NULL;
        CU_ASSERT(found);
        if (!found) {
            printf("\n    man/kvtierd.conf.5 lacks: %s\n", wanted);
        }
    }
    free(page);
}

int main(void) {
    CU_TestInfo tests[] = {
        {"units", test_units},
        {"texts of units", test_unit_texts},
        {"identities", test_uuid},
        {"the table's entries are whole", test_table},
        {"ranges hold at both ends", test_ranges},
        {"defaults", test_defaults},
        {"what is printed is the default", test_print},
        {"a file", test_file},
        {"errors say what, where and what is accepted", test_errors},
        {"bytes that are no text", test_odd_bytes},
        {"all or nothing", test_all_or_nothing},
        {"--set", test_sets},
        {"a small budget", test_small_budget},
        {"files that cannot be read", test_load},
        {"the manual has every option", test_manual},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("config", tests);
}
