#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

/* A call does its work itself, and threads of a pool help it. Nobody waits for a thread that has not come: one that slept may need
 * milliseconds to wake where cores are shared. A thread that has nothing to do looks for work for a while, and then sleeps. Why it is
 * not OpenMP: docs/kernels/cpu.md. */

/* Units that threads take one after the other: one run of a stage or several. */
typedef struct {
    _Alignas(64) atomic_llong next; /* a line of its own */
    int64_t end;
} queue;

enum { MOST_QUEUES = 64 };

/* A stage under way. */
typedef struct {
    const cuflash_stage *stage;
    queue queues[MOST_QUEUES];
    int count;
    _Alignas(64) atomic_llong done;
} progress;

/* What helpers come to. It is the caller's, who waits until those who came have left. */
typedef struct job {
    struct job *other;
    progress stages[CUFLASH_MOST_STAGES];
    int count, threads;
    int wanted, came; /* helpers; guarded by the pool's mutex, which `present` is written with, too */
    atomic_int present;
    pthread_mutex_t mutex;
    pthread_cond_t progressed; /* a stage is done */
} job;

/* A thread of the pool; `other` is for those that sleep. */
typedef struct helper {
    struct helper *other;
    pthread_cond_t called;
    bool awake;
    pid_t id;
    int avoided; /* the core it may not be on, -1: none */
} helper;

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t left; /* a job has no helper left */
    job *jobs;
    helper *sleeping;
    int threads;
    atomic_uint posted; /* jobs so far: what a thread looks at before it sleeps */
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .left = PTHREAD_COND_INITIALIZER};

/* 50 us and more on x86-64. */
enum { LOOKS = 4000 };

static void pause_a_little(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* ---- How many threads --------------------------------------------------------------------------- */

static int processors(void) {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : (int)online;
}

/* No more are started than any use could want. */
static int most_threads(void) {
    int most = 4 * processors();
    return most < 64 ? 64 : most;
}

static int first_threads(void) {
    const char *text = getenv("OMP_NUM_THREADS");
    long threads = text ? strtol(text, NULL, 10) : 0; /* the first of a list */
    return threads < 1 ? processors() : threads < most_threads() ? (int)threads : most_threads();
}

static atomic_int chosen_threads; /* 0: not yet */

int cuflash_get_num_threads(void) {
    int threads = atomic_load(&chosen_threads);
    if (threads > 0) return threads;
    int none = 0;
    threads = first_threads();
    return atomic_compare_exchange_strong(&chosen_threads, &none, threads) ? threads : none;
}

cuflash_status cuflash_set_num_threads(int threads) {
    if (threads < 1 || threads > most_threads())
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "set_num_threads: argument 'threads': expected 1 to %d, got %d",
                            most_threads(), threads);
    atomic_store(&chosen_threads, threads);
    return CUFLASH_SUCCESS;
}

/* ---- Stages ------------------------------------------------------------------------------------- */

static bool is_done(progress *p) {
    return atomic_load_explicit(&p->done, memory_order_acquire) >= p->stage->count;
}

/* As many queues as there are runs, or each of several runs. */
static void begin_stage(progress *p, const cuflash_stage *s) {
    int64_t runs = s->runs < 1 ? 1 : s->runs, each = (runs + MOST_QUEUES - 1) / MOST_QUEUES, units = s->count / runs * each;
    p->stage = s;
    p->count = (int)((runs + each - 1) / each);
    atomic_init(&p->done, 0);
    for (int i = 0; i < p->count; i++) {
        queue *q = &p->queues[i];
        atomic_init(&q->next, i * units);
        q->end = i + 1 < p->count ? (i + 1) * units : s->count;
    }
}

static int64_t units_left(queue *q) {
    return q->end - atomic_load_explicit(&q->next, memory_order_relaxed);
}

