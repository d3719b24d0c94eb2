/* The mma family: 16-bit attention by mma.sync, sm_80 and later. Rows by head dimension, then by preference: the plan takes
 * the first one whose shared memory the device allows. C11 and CUDA C. */
#ifndef CUFLASH_MMA_TABLE_H
#define CUFLASH_MMA_TABLE_H

#include "../attention.h"

/* Q, and `stages` tiles of K and of V, all `dim` wide. */
#define CUFLASH_MMA_FORWARD_SMEM(dim, block_m, block_n, stages) (2 * (dim) * ((block_m) + 2 * (stages) * (block_n)))

/* dim, block_m, block_n, stages, threads, blocks, smem_bytes */
#define CUFLASH_MMA_FORWARD(X)                                                                                                 \
    X(32, 128, 128, 2, 128, 0, CUFLASH_MMA_FORWARD_SMEM(32, 128, 128, 2))                                                      \
    X(64, 128, 128, 1, 128, 0, CUFLASH_MMA_FORWARD_SMEM(64, 128, 128, 1))                                                      \
    X(96, 128, 64, 1, 128, 0, CUFLASH_MMA_FORWARD_SMEM(96, 128, 64, 1))                                                        \
    X(128, 128, 64, 1, 128, 0, CUFLASH_MMA_FORWARD_SMEM(128, 128, 64, 1))                                                      \
    X(192, 64, 64, 1, 128, 0, CUFLASH_MMA_FORWARD_SMEM(192, 64, 64, 1))                                                        \
    X(256, 64, 64, 1, 128, 0, CUFLASH_MMA_FORWARD_SMEM(256, 64, 64, 1))

/* Statistics alone, which are seldom wanted. */
#define CUFLASH_MMA_STATISTICS(X)                                                                                              \
    X(64, 128, 128, 1, 128, 0, CUFLASH_MMA_FORWARD_SMEM(64, 128, 128, 1))                                                      \
    X(128, 128, 64, 1, 128, 0, CUFLASH_MMA_FORWARD_SMEM(128, 128, 64, 1))                                                      \
    X(256, 64, 64, 1, 128, 0, CUFLASH_MMA_FORWARD_SMEM(256, 64, 64, 1))

/* K and V, `stages` tiles of Q and of dO, and P and dS. */
#define CUFLASH_MMA_BACKWARD_SMEM(dim, block_m, block_n, stages)                                                               \
    (2 * (dim) * (2 * (block_n) + 2 * (stages) * (block_m)) + 4 * (block_m) * (block_n))

/* dim, block_m, block_n, stages, threads, blocks, smem_bytes */
#define CUFLASH_MMA_BACKWARD(X)                                                                                                \
    X(32, 128, 128, 1, 256, 0, CUFLASH_MMA_BACKWARD_SMEM(32, 128, 128, 1))                                                     \
    X(64, 64, 64, 2, 128, 3, CUFLASH_MMA_BACKWARD_SMEM(64, 64, 64, 2))                                                         \
    X(96, 64, 128, 2, 256, 0, CUFLASH_MMA_BACKWARD_SMEM(96, 64, 128, 2))                                                       \
    X(96, 64, 64, 1, 128, 0, CUFLASH_MMA_BACKWARD_SMEM(96, 64, 64, 1))                                                         \
    X(128, 64, 128, 2, 256, 0, CUFLASH_MMA_BACKWARD_SMEM(128, 64, 128, 2))                                                     \
    X(128, 64, 64, 1, 256, 0, CUFLASH_MMA_BACKWARD_SMEM(128, 64, 64, 1))                                                       \
    X(192, 64, 64, 2, 256, 0, CUFLASH_MMA_BACKWARD_SMEM(192, 64, 64, 2))                                                       \
    X(192, 32, 32, 1, 128, 0, CUFLASH_MMA_BACKWARD_SMEM(192, 32, 32, 1))                                                       \
    X(256, 64, 64, 2, 256, 0, CUFLASH_MMA_BACKWARD_SMEM(256, 64, 64, 2))                                                       \
    X(256, 32, 32, 1, 128, 0, CUFLASH_MMA_BACKWARD_SMEM(256, 32, 32, 1))

#endif
