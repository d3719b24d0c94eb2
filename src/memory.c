#include "memory.h"

#include "cuda/cuda.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { ALIGNMENT = 64, HUGE_PAGE = 2 << 20, LARGE = 32 << 20, MAX_ACCOUNTS = 65 };

struct cuflash_storage {
    atomic_llong references;
    int device;
    cudaStream_t stream; /* of the thread that made it */
    size_t bytes;
    void *data;
};

/* What is held on the CPU and on each CUDA device; guarded by the mutex. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static cuflash_memory_stats accounts[MAX_ACCOUNTS];

/* Of a device that has passed cuflash_device_check. */
static cuflash_memory_stats *account_of(int device) {
    return &accounts[device - CUFLASH_CPU];
}

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

static cuflash_status out_of_memory(const char *what, int device, size_t bytes, const cuflash_memory_stats *now) {
    char wanted[32], held[32], limit[48] = "", place[112] = "cpu";
    if (device != CUFLASH_CPU) {
        char available[32], total[32];
        cuflash_cuda_device_info info;
        snprintf(place, sizeof place, "cuda:%d", device);
        if (cuflash_cuda_get_device_info(device, &info) == CUFLASH_SUCCESS)
            snprintf(place, sizeof place, "cuda:%d, which has %s free of %s", device,
                     human_bytes(available, (double)info.free_bytes), human_bytes(total, (double)info.total_bytes));
    }
    if (now->limit_bytes > 0) {
        char text[32];
        snprintf(limit, sizeof limit, ", limit %s", human_bytes(text, (double)now->limit_bytes));
    }
    return cuflash_fail(CUFLASH_OUT_OF_MEMORY, "%s: cannot allocate %s on %s (%s held by %lld tensor%s%s)", what,
                        human_bytes(wanted, (double)bytes), place, human_bytes(held, (double)now->live_bytes),
                        (long long)now->live_storages, now->live_storages == 1 ? "" : "s", limit);
}

static const size_t REFUSED = SIZE_MAX;

/* Takes bytes on the account if the limit allows; REFUSED never is. Either way the account is left in *now. */
static bool account_take(int device, size_t bytes, int storages, cuflash_memory_stats *now) {
    cuflash_memory_stats *account = account_of(device);
    pthread_mutex_lock(&mutex);
    bool fits =
        bytes <= INT64_MAX && (account->limit_bytes == 0 || (int64_t)bytes <= account->limit_bytes - account->live_bytes);
    if (fits) {
        account->live_bytes += (int64_t)bytes;
        account->live_storages += storages;
        account->total_storages += storages;
        if (account->live_bytes > account->peak_bytes) account->peak_bytes = account->live_bytes;
    }
    *now = *account;
    pthread_mutex_unlock(&mutex);
    return fits;
}

static void account_return(int device, size_t bytes, int storages) {
    cuflash_memory_stats *account = account_of(device);
    pthread_mutex_lock(&mutex);
    account->live_bytes -= (int64_t)bytes;
    account->live_storages -= storages;
    pthread_mutex_unlock(&mutex);
}

/* The largest workspace on the CPU of those that malloc may map anew for each call is kept for the next one, whose pages the
 * system need not clear then; up to a size beyond which calls take so long that it does not matter. Guarded by the mutex. */
static const size_t LEAST_KEPT = (size_t)1 << 20, MOST_KEPT = (size_t)256 << 20;
static struct {
    void *data;
    size_t bytes;
    bool lent;
} kept;

static void *borrow_kept(size_t bytes) {
    pthread_mutex_lock(&mutex);
    bool fits = bytes >= LEAST_KEPT && bytes <= kept.bytes && !kept.lent;
    if (fits) kept.lent = true;
    pthread_mutex_unlock(&mutex);
    return fits ? kept.data : NULL;
}

/* Keeps data, of so many bytes or NULL, in place of what is kept, and gives that back; or gives data back. */
static void keep(void *data, size_t bytes) {
    pthread_mutex_lock(&mutex);
    void *unwanted = data;
    if (data && data == kept.data) {
        kept.lent = false;
        unwanted = NULL;
    } else if (!kept.lent && (!data || (bytes >= LEAST_KEPT && bytes <= MOST_KEPT && bytes > kept.bytes))) {
        unwanted = kept.data;
        kept.data = data, kept.bytes = bytes;
    }
    pthread_mutex_unlock(&mutex);
    free(unwanted);
}

/* Host memory. Large blocks, which malloc maps anew each time, ask for huge pages: a page fault for every 4 KB took a quarter of
 * a backward's time. */
static void *allocate_here(size_t bytes) {
    size_t alignment = bytes < LARGE ? ALIGNMENT : HUGE_PAGE, whole = (bytes + alignment - 1) / alignment * alignment;
    void *data = aligned_alloc(alignment, whole);
    if (!data) {
        keep(NULL, 0);
        data = aligned_alloc(alignment, whole);
    }
#ifdef MADV_HUGEPAGE
    if (data && alignment == HUGE_PAGE) madvise(data, bytes, MADV_HUGEPAGE); /* a wish: pages of any size will do */
#endif
    return data;
}

