/* Blocks that add to the same place one after the other, in an order of their own numbers: sums are then the same from run
 * to run. Blocks wait only for ones with lower numbers, which have started before them. */
#ifndef CUFLASH_COMMON_TURN_CUH
#define CUFLASH_COMMON_TURN_CUH

#include "ptx/atomic.cuh"

namespace cuflash {

/* Waits until all blocks before number `mine` have had their turn. For whole blocks. */
__device__ __forceinline__ void await_turn(const int32_t *turn, int mine) {
    if (threadIdx.x == 0)
        while (ptx::load_acquire(turn) != mine) {
        }
    __syncthreads();
}

__device__ __forceinline__ void end_turn(int32_t *turn, int mine) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ptx::store_release(turn, mine + 1);
}

/* Adds N fours of every lane of a warp to its N * 128 floats at sum: alone, in the block's turn, or among others. */
template <int N> __device__ __forceinline__ void add_fours(float *sum, int lane, const float (&x)[N][4], bool alone) {
    if (alone) {
#pragma unroll
        for (int i = 0; i < N; i++) ptx::add_4_alone(sum + i * 128, lane, x[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) ptx::add_4(sum + i * 128, lane, x[i]);
    }
}

} // namespace cuflash

#endif
