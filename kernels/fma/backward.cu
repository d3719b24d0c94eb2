/* Attention backward by float32 multiply-adds, after Dao, "FlashAttention-2" (2023), for every architecture.
 *
 * A block keeps a tile of keys and walks the queries that see it, of query heads of its KV head (common/walk.cuh). A warp
 * owns WARP_N keys, as rows: of the transposed scores and their gradients, and of dk and dv, which stay in registers; a
 * thread has MI keys and every 16th query or column. P and then dS go through the warp's own rows of shared memory to the
 * products with dO and Q; dQ = dS K is shared out over the whole block, and added up in float32 in device memory. */
#include <math_constants.h>

#include "attention.h"
#include "common/chosen.cuh"
#include "common/repair.cuh"
#include "common/row.cuh"
#include "common/turn.cuh"
#include "common/walk.cuh"
#include "fma/table.h"
#include "fma/tile.cuh"
#include "ptx/atomic.cuh"
#include "ptx/math.cuh"

namespace cuflash {

/* dQ of a tile of queries is made in pieces of 4 QI queries x 32 columns, a warp at a time: a thread has QI queries, four
 * neighbours and (if QI is 8) four more 16 further, of four columns. In dq_sum a piece is QI x 128 floats. */
template <int DIM, int BLOCK_M> struct Pieces {
    static constexpr int QI = BLOCK_M < 32 ? 4 : 8, HEIGHT = 4 * QI;
    static constexpr int COLUMNS = DIM / 32, COUNT = BLOCK_M / HEIGHT * COLUMNS;
    static_assert(BLOCK_M % HEIGHT == 0, "whole pieces");
    static __device__ __forceinline__ int query(int piece, int i) {
        return piece / COLUMNS * HEIGHT + i / 4 * 16 + threadIdx.x % 32 / 8 * 4 + i % 4;
    }
    static __device__ __forceinline__ int column(int piece) {
        return piece % COLUMNS * 32 + threadIdx.x % 8 * 4;
    }
};

template <typename T, int DIM, int BLOCK_M, int BLOCK_N, int THREADS> struct Backward {
    static constexpr int WARPS = THREADS / 32, WARP_N = BLOCK_N / WARPS, ROW_LANES = 2, COL_LANES = 16;
    static constexpr int MI = WARP_N / ROW_LANES, NI = BLOCK_M / COL_LANES, DI = DIM / COL_LANES;
    static_assert(MI >= 1 && NI >= 1, "every thread has keys and queries");
    using Row = Owned<MI, ROW_LANES>;
    using Gradient = Columns<DI, COL_LANES>;
    using Dq = Pieces<DIM, BLOCK_M>;

    const cuflash_attention_args &args;
    float *k_tile, *v_tile, *q_tile, *do_tile, *p_tile; /* v_tile is transposed; p_tile: P, then dS transposed */
    Route walk;
    int warp, row_lane, col_lane;

    float dk[MI][DI] = {}, dv[MI][DI] = {};

    __device__ __forceinline__ Backward(const cuflash_attention_args &args, float *shared)
        : args(args), k_tile(shared), v_tile(k_tile + BLOCK_N * DIM), q_tile(v_tile + BLOCK_N * DIM),
          do_tile(q_tile + BLOCK_M * DIM), p_tile(do_tile + BLOCK_M * DIM), walk(walk_of<BLOCK_M, BLOCK_N>(args, blockIdx.x)),
          warp(threadIdx.x / 32), row_lane(threadIdx.x % 32 / COL_LANES), col_lane(threadIdx.x % COL_LANES) {
    }

    /* The first of the thread's keys within the block. */
    __device__ __forceinline__ int own_row() const {
        return warp * WARP_N + row_lane * MI;
    }

    __device__ __forceinline__ void load_queries(int head, int tile) {
        const T *q = row_of<T>(args.q, args.q_stride, walk.batch, head, 0),
                *d_o = row_of<T>(args.d_o, args.d_o_stride, walk.batch, head, 0);
        load_tile<BLOCK_M, DIM, Interleaved, THREADS>(q_tile, q, args.q_stride.seq, tile * BLOCK_M, args.seq_q, 0,
                                                      args.head_dim, args.vector);
        load_tile<BLOCK_M, DIM, Interleaved, THREADS>(do_tile, d_o, args.d_o_stride.seq, tile * BLOCK_M, args.seq_q, 0,
                                                      args.head_dim_v, args.vector);
        ptx::cp_async_commit();
    }

    __device__ __forceinline__ const float *queries_of(const float *tile, int panel) const {
        return tile + (panel * BLOCK_M + col_lane) * 32;
    }

    /* K Q^T */
    __device__ __forceinline__ void multiply_scores(float (&c)[MI][NI]) {
#pragma unroll 1
        for (int panel = 0; panel < DIM / 32; panel++)
            multiply_panel<COL_LANES>(c, k_tile + (panel * BLOCK_N + own_row()) * 32, Row::of(own_row()),
                                      queries_of(q_tile, panel), Interleaved::of(col_lane));
    }

    /* V dO^T */
    __device__ __forceinline__ void multiply_values(float (&c)[MI][NI]) {
#pragma unroll 1
        for (int panel = 0; panel < DIM / 32; panel++)
            multiply_transposed<BLOCK_N, COL_LANES, false>(c, v_tile + panel * 32 * BLOCK_N + own_row(),
                                                           queries_of(do_tile, panel), Interleaved::of(col_lane));
    }

    /* dv += P^T dO, P by way of p_tile. */
    __device__ __forceinline__ void add_values(const float (&p)[MI][NI]) {
        store_transposed<BLOCK_N, COL_LANES>(p_tile, p, own_row(), col_lane);
        __syncwarp();
        multiply_outer_transposed<BLOCK_N, BLOCK_M, BLOCK_M, COL_LANES, Interleaved>(dv, p_tile, own_row(), 0, do_tile,
                                                                                     col_lane);
    }

    /* dk += dS^T Q, dS^T by way of p_tile, where it stays for dQ. */
    __device__ __forceinline__ void add_keys(const float (&ds)[MI][NI]) {
        int key = Row::of(own_row());
        float *to = p_tile + own_row() * 32;
#pragma unroll
        for (int n = 0; n < NI; n++) {
            int column = n * COL_LANES + col_lane;
#pragma unroll
            for (int i = 0; i < MI; i++) to[i * 32 + chunk_at<BLOCK_N>(0, column / 4, key) + column % 4] = ds[i][n];
        }
        __syncwarp();
        multiply_outer<BLOCK_N, BLOCK_M, BLOCK_M, COL_LANES, Interleaved>(dk, to, key, 0, q_tile, col_lane);
    }

    /* P^T and dS^T of a tile. */
    __device__ __forceinline__ void make_scores(float (&p)[MI][NI], float (&ds)[MI][NI], int head, int tile, bool masked) {
        float max[NI], log[NI];
#pragma unroll
        for (int n = 0; n < NI; n++) {
            int64_t row = row_number(args, walk.batch, head, tile * BLOCK_M + n * COL_LANES + col_lane);
            float delta = args.row_delta[row];
            max[n] = args.row_max[row], log[n] = args.row_log[row];
#pragma unroll
            for (int i = 0; i < MI; i++) p[i][n] = 0, ds[i][n] = -delta;
        }
        float sign = args.negative ? -1 : 1;
        multiply_scores(p);
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int n = 0; n < NI; n++)
                p[i][n] = ptx::exp2_approx(fmaf(fmaf(p[i][n], sign, -max[n]), args.scale_log2, -log[n]));
        multiply_values(ds);
#pragma unroll
        for (int n = 0; n < NI; n++)
#pragma unroll
            for (int i = 0; i < MI; i++) ds[i][n] *= p[i][n];
        if (!masked) return;
#pragma unroll
        for (int n = 0; n < NI; n++) {
            int visible = visible_keys(args, tile * BLOCK_M + n * COL_LANES + col_lane) - walk.first_key - own_row();
#pragma unroll
            for (int i = 0; i < MI; i++)
                if (i >= visible) p[i][n] = ds[i][n] = 0;
        }
    }

