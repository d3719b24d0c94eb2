/* Additions to device memory, and flags between blocks. One instruction a function, where the architecture has it. */
#ifndef CUFLASH_PTX_ATOMIC_CUH
#define CUFLASH_PTX_ATOMIC_CUH

#include <stdint.h>

namespace ptx {

/* A warp's 128 floats at sum, four to a lane, in an order of the architecture's own. sm_90 and later: vectors; before:
 * neighbouring lanes at neighbouring addresses, as reductions there are scalar. */
__device__ __forceinline__ void load_4(float (&x)[4], const float *sum, int lane) {
#if __CUDA_ARCH__ >= 900
    float4 v = __ldcg(reinterpret_cast<const float4 *>(sum + lane * 4));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
#else
    for (int e = 0; e < 4; e++) x[e] = __ldcg(sum + e * 32 + lane);
#endif
}

/* Adds to them. Reductions flush denormal numbers. */
__device__ __forceinline__ void add_4(float *sum, int lane, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sum + lane * 4), "f"(x[0]), "f"(x[1]),
                 "f"(x[2]), "f"(x[3])
                 : "memory");
#else
    for (int e = 0; e < 4; e++) atomicAdd(sum + e * 32 + lane, x[e]);
#endif
}

/* The same where nobody else adds meanwhile. Keeps denormal numbers. */
__device__ __forceinline__ void add_4_alone(float *sum, int lane, const float (&x)[4]) {
    float y[4];
    load_4(y, sum, lane);
#if __CUDA_ARCH__ >= 900
    __stcg(reinterpret_cast<float4 *>(sum + lane * 4), make_float4(x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3]));
#else
    for (int e = 0; e < 4; e++) __stcg(sum + e * 32 + lane, x[e] + y[e]);
#endif
}

__device__ __forceinline__ int32_t load_acquire(const int32_t *flag) {
    int32_t value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

__device__ __forceinline__ int32_t load_relaxed(const int32_t *flag) {
    int32_t value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

__device__ __forceinline__ void store_release(int32_t *flag, int32_t value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

/* After it others see what this thread did before. */
__device__ __forceinline__ void add_release(int32_t *flag, int32_t value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

} // namespace ptx

#endif
