#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
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
    atomic_llong left;              /* units that are not done */
    int64_t end;
} queue;

enum { MOST_QUEUES = 64, MOST_THREADS = 1024 };

/* Queues, a bit each. */
typedef uint64_t queues;

/* A stage under way. Threads look for work in `open` and `undone`, as to look through all queues takes as long as a small unit. */
typedef struct {
    _Alignas(64) _Atomic queues open; /* that have units nobody has taken */
    _Atomic queues undone;            /* that have units which are not done */
    const cuflash_stage *stage;
    int count;
    bool by_runs; /* a queue waits only for the same one of the stage before */
    queue queues[MOST_QUEUES];
} progress;

/* What helpers come to. It is the caller's, who waits until those who came have left. */
typedef struct {
    progress stages[CUFLASH_MOST_STAGES]; /* that have units */
    int count, threads;
    atomic_uint done;                         /* queues so far: what a thread looks at that has to wait */
    atomic_int asleep;                        /* threads that wait for one more */
    _Atomic uint64_t here[MOST_THREADS / 64]; /* the threads that have come, a bit each */
    pthread_mutex_t mutex;
    pthread_cond_t progressed; /* a queue is done */
} job;

/* Where helpers come to a job and leave it. An entrance is never gone, so that any thread may look at it at any time. */
typedef struct {
    _Alignas(64) _Atomic uint32_t state; /* helpers that may come, PRESENT for each that is there, and WAITED_FOR */
    job *job;                            /* NULL: of none. Who is there may look at it, others with the pool's mutex. */
} entrance;

enum { MOST_JOBS = 64, PRESENT = 1 << 12, WAITED_FOR = 1 << 24 };

/* A thread of the pool; `other` is for those that sleep, in the order of their numbers. */
typedef struct helper {
    struct helper *other;
    int number; /* from 1 */
    pthread_cond_t called;
    bool awake;
    pid_t id;
#ifdef __linux__
    cpu_set_t cores; /* it was put on, none: not yet */
#endif
} helper;

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t left; /* a job that is waited for has no helper left */
    helper *sleeping;
    int threads, asleep;
    uint64_t ended;     /* when the last job was */
    atomic_uint posted; /* jobs so far: what a thread looks at before it sleeps */
    atomic_int entered; /* entrances up to the last that was ever used */
    entrance entrances[MOST_JOBS];
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .left = PTHREAD_COND_INITIALIZER};

/* 50 us and more on x86-64. */
enum { LOOKS = 4000 };

static void pause_a_little(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* A clock that takes no time to look at, and 30 to 80 us of it. */
#if defined(__x86_64__)
enum { SOON = 150000 };
static uint64_t now(void) {
    return __builtin_ia32_rdtsc();
}
#else
enum { SOON = 50000 };
static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}
#endif

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
    return most < 64 ? 64 : most > MOST_THREADS ? MOST_THREADS : most;
}

