/* What the files of the fake libcuda share: driver.c has GPUs, contexts, memory and its sharing, stream.c
 * streams, copies and events, kernel.c what stands for kernels. driver.c says at its top what is played.
 */
#ifndef KVT_FAKE_CUDA_H
#define KVT_FAKE_CUDA_H

#include "kernels/synth_gpu.h"

#include <cuda.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Aborts and says what was misused, unless it holds. */
void fake_must(bool holds, const char *what);
/* A number of the environment. */
uint64_t fake_setting(const char *name, uint64_t otherwise);
void fake_pause_us(long us);

/* ---- driver.c --------------------------------------------------------------------------------- */

extern uint32_t fake_waiting; /* atomic: streams that wait for a counter */
extern bool fake_lost;        /* atomic: a sticky error */

/* Until no stream waits for a counter. */
void fake_stall(void);
/* The state of the calling thread's context. */
CUresult fake_here(void);
CUcontext fake_context(void);
/* Whether the bytes lie in one range of the kind: pinned host memory, or a GPU's. */
bool fake_inside(uint64_t address, uint64_t bytes, bool pinned);
/* Host memory that a copy accepts: pinned and in one registration, or pageable as a whole. */
bool fake_host_is_fine(const void *host, size_t bytes);

#define NEED_CONTEXT()              \
    do {                            \
        CUresult at_ = fake_here(); \
        if (at_ != CUDA_SUCCESS) {  \
            return at_;             \
        }                           \
    } while (0)

/* ---- stream.c --------------------------------------------------------------------------------- */

/* Carried out in the stream's order, with the parameter as it is now. */
CUresult fake_submit_kernel(CUstream s, void (*kernel)(struct kvt_synth_gpu_job *job),
                            const struct kvt_synth_gpu_job *job);

#endif
