/* A stand-in for CUDA's driver library with the one function that tells where a pointer lives. A test loads it under
 * the driver's name and says which addresses belong to a device. */
#include <stddef.h>

enum { MEMORY_TYPE = 2, DEVICE_ORDINAL = 9 };        /* CUpointer_attribute */
enum { MEMORYTYPE_HOST = 1, MEMORYTYPE_DEVICE = 2 }; /* CUmemorytype */
enum { SUCCESS = 0, INVALID_VALUE = 1 };             /* CUresult */

static unsigned long long first, bytes;
static int device;
static int calls;

__attribute__((visibility("default"))) void fake_device_memory(const void *start, size_t size, int ordinal) {
    first = (unsigned long long)(size_t)start;
    bytes = size;
    device = ordinal;
}

/* How often the driver was asked. */
__attribute__((visibility("default"))) int fake_calls(void) {
    return calls;
}

/* As the driver does, this fails for memory that CUDA has never heard of. */
__attribute__((visibility("default"))) int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
    calls++;
    if (pointer < first || pointer >= first + bytes) return INVALID_VALUE;
    if (attribute == MEMORY_TYPE)
        *(unsigned *)data = MEMORYTYPE_DEVICE;
    else if (attribute == DEVICE_ORDINAL)
        *(int *)data = device;
    else
        return INVALID_VALUE;
    return SUCCESS;
}
