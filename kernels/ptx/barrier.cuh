/* Barriers of Hopper: in shared memory, for copies and threads (mbarrier), and numbered ones among some warps of a block; and
 * registers that warpgroups hand each other. sm_90. One instruction a function. */
#ifndef CUFLASH_PTX_BARRIER_CUH
#define CUFLASH_PTX_BARRIER_CUH

#include <stdint.h>

namespace ptx {

/* A phase of the barrier ends after so many arrivals, and when the bytes that were expected are there. */
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/* Makes inits seen by copies, and by others of the cluster. */
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* Makes what threads wrote to shared memory seen by copies and by wgmma. */
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Puts what copies did to global memory, and were waited for, before what the thread does next. */
__device__ __forceinline__ void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* For threads of which `condition` holds; it is no branch, so the compiler does not think that a warp goes apart here. */
__device__ __forceinline__ void mbarrier_arrive_if(uint32_t barrier, bool condition) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.s32 p, %1, 0;\n"
                 "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
                 "}" ::"r"(barrier),
                 "r"(int(condition))
                 : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Has the phase of this parity ended? Waits for a while for it. A barrier begins in phase 0, as if one of parity 1 had ended
 * before. */
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, int parity) {
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

/* Waits until so many threads of the block have arrived at it, this one among them; whole warps. */
__device__ __forceinline__ void barrier_sync(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/* Arrives there, and does not wait. */
__device__ __forceinline__ void barrier_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/* Waits like barrier_sync; says whether the condition holds in any of them. */
__device__ __forceinline__ bool barrier_or(int number, int threads, bool condition) {
    uint32_t any;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.u32 p, %3, 0;\n"
                 "barrier.cta.red.or.pred p, %1, %2, p;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(any)
                 : "r"(number), "r"(threads), "r"(uint32_t(condition))
                 : "memory");
    return any;
}

/* Registers of each thread, from now on; for all warps of a warpgroup. */
template <int registers> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

} // namespace ptx

#endif
