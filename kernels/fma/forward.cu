/* Attention forward by float32 multiply-adds, after Dao, "FlashAttention-2" (2023), for every architecture.
 *
 * A block keeps a tile of queries and walks the keys from the last visible one to the first. A warp owns WARP_M rows of the
 * tile, in the scores and in the output, so that softmax and P stay within it; a thread has 8 rows of them and every
 * COL_LANES-th column. K and V go through a ring of slabs that all warps share: 32 columns of a tile of K, or VALUE_ROWS
 * rows of a tile of V.
 *
 * The same without an output makes the statistics of rows for a backward. */
#include <math_constants.h>

#include "attention.h"
#include "common/chosen.cuh"
#include "common/order.cuh"
#include "common/repair.cuh"
#include "common/row.cuh"
#include "fma/table.h"
#include "fma/tile.cuh"
#include "ptx/math.cuh"

namespace cuflash {

/* The largest power of two that is not above n. */
constexpr int power_below(int n) {
    return n < 2 ? 1 : 2 * power_below(n / 2);
}

template <bool OUTPUT, typename T, int DIM, int BLOCK_M, int BLOCK_N, int STAGES, int THREADS> struct Forward {
    static constexpr int WARPS = THREADS / 32, WARP_M = BLOCK_M / WARPS, MI = 8;
    static constexpr int ROW_LANES = WARP_M / MI, COL_LANES = 32 / ROW_LANES;
    static constexpr int NI = BLOCK_N / COL_LANES, DI = DIM / COL_LANES;
    static constexpr int SLAB = 32 * BLOCK_N; /* floats */
    static constexpr int VALUE_ROWS = power_below(SLAB / DIM);
    static constexpr int K_SLABS = DIM / 32, V_SLABS = OUTPUT ? BLOCK_N / VALUE_ROWS : 0; /* to a tile, K's first */
    static_assert(VALUE_ROWS % 4 == 0 && BLOCK_N % VALUE_ROWS == 0, "whole slabs of V");
    using Output = Columns<DI, COL_LANES>;

    const cuflash_attention_args &args;
    float *q_tile, *p_tile, *ring;
    const T *k, *v;
    int first_row, warp, row_lane, col_lane;
    /* The slab to be loaded next: of the tile that begins at that key, from the last tile down to 0. */
    int next_key, next_part = 0, next_slot = 0;
    int slot = STAGES - 1; /* of the ring, in use */

    float out[MI][DI] = {};
    float row_max[MI], row_sum[MI] = {};

    __device__ __forceinline__ Forward(const cuflash_attention_args &args, float *shared)
        : args(args), q_tile(shared), p_tile(shared + BLOCK_M * DIM), ring(p_tile + BLOCK_M * BLOCK_N), warp(threadIdx.x / 32),
          row_lane(threadIdx.x % 32 / COL_LANES), col_lane(threadIdx.x % COL_LANES) {
#pragma unroll
        for (int i = 0; i < MI; i++) row_max[i] = -CUDART_INF_F;
    }

    /* The first of the thread's rows within the block, and one of them within the sequence. */
    __device__ __forceinline__ int own_row() const {
        return warp * WARP_M + row_lane * MI;
    }
    __device__ __forceinline__ int query(int i) const {
        return first_row + own_row() + i;
    }

    /* Queues the next slab, or nothing past the last: either way one group more. */
    __device__ __forceinline__ void load_slab() {
        if (next_key >= 0) {
            float *slab = ring + next_slot * SLAB;
            if (next_part < K_SLABS)
                load_tile<BLOCK_N, 32, Interleaved, THREADS>(slab, k, args.k_stride.seq, next_key, args.seq_k, next_part * 32,
                                                             args.head_dim, args.vector);
            else
                load_tile<VALUE_ROWS, DIM, Uniform, THREADS>(slab, v, args.v_stride.seq,
                                                             next_key + (next_part - K_SLABS) * VALUE_ROWS, args.seq_k, 0,
                                                             args.head_dim_v, args.vector);
            if (++next_part == K_SLABS + V_SLABS) next_part = 0, next_key -= BLOCK_N;
            if (++next_slot == STAGES) next_slot = 0;
        }
        ptx::cp_async_commit();
    }

    /* Waits for the next slab to be used, and queues one into the place of the slab before it, which all warps are done
     * with. */
    __device__ __forceinline__ const float *next_slab() {
        if (++slot == STAGES) slot = 0;
        ptx::cp_async_wait<STAGES - 2>();
        __syncthreads();
        load_slab();
        return ring + slot * SLAB;
    }

    /* scores = Q K^T */
    __device__ __forceinline__ void multiply_scores(float (&scores)[MI][NI]) {
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int n = 0; n < NI; n++) scores[i][n] = 0;
        const float *q = q_tile + own_row();
#pragma unroll 1
        for (int part = 0; part < K_SLABS; part++) {
            const float *k = next_slab() + col_lane * 32;
            multiply_transposed<BLOCK_M, COL_LANES, true>(scores, q + part * BLOCK_M * 32, k, Interleaved::of(col_lane));
        }
        if (!args.negative) return;
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int n = 0; n < NI; n++) scores[i][n] = -scores[i][n];
    }

    /* Hides keys that do not exist, or that a row does not see. */
    __device__ __forceinline__ void mask(float (&scores)[MI][NI], int tile) {
#pragma unroll
        for (int i = 0; i < MI; i++) {
            int left = visible_keys(args, query(i)) - tile * BLOCK_N - col_lane;
#pragma unroll
            for (int n = 0; n < NI; n++)
                if (n * COL_LANES >= left) scores[i][n] = -CUDART_INF_F;
        }
    }

    /* Turns scores into probabilities relative to the running maximum, and scales what is there by how far that moved. */
    __device__ __forceinline__ void exponentiate(float (&scores)[MI][NI]) {
#pragma unroll
        for (int i = 0; i < MI; i++) {
            float now = row_max[i];
#pragma unroll
            for (int n = 0; n < NI; n++) now = fmaxf(now, scores[i][n]);
#pragma unroll
            for (int lane = 1; lane < COL_LANES; lane *= 2) now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, lane));
            float finite = now == -CUDART_INF_F ? 0 : now; /* a row may have seen nothing yet */
            float factor = ptx::exp2_approx((row_max[i] - finite) * args.scale_log2);
            row_max[i] = now;
            float sum = row_sum[i] * factor;
