/* Devices, contexts, memory, copies and streams. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "cuda/cuda.h"

enum { MAX_DEVICES = 64 };

/* What is known of a device once it was asked for. */
typedef struct {
    atomic_bool ready;
    CUcontext context; /* the primary one, retained until the process ends */
    CUmemoryPool pool; /* of our own: what others do with the default pool is theirs */
    cuflash_cuda_properties properties;
} device_state;

static device_state states[MAX_DEVICES];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static const cuflash_cuda_driver *cuda;

#define CUDA_TRY(fn, what, call)                                                                                               \
    do {                                                                                                                       \
        CUresult result_ = (call);                                                                                             \
        if (result_ != CUDA_SUCCESS) return cuflash_cuda_fail(fn, what, result_);                                              \
    } while (0)

/* ---- Devices ------------------------------------------------------------------------------------ */

static cuflash_status check_available(int device) {
    if (device < 0)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                            "device: expected CUFLASH_CPU (-1) or a CUDA device's ordinal (0, 1, ...), got %d", device);
    if (cuflash_kernels_toolkit == 0)
        return cuflash_fail(
            CUFLASH_CUDA_ERROR,
            "device cuda:%d: this build of cuflash has no CUDA kernels (built without nvcc, or with CUFLASH_CUDA=OFF)", device);
    const char *reason;
    cuda = cuflash_cuda_get_driver(&reason);
    if (!cuda) return cuflash_fail(CUFLASH_CUDA_ERROR, "device cuda:%d: %s", device, reason);
    if (device >= cuda->devices || device >= MAX_DEVICES)
        return cuflash_fail(CUFLASH_CUDA_ERROR, "device cuda:%d: there %s only %d CUDA device%s", device,
                            cuda->devices == 1 ? "is" : "are", cuda->devices, cuda->devices == 1 ? "" : "s");
    if (cuda->version / 1000 < cuflash_kernels_toolkit / 1000)
        return cuflash_fail(CUFLASH_CUDA_ERROR,
                            "device cuda:%d: the CUDA driver is too old: it is for CUDA %d.%d, and these kernels were compiled "
                            "with CUDA %d.%d",
                            device, cuda->version / 1000, cuda->version % 1000 / 10, cuflash_kernels_toolkit / 1000,
                            cuflash_kernels_toolkit % 1000 / 10);
    return CUFLASH_SUCCESS;
}

static cuflash_status read_properties(const char *fn, CUdevice handle, cuflash_cuda_properties *p) {
    const struct {
        int attribute;
        int *value;
    } numbers[] = {
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &p->major},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &p->minor},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &p->multiprocessors},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &p->shared_bytes},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        CUDA_TRY(fn, "asking for an attribute", cuda->cuDeviceGetAttribute(numbers[i].value, numbers[i].attribute, handle));
    CUDA_TRY(fn, "asking for the name", cuda->cuDeviceGetName(p->name, (int)sizeof p->name, handle));
    CUDA_TRY(fn, "asking for the memory", cuda->cuDeviceTotalMem_v2(&p->memory_bytes, handle));
    return CUFLASH_SUCCESS;
}

/* Called with the mutex held. */
static cuflash_status set_up(int device, device_state *state) {
    char fn[32];
    snprintf(fn, sizeof fn, "device cuda:%d", device);
    CUdevice handle;
    CUDA_TRY(fn, "opening it", cuda->cuDeviceGet(&handle, device));
    CUFLASH_TRY(read_properties(fn, handle, &state->properties));
    int pools = 0;
    CUDA_TRY(fn, "asking for an attribute",
             cuda->cuDeviceGetAttribute(&pools, CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, handle));
    if (!pools) return cuflash_fail(CUFLASH_CUDA_ERROR, "%s: it has no stream-ordered memory, which cuflash needs", fn);
    if (!state->context) CUDA_TRY(fn, "making its context", cuda->cuDevicePrimaryCtxRetain(&state->context, handle));
    CUmemPoolProps properties = {.allocation_type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                 .location = {CU_MEM_LOCATION_TYPE_DEVICE, device}};
    CUmemoryPool pool;
    CUDA_TRY(fn, "making a memory pool", cuda->cuMemPoolCreate(&pool, &properties));
    uint64_t keep = UINT64_MAX; /* freed memory stays in the pool for the next allocation */
    CUDA_TRY(fn, "setting up a memory pool", cuda->cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &keep));
    state->pool = pool;
    atomic_store(&state->ready, true);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_cuda_check(int device) {
    if (device >= 0 && device < MAX_DEVICES && atomic_load(&states[device].ready)) return CUFLASH_SUCCESS;
    pthread_mutex_lock(&mutex);
    cuflash_status status = check_available(device);
    if (status == CUFLASH_SUCCESS && !atomic_load(&states[device].ready)) status = set_up(device, &states[device]);
    pthread_mutex_unlock(&mutex);
    return status;
}

