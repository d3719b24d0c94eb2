/* The CUDA backend on a real device: calls captured in a CUDA graph and replayed (which also proves that no call waits for
 * the device: during capture that is an error), calls from several threads on streams of their own, and device pointers in
 * the functions on raw pointers. Without a device it says why and is skipped. */
#include <dlfcn.h>
#include <pthread.h>

#include "check.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

/* What the driver offers beyond what the library uses. */
static struct {
    int (*retain)(void **context, int device);
    int (*set_current)(void *context);
    int (*begin)(cudaStream_t stream, int mode);
    int (*end)(cudaStream_t stream, void **graph);
    int (*instantiate)(void **executable, void *graph, unsigned long long flags);
    int (*launch)(void *executable, cudaStream_t stream);
    int (*destroy_executable)(void *executable);
    int (*destroy_graph)(void *graph);
} driver;

static bool load_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return false;
    *(void **)&driver.retain = dlsym(library, "cuDevicePrimaryCtxRetain");
    *(void **)&driver.set_current = dlsym(library, "cuCtxSetCurrent");
    *(void **)&driver.begin = dlsym(library, "cuStreamBeginCapture_v2");
    *(void **)&driver.end = dlsym(library, "cuStreamEndCapture");
    *(void **)&driver.instantiate = dlsym(library, "cuGraphInstantiateWithFlags");
    *(void **)&driver.launch = dlsym(library, "cuGraphLaunch");
    *(void **)&driver.destroy_executable = dlsym(library, "cuGraphExecDestroy");
    *(void **)&driver.destroy_graph = dlsym(library, "cuGraphDestroy");
    return driver.retain && driver.set_current && driver.begin && driver.end && driver.instantiate && driver.launch &&
           driver.destroy_executable && driver.destroy_graph;
}

enum { Q, K, V, O, LSE, D_O, DQ, DK, DV, TENSORS };
static const char *const NAMES[TENSORS] = {"q", "k", "v", "o", "lse", "d_o", "dq", "dk", "dv"};

typedef struct {
    cuflash_tensor t[TENSORS];
    cuflash_attention a;
} problem;

static void draw(problem *p, uint64_t seed) {
    static const int inputs[] = {Q, K, V, D_O};
    for (int i = 0; i < COUNT_OF(inputs); i++) {
        cuflash_generator generator = {seed, (uint64_t)i << 32};
        REQUIRE_OK(cuflash_random_normal(&p->t[inputs[i]], &generator, 0, 1));
    }
}

static void problem_make(problem *p, cuflash_dtype dtype, bool causal, int64_t seq, int64_t dim, uint64_t seed) {
    memset(p, 0, sizeof *p);
    for (int i = 0; i < TENSORS; i++) {
        bool kv = i == K || i == V || i == DK || i == DV;
        REQUIRE_OK(cuflash_tensor_empty(&p->t[i], i == LSE ? CUFLASH_FLOAT32 : dtype, 0, i == LSE ? 3 : 4,
                                        SHAPE(2, kv ? 2 : 4, kv ? seq + 40 : seq, dim)));
    }
    cuflash_attention *a = &p->a;
    a->struct_size = sizeof *a;
    a->flags = CUFLASH_DETERMINISTIC | (causal ? CUFLASH_CAUSAL : 0);
    a->q = &p->t[Q], a->k = &p->t[K], a->v = &p->t[V], a->o = &p->t[O], a->lse = &p->t[LSE], a->d_o = &p->t[D_O];
    a->dq = &p->t[DQ], a->dk = &p->t[DK], a->dv = &p->t[DV];
    draw(p, seed);
}

static void problem_free(problem *p) {
    for (int i = 0; i < TENSORS; i++) cuflash_tensor_release(&p->t[i]);
}

static void poison(problem *p) {
    static const int outputs[] = {O, LSE, DQ, DK, DV};
    for (int i = 0; i < COUNT_OF(outputs); i++) REQUIRE_OK(cuflash_tensor_fill(&p->t[outputs[i]], NAN));
}

