/* Tensors walked together, as a nest of loops. C11 and CUDA C. */
#ifndef CUFLASH_NEST_H
#define CUFLASH_NEST_H

#include "../include/cuflash.h" /* kernels have no other path to it */

enum { CUFLASH_MAX_OPERANDS = 3 };

/* Dimensions are merged where all operands allow it, and those of size 1 are gone; at least one is left. */
typedef struct {
    int32_t ndim, operands;
    int64_t shape[CUFLASH_MAX_DIMS];
    int64_t stride[CUFLASH_MAX_OPERANDS][CUFLASH_MAX_DIMS]; /* elements; 0 where the operand repeats */
    void *data[CUFLASH_MAX_OPERANDS];
    cuflash_dtype dtype[CUFLASH_MAX_OPERANDS];
} cuflash_nest;

/* The nest of the shape of operands[0], to which the others broadcast. */
void cuflash_nest_make(cuflash_nest *loops, int count, const cuflash_tensor *const *operands);

int64_t cuflash_nest_numel(const cuflash_nest *loops);

#endif
