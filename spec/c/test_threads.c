/* Attention from several threads at once, and in a child of a process that has had threads. Run once per instruction set, as
 * test_attention.c. */
#include <sys/wait.h>
#include <unistd.h>

#include <pthread.h>
#include <stdatomic.h>

#include "attention_case.h"
#include "isa.h"

typedef struct {
    fixture f;
    int failures;
} caller;

static void *call_repeatedly(void *context) {
    caller *c = context;
    for (int round = 0; round < 6; round++) {
        fixture_poison_outputs(&c->f);
        c->failures += cuflash_attention_forward(&c->f.a) != CUFLASH_SUCCESS;
        c->failures += cuflash_attention_backward(&c->f.a) != CUFLASH_SUCCESS;
        for (int t = 0; t < TENSORS; t++) c->failures += !unchanged(&c->f, t);
        cuflash_attention wrong = c->f.a;
        wrong.flags = 64;
        c->failures += cuflash_attention_forward(&wrong) != CUFLASH_INVALID_ARGUMENT;
        c->failures += strstr(cuflash_last_error(), "flags") == NULL;
    }
    return NULL;
}

/* Calls from several threads at once, with the same threads to help them, on different outputs. */
static void test_callers(void) {
    check_in("several callers");
    enum { CALLERS = 4 };
    static caller callers[CALLERS];
    static const cuflash_dtype dtypes[] = {CUFLASH_FLOAT32, CUFLASH_FLOAT16, CUFLASH_BFLOAT16};
    int before = cuflash_get_num_threads();
    CHECK_OK(cuflash_set_num_threads(3));
    int64_t live = check_live_bytes();
    for (int i = 0; i < CALLERS; i++) {
        const shape_case shape = {1, 2, 1 + i % 2, 350 + i, 330 - i, 24, 16, i % 2, 0};
        fixture_make(&callers[i].f, &shape, dtypes[i % 3], GAPS, (uint64_t)i);
        CHECK_OK(cuflash_attention_forward(&callers[i].f.a));
        CHECK_OK(cuflash_attention_backward(&callers[i].f.a));
        fixture_remember(&callers[i].f);
    }
    pthread_t threads[CALLERS];
    for (int i = 0; i < CALLERS; i++) CHECK(pthread_create(&threads[i], NULL, call_repeatedly, &callers[i]) == 0);
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
        CHECK_F(callers[i].failures == 0, "caller %d: %d failures", i, callers[i].failures);
        fixture_free(&callers[i].f);
    }
    CHECK(check_live_bytes() == live);
    CHECK_OK(cuflash_set_num_threads(before));
    check_in("%s", "");
}

/* Threads take the units of a pair after those of another, whichever they are given: results are those of one thread. */
static void test_pairs(void) {
    static const int64_t pairs[] = {2, 3, 63, 64, 65, 130};
    static const cuflash_dtype dtypes[] = {CUFLASH_FLOAT32, CUFLASH_BFLOAT16};
    int before = cuflash_get_num_threads();
    for (int i = 0; i < COUNT_OF(pairs) * COUNT_OF(dtypes); i++) {
        const shape_case shape = {1, pairs[i / 2], pairs[i / 2], 100, 100, 64, 48, i % 3 == 0, 0};
        check_in("%d pairs of %s", (int)shape.heads, cuflash_dtype_name(dtypes[i % 2]));
        fixture f;
        fixture_make(&f, &shape, dtypes[i % 2], GAPS, (uint64_t)i);
        CHECK_OK(cuflash_set_num_threads(1));
        CHECK_OK(cuflash_attention_forward(&f.a));
        CHECK_OK(cuflash_attention_backward(&f.a));
        fixture_remember(&f);
        for (int threads = 2; threads <= 5; threads++) {
            CHECK_OK(cuflash_set_num_threads(threads));
            fixture_poison_outputs(&f);
            CHECK_OK(cuflash_attention_forward(&f.a));
            CHECK_OK(cuflash_attention_backward(&f.a));
            for (int t = 0; t < TENSORS; t++) CHECK_F(unchanged(&f, t), "tensor %d with %d threads", t, threads);
        }
        fixture_free(&f);
    }
    CHECK_OK(cuflash_set_num_threads(before));
    check_in("%s", "");
}

