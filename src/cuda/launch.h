/* Attention on CUDA devices: which kernels serve a problem, and their launches. */
#ifndef CUFLASH_CUDA_LAUNCH_H
#define CUFLASH_CUDA_LAUNCH_H

#include "cuda/cuda.h"
#include "kernels/attention.h"
#include "problem.h"

typedef struct cuflash_cuda_family cuflash_cuda_family;

typedef struct {
    const cuflash_cuda_family *family;
    cuflash_kernel_row row; /* of the pass */
    const cuflash_cuda_family *stats_family;
    cuflash_kernel_row stats; /* backward: of the forward kernel that recomputes a row's statistics */
    int32_t packed;           /* forward: heads of a group that are in a tile of queries */
    int64_t blocks;
    int64_t tiles;               /* of queries; backward: of keys, and parts of them; a block may go through several */
    int64_t rows;                /* backward: seq_q rounded up to whole tiles */
    int64_t walks, whole, parts; /* backward: tiles of keys; the first `whole` are dealt out whole, the others in `parts` */
    int64_t stats_blocks;
} cuflash_cuda_plan;

cuflash_status cuflash_cuda_plan_make(cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass,
                                      size_t *workspace_bytes);
void cuflash_cuda_plan_describe(const cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass, char *text,
                                size_t size);

/* Queues the launches. */
cuflash_status cuflash_cuda_run(const cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass, void *workspace);

#endif
