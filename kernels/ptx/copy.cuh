/* cp.async: copies from global to shared memory that do not wait (sm_80 and later). One instruction a function. */
#ifndef CUFLASH_PTX_COPY_CUH
#define CUFLASH_PTX_COPY_CUH

#include <stdint.h>

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* 16 bytes past L1; zeros where not wanted: source is then not read (but must still be a valid address). */
__device__ __forceinline__ void cp_async_16(uint32_t destination, const void *source, bool wanted) {
    int bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most n of this thread's groups are still under way. */
template <int n> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

} // namespace ptx

#endif
