#include "cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

#include "device.h"

static cuflash_cuda_driver driver;
static char why_not[256];
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* Stream-ordered allocation came with CUDA 11.2. */
enum { OLDEST_DRIVER = 11020 };

static void load(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(why_not, sizeof why_not, "there is no CUDA driver on this machine (libcuda.so.1 was not found)");
        return;
    }
    const struct {
        const char *name;
        void **function;
        bool needed;
    } functions[] = {
#define NEEDED(name, parameters) {#name, (void **)&driver.name, true},
#define LATER(name, parameters) {#name, (void **)&driver.name, false},
        CUFLASH_CUDA_DRIVER_MAP(NEEDED) CUFLASH_CUDA_LATER_DRIVER_MAP(LATER)
#undef NEEDED
#undef LATER
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        *functions[i].function = dlsym(library, functions[i].name);
        if (*functions[i].function || !functions[i].needed) continue;
        snprintf(why_not, sizeof why_not, "the CUDA driver is too old: it has no %s (CUDA 11.2 or later is needed)",
                 functions[i].name);
        return;
    }
    CUresult result = driver.cuInit(0);
    if (result == CUDA_SUCCESS) result = driver.cuDriverGetVersion(&driver.version);
    if (result == CUDA_SUCCESS) result = driver.cuDeviceGetCount(&driver.devices);
    if (result == CUDA_ERROR_NO_DEVICE || (result == CUDA_SUCCESS && driver.devices == 0)) {
        snprintf(why_not, sizeof why_not, "the CUDA driver finds no device");
    } else if (result != CUDA_SUCCESS) {
        const char *text = NULL;
        driver.cuGetErrorString(result, &text);
        snprintf(why_not, sizeof why_not, "the CUDA driver does not start: %s (error %d)", text ? text : "unknown error",
                 result);
    } else if (driver.version < OLDEST_DRIVER) {
        snprintf(why_not, sizeof why_not, "the CUDA driver is too old: it is for CUDA %d.%d, and 11.2 or later is needed",
                 driver.version / 1000, driver.version % 1000 / 10);
    }
}

const cuflash_cuda_driver *cuflash_cuda_get_driver(const char **reason) {
    pthread_once(&once, load);
    if (reason) *reason = why_not;
    return why_not[0] ? NULL : &driver;
}

/* Asks the driver only if the process has loaded it already: without it nobody can have made a device pointer. */
int cuflash_pointer_device(const void *pointer) {
    void *library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return CUFLASH_CPU;
    int device = CUFLASH_CPU, ordinal = 0;
    unsigned type = 0;
    CUdeviceptr address = (CUdeviceptr)(uintptr_t)pointer;
    CUresult (*ask)(void *value, int attribute, CUdeviceptr pointer); /* of any driver, also one too old for us */
    *(void **)&ask = dlsym(library, "cuPointerGetAttribute");
    if (ask && ask(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address) == CUDA_SUCCESS && type == CU_MEMORYTYPE_DEVICE &&
        ask(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address) == CUDA_SUCCESS)
        device = ordinal;
    dlclose(library);
    return device;
}

cuflash_status cuflash_cuda_fail(const char *fn, const char *what, CUresult result) {
    const char *name = NULL, *text = NULL;
    driver.cuGetErrorName(result, &name);
    driver.cuGetErrorString(result, &text);
    return cuflash_fail(CUFLASH_CUDA_ERROR, "%s: %s: CUDA says: %s (%s)", fn, what, text ? text : "unknown error",
                        name ? name : "no name");
}
