/* Which rows of a launch table are compiled: those that a plan can choose on the architectures of this pass of the compiler.
 * Most tables have two others to a head dimension. Kernels of the other rows trap, and nobody launches them. */
#ifndef CUFLASH_COMMON_CHOSEN_CUH
#define CUFLASH_COMMON_CHOSEN_CUH

#include "attention.h"

namespace cuflash {

struct RowSize {
    int dim, smem_bytes;
};
#define CUFLASH_ROW_SIZE(dim, block_m, block_n, stages, threads, blocks, smem_bytes) {dim, smem_bytes},

/* Is it the first row of its head dimension that fits? */
template <int N> __host__ __device__ constexpr bool is_first(const RowSize (&rows)[N], int dim, int smem_bytes, int limit) {
    for (const RowSize &row : rows)
        if (row.dim == dim && row.smem_bytes <= limit) return row.smem_bytes == smem_bytes;
    return false;
}

/* Code that is kept as PTX may come to run anywhere. Other code has one limit, but where there is much shared memory: sm_80 has
 * less of it than what comes later, and they may share a pass. */
template <int N> __host__ __device__ constexpr bool is_chosen(const RowSize (&rows)[N], int dim, int smem_bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 10 * CUFLASH_PTX
    return true;
#else
    constexpr int LIMIT = CUFLASH_SHARED_LIMIT(__CUDA_ARCH__ / 10), LEAST = CUFLASH_SHARED_LIMIT(80);
    return is_first(rows, dim, smem_bytes, LIMIT) || (LIMIT > LEAST && is_first(rows, dim, smem_bytes, LEAST));
#endif
}

} // namespace cuflash

/* What a kernel does, where its row is chosen. */
#define CUFLASH_IF_CHOSEN(chosen, ...)                                                                                         \
    if constexpr (chosen)                                                                                                      \
        __VA_ARGS__;                                                                                                           \
    else                                                                                                                       \
        __trap();

#endif
