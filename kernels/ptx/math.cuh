/* Arithmetic that CUDA C has no name for, and words to the compiler. One instruction a function. */
#ifndef CUFLASH_PTX_MATH_CUH
#define CUFLASH_PTX_MATH_CUH

#include <cuda_fp16.h>
#include <stdint.h>
#include <type_traits>

namespace ptx {

/* 2^x, off by at most 2 in the last place; denormal results are 0. */
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / x, off by at most 1 in the last place; of denormal x infinity. */
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* x, which is the same in all lanes: the compiler knows that from now on (sm_80). It loses it at minima and maxima. */
__device__ __forceinline__ uint32_t uniform(uint32_t x) {
    uint32_t y;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
    return y;
}

/* x, of which the compiler no longer knows where it comes from: what is made of it in a loop is made there again, and does
 * not stay in registers from before. */
__device__ __forceinline__ uint32_t anew(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

/* a * b + c of two 16-bit numbers in one register, float16 or (sm_80 and later) bfloat16 */
template <typename T> __device__ __forceinline__ uint32_t fma_2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t y;
    if constexpr (std::is_same<T, __half>::value)
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    else
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

} // namespace ptx

#endif