    /* dS K, added to dq_sum. */
    __device__ __forceinline__ void add_queries(float *sum) {
        int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int piece = warp; piece < Dq::COUNT; piece += WARPS) {
            float c[Dq::QI][4] = {};
            int chunk = lane % 8;
            const float *ds = p_tile + piece / Dq::COLUMNS * Dq::HEIGHT / 32 * BLOCK_N * 32;
            const float *k = k_tile + piece % Dq::COLUMNS * BLOCK_N * 32;
#pragma unroll 4
            for (int row = 0; row < BLOCK_N; row++) {
                int key = Row::of(row);
                float4 b = four(k + row * 32 + (chunk ^ key) * 4);
#pragma unroll
                for (int i = 0; i < Dq::QI; i += 4) {
                    float4 a = four(ds + row * 32 + ((lane / 8 + i) ^ key) * 4);
                    c[i][0] = fmaf(a.x, b.x, c[i][0]), c[i][1] = fmaf(a.x, b.y, c[i][1]);
                    c[i][2] = fmaf(a.x, b.z, c[i][2]), c[i][3] = fmaf(a.x, b.w, c[i][3]);
                    c[i + 1][0] = fmaf(a.y, b.x, c[i + 1][0]), c[i + 1][1] = fmaf(a.y, b.y, c[i + 1][1]);
                    c[i + 1][2] = fmaf(a.y, b.z, c[i + 1][2]), c[i + 1][3] = fmaf(a.y, b.w, c[i + 1][3]);
                    c[i + 2][0] = fmaf(a.z, b.x, c[i + 2][0]), c[i + 2][1] = fmaf(a.z, b.y, c[i + 2][1]);
                    c[i + 2][2] = fmaf(a.z, b.z, c[i + 2][2]), c[i + 2][3] = fmaf(a.z, b.w, c[i + 2][3]);
                    c[i + 3][0] = fmaf(a.w, b.x, c[i + 3][0]), c[i + 3][1] = fmaf(a.w, b.y, c[i + 3][1]);
                    c[i + 3][2] = fmaf(a.w, b.z, c[i + 3][2]), c[i + 3][3] = fmaf(a.w, b.w, c[i + 3][3]);
                }
            }
            add_fours(sum + piece * Dq::QI * 128, lane, c, args.turn != nullptr);
        }
    }

    /* One tile of queries. The next one is loaded under the product that needs none of them. */
    template <typename LoadNext> __device__ __forceinline__ void step(int head, int tile, bool masked, LoadNext load_next) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        float p[MI][NI], ds[MI][NI];
        make_scores(p, ds, head, tile, masked);
        add_values(p);
        __syncthreads();
        add_keys(ds);
        __syncthreads();
        load_next();
        if (!args.dq_sum) return;
        int64_t number =
            (static_cast<int64_t>(walk.batch) * args.heads + head) * (args.rows / BLOCK_M) + tile; /* of the tile of queries */
        int place = place_of(args, walk.unit, tiles_of_keys<BLOCK_M, BLOCK_N>(args, tile), walk.first_key / BLOCK_N);
        if (args.turn) await_turn(args.turn + number, place);
        add_queries(args.dq_sum + number * (BLOCK_M * DIM));
        if (args.turn) end_turn(args.turn + number, place);
    }

    /* The thread's rows of dk or dv; says which of them hold a NaN, a bit a row. */
    __device__ __forceinline__ unsigned store(const float (&c)[MI][DI], float factor, void *array,
                                              const cuflash_kernel_strides &stride, int dim) {
        unsigned spoilt = 0;
        if (!array) return 0;
#pragma unroll
        for (int i = 0; i < MI; i++) {
            int key = walk.first_key + own_row() + i;
            if (key >= args.seq_k) continue;
            T *row = row_of<T>(array, stride, walk.batch, head_kv_of(args, walk.unit), key);
#pragma unroll
            for (int piece = 0; piece < Gradient::PIECES; piece++) {
                float x[Gradient::VEC];
#pragma unroll
                for (int e = 0; e < Gradient::VEC; e++) {
                    x[e] = c[i][piece * Gradient::VEC + e] * factor;
                    if (x[e] != x[e]) spoilt |= 1u << (row_lane * MI + i);
                }
                store_some<Gradient::VEC>(row, Gradient::column(col_lane, piece), dim, args.vector, x);
            }
        }
        return spoilt;
    }

    /* The block's share of dk or dv. */
    __device__ __forceinline__ void store_part(const float (&c)[MI][DI], float *parts) {
        if (!parts) return;
        float *rows = partial_rows<BLOCK_N>(args, parts, walk.unit, walk.first_key / BLOCK_N) + own_row() * DIM;
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int piece = 0; piece < Gradient::PIECES; piece++)
                store_some<Gradient::VEC>(rows + i * DIM, Gradient::column(col_lane, piece), DIM, true,
                                          &c[i][piece * Gradient::VEC]);
    }

    __device__ __forceinline__ void run() {
        int tiles_m = args.rows / BLOCK_M, tile = walk.tile, head = walk.head;
        if (walk.steps > 0) {
            load_tile<BLOCK_N, DIM, Row, THREADS>(k_tile,
                                                  row_of<T>(args.k, args.k_stride, walk.batch, head_kv_of(args, walk.unit), 0),
                                                  args.k_stride.seq, walk.first_key, args.seq_k, 0, args.head_dim, args.vector);
            load_transposed<BLOCK_N, DIM, THREADS>(v_tile,
                                                   row_of<T>(args.v, args.v_stride, walk.batch, head_kv_of(args, walk.unit), 0),
                                                   args.v_stride.seq, walk.first_key, args.seq_k, args.head_dim_v, args.vector);
            load_queries(head, tile);
        }
        for (int left = walk.steps; left > 0; left--) {
            int next_head = tile + 1 < tiles_m ? head : head + 1, next_tile = tile + 1 < tiles_m ? tile + 1 : walk.first_tile;
            auto load_next = [&] {
                if (left > 1) load_queries(next_head, next_tile);
            };
            step(head, tile, tile < walk.unmasked, load_next);
            head = next_head, tile = next_tile;
        }
        if (walk.partial) {
            store_part(dv, args.dv ? args.dv_parts : nullptr);
            store_part(dk, args.dk ? args.dk_parts : nullptr);
            return;
        }
        unsigned spoilt = store(dv, 1, args.dv, args.dv_stride, args.head_dim_v);
        spoilt |= store(dk, args.scale, args.dk, args.dk_stride, args.head_dim);
        if (!args.causal) return;
        spoilt = any_lane(spoilt);
        __syncwarp();
        for (int row = 0; row < WARP_N; row++)
            if (spoilt >> row & 1)
                repair_dk_dv_row<T>(args, walk.batch, head_kv_of(args, walk.unit), walk.first_key + warp * WARP_N + row);
    }

    static __device__ __forceinline__ unsigned any_lane(unsigned x) {
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) x |= __shfl_xor_sync(0xffffffff, x, mask);
        return x;
    }
};

