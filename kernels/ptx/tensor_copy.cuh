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

/* The same of a map that has a dimension more, at 0, between column and row. */
__device__ __forceinline__ void load_box_packed(uint32_t destination, const void *map, uint32_t barrier, int column, int row,
                                                int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
        "[%2];" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(column), "r"(0), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

/* So many bytes, a multiple of 16 at one, to shared memory; arrives at the barrier with them. */
__device__ __forceinline__ void load_bytes(uint32_t destination, const void *from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* Copies floats in shared memory to global memory; so many bytes, a multiple of 16 at one. Belongs to this thread's group, as
 * additions do. */
__device__ __forceinline__ void store_floats(float *to, uint32_t from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}

/* The map's box from shared memory, as far as the tensor goes. Belongs to this thread's group, as additions do. */
__device__ __forceinline__ void store_box(const void *map, uint32_t from, int column, int row, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(from),
                 "r"(column), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}

/* Adds floats in shared memory to ones in global memory; so many bytes, a multiple of 16 at one. Belongs to this thread's group
 * of such additions. */
__device__ __forceinline__ void add_floats(float *to, uint32_t from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}

/* The additions since the last one are a group. */
__device__ __forceinline__ void add_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Waits until this thread's groups have read shared memory. */
__device__ __forceinline__ void add_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/* The same of all but the last one. */
__device__ __forceinline__ void add_wait_read_but_1() {
    asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
}

/* Waits until this thread's groups are done. */
__device__ __forceinline__ void add_wait() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

} // namespace ptx

#endif