/* Memory without an account, *out is NULL where there is not enough. */
static cuflash_status allocate(const char *what, int device, size_t bytes, void **out) {
    *out = NULL;
    if (bytes > SIZE_MAX - HUGE_PAGE) return CUFLASH_SUCCESS;
    if (device == CUFLASH_CPU) {
        *out = allocate_here(bytes);
        return CUFLASH_SUCCESS;
    }
    cuflash_cuda_scope scope;
    CUFLASH_TRY(cuflash_cuda_enter(what, device, &scope));
    cuflash_status status = cuflash_cuda_allocate(what, device, bytes, cuflash_cuda_stream(), out);
    cuflash_cuda_leave(&scope);
    return status;
}

static void release(int device, void *data, cudaStream_t stream) {
    if (device == CUFLASH_CPU || !data) {
        free(data);
        return;
    }
    cuflash_cuda_scope scope;
    if (cuflash_cuda_enter("release", device, &scope) != CUFLASH_SUCCESS)
        return; /* the process is ending, or the device is lost */
    cuflash_cuda_free(data, stream);
    cuflash_cuda_leave(&scope);
}

/* Where a storage is given back. Collectors run at any time, also while the thread works on another stream than the storage
 * was made and used on, and that may be gone by then: the default stream comes after what all (blocking) streams have been
 * given. */
static cudaStream_t stream_to_release(const cuflash_storage *storage) {
    return storage->stream == cuflash_cuda_stream() ? storage->stream : NULL;
}

static void release_workspace(int device, void *data, size_t bytes) {
    if (device == CUFLASH_CPU)
        keep(data, bytes);
    else
        release(device, data, cuflash_cuda_stream());
}

/* Memory on the account: of a storage, or of none, which is a workspace. A refusal leaves no trace. */
static cuflash_status obtain(const char *what, int device, size_t bytes, int storages, void **out) {
    cuflash_memory_stats now;
    *out = device == CUFLASH_CPU && storages == 0 ? borrow_kept(bytes) : NULL;
    if (!*out)
        CUFLASH_TRY(allocate(what, device, bytes, out)); /* nothing has touched it yet, so the account may still refuse */
    if (account_take(device, *out ? bytes : REFUSED, storages, &now)) return CUFLASH_SUCCESS;
    release_workspace(device, *out, 0); /* of a storage, too: what is new and of no size is not kept */
    *out = NULL;
    return out_of_memory(what, device, bytes, &now);
}

cuflash_status cuflash_storage_new(cuflash_storage **out, int device, size_t bytes, const char *what) {
    CUFLASH_TRY(cuflash_device_check(device));
    cuflash_storage *storage = malloc(sizeof *storage);
    if (!storage) return cuflash_fail(CUFLASH_OUT_OF_MEMORY, "%s: cannot allocate %zu bytes on cpu", what, sizeof *storage);
    cuflash_status status = obtain(what, device, bytes, 1, &storage->data);
    if (status != CUFLASH_SUCCESS) {
        free(storage);
        return status;
    }
    atomic_init(&storage->references, 1);
    storage->device = device;
    storage->stream = cuflash_cuda_stream();
    storage->bytes = bytes;
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
    release(storage->device, storage->data, stream_to_release(storage));
    account_return(storage->device, storage->bytes, 1);
    free(storage);
}

cuflash_status cuflash_workspace_new(void **out, int device, size_t bytes, const char *what) {
    *out = NULL;
    if (bytes == 0) return CUFLASH_SUCCESS;
    CUFLASH_TRY(cuflash_device_check(device));
    return obtain(what, device, bytes, 0, out);
}

void cuflash_workspace_release(void *workspace, int device, size_t bytes) {
    if (!workspace) return;
    release_workspace(device, workspace, bytes);
    account_return(device, bytes, 0);
}

cuflash_status cuflash_memory_get_stats(int device, cuflash_memory_stats *stats) {
    CUFLASH_TRY(cuflash_device_check(device));
    if (!stats) return cuflash_fail(CUFLASH_NULL_POINTER, "memory_get_stats: argument 'stats': expected a pointer, got NULL");
    pthread_mutex_lock(&mutex);
    *stats = *account_of(device);
    pthread_mutex_unlock(&mutex);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_memory_reset_peak(int device) {
    CUFLASH_TRY(cuflash_device_check(device));
    pthread_mutex_lock(&mutex);
    account_of(device)->peak_bytes = account_of(device)->live_bytes;
    pthread_mutex_unlock(&mutex);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_memory_trim(int device) {
    if (device != CUFLASH_CPU) return cuflash_cuda_trim("memory_trim", device);
    keep(NULL, 0);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_memory_set_limit(int device, int64_t bytes) {
    CUFLASH_TRY(cuflash_device_check(device));
    if (bytes < 0)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "memory_set_limit: argument 'bytes': expected >= 0, got %lld",
                            (long long)bytes);
    pthread_mutex_lock(&mutex);
    account_of(device)->limit_bytes = bytes;
    pthread_mutex_unlock(&mutex);
    return CUFLASH_SUCCESS;
}

/* ---- Fork --------------------------------------------------------------------------------------- */

/* Calls of other threads are not in a child: what one was about to change is whole, and what one had borrowed is free. */
static void before_fork(void) {
    pthread_mutex_lock(&mutex);
}
static void in_parent(void) {
    pthread_mutex_unlock(&mutex);
}
static void in_child(void) {
    kept.lent = false;
    pthread_mutex_unlock(&mutex);
}

__attribute__((constructor)) static void watch_for_forks(void) {
    pthread_atfork(before_fork, in_parent, in_child);
}
