/* See report.h. */
#include "client/worker/report.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/output.h"
#include "client/worker/fail.h"
#include "client/worker/pretokenize.h"
#include "kernels/cpu_ops.h"
#include "proto/errors.h"

#define BAR_CELLS 30

static void write_token(const struct kvt_report *r, uint32_t id) {
    size_t size;
    if (!r->tokenizer) {
        printf("%" PRIu32 " ", id);
        return;
    }
    const char *bytes = kvt_tokenizer_bytes(r->tokenizer, id, &size);
    fwrite(bytes, 1, size, stdout);
}

/* Keeps the first reason. */
static int output_failed(struct kvt_report *r, const char *what, const char *why) {
    return r->why[0]
               ? -KVT_EIO
               : kvt_fail(-KVT_EIO, r->why, sizeof(r->why), "%s cannot be written: %s", what, why);
}

static int logits_failed(struct kvt_report *r) {
    const char *why = strerror(errno);
    char what[256];
    snprintf(what, sizeof(what), "--dump-logits %s:", r->options->dump_logits);
    return output_failed(r, what, why);
}

static int write_out(struct kvt_report *r) {
    const char *why = kvt_output_failed();
    return why ? output_failed(r, "the output", why) : 0;
}

static int on_token(void *arg, uint32_t row, uint32_t id) {
    struct kvt_report *r = arg;
    (void)row;
    if (!r->streams || r->skipped < r->shown) {
        r->skipped++;
        return 0;
    }
    if (r->bar_shown) { /* on a terminal the text takes the bar's place */
        fputs("\r\033[K", stderr);
        r->bar_shown = false;
    }
    write_token(r, id);
    r->text_open = true;
    r->shown++;
    r->skipped++;
    return write_out(r);
}

static void on_progress(void *arg, bool decode, uint64_t tokens, uint64_t of, double seconds) {
    struct kvt_report *r = arg;
    char bar[BAR_CELLS + 1];
    uint64_t full = of > 0 ? tokens * BAR_CELLS / of : 0;
    if (!r->shows_progress || (r->text_open && isatty(STDOUT_FILENO)))
        return; /* the text itself shows that it goes on */
    for (uint64_t i = 0; i < BAR_CELLS; i++)
        bar[i] = i < full ? '#' : '.';
    bar[BAR_CELLS] = 0;
    fprintf(stderr, "\r%s [%s] %" PRIu64 "/%" PRIu64 " tokens, %.1f tokens/s\033[K",
            decode ? "generate" : "prompt  ", bar, tokens, of,
            seconds > 0 ? (double)tokens / seconds : 0.0);
    r->bar_shown = true;
}

static int on_logits(void *arg, const float *logits, uint32_t count) {
    struct kvt_report *r = arg;
    errno = EIO;
    return fwrite(logits, sizeof(*logits), count, r->logits) == count ? 0 : logits_failed(r);
}

int kvt_report_open(struct kvt_report *r, const struct kvt_options *options,
                    const struct kvt_tokenizer *tokenizer, uint32_t row_count, char *err,
                    size_t err_size) {
    const char *when = options->progress;
    *r = (struct kvt_report){.options = options, .tokenizer = tokenizer, .row_count = row_count};
    r->streams = row_count == 1 && !options->json;
    r->shows_progress =
        strcmp(when, "always") == 0 || (strcmp(when, "auto") == 0 && isatty(STDERR_FILENO));
    if (!options->dump_logits)
        return 0;
    r->logits = fopen(options->dump_logits, "wb");
    if (!r->logits)
        return kvt_fail(-KVT_ESYS, err, err_size, "--dump-logits %s: cannot be written: %s",
                        options->dump_logits, strerror(errno));
    return 0;
}

int kvt_report_close(struct kvt_report *r) {
    int rc = write_out(r);
    if (r->logits && fclose(r->logits))
        rc = logits_failed(r);
    r->logits = NULL;
    return r->why[0] ? -KVT_EIO : rc;
}

void kvt_report_start_over(struct kvt_report *r) {
    r->skipped = 0;
    if (r->logits)
        rewind(r->logits);
}

