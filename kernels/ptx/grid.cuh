/* Kernels that are launched while the one before them still runs (sm_90 and later; before, they are not, and there is nothing
 * to say or to wait for). One instruction a function. */
#ifndef CUFLASH_PTX_GRID_CUH
#define CUFLASH_PTX_GRID_CUH

namespace ptx {

/* The next kernel's blocks may come as soon as all blocks of this one have said so or are gone, where there is room. */
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Until the kernel before this one has ended, and what it wrote is there. */
__device__ __forceinline__ void wait_for_grid() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

} // namespace ptx

#endif
