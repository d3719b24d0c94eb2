/* What a backward does row by row, around its main kernel. */
#include <math_constants.h>

#include "attention.h"
#include "common/repair.cuh"
#include "common/row.cuh"
#include "common/type.cuh"
#include "common/walk.cuh"
#include "rows/table.h"

namespace cuflash {

/* The sum of x * y over EACH elements, of which `left` are inside the row. */
template <int EACH, typename T> __device__ __forceinline__ float dot_piece(const T *x, const T *y, int left, bool vector) {
    alignas(16) T a[EACH], b[EACH];
    if (left <= 0) return 0;
    if (vector) {
        *reinterpret_cast<uint4 *>(a) = *reinterpret_cast<const uint4 *>(x);
        *reinterpret_cast<uint4 *>(b) = *reinterpret_cast<const uint4 *>(y);
    } else {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            bool inside = e < left;
            a[e] = inside ? x[e] : from_float<T>(0);
            b[e] = inside ? y[e] : from_float<T>(0);
        }
    }
    float sum = 0;
#pragma unroll
    for (int e = 0; e < EACH; e++) sum = fmaf(to_float(a[e]), to_float(b[e]), sum);
    return sum;
}

/* The log-sum-exp as a backward uses it; of rows that have none yet it is to be computed. */
__device__ __forceinline__ void use_lse(const cuflash_attention_args &args, int batch, int head, int row, int64_t at) {
    float lse = -CUDART_INF_F;
    if (row < args.seq_q && args.lse) {
        int64_t from = lse_at(args, batch, head, row);
        lse = args.lse_half ? __half2float(static_cast<const __half *>(args.lse)[from])
                            : static_cast<const float *>(args.lse)[from];
    }
    bool empty = lse == -CUDART_INF_F;
    args.row_max[at] = empty ? CUDART_INF_F : 0;
    args.row_log[at] = empty ? 0 : lse * 1.4426950408889634f;
    args.row_offset[at] = empty ? CUDART_INF_F : args.row_log[at];
}

/* Before it, of every query row: the sum of o * d_o, the log-sum-exp in the main kernel's terms, a cleared accumulator of dq
 * where it wants one, and of every tile of rows a cleared turn. A block takes some rows of one head; a row is read by as many
 * lanes as it has pieces of 16 bytes. */
template <typename T> __device__ __forceinline__ void begin(const cuflash_attention_args &args) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *args.ticket = 0;
    constexpr int EACH = 16 / sizeof(T);
    int groups = (args.rows + CUFLASH_ROWS_PER_BLOCK - 1) / CUFLASH_ROWS_PER_BLOCK;
    int64_t pair = blockIdx.x / groups;
    int first = blockIdx.x % groups * CUFLASH_ROWS_PER_BLOCK, end = min(first + CUFLASH_ROWS_PER_BLOCK, args.rows);
    int batch = pair / args.heads, head = pair % args.heads;
    int lanes = 1; /* to a row */
    while (lanes < 32 && lanes * EACH < args.head_dim_v) lanes *= 2;
    int lane = threadIdx.x % lanes;
    /* All lanes of a warp go round together. */
    for (int row = first + threadIdx.x / lanes; row - static_cast<int>(threadIdx.x % 32 / lanes) < end;
         row += CUFLASH_ROWS_THREADS / lanes) {
        float sum = 0;
        if (row < args.seq_q) {
            const T *o = row_of<T>(static_cast<const void *>(args.o), args.o_stride, batch, head, row);
            const T *d_o = row_of<T>(args.d_o, args.d_o_stride, batch, head, row);
            for (int d = lane * EACH; d < args.head_dim_v; d += lanes * EACH)
                sum += dot_piece<EACH>(o + d, d_o + d, args.head_dim_v - d, args.vector);
        }
        for (int mask = lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffff, sum, mask);
        if (lane == 0 && row < end) {
            int64_t at = pair * args.rows + row;
            args.row_delta[at] = sum;
            use_lse(args, batch, head, row, at);
        }
    }
    if (args.turn)
        for (int tile = first / args.block_m + threadIdx.x; tile * args.block_m < end; tile += CUFLASH_ROWS_THREADS)
            args.turn[pair * (args.rows / args.block_m) + tile] = 0;
    if (!args.dq_sum || args.stored) return;
    float4 *sum = reinterpret_cast<float4 *>(args.dq_sum + (pair * args.rows + first) * args.dim_padded);
    int count = (end - first) * (args.dim_padded / 4);
    for (int i = threadIdx.x; i < count; i += CUFLASH_ROWS_THREADS) sum[i] = make_float4(0, 0, 0, 0);
}

/* A row of dk or dv from its parts, added in their order; `number` is that of the row among those that have parts. For a
 * whole warp, which takes 4 elements a lane at a time; says whether there is a NaN. */
template <typename T>
__device__ __forceinline__ bool sum_row(const cuflash_attention_args &args, float *parts, float factor, void *array,
                                        const cuflash_kernel_strides &stride, int dim, int64_t number, int batch, int head_kv,
                                        int key) {
    bool spoilt = false;
    if (!array) return false;
    int64_t step = static_cast<int64_t>(args.block_n) * args.dim_padded;
    const float *from = parts + number / args.block_n * args.parts * step + number % args.block_n * args.dim_padded;
    T *to = row_of<T>(array, stride, batch, head_kv, key);
    for (int d = threadIdx.x % 32 * 4; d < dim; d += 128) {
        float x[4] = {};
#pragma unroll 4
        for (int part = 0; part < args.parts; part++) {
            float4 y = __ldcs(reinterpret_cast<const float4 *>(from + part * step + d));
            x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            x[e] *= factor;
            spoilt |= x[e] != x[e];
        }
        store_some<4>(to, d, dim, args.vector, x);
    }
    return __any_sync(0xffffffff, spoilt);
}

/* After it, where parts were made: dk and dv of their keys, a warp a key. */
template <typename T> __device__ __forceinline__ void sum(const cuflash_attention_args &args) {
    int64_t number = static_cast<int64_t>(blockIdx.x) * (CUFLASH_ROWS_THREADS / 32) + threadIdx.x / 32;
    int tiles = (args.seq_k + args.block_n - 1) / args.block_n;
    int64_t walk = args.whole + number / args.block_n, pair = walk / tiles;
    int batch = pair / args.heads_kv, head_kv = pair % args.heads_kv;
    int key = walk % tiles * args.block_n + number % args.block_n;
    if (batch >= args.batch || key >= args.seq_k) return;
    bool spoilt = sum_row<T>(args, args.dv_parts, 1, args.dv, args.dv_stride, args.head_dim_v, number, batch, head_kv, key);
    spoilt |= sum_row<T>(args, args.dk_parts, args.scale, args.dk, args.dk_stride, args.head_dim, number, batch, head_kv, key);
    if (args.causal && spoilt) repair_dk_dv_row<T>(args, batch, head_kv, key);
}

} // namespace cuflash

#define KERNEL(type, suffix)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(CUFLASH_ROWS_THREADS)                                                         \
        cuflash_rows_begin_##suffix(const __grid_constant__ cuflash_attention_args args) {                                     \
        cuflash::begin<type>(args);                                                                                            \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(CUFLASH_ROWS_THREADS)                                                         \
        cuflash_rows_sum_##suffix(const __grid_constant__ cuflash_attention_args args) {                                       \
        cuflash::sum<type>(args);                                                                                              \
    }
KERNEL(float, f32)
KERNEL(__half, f16)
KERNEL(__nv_bfloat16, bf16)
