/* Element-wise work on CUDA devices, on the calling thread's stream. Arguments are checked already unless it says otherwise. */
#ifndef CUFLASH_CUDA_ELEMENT_H
#define CUFLASH_CUDA_ELEMENT_H

#include "nest.h"
#include "operation.h"
#include "reduction.h"
#include "status.h"

/* Operand 0 = op(operands 1 and 2). Queues one kernel, or a copy. */
cuflash_status cuflash_cuda_map(const char *fn, int device, const cuflash_nest *loops, const cuflash_op *op);

/* Copies between two devices, one of which may be the CPU; checks its arguments. Waits where dst is on the CPU. */
cuflash_status cuflash_cuda_transfer(const char *fn, const cuflash_tensor *dst, const cuflash_tensor *src);

/* Reads device memory: waits. */
cuflash_status cuflash_cuda_read(const char *fn, int device, const void *src, size_t bytes, void *dst);

/* out = the reduction of `length` elements, `stride` apart, from each element of slice on. Queues one kernel or two. */
cuflash_status cuflash_cuda_reduce(const char *fn, cuflash_reduce_op op, const cuflash_tensor *out, const cuflash_tensor *slice,
                                   int64_t length, int64_t stride);

/* Of all elements; the mean is left a sum. Waits. */
cuflash_status cuflash_cuda_reduce_all(const char *fn, cuflash_reduce_op op, const cuflash_tensor *a, double *value);

/* Waits. */
cuflash_status cuflash_cuda_compare(const char *fn, const cuflash_tolerance *tolerance, const cuflash_tensor *actual,
                                    const cuflash_tensor *expected, cuflash_difference *all);

#endif
