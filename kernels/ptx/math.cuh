/* Arithmetic that CUDA C has no name for. One instruction a function. */
#ifndef CUFLASH_PTX_MATH_CUH
#define CUFLASH_PTX_MATH_CUH

#include <stdint.h>

namespace ptx {

/* 2^x, off by at most 2 in the last place; denormal results are 0. */
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* x, of which the compiler no longer knows where it comes from: what is made of it in a loop is made there again, and does
 * not stay in registers from before. */
__device__ __forceinline__ uint32_t anew(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

} // namespace ptx

#endif
