#include "parallel.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
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

/* A stage under way. */
typedef struct {
    const cuflash_stage *stage;
    atomic_llong next, done;
    pthread_mutex_t mutex;
    pthread_cond_t all_done;
} share;

static void finish_units(share *work, int64_t units) {
    if (atomic_fetch_add_explicit(&work->done, units, memory_order_acq_rel) + units < work->stage->count) return;
    pthread_mutex_lock(&work->mutex);
    pthread_cond_broadcast(&work->all_done);
    pthread_mutex_unlock(&work->mutex);
}

static bool is_done(share *work) {
    return atomic_load_explicit(&work->done, memory_order_acquire) >= work->stage->count;
}

static void take_units(share *work, int thread) {
    const cuflash_stage *s = work->stage;
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&work->next, s->grain, memory_order_relaxed);
        if (begin >= s->count) return;
        int64_t end = s->count - begin < s->grain ? s->count : begin + s->grain;
        s->fn(s->context, begin, end, thread);
        finish_units(work, end - begin);
    }
}

/* Others work on the last units, which takes about as long as one. Looks for 50 us and more, lets other threads run for some
 * milliseconds, and then sleeps. */
static void wait_for(share *work) {
    enum { LOOKS = 2000, YIELDS = 10000 };
    for (int i = 0; i < LOOKS + YIELDS; i++) {
        if (is_done(work)) return;
        if (i >= LOOKS) sched_yield();
#if defined(__x86_64__)
        else
            __builtin_ia32_pause();
#endif
    }
    pthread_mutex_lock(&work->mutex);
    while (!is_done(work)) pthread_cond_wait(&work->all_done, &work->mutex);
    pthread_mutex_unlock(&work->mutex);
}

/* One team of threads for all stages. Who comes late, as threads do that have slept, finds units taken and done, and nobody has
 * waited for it but in the end. */
NOT_CHECKED void cuflash_parallel_stages(int threads, const cuflash_stage *stages, int count) {
    share shares[CUFLASH_MOST_STAGES];
    int64_t most = 0;
    for (int i = 0; i < count; i++) {
        const cuflash_stage *s = &stages[i];
        int64_t chunks = s->count / s->grain + (s->count % s->grain != 0);
        if (chunks > most) most = chunks;
        shares[i] = (share){.stage = s, .mutex = PTHREAD_MUTEX_INITIALIZER, .all_done = PTHREAD_COND_INITIALIZER};
    }
    if (threads > most) threads = (int)most;
    if (threads <= 1) {
        for (int i = 0; i < count; i++)
            if (stages[i].count > 0) stages[i].fn(stages[i].context, 0, stages[i].count, 0);
        return;
    }
    atomic_store(&started, true);
    __tsan_release(shares);
#pragma omp parallel num_threads(threads)
    {
        __tsan_acquire(shares);
        for (int i = 0; i < count; i++) {
            take_units(&shares[i], omp_get_thread_num());
            if (i + 1 < count) wait_for(&shares[i]);
        }
        __tsan_release(shares);
    }
    __tsan_acquire(shares);
}

void cuflash_parallel_for(int threads, int64_t count, int64_t grain, cuflash_range_fn fn, void *context) {
    cuflash_parallel_stages(threads, &(cuflash_stage){count, grain < 1 ? 1 : grain, fn, context}, 1);
}