/* dq of a tile of queries from its sum. */
template <typename T, int DIM, int BLOCK_M, int THREADS>
__device__ __forceinline__ void finish(const cuflash_attention_args &args) {
    using Dq = Pieces<DIM, BLOCK_M>;
    __shared__ bool spoilt[BLOCK_M];
    int tiles = args.rows / BLOCK_M, tile = blockIdx.x % tiles, pair = blockIdx.x / tiles;
    int batch = pair / args.heads, head = pair % args.heads, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float *sum = args.dq_sum + (static_cast<int64_t>(pair) * args.rows + tile * BLOCK_M) * DIM;
    for (int row = threadIdx.x; row < BLOCK_M; row += THREADS) spoilt[row] = false;
    __syncthreads();
    for (int piece = warp; piece < Dq::COUNT; piece += THREADS / 32)
#pragma unroll
        for (int i = 0; i < Dq::QI; i++) {
            int row = Dq::query(piece, i), query = tile * BLOCK_M + row;
            float c[4];
            ptx::load_4(c, sum + (piece * Dq::QI + i) * 128, lane);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                c[e] *= args.scale;
                if (c[e] != c[e]) spoilt[row] = true;
            }
            if (query < args.seq_q)
                store_some<4>(row_of<T>(args.dq, args.dq_stride, batch, head, query), Dq::column(piece), args.head_dim,
                              args.vector, c);
        }
    if (!args.causal) return;
    __syncthreads();
    for (int row = warp; row < BLOCK_M && tile * BLOCK_M + row < args.seq_q; row += THREADS / 32)
        if (spoilt[row]) repair_dq_row<T>(args, batch, head, tile * BLOCK_M + row);
}

} // namespace cuflash

