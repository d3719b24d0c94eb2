/* The float32 peak of an instruction set, for bench/attention.lua: multiply-adds between registers, enough independent chains to
 * hide their latency. Where the instruction set has no FMA, a product and a sum count as two operations just the same. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "vec.h"

enum { CHAINS = VL == 16 ? 24 : 12, ROUNDS = 10000 };

static float run_chains(float seed) {
    vf sum[CHAINS], scale = v_set(0.999f), step = v_set(seed);
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++) sum[i] = v_set((float)i);
    for (int round = 0; round < ROUNDS; round++) {
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++) sum[i] = sum[i] * scale + step;
    }
    for (int i = 1; i < CHAINS; i++) sum[0] = sum[0] + sum[i];
    return sum[0][0];
}

/* Did the compiler make one instruction of a product and a sum, as the peak's loop needs it? Then nothing is rounded away. */
static int contracts(void) {
#ifdef __FMA__
    volatile float x = 1 + 0x1p-12f, minus = -(1 + 0x1p-11f);
    float a = x, b = minus;
    return a * a + b != 0;
#else
    return 1;
#endif
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

typedef struct {
    pthread_t thread;
    atomic_int *state; /* 0: not all threads are there yet, 1: begin, -1: there will not be enough */
    int settle;        /* run as long before: threads that have just begun may have to share a core until one is moved */
    double seconds, rate;
    volatile float keep; /* the sums must be computed */
} worker;

static void run_for(worker *w, double seconds) {
    double began = now(), elapsed = 0;
    long runs = 0;
    for (; elapsed < seconds; elapsed = now() - began, runs++)
        w->keep = run_chains((float)(runs % 10 + 1)); /* never 0: sums that fade to denormals are slow */
    w->rate = 2e-9 * CHAINS * VL * ROUNDS * (double)runs / elapsed;
}

/* By a clock of its own: a thread that was kept waiting does not slow the others. */
static void *work(void *context) {
    worker *w = context;
    while (atomic_load(w->state) == 0) sched_yield();
    if (atomic_load(w->state) < 0) return NULL;
    if (w->settle) run_for(w, w->seconds);
    run_for(w, w->seconds);
    return NULL;
}

/* GFLOP/s of so many threads at the same time, added up, over so many seconds; 0 where there cannot be so many, or where the
 * compiler has not fused what it should. */
__attribute__((visibility("default"))) double fma_peak(int threads, double seconds) {
    worker *workers = contracts() ? calloc((size_t)threads, sizeof *workers) : NULL;
    if (!workers) return 0;
    atomic_int state = 0;
    int begun = 1; /* the caller is one of them */
    for (int i = 0; i < threads; i++) workers[i] = (worker){.state = &state, .settle = threads > 1, .seconds = seconds};
    while (begun < threads && pthread_create(&workers[begun].thread, NULL, work, &workers[begun]) == 0) begun++;
    atomic_store(&state, begun == threads ? 1 : -1);
    work(&workers[0]);
    double rate = workers[0].rate;
    for (int i = 1; i < begun; i++) {
        pthread_join(workers[i].thread, NULL);
        rate += workers[i].rate;
    }
    free(workers);
    return begun == threads ? rate : 0;
}
