#include "tiers/engine/program.h"

#include "tiers/engine/progress.h"

#include <stdlib.h>

/* | program | ops | copies | deps | progress |, each array 8-byte aligned by its element's size. */
struct kvt_program *kvt_program_create(uint32_t session, uint32_t ops_max, uint32_t copies_max,
                                       uint32_t deps_max) {
    size_t ops_bytes = (size_t)ops_max * sizeof(struct kvt_op);
    size_t copies_bytes = (size_t)copies_max * sizeof(struct kvt_copy);
    size_t deps_bytes = (size_t)deps_max * sizeof(uint64_t);
    size_t progress_bytes = (size_t)ops_max * sizeof(struct kvt_op_progress);
    struct kvt_program *p =
        calloc(1, sizeof(*p) + ops_bytes + copies_bytes + deps_bytes + progress_bytes);
    if (!p) {
        return NULL;
    }
    char *at = (char *)(p + 1);
    p->session = session;
    p->ops = (struct kvt_op *)at;
    at += ops_bytes;
    p->copies = (struct kvt_copy *)at;
    at += copies_bytes;
    p->deps = (uint64_t *)at;
    at += deps_bytes;
    p->progress = (struct kvt_op_progress *)at;
    return p;
}

void kvt_program_free(struct kvt_program *p) {
    if (p) {
        free(p->window);
    }
    free(p);
}