const cuflash_cuda_properties *cuflash_cuda_get_properties(int device) {
    return &states[device].properties;
}

cuflash_status cuflash_cuda_enter(const char *fn, int device, cuflash_cuda_scope *scope) {
    scope->pushed = false;
    CUFLASH_TRY(cuflash_cuda_check(device));
    CUcontext current = NULL;
    CUDA_TRY(fn, "asking for the current context", cuda->cuCtxGetCurrent(&current));
    if (current == states[device].context) return CUFLASH_SUCCESS;
    CUDA_TRY(fn, "making the device current", cuda->cuCtxPushCurrent_v2(states[device].context));
    scope->pushed = true;
    return CUFLASH_SUCCESS;
}

void cuflash_cuda_leave(cuflash_cuda_scope *scope) {
    if (!scope->pushed) return;
    CUcontext popped;
    cuda->cuCtxPopCurrent_v2(&popped);
    scope->pushed = false;
}

/* ---- Memory ------------------------------------------------------------------------------------- */

cuflash_status cuflash_cuda_allocate(const char *fn, int device, size_t bytes, cudaStream_t stream, void **out) {
    *out = NULL;
    CUmemoryPool pool = states[device].pool;
    CUdeviceptr pointer = 0;
    CUresult result = cuda->cuMemAllocFromPoolAsync(&pointer, bytes, pool, stream);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) { /* the pool may hold memory in pieces that do not fit */
        cuda->cuStreamSynchronize(stream);
        cuda->cuMemPoolTrimTo(pool, 0);
        result = cuda->cuMemAllocFromPoolAsync(&pointer, bytes, pool, stream);
        if (result == CUDA_ERROR_OUT_OF_MEMORY) return CUFLASH_SUCCESS;
    }
    CUDA_TRY(fn, "allocating memory", result);
    *out = (void *)(uintptr_t)pointer;
    return CUFLASH_SUCCESS;
}

void cuflash_cuda_free(void *memory, cudaStream_t stream) {
    cuda->cuMemFreeAsync((CUdeviceptr)(uintptr_t)memory, stream);
}

static CUresult trim(CUmemoryPool pool) {
    CUresult result = cuda->cuCtxSynchronize(); /* what is freed on a stream is free once the stream gets there */
    return result == CUDA_SUCCESS ? cuda->cuMemPoolTrimTo(pool, 0) : result;
}

/* Is this host memory that CUDA copies from in its own time? */
static bool is_pinned(const void *host) {
    unsigned type = 0;
    return cuda->cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, (CUdeviceptr)(uintptr_t)host) == CUDA_SUCCESS &&
           type == CU_MEMORYTYPE_HOST;
}

cuflash_status cuflash_cuda_copy(const char *fn, void *dst, int dst_device, const void *src, int src_device, size_t bytes,
                                 cudaStream_t stream) {
    CUdeviceptr to = (CUdeviceptr)(uintptr_t)dst, from = (CUdeviceptr)(uintptr_t)src;
    if (dst_device >= 0 && src_device >= 0 && dst_device != src_device) {
        CUDA_TRY(fn, "copying between devices",
                 cuda->cuMemcpyPeerAsync(to, states[dst_device].context, from, states[src_device].context, bytes, stream));
        return CUFLASH_SUCCESS;
    }
    CUDA_TRY(fn, "copying", cuda->cuMemcpyAsync(to, from, bytes, stream));
    if (dst_device >= 0 && (src_device >= 0 || !is_pinned(src))) return CUFLASH_SUCCESS;
    return cuflash_cuda_wait(fn, stream);
}

cuflash_status cuflash_cuda_wait(const char *fn, cudaStream_t stream) {
    CUDA_TRY(fn, "waiting for the device", cuda->cuStreamSynchronize(stream));
    return CUFLASH_SUCCESS;
}

/* ---- Streams and events: the public functions --------------------------------------------------- */

static _Thread_local cudaStream_t thread_stream;

cudaStream_t cuflash_cuda_stream(void) {
    return thread_stream;
}

cudaStream_t cuflash_set_stream(cudaStream_t stream) {
    cudaStream_t before = thread_stream;
    thread_stream = stream;
    return before;
}

/* Runs a call on a device: what it says inside is in `what`. */
#define INSIDE(fn, device, what, call)                                                                                         \
    do {                                                                                                                       \
        cuflash_cuda_scope scope;                                                                                              \
        CUFLASH_TRY(cuflash_cuda_enter(fn, device, &scope));                                                                   \
        CUresult result = (call);                                                                                              \
        cuflash_cuda_leave(&scope);                                                                                            \
        CUDA_TRY(fn, what, result);                                                                                            \
    } while (0)

