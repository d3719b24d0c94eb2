/* Attention forward by mma.sync, after Dao, "FlashAttention-2" (2023): a block keeps a tile of queries and walks the keys
 * from the last visible one to the first, so that the tiles that need a mask come first. Scores and probabilities stay in
 * registers. The same without an output makes the statistics of rows for a backward. */
#include <math_constants.h>

#include "attention.h"
#include "common/order.cuh"
#include "common/repair.cuh"
#include "common/row.cuh"
#include "mma/table.h"
#include "mma/tile.cuh"
#include "ptx/math.cuh"

namespace cuflash {

/* What a block works on. It waits in shared memory, as it is needed once a tile, and registers are short. */
template <typename T> struct Place {
    const T *k, *v;
    int batch, head;
};

template <bool OUTPUT, typename T, int DIM, int BLOCK_M, int BLOCK_N, int STAGES, int THREADS> struct Forward {
    static constexpr int WARPS = THREADS / 32;
    static constexpr int WARP_M = BLOCK_M / WARPS; /* query rows of a warp */
    static constexpr int MI = WARP_M / 16;         /* blocks of 16 rows in it */
    static constexpr int NI = BLOCK_N / 8, DI = DIM / 8;
    static constexpr float LAZY = 8;
    /* Where in the second product the next K is loaded: where registers are short, once half the scores have left them to
     * the addresses. */
    static constexpr int LOAD_AT = MI == 1 ? 0 : NI / 4 * 2;
    using QTile = Tile<BLOCK_M, DIM>;
    using KTile = Tile<BLOCK_N, DIM>;
    static constexpr int STAGE_BYTES = 2 * KTile::BYTES; /* K, then V */

    const cuflash_attention_args &args;
    unsigned char *shared;
    volatile Place<T> &place;
    uint32_t q_tile, k_tiles;
    int first_row; /* of the block */

    float out[MI][DI][4] = {};
    float row_max[MI][2], row_sum[MI][2] = {};

    __device__ __forceinline__ Forward(const cuflash_attention_args &args, unsigned char *shared, Place<T> &place)
        : args(args), shared(shared), place(place), q_tile(ptx::shared_address(shared)), k_tiles(q_tile + QTile::BYTES) {
#pragma unroll
        for (int i = 0; i < MI; i++) row_max[i][0] = row_max[i][1] = -CUDART_INF_F;
    }

    static __device__ __forceinline__ int lane() {
        return threadIdx.x % 32;
    }
    static __device__ __forceinline__ int warp() {
        return threadIdx.x / 32;
    }

    /* The row of this thread's accumulators: i-th block of 16, upper or lower half. */
    __device__ __forceinline__ int query(int i, int half) const {
        return first_row + warp() * WARP_M + i * 16 + half * 8 + lane() / 4;
    }

    __device__ __forceinline__ void load_k(int tile, int stage) {
        load_tile<KTile, THREADS>(k_tiles + stage * STAGE_BYTES, place.k, args.k_stride.seq, tile * BLOCK_N, args.seq_k,
                                  args.head_dim, args.vector);
        ptx::cp_async_commit();
    }

    __device__ __forceinline__ void load_v(int tile, int stage) {
        if (OUTPUT)
            load_tile<KTile, THREADS>(k_tiles + stage * STAGE_BYTES + KTile::BYTES, place.v, args.v_stride.seq, tile * BLOCK_N,
                                      args.seq_k, args.head_dim_v, args.vector);
        ptx::cp_async_commit();
    }

    /* scores = Q K^T */
    __device__ __forceinline__ void multiply_scores(float (&scores)[MI][NI][4], uint32_t k_tile) {
        uint32_t q_lane = ptx::anew(lane_a<QTile>(q_tile) + warp() * WARP_M * QTile::PANEL * 2);
        uint32_t k_lane = ptx::anew(lane_b<KTile>(k_tile));
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int n = 0; n < NI; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) scores[i][n][e] = 0;
#pragma unroll
        for (int d = 0; d < DIM / 16; d++) {
            uint32_t a[MI][4];
#pragma unroll
            for (int i = 0; i < MI; i++) load_a<QTile>(a[i], q_lane, i * 16, 2 * d);
#pragma unroll
            for (int n = 0; n < NI; n += 2) {
                uint32_t b[4];
                load_b<KTile>(b, k_lane, n * 8, 2 * d);
#pragma unroll
                for (int i = 0; i < MI; i++) {
                    ptx::mma_16816<T>(scores[i][n], a[i], b[0], b[1]);
                    ptx::mma_16816<T>(scores[i][n + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

    /* Hides keys that do not exist, or that a row does not see. */
    __device__ __forceinline__ void mask(float (&scores)[MI][NI][4], int tile) {
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int left = visible_keys(args, query(i, half)) - tile * BLOCK_N - lane() % 4 * 2;
#pragma unroll
                for (int n = 0; n < NI; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (n * 8 + e >= left) scores[i][n][half * 2 + e] = -CUDART_INF_F;
            }
    }

    /* Takes the tile's scores into the running maximum, scales what is there by how far that moved, and turns the scores
     * into exponents of 2. A maximum that moved by less than 8 such exponents may stay: probabilities are then up to 2^8,
     * which every sum has room for. */
    __device__ __forceinline__ void update_maximum(float (&scores)[MI][NI][4]) {
        bool any_moved = false;
        float before[MI][2];
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float now = before[i][half] = row_max[i][half];
#pragma unroll
                for (int n = 0; n < NI; n++) now = fmaxf(now, fmaxf(scores[i][n][half * 2], scores[i][n][half * 2 + 1]));
                now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, 1));
                now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, 2));
                bool moved = (now - before[i][half]) * args.scale_log2 > LAZY;
                any_moved |= moved;
                row_max[i][half] = now = moved ? now : before[i][half];
                float offset = now == -CUDART_INF_F ? 0 : now * args.scale_log2; /* a row may have seen nothing yet */
#pragma unroll
                for (int n = 0; n < NI; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        scores[i][n][half * 2 + e] = fmaf(scores[i][n][half * 2 + e], args.scale_log2, -offset);
            }
        if (!__any_sync(0xffffffff, any_moved)) return;
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float now = row_max[i][half] == -CUDART_INF_F ? 0 : row_max[i][half];
                float factor = ptx::exp2_approx((before[i][half] - now) * args.scale_log2);
                row_sum[i][half] *= factor;
#pragma unroll
                for (int d = 0; d < DI; d++) out[i][d][half * 2] *= factor, out[i][d][half * 2 + 1] *= factor;
            }
    }

    /* scores become probabilities, in place, and are summed. */
    __device__ __forceinline__ void exponentiate(float (&scores)[MI][NI][4], int n) {
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float p = ptx::exp2_approx(scores[i][n][e]);
                scores[i][n][e] = p;
                row_sum[i][e / 2] += p;
            }
    }