struct kvt_generate_watch kvt_report_watch(struct kvt_report *r) {
    return (struct kvt_generate_watch){r, on_token, on_progress, r->logits ? on_logits : NULL};
}

/* ------------------------------------------------------------------ the end */

/* A row's text as the inside of a JSON string; what is not UTF-8 becomes U+FFFD. */
static void json_text(const char *text, size_t size) {
    for (size_t i = 0; i < size;) {
        unsigned char c = (unsigned char)text[i];
        size_t length = kvt_utf8_length(text + i, size - i);
        if (length == 1 && c >= 0x80)
            fputs("\\ufffd", stdout);
        else if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c < 0x20)
            printf("\\u%04x", c);
        else
            fwrite(text + i, 1, length, stdout);
        i += length;
    }
}

static void json_row(const struct kvt_report *r, const struct kvt_ids *ids) {
    printf("{\"ids\": [");
    for (size_t i = 0; i < ids->count; i++)
        printf(i ? ", %" PRIu32 : "%" PRIu32, ids->ids[i]);
    printf("]");
    if (r->tokenizer) {
        char *text = NULL; /* gathered first: a character may lie in two tokens */
        size_t text_size = 0;
        FILE *stream = open_memstream(&text, &text_size);
        for (size_t i = 0; stream && i < ids->count; i++) {
            size_t size;
            const char *bytes = kvt_tokenizer_bytes(r->tokenizer, ids->ids[i], &size);
            fwrite(bytes, 1, size, stream);
        }
        if (stream)
            fclose(stream);
        printf(", \"text\": \"");
        json_text(text ? text : "", text ? text_size : 0);
        printf("\"");
        free(text);
    }
    printf("}");
}

static double rate(uint64_t tokens, double seconds) {
    return seconds > 0 ? (double)tokens / seconds : 0;
}

static void finish_json(struct kvt_report *r, const struct kvt_generate *g, uint32_t threads) {
    char kv[4096] = "";
    g->kv->ops->describe(g->kv, kv, sizeof(kv));
    printf("{\"prompt_tokens\": %" PRIu64 ", \"prompt_seconds\": %.6f, \"prompt_tokens_per_s\": "
           "%.2f,\n \"decode_tokens\": %" PRIu64 ", \"decode_seconds\": %.6f, "
           "\"decode_tokens_per_s\": %.2f,\n \"threads\": %" PRIu32 ", \"path\": \"%s\"%s%s,\n"
           " \"rows\": [",
           g->prompt_tokens, g->prompt_seconds, rate(g->prompt_tokens, g->prompt_seconds),
           g->decode_tokens, g->decode_seconds, rate(g->decode_tokens, g->decode_seconds), threads,
           kvt_cpu_ops()->name, kv[0] ? ", " : "", kv);
    for (uint32_t row = 0; g->rows && row < r->row_count; row++) {
        fputs(row ? ",\n  " : "\n  ", stdout);
        json_row(r, &g->rows[row]);
    }
    printf("]}\n");
}

void kvt_report_finish(struct kvt_report *r, const struct kvt_generate *g, uint32_t threads) {
    if (r->bar_shown)
        fputs("\r\033[K", stderr);
    if (r->options->json) {
        finish_json(r, g, threads);
    } else if (r->streams) {
        putchar('\n');
    } else {
        for (uint32_t row = 0; g->rows && row < r->row_count; row++) {
            printf("%s[row %" PRIu32 "] ", row ? "\n" : "", row);
            for (size_t i = 0; i < g->rows[row].count; i++)
                write_token(r, g->rows[row].ids[i]);
            putchar('\n');
        }
    }
    (void)write_out(r); /* kvt_report_close tells */
    if (r->shows_progress)
        fprintf(stderr,
                "prompt %" PRIu64 " tokens in %.2f s (%.1f tokens/s), generated %" PRIu64
                " in %.2f s (%.1f tokens/s), %" PRIu32 " threads\n",
                g->prompt_tokens, g->prompt_seconds, rate(g->prompt_tokens, g->prompt_seconds),
                g->decode_tokens, g->decode_seconds, rate(g->decode_tokens, g->decode_seconds),
                threads);
}
