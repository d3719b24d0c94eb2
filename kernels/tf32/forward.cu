/* float32 attention forward on tensor cores: mma.sync takes TF32, float32 with 11 bits of 24, so numbers are split in two,
 * x = high + low, and a product is high high + high low + low high; what is left out is 2^-22 of it.
 *
 * A tensor core cuts its sum off, toward zero, at every step. Where sums are long that would cost more than the splitting
 * gains (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
 * performance", 2022). So products with a low part, which are small, are summed apart, and P V is summed from zero for every
 * tile of keys and then added to the output, rounded.
 *
 * Rows that come out NaN, or close to 0, are computed again by the book: infinities and the smallest numbers do not split.
 *
 * Otherwise as mma/forward.cu: a block keeps a tile of queries, 16 to a warp, and walks the keys from the last visible one to
 * the first; scores and probabilities stay in registers. */
#include <math_constants.h>

#include "attention.h"
#include "common/order.cuh"
#include "common/repair.cuh"
#include "common/row.cuh"
#include "mma/tile.cuh"
#include "ptx/math.cuh"
#include "tf32/table.h"

namespace cuflash {

/* x without the bits that TF32 has not: x = high + low exactly. `rounded` leaves low half as large, and of either sign. */
__device__ __forceinline__ float high_bits(float x) {
    return __uint_as_float(__float_as_uint(x) & 0xffffe000);
}
__device__ __forceinline__ float high_bits_rounded(float x) {
    return __uint_as_float((__float_as_uint(x) + 0x1000) & 0xffffe000);
}

template <int N> struct Split {
    float high[N], low[N];
    Split() = default;
    __device__ __forceinline__ Split(const float (&x)[N], bool rounded) {
#pragma unroll
        for (int i = 0; i < N; i++) high[i] = rounded ? high_bits_rounded(x[i]) : high_bits(x[i]), low[i] = x[i] - high[i];
    }
};

template <int DIM, int BLOCK_M, int BLOCK_N, int THREADS> struct Forward {
    static constexpr int WARPS = THREADS / 32, NI = BLOCK_N / 8, DI = DIM / 8;
    static constexpr int GROUP = DIM > 128 ? 1 : 4; /* blocks of 8 columns whose P V is summed at a time */
    static_assert(BLOCK_M == WARPS * 16, "16 queries to a warp");
    using QTile = Tile<BLOCK_M, DIM, 4>;
    using KTile = Tile<BLOCK_N, DIM, 4>;

    const cuflash_attention_args &args;
    unsigned char *shared;
    uint32_t q_tile, k_tile, v_tile;
    int lane, warp, first_row;
    const float *k, *v;

    float out[DI][4] = {};
    float row_max[2] = {-CUDART_INF_F, -CUDART_INF_F}, row_sum[2] = {};

    __device__ __forceinline__ Forward(const cuflash_attention_args &args, unsigned char *shared)
        : args(args), shared(shared), q_tile(ptx::shared_address(shared)), k_tile(q_tile + QTile::BYTES),
          v_tile(k_tile + KTile::BYTES), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
    }

    /* The row of this thread's accumulators, upper or lower half. */
    __device__ __forceinline__ int query(int half) const {
        return first_row + warp * 16 + half * 8 + lane / 4;
    }

    __device__ __forceinline__ void load_k(int tile) {
        load_tile<KTile, THREADS>(k_tile, k, args.k_stride.seq, tile * BLOCK_N, args.seq_k, args.head_dim, args.vector);
        ptx::cp_async_commit();
    }
    __device__ __forceinline__ void load_v(int tile) {
        load_tile<KTile, THREADS>(v_tile, v, args.v_stride.seq, tile * BLOCK_N, args.seq_k, args.head_dim_v, args.vector);
        ptx::cp_async_commit();
    }

    /* scores = Q K^T */
    __device__ __forceinline__ void multiply_scores(float (&scores)[NI][4]) {
        uint32_t q_lane = ptx::anew(lane_a<QTile>(q_tile) + warp * 16 * QTile::CHUNKS * 16);
        uint32_t k_lane = ptx::anew(lane_b<KTile>(k_tile));
        float low[NI][4] = {};
#pragma unroll
        for (int n = 0; n < NI; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) scores[n][e] = 0;
                /* A panel at a time in one piece of code: all of it, four times over, would not stay in the instruction
                 * cache. */
#pragma unroll 1
        for (int panel = 0; panel < QTile::PANELS; panel++) {
#pragma unroll
            for (int chunk = 0; chunk < QTile::CHUNKS; chunk += 2) {
                Split<4> a(load_floats(block_address<QTile>(q_lane, 0, chunk)).x, true);
#pragma unroll
                for (int n = 0; n < NI; n += 4) {
                    Split<4> b[2];
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        b[i] = Split<4>(load_floats(block_address<KTile>(k_lane, (n + 2 * i) * 8, chunk)).x, false);
                        /* In this order no product waits for the one before it. */
#pragma unroll
                    for (int i = 0; i < 4; i++) multiply(low[n + i], a.low, b[i / 2].high + i % 2 * 2);
#pragma unroll
                    for (int i = 0; i < 4; i++) multiply(scores[n + i], a.high, b[i / 2].high + i % 2 * 2);
#pragma unroll
                    for (int i = 0; i < 4; i++) multiply(low[n + i], a.high, b[i / 2].low + i % 2 * 2);
                }
            }
            q_lane += BLOCK_M * QTile::CHUNKS * 16, k_lane += BLOCK_N * KTile::CHUNKS * 16;
        }
        float sign = args.negative ? -1 : 1;
#pragma unroll
        for (int n = 0; n < NI; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) scores[n][e] = sign * (scores[n][e] + low[n][e]);
    }

