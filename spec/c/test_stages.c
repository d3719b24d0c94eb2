/* Units of stages on threads (src/parallel.h): each is done once, after what it needs, and no two threads go by one number. The
 * library's own functions, which it does not export: they are compiled into this program, too. */
#include <sched.h>
#include <unistd.h>

#include <pthread.h>
#include <stdatomic.h>

#include "check.h"
#include "parallel.h"

enum { MOST_UNITS = 1000, FEW_THREADS = 9, MOST_THREADS = 150 };

typedef struct test test;

typedef struct {
    test *all;
    int number;
    atomic_uchar done[MOST_UNITS]; /* times */
    int64_t written[MOST_UNITS];   /* as results are: nothing but the stages' order makes it known to others */
} stage_units;

struct test {
    cuflash_stage stages[CUFLASH_MOST_STAGES];
    stage_units units[CUFLASH_MOST_STAGES];
    int count, threads;
    atomic_bool busy[MOST_THREADS];
    atomic_int failures;
};

static int64_t unit_mark(int stage, int64_t unit) {
    return MOST_UNITS * (int64_t)(stage + 1) + unit; /* never 0 */
}

/* Is all done that units of a stage's run need? */
static bool is_ready(const test *t, int number, int64_t unit) {
    int last = number - 1;
    while (last >= 0 && t->stages[last].count == 0) last--;
    if (last < 0) return true;
    const cuflash_stage *own = &t->stages[number], *before = &t->stages[last];
    int64_t begin = 0, end = before->count;
    if (own->runs > 1 && own->runs == before->runs) {
        int64_t run = unit / (own->count / own->runs), length = before->count / before->runs;
        begin = run * length, end = begin + length;
    }
    for (int64_t i = begin; i < end; i++)
        if (t->units[last].written[i] != unit_mark(last, i)) return false;
    return true;
}

static void do_units(void *context, int64_t begin, int64_t end, int thread) {
    stage_units *own = context;
    test *t = own->all;
    const cuflash_stage *stage = &t->stages[own->number];
    bool right = begin >= 0 && begin < end && end <= stage->count && thread >= 0 && thread < t->threads;
    if (!right || atomic_exchange(&t->busy[thread], true)) {
        atomic_fetch_add(&t->failures, 1);
        return;
    }
    if (t->threads > 1 && end - begin > stage->grain) atomic_fetch_add(&t->failures, 1);
    for (int64_t unit = begin; unit < end; unit++) {
        if (!is_ready(t, own->number, unit)) atomic_fetch_add(&t->failures, 1);
        if (unit % 7 == 0) sched_yield();
        if (unit % 97 == 0) usleep(50);
        own->written[unit] = unit_mark(own->number, unit);
        atomic_fetch_add(&own->done[unit], 1);
    }
    atomic_store(&t->busy[thread], false);
}

static int64_t draw(uint64_t *state, int64_t below) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((*state >> 33) % (uint64_t)below);
}

/* Stages as they come: some are empty, some have as many runs as the one before. */
static void make_stages(test *t, uint64_t seed, int most_threads) {
    static const int64_t runs[] = {0, 1, 2, 3, 16, 63, 64, 65, 130};
    uint64_t state = seed;
    *t = (test){.count = 1 + (int)draw(&state, CUFLASH_MOST_STAGES), .threads = 1 + (int)draw(&state, most_threads)};
    for (int i = 0; i < t->count; i++) {
        int64_t own = i > 0 && draw(&state, 2) ? t->stages[i - 1].runs : runs[draw(&state, COUNT_OF(runs))];
        int64_t whole = 1 + draw(&state, 2) * draw(&state, 3);
        int64_t each = draw(&state, MOST_UNITS / (own < 1 ? 1 : own) / whole + 1) * whole;
        t->units[i].all = t, t->units[i].number = i;
        t->stages[i] = (cuflash_stage){.count = (own < 1 ? 1 : own) * each,
                                       .grain = (1 + draw(&state, 5)) * whole,
                                       .fn = do_units,
                                       .context = &t->units[i],
                                       .whole = whole,
                                       .runs = own,
                                       .shrink = draw(&state, 3) == 0};
    }
}

