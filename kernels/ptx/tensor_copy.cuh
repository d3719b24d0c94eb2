/* Copies of tiles between global and shared memory by tensor maps (TMA, sm_90). One instruction a function. */
#ifndef CUFLASH_PTX_TENSOR_COPY_CUH
#define CUFLASH_PTX_TENSOR_COPY_CUH

#include <stdint.h>

namespace ptx {

__device__ __forceinline__ void prefetch_tensor_map(const void *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* The map's box at column, row, head and batch to shared memory, zeros where the tensor ends; arrives at the barrier with its
 * bytes. */
__device__ __forceinline__ void load_box(uint32_t destination, const void *map, uint32_t barrier, int column, int row, int head,
                                         int batch) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
                 "[%2];" ::"r"(destination),
                 "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}

} // namespace ptx

#endif