static int first_threads(void) {
    const char *text = getenv("OMP_NUM_THREADS");
    long threads = text ? strtol(text, NULL, 10) : 0; /* the first of a list */
    if (threads < 1) threads = processors();
    return threads < most_threads() ? (int)threads : most_threads();
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

/* Of numbers begin to end - 1. */
static queues queues_between(int begin, int end) {
    queues up_to_end = end < MOST_QUEUES ? ((queues)1 << end) - 1 : ~(queues)0;
    return up_to_end & ~(((queues)1 << begin) - 1);
}

/* As many queues as there are runs, or each of several runs. */
static void add_stage(job *j, const cuflash_stage *s) {
    progress *p = &j->stages[j->count];
    int64_t runs = s->runs < 1 ? 1 : s->runs, each = (runs + MOST_QUEUES - 1) / MOST_QUEUES, units = s->count / runs * each;
    p->stage = s;
    p->count = (int)((runs + each - 1) / each);
    p->by_runs = runs > 1 && j->count > 0 && p[-1].stage->runs == runs;
    atomic_init(&p->open, queues_between(0, p->count));
    atomic_init(&p->undone, queues_between(0, p->count));
    for (int i = 0; i < p->count; i++) {
        queue *q = &p->queues[i];
        q->end = i + 1 < p->count ? (i + 1) * units : s->count;
        atomic_init(&q->next, i * units);
        atomic_init(&q->left, q->end - i * units);
    }
    j->count++;
}

static bool is_done(const job *j) {
    return atomic_load(&j->stages[j->count - 1].undone) == 0;
}

/* Are there units that nobody has taken? */
static bool has_units(const job *j) {
    for (int s = 0; s < j->count; s++)
        if (atomic_load_explicit(&j->stages[s].open, memory_order_relaxed)) return true;
    return false;
}

/* That have units to take which may begin, as what they need is done. */
static queues ready_queues(const job *j, const progress *p) {
    queues open = atomic_load_explicit(&p->open, memory_order_relaxed);
    if (p == j->stages || open == 0) return open;
    queues undone = atomic_load_explicit(&p[-1].undone, memory_order_acquire);
    return p->by_runs ? open & ~undone : undone ? 0 : open;
}

static int64_t units_to_take(const queue *q) {
    return q->end - atomic_load_explicit(&q->next, memory_order_relaxed);
}

static int first_own(const job *j, const progress *p, int thread) {
    return (int)((int64_t)thread * p->count / j->threads);
}

/* A thread's own are no other's, or where there are fewer queues than threads it is one that several threads have. */
static queues own_queues(const job *j, const progress *p, int thread) {
    int begin = first_own(j, p, thread), end = first_own(j, p, thread + 1);
    return queues_between(begin, end > begin ? end : begin + 1);
}

typedef struct {
    progress *stage;
    int queue;
} place;

/* Of some queues, at least one, the one that has most left to take: from the thread's own on the first of those. */
static place fullest_queue(const job *j, progress *p, queues some, int thread) {
    int own = first_own(j, p, thread), fullest = own;
    int64_t most = INT64_MIN;
    for (queues from_own = some >> own | some << (-own & (MOST_QUEUES - 1)); from_own; from_own &= from_own - 1) {
        int at = (own + __builtin_ctzll(from_own)) % MOST_QUEUES;
        int64_t units = units_to_take(&p->queues[at]);
        if (units > most) most = units, fullest = at;
    }
    return (place){p, fullest};
}

/* Where the thread goes on. First in queues of its own, at the latest stage that is ready, so that it finds in its cache what it
 * has just done; then where most is left of the earliest stage. */
static bool find_place(job *j, int thread, place *found) {
    for (int s = j->count - 1; s >= 0; s--) {
        progress *p = &j->stages[s];
        queues ready = ready_queues(j, p), own = ready & own_queues(j, p, thread);
        if (own == 0) continue;
        *found = fullest_queue(j, p, p->stage->shrink ? ready : own, thread);
        return true;
    }
    for (int s = 0; s < j->count; s++) {
        queues ready = ready_queues(j, &j->stages[s]);
        if (ready == 0) continue;
        *found = fullest_queue(j, &j->stages[s], ready, thread);
        return true;
    }
    return false;
}

/* How many units of a queue a thread takes at once: half of its share of what is left, where as many threads share in each queue
 * that has any, so that they end together. What costs less whole it takes whole while there is a whole one for each of them. */
static int64_t fair_share(const job *j, const progress *p, const queue *q) {
    int64_t grain = p->stage->grain, whole = p->stage->whole < 1 ? 1 : p->stage->whole;
    if (grain <= 1) return 1;
    int64_t open = __builtin_popcountll(atomic_load_explicit(&p->open, memory_order_relaxed)), left = units_to_take(q);
    int64_t sharers = open > 0 ? (j->threads + open - 1) / open : j->threads;
    if (left < whole * sharers) return 1;
    int64_t share = left / (2 * sharers) / whole * whole;
    return share < whole ? whole : share < grain ? share : grain;
}

static void queue_is_done(job *j, progress *p, int number) {
    atomic_fetch_and(&p->undone, ~((queues)1 << number));
    atomic_fetch_add(&j->done, 1);
    if (atomic_load(&j->asleep) == 0) return;
    pthread_mutex_lock(&j->mutex);
    pthread_cond_broadcast(&j->progressed);
    pthread_mutex_unlock(&j->mutex);
}

/* Units of a queue while there are any, or where they shrink one. */
static void take_units(job *j, place at, int thread) {
    progress *p = at.stage;
    const cuflash_stage *s = p->stage;
    queue *q = &p->queues[at.queue];
    do {
        int64_t some = fair_share(j, p, q), begin = atomic_fetch_add_explicit(&q->next, some, memory_order_relaxed);
        if (begin + some >= q->end) atomic_fetch_and_explicit(&p->open, ~((queues)1 << at.queue), memory_order_relaxed);
        if (begin >= q->end) return;
        int64_t end = q->end - begin < some ? q->end : begin + some;
        s->fn(s->context, begin, end, thread);
        if (atomic_fetch_sub_explicit(&q->left, end - begin, memory_order_acq_rel) == end - begin)
            queue_is_done(j, p, at.queue);
    } while (!s->shrink);
}

/* Waits for one more queue to be done than `seen`. Others work on the last units, which takes about as long as one. Looks for a
 * while, lets other threads run for some milliseconds, and then sleeps. */
static void wait_for_more(job *j, unsigned seen) {
    enum { YIELDS = 10000 };
    for (int i = 0; i < LOOKS + YIELDS; i++) {
        if (atomic_load_explicit(&j->done, memory_order_acquire) != seen) return;
        if (i < LOOKS)
            pause_a_little();
        else
            sched_yield();
    }
    pthread_mutex_lock(&j->mutex);
    atomic_fetch_add(&j->asleep, 1);
    while (atomic_load(&j->done) == seen) pthread_cond_wait(&j->progressed, &j->mutex);
    atomic_fetch_sub(&j->asleep, 1);
    pthread_mutex_unlock(&j->mutex);
}

/* The caller stays until all is done, others while there is something to take. */
static void do_stages(job *j, int thread) {
    for (;;) {
        unsigned seen = atomic_load(&j->done); /* before all else is looked at */
        if (thread == 0 ? is_done(j) : !has_units(j)) return;
        place at;
        if (find_place(j, thread, &at))
            take_units(j, at, thread);
        else
            wait_for_more(j, seen);
    }
}

/* ---- The pool ----------------------------------------------------------------------------------- */

/* What is done with it takes less than it takes to sleep and to wake. */
static void lock_pool(void) {
    for (int i = 0; i < LOOKS; i++) {
        if (pthread_mutex_trylock(&pool.mutex) == 0) return;
        for (int pause = 0; pause < 8; pause++) pause_a_little();
    }
    pthread_mutex_lock(&pool.mutex);
}

/* NULL: no job needs help. */
static entrance *enter(void) {
    entrance *end = pool.entrances + atomic_load(&pool.entered);
    for (entrance *e = pool.entrances; e < end; e++) {
        uint32_t state = atomic_load(&e->state);
        while (state % PRESENT > 0)
            if (atomic_compare_exchange_weak(&e->state, &state, state - 1 + PRESENT)) return e;
    }
    return NULL;
}

/* No other helper may come. */
static void close_entrance(entrance *e) {
    if (atomic_load(&e->state) % PRESENT > 0) atomic_fetch_and(&e->state, ~(uint32_t)(PRESENT - 1));
}

/* A helper leaves when there is nothing to take any more. The job may be gone then. */
static void leave(entrance *e) {
    close_entrance(e);
    if (atomic_fetch_sub(&e->state, PRESENT) != WAITED_FOR + PRESENT) return;
    lock_pool();
    pthread_cond_broadcast(&pool.left);
    pthread_mutex_unlock(&pool.mutex);
}

static pid_t own_id(void) {
#ifdef __linux__
    return (pid_t)syscall(SYS_gettid);
#else
    return 0;
#endif
}

/* Keeps the first of those that sleep, who are about to be woken, off the core of the one that calls. Left alone, Linux puts a
 * thread that wakes on the caller's core where the one it slept on is idle in a virtual machine, as it takes that for one the host
 * has given to others. There it waits for the caller, for milliseconds. */
static void avoid_own_core(int count) {
#ifdef __linux__
    cpu_set_t set;
    int core = sched_getcpu();
    if (core < 0 || sched_getaffinity(0, sizeof set, &set) != 0 || CPU_COUNT(&set) < 2) return;
    CPU_CLR(core, &set);
    for (helper *h = pool.sleeping; h && count > 0; h = h->other, count--)
        if (!CPU_EQUAL(&h->cores, &set) && sched_setaffinity(h->id, sizeof set, &set) == 0) h->cores = set;
#else
    (void)count;
#endif
}

/* One that was not there when `seen` was looked at. */
static void wait_for_job(helper *h, unsigned seen) {
    for (int i = 0; i < LOOKS; i++) {
        if (atomic_load_explicit(&pool.posted, memory_order_relaxed) != seen) return;
        pause_a_little();
    }
    lock_pool();
    if (atomic_load(&pool.posted) == seen) {
        h->awake = false;
        helper **at = &pool.sleeping;
        while (*at && (*at)->number < h->number) at = &(*at)->other;
        h->other = *at;
        *at = h;
        pool.asleep++;
        while (!h->awake) pthread_cond_wait(&h->called, &pool.mutex);
    }
    pthread_mutex_unlock(&pool.mutex);
}

/* Which thread of the job a helper is: the same from call to call, as far as may be, so that it finds in its core's caches what it
 * had there: its scratch, and with runs a part of the workspace, and of tensors. */
static int choose_thread(job *j, int number) {
    if (number >= j->threads) number = 1;
    for (;; number = number + 1 < j->threads ? number + 1 : 1) {
        uint64_t bit = (uint64_t)1 << number % 64;
        if ((atomic_fetch_or(&j->here[number / 64], bit) & bit) == 0) return number;
    }
}

static void *help(void *number) {
    helper h = {.number = (int)(intptr_t)number, .called = PTHREAD_COND_INITIALIZER, .id = own_id()};
    for (;;) {
        unsigned seen = atomic_load(&pool.posted);
        entrance *e = enter();
        if (e) {
            do_stages(e->job, choose_thread(e->job, h.number));
            leave(e);
        } else {
            wait_for_job(&h, seen);
        }
    }
    return NULL;
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
        int failed = pthread_create(&thread, NULL, help, (void *)(intptr_t)(pool.threads + 1));
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (failed) return;
        pthread_detach(thread);
        pool.threads++;
    }
}