static void run(problem *p) {
    CHECK_OK(cuflash_attention_forward(&p->a));
    CHECK_OK(cuflash_attention_backward(&p->a));
}

static void check_same(const problem *got, const problem *expected) {
    for (int i = 0; i < TENSORS; i++) {
        cuflash_close_report report;
        REQUIRE_OK(cuflash_tensor_compare(&got->t[i], &expected->t[i], 0, 0, false, &report));
        CHECK_F(report.n_bad == 0, "'%s': %lld of %lld elements differ, by up to %g", NAMES[i], (long long)report.n_bad,
                (long long)report.numel, report.max_abs);
    }
}

/* The captured calls, replayed on new inputs, give what direct calls give on them. */
static void test_graph(cuflash_dtype dtype, bool causal, bool own_workspace) {
    check_in("graph, %s, %s, workspace of %s", cuflash_dtype_name(dtype), causal ? "causal" : "not causal",
             own_workspace ? "the caller" : "the call");
    problem captured, direct;
    cuflash_tensor workspace = {0};
    cudaStream_t stream;
    void *graph = NULL, *executable = NULL;
    problem_make(&captured, dtype, causal, 300, 64, 1);
    problem_make(&direct, dtype, causal, 300, 64, 2);
    run(&direct); /* kernels are loaded at their first use, which a capture does not allow */
    REQUIRE_OK(cuflash_stream_create(0, &stream));
    captured.a.stream = stream;
    if (own_workspace) {
        size_t bytes;
        REQUIRE_OK(cuflash_attention_workspace(&captured.a, CUFLASH_BACKWARD, &bytes));
        REQUIRE_OK(cuflash_tensor_empty(&workspace, CUFLASH_FLOAT32, 0, 1, SHAPE((int64_t)bytes / 4 + 1)));
        captured.a.workspace = workspace.data;
        captured.a.workspace_bytes = bytes;
    }
    REQUIRE_OK(cuflash_synchronize(0));
    CHECK(driver.begin(stream, 1) == 0); /* thread-local mode */
    run(&captured);
    CHECK(driver.end(stream, &graph) == 0 && graph);
    if (graph && CHECK(driver.instantiate(&executable, graph, 0) == 0)) {
        for (uint64_t seed = 3; seed < 6; seed++) {
            draw(&captured, seed);
            poison(&captured);
            draw(&direct, seed);
            run(&direct);
            REQUIRE_OK(cuflash_synchronize(0));
            CHECK(driver.launch(executable, stream) == 0);
            REQUIRE_OK(cuflash_synchronize(0));
            check_same(&captured, &direct);
        }
        driver.destroy_executable(executable);
    }
    if (graph) driver.destroy_graph(graph);
    CHECK_OK(cuflash_stream_destroy(0, stream));
    cuflash_tensor_release(&workspace);
    problem_free(&captured);
    problem_free(&direct);
    check_in("%s", "");
}

enum { THREADS = 8, ROUNDS = 20 };

typedef struct {
    int number;
    problem expected;
} worker;

static void *work(void *argument) {
    worker *w = argument;
    cudaStream_t stream;
    REQUIRE_OK(cuflash_stream_create(0, &stream));
    cuflash_set_stream(stream);
    for (int i = 0; i < ROUNDS; i++) {
        problem p;
        problem_make(&p, w->number % 2 ? CUFLASH_BFLOAT16 : CUFLASH_FLOAT32, w->number % 3 == 0, 200 + 50 * w->number, 64,
                     (uint64_t)w->number);
        poison(&p);
        run(&p);
        check_same(&p, &w->expected);
        problem_free(&p);
    }
    CHECK_OK(cuflash_stream_destroy(0, stream));
    return NULL;
}

static void test_threads(void) {
    static worker workers[THREADS];
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        workers[i].number = i;
        problem_make(&workers[i].expected, i % 2 ? CUFLASH_BFLOAT16 : CUFLASH_FLOAT32, i % 3 == 0, 200 + 50 * i, 64,
                     (uint64_t)i);
        run(&workers[i].expected);
    }
    REQUIRE_OK(cuflash_synchronize(0));
    for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, work, &workers[i]);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < THREADS; i++) problem_free(&workers[i].expected);
}

