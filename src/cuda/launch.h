/* Attention on CUDA devices: which kernels serve a problem, and their launches. */
#ifndef CUFLASH_CUDA_LAUNCH_H
#define CUFLASH_CUDA_LAUNCH_H

#include "cuda/cuda.h"
#include "kernels/attention.h"
#include "problem.h"

typedef struct cuflash_cuda_family cuflash_cuda_family;

/* Where the parts of a backward's workspace begin, at multiples of 256 bytes. */
typedef struct {
    size_t row_max, row_log, row_offset, row_delta, dq_sum, dk_parts, dv_parts, ticket, turn;
} cuflash_cuda_workspace;

typedef struct {
    const cuflash_cuda_family *family;
    cuflash_kernel_row row; /* of the pass */
    const cuflash_cuda_family *stats_family;
    cuflash_kernel_row stats; /* backward: of the forward kernel that recomputes a row's statistics */
    int32_t packed;           /* heads of a group that are in a tile of queries */
    int32_t together;         /* heads, or units of walks, that are gone through at the same time */
    int32_t descending;       /* backward: units, the first, whose last keys' walks begin */
    bool vector;              /* rows may be read and written 16 bytes at a time */
    bool draws;               /* forward: blocks draw their tiles by a counter */
    bool turns;               /* backward: blocks wait for each other where they add to dq */
    bool finishes;            /* backward: blocks make dq of its sum themselves */
    int64_t blocks;
    int64_t tiles;               /* of queries; backward: of keys, and parts of them; a block may go through several */
    int64_t rows;                /* backward: seq_q rounded up to whole tiles */
    int64_t walks, whole, parts; /* backward: tiles of keys; the first `whole` are dealt out whole, the others in `parts` */
    int64_t stats_blocks;
    cuflash_cuda_workspace at;
} cuflash_cuda_plan;

cuflash_status cuflash_cuda_plan_make(cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass,
                                      size_t *workspace_bytes);
void cuflash_cuda_plan_describe(const cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass, char *text,
                                size_t size);

/* Queues the launches. */
cuflash_status cuflash_cuda_run(const cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass, void *workspace);

#endif
