/* Where rows lie, what they see, and the statistics of their scores. */
#ifndef CUFLASH_COMMON_ROW_CUH
#define CUFLASH_COMMON_ROW_CUH

#include <cuda_fp16.h>
#include <math_constants.h>

#include "attention.h"
#include "common/type.cuh"

namespace cuflash {

template <typename T>
__device__ __forceinline__ T *row_of(void *array, const cuflash_kernel_strides &stride, int batch, int head, int64_t row) {
    return static_cast<T *>(array) + batch * stride.batch + head * stride.head + row * stride.seq;
}

template <typename T>
__device__ __forceinline__ const T *row_of(const void *array, const cuflash_kernel_strides &stride, int batch, int head,
                                           int64_t row) {
    return static_cast<const T *>(array) + batch * stride.batch + head * stride.head + row * stride.seq;
}

/* Writes VEC neighbouring elements of a row, from column d on, as far as the row goes. */
template <int VEC, typename T> __device__ __forceinline__ void store_some(T *row, int d, int dim, bool vector, const float *x) {
    if (vector) {
        if (d >= dim) return;
        if constexpr (sizeof(T) == 4) {
            if constexpr (VEC == 4)
                *reinterpret_cast<float4 *>(row + d) = make_float4(x[0], x[1], x[2], x[3]);
            else
                *reinterpret_cast<float2 *>(row + d) = make_float2(x[0], x[1]);
        } else {
            uint32_t *to = reinterpret_cast<uint32_t *>(row + d);
#pragma unroll
            for (int e = 0; e < VEC; e += 2) to[e / 2] = pack<T>(x[e], x[e + 1]);
        }
    } else {
#pragma unroll
        for (int e = 0; e < VEC; e++)
            if (d + e < dim) row[d + e] = from_float<T>(x[e]);
    }
}

/* How many keys, from the first, a query sees; not above seq_k, and 0 or less where it sees none. */
__device__ __forceinline__ int visible_keys(const cuflash_attention_args &args, int query) {
    return args.causal ? min(query - args.seq_q + args.seq_k + 1, args.seq_k) : args.seq_k;
}

/* The first query that sees a key; it may be seq_q or more (none does), and is never below 0. */
__device__ __forceinline__ int first_query(const cuflash_attention_args &args, int key) {
    return args.causal ? max(key - args.seq_k + args.seq_q, 0) : 0;
}

/* Where a row's float is in the workspace's row arrays. */
__device__ __forceinline__ int64_t row_number(const cuflash_attention_args &args, int batch, int head, int row) {
    return (static_cast<int64_t>(batch) * args.heads + head) * args.rows + row;
}

__device__ __forceinline__ int64_t lse_at(const cuflash_attention_args &args, int batch, int head, int row) {
    return batch * args.lse_stride.batch + head * args.lse_stride.head + row * args.lse_stride.seq;
}

/* Must the backward compute a row's statistics? A float32 log-sum-exp will do as long as it is small: its last bit is a
 * relative error of every probability. */
__device__ __forceinline__ bool statistics_needed(const cuflash_attention_args &args, int batch, int head, int row) {
    constexpr float LARGEST = 32;
    if (!args.lse || args.lse_half) return true;
    float lse = static_cast<const float *>(args.lse)[lse_at(args, batch, head, row)];
    return !(fabsf(lse) <= LARGEST) && lse != -CUDART_INF_F;
}

/* Of any of some rows? For whole blocks. */
__device__ __forceinline__ bool statistics_needed(const cuflash_attention_args &args, int batch, int head, int first,
                                                  int rows) {
    bool needed = false;
    for (int row = first + threadIdx.x; row < min(first + rows, args.seq_q); row += blockDim.x)
        needed |= statistics_needed(args, batch, head, row);
    return __syncthreads_or(needed);
}

/* What a row's scores come to: their maximum and the sum of exp2((score - maximum) * scale_log2). A forward's output ... */
__device__ __forceinline__ void store_lse(const cuflash_attention_args &args, int batch, int head, int row, float max,
                                          float sum) {
    if (!args.lse) return;
    float lse = sum == 0 ? -CUDART_INF_F : max * fabsf(args.scale) + logf(sum);
    int64_t at = lse_at(args, batch, head, row);
    if (args.lse_half)
        static_cast<__half *>(args.lse)[at] = __float2half_rn(lse);
    else
        static_cast<float *>(args.lse)[at] = lse;
}

/* ... and what a backward needs, more exact than the log-sum-exp. */
__device__ __forceinline__ void store_statistics(const cuflash_attention_args &args, int batch, int head, int row, float max,
                                                 float sum) {
    if (!statistics_needed(args, batch, head, row)) return;
    int64_t at = row_number(args, batch, head, row);
    args.row_max[at] = sum == 0 ? CUDART_INF_F : max;
    args.row_log[at] = sum == 0 ? 0 : log2f(sum);
    args.row_offset[at] = fmaf(args.row_max[at], args.scale_log2, args.row_log[at]);
}

} // namespace cuflash

#endif
