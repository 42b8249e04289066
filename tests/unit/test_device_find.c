/* Finding drivers: the embedded one, a plug-in that is built here, and what is said when it is
 * missing, broken, or of another version. */
#include "proto/errors.h"
#include "tests/support/cunit_run.h"
#include "tiers/device/device.h"

#include <CUnit/Basic.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static char folder[256];
static char text[KVT_TEXT_BYTES];
static const struct kvt_driver_ops *found;

static void write_file(const char *name, const char *content) {
    char path[512];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *f = fopen(path, "w");
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    fputs(content, f);
    fclose(f);
}

/* Builds kvtier-<name>.so from a source that includes device.h. */
static void build(const char *name, const char *source) {
    const char *root = getenv("KVT_SOURCE");
    char include[512];
    char from[512];
    char to[512];
    snprintf(include, sizeof(include), "-I%s", root ? root : ".");
    snprintf(from, sizeof(from), "%s/%s.c", folder, name);
    snprintf(to, sizeof(to), "%s/kvtier-%s.so", folder, name);
    snprintf(text, sizeof(text), "%s.c", name);
    write_file(text, source);
    const char *arguments[] = {"cc", "-std=gnu11", "-shared", "-fPIC", include,
                               "-o", to,           from,      NULL};
    pid_t pid;
    int status = -1;
    CU_ASSERT_EQUAL_FATAL(posix_spawnp(&pid, "cc", NULL, NULL, (char *const *)arguments, environ),
                          0);
    CU_ASSERT_EQUAL(waitpid(pid, &status, 0), pid);
    CU_ASSERT_EQUAL_FATAL(status, 0);
}

static const char whole[] =
    "#include \"tiers/device/device.h\"\n"
    "static int open_(const struct kvt_driver_config *c, struct kvt_driver **o,\n"
    "                 struct kvt_driver_info *i, char *t) { return -42; }\n"
    "static struct kvt_driver_ops ops = {.abi = ABI, .name = NAME, .open = open_,\n"
    " .close = (void *)1, .extent_create = (void *)1, .extent_destroy = (void *)1,\n"
    " .host_added = (void *)1, .host_removed = (void *)1, .page_added = (void *)1,\n"
    " .page_removed = (void *)1, .copy = (void *)1, .post = (void *)1, .poll = (void *)1,\n"
    " .wait = (void *)1, .wake = WAKE};\n"
    "const struct kvt_driver_ops *kvt_driver_ops_get(void) { return &ops; }\n";

static void build_with(const char *name, const char *abi, const char *said, const char *wake) {
    char source[2048];
    snprintf(source, sizeof(source), "#define ABI %s\n#define NAME \"%s\"\n#define WAKE %s\n%s",
             abi, said, wake, whole);
    build(name, source);
}

static void expect_refusal(const char *name, const char *part) {
    found = NULL;
    text[0] = '\0';
    CU_ASSERT_EQUAL(kvt_driver_find(name, folder, &found, text), -KVT_ENOTSUP);
    CU_ASSERT_PTR_NULL(found);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "device driver "));
    CU_ASSERT_PTR_NOT_NULL(strstr(text, name));
    if (!strstr(text, part)) {
        printf("\n    \"%s\" does not say \"%s\"\n", text, part);
        CU_FAIL("the text lacks a part");
    }
}

static void test_cpu_is_built_in(void) {
    CU_ASSERT_EQUAL(kvt_driver_find("cpu", NULL, &found, text), 0);
    CU_ASSERT_PTR_EQUAL(found, &kvt_cpu_driver_ops);
}

static void test_missing(void) {
    expect_refusal("cuda", "kvtier-cuda.so is not there");
    expect_refusal("cuda", folder);
    CU_ASSERT_EQUAL(kvt_driver_find("cuda", NULL, &found, text), -KVT_ENOTSUP);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "plugin_dir is not set"));
    CU_ASSERT_EQUAL(kvt_driver_find("cuda", "", &found, text), -KVT_ENOTSUP);
}

static void test_names_that_are_none(void) {
    expect_refusal("../cuda", "a name has letters");
    expect_refusal("", "a name has letters");
}

static void test_plugin(void) {
    build_with("good", "KVT_DRIVER_ABI", "good", "(void *)1");
    CU_ASSERT_EQUAL_FATAL(kvt_driver_find("good", folder, &found, text), 0);
    CU_ASSERT_STRING_EQUAL(found->name, "good");
    CU_ASSERT_EQUAL(found->open(NULL, NULL, NULL, NULL), -42);
}

static void test_bad_plugins(void) {
    write_file("kvtier-text.so", "this is no library\n");
    expect_refusal("text", "cannot be loaded");
    build("bare", "int nothing_that_we_know;\n");
    expect_refusal("bare", "no driver plug-in");
    build_with("old", "KVT_DRIVER_ABI + 6", "old", "(void *)1");
    expect_refusal("old", "driver interface 10, this daemon has 4");
    build_with("other", "KVT_DRIVER_ABI", "another", "(void *)1");
    expect_refusal("other", "not that driver");
    build_with("part", "KVT_DRIVER_ABI", "part", "0");
    expect_refusal("part", "lacks a function");
}

int main(void) {
    const char *base = getenv("KVT_TEST_DIR");
    snprintf(folder, sizeof(folder), "%s/plugins.XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(folder)) {
        return 1;
    }
    CU_TestInfo tests[] = {
        {"cpu is built in", test_cpu_is_built_in},
        {"missing", test_missing},
        {"names that are none", test_names_that_are_none},
        {"plug-in", test_plugin},
        {"bad plug-ins", test_bad_plugins},
        CU_TEST_INFO_NULL,
    };
    return kvt_cunit_run("device find", tests);
}