/* With the pool's mutex: threads that are awake and have no job. */
static int idle_helpers(void) {
    int idle = pool.threads - pool.asleep, entered = atomic_load(&pool.entered);
    for (int i = 0; i < entered; i++) idle -= (int)(atomic_load(&pool.entrances[i].state) % WAITED_FOR / PRESENT);
    return idle > 0 ? idle : 0;
}

/* With the pool's mutex. */
static void wake(int count) {
    if (count <= 0 || !pool.sleeping) return;
    avoid_own_core(count);
    for (; count > 0 && pool.sleeping; count--) {
        helper *h = pool.sleeping;
        pool.sleeping = h->other;
        pool.asleep--;
        h->awake = true;
        pthread_cond_signal(&h->called);
    }
}

/* So many of its helpers are woken, or all where jobs follow each other so soon that these find the next one before they sleep.
 * NULL: others have all entrances. */
static entrance *post(job *j, int woken) {
    int wanted = j->threads - 1, at = 0;
    lock_pool();
    if (woken < wanted && now() - pool.ended < SOON) woken = wanted;
    while (at < MOST_JOBS && pool.entrances[at].job) at++;
    entrance *e = at < MOST_JOBS ? &pool.entrances[at] : NULL;
    if (e) {
        int idle = idle_helpers();
        start_threads(woken);
        e->job = j;
        atomic_store(&e->state, (uint32_t)wanted);
        if (at >= atomic_load(&pool.entered)) atomic_store(&pool.entered, at + 1);
        atomic_fetch_add(&pool.posted, 1);
        wake(woken - idle);
    }
    pthread_mutex_unlock(&pool.mutex);
    return e;
}

