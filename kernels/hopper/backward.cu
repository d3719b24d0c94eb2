/* Attention backward on Hopper: the kernels of the launch table, and those that end dq after them. */
#include "hopper/narrow.cuh"
#include "hopper/wide.cuh"

namespace cuflash {

template <typename T, int DIM, int BLOCK_M, int BLOCK_N, int STAGES>
__device__ __forceinline__ void run_backward(const cuflash_hopper_args &args, uint32_t shared) {
    if constexpr (DIM > 128)
        WideBackward<T, DIM, BLOCK_M, BLOCK_N, STAGES>(args, shared).run();
    else
        NarrowBackward<T, DIM, BLOCK_M, BLOCK_N, STAGES>(args, shared).run();
}

/* dq of a tile of queries from its sum; says whether the thread's share has something that is not finite. */
template <typename T, int DIM, int BLOCK_M>
__device__ __forceinline__ bool make_dq(const cuflash_attention_args &args, int batch, int head, int tile) {
    constexpr int PIECES = BLOCK_M / 16 * DIM / 64, PARTS = DQ_PARTS_OF<DIM>, WARPS = CUFLASH_HOPPER_FINISH_THREADS / 32;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bool seen = tile >= first_query(args, 0) / BLOCK_M; /* or there are no keys for it, and no sum */
    float zero = 0;
#pragma unroll
    for (int i = 0; i < (PIECES + WARPS - 1) / WARPS; i++) {
        int piece = i * WARPS + warp; /* of 16 rows and 64 columns: a warp's, a fourth of a square */
        int first = tile * BLOCK_M + piece % (BLOCK_M / 16) * 16, column = piece / (BLOCK_M / 16) * 64;
        if (PIECES % WARPS && piece >= PIECES) break;
        const float *square = args.dq_sum + static_cast<int64_t>(blockIdx.x) * (BLOCK_M * DIM) + piece / 4 * DQ_SQUARE;
        float c[32];
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float x[4];
            int part = n / (8 / PARTS), at = (part * 4 + piece % 4) * (DQ_SQUARE / 4 / PARTS) + n % (8 / PARTS) * 128;
            ptx::load_4(x, square + at, lane);
            if (!seen) x[0] = x[1] = x[2] = x[3] = 0;
#pragma unroll
            for (int e = 0; e < 4; e++) c[n * 4 + e] = x[e] * args.scale, zero = fmaf(c[n * 4 + e], 0, zero);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first + half * 8 + lane / 4;
            T *dq = row_of<T>(args.dq, args.dq_stride, batch, head, row) + column;
            store_half<T, 64>(c, half, 1, dq, row < args.seq_q ? args.head_dim - column : 0);
        }
    }
    return zero != 0;
}

template <typename T, int BLOCK_M>
__device__ __forceinline__ void repair_dq(const cuflash_attention_args &args, int batch, int head, int tile) {
    int warp = threadIdx.x / 32, end = min((tile + 1) * BLOCK_M, args.seq_q);
    for (int row = tile * BLOCK_M + warp; row < end; row += CUFLASH_HOPPER_FINISH_THREADS / 32)
        repair_dq_row<T>(args, batch, head, row);
}

/* A block makes a tile; or where that is done, it repairs what of its tiles needs it. */
template <typename T, int DIM, int BLOCK_M> __device__ __forceinline__ void finish(const cuflash_attention_args &args) {
    constexpr int EACH = CUFLASH_HOPPER_FINISHED_TILES;
    int tiles = args.rows / BLOCK_M, number = blockIdx.x, end = number + 1;
    if (args.finishes) {
        number *= EACH, end = min(number + EACH, args.batch * args.heads * tiles);
        int own = number + threadIdx.x % EACH;
        if (!__any_sync(0xffffffff, own < end && args.turn[own] == CUFLASH_HOPPER_SPOILT)) return;
    }
    for (; number < end; number++) {
        int tile = number % tiles, pair = number / tiles, batch = pair / args.heads, head = pair % args.heads;
        bool spoilt = args.finishes ? args.turn[number] == CUFLASH_HOPPER_SPOILT
                                    : __syncthreads_or(make_dq<T, DIM, BLOCK_M>(args, batch, head, tile));
        if (args.causal && spoilt) repair_dq<T, BLOCK_M>(args, batch, head, tile);
    }
}

} // namespace cuflash

#define KERNEL(type, suffix, dim, block_m, block_n, stages, threads, blocks, cluster)                                          \
    extern "C" __global__ void __launch_bounds__(threads, blocks) __cluster_dims__(cluster)                                    \
        cuflash_hopper_backward_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_hopper_args args) {  \
        extern __shared__ __align__(1024) unsigned char shared[];                                                              \
        cuflash::run_backward<type, dim, block_m, block_n, stages>(args, ptx::shared_address(shared));                         \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(CUFLASH_HOPPER_FINISH_THREADS)                                                \
        cuflash_hopper_finish_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_attention_args args) { \
        cuflash::finish<type, dim, block_m>(args);                                                                             \
    }
#define KERNELS(dim, block_m, block_n, stages, threads, blocks, smem_bytes, keys, keys_causal, cluster)                        \
    KERNEL(__half, f16, dim, block_m, block_n, stages, threads, blocks, cluster)                                               \
    KERNEL(__nv_bfloat16, bf16, dim, block_m, block_n, stages, threads, blocks, cluster)
CUFLASH_HOPPER_BACKWARD(KERNELS)