static void check_stages(uint64_t seed, int most_threads) {
    static _Thread_local test t;
    make_stages(&t, seed, most_threads);
    cuflash_parallel_stages(t.threads, 1 + (int)(seed % (uint64_t)most_threads), t.stages, t.count);
    CHECK_F(t.failures == 0, "stages %d: %d times units were wrong, not ready, or a thread's number taken", (int)seed,
            t.failures);
    for (int i = 0; i < t.count; i++)
        for (int64_t unit = 0; unit < t.stages[i].count; unit++)
            if (!CHECK_F(t.units[i].done[unit] == 1, "stages %d: unit %d of stage %d was done %d times", (int)seed, (int)unit,
                         i, t.units[i].done[unit]))
                return;
}

/* What the calling thread takes of one queue while a helper keeps what it took first. */
typedef struct {
    int64_t count, whole, last;
    atomic_bool helped;
    atomic_llong done;
    int failures;
} takes;

static void take(void *context, int64_t begin, int64_t end, int thread) {
    takes *t = context;
    int64_t some = end - begin;
    if (thread == 1) {
        atomic_store(&t->helped, true);
        while (atomic_load(&t->done) < t->count - some) sched_yield();
        return;
    }
    while (!atomic_load(&t->helped)) sched_yield();
    if (atomic_fetch_add(&t->done, some) > 0) { /* the helper took what it did before the second */
        int64_t left = t->count - begin;
        bool right =
            left < 2 * t->whole ? some == 1 : some % t->whole == 0 && some <= (left > 4 * t->whole ? left / 4 : t->whole);
        if (!right || some > t->last) t->failures++;
    }
    t->last = some;
}

/* Ever less towards the end, and what is whole in parts only where two threads would not both get a whole one. */
static void check_takes(int64_t whole) {
    takes t = {.count = 60 * whole, .whole = whole};
    cuflash_stage stage = {.count = t.count, .grain = 8 * whole, .fn = take, .context = &t, .whole = whole};
    cuflash_parallel_stages(2, 2, &stage, 1);
    CHECK_F(t.failures == 0, "units that are whole by %d: %d times a thread took too many, or too few", (int)whole, t.failures);
    CHECK_F(t.last == 1, "units that are whole by %d: a thread took the last %d at once", (int)whole, (int)t.last);
}

static void take_long(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    if (begin == 0) usleep(300000);
    atomic_fetch_add((atomic_int *)context, (int)(end - begin));
}

/* A thread that waits for long sleeps, and is woken. */
static void check_long_wait(void) {
    atomic_int done = 0;
    cuflash_stage stage = {.count = 2, .grain = 1, .fn = take_long, .context = &done}, stages[] = {stage, stage};
    cuflash_parallel_stages(2, 2, stages, 2);
    CHECK(done == 4);
}

typedef struct {
    uint64_t first;
    int count;
} seeds;

static void *check_seeds(void *context) {
    const seeds *s = context;
    for (int i = 0; i < s->count; i++) check_stages(s->first + (uint64_t)i, FEW_THREADS);
    return NULL;
}

/* Several callers at once have the same threads to help them; more of them than jobs that can be helped with, too. */
static void check_callers(int callers, int seeds_each) {
    enum { MOST = 100 };
    pthread_t threads[MOST];
    seeds own[MOST];
    for (int i = 0; i < callers; i++) {
        own[i] = (seeds){1000 + (uint64_t)i * 100, seeds_each};
        CHECK(pthread_create(&threads[i], NULL, check_seeds, &own[i]) == 0);
    }
    for (int i = 0; i < callers; i++) pthread_join(threads[i], NULL);
}

int main(void) {
    alarm(300); /* where a thread waits for ever */
    check_seeds(&(seeds){1, 200});
    for (uint64_t seed = 201; seed < 231; seed++) check_stages(seed, MOST_THREADS);
    check_callers(3, 100);
    check_callers(100, 4);
    check_long_wait();
    for (int64_t whole = 1; whole <= 4; whole++) check_takes(whole);
    return check_result();
}
