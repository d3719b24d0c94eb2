/* Which devices there are, and where a pointer lives. */
#ifndef CUFLASH_DEVICE_H
#define CUFLASH_DEVICE_H

#include "status.h"

/* CUFLASH_CPU for host memory, else the ordinal of the CUDA device the memory belongs to. */
int cuflash_pointer_device(const void *pointer);

#endif