#pragma unroll
            for (int n = 0; n < NI; n++) {
                scores[i][n] = ptx::exp2_approx((scores[i][n] - finite) * args.scale_log2);
                sum += scores[i][n];
            }
            row_sum[i] = sum;
#pragma unroll
            for (int d = 0; d < DI; d++) out[i][d] *= factor;
        }
    }

    /* out += P V, P by way of the warp's own rows of shared memory. */
    __device__ __forceinline__ void multiply_values(const float (&scores)[MI][NI]) {
        store_transposed<BLOCK_M, COL_LANES>(p_tile, scores, own_row(), col_lane);
        __syncwarp();
#pragma unroll 1
        for (int part = 0; part < V_SLABS; part++)
            multiply_outer_transposed<BLOCK_M, VALUE_ROWS, VALUE_ROWS, COL_LANES, Uniform>(
                out, p_tile, own_row(), part * VALUE_ROWS, next_slab(), col_lane);
    }

    template <bool MASKED> __device__ __forceinline__ void step(int tile) {
        float scores[MI][NI];
        multiply_scores(scores);
        if (MASKED) mask(scores, tile);
        exponentiate(scores);
        if constexpr (OUTPUT) multiply_values(scores);
    }

    __device__ __forceinline__ void store(int batch, int head) {
        bool spoilt = false;
#pragma unroll
        for (int i = 0; i < MI; i++) {
#pragma unroll
            for (int lane = 1; lane < COL_LANES; lane *= 2) row_sum[i] += __shfl_xor_sync(0xffffffff, row_sum[i], lane);
            if (query(i) >= args.seq_q) continue;
            if (col_lane == 0) (OUTPUT ? store_lse : store_statistics)(args, batch, head, query(i), row_max[i], row_sum[i]);
            if (!OUTPUT) continue;
            float factor = row_sum[i] == 0 ? 0 : 1 / row_sum[i];
            T *o = row_of<T>(args.o, args.o_stride, batch, head, query(i));
#pragma unroll
            for (int piece = 0; piece < Output::PIECES; piece++) {
                float x[Output::VEC];
#pragma unroll
                for (int e = 0; e < Output::VEC; e++) {
                    x[e] = out[i][piece * Output::VEC + e] * factor;
                    spoilt |= x[e] != x[e];
                }
                store_some<Output::VEC>(o, Output::column(col_lane, piece), args.head_dim_v, args.vector, x);
            }
        }
        /* A NaN among keys that a row does not see has spoilt it, as 0 * NaN is NaN: such rows are computed again. */
        if (!args.causal || !__any_sync(0xffffffff, spoilt)) return;
        __syncwarp();
        int first = first_row + warp * WARP_M;
        for (int row = first; row < min(args.seq_q, first + WARP_M); row++) repair_o_row<T>(args, batch, head, row);
    }

    __device__ __forceinline__ void run() {
        QueryBlock block = queries_of_block<BLOCK_M>(args);
        int batch = block.batch, head = block.head, head_kv = head / args.group;
        first_row = block.first_row;
        if (!OUTPUT && !statistics_needed(args, batch, head, first_row, BLOCK_M)) return;
        const T *q = row_of<T>(args.q, args.q_stride, batch, head, 0);
        k = row_of<T>(args.k, args.k_stride, batch, head_kv, 0);
        v = row_of<T>(args.v, args.v_stride, batch, head_kv, 0);

        int end = max(0, visible_keys(args, min(first_row + BLOCK_M, args.seq_q) - 1));
        int unmasked = max(0, visible_keys(args, first_row)) / BLOCK_N; /* tiles that every row sees whole */
        int tile = (end + BLOCK_N - 1) / BLOCK_N - 1;
        next_key = tile * BLOCK_N;
        load_transposed<BLOCK_M, DIM, THREADS>(q_tile, q, args.q_stride.seq, first_row, args.seq_q, args.head_dim, args.vector);
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) load_slab();
        for (; tile >= unmasked; tile--) step<true>(tile);
        for (; tile >= 0; tile--) step<false>(tile);
        store(batch, head);
    }
};

} // namespace cuflash