/* All units are done; who comes now comes too late. */
static void withdraw(entrance *e) {
    close_entrance(e);
    for (int i = 0; i < LOOKS && atomic_load(&e->state) > 0; i++) pause_a_little(); /* who came is about to leave */
    lock_pool();
    atomic_fetch_or(&e->state, WAITED_FOR); /* until the next job */
    while (atomic_load(&e->state) > WAITED_FOR) pthread_cond_wait(&pool.left, &pool.mutex);
    e->job = NULL;
    pool.ended = now();
    pthread_mutex_unlock(&pool.mutex);
}

void cuflash_parallel_stages(int threads, int woken, const cuflash_stage *stages, int count) {
    int64_t most = 0;
    for (int i = 0; i < count; i++)
        if (stages[i].count > most) most = stages[i].count;
    if (threads > most) threads = (int)most;
    if (threads <= 1) {
        for (int i = 0; i < count; i++)
            if (stages[i].count > 0) stages[i].fn(stages[i].context, 0, stages[i].count, 0);
        return;
    }
    job j;
    j.count = 0, j.threads = threads;
    j.mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER, j.progressed = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    atomic_init(&j.done, 0), atomic_init(&j.asleep, 0);
    for (int i = 0; i < MOST_THREADS / 64; i++) atomic_init(&j.here[i], 0);
    for (int i = 0; i < count; i++)
        if (stages[i].count > 0) add_stage(&j, &stages[i]);
    int cancelable;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancelable); /* others work on what is here */
    entrance *e = post(&j, woken < threads ? woken - 1 : threads - 1);
    do_stages(&j, 0);
    if (e) withdraw(e);
    pthread_setcancelstate(cancelable, NULL);
}

void cuflash_parallel_for(int threads, int64_t count, int64_t grain, cuflash_range_fn fn, void *context) {
    cuflash_parallel_stages(threads, threads,
                            &(cuflash_stage){.count = count, .grain = grain < 1 ? 1 : grain, .fn = fn, .context = context}, 1);
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
    pthread_cond_init(&pool.left, NULL);
    pool.sleeping = NULL;
    pool.threads = pool.asleep = 0;
    for (int i = 0; i < MOST_JOBS; i++) {
        pool.entrances[i].job = NULL;
        atomic_store(&pool.entrances[i].state, 0);
    }
    pthread_mutex_unlock(&pool.mutex);
}

__attribute__((constructor)) static void watch_for_forks(void) {
    pthread_atfork(before_fork, in_parent, in_child);
}
