/* Chooses a path; see cpu_ops.h. */
#include "kernels/cpu_ops.h"

#include <string.h>

#include "kernels/cpu_path.h"

static const struct kvt_cpu_ops *const tables[] = {
    [KVT_CPU_GENERIC] = &kvt_cpu_ops_table_generic,
#if defined(__x86_64__)
    [KVT_CPU_AVX2] = &kvt_cpu_ops_table_avx2,
    [KVT_CPU_AVX512] = &kvt_cpu_ops_table_avx512,
#endif
};

const struct kvt_cpu_ops *kvt_cpu_ops(void) {
    return tables[kvt_cpu_path_best()];
}

const struct kvt_cpu_ops *kvt_cpu_ops_path(const char *name) {
    for (int i = 0; i <= (int)kvt_cpu_path_best(); i++)
        if (strcmp(tables[i]->name, name) == 0)
            return tables[i];
    return NULL;
}
