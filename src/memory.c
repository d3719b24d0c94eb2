#include "memory.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

enum { ALIGNMENT = 64 };

struct cuflash_storage {
    atomic_llong references;
    int device;
    size_t bytes;
    void *data;
};

/* The CPU's account; guarded by the mutex. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static cuflash_memory_stats account;

static const char *human_bytes(char buffer[32], double bytes) {
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    int unit = 0;
    while (bytes >= 1024 && unit < 6) {
        bytes /= 1024;
        unit++;
    }
    snprintf(buffer, 32, unit ? "%.2f %s" : "%.0f %s", bytes, units[unit]);
    return buffer;
}

static cuflash_status out_of_memory(const char *what, size_t bytes, const cuflash_memory_stats *now) {
    char wanted[32], held[32], limit[48] = "";
    if (now->limit_bytes > 0) {
        char text[32];
        snprintf(limit, sizeof limit, ", limit %s", human_bytes(text, (double)now->limit_bytes));
    }
    return cuflash_fail(CUFLASH_OUT_OF_MEMORY, "%s: cannot allocate %s on cpu (%s held by %lld tensor%s%s)", what,
                        human_bytes(wanted, (double)bytes), human_bytes(held, (double)now->live_bytes),
                        (long long)now->live_storages, now->live_storages == 1 ? "" : "s", limit);
}

/* Takes bytes on the account if the limit allows; REFUSED never is. Either way the account is left in *now. */
static const size_t REFUSED = SIZE_MAX;

static bool account_take(size_t bytes, int storages, cuflash_memory_stats *now) {
    pthread_mutex_lock(&mutex);
    bool fits = bytes <= INT64_MAX && (account.limit_bytes == 0 || (int64_t)bytes <= account.limit_bytes - account.live_bytes);
    if (fits) {
        account.live_bytes += (int64_t)bytes;
        account.live_storages += storages;
        account.total_storages += storages;
        if (account.live_bytes > account.peak_bytes) account.peak_bytes = account.live_bytes;
    }
    *now = account;
    pthread_mutex_unlock(&mutex);
    return fits;
}

static void account_return(size_t bytes, int storages) {
    pthread_mutex_lock(&mutex);
    account.live_bytes -= (int64_t)bytes;
    account.live_storages -= storages;
    pthread_mutex_unlock(&mutex);
}

static void *allocate(size_t bytes) {
    if (bytes > SIZE_MAX - ALIGNMENT) return NULL;
    return aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

cuflash_status cuflash_storage_new(cuflash_storage **out, int device, size_t bytes, const char *what) {
    CUFLASH_TRY(cuflash_device_check(device));
    cuflash_memory_stats now;
    cuflash_storage *storage = malloc(sizeof *storage);
    void *data = storage ? allocate(bytes) : NULL; /* large memory is not touched yet, so the account may still refuse */
    if (!account_take(data ? bytes : REFUSED, 1, &now)) {
        free(data);
        free(storage);
        return out_of_memory(what, bytes, &now);
    }
    atomic_init(&storage->references, 1);
    storage->device = device;
    storage->bytes = bytes;
    storage->data = data;
    *out = storage;
    return CUFLASH_SUCCESS;
}

void *cuflash_storage_data(const cuflash_storage *storage) {
    return storage->data;
}

void cuflash_storage_retain(cuflash_storage *storage) {
    if (storage) atomic_fetch_add_explicit(&storage->references, 1, memory_order_relaxed);
}

void cuflash_storage_release(cuflash_storage *storage) {
    if (!storage || atomic_fetch_sub_explicit(&storage->references, 1, memory_order_acq_rel) != 1) return;
    account_return(storage->bytes, 1);
    free(storage->data);
    free(storage);
}

cuflash_status cuflash_workspace_new(void **out, int device, size_t bytes, const char *what) {
    *out = NULL;
    if (bytes == 0) return CUFLASH_SUCCESS;
    CUFLASH_TRY(cuflash_device_check(device));
    cuflash_memory_stats now;
    void *data = allocate(bytes);
    if (!account_take(data ? bytes : REFUSED, 0, &now)) {
        free(data);
        return out_of_memory(what, bytes, &now);
    }
    *out = data;
    return CUFLASH_SUCCESS;
}

void cuflash_workspace_release(void *workspace, int device, size_t bytes) {
    (void)device;
    if (!workspace) return;
    free(workspace);
    account_return(bytes, 0);
}

cuflash_status cuflash_memory_get_stats(int device, cuflash_memory_stats *stats) {
    CUFLASH_TRY(cuflash_device_check(device));
    if (!stats) return cuflash_fail(CUFLASH_NULL_POINTER, "memory_get_stats: argument 'stats': expected a pointer, got NULL");
    pthread_mutex_lock(&mutex);
    *stats = account;
    pthread_mutex_unlock(&mutex);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_memory_reset_peak(int device) {
    CUFLASH_TRY(cuflash_device_check(device));
    pthread_mutex_lock(&mutex);
    account.peak_bytes = account.live_bytes;
    pthread_mutex_unlock(&mutex);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_memory_set_limit(int device, int64_t bytes) {
    CUFLASH_TRY(cuflash_device_check(device));
    if (bytes < 0)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "memory_set_limit: argument 'bytes': expected >= 0, got %lld",
                            (long long)bytes);
    pthread_mutex_lock(&mutex);
    account.limit_bytes = bytes;
    pthread_mutex_unlock(&mutex);
    return CUFLASH_SUCCESS;
}
