/* Kernels: fatbins loaded once a device, entry points found once and remembered. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"

/* Kernels that were found, in a list that only grows at its head, so that readers need no lock. */
typedef struct found {
    const struct found *next;
    const cuflash_fatbin *fatbin;
    int device;
    CUmodule module;
    CUfunction function; /* NULL: an entry for the module itself */
    int smem_bytes;
    char entry[];
} found;

static _Atomic(const found *) all;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static const found *search(const cuflash_fatbin *fatbin, int device, const char *entry, int smem_bytes) {
    for (const found *f = atomic_load_explicit(&all, memory_order_acquire); f; f = f->next)
        if (f->fatbin == fatbin && f->device == device && f->smem_bytes >= smem_bytes && strcmp(f->entry, entry) == 0) return f;
    return NULL;
}

static cuflash_status remember(const char *fn, const found *what, const char *entry, const found **out) {
    found *f = malloc(sizeof *f + strlen(entry) + 1);
    if (!f) return cuflash_fail(CUFLASH_OUT_OF_MEMORY, "%s: cannot allocate %zu bytes on cpu", fn, sizeof *f);
    *f = *what;
    strcpy(f->entry, entry);
    f->next = atomic_load_explicit(&all, memory_order_relaxed);
    atomic_store_explicit(&all, f, memory_order_release);
    *out = f;
    return CUFLASH_SUCCESS;
}

static cuflash_status load(const char *fn, const cuflash_cuda_driver *cuda, const cuflash_fatbin *fatbin, int device,
                           const found **module) {
    if ((*module = search(fatbin, device, "", 0))) return CUFLASH_SUCCESS;
    found f = {.fatbin = fatbin, .device = device};
    CUresult result = cuda->cuModuleLoadData(&f.module, fatbin->data);
    if (result == CUDA_ERROR_NO_BINARY_FOR_GPU) {
        const cuflash_cuda_properties *p = cuflash_cuda_get_properties(device);
        return cuflash_fail(CUFLASH_CUDA_ERROR,
                            "%s: this build of cuflash has no %s kernels for %s (sm_%d%d); see CUFLASH_CUDA_ARCHITECTURES", fn,
                            fatbin->name, p->name, p->major, p->minor);
    }
    char what[96];
    snprintf(what, sizeof what, "loading the %s kernels", fatbin->name);
    if (result != CUDA_SUCCESS) return cuflash_cuda_fail(fn, what, result);
    return remember(fn, &f, "", module);
}

static cuflash_status find(const char *fn, int device, const cuflash_fatbin *fatbin, const char *entry, int smem_bytes,
                           const found **out) {
    const cuflash_cuda_driver *cuda = cuflash_cuda_get_driver(NULL);
    if ((*out = search(fatbin, device, entry, smem_bytes))) return CUFLASH_SUCCESS;
    const found *module;
    CUFLASH_TRY(load(fn, cuda, fatbin, device, &module));
    found f = {.fatbin = fatbin, .device = device, .module = module->module, .smem_bytes = smem_bytes};
    CUresult result = cuda->cuModuleGetFunction(&f.function, f.module, entry);
    if (result == CUDA_SUCCESS && smem_bytes > 0) {
        result = cuda->cuFuncSetAttribute(f.function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes);
        if (result == CUDA_SUCCESS)
            result = cuda->cuFuncSetAttribute(f.function, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100);
    }
    if (result != CUDA_SUCCESS) return cuflash_cuda_fail(fn, entry, result);
    return remember(fn, &f, entry, out);
}

cuflash_status cuflash_cuda_kernel(const char *fn, int device, const cuflash_fatbin *fatbin, const char *entry, int smem_bytes,
                                   CUfunction *function) {
    const found *f = search(fatbin, device, entry, smem_bytes);
    if (!f) {
        pthread_mutex_lock(&mutex);
        cuflash_status status = find(fn, device, fatbin, entry, smem_bytes, &f);
        pthread_mutex_unlock(&mutex);
        CUFLASH_TRY(status);
    }
    *function = f->function;
    return CUFLASH_SUCCESS;
}

/* While the kernel before still runs, where the driver can: streams are captured with that since CUDA 12.3. */
static CUresult launch_early(CUfunction function, CUlaunchConfig *config, void **parameters) {
    CUlaunchAttribute attribute = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, .value.allowed = 1};
    config->attributes = &attribute;
    config->attribute_count = 1;
    return cuflash_cuda_get_driver(NULL)->cuLaunchKernelEx(config, function, parameters, NULL);
}

cuflash_status cuflash_cuda_launch(const char *fn, CUfunction function, int64_t blocks, int threads, int smem_bytes,
                                   const void *args, bool early, cudaStream_t stream) {
    if (blocks > INT32_MAX)
        return cuflash_fail(CUFLASH_INVALID_DIMENSION, "%s: the problem needs %lld blocks, and a CUDA grid has at most %d", fn,
                            (long long)blocks, INT32_MAX);
    void *parameters[] = {(void *)(uintptr_t)args};
    const cuflash_cuda_driver *cuda = cuflash_cuda_get_driver(NULL);
    CUlaunchConfig config = {(unsigned)blocks, 1, 1, (unsigned)threads, 1, 1, (unsigned)smem_bytes, stream, NULL, 0};
    CUresult result = early && cuda->cuLaunchKernelEx && cuda->version >= 12030
                          ? launch_early(function, &config, parameters)
                          : cuda->cuLaunchKernel(function, (unsigned)blocks, 1, 1, (unsigned)threads, 1, 1,
                                                 (unsigned)smem_bytes, stream, parameters, NULL);
    return result == CUDA_SUCCESS ? CUFLASH_SUCCESS : cuflash_cuda_fail(fn, "launching a kernel", result);
}