static cuflash_status need(const char *fn, const char *arg, const void *pointer) {
    return pointer ? CUFLASH_SUCCESS
                   : cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument '%s': expected a pointer, got NULL", fn, arg);
}

cuflash_status cuflash_stream_create(int device, cudaStream_t *stream) {
    CUFLASH_TRY(need("stream_create", "stream", stream));
    INSIDE("stream_create", device, "creating a stream", cuda->cuStreamCreate(stream, 0));
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_stream_destroy(int device, cudaStream_t stream) {
    CUFLASH_TRY(need("stream_destroy", "stream", stream));
    if (thread_stream == stream) thread_stream = NULL;
    INSIDE("stream_destroy", device, "destroying a stream", cuda->cuStreamDestroy_v2(stream));
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_stream_synchronize(int device, cudaStream_t stream) {
    INSIDE("stream_synchronize", device, "waiting for a stream", cuda->cuStreamSynchronize(stream ? stream : thread_stream));
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_stream_wait_event(int device, cudaStream_t stream, cudaEvent_t event) {
    CUFLASH_TRY(need("stream_wait_event", "event", event));
    INSIDE("stream_wait_event", device, "making a stream wait",
           cuda->cuStreamWaitEvent(stream ? stream : thread_stream, event, 0));
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_event_create(int device, cudaEvent_t *event) {
    CUFLASH_TRY(need("event_create", "event", event));
    INSIDE("event_create", device, "creating an event", cuda->cuEventCreate(event, 0));
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_event_destroy(int device, cudaEvent_t event) {
    CUFLASH_TRY(need("event_destroy", "event", event));
    INSIDE("event_destroy", device, "destroying an event", cuda->cuEventDestroy_v2(event));
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_event_record(int device, cudaEvent_t event, cudaStream_t stream) {
    CUFLASH_TRY(need("event_record", "event", event));
    INSIDE("event_record", device, "recording an event", cuda->cuEventRecord(event, stream ? stream : thread_stream));
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_event_synchronize(int device, cudaEvent_t event) {
    CUFLASH_TRY(need("event_synchronize", "event", event));
    INSIDE("event_synchronize", device, "waiting for an event", cuda->cuEventSynchronize(event));
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_event_elapsed(int device, cudaEvent_t start, cudaEvent_t end, float *milliseconds) {
    CUFLASH_TRY(need("event_elapsed", "start", start));
    CUFLASH_TRY(need("event_elapsed", "end", end));
    CUFLASH_TRY(need("event_elapsed", "milliseconds", milliseconds));
    INSIDE("event_elapsed", device, "timing between two events", cuda->cuEventElapsedTime(milliseconds, start, end));
    return CUFLASH_SUCCESS;
}

/* ---- Devices: the public functions -------------------------------------------------------------- */

int cuflash_cuda_device_count(void) {
    const cuflash_cuda_driver *driver = cuflash_kernels_toolkit ? cuflash_cuda_get_driver(NULL) : NULL;
    if (!driver || driver->version / 1000 < cuflash_kernels_toolkit / 1000) return 0;
    return driver->devices < MAX_DEVICES ? driver->devices : MAX_DEVICES;
}

cuflash_status cuflash_device_check(int device) {
    return device == CUFLASH_CPU ? CUFLASH_SUCCESS : cuflash_cuda_check(device);
}

cuflash_status cuflash_cuda_trim(const char *fn, int device) {
    INSIDE(fn, device, "giving memory back", trim(states[device].pool));
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_synchronize(int device) {
    if (device == CUFLASH_CPU) return CUFLASH_SUCCESS;
    INSIDE("synchronize", device, "waiting for the device", cuda->cuCtxSynchronize());
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_cuda_get_device_info(int device, cuflash_cuda_device_info *info) {
    static const char fn[] = "cuda_get_device_info";
    CUFLASH_TRY(need(fn, "info", info));
    size_t available = 0, total = 0;
    INSIDE(fn, device, "asking for its memory", cuda->cuMemGetInfo_v2(&available, &total));
    const cuflash_cuda_properties *p = cuflash_cuda_get_properties(device);
    memset(info, 0, sizeof *info);
    memcpy(info->name, p->name, sizeof info->name);
    info->name[sizeof info->name - 1] = 0;
    info->compute_major = p->major;
    info->compute_minor = p->minor;
    info->multiprocessors = p->multiprocessors;
    info->shared_bytes = p->shared_bytes;
    info->driver_version = cuda->version;
    info->toolkit_version = cuflash_kernels_toolkit;
    info->total_bytes = (int64_t)total;
    info->free_bytes = (int64_t)available;
    return CUFLASH_SUCCESS;
}
