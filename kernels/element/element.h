/* What element-wise kernels are launched with: one struct by value. C11 and CUDA C. */
#ifndef CUFLASH_KERNELS_ELEMENT_H
#define CUFLASH_KERNELS_ELEMENT_H

#include "nest.h"
#include "operation.h"
#include "reduction.h"

enum { CUFLASH_ELEMENT_THREADS = 256 }; /* of every block */

/* cuflash_element_<kernel of operation.h>, and cuflash_element_move: a copy of the same dtype. */
typedef struct {
    cuflash_nest loops; /* out, then the inputs */
    int64_t numel;
    int32_t vector; /* from a multiple of 4 on, four elements lie side by side and aligned in every operand */
    cuflash_op op;
} cuflash_map_args;

/* cuflash_element_reduce_all and cuflash_element_compare: block b leaves partial[b], a double or a cuflash_difference. */
typedef struct {
    cuflash_nest loops; /* the inputs */
    int64_t numel;
    int32_t vector;
    cuflash_reduce_op op;
    cuflash_tolerance tolerance;
    void *partial;
} cuflash_scan_args;

enum { CUFLASH_SCAN_BLOCKS = 512 }; /* the most */

/* cuflash_element_reduce: element n of out is the reduction of elements that lie `stride` apart, from element n of the slice
 * on; `lanes` threads share one. Where there are few outputs, each is made in pieces: the outermost dimension of out and
 * slice is then that of the pieces, the last of which may be shorter. */
typedef struct {
    cuflash_nest loops; /* out, slice */
    int64_t numel;      /* of out */
    int64_t per_piece;  /* elements of out that are the same piece of their output; numel where there is one piece */
    int64_t length, stride;
    int64_t piece; /* elements to a piece; length where there is one */
    double divisor;
    cuflash_reduce_op op;
    int32_t lanes;     /* a power of two, up to the block's threads */
    int32_t lane_fast; /* neighbouring threads share an output; otherwise they have neighbouring outputs */
} cuflash_reduce_args;

#endif
