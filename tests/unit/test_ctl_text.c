/* kvtierctl's text: sizes, bars, tables, JSON, and names that try to speak to the terminal. */
#include "client/ctl/text.h"
#include "tests/support/cunit_run.h"

#include <locale.h>
#include <stdlib.h>
#include <string.h>

static char out[256];

static void test_sizes(void) {
    CU_ASSERT_STRING_EQUAL(kvt_ctl_size(0, out), "0 B");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_size(1023, out), "1023 B");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_size(1024, out), "1.0 KiB");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_size(1536, out), "1.5 KiB");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_size(1048575, out), "1.0 MiB"); /* not 1024.0 KiB */
    CU_ASSERT_STRING_EQUAL(kvt_ctl_size(UINT64_C(17180000000), out), "16.0 GiB");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_size(UINT64_MAX, out), "16384.0 PiB");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_count(0, out), "0");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_count(999, out), "999");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_count(1000, out), "1,000");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_count(UINT64_MAX, out), "18,446,744,073,709,551,615");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_duration(999, out), "999 ms");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_duration(119999, out), "119 s");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_duration(120000, out), "2 min");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_duration(9000000, out), "2.5 h");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_time(0, out), "0 ns");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_time(999, out), "999 ns");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_time(2314, out), "2.31 us");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_time(9996, out), "10.0 us"); /* not 10.00 */
    CU_ASSERT_STRING_EQUAL(kvt_ctl_time(70340000, out), "70.3 ms");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_time(999600000, out), "1.00 s"); /* not 1000 ms */
    CU_ASSERT_STRING_EQUAL(kvt_ctl_time(UINT64_C(120000000000), out), "120 s");
}

static void test_parse(void) {
    uint64_t bytes = 1;
    CU_ASSERT(kvt_ctl_size_parse("1.5GiB", &bytes) && bytes == 1610612736);
    CU_ASSERT(kvt_ctl_size_parse("64 MiB", &bytes) && bytes == 67108864);
    CU_ASSERT(kvt_ctl_size_parse("1000", &bytes) && bytes == 1000);
    bytes = 7;
    CU_ASSERT_FALSE(kvt_ctl_size_parse("", &bytes));
    CU_ASSERT_FALSE(kvt_ctl_size_parse("-1", &bytes));
    CU_ASSERT_FALSE(kvt_ctl_size_parse("1GB", &bytes)); /* powers of ten are another unit */
    CU_ASSERT_FALSE(kvt_ctl_size_parse("1e30", &bytes));
    CU_ASSERT_FALSE(kvt_ctl_size_parse("nan", &bytes));
    CU_ASSERT_EQUAL(bytes, 7);
}

static void test_clean(void) {
    CU_ASSERT_STRING_EQUAL(kvt_ctl_clean("llama", out, sizeof out), "llama");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_clean("a\033[2Jb\n", out, sizeof out), "a?[2Jb?");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_clean("\xc3\xa9\xe2\x96\x88", out, sizeof out),
                           "\xc3\xa9\xe2\x96\x88");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_clean("\xff\xc3", out, sizeof out), "??");
    CU_ASSERT_STRING_EQUAL(kvt_ctl_clean("\xc0\x80", out, sizeof out), "??");      /* overlong */
    CU_ASSERT_STRING_EQUAL(kvt_ctl_clean("\xed\xa0\x80", out, sizeof out), "???"); /* surrogate */
    CU_ASSERT_STRING_EQUAL(kvt_ctl_clean("\xc2\x9b"
                                         "1m",
                                         out, sizeof out),
                           "??1m");                                      /* C1 */
    CU_ASSERT_STRING_EQUAL(kvt_ctl_clean("abc\xc3\xa9", out, 5), "abc"); /* not half of one */
    CU_ASSERT_STRING_EQUAL(kvt_ctl_clean("abcdef", out, 4), "abc");
}

static void test_bars(void) {
    char *bar = kvt_ctl_layers_bar((const uint8_t *)"RSIx", 4);
    CU_ASSERT_STRING_EQUAL(bar, kvt_ctl_has_blocks() ? "\xe2\x96\x88\xe2\x96\x91.?" : "#-.?");
    free(bar);
    (void)setlocale(LC_CTYPE, "C");
    bar = kvt_ctl_layers_bar((const uint8_t *)"RRSI", 4);
    CU_ASSERT_STRING_EQUAL(bar, "##-.");
    free(bar);
    bar = kvt_ctl_fill_bar(50, 100, 4);
    CU_ASSERT_STRING_EQUAL(bar, "##--");
    free(bar);
    bar = kvt_ctl_fill_bar(500, 100, 4);
    CU_ASSERT_STRING_EQUAL(bar, "####");
    free(bar);
    bar = kvt_ctl_fill_bar(0, 0, 4);
    CU_ASSERT_STRING_EQUAL(bar, "----");
    free(bar);
}

/* What the calls in `write` print. */
static char *printed(void (*write)(FILE *)) {
    char *text = NULL;
    size_t size = 0;
    FILE *stream = open_memstream(&text, &size);
    write(stream);
    (void)fclose(stream);
    return text;
}

static void write_table(FILE *stream) {
    struct kvt_ctl_table t = {.headers = {">N", "NAME", "LAST"}};
    kvt_ctl_cellf(&t, "%d", 5);
    kvt_ctl_cell(&t, "\xc3\xa9\xc3\xa9"); /* two columns, four bytes */
    kvt_ctl_cell(&t, "x");
    kvt_ctl_cellf(&t, "%d", 1234);
    kvt_ctl_cell(&t, "a");
    kvt_ctl_cell(&t, "longer");
    kvt_ctl_table_print(&t, stream);
}

static void test_table(void) {
    char *text = printed(write_table);
    CU_ASSERT_STRING_EQUAL(text, "   N  NAME  LAST\n"
                                 "   5  \xc3\xa9\xc3\xa9    x\n"
                                 "1234  a     longer\n");
    free(text);
}

static void write_json(FILE *stream) {
    struct kvt_ctl_json j = {.out = stream};
    kvt_ctl_json_begin(&j, NULL, '{');
    kvt_ctl_json_string(&j, "name", "a\"b\\c\n\xff\xc3\xa9");
    kvt_ctl_json_string(&j, "none", NULL);
    kvt_ctl_json_number(&j, "big", UINT64_MAX);
    kvt_ctl_json_begin(&j, "list", '[');
    kvt_ctl_json_number(&j, NULL, 1);
    kvt_ctl_json_begin(&j, NULL, '{');
    kvt_ctl_json_end(&j, '}');
    kvt_ctl_json_end(&j, ']');
    kvt_ctl_json_real(&j, "real", 0.5);
    kvt_ctl_json_real(&j, "nan", 0.0 / 0.0);
    kvt_ctl_json_end(&j, '}');
}

static void test_json(void) {
    char *text = printed(write_json);
    CU_ASSERT_STRING_EQUAL(text,
                           "{\"name\": \"a\\\"b\\\\c\\u000a\\ufffd\xc3\xa9\", \"none\": \"\", "
                           "\"big\": 18446744073709551615, \"list\": [1, {}], "
                           "\"real\": 0.5, \"nan\": null}");
    free(text);
}

int main(void) {
    CU_TestInfo tests[] = {{"sizes", test_sizes}, {"parse", test_parse}, {"clean", test_clean},
                           {"bars", test_bars},   {"table", test_table}, {"JSON", test_json},
                           CU_TEST_INFO_NULL};
    return kvt_cunit_run("kvtierctl text", tests);
}
