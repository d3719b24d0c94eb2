/* The hopper family: 16-bit attention by wgmma and tensor maps, sm_90 alone. Rows by head dimension, then by preference: the
 * plan takes the first one of the problem's kind. C11 and CUDA C. */
#ifndef CUFLASH_HOPPER_TABLE_H
#define CUFLASH_HOPPER_TABLE_H

#include "../attention.h"

/* How a tensor lies in memory, as the driver's cuTensorMapEncodeTiled writes it (CUtensorMap). */
typedef struct {
    uint64_t opaque[16];
} cuflash_tensor_map;

#ifdef __cplusplus
#define CUFLASH_ALIGNED_MAP alignas(64) cuflash_tensor_map
#else
#define CUFLASH_ALIGNED_MAP _Alignas(64) cuflash_tensor_map
#endif

typedef struct {
    cuflash_attention_args attention;
    CUFLASH_ALIGNED_MAP q, k, v;
    CUFLASH_ALIGNED_MAP d_o, dq, dk, dv; /* for backward alone; gradients where they are written by maps */
} cuflash_hopper_args;

enum { CUFLASH_HOPPER_BARRIER_BYTES = 320 };

/* Panels of 64 columns: `q_stages` tiles of Q, and `stages` tiles of K and of V; barriers, and what the tiles of Q are. Tiles
 * begin at multiples of 1024 bytes. There are two tiles of Q where they fit. */
#define CUFLASH_HOPPER_BYTES(dim, block_m, block_n, stages, q_stages)                                                          \
    (1024 + ((dim) + 63) / 64 * 128 * ((q_stages) * (block_m) + 2 * (stages) * (block_n)) + CUFLASH_HOPPER_BARRIER_BYTES + 64)
#define CUFLASH_HOPPER_Q_STAGES(dim, block_m, block_n, stages)                                                                 \
    (CUFLASH_HOPPER_BYTES(dim, block_m, block_n, stages, 2) <= 227 * 1024 ? 2 : 1)
#define CUFLASH_HOPPER_FORWARD_SMEM(dim, block_m, block_n, stages)                                                             \
    CUFLASH_HOPPER_BYTES(dim, block_m, block_n, stages, CUFLASH_HOPPER_Q_STAGES(dim, block_m, block_n, stages))

/* dim, block_m, block_n, stages, threads, blocks, smem_bytes, keys, keys_causal, cluster. Short problems waste less in smaller
 * tiles. */
#define CUFLASH_HOPPER_FORWARD(X)                                                                                              \
    X(64, 64, 64, 2, 256, 3, CUFLASH_HOPPER_FORWARD_SMEM(64, 64, 64, 2), 512, 1024, 1)                                         \
    X(64, 192, 128, 4, 512, 1, CUFLASH_HOPPER_FORWARD_SMEM(64, 192, 128, 4), CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 1)            \
    X(96, 128, 128, 2, 384, 1, CUFLASH_HOPPER_FORWARD_SMEM(96, 128, 128, 2), CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 1)            \
    X(128, 128, 64, 4, 384, 1, CUFLASH_HOPPER_FORWARD_SMEM(128, 128, 64, 4), 512, 1024, 1)                                     \
    X(128, 128, 128, 2, 384, 1, CUFLASH_HOPPER_FORWARD_SMEM(128, 128, 128, 2), CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 1)          \
    X(192, 128, 96, 2, 384, 1, CUFLASH_HOPPER_FORWARD_SMEM(192, 128, 96, 2), CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 1)            \
    X(256, 128, 64, 2, 384, 1, CUFLASH_HOPPER_FORWARD_SMEM(256, 128, 64, 2), CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 1)

enum { CUFLASH_HOPPER_WALK_BYTES = 144 }; /* what a backward's walks and tiles are */

/* Of head dimensions up to 128: K and V, `stages` tiles of Q and of dO, two of dS, one of dq in float32, `stages` times two
 * numbers of each query, two pieces of a finished dq, barriers, and what walks and tiles are. */
#define CUFLASH_HOPPER_BACKWARD_SMEM(dim, block_m, block_n, stages)                                                            \
    (1024 + 2 * (dim) * (2 * (block_n) + 2 * (stages) * (block_m)) + 4 * (block_m) * (block_n) + 4 * (block_m) * (dim) +       \
     (stages)*8 * (block_m) + 24576 + 128 + CUFLASH_HOPPER_WALK_BYTES)
/* Of head dimensions above 128, in each block of a cluster of two: 64 keys of K and V, and two panels of the other's K;
 * `stages` tiles of Q, and of dO where there is room; P in float32, two panels of dS, a half of dq; `stages` times two numbers
 * of each query, barriers, and what walks and tiles are. */
#define CUFLASH_HOPPER_DO_STAGES(dim) ((dim) <= 192 ? 2 : 1)
#define CUFLASH_HOPPER_WIDE_SMEM(dim, block_m, stages)                                                                         \
    (1024 + 2 * (dim) * (128 + ((stages) + CUFLASH_HOPPER_DO_STAGES(dim)) * (block_m)) + 16384 + 3 * 256 * (block_m) +         \
     (stages)*8 * (block_m) + 176 + CUFLASH_HOPPER_WALK_BYTES + 16)

/* Can the blocks make dq of its sum? Then rows that are to be repaired are left, of tiles whose turn says so. */
#define CUFLASH_HOPPER_FINISHES(dim) ((dim) <= 128)
enum {
    CUFLASH_HOPPER_SPOILT = -1,
    CUFLASH_HOPPER_DQ_ROWS = 32,         /* in a box of the map of dq */
    CUFLASH_HOPPER_DK_ROWS = 16,         /* in a box of those of dk and dv */
    CUFLASH_HOPPER_FINISH_THREADS = 256, /* of a block of the kernel that makes dq, a tile, or repairs it */
    CUFLASH_HOPPER_FINISHED_TILES = 32   /* that it looks through where only the latter is left */
};

/* dim, block_m, block_n, stages, threads, blocks, smem_bytes, keys, keys_causal, cluster */
#define CUFLASH_HOPPER_BACKWARD(X)                                                                                             \
    X(64, 128, 128, 2, 384, 1, CUFLASH_HOPPER_BACKWARD_SMEM(64, 128, 128, 2), CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 1)           \
    X(128, 64, 128, 2, 384, 1, CUFLASH_HOPPER_BACKWARD_SMEM(128, 64, 128, 2), CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 1)           \
    X(192, 64, 128, 2, 384, 1, CUFLASH_HOPPER_WIDE_SMEM(192, 64, 2), CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 2)                    \
    X(256, 64, 128, 2, 384, 1, CUFLASH_HOPPER_WIDE_SMEM(256, 64, 2), CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 2)

#endif
