/* A thread's place in a warpgroup that multiplies, and what its warp says to others. */
#ifndef CUFLASH_HOPPER_WARP_CUH
#define CUFLASH_HOPPER_WARP_CUH

#include "ptx/barrier.cuh"

namespace cuflash {

__device__ __forceinline__ int lane() {
    return threadIdx.x % 32;
}

/* The warp's first row in a tile of its warpgroup. */
__device__ __forceinline__ int warp_row() {
    return threadIdx.x / 32 % 4 * 16;
}

/* At a barrier, for the whole warp. */
__device__ __forceinline__ void arrive(uint32_t barrier) {
    ptx::mbarrier_arrive_if(barrier, lane() == 0);
}

/* The same, where the warp's loads and stores are what others wait for. */
__device__ __forceinline__ void arrive_all(uint32_t barrier) {
    ptx::mbarrier_arrive(barrier);
}

} // namespace cuflash

#endif
