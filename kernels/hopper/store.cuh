/* From the accumulators of wgmma to rows of 16-bit elements in device memory. */
#ifndef CUFLASH_HOPPER_STORE_CUH
#define CUFLASH_HOPPER_STORE_CUH

#include "common/type.cuh"

namespace cuflash {

/* The four lanes of a row, each with a pair of columns of four blocks of 8, swap so that each has a block. */
__device__ __forceinline__ void transpose_pairs(uint32_t (&x)[4]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            bool upper = lane & bit;
            uint32_t give = upper ? x[i] : x[i + bit], got = __shfl_xor_sync(0xffffffff, give, bit);
            (upper ? x[i] : x[i + bit]) = got;
        }
}

/* The thread's row in the upper or lower half of the warp's 16, times a factor: whole warps, of which each lane gives where its
 * row is, and how many elements it has, 0 for none. */
template <typename T, int COLUMNS>
__device__ __forceinline__ void store_half(const float (&c)[COLUMNS / 2], int half, float factor, T *row, int dim) {
#pragma unroll
    for (int first = 0; first < COLUMNS / 8; first += 4) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[i] = pack<T>(c[(first + i) * 4 + half * 2] * factor, c[(first + i) * 4 + half * 2 + 1] * factor);
        transpose_pairs(x);
        int column = (first + threadIdx.x % 4) * 8;
        if (column < dim) *reinterpret_cast<uint4 *>(row + column) = make_uint4(x[0], x[1], x[2], x[3]);
    }
}

} // namespace cuflash

#endif
