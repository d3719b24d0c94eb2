/* What attention kernels are launched with: one struct by value, the same for every family. C11 and CUDA C. */
#ifndef CUFLASH_KERNELS_ATTENTION_H
#define CUFLASH_KERNELS_ATTENTION_H

#include <stdint.h>

/* Strides in elements of a [batch, head, seq, dim] array whose last dimension is contiguous. */
typedef struct {
    int64_t batch, head, seq;
} cuflash_kernel_strides;

typedef struct {
    const void *q, *k, *v;
    void *o;            /* forward: output. backward: input */
    void *lse;          /* as lse_half says; forward: output, or NULL. backward: input, or NULL */
    const void *d_o;    /* the rest is for backward alone */
    void *dq, *dk, *dv; /* outputs; each may be NULL: not wanted */

    /* Workspace of backward. Row arrays are [batch * heads][rows] floats. */
    float *row_max;    /* what is subtracted from a score: p = exp2((score - row_max) * scale_log2 - row_log). Rows that see */
    float *row_log;    /* nothing, and rows past seq_q, have row_max = +infinity, row_log = 0 */
    float *row_offset; /* row_max * scale_log2 + row_log, which is as good where the gradients are of 16 bits */
    float *row_delta;  /* the sum of o * d_o over a row; 0 past seq_q */
    float *dq_sum;     /* [batch * heads][rows][dim_padded]: dq before scaling, or NULL: not wanted */
    int32_t *turn; /* [batch * heads][rows / block_m], zeroed: additions to dq_sum that others waited for; NULL: nobody waits */

    cuflash_kernel_strides q_stride, k_stride, v_stride, o_stride, lse_stride, d_o_stride, dq_stride, dk_stride, dv_stride;

    int32_t batch, heads, heads_kv, group; /* group = heads / heads_kv */
    int32_t seq_q, seq_k;
    int32_t head_dim, head_dim_v;
    int32_t rows;       /* seq_q rounded up to whole tiles of the family */
    int32_t dim_padded; /* of dq_sum, dk_parts and dv_parts */
    int32_t causal;     /* query i sees keys 0 ... i + seq_k - seq_q */
    int32_t negative;   /* the scale is below 0: scores are of -q */
    int32_t lse_half;   /* lse is float16, not float32 */
    int32_t vector;     /* every row of every array begins at a multiple of 16 bytes and holds whole 16 bytes: so are head_dim
                           and head_dim_v multiples of 16 bytes */
    int32_t packed;     /* forward: 2^packed heads of a group are neighbouring rows of a tile of queries */
    float scale;        /* as given, with its sign: what gradients are scaled by */
    float scale_log2;   /* |scale| * log2(e), never 0: what scores are scaled by */

    /* Backward: a walk is a tile of keys and the queries of its group of heads; all walks after the first `whole` are dealt out
     * in `parts`, which write partial sums of dk, before scaling, and of dv: [walks - whole][parts][block_n][dim_padded]. */
    int32_t parts, whole, block_m, block_n;
    float *dk_parts, *dv_parts;
    int32_t walks;      /* parts counted */
    int32_t together;   /* units, heads of a batch element, that are gone through at the same time */
    int32_t ordered;    /* deterministic: additions to dq_sum come in the order in which the walks of a unit begin */
    int32_t descending; /* so many units, the first, begin with their last keys (common/walk.cuh) */
    int32_t stored;     /* dq_sum is not cleared: what the first tile of keys adds is stored, and others come after it */
    int32_t finishes; /* dq is made of its sum by the blocks themselves; where there is more to do, `turn` of a tile says so */
    int32_t *ticket;  /* families whose blocks stay: the numbers of the next walk, and of the next tile of dq to finish.
                         Forward: of the next tile of queries; NULL: they are dealt out beforehand */
} cuflash_attention_args;

/* The most shared memory that a plan counts on, in bytes a block, by compute capability (10 * major + minor). Rows that need more,
 * or that are for devices with less, are not compiled for it (common/chosen.cuh). sm_86 stands for what runs its code. */
#define CUFLASH_SHARED_LIMIT(compute)                                                                                          \
    ((compute) < 75                                            ? 96 * 1024                                                     \
     : (compute) < 80                                          ? 64 * 1024                                                     \
     : (compute) < 86                                          ? 163 * 1024                                                    \
     : (compute) < 90 || ((compute) >= 120 && (compute) < 130) ? 99 * 1024                                                     \
                                                               : 227 * 1024)

enum { CUFLASH_ANY_KEYS = 0x7fffffff };

/* Causal blocks are of unequal length, and the long ones should not start last; more units than that would read more at a time
 * than stays in the L2 cache. */
enum { CUFLASH_UNITS_TOGETHER = 16 };

/* A row of a family's table: what a kernel is made for and what it is launched with. */
typedef struct {
    int dim;     /* head dimensions up to this one */
    int block_m; /* query rows to a tile */
    int block_n; /* keys to a tile */
    int stages;  /* tiles of the inner loop in shared memory at a time */
    int threads;
    int blocks;            /* at a time on a multiprocessor, at least, so many registers there are; 0: no matter */
    int smem_bytes;        /* dynamic shared memory */
    int keys, keys_causal; /* for problems of at most so many keys, and causal ones */
    int cluster;           /* blocks that take a tile together, on neighbouring multiprocessors; 1: each for itself */
} cuflash_kernel_row;

#endif
