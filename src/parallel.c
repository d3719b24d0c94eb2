#include "parallel.h"

#include <omp.h>
#include <pthread.h>
#include <stdatomic.h>

/* The thread sanitizer does not see OpenMP's fork and join; these tell it. Only the function with the parallel
 * region needs to be left out: what fn does is checked. */
#if defined(__SANITIZE_THREAD__)
void __tsan_acquire(void *address);
void __tsan_release(void *address);
#define NOT_CHECKED __attribute__((no_sanitize("thread")))
#else
#define __tsan_acquire(address) ((void)(address))
#define __tsan_release(address) ((void)(address))
#define NOT_CHECKED
#endif

/* OpenMP's threads do not survive fork. A child whose parent had them would wait for them forever: it works alone. */
static atomic_bool started, forked;

static void in_child(void) {
    atomic_store(&forked, atomic_load(&started));
}

__attribute__((constructor)) static void watch_for_forks(void) {
    pthread_atfork(NULL, NULL, in_child);
}

static atomic_int chosen_threads; /* 0: what OpenMP says */

/* OpenMP ends the process when it cannot start a thread, so no more are asked for than any use could want. */
static int most_threads(void) {
    int most = 4 * omp_get_num_procs(), limit = omp_get_thread_limit();
    if (most < 64) most = 64;
    return most < limit ? most : limit;
}

int cuflash_get_num_threads(void) {
    if (atomic_load(&forked)) return 1;
    int threads = atomic_load(&chosen_threads), most = most_threads();
    if (threads == 0) threads = omp_get_max_threads();
    return threads < most ? threads : most;
}

cuflash_status cuflash_set_num_threads(int threads) {
    if (threads < 1 || threads > most_threads())
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "set_num_threads: argument 'threads': expected 1 to %d, got %d",
                            most_threads(), threads);
    atomic_store(&chosen_threads, threads);
    return CUFLASH_SUCCESS;
}

typedef struct {
    atomic_llong next;
    int64_t count, grain;
    cuflash_range_fn fn;
    void *context;
} share;

static void take_units(share *work, int thread) {
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&work->next, work->grain, memory_order_relaxed);
        if (begin >= work->count) return;
        int64_t end = work->count - begin < work->grain ? work->count : begin + work->grain;
        work->fn(work->context, begin, end, thread);
    }
}

NOT_CHECKED void cuflash_parallel_for(int threads, int64_t count, int64_t grain, cuflash_range_fn fn, void *context) {
    if (grain < 1) grain = 1;
    int64_t chunks = count / grain + (count % grain != 0);
    if (threads > chunks) threads = (int)chunks;
    if (threads <= 1) {
        if (count > 0) fn(context, 0, count, 0);
        return;
    }
    atomic_store(&started, true);
    share work = {.count = count, .grain = grain, .fn = fn, .context = context};
    atomic_init(&work.next, 0);
    __tsan_release(&work);
#pragma omp parallel num_threads(threads)
    {
        __tsan_acquire(&work);
        take_units(&work, omp_get_thread_num());
        __tsan_release(&work);
    }
    __tsan_acquire(&work);
}