#ifndef __SANITIZE_THREAD__ /* which does not follow a fork of several threads */
/* 0 where nothing tells. */
static int threads_of_process(void) {
    int threads = 0;
    char line[256];
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "Threads: %d", &threads) == 1) break;
    if (file) fclose(file);
    return threads;
}

/* A child of a process that has used threads starts its own. */
static void test_fork(void) {
    check_in("fork");
    const shape_case shape = {1, 8, 8, 200, 200, 64, 64, false, 0};
    fixture f;
    fixture_make(&f, &shape, CUFLASH_FLOAT32, DENSE, 5);
    CHECK_OK(cuflash_set_num_threads(2));
    REQUIRE_OK(cuflash_attention_forward(&f.a));
    pid_t child = fork();
    if (child == 0) {
        alarm(60);
        bool works = cuflash_get_num_threads() == 2;
        for (int i = 0; i < 3; i++) works = works && cuflash_attention_forward(&f.a) == CUFLASH_SUCCESS;
        int own = threads_of_process();
        _exit(works && (own == 0 || own == 2) ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    REQUIRE_OK(cuflash_attention_forward(&f.a));
    fixture_free(&f);
    check_in("%s", "");
}

static atomic_bool stop;

static void *make_tensors(void *unused) {
    while (!atomic_load(&stop)) {
        cuflash_tensor t = {0};
        if (cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 1, (const int64_t[]){4}) != CUFLASH_SUCCESS) break;
        cuflash_tensor_release(&t);
    }
    return unused;
}

static void *call_attention(void *f) {
    while (!atomic_load(&stop) && cuflash_attention_forward(&((fixture *)f)->a) == CUFLASH_SUCCESS) continue;
    return NULL;
}

/* A child has none of the other threads of its parent, which may hold anything at that moment. */
static void test_fork_amid_calls(void) {
    enum { CHILDREN = 200 };
    check_in("fork amid calls of other threads");
    CHECK_OK(cuflash_set_num_threads(2));
    const shape_case shape = {1, 4, 4, 128, 128, 32, 32, false, 0}; /* enough for two threads */
    fixture own, other;
    fixture_make(&own, &shape, CUFLASH_FLOAT32, DENSE, 6);
    fixture_make(&other, &shape, CUFLASH_FLOAT32, DENSE, 7);
    pthread_t makes, calls;
    CHECK(pthread_create(&makes, NULL, make_tensors, NULL) == 0);
    CHECK(pthread_create(&calls, NULL, call_attention, &other) == 0);
    int ended = 0;
    for (; ended < CHILDREN; ended++) {
        pid_t child = fork();
        if (child == 0) {
            alarm(10);
            _exit(cuflash_attention_forward(&own.a) == CUFLASH_SUCCESS ? 0 : 1);
        }
        int status = -1;
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0) break;
    }
    CHECK_F(ended == CHILDREN, "child %d of %d did not end as it should", ended + 1, CHILDREN);
    atomic_store(&stop, true);
    pthread_join(makes, NULL);
    pthread_join(calls, NULL);
    fixture_free(&own);
    fixture_free(&other);
    check_in("%s", "");
}
#endif

int main(void) {
    isa_require();
    int64_t live = check_live_bytes();
    test_callers();
    test_pairs();
#ifndef __SANITIZE_THREAD__
    if (!getenv("CUFLASH_SPEC_NO_FORK")) {
        test_fork();
        test_fork_amid_calls();
    }
#endif
    CHECK(check_live_bytes() == live);
    return check_result();
}
