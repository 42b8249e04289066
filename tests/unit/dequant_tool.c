/*
 * dequant_tool TYPE PATH: blocks of a tensor type on stdin, their f32 values on
 * stdout; PATH is generic, avx2 or avx512. Exit 77 where the CPU lacks the path.
 * tests/python/test_dequant.py drives it.
 */
#include <stdio.h>
#include <stdlib.h>

#include "client/worker/dequant.h"

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    uint32_t type = (uint32_t)strtoul(argv[1], NULL, 10);
    const struct kvt_tensor_traits *traits = kvt_tensor_traits(type);
    if (!traits)
        return 2;
    kvt_dequant_fn dequant = kvt_dequant_path(type, argv[2]);
    if (!dequant)
        return 77;

    /* a block at a time in exact-size buffers, so that ASan sees a read past one */
    void *block = malloc(traits->block_bytes);
    float *values = malloc(traits->block_values * sizeof(*values));
    if (!block || !values)
        return 1;
    while (fread(block, traits->block_bytes, 1, stdin) == 1) {
        dequant(block, values, traits->block_values);
        fwrite(values, sizeof(*values), traits->block_values, stdout);
    }
    free(block);
    free(values);
    return ferror(stdin) || fflush(stdout) ? 1 : 0;
}
