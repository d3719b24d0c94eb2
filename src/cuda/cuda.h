/* The CUDA backend's ground: devices, memory, copies, kernels. Everything is queued on a stream; nothing waits
 * for the device unless it says so. */
#ifndef CUFLASH_CUDA_H
#define CUFLASH_CUDA_H

#include "cuda/driver.h"

/* Compiled kernels of one source, for all architectures, embedded in the library. data is NULL where the build has none. */
typedef struct {
    const char *name;
    const void *data;
} cuflash_fatbin;

extern const cuflash_fatbin cuflash_fatbin_element, cuflash_fatbin_rows, cuflash_fatbin_mma_forward,
    cuflash_fatbin_mma_backward, cuflash_fatbin_tf32_forward, cuflash_fatbin_fma_forward, cuflash_fatbin_fma_backward,
    cuflash_fatbin_fma_half_forward, cuflash_fatbin_fma_half_backward, cuflash_fatbin_hopper_forward,
    cuflash_fatbin_hopper_backward;

/* The toolkit that compiled them (13000 is CUDA 13.0); 0: there are none. */
extern const int cuflash_kernels_toolkit;

typedef struct {
    char name[128];
    int major, minor; /* compute capability */
    int multiprocessors;
    int shared_bytes; /* of shared memory that a block may ask for */
    size_t memory_bytes;
} cuflash_cuda_properties;

/* SUCCESS if tensors can live on this device. Cheap after the first call. */
cuflash_status cuflash_cuda_check(int device);

/* What a device is; it must have passed the check. */
const cuflash_cuda_properties *cuflash_cuda_get_properties(int device);

/* While inside, the device's primary context is current in this thread. leave undoes it; it is a no-op after a failed
 * enter. */
typedef struct {
    bool pushed;
} cuflash_cuda_scope;

cuflash_status cuflash_cuda_enter(const char *fn, int device, cuflash_cuda_scope *scope);
void cuflash_cuda_leave(cuflash_cuda_scope *scope);

/* The calling thread's stream, for what is given none: cuflash_set_stream's, NULL at first. */
cudaStream_t cuflash_cuda_stream(void);

/* Waits for the device and gives back the memory that the pool keeps. */
cuflash_status cuflash_cuda_trim(const char *fn, int device);

/* ---- All of the following are called inside --------------------------------------------------------------- */

/* Memory that is there for what is queued on the stream from now on; *out is NULL where there is not enough. */
cuflash_status cuflash_cuda_allocate(const char *fn, int device, size_t bytes, cudaStream_t stream, void **out);

/* Gives it back once what is queued on the stream is done. Never fails: there is nobody to tell. */
void cuflash_cuda_free(void *memory, cudaStream_t stream);

/* Copies between any two places, CUFLASH_CPU being one. Host memory may be reused as soon as this returns; a copy to
 * the host waits for the stream. */
cuflash_status cuflash_cuda_copy(const char *fn, void *dst, int dst_device, const void *src, int src_device, size_t bytes,
                                 cudaStream_t stream);

cuflash_status cuflash_cuda_wait(const char *fn, cudaStream_t stream);

/* An entry point of a fatbin, loaded at the first call. smem_bytes is the most dynamic shared memory it is launched with. */
cuflash_status cuflash_cuda_kernel(const char *fn, int device, const cuflash_fatbin *fatbin, const char *entry, int smem_bytes,
                                   CUfunction *function);

/* Queues a kernel whose only parameter is the struct at args. early: it may begin while the one before still runs, and waits
 * for that itself (ptx/grid.cuh). */
cuflash_status cuflash_cuda_launch(const char *fn, CUfunction function, int64_t blocks, int threads, int smem_bytes,
                                   const void *args, bool early, cudaStream_t stream);

#endif