#define KERNEL(chosen, kind, output, type, suffix, dim, block_m, block_n, stages, threads, blocks)                             \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                                              \
        cuflash_fma_##kind##_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_attention_args args) {  \
        extern __shared__ __align__(128) float shared[];                                                                       \
        CUFLASH_IF_CHOSEN(chosen, cuflash::Forward<output, type, dim, block_m, block_n, stages, threads>(args, shared).run())  \
    }
#ifdef CUFLASH_HALF
#define BOTH(...) KERNEL(true, forward, true, __VA_ARGS__) KERNEL(true, statistics, false, __VA_ARGS__)
#define KERNELS(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                    \
    BOTH(__half, f16, dim, block_m, block_n, stages, threads, blocks)                                                          \
    BOTH(__nv_bfloat16, bf16, dim, block_m, block_n, stages, threads, blocks)
CUFLASH_FMA_HALF_FORWARD(KERNELS)
#else
constexpr cuflash::RowSize rows[] = {CUFLASH_FMA_FORWARD(CUFLASH_ROW_SIZE)};
#define FORWARD(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                    \
    KERNEL(cuflash::is_chosen(rows, dim, smem_bytes), forward, true, float, f32, dim, block_m, block_n, stages, threads, blocks)
#define STATISTICS(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                 \
    KERNEL(true, statistics, false, float, f32, dim, block_m, block_n, stages, threads, blocks)
CUFLASH_FMA_FORWARD(FORWARD)
CUFLASH_FMA_STATISTICS(STATISTICS)
#endif
