/* What kvtier-run shows: text on stdout, progress on stderr, or one JSON object. */
#ifndef KVT_WORKER_REPORT_H
#define KVT_WORKER_REPORT_H

#include <stdbool.h>
#include <stdio.h>

#include "client/worker/generate.h"
#include "client/worker/options.h"

struct kvt_report {
    const struct kvt_options *options;
    const struct kvt_tokenizer *tokenizer; /* NULL: ids are shown */
    uint32_t row_count;
    bool streams; /* one row's text as it comes */
    bool shows_progress;
    bool bar_shown;
    bool text_open;   /* the last thing on a terminal is text without a line end */
    uint64_t shown;   /* tokens that were streamed */
    uint64_t skipped; /* of them, seen again since the generation started over */
    FILE *logits;
    char why[512]; /* the first output that could not be written; "": all could */
};

/* -KVT_ESYS: the file for logits cannot be made. */
__attribute__((warn_unused_result)) int kvt_report_open(struct kvt_report *report,
                                                        const struct kvt_options *options,
                                                        const struct kvt_tokenizer *tokenizer,
                                                        uint32_t row_count, char *err,
                                                        size_t err_size);
/*
 * Writes out what is left. -KVT_EIO: that, or something before, could not be written; why says what.
 * Once it is closed there is nothing more to close.
 */
__attribute__((warn_unused_result)) int kvt_report_close(struct kvt_report *report);

/* The generation starts over and will come out the same: what was streamed is not shown again. */
void kvt_report_start_over(struct kvt_report *report);

/* What kvt_generate calls meanwhile. */
struct kvt_generate_watch kvt_report_watch(struct kvt_report *report);

/* The end: texts of several rows, or the JSON object; speeds beside the progress. */
void kvt_report_finish(struct kvt_report *report, const struct kvt_generate *generate,
                       uint32_t threads);

#endif
