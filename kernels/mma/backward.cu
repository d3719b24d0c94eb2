/* Attention backward by mma.sync, after Dao, "FlashAttention-2" (2023): a block keeps a tile of keys and walks the queries
 * that see it, of query heads of its KV head (common/walk.cuh). Scores and their gradients are made once, in registers, and
 * pass through shared memory to the three products that need them; dk and dv stay in registers, dq is added up in float32 in
 * device memory. */
#include <math_constants.h>

#include "attention.h"
#include "common/chosen.cuh"
#include "common/repair.cuh"
#include "common/row.cuh"
#include "common/turn.cuh"
#include "common/walk.cuh"
#include "mma/table.h"
#include "mma/tile.cuh"
#include "ptx/atomic.cuh"
#include "ptx/math.cuh"

namespace cuflash {

/* How the warps of a block share out a product: ROWS warps along its rows, the rest along its columns, 16 at a time in
 * turns. A warp's n-th block of 8 columns begins at column() + step(n); the two have no bits in common within a panel. */
template <int BLOCK_ROWS, int BLOCK_COLUMNS, int WARPS, int ROWS> struct Share {
    static constexpr int COLUMNS = WARPS / ROWS;
    static constexpr int WARP_ROWS = BLOCK_ROWS / ROWS, WARP_COLUMNS = BLOCK_COLUMNS / COLUMNS;
    static constexpr int MI = WARP_ROWS / 16, NI = WARP_COLUMNS / 8;
    static_assert(WARP_ROWS % 16 == 0 && WARP_COLUMNS % 16 == 0, "whole blocks of 16x16");
    static __device__ __forceinline__ int row() {
        return threadIdx.x / 32 % ROWS * WARP_ROWS;
    }
    static __device__ __forceinline__ int column() {
        return threadIdx.x / 32 / ROWS * 16;
    }
    static __device__ __forceinline__ constexpr int step(int n) {
        return n / 2 * COLUMNS * 16 + n % 2 * 8;
    }
};

template <typename T, int DIM, int BLOCK_M, int BLOCK_N, int STAGES, int THREADS> struct Backward {
    static constexpr int WARPS = THREADS / 32;
    using QTile = Tile<BLOCK_M, DIM>; /* and dO's */
    using KTile = Tile<BLOCK_N, DIM>; /* and V's */
    using STile = Tile<BLOCK_M, BLOCK_N>;
    /* Squarish pieces: fewest fragments to load. */
    using Scores = Share<BLOCK_M, BLOCK_N, WARPS, WARPS == 8 && (BLOCK_M == 128 || BLOCK_N == 64) ? 4 : 2>;
    using Keys = Share<BLOCK_N, DIM, WARPS, WARPS == 8 && BLOCK_N == 128 ? 4 : 2>;
    using Queries = Share<BLOCK_M, DIM, WARPS, WARPS == 8 && (BLOCK_M == 128 || DIM % 64 != 0) ? 4 : 2>;
    static constexpr int V_AT = KTile::BYTES, Q_AT = 2 * KTile::BYTES, STAGE_BYTES = 2 * QTile::BYTES,
                         P_AT = Q_AT + STAGES * STAGE_BYTES, DS_AT = P_AT + STile::BYTES;

    const cuflash_attention_args &args;
    unsigned char *shared;
    uint32_t base;
    int lane;
    Route walk;

    float dk[Keys::MI][Keys::NI][4] = {}, dv[Keys::MI][Keys::NI][4] = {};

    __device__ __forceinline__ Backward(const cuflash_attention_args &args, unsigned char *shared)
        : args(args), shared(shared), base(ptx::shared_address(shared)), lane(threadIdx.x % 32),
          walk(walk_of<BLOCK_M, BLOCK_N>(args, blockIdx.x)) {
    }

    /* c += A B; load_left and load_right load fragments at a row or column and a 16-element step of k. */
    template <typename Share, int K, typename LoadA, typename LoadB>
    static __device__ __forceinline__ void multiply(float (&c)[Share::MI][Share::NI][4], LoadA load_left, LoadB load_right) {
        constexpr int MI = Share::MI, NI = Share::NI;
#pragma unroll
        for (int k = 0; k < K / 16; k++) {
            uint32_t a[MI][4];
#pragma unroll
            for (int i = 0; i < MI; i++) load_left(a[i], i * 16, k);
#pragma unroll
            for (int n = 0; n < NI; n += 2) {
                uint32_t b[4];
                load_right(b, Share::step(n), k);
#pragma unroll
                for (int i = 0; i < MI; i++) {
                    ptx::mma_16816<T>(c[i][n], a[i], b[0], b[1]);
                    ptx::mma_16816<T>(c[i][n + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

    __device__ __forceinline__ void load_queries(int head, int tile, int stage) {
        uint32_t to = base + Q_AT + stage * STAGE_BYTES;
        const T *q = row_of<T>(args.q, args.q_stride, walk.batch, head, 0),
                *d_o = row_of<T>(args.d_o, args.d_o_stride, walk.batch, head, 0);
        load_tile<QTile, THREADS>(to, q, args.q_stride.seq, tile * BLOCK_M, args.seq_q, args.head_dim, args.vector);
        load_tile<QTile, THREADS>(to + QTile::BYTES, d_o, args.d_o_stride.seq, tile * BLOCK_M, args.seq_q, args.head_dim_v,
                                  args.vector);
        ptx::cp_async_commit();
    }

    /* c = rows of the tile at `left` times rows of the tile at `right`, transposed, less a number of each row: Q K^T or dO
     * V^T. */
    __device__ __forceinline__ void multiply_rows(float (&c)[Scores::MI][Scores::NI][4], uint32_t left, uint32_t right,
                                                  const float (&less)[Scores::MI][2]) {
#pragma unroll
        for (int i = 0; i < Scores::MI; i++)
#pragma unroll
            for (int n = 0; n < Scores::NI; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) c[i][n][e] = -less[i][e / 2];
        uint32_t a = ptx::anew(lane_a<QTile>(left) + Scores::row() * QTile::PANEL * 2);
        uint32_t b = ptx::anew(lane_b<KTile>(right) + Scores::column() * KTile::PANEL * 2);
        multiply<Scores, DIM>(
            c, [&](uint32_t(&r)[4], int row, int k) { load_a<QTile>(r, a, row, 2 * k); },
            [&](uint32_t(&r)[4], int row, int k) { load_b<KTile>(r, b, row, 2 * k); });
    }

    /* dk or dv += X^T Y: X is the tile of P or dS, Y that of Q or dO. */
    __device__ __forceinline__ void add_keys(float (&c)[Keys::MI][Keys::NI][4], uint32_t x, uint32_t y) {
        uint32_t a = ptx::anew(block_address<STile>(lane_b<STile>(x), 0, Keys::row() / 8));
        uint32_t b = ptx::anew(block_address<QTile>(lane_a<QTile>(y), 0, Keys::column() / 8));
        multiply<Keys, BLOCK_M>(
            c, [&](uint32_t(&r)[4], int column, int k) { load_a_trans<STile>(r, a, k * 16, column / 8); },
            [&](uint32_t(&r)[4], int column, int k) { load_b_trans<QTile>(r, b, k * 16, column / 8); });
    }

    /* dq of the tile: dS K, added to dq_sum. */
    __device__ __forceinline__ void add_queries(float *sum) {
        float c[Queries::MI][Queries::NI][4] = {};
        uint32_t a = ptx::anew(lane_a<STile>(base + DS_AT) + Queries::row() * STile::PANEL * 2);
        uint32_t b = ptx::anew(block_address<KTile>(lane_a<KTile>(base), 0, Queries::column() / 8));
        multiply<Queries, BLOCK_N>(
            c, [&](uint32_t(&r)[4], int row, int k) { load_a<STile>(r, a, row, 2 * k); },
            [&](uint32_t(&r)[4], int column, int k) { load_b_trans<KTile>(r, b, k * 16, column / 8); });
        sum += (threadIdx.x / 32) * (Queries::MI * Queries::NI * 128);
#pragma unroll
        for (int i = 0; i < Queries::MI; i++) add_fours(sum + i * Queries::NI * 128, lane, c[i], args.turn != nullptr);
    }

    /* The warp's part of P or dS, to shared memory. */
    __device__ __forceinline__ void put(int at, const float (&c)[Scores::MI][Scores::NI][4]) {
        int row = Scores::row() + lane / 4, chunk = Scores::column() / 8;
        uint32_t to = ptx::anew(base + at + STile::offset(row, chunk) + lane % 4 * 4);
#pragma unroll
        for (int i = 0; i < Scores::MI; i++)
#pragma unroll
            for (int n = 0; n < Scores::NI; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    ptx::store_shared(block_address<STile>(to, i * 16 + half * 8, Scores::step(n) / 8),
                                      pack<T>(c[i][n][half * 2], c[i][n][half * 2 + 1]));
    }

    /* Clears what a query does not see, or what is no key. */
    __device__ __forceinline__ void mask(float (&c)[Scores::MI][Scores::NI][4], int tile) {
#pragma unroll
        for (int i = 0; i < Scores::MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int query = tile * BLOCK_M + Scores::row() + i * 16 + half * 8 + lane / 4;
                int left = visible_keys(args, query) - walk.first_key - Scores::column() - lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < Scores::NI; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (Scores::step(n) + e >= left) c[i][n][half * 2 + e] = 0;
            }
    }

    /* What a row's scores are made to probabilities with, and its delta. */
    __device__ __forceinline__ void load_rows(float (&offset)[Scores::MI][2], float (&delta)[Scores::MI][2], int head,
                                              int tile) {
#pragma unroll
        for (int i = 0; i < Scores::MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int64_t row = row_number(args, walk.batch, head, tile * BLOCK_M + Scores::row() + i * 16 + half * 8 + lane / 4);
                offset[i][half] = args.row_offset[row];
                delta[i][half] = args.row_delta[row];
            }
    }

    __device__ __forceinline__ void exponentiate(float (&p)[Scores::MI][Scores::NI][4], const float (&offset)[Scores::MI][2]) {
        float factor = args.negative ? -args.scale_log2 : args.scale_log2;
#pragma unroll
        for (int i = 0; i < Scores::MI; i++)
#pragma unroll
            for (int n = 0; n < Scores::NI; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) p[i][n][e] = ptx::exp2_approx(fmaf(p[i][n][e], factor, -offset[i][e / 2]));
    }

    /* P and dS of the tile, to shared memory. */
    template <bool MASKED> __device__ __forceinline__ void make_scores(int head, int tile, int stage) {
        uint32_t q_tile = base + Q_AT + stage * STAGE_BYTES;
        float offset[Scores::MI][2], delta[Scores::MI][2];
        const float zero[Scores::MI][2] = {};
        load_rows(offset, delta, head, tile);
        float p[Scores::MI][Scores::NI][4], ds[Scores::MI][Scores::NI][4];
        multiply_rows(p, q_tile, base, zero);
        exponentiate(p, offset);
        if (MASKED) mask(p, tile);
        put(P_AT, p);
        multiply_rows(ds, q_tile + QTile::BYTES, base + V_AT, delta);
#pragma unroll
        for (int i = 0; i < Scores::MI; i++)
#pragma unroll
            for (int n = 0; n < Scores::NI; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) ds[i][n][e] *= p[i][n][e];
        if (MASKED) mask(ds, tile);
        put(DS_AT, ds);
    }

    /* dk or dv of the block, through the shared memory of K or V. */
    __device__ __forceinline__ void store(const float (&c)[Keys::MI][Keys::NI][4], int at, float factor, void *array,
                                          const cuflash_kernel_strides &stride, int dim) {
        if (!array) return;
#pragma unroll
        for (int i = 0; i < Keys::MI; i++)
#pragma unroll
            for (int n = 0; n < Keys::NI; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int row = Keys::row() + i * 16 + half * 8 + lane / 4, column = Keys::column() + Keys::step(n);
                    *reinterpret_cast<uint32_t *>(shared + at + KTile::offset(row, column / 8) + lane % 4 * 4) =
                        pack<T>(c[i][n][half * 2] * factor, c[i][n][half * 2 + 1] * factor);
                }
        __syncthreads();
        T *to = row_of<T>(array, stride, walk.batch, head_kv_of(args, walk.unit), 0);
        store_tile<KTile>(shared + at, 0, BLOCK_N, to, stride.seq, walk.first_key, args.seq_k, dim, args.vector, threadIdx.x,
                          THREADS);
    }

    /* The block's share of dk or dv. */
    __device__ __forceinline__ void store_part(const float (&c)[Keys::MI][Keys::NI][4], float *parts) {
        if (!parts) return;
        float *rows = partial_rows<BLOCK_N>(args, parts, walk.unit, walk.first_key / BLOCK_N) + (Keys::row() + lane / 4) * DIM +
                      Keys::column() + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < Keys::MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int n = 0; n < Keys::NI; n++)
                    *reinterpret_cast<float2 *>(rows + (i * 16 + half * 8) * DIM + Keys::step(n)) =
                        make_float2(c[i][n][half * 2], c[i][n][half * 2 + 1]);
    }

    __device__ __forceinline__ void run() {
        int tiles_m = args.rows / BLOCK_M, tile = walk.tile, head = walk.head, stage = 0;
        const T *k = row_of<T>(args.k, args.k_stride, walk.batch, head_kv_of(args, walk.unit), 0),
                *v = row_of<T>(args.v, args.v_stride, walk.batch, head_kv_of(args, walk.unit), 0);
        if (walk.steps > 0) {
            load_tile<KTile, THREADS>(base, k, args.k_stride.seq, walk.first_key, args.seq_k, args.head_dim, args.vector);
            load_tile<KTile, THREADS>(base + V_AT, v, args.v_stride.seq, walk.first_key, args.seq_k, args.head_dim_v,
                                      args.vector);
            load_queries(head, tile, 0);
        }
        for (int left = walk.steps; left > 0; left--) {
            /* One of the walk's numbers is kept in a register, the other computed when it is needed; which, measurement
             * says. */
            bool masked = DIM > 128 ? tile * BLOCK_M < first_query(args, walk.first_key + BLOCK_N - 1) ||
                                          walk.first_key + BLOCK_N > args.seq_k
                                    : tile < walk.unmasked;
            int this_head = head, this_tile = tile;
            if (++tile == tiles_m) tile = DIM > 128 ? walk.first_tile : first_query(args, walk.first_key) / BLOCK_M, head++;
            ptx::cp_async_wait<0>();
            __syncthreads();
            if (STAGES == 2 && left > 1) load_queries(head, tile, stage ^ 1);
            if (masked)
                make_scores<true>(this_head, this_tile, stage);
            else
                make_scores<false>(this_head, this_tile, stage);
            __syncthreads();
            uint32_t q_tile = base + Q_AT + stage * STAGE_BYTES;
            add_keys(dv, base + P_AT, q_tile + QTile::BYTES);
            if (args.dq_sum) {
                int64_t slab = static_cast<int64_t>(walk.batch) * args.heads + this_head;
                int32_t *turn = args.turn ? args.turn + slab * tiles_m + this_tile : nullptr;
                int keys = tiles_of_keys<BLOCK_M, BLOCK_N>(args, this_tile);
                int place = place_of(args, walk.unit, keys, walk.first_key / BLOCK_N);
                if (turn) await_turn(turn, place);
                add_queries(args.dq_sum + (slab * tiles_m + this_tile) * (BLOCK_M * DIM));
                if (turn) end_turn(turn, place);
            }
            add_keys(dk, base + DS_AT, q_tile);
            if (STAGES == 2) {
                stage ^= 1;
            } else if (left > 1) {
                __syncthreads();
                load_queries(head, tile, 0);
            }
        }
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (walk.partial) {
            store_part(dv, args.dv ? args.dv_parts : nullptr);
            store_part(dk, args.dk ? args.dk_parts : nullptr);
            return;
        }
        store(dv, V_AT, 1, args.dv, args.dv_stride, args.head_dim_v);
        store(dk, 0, args.scale, args.dk, args.dk_stride, args.head_dim);
        if (!args.causal) return;
        __syncthreads();
        for (int row = threadIdx.x / 32; row < BLOCK_N && walk.first_key + row < args.seq_k; row += WARPS) {
            bool spoilt = args.dk && row_has_nan<KTile, T>(shared, row);
            spoilt |= args.dv && row_has_nan<KTile, T>(shared + V_AT, row);
            if (spoilt) repair_dk_dv_row<T>(args, walk.batch, head_kv_of(args, walk.unit), walk.first_key + row);
        }
    }
};

/* dq of a tile of queries from its sum. */
template <typename T, int DIM, int BLOCK_M, int BLOCK_N, int STAGES, int THREADS>
__device__ __forceinline__ void finish(const cuflash_attention_args &args) {
    using Main = Backward<T, DIM, BLOCK_M, BLOCK_N, STAGES, THREADS>;
    using Queries = typename Main::Queries;
    using QTile = typename Main::QTile;
    __shared__ __align__(128) unsigned char shared[QTile::BYTES];
    int tiles = args.rows / BLOCK_M, tile = blockIdx.x % tiles, pair = blockIdx.x / tiles;
    int batch = pair / args.heads, head = pair % args.heads, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float *sum = args.dq_sum + (static_cast<int64_t>(pair) * args.rows + tile * BLOCK_M) * args.dim_padded +
                       warp * (Queries::MI * Queries::NI * 128);
#pragma unroll
    for (int i = 0; i < Queries::MI; i++)
#pragma unroll
        for (int n = 0; n < Queries::NI; n++) {
            float c[4];
            ptx::load_4(c, sum + (i * Queries::NI + n) * 128, lane);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = Queries::row() + i * 16 + half * 8 + lane / 4, column = Queries::column() + Queries::step(n);
                *reinterpret_cast<uint32_t *>(shared + QTile::offset(row, column / 8) + lane % 4 * 4) =
                    pack<T>(c[half * 2] * args.scale, c[half * 2 + 1] * args.scale);
            }
        }
    __syncthreads();
    T *dq = row_of<T>(args.dq, args.dq_stride, batch, head, 0);
    store_tile<QTile>(shared, 0, BLOCK_M, dq, args.dq_stride.seq, tile * BLOCK_M, args.seq_q, args.head_dim, args.vector,
                      threadIdx.x, THREADS);
    if (!args.causal) return;
    __syncthreads();
    for (int row = warp; row < BLOCK_M && tile * BLOCK_M + row < args.seq_q; row += THREADS / 32)
        if (row_has_nan<QTile, T>(shared, row)) repair_dq_row<T>(args, batch, head, tile * BLOCK_M + row);
}

} // namespace cuflash

#define KERNEL(chosen, type, suffix, dim, block_m, block_n, stages, threads, blocks)                                           \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                                              \
        cuflash_mma_backward_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_attention_args args) {  \
        extern __shared__ __align__(128) unsigned char shared[];                                                               \
        CUFLASH_IF_CHOSEN(chosen, cuflash::Backward<type, dim, block_m, block_n, stages, threads>(args, shared).run())         \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                                              \
        cuflash_mma_finish_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_attention_args args) {    \
        CUFLASH_IF_CHOSEN(chosen, cuflash::finish<type, dim, block_m, block_n, stages, threads>(args))                         \
    }
constexpr cuflash::RowSize rows[] = {CUFLASH_MMA_BACKWARD(CUFLASH_ROW_SIZE)};
#define KERNELS(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                    \
    KERNEL(cuflash::is_chosen(rows, dim, smem_bytes), __half, f16, dim, block_m, block_n, stages, threads, blocks)             \
    KERNEL(cuflash::is_chosen(rows, dim, smem_bytes), __nv_bfloat16, bf16, dim, block_m, block_n, stages, threads, blocks)
CUFLASH_MMA_BACKWARD(KERNELS)
