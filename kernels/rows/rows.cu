/* What a backward does row by row, around its main kernel; and what a forward does before its own, where blocks draw tiles. */
#include <math_constants.h>

#include "attention.h"
#include "common/repair.cuh"
#include "common/row.cuh"
#include "common/type.cuh"
#include "common/walk.cuh"
#include "ptx/grid.cuh"
#include "rows/table.h"

namespace cuflash {

/* 16 bytes of a row. */
template <typename T> union Piece {
    static constexpr int EACH = 16 / sizeof(T);
    uint4 all;
    T x[EACH];

    /* Of which `left` elements are inside the row; the others are 0. */
    template <bool VECTOR> __device__ __forceinline__ void load(const T *from, int left) {
        all = make_uint4(0, 0, 0, 0);
        if (VECTOR && left > 0) all = *reinterpret_cast<const uint4 *>(from);
        if (!VECTOR)
            for (int e = 0; e < EACH; e++)
                if (e < left) x[e] = from[e];
    }
};

template <typename T> __device__ __forceinline__ float dot(const Piece<T> &a, const Piece<T> &b) {
    float sum = 0;
#pragma unroll
    for (int e = 0; e < Piece<T>::EACH; e++) sum = fmaf(to_float(a.x[e]), to_float(b.x[e]), sum);
    return sum;
}

/* A row's log-sum-exp; -infinity where there is none, as of rows that see nothing. */
__device__ __forceinline__ float load_lse(const cuflash_attention_args &args, int batch, int head, int row) {
    if (row >= args.seq_q || !args.lse) return -CUDART_INF_F;
    int64_t from = lse_at(args, batch, head, row);
    return args.lse_half ? __half2float(static_cast<const __half *>(args.lse)[from])
                         : static_cast<const float *>(args.lse)[from];
}

/* As a backward uses it; where there is none yet it is to be computed. */
__device__ __forceinline__ void use_lse(const cuflash_attention_args &args, float lse, int64_t at) {
    bool empty = lse == -CUDART_INF_F;
    args.row_max[at] = empty ? CUDART_INF_F : 0;
    args.row_log[at] = empty ? 0 : lse * 1.4426950408889634f;
    args.row_offset[at] = empty ? CUDART_INF_F : args.row_log[at];
}

/* Of the rows of a head from first to end: the sum of o * d_o, and the log-sum-exp in the main kernel's terms. A row is read
 * by as many lanes as it has pieces of 16 bytes, and of two rows a thread loads before it adds. */
template <typename T, bool VECTOR>
__device__ __forceinline__ void begin_rows(const cuflash_attention_args &args, int pair, int first, int end) {
    constexpr int EACH = Piece<T>::EACH, AT_ONCE = 2;
    int batch = pair / args.heads, head = pair % args.heads, dim = args.head_dim_v;
    const T *o = row_of<T>(static_cast<const void *>(args.o), args.o_stride, batch, head, 0);
    const T *d_o = row_of<T>(args.d_o, args.d_o_stride, batch, head, 0);
    int64_t number = row_number(args, batch, head, 0);
    int log = 0; /* of how many lanes there are to a row */
    while (log < 5 && EACH << log < dim) log++;
    int lane = threadIdx.x & (1 << log) - 1, step = CUFLASH_ROWS_THREADS >> log;
    /* All lanes of a warp go round together. */
    for (int row = first + (threadIdx.x >> log); row - static_cast<int>(threadIdx.x % 32 >> log) < end; row += AT_ONCE * step) {
        float sum[AT_ONCE] = {}, lse[AT_ONCE];
        if (lane == 0)
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) lse[i] = load_lse(args, batch, head, row + i * step);
        int column = lane * EACH;
        do { /* once, but of float32 rows of more than 128 elements */
            Piece<T> a[AT_ONCE], b[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int64_t at = row + i * step;
                int left = at < args.seq_q ? dim - column : 0;
                a[i].template load<VECTOR>(o + at * args.o_stride.seq + column, left);
                b[i].template load<VECTOR>(d_o + at * args.d_o_stride.seq + column, left);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) sum[i] += dot(a[i], b[i]);
            column += EACH << log;
        } while (column < dim);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            for (int mask = 1 << log >> 1; mask > 0; mask /= 2) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], mask);
            if (lane != 0 || row + i * step >= end) continue;
            args.row_delta[number + row + i * step] = sum[i];
            use_lse(args, lse[i], number + row + i * step);
        }
    }
}

/* Before it, all that; and a cleared accumulator of dq where it wants one, and of every tile of rows a cleared turn. A block
 * takes some rows of one head. */
template <typename T> __device__ __forceinline__ void begin(const cuflash_attention_args &args) {
    ptx::launch_dependents(); /* which wait */
    if (blockIdx.x == 0 && threadIdx.x == 0) args.ticket[0] = args.ticket[1] = 0;
    int groups = (args.rows + CUFLASH_ROWS_PER_BLOCK - 1) / CUFLASH_ROWS_PER_BLOCK, pair = blockIdx.x / groups;
    int first = blockIdx.x % groups * CUFLASH_ROWS_PER_BLOCK, end = min(first + CUFLASH_ROWS_PER_BLOCK, args.rows);
    if (args.vector)
        begin_rows<T, true>(args, pair, first, end);
    else
        begin_rows<T, false>(args, pair, first, end);
    if (args.turn)
        for (int tile = first / args.block_m + threadIdx.x; tile * args.block_m < end; tile += CUFLASH_ROWS_THREADS)
            args.turn[static_cast<int64_t>(pair) * (args.rows / args.block_m) + tile] = 0;
    if (!args.dq_sum || args.stored) return;
    float4 *sum = reinterpret_cast<float4 *>(args.dq_sum + (static_cast<int64_t>(pair) * args.rows + first) * args.dim_padded);
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

/* Before a forward whose blocks draw tiles, which they begin with. */
extern "C" __global__ void cuflash_rows_ticket(const __grid_constant__ cuflash_attention_args args) {
    *args.ticket = 0;
    ptx::launch_dependents();
}

KERNEL(float, f32)
KERNEL(__half, f16)
KERNEL(__nv_bfloat16, bf16)
