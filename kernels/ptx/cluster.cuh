/* Clusters: blocks on neighbouring multiprocessors that reach each other's shared memory. sm_90. One instruction a function. */
#ifndef CUFLASH_PTX_CLUSTER_CUH
#define CUFLASH_PTX_CLUSTER_CUH

#include <stdint.h>

namespace ptx {

/* This block's number in its cluster. */
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* What is at this address of this block's shared memory, in that of another block. */
__device__ __forceinline__ uint32_t address_in(int rank, uint32_t address) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

/* Waits for all threads of the cluster. */
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n"
                 "barrier.cluster.wait.acquire;" ::
                     : "memory");
}

/* To another block's shared memory. */
__device__ __forceinline__ void store_there(uint32_t there, int value) {
    asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(there), "r"(value) : "memory");
}

/* At a barrier of another block. What this thread wrote there before is seen by who waits. */
__device__ __forceinline__ void mbarrier_arrive_there(uint32_t there) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

/* The same by threads of which `condition` holds, which have only read; it is no branch. */
__device__ __forceinline__ void mbarrier_leave_there_if(uint32_t there, bool condition) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.s32 p, %1, 0;\n"
                 "@p mbarrier.arrive.shared::cluster.b64 _, [%0];\n"
                 "}" ::"r"(there),
                 "r"(int(condition))
                 : "memory");
}

/* As mbarrier_wait, for a barrier at which other blocks arrive. */
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, int parity) {
    uint32_t done;
    do {
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n"
                     "}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}

/* So many bytes, a multiple of 16 at one, to another block's shared memory; arrives at a barrier of that block with them. */
__device__ __forceinline__ void copy_there(uint32_t there, uint32_t from, int bytes, uint32_t barrier_there) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(there),
                 "r"(from), "r"(bytes), "r"(barrier_there)
                 : "memory");
}

} // namespace ptx

#endif