/* The queue that has most units left, or NULL if none has. */
static queue *fullest_queue(progress *p) {
    queue *fullest = NULL;
    int64_t most = 0;
    for (int i = 0; i < p->count; i++) {
        int64_t left = units_left(&p->queues[i]);
        if (left > most) most = left, fullest = &p->queues[i];
    }
    return fullest;
}

/* Threads begin at queues of their own, as far as there are as many, in each stage the same. */
static void take_units(job *j, progress *p, int thread) {
    const cuflash_stage *s = p->stage;
    queue *q = &p->queues[(int64_t)thread * p->count / j->threads];
    for (; q; q = fullest_queue(p)) {
        int64_t begin;
        while ((begin = atomic_fetch_add_explicit(&q->next, s->grain, memory_order_relaxed)) < q->end) {
            int64_t end = q->end - begin < s->grain ? q->end : begin + s->grain;
            s->fn(s->context, begin, end, thread);
            if (atomic_fetch_add_explicit(&p->done, end - begin, memory_order_acq_rel) + end - begin < s->count) continue;
            pthread_mutex_lock(&j->mutex);
            pthread_cond_broadcast(&j->progressed);
            pthread_mutex_unlock(&j->mutex);
        }
    }
}

/* Others work on the last units, which takes about as long as one. Looks for a while, lets other threads run for some
 * milliseconds, and then sleeps. */
static void wait_for(job *j, progress *p) {
    enum { YIELDS = 10000 };
    for (int i = 0; i < LOOKS + YIELDS; i++) {
        if (is_done(p)) return;
        if (i < LOOKS)
            pause_a_little();
        else
            sched_yield();
    }
    pthread_mutex_lock(&j->mutex);
    while (!is_done(p)) pthread_cond_wait(&j->progressed, &j->mutex);
    pthread_mutex_unlock(&j->mutex);
}

static void do_stages(job *j, int thread) {
    for (int i = 0; i < j->count; i++) {
        take_units(j, &j->stages[i], thread);
        if (thread == 0 || i + 1 < j->count) wait_for(j, &j->stages[i]);
    }
}

/* ---- The pool ----------------------------------------------------------------------------------- */

/* Are there units that nobody has taken? */
static bool needs_help(job *j) {
    for (int i = 0; j->wanted > 0 && i < j->count; i++)
        if (fullest_queue(&j->stages[i])) return true;
    return false;
}

/* With the pool's mutex. */
static job *find_job(void) {
    job *j = pool.jobs;
    while (j && !needs_help(j)) j = j->other;
    return j;
}

static pid_t own_id(void) {
#ifdef __linux__
    return (pid_t)syscall(SYS_gettid);
#else
    return 0;
#endif
}

/* Keeps a thread off the core of the one that calls. Left alone, Linux puts a thread that wakes on the caller's core where the one
 * it slept on is idle in a virtual machine, as it takes that for one the host has given to others. There it waits for the caller,
 * for milliseconds. */
static void avoid_own_core(helper *h) {
#ifdef __linux__
    cpu_set_t set;
    int core = sched_getcpu();
    if (core < 0 || core == h->avoided || sched_getaffinity(0, sizeof set, &set) != 0 || CPU_COUNT(&set) < 2) return;
    CPU_CLR(core, &set);
    if (sched_setaffinity(h->id, sizeof set, &set) == 0) h->avoided = core;
#else
    (void)h;
#endif
}

static void wait_for_job(helper *h) {
    unsigned seen = atomic_load(&pool.posted);
    pthread_mutex_unlock(&pool.mutex);
    for (int i = 0; i < LOOKS && atomic_load_explicit(&pool.posted, memory_order_relaxed) == seen; i++) pause_a_little();
    pthread_mutex_lock(&pool.mutex);
    if (atomic_load(&pool.posted) != seen) return;
    h->awake = false;
    h->other = pool.sleeping;
    pool.sleeping = h;
    while (!h->awake) pthread_cond_wait(&h->called, &pool.mutex);
}