    /* Four 8x4 blocks of floats by one ldmatrix. */
    struct Floats {
        float x[4];
    };
    static __device__ __forceinline__ Floats load_floats(uint32_t address) {
        uint32_t r[4];
        ptx::ldmatrix_x4(r, address);
        return {{__uint_as_float(r[0]), __uint_as_float(r[1]), __uint_as_float(r[2]), __uint_as_float(r[3])}};
    }

    static __device__ __forceinline__ void multiply(float (&c)[4], const float (&a)[4], const float *b) {
        ptx::mma_1688_tf32(c, a, b[0], b[1]);
    }

    /* Hides keys that do not exist, or that a row does not see. */
    __device__ __forceinline__ void mask(float (&scores)[NI][4], int tile) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int left = visible_keys(args, query(half)) - tile * BLOCK_N - lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < NI; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (n * 8 + e >= left) scores[n][half * 2 + e] = -CUDART_INF_F;
        }
    }

    /* Turns scores into probabilities relative to the running maximum, and scales what is there by how far that moved.
     * `single`: all of a row's probability in this tile is one key's. */
    __device__ __forceinline__ void exponentiate(float (&scores)[NI][4], bool (&single)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float now = row_max[half];
#pragma unroll
            for (int n = 0; n < NI; n++) now = fmaxf(now, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
            now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, 1));
            now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, 2));
            float finite = now == -CUDART_INF_F ? 0 : now; /* a row may have seen nothing yet */
            float factor = ptx::exp2_approx((row_max[half] - finite) * args.scale_log2), sum = 0;
            row_max[half] = now;
#pragma unroll
            for (int n = 0; n < NI; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &p = scores[n][half * 2 + e];
                    p = ptx::exp2_approx((p - finite) * args.scale_log2);
                    sum += p;
                }
            row_sum[half] = fmaf(row_sum[half], factor, sum);
