/* The CUDA driver's functions, found in libcuda at run time: neither headers nor libraries of CUDA are needed to build. */
#ifndef CUFLASH_CUDA_DRIVER_H
#define CUFLASH_CUDA_DRIVER_H

#include "status.h"

/* Types and constants of the driver API (cuda.h), as far as they are used. */
typedef int CUresult;
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUmemPoolHandle_st *CUmemoryPool;
typedef unsigned long long CUdeviceptr;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
};
enum { CU_MEMORYTYPE_HOST = 1, CU_MEMORYTYPE_DEVICE = 2 };
enum { CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9 };
enum {
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED = 115
};
enum { CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6 };
enum { CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9 };
enum { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum { CU_TENSOR_MAP_SWIZZLE_128B = 3, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum { CU_MEM_ALLOCATION_TYPE_PINNED = 1, CU_MEM_LOCATION_TYPE_DEVICE = 1, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD = 4 };

typedef struct {
    int allocation_type, handle_types;
    struct {
        int type, id;
    } location;
    void *security_attributes;
    size_t max_size;
    unsigned char reserved[56];
} CUmemPoolProps;

/* cuda.h's CUlaunchAttribute and CUlaunchConfig. */
typedef struct {
    int id;
    union {
        char reserved[64];
        int allowed;
        uint64_t alignment;
    } value;
} CUlaunchAttribute;

typedef struct {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    cudaStream_t stream;
    CUlaunchAttribute *attributes;
    unsigned attribute_count;
} CUlaunchConfig;

/* name, parameters. Names with the suffix that cuda.h gives them. */
#define CUFLASH_CUDA_DRIVER_MAP(X)                                                                                             \
    X(cuInit, (unsigned flags))                                                                                                \
    X(cuDriverGetVersion, (int *version))                                                                                      \
    X(cuGetErrorName, (CUresult error, const char **name))                                                                     \
    X(cuGetErrorString, (CUresult error, const char **text))                                                                   \
    X(cuDeviceGetCount, (int *count))                                                                                          \
    X(cuDeviceGet, (CUdevice * device, int ordinal))                                                                           \
    X(cuDeviceGetName, (char *name, int size, CUdevice device))                                                                \
    X(cuDeviceGetAttribute, (int *value, int attribute, CUdevice device))                                                      \
    X(cuDeviceTotalMem_v2, (size_t * bytes, CUdevice device))                                                                  \
    X(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                                                        \
    X(cuCtxGetCurrent, (CUcontext * context))                                                                                  \
    X(cuCtxPushCurrent_v2, (CUcontext context))                                                                                \
    X(cuCtxPopCurrent_v2, (CUcontext * context))                                                                               \
    X(cuCtxSynchronize, (void))                                                                                                \
    X(cuModuleLoadData, (CUmodule * module, const void *image))                                                                \
    X(cuModuleGetFunction, (CUfunction * function, CUmodule module, const char *name))                                         \
    X(cuFuncSetAttribute, (CUfunction function, int attribute, int value))                                                     \
    X(cuLaunchKernel,                                                                                                          \
      (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,             \
       unsigned block_z, unsigned shared_bytes, cudaStream_t stream, void **parameters, void **extra))                         \
    X(cuMemGetInfo_v2, (size_t * available, size_t * total))                                                                   \
    X(cuMemPoolCreate, (CUmemoryPool * pool, const CUmemPoolProps *properties))                                                \
    X(cuMemPoolSetAttribute, (CUmemoryPool pool, int attribute, void *value))                                                  \
    X(cuMemPoolTrimTo, (CUmemoryPool pool, size_t bytes_to_keep))                                                              \
    X(cuMemAllocFromPoolAsync, (CUdeviceptr * pointer, size_t bytes, CUmemoryPool pool, cudaStream_t stream))                  \
    X(cuMemFreeAsync, (CUdeviceptr pointer, cudaStream_t stream))                                                              \
    X(cuMemcpyAsync, (CUdeviceptr destination, CUdeviceptr source, size_t bytes, cudaStream_t stream))                         \
    X(cuMemcpyPeerAsync, (CUdeviceptr destination, CUcontext destination_context, CUdeviceptr source,                          \
                          CUcontext source_context, size_t bytes, cudaStream_t stream))                                        \
    X(cuPointerGetAttribute, (void *value, int attribute, CUdeviceptr pointer))                                                \
    X(cuStreamCreate, (cudaStream_t * stream, unsigned flags))                                                                 \
    X(cuStreamDestroy_v2, (cudaStream_t stream))                                                                               \
    X(cuStreamSynchronize, (cudaStream_t stream))                                                                              \
    X(cuStreamWaitEvent, (cudaStream_t stream, cudaEvent_t event, unsigned flags))                                             \
    X(cuEventCreate, (cudaEvent_t * event, unsigned flags))                                                                    \
    X(cuEventDestroy_v2, (cudaEvent_t event))                                                                                  \
    X(cuEventRecord, (cudaEvent_t event, cudaStream_t stream))                                                                 \
    X(cuEventSynchronize, (cudaEvent_t event))                                                                                 \
    X(cuEventElapsedTime, (float *milliseconds, cudaEvent_t start, cudaEvent_t end))

/* Functions of later drivers; NULL in earlier ones. */
#define CUFLASH_CUDA_LATER_DRIVER_MAP(X)                                                                                       \
    X(cuLaunchKernelEx, (const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra))                  \
    X(cuTensorMapEncodeTiled,                                                                                                  \
      (void *map, int type, unsigned rank, void *address, const uint64_t *sizes, const uint64_t *strides, const uint32_t *box, \
       const uint32_t *steps, int interleave, int swizzle, int promotion, int fill))

typedef struct {
#define CUFLASH_CUDA_DRIVER_FIELD(name, parameters) CUresult(*name) parameters;
    CUFLASH_CUDA_DRIVER_MAP(CUFLASH_CUDA_DRIVER_FIELD)
    CUFLASH_CUDA_LATER_DRIVER_MAP(CUFLASH_CUDA_DRIVER_FIELD)
#undef CUFLASH_CUDA_DRIVER_FIELD
    int version; /* 13000 is CUDA 13.0 */
    int devices;
} cuflash_cuda_driver;

/* The driver, loaded and initialised at the first call; NULL where there is none that can be used: *reason then says why. */
const cuflash_cuda_driver *cuflash_cuda_get_driver(const char **reason);

/* CUDA_ERROR with what was done and CUDA's own words. */
cuflash_status cuflash_cuda_fail(const char *fn, const char *what, CUresult result);

#endif
