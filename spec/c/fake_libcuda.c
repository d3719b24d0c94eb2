/* A stand-in for CUDA's driver library, under the driver's name: devices whose memory is the host's and whose kernels do
 * nothing but leave a record. With it everything up to the launch is tested without a GPU: allocation, copies, errors, and
 * which kernel is launched how on which architecture.
 *
 * Environment: FAKE_CUDA_SM (90: what the devices are), FAKE_CUDA_DEVICES (1), FAKE_CUDA_MEMORY (bytes a device has, 1 GiB),
 * FAKE_CUDA_DRIVER (13000: the version). */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/driver.h"

#define EXPORT __attribute__((visibility("default")))

struct CUctx_st {
    int device;
};
struct CUmemPoolHandle_st {
    int device;
};
struct CUmod_st {
    int device;
};
struct CUfunc_st {
    struct CUfunc_st *next;
    int smem_bytes;
    char name[128];
};
struct CUstream_st {
    int number;
};
struct CUevent_st {
    double milliseconds;
};

enum { MAX_BLOCKS = 4096, MAX_DEVICES = 8, ERROR_INVALID_VALUE = 1, ERROR_NOT_INITIALIZED = 3, ERROR_ILLEGAL_ADDRESS = 700 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct CUctx_st contexts[MAX_DEVICES];
static _Thread_local CUcontext stack[64];
static _Thread_local int depth;

static struct {
    char *start;
    size_t bytes;
    int device;
    int mine; /* allocated here, not declared by a test */
} blocks[MAX_BLOCKS];
static size_t held[MAX_DEVICES];

static long launches, calls, allocations;
static char last_launch[256];
static cudaStream_t freed_on;
static CUresult fault; /* what every call returns from now on */

static long setting(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value && *value ? atol(value) : otherwise;
}

/* ---- For tests ---------------------------------------------------------------------------------- */

EXPORT void fake_device_memory(const void *start, size_t bytes, int device) {
    blocks[0].start = (char *)(size_t)start;
    blocks[0].bytes = bytes;
    blocks[0].device = device;
}

/* How often the driver was asked where a pointer lives. */
EXPORT int fake_calls(void) {
    return (int)calls;
}

EXPORT long fake_launches(void) {
    return launches;
}

/* Allocations not freed. */
EXPORT long fake_allocations(void) {
    return allocations;
}

/* The stream of the last memory that was freed. */
EXPORT cudaStream_t fake_freed_on(void) {
    return freed_on;
}

/* "name blocks threads shared_bytes" */
EXPORT const char *fake_last_launch(void) {
    return last_launch;
}

/* As after a kernel that failed: every call returns this. 0 ends it, which in life only the end of the process does. */
EXPORT void fake_fault(int result) {
    fault = result;
}

/* ---- The driver --------------------------------------------------------------------------------- */

#define ALIVE                                                                                                                  \
    do {                                                                                                                       \
        if (fault) return fault;                                                                                               \
    } while (0)

EXPORT CUresult cuInit(unsigned flags) {
    (void)flags;
    for (int i = 0; i < MAX_DEVICES; i++) contexts[i].device = i;
    return setting("FAKE_CUDA_DEVICES", 1) > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = (int)setting("FAKE_CUDA_DRIVER", 13000);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error == ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OF_SOME_KIND";
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == ERROR_ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "something went wrong";
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    *count = (int)setting("FAKE_CUDA_DEVICES", 1);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    snprintf(name, (size_t)size, "Fake GPU %d", device);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    (void)device;
    int sm = (int)setting("FAKE_CUDA_SM", 90), kib;
    switch (sm) { /* the CUDA programming guide, compute capabilities */
    case 70: kib = 96; break;
    case 75: kib = 64; break;
    case 80: kib = 163; break;
    case 86:
    case 89:
    case 120: kib = 99; break;
    default: kib = 227; break;
    }
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = sm / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = sm % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 1024 * kib; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    default: return ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

static size_t total_memory(void) {
    return (size_t)setting("FAKE_CUDA_MEMORY", 1 << 30);
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    (void)device;
    *bytes = total_memory();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = &contexts[device];
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = depth > 0 ? stack[depth - 1] : NULL;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (depth == 64) abort(); /* somebody forgets to leave */
    stack[depth++] = context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    if (depth == 0) abort();
    *context = stack[--depth];
    return CUDA_SUCCESS;
}

/* Whatever needs a context is called inside one. */
#define INSIDE                                                                                                                 \
    do {                                                                                                                       \
        if (depth == 0) return ERROR_NOT_INITIALIZED;                                                                          \
        ALIVE;                                                                                                                 \
    } while (0)

EXPORT CUresult cuCtxSynchronize(void) {
    INSIDE;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    INSIDE;
    if (!image) return ERROR_INVALID_VALUE;
    *module = malloc(sizeof **module);
    (*module)->device = stack[depth - 1]->device;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    INSIDE;
    (void)module;
    *function = calloc(1, sizeof **function);
    snprintf((*function)->name, sizeof(*function)->name, "%s", name);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        int limit;
        cuDeviceGetAttribute(&limit, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 0);
        if (value > limit) return ERROR_INVALID_VALUE;
        function->smem_bytes = value;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared_bytes, cudaStream_t stream,
                               void **parameters, void **extra) {
    INSIDE;
    (void)stream, (void)extra;
    if (grid_x == 0 || grid_x > 0x7fffffff || grid_y != 1 || grid_z != 1 || block_x == 0 || block_x > 1024 || block_y != 1 ||
        block_z != 1 || !parameters[0] || (int)shared_bytes > (function->smem_bytes > 49152 ? function->smem_bytes : 49152))
        return ERROR_INVALID_VALUE;
    pthread_mutex_lock(&mutex);
    launches++;
    snprintf(last_launch, sizeof last_launch, "%s %u %u %u", function->name, grid_x, block_x, shared_bytes);
    if (getenv("FAKE_CUDA_TRACE")) fprintf(stderr, "launch %s\n", last_launch);
    pthread_mutex_unlock(&mutex);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    for (unsigned i = 0; i < config->attribute_count; i++)
        if (config->attributes[i].id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) return ERROR_INVALID_VALUE;
    return cuLaunchKernel(function, config->grid_x, config->grid_y, config->grid_z, config->block_x, config->block_y,
                          config->block_z, config->shared_bytes, config->stream, parameters, extra);
}

/* As strict as the real one, and writes what it is given, for whoever looks. */
EXPORT CUresult cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, const uint64_t *sizes,
                                       const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                                       int swizzle, int promotion, int fill) {
    ALIVE;
    if ((size_t)map % 64 || (size_t)address % 16 || (rank != 4 && rank != 5) || interleave || fill || promotion < 0 ||
        promotion > 3)
        return ERROR_INVALID_VALUE;
    if (type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) return ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < rank; i++) {
        if (sizes[i] == 0 || sizes[i] > 1ull << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1) return ERROR_INVALID_VALUE;
        if (i > 0 && (strides[i - 1] == 0 || strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40)) return ERROR_INVALID_VALUE;
    }
    if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 > 128) return ERROR_INVALID_VALUE;
    uint64_t words[16] = {(uint64_t)(size_t)address, rank};
    for (unsigned i = 0; i < rank; i++) {
        words[2 + i] = sizes[i], words[7 + i] = box[i];
        if (i > 0) words[11 + i] = strides[i - 1];
    }
    memcpy(map, words, sizeof words);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    INSIDE;
    *total = total_memory();
    *available = *total - held[stack[depth - 1]->device];
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *properties) {
    *pool = malloc(sizeof **pool);
    (*pool)->device = properties->location.id;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemPoolSetAttribute(CUmemoryPool pool, int attribute, void *value) {
    (void)pool, (void)attribute, (void)value;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t bytes) {
    (void)pool, (void)bytes;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr *pointer, size_t bytes, CUmemoryPool pool, cudaStream_t stream) {
    INSIDE;
    (void)stream;
    if (bytes == 0) return ERROR_INVALID_VALUE;
    CUresult result = CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&mutex);
    for (int i = 1; i < MAX_BLOCKS && bytes <= total_memory() - held[pool->device]; i++) {
        if (blocks[i].start) continue;
        blocks[i].start = aligned_alloc(512, (bytes + 511) / 512 * 512);
        blocks[i].bytes = bytes;
        blocks[i].device = pool->device;
        held[pool->device] += bytes;
        allocations++;
        *pointer = (CUdeviceptr)(size_t)blocks[i].start;
        result = CUDA_SUCCESS;
        break;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

/* The block an address lies in, or -1. */
static int block_of(CUdeviceptr address) {
    const char *p = (const char *)(size_t)address;
    for (int i = 0; i < MAX_BLOCKS; i++)
        if (blocks[i].start && p >= blocks[i].start && p < blocks[i].start + blocks[i].bytes) return i;
    return -1;
}

EXPORT CUresult cuMemFreeAsync(CUdeviceptr pointer, cudaStream_t stream) {
    INSIDE;
    pthread_mutex_lock(&mutex);
    freed_on = stream;
    int i = block_of(pointer);
    if (i < 1 || blocks[i].start != (char *)(size_t)pointer) abort();
    held[blocks[i].device] -= blocks[i].bytes;
    allocations--;
    free(blocks[i].start);
    blocks[i].start = NULL;
    pthread_mutex_unlock(&mutex);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpyAsync(CUdeviceptr destination, CUdeviceptr source, size_t bytes, cudaStream_t stream) {
    INSIDE;
    (void)stream;
    memmove((void *)(size_t)destination, (const void *)(size_t)source, bytes);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpyPeerAsync(CUdeviceptr destination, CUcontext destination_context, CUdeviceptr source,
                                  CUcontext source_context, size_t bytes, cudaStream_t stream) {
    if (destination_context == source_context) return ERROR_INVALID_VALUE;
    return cuMemcpyAsync(destination, source, bytes, stream);
}

/* As the driver does, this fails for memory that CUDA has never heard of. */
EXPORT CUresult cuPointerGetAttribute(void *value, int attribute, CUdeviceptr pointer) {
    pthread_mutex_lock(&mutex);
    calls++;
    int i = block_of(pointer), device = i < 0 ? -1 : blocks[i].device;
    pthread_mutex_unlock(&mutex);
    if (device < 0) return ERROR_INVALID_VALUE;
    if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        *(unsigned *)value = CU_MEMORYTYPE_DEVICE;
    else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
        *(int *)value = device;
    else
        return ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamCreate(cudaStream_t *stream, unsigned flags) {
    INSIDE;
    (void)flags;
    *stream = calloc(1, sizeof **stream);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamDestroy_v2(cudaStream_t stream) {
    INSIDE;
    free(stream);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamSynchronize(cudaStream_t stream) {
    INSIDE;
    (void)stream;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    INSIDE;
    (void)stream, (void)event, (void)flags;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventCreate(cudaEvent_t *event, unsigned flags) {
    INSIDE;
    (void)flags;
    *event = calloc(1, sizeof **event);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventDestroy_v2(cudaEvent_t event) {
    INSIDE;
    free(event);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventRecord(cudaEvent_t event, cudaStream_t stream) {
    INSIDE;
    (void)stream;
    static double clock;
    event->milliseconds = clock += 1;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventSynchronize(cudaEvent_t event) {
    INSIDE;
    (void)event;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    INSIDE;
    *milliseconds = (float)(end->milliseconds - start->milliseconds);
    return CUDA_SUCCESS;
}
