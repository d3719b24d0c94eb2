/* Shared memory, and cp.async: copies to it from global memory that do not wait (sm_80 and later; before, there is nothing
 * to wait for). One instruction a function. */
#ifndef CUFLASH_PTX_COPY_CUH
#define CUFLASH_PTX_COPY_CUH

#include <stdint.h>

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void store_shared(uint32_t destination, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(destination), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t destination, unsigned short value) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(destination), "h"(value) : "memory");
}

__device__ __forceinline__ void store_4(uint32_t destination, const float *x) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(destination), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}

__device__ __forceinline__ float load_shared(uint32_t source) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(source));
    return value;
}

__device__ __forceinline__ void load_shared_4(float (&x)[4], uint32_t source) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(source)
                 : "memory");
}

/* 16 bytes past L1; zeros where not wanted: source is then not read. */
__device__ __forceinline__ void cp_async_16(uint32_t destination, const void *source, bool wanted) {
    int bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Waits until at most n of this thread's groups are still under way. */
template <int n> __device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

} // namespace ptx

#endif
