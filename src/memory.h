/* Device memory: storages that tensors share, and the workspace of calls. */
#ifndef CUFLASH_MEMORY_H
#define CUFLASH_MEMORY_H

#include "status.h"

/* A new storage with one reference. what names it in the message if it fails. */
cuflash_status cuflash_storage_new(cuflash_storage **out, int device, size_t bytes, const char *what);

void *cuflash_storage_data(const cuflash_storage *storage);

/* Both take NULL. The last release frees the memory. */
void cuflash_storage_retain(cuflash_storage *storage);
void cuflash_storage_release(cuflash_storage *storage);

/* Memory for the length of a call, 64-byte aligned. Counts towards live_bytes and the limit. */
cuflash_status cuflash_workspace_new(void **out, int device, size_t bytes, const char *what);
void cuflash_workspace_release(void *workspace, int device, size_t bytes);

#endif
