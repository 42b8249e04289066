/* What stands for kernels: C functions of the same names and results as kernels/synth_gpu.cu. */
#include "kernels/synth_content.h"
#include "tests/fake_cuda/fake_cuda.h"

#include <string.h>

static uint32_t word_bytes(const struct kvt_synth_gpu_job *j, uint32_t word) {
    return j->token_bytes - word * 8 < 8 ? j->token_bytes - word * 8 : 8;
}

static void check(struct kvt_synth_gpu_job *j) {
    for (uint32_t t = 0; t < j->count; t++) {
        uint64_t seed = kvt_synth_seed(j->ids[t], j->first + t, j->layer, j->plane_index);
        const uint8_t *token = j->plane + (uint64_t)t * j->token_bytes;
        for (uint32_t w = 0; w * 8 < j->token_bytes; w++) {
            uint64_t expected = kvt_synth_word(seed, w);
            if (memcmp(token + w * 8, &expected, word_bytes(j, w)) == 0) {
                continue;
            }
            if (j->errors->count++ == 0) {
                j->errors->expected = expected;
                j->errors->found = 0;
                memcpy(&j->errors->found, token + w * 8, word_bytes(j, w));
                j->errors->token = j->first + t;
                j->errors->layer = j->layer;
                j->errors->plane = j->plane_index;
                j->errors->offset = w * 8;
            }
        }
    }
}

static void write_tokens(struct kvt_synth_gpu_job *j) {
    for (uint32_t t = 0; t < j->count; t++) {
        uint64_t seed = kvt_synth_seed(j->ids[t], j->first + t, j->layer, j->plane_index);
        for (uint32_t w = 0; w * 8 < j->token_bytes; w++) {
            uint64_t word = kvt_synth_word(seed, w);
            memcpy(j->plane + (uint64_t)t * j->token_bytes + w * 8, &word, word_bytes(j, w));
        }
    }
}

static void spin(struct kvt_synth_gpu_job *j) {
    fake_pause_us(j->count);
}

struct CUfunc_st {
    const char *name;
    void (*kernel)(struct kvt_synth_gpu_job *job);
    bool loaded;
};
static struct CUfunc_st functions[] = {{"kvt_synth_gpu_check", check, false},
                                       {"kvt_synth_gpu_write", write_tokens, false},
                                       {"kvt_synth_gpu_spin", spin, false}};

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    (void)image;
    NEED_CONTEXT();
    *module = (CUmodule)functions;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleUnload(CUmodule module) {
    (void)module;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
    (void)module;
    for (unsigned i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        if (strcmp(functions[i].name, name) == 0) {
            *out = &functions[i];
            return CUDA_SUCCESS;
        }
    }
    return CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned int gx, unsigned int gy, unsigned int gz,
                               unsigned int bx, unsigned int by, unsigned int bz,
                               unsigned int shared, CUstream s, void **parameters, void **extra) {
    (void)shared;
    (void)extra;
    fake_must(gx > 0 && gy == 1 && gz == 1 && bx > 0 && by == 1 && bz == 1, "that grid");
    if (!f->loaded) {
        fake_stall();
        f->loaded = true;
    }
    return fake_submit_kernel(s, f->kernel, parameters[0]);
}
