/* The tables of dequantizers, one a path; the x86 ones exist on x86 only. */
#ifndef KVT_WORKER_DEQUANT_PATHS_H
#define KVT_WORKER_DEQUANT_PATHS_H

#include <string.h>

#include "client/worker/dequant.h"

extern const kvt_dequant_fn kvt_dequant_table_generic[KVT_TENSOR_TYPES_END];
extern const kvt_dequant_fn kvt_dequant_table_avx2[KVT_TENSOR_TYPES_END];
extern const kvt_dequant_fn kvt_dequant_table_avx512[KVT_TENSOR_TYPES_END];

#endif