    /* out += P V, 16 keys at a time, each exponentiated just before. */
    template <typename LoadNext>
    __device__ __forceinline__ void multiply_values(float (&scores)[MI][NI][4], uint32_t v_tile, LoadNext load_next) {
        uint32_t v_lane = ptx::anew(lane_a<KTile>(v_tile));
#pragma unroll
        for (int n = 0; n < NI; n += 2) {
            if (n == LOAD_AT) load_next();
            exponentiate(scores, n);
            exponentiate(scores, n + 1);
            uint32_t a[MI][4];
#pragma unroll
            for (int i = 0; i < MI; i++) {
                a[i][0] = pack<T>(scores[i][n][0], scores[i][n][1]);
                a[i][1] = pack<T>(scores[i][n][2], scores[i][n][3]);
                a[i][2] = pack<T>(scores[i][n + 1][0], scores[i][n + 1][1]);
                a[i][3] = pack<T>(scores[i][n + 1][2], scores[i][n + 1][3]);
            }
#pragma unroll
            for (int d = 0; d < DI; d += 2) {
                uint32_t b[4];
                load_b_trans<KTile>(b, v_lane, n * 8, d);
#pragma unroll
                for (int i = 0; i < MI; i++) {
                    ptx::mma_16816<T>(out[i][d], a[i], b[0], b[1]);
                    ptx::mma_16816<T>(out[i][d + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

    /* One tile of keys. With one stage K's buffer is filled anew under the second product, and V's under the first; with two
     * both are filled a tile ahead. */
    template <bool MASKED> __device__ __forceinline__ void step(int tile) {
        int stage = STAGES == 2 ? tile & 1 : 0;
        uint32_t k_tile = k_tiles + stage * STAGE_BYTES, v_tile = k_tile + KTile::BYTES;
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (STAGES == 1) {
            load_v(tile, 0);
        } else if (tile > 0) {
            load_k(tile - 1, stage ^ 1);
            load_v(tile - 1, stage ^ 1);
        }
        float scores[MI][NI][4];
        multiply_scores(scores, k_tile);
        if (MASKED) mask(scores, tile);
        update_maximum(scores);
        if (STAGES == 1) {
            ptx::cp_async_wait<0>();
            __syncthreads();
        }
        auto load_next = [&] {
            if (STAGES == 1 && tile > 0) load_k(tile - 1, 0);
        };
        if (OUTPUT) {
            multiply_values(scores, v_tile, load_next);
        } else {
            load_next();
#pragma unroll
            for (int n = 0; n < NI; n++) exponentiate(scores, n);
        }
    }

    /* Through shared memory, where a warp's rows of Q were: only that warp has read them. */
    __device__ __forceinline__ void store_output() {
        bool spoilt = false;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sum = row_sum[i][half], factor = sum == 0 ? 0 : 1 / sum;
                int row = warp() * WARP_M + i * 16 + half * 8 + lane() / 4;
#pragma unroll
                for (int d = 0; d < DI; d++) {
                    float low = out[i][d][half * 2] * factor, high = out[i][d][half * 2 + 1] * factor;
                    spoilt |= !(low == low) || !(high == high);
                    *reinterpret_cast<uint32_t *>(shared + QTile::offset(row, d) + lane() % 4 * 4) = pack<T>(low, high);
                }
            }
        __syncwarp();
        int batch = place.batch, head = place.head;
        T *o = row_of<T>(args.o, args.o_stride, batch, head, 0);
        store_tile<QTile>(shared, warp() * WARP_M, WARP_M, o, args.o_stride.seq, first_row + warp() * WARP_M, args.seq_q,
                          args.head_dim_v, args.vector, lane(), 32);
        if (args.causal && __any_sync(0xffffffff, spoilt))
            repair_rows<T>(args, batch, head, first_row + warp() * WARP_M, min(args.seq_q, first_row + (warp() + 1) * WARP_M));
    }

    __device__ __forceinline__ void run() {
        QueryBlock block = queries_of_block<BLOCK_M>(args);
        int batch = block.batch, head = block.head, head_kv = head / args.group;
        first_row = block.first_row;
        const T *q = row_of<T>(args.q, args.q_stride, batch, head, 0);
        if (threadIdx.x == 0) {
            place.k = row_of<T>(args.k, args.k_stride, batch, head_kv, 0);
            place.v = row_of<T>(args.v, args.v_stride, batch, head_kv, 0);
            place.batch = batch, place.head = head;
        }
        __syncthreads();

        int end = max(0, visible_keys(args, min(first_row + BLOCK_M, args.seq_q) - 1));
        int unmasked = max(0, visible_keys(args, first_row)) / BLOCK_N; /* tiles that every row sees whole */
        int tile = (end + BLOCK_N - 1) / BLOCK_N - 1;
        if (tile >= 0) { /* else Q is not waited for, and would be stored where the output is */
            load_tile<QTile, THREADS>(q_tile, q, args.q_stride.seq, first_row, args.seq_q, args.head_dim, args.vector);
            load_k(tile, STAGES == 2 ? tile & 1 : 0);
            if (STAGES == 2) load_v(tile, tile & 1);
            if (args.negative) {
                ptx::cp_async_wait<0>();
                __syncthreads();
                negate_tile<QTile, THREADS>(shared);
            }
        }
        for (; tile >= unmasked; tile--) step<true>(tile);
        for (; tile >= 0; tile--) step<false>(tile);
        ptx::cp_async_wait<0>();

#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                row_sum[i][half] += __shfl_xor_sync(0xffffffff, row_sum[i][half], 1);
                row_sum[i][half] += __shfl_xor_sync(0xffffffff, row_sum[i][half], 2);
                if (lane() % 4 != 0 || query(i, half) >= args.seq_q) continue;
                (OUTPUT ? store_lse : store_statistics)(args, place.batch, place.head, query(i, half), row_max[i][half],
                                                        row_sum[i][half]);
            }
        if (OUTPUT) store_output();
    }
};

} // namespace cuflash

#define KERNEL(kind, output, type, suffix, dim, block_m, block_n, stages, threads, blocks)                                     \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                                              \
        cuflash_mma_##kind##_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_attention_args args) {  \
        extern __shared__ __align__(128) unsigned char shared[];                                                               \
        __shared__ cuflash::Place<type> place;                                                                                 \
        cuflash::Forward<output, type, dim, block_m, block_n, stages, threads>(args, shared, place).run();                     \
    }
#define KERNELS(kind, output, dim, block_m, block_n, stages, threads, blocks)                                                  \
    KERNEL(kind, output, __half, f16, dim, block_m, block_n, stages, threads, blocks)                                          \
    KERNEL(kind, output, __nv_bfloat16, bf16, dim, block_m, block_n, stages, threads, blocks)
#define FORWARD(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                    \
    KERNELS(forward, true, dim, block_m, block_n, stages, threads, blocks)
#define STATISTICS(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                 \
    KERNELS(statistics, false, dim, block_m, block_n, stages, threads, blocks)
CUFLASH_MMA_FORWARD(FORWARD)
CUFLASH_MMA_STATISTICS(STATISTICS)