/* The functions on raw pointers run on the device that the pointers belong to. */
static void test_pointers(void) {
    check_in("raw pointers");
    problem p, q;
    memset(&p, 0, sizeof p);
    for (int i = 0; i < TENSORS; i++)
        REQUIRE_OK(cuflash_tensor_empty(&p.t[i], CUFLASH_FLOAT32, 0, i == LSE ? 3 : 4, SHAPE(2, 3, 150, 40)));
    p.a = (cuflash_attention){sizeof p.a,
                              &p.t[Q],
                              &p.t[K],
                              &p.t[V],
                              &p.t[O],
                              &p.t[LSE],
                              &p.t[D_O],
                              &p.t[DQ],
                              &p.t[DK],
                              &p.t[DV],
                              CUFLASH_CAUSAL | CUFLASH_SCALE,
                              0.2f,
                              NULL,
                              NULL,
                              0};
    draw(&p, 9);
    CHECK_OK(cuflash_attention_forward(&p.a));
    q = p;
    static const int outputs[] = {O, LSE, DQ, DK, DV};
    for (int i = 0; i < COUNT_OF(outputs); i++)
        REQUIRE_OK(cuflash_tensor_empty(&q.t[outputs[i]], CUFLASH_FLOAT32, 0, i == 1 ? 3 : 4, SHAPE(2, 3, 150, 40)));
    CHECK(cuflash_attention_forward_f32(q.t[Q].data, q.t[K].data, q.t[V].data, q.t[O].data, q.t[LSE].data, 2, 3, 150, 40, 0.2f,
                                        true, NULL) == 0);
    p.a.flags |= CUFLASH_DETERMINISTIC;
    CHECK_OK(cuflash_attention_backward(&p.a));
    CHECK(cuflash_attention_backward_f32(q.t[Q].data, q.t[K].data, q.t[V].data, q.t[O].data, q.t[LSE].data, q.t[D_O].data,
                                         q.t[DQ].data, q.t[DK].data, q.t[DV].data, 2, 3, 150, 40, 0.2f, true, NULL) == 0);
    for (int i = 0; i < COUNT_OF(outputs); i++) {
        cuflash_close_report report;
        double tolerance = outputs[i] == DQ ? 1e-5 : 0; /* dq is added up in any order */
        REQUIRE_OK(cuflash_tensor_compare(&q.t[outputs[i]], &p.t[outputs[i]], tolerance, tolerance, false, &report));
        CHECK_F(report.n_bad == 0, "'%s' differs by up to %g", NAMES[outputs[i]], report.max_abs);
        cuflash_tensor_release(&q.t[outputs[i]]);
    }
    float host[4];
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "'V'|mixed",
                cuflash_attention_forward_f32(q.t[Q].data, q.t[K].data, host, p.t[O].data, p.t[LSE].data, 2, 3, 150, 40, 1,
                                              true, NULL));
    problem_free(&p);
    check_in("%s", "");
}

int main(void) {
    if (cuflash_device_check(0) != CUFLASH_SUCCESS) return printf("skipped: %s\n", cuflash_last_error()), CHECK_SKIPPED;
    if (!load_driver()) return printf("skipped: the driver has no CUDA graphs\n"), CHECK_SKIPPED;
    void *context;
    if (!CHECK(driver.retain(&context, 0) == 0 && driver.set_current(context) == 0)) return check_result(); /* for graphs */
    for (int dtype = CUFLASH_FLOAT32; dtype <= CUFLASH_BFLOAT16; dtype++)
        for (int variant = 0; variant < 4; variant++) test_graph((cuflash_dtype)dtype, variant & 1, variant & 2);
    test_threads();
    test_pointers();
    cuflash_memory_stats stats;
    REQUIRE_OK(cuflash_memory_get_stats(0, &stats));
    CHECK(stats.live_bytes == 0);
    return check_result();
}