#pragma unroll
            for (int d = 0; d < DI; d++) out[d][half * 2] *= factor, out[d][half * 2 + 1] *= factor;
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            single[half] = sum == 1;
        }
    }

    /* out += P V */
    __device__ __forceinline__ void multiply_values(const float (&p)[NI][4], const bool (&single)[2]) {
        /* A product does not care for the order of k: it goes through the even keys of eight, then the odd ones, as the thread
         * holds them. */
        Split<4> a[NI];
#pragma unroll
        for (int n = 0; n < NI; n++) a[n] = Split<4>({p[n][0], p[n][2], p[n][1], p[n][3]}, true);
#pragma unroll
        for (int first = 0; first < DI; first += GROUP) {
            uint32_t even = ptx::anew(v_tile + KTile::offset(lane % 4 * 2, lane / 16) + lane / 4 % 4 * 4);
            uint32_t odd = ptx::anew(v_tile + KTile::offset(lane % 4 * 2 + 1, lane / 16) + lane / 4 % 4 * 4);
            float sum[GROUP][4] = {}, low[GROUP][4] = {};
#pragma unroll
            for (int n = 0; n < NI; n++) {
                Split<2> b[GROUP];
#pragma unroll
                for (int d = 0; d < GROUP; d++)
                    b[d] = Split<2>({ptx::load_shared(block_address<KTile>(even, n * 8, (first + d) * 2)),
                                     ptx::load_shared(block_address<KTile>(odd, n * 8, (first + d) * 2))},
                                    false);
#pragma unroll
                for (int d = 0; d < GROUP; d++) multiply(low[d], a[n].low, b[d].high);
#pragma unroll
                for (int d = 0; d < GROUP; d++) multiply(sum[d], a[n].high, b[d].high);
#pragma unroll
                for (int d = 0; d < GROUP; d++) multiply(low[d], a[n].high, b[d].low);
            }
#pragma unroll
            for (int d = 0; d < GROUP; d++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[first + d][e] += sum[d][e] + low[d][e];
        }
        if (__any_sync(0xffffffff, single[0] || single[1])) add_last_bits(a, single);
    }

    /* What the two parts of V lack, its last two bits, to rows that take one row of V alone: they get it exactly. */
    __device__ __forceinline__ void add_last_bits(const Split<4> (&p)[NI], const bool (&single)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int key = -1;
#pragma unroll
            for (int n = 0; n < NI; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (p[n].high[half + e * 2] == 1 && p[n].low[half + e * 2] == 0) key = n * 8 + lane % 4 * 2 + e;
            key = max(key, __shfl_xor_sync(0xffffffff, key, 1));
            key = max(key, __shfl_xor_sync(0xffffffff, key, 2));
            if (!single[half] || key < 0) continue;
            uint32_t from = v_tile + KTile::offset(key, lane % 4 / 2) + lane % 2 * 8;
#pragma unroll
            for (int d = 0; d < DI; d++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float x = ptx::load_shared(block_address<KTile>(from, 0, d * 2) + e * 4), low = x - high_bits(x);
                    out[d][half * 2 + e] += low - high_bits(low);
                }
        }
    }

    /* One tile of keys. K's buffer is filled anew under the second product, and V's under the first. */
    __device__ __forceinline__ void step(int tile, bool masked) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        load_v(tile);
        float scores[NI][4];
        multiply_scores(scores);
        if (masked) mask(scores, tile);
        bool single[2];
        exponentiate(scores, single);
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (tile > 0) load_k(tile - 1);
        multiply_values(scores, single);
    }

    /* Is an output one that splitting has spoilt? An infinity splits into NaN, and so do numbers that round up to one; what is
     * near the smallest number loses its low part. (A NaN among keys that a row does not see spoils it in every kernel.) */
    static __device__ __forceinline__ bool is_spoilt(float x) {
        constexpr float SMALL = 0x1p-90f;
        return x != x || (x != 0 && fabsf(x) < SMALL);
    }

    /* Through shared memory, where a warp's rows of Q were: only that warp has read them. */
    __device__ __forceinline__ void store(int batch, int head) {
        unsigned spoilt[2];
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = row_sum[half];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            if (lane % 4 == 0 && query(half) < args.seq_q) store_lse(args, batch, head, query(half), row_max[half], sum);
            float factor = sum == 0 ? 0 : 1 / sum;
            int row = warp * 16 + half * 8 + lane / 4;
            bool bad = false;
#pragma unroll
            for (int d = 0; d < DI; d++) {
                float2 x = make_float2(out[d][half * 2] * factor, out[d][half * 2 + 1] * factor);
                bad |= is_spoilt(x.x) || is_spoilt(x.y);
                *reinterpret_cast<float2 *>(shared + QTile::offset(row, d * 2 + lane % 4 / 2) + lane % 2 * 8) = x;
            }
            spoilt[half] = __ballot_sync(0xffffffff, bad);
        }
        __syncwarp();
        float *o = row_of<float>(args.o, args.o_stride, batch, head, 0);
        int first = first_row + warp * 16;
        store_tile<QTile>(shared, warp * 16, 16, o, args.o_stride.seq, first, args.seq_q, args.head_dim_v, args.vector, lane,
                          32);
        if (!(spoilt[0] | spoilt[1])) return;
        __syncwarp();
        for (int row = 0; row < 16 && first + row < args.seq_q; row++)
            if (spoilt[row / 8] >> row % 8 * 4 & 15) repair_o_row<float, true>(args, batch, head, first + row);
    }

    __device__ __forceinline__ void run() {
        QueryBlock block = queries_of_block<BLOCK_M>(args);
        int batch = block.batch, head = block.head, head_kv = head / args.group;
        first_row = block.first_row;
        const float *q = row_of<float>(args.q, args.q_stride, batch, head, 0);
        k = row_of<float>(args.k, args.k_stride, batch, head_kv, 0);
        v = row_of<float>(args.v, args.v_stride, batch, head_kv, 0);

        int end = max(0, visible_keys(args, min(first_row + BLOCK_M, args.seq_q) - 1));
        int unmasked = max(0, visible_keys(args, first_row)) / BLOCK_N; /* tiles that every row sees whole */
        int tile = (end + BLOCK_N - 1) / BLOCK_N - 1;
        if (tile >= 0) { /* else Q is not waited for, and would be stored where the output is */
            load_tile<QTile, THREADS>(q_tile, q, args.q_stride.seq, first_row, args.seq_q, args.head_dim, args.vector);
            load_k(tile);
        }
        for (; tile >= 0; tile--) step(tile, tile >= unmasked);
        ptx::cp_async_wait<0>();
        store(batch, head);
    }
};

} // namespace cuflash

#define KERNELS(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                    \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                                              \
        cuflash_tf32_forward_f32_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_attention_args args) {         \
        extern __shared__ __align__(128) unsigned char shared[];                                                               \
        cuflash::Forward<dim, block_m, block_n, threads>(args, shared).run();                                                  \
    }
CUFLASH_TF32_FORWARD(KERNELS)