#define KERNEL(chosen, type, suffix, dim, block_m, block_n, threads, blocks)                                                   \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                                              \
        cuflash_fma_backward_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_attention_args args) {  \
        extern __shared__ __align__(128) float shared[];                                                                       \
        CUFLASH_IF_CHOSEN(chosen, cuflash::Backward<type, dim, block_m, block_n, threads>(args, shared).run())                 \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                                              \
        cuflash_fma_finish_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_attention_args args) {    \
        CUFLASH_IF_CHOSEN(chosen, cuflash::finish<type, dim, block_m, threads>(args))                                          \
    }
#ifdef CUFLASH_HALF
#define KERNELS(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                    \
    KERNEL(true, __half, f16, dim, block_m, block_n, threads, blocks)                                                          \
    KERNEL(true, __nv_bfloat16, bf16, dim, block_m, block_n, threads, blocks)
CUFLASH_FMA_HALF_BACKWARD(KERNELS)
#else
constexpr cuflash::RowSize rows[] = {CUFLASH_FMA_BACKWARD(CUFLASH_ROW_SIZE)};
#define KERNELS(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                    \
    KERNEL(cuflash::is_chosen(rows, dim, smem_bytes), float, f32, dim, block_m, block_n, threads, blocks)
CUFLASH_FMA_BACKWARD(KERNELS)
#endif
