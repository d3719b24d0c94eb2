/* The fma family: attention by float32 multiply-adds, on every architecture; 16-bit tensors are converted on their way into
 * shared memory. Rows by head dimension, then by preference: the plan takes the first one whose shared memory the device
 * allows. C11 and CUDA C. */
#ifndef CUFLASH_FMA_TABLE_H
#define CUFLASH_FMA_TABLE_H

#include "../attention.h"

/* Q, P, and a ring of `stages` slabs: 32 columns of K, or as many rows of V as fit. All float32. */
#define CUFLASH_FMA_FORWARD_SMEM(dim, block_m, block_n, stages)                                                                \
    (4 * ((block_m) * ((dim) + (block_n)) + 32 * (stages) * (block_n)))

/* dim, block_m, block_n, stages, threads, blocks, smem_bytes. The smaller tiles of a dimension are for devices with less
 * shared memory. */
#define CUFLASH_FMA_FORWARD(X)                                                                                                 \
    X(32, 128, 64, 3, 128, 0, CUFLASH_FMA_FORWARD_SMEM(32, 128, 64, 3))                                                        \
    X(32, 64, 64, 3, 64, 0, CUFLASH_FMA_FORWARD_SMEM(32, 64, 64, 3))                                                           \
    X(64, 128, 64, 3, 128, 0, CUFLASH_FMA_FORWARD_SMEM(64, 128, 64, 3))                                                        \
    X(64, 64, 64, 3, 64, 0, CUFLASH_FMA_FORWARD_SMEM(64, 64, 64, 3))                                                           \
    X(96, 64, 128, 3, 128, 0, CUFLASH_FMA_FORWARD_SMEM(96, 64, 128, 3))                                                        \
    X(96, 64, 64, 3, 128, 0, CUFLASH_FMA_FORWARD_SMEM(96, 64, 64, 3))                                                          \
    X(128, 64, 128, 3, 128, 0, CUFLASH_FMA_FORWARD_SMEM(128, 64, 128, 3))                                                      \
    X(128, 64, 64, 3, 128, 0, CUFLASH_FMA_FORWARD_SMEM(128, 64, 64, 3))                                                        \
    X(128, 32, 64, 3, 64, 0, CUFLASH_FMA_FORWARD_SMEM(128, 32, 64, 3))                                                         \
    X(192, 64, 64, 3, 128, 0, CUFLASH_FMA_FORWARD_SMEM(192, 64, 64, 3))                                                        \
    X(192, 32, 64, 3, 64, 0, CUFLASH_FMA_FORWARD_SMEM(192, 32, 64, 3))                                                         \
    X(256, 64, 64, 2, 128, 0, CUFLASH_FMA_FORWARD_SMEM(256, 64, 64, 2))                                                        \
    X(256, 32, 64, 2, 64, 0, CUFLASH_FMA_FORWARD_SMEM(256, 32, 64, 2))

/* Statistics alone, which are seldom wanted: few head dimensions, and tiles for all devices. */
#define CUFLASH_FMA_STATISTICS(X)                                                                                              \
    X(64, 64, 64, 3, 64, 0, CUFLASH_FMA_FORWARD_SMEM(64, 64, 64, 3))                                                           \
    X(128, 32, 64, 3, 64, 0, CUFLASH_FMA_FORWARD_SMEM(128, 32, 64, 3))                                                         \
    X(256, 32, 64, 2, 64, 0, CUFLASH_FMA_FORWARD_SMEM(256, 32, 64, 2))

#define CUFLASH_FMA_HALF_FORWARD(X)                                                                                            \
    X(64, 64, 64, 3, 64, 0, CUFLASH_FMA_FORWARD_SMEM(64, 64, 64, 3))                                                           \
    X(128, 32, 64, 3, 64, 0, CUFLASH_FMA_FORWARD_SMEM(128, 32, 64, 3))                                                         \
    X(256, 32, 64, 2, 64, 0, CUFLASH_FMA_FORWARD_SMEM(256, 32, 64, 2))

/* K and V, Q and dO, and P or dS, whose rows are whole 32 queries. */
#define CUFLASH_FMA_BACKWARD_SMEM(dim, block_m, block_n)                                                                       \
    (4 * (2 * (dim) * ((block_n) + (block_m)) + (block_n) * (((block_m) + 31) / 32 * 32)))

#define CUFLASH_FMA_BACKWARD(X)                                                                                                \
    X(32, 128, 64, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(32, 128, 64))                                                          \
    X(32, 64, 64, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(32, 64, 64))                                                            \
    X(64, 64, 64, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(64, 64, 64))                                                            \
    X(64, 32, 64, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(64, 32, 64))                                                            \
    X(96, 64, 96, 1, 192, 0, CUFLASH_FMA_BACKWARD_SMEM(96, 64, 96))                                                            \
    X(96, 32, 64, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(96, 32, 64))                                                            \
    X(96, 32, 32, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(96, 32, 32))                                                            \
    X(128, 64, 128, 1, 256, 0, CUFLASH_FMA_BACKWARD_SMEM(128, 64, 128))                                                        \
    X(128, 64, 64, 1, 256, 0, CUFLASH_FMA_BACKWARD_SMEM(128, 64, 64))                                                          \
    X(128, 32, 32, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(128, 32, 32))                                                          \
    X(128, 16, 32, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(128, 16, 32))                                                          \
    X(192, 32, 48, 1, 192, 0, CUFLASH_FMA_BACKWARD_SMEM(192, 32, 48))                                                          \
    X(192, 32, 24, 1, 192, 0, CUFLASH_FMA_BACKWARD_SMEM(192, 32, 24))                                                          \
    X(192, 16, 16, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(192, 16, 16))                                                          \
    X(256, 32, 64, 1, 256, 0, CUFLASH_FMA_BACKWARD_SMEM(256, 32, 64))                                                          \
    X(256, 32, 32, 1, 256, 0, CUFLASH_FMA_BACKWARD_SMEM(256, 32, 32))                                                          \
    X(256, 32, 16, 1, 256, 0, CUFLASH_FMA_BACKWARD_SMEM(256, 32, 16))                                                          \
    X(256, 16, 8, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(256, 16, 8))

#define CUFLASH_FMA_HALF_BACKWARD(X)                                                                                           \
    X(64, 32, 64, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(64, 32, 64))                                                            \
    X(128, 16, 32, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(128, 16, 32))                                                          \
    X(256, 16, 8, 1, 128, 0, CUFLASH_FMA_BACKWARD_SMEM(256, 16, 8))

#endif
