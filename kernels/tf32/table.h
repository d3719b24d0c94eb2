/* The tf32 family: float32 attention forward by products of TF32 on tensor cores, sm_80 and later. Rows by head dimension. C11
 * and CUDA C. */
#ifndef CUFLASH_TF32_TABLE_H
#define CUFLASH_TF32_TABLE_H

#include "../attention.h"

/* Q, a tile of K and one of V. */
#define CUFLASH_TF32_FORWARD_SMEM(dim, block_m, block_n) (4 * (dim) * ((block_m) + 2 * (block_n)))

/* dim, block_m, block_n, stages, threads, blocks, smem_bytes */
#define CUFLASH_TF32_FORWARD(X)                                                                                                \
    X(32, 64, 64, 1, 128, 0, CUFLASH_TF32_FORWARD_SMEM(32, 64, 64))                                                            \
    X(64, 64, 64, 1, 128, 0, CUFLASH_TF32_FORWARD_SMEM(64, 64, 64))                                                            \
    X(96, 64, 64, 1, 128, 0, CUFLASH_TF32_FORWARD_SMEM(96, 64, 64))                                                            \
    X(128, 64, 64, 1, 128, 0, CUFLASH_TF32_FORWARD_SMEM(128, 64, 64))                                                          \
    X(192, 64, 32, 1, 128, 0, CUFLASH_TF32_FORWARD_SMEM(192, 64, 32))                                                          \
    X(256, 128, 32, 1, 256, 0, CUFLASH_TF32_FORWARD_SMEM(256, 128, 32))

#endif