static void *help(void *unused) {
    helper h = {.called = PTHREAD_COND_INITIALIZER, .id = own_id(), .avoided = -1};
    pthread_mutex_lock(&pool.mutex);
    for (;;) {
        job *j = find_job();
        if (!j) {
            wait_for_job(&h);
            continue;
        }
        int thread = ++j->came;
        j->wanted--, atomic_fetch_add(&j->present, 1);
        pthread_mutex_unlock(&pool.mutex);
        do_stages(j, thread);
        pthread_mutex_lock(&pool.mutex);
        if (atomic_fetch_sub(&j->present, 1) == 1) pthread_cond_broadcast(&pool.left);
    }
    return unused;
}

/* With the pool's mutex; there are fewer where the system has no more. Signals are for the program's own threads, but for those that
 * say what a thread did itself. */
static void start_threads(int count) {
    static const int own[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
    sigset_t all, before;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) sigdelset(&all, own[i]);
    while (pool.threads < count) {
        pthread_t thread;
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int failed = pthread_create(&thread, NULL, help, NULL);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (failed) return;
        pthread_detach(thread);
        pool.threads++;
    }
}

static void post(job *j) {
    pthread_mutex_lock(&pool.mutex);
    start_threads(j->wanted);
    j->other = pool.jobs;
    pool.jobs = j;
    atomic_fetch_add(&pool.posted, 1);
    for (int i = 0; i < j->wanted && pool.sleeping; i++) {
        helper *h = pool.sleeping;
        pool.sleeping = h->other;
        avoid_own_core(h);
        h->awake = true;
        pthread_cond_signal(&h->called);
    }
    pthread_mutex_unlock(&pool.mutex);
}

/* All units are done; who comes now comes too late. */
static void withdraw(job *j) {
    pthread_mutex_lock(&pool.mutex);
    job **at = &pool.jobs;
    while (*at != j) at = &(*at)->other;
    *at = j->other;
    pthread_mutex_unlock(&pool.mutex);
    for (int i = 0; i < LOOKS && atomic_load(&j->present) > 0; i++) pause_a_little(); /* they are about to */
    pthread_mutex_lock(&pool.mutex);                                                  /* who left last has let go of it then */
    while (atomic_load(&j->present) > 0) pthread_cond_wait(&pool.left, &pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
}

void cuflash_parallel_stages(int threads, const cuflash_stage *stages, int count) {
    int64_t most = 0;
    for (int i = 0; i < count; i++) {
        const cuflash_stage *s = &stages[i];
        int64_t chunks = s->count / s->grain + (s->count % s->grain != 0);
        if (chunks > most) most = chunks;
    }
    if (threads > most) threads = (int)most;
    if (threads <= 1) {
        for (int i = 0; i < count; i++)
            if (stages[i].count > 0) stages[i].fn(stages[i].context, 0, stages[i].count, 0);
        return;
    }
    job j;
    j.count = count, j.threads = threads, j.wanted = threads - 1, j.came = 0;
    j.mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER, j.progressed = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    atomic_init(&j.present, 0);
    for (int i = 0; i < count; i++) begin_stage(&j.stages[i], &stages[i]);
    post(&j);
    do_stages(&j, 0);
    withdraw(&j);
}

void cuflash_parallel_for(int threads, int64_t count, int64_t grain, cuflash_range_fn fn, void *context) {
    cuflash_parallel_stages(threads, &(cuflash_stage){count, grain < 1 ? 1 : grain, fn, context, 1}, 1);
}

/* ---- Fork --------------------------------------------------------------------------------------- */

/* A child has none of its parent's threads, and starts its own. */
static void before_fork(void) {
    pthread_mutex_lock(&pool.mutex);
}
static void in_parent(void) {
    pthread_mutex_unlock(&pool.mutex);
}
static void in_child(void) {
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.left, NULL);
    pool.jobs = NULL;
    pool.sleeping = NULL;
    pool.threads = 0;
}

__attribute__((constructor)) static void watch_for_forks(void) {
    pthread_atfork(before_fork, in_parent, in_child);
}
