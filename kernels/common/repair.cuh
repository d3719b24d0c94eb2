/* Rows computed again by the book, one warp a row, in float32 from global memory. Tiles multiply what a row does not see by
 * a probability of 0; if that is NaN or infinite the product is NaN, which a row must not get from what it does not see.
 * Slow, and called for rows with NaN, in causal problems alone where a kernel's own products are right. Never inlined: the
 * loops before it keep their registers. */
#ifndef CUFLASH_COMMON_REPAIR_CUH
#define CUFLASH_COMMON_REPAIR_CUH

#include <math_constants.h>

#include "attention.h"
#include "common/row.cuh"
#include "common/type.cuh"

namespace cuflash {

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffff, x, mask);
    return x;
}

/* The dot product of two rows, in every lane. */
template <typename T> static __device__ __forceinline__ float dot(const T *x, const T *y, int dim) {
    float sum = 0;
#pragma unroll 1 /* little code: it is compiled into every kernel */
    for (int d = threadIdx.x % 32; d < dim; d += 32) sum = fmaf(to_float(x[d]), to_float(y[d]), sum);
    return warp_sum(sum);
}

enum { MAX_LANE_DIMS = 8 }; /* of 256 dimensions, per lane */

/* A score, before scaling. */
template <typename T>
static __device__ __forceinline__ float score(const cuflash_attention_args &args, const T *q, const T *k) {
    float s = dot(q, k, args.head_dim);
    return args.negative ? -s : s;
}

/* Row `row` of o, and its log-sum-exp where that is wanted. */
template <typename T, bool LSE = false>
static __device__ __noinline__ void repair_o_row(const cuflash_attention_args &args, int batch, int head, int row) {
    int lane = threadIdx.x % 32, head_kv = head / args.group;
    int visible = visible_keys(args, row);
    const T *q = row_of<T>(args.q, args.q_stride, batch, head, row);
    float max = -CUDART_INF_F, sum = 0, out[MAX_LANE_DIMS] = {};
#pragma unroll 1
    for (int j = 0; j < visible; j++) {
        float s = score(args, q, row_of<T>(args.k, args.k_stride, batch, head_kv, j));
        float now = fmaxf(max, s), finite = now == -CUDART_INF_F ? 0 : now;
        float factor = exp2f((max - finite) * args.scale_log2), p = exp2f((s - finite) * args.scale_log2);
        if (s != s) p = s;
        const T *v = row_of<T>(args.v, args.v_stride, batch, head_kv, j);
        sum = sum * factor + p;
#pragma unroll
        for (int i = 0; i < MAX_LANE_DIMS; i++)
            if (i * 32 + lane < args.head_dim_v) out[i] = fmaf(p, to_float(v[i * 32 + lane]), out[i] * factor);
        max = now;
    }
    T *o = row_of<T>(args.o, args.o_stride, batch, head, row);
#pragma unroll
    for (int i = 0; i < MAX_LANE_DIMS; i++)
        if (i * 32 + lane < args.head_dim_v) o[i * 32 + lane] = from_float<T>(sum == 0 ? 0 : out[i] / sum);
    if (LSE && lane == 0) store_lse(args, batch, head, row, max, sum);
}

/* A warp's rows of o, of as many heads as are packed. A NaN among keys that a row does not see has spoilt some, as 0 * NaN is
 * NaN. */
template <typename T>
static __device__ __noinline__ void repair_rows(const cuflash_attention_args &args, int batch, int head, int first, int end) {
    __syncwarp();
    for (int row = first; row < end; row++)
        repair_o_row<T>(args, batch, head + (row & (1 << args.packed) - 1), row >> args.packed);
}

/* The probability of a key for a row, from the row's statistics. */
static __device__ __forceinline__ float probability(const cuflash_attention_args &args, float score, int64_t at) {
    return exp2f((score - args.row_max[at]) * args.scale_log2 - args.row_log[at]);
}

/* Row `row` of dq. */
template <typename T>
static __device__ __noinline__ void repair_dq_row(const cuflash_attention_args &args, int batch, int head, int row) {
    int lane = threadIdx.x % 32, head_kv = head / args.group;
    int visible = visible_keys(args, row);
    int64_t number = row_number(args, batch, head, row);
    const T *q = row_of<T>(args.q, args.q_stride, batch, head, row),
            *d_o = row_of<T>(args.d_o, args.d_o_stride, batch, head, row);
    float sum[MAX_LANE_DIMS] = {};
#pragma unroll 1
    for (int j = 0; j < visible; j++) {
        const T *k = row_of<T>(args.k, args.k_stride, batch, head_kv, j);
        float p = probability(args, score(args, q, k), number);
        float ds =
            p * (dot(d_o, row_of<T>(args.v, args.v_stride, batch, head_kv, j), args.head_dim_v) - args.row_delta[number]);
#pragma unroll
        for (int i = 0; i < MAX_LANE_DIMS; i++)
            if (i * 32 + lane < args.head_dim) sum[i] = fmaf(ds, to_float(k[i * 32 + lane]), sum[i]);
    }
    T *dq = row_of<T>(args.dq, args.dq_stride, batch, head, row);
#pragma unroll
    for (int i = 0; i < MAX_LANE_DIMS; i++)
        if (i * 32 + lane < args.head_dim) dq[i * 32 + lane] = from_float<T>(sum[i] * args.scale);
}

/* Row `key` of dk and of dv, where wanted. */
template <typename T>
static __device__ __noinline__ void repair_dk_dv_row(const cuflash_attention_args &args, int batch, int head_kv, int key) {
    int lane = threadIdx.x % 32;
    const T *k = row_of<T>(args.k, args.k_stride, batch, head_kv, key),
            *v = row_of<T>(args.v, args.v_stride, batch, head_kv, key);
    float dk_sum[MAX_LANE_DIMS] = {}, dv_sum[MAX_LANE_DIMS] = {};
    for (int head = head_kv * args.group; head < (head_kv + 1) * args.group; head++)
#pragma unroll 1
        for (int row = first_query(args, key); row < args.seq_q; row++) {
            int64_t number = row_number(args, batch, head, row);
            const T *q = row_of<T>(args.q, args.q_stride, batch, head, row),
                    *d_o = row_of<T>(args.d_o, args.d_o_stride, batch, head, row);
            float p = probability(args, score(args, q, k), number);
            float ds = p * (dot(d_o, v, args.head_dim_v) - args.row_delta[number]);
#pragma unroll
            for (int i = 0; i < MAX_LANE_DIMS; i++) {
                if (i * 32 + lane < args.head_dim) dk_sum[i] = fmaf(ds, to_float(q[i * 32 + lane]), dk_sum[i]);
                if (i * 32 + lane < args.head_dim_v) dv_sum[i] = fmaf(p, to_float(d_o[i * 32 + lane]), dv_sum[i]);
            }
        }
#pragma unroll
    for (int i = 0; i < MAX_LANE_DIMS; i++) {
        if (args.dk && i * 32 + lane < args.head_dim)
            row_of<T>(args.dk, args.dk_stride, batch, head_kv, key)[i * 32 + lane] = from_float<T>(dk_sum[i] * args.scale);
        if (args.dv && i * 32 + lane < args.head_dim_v)
            row_of<T>(args.dv, args.dv_stride, batch, head_kv, key)[i * 32 + lane] = from_float<T>(dv_sum[i]);
    }
}

} // namespace cuflash

#endif
