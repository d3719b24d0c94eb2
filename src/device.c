/* The CUDA driver is never linked. Pointers are asked of it only if the process has loaded it already: without
 * it nobody can have made a device pointer. */
#include "device.h"

#include <dlfcn.h>

/* From the driver API (cuda.h), which is not needed to build. */
typedef int (*pointer_get_attribute_fn)(void *data, int attribute, unsigned long long pointer);
enum { CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9, CU_MEMORYTYPE_DEVICE = 2 };

int cuflash_pointer_device(const void *pointer) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (!driver) return CUFLASH_CPU;
    int device = CUFLASH_CPU;
    pointer_get_attribute_fn get_attribute;
    *(void **)&get_attribute = dlsym(driver, "cuPointerGetAttribute");
    unsigned type = 0;
    int ordinal = 0;
    unsigned long long address = (unsigned long long)(uintptr_t)pointer;
    if (get_attribute && get_attribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address) == 0 && type == CU_MEMORYTYPE_DEVICE &&
        get_attribute(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address) == 0)
        device = ordinal;
    dlclose(driver);
    return device;
}

int cuflash_cuda_device_count(void) {
    return 0;
}

cuflash_status cuflash_device_check(int device) {
    if (device == CUFLASH_CPU) return CUFLASH_SUCCESS;
    if (device < 0)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                            "device: expected CUFLASH_CPU (-1) or a CUDA device's ordinal (0, 1, ...), got %d", device);
    return cuflash_fail(CUFLASH_CUDA_ERROR, "device cuda:%d: this build of cuflash has no CUDA backend", device);
}

cuflash_status cuflash_synchronize(int device) {
    return cuflash_device_check(device);
}
