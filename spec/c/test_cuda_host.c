/* The host side of the CUDA backend against a stand-in for the driver (fake_libcuda.c), whose path is the argument: devices,
 * memory, plans for every architecture, launches, errors. FAKE_CUDA_SM says which architecture. */
#include <pthread.h>

#include "fake_cuda.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

static int sm(void) {
    return atoi(getenv("FAKE_CUDA_SM"));
}

static cuflash_memory_stats stats(int device) {
    cuflash_memory_stats s;
    REQUIRE_OK(cuflash_memory_get_stats(device, &s));
    return s;
}

static cuflash_tensor make(cuflash_dtype dtype, int device, int64_t b, int64_t h, int64_t s, int64_t d) {
    cuflash_tensor t;
    REQUIRE_OK(cuflash_tensor_empty(&t, dtype, device, 4, SHAPE(b, h, s, d)));
    return t;
}

/* ---- Devices and memory ------------------------------------------------------------------------- */

static void test_devices(void) {
    CHECK(cuflash_cuda_device_count() == 2);
    CHECK_OK(cuflash_device_check(0));
    CHECK_OK(cuflash_device_check(1));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "cuda:2|only 2 CUDA devices", cuflash_device_check(2));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "-2", cuflash_device_check(-2));
    cuflash_cuda_device_info info;
    REQUIRE_OK(cuflash_cuda_get_device_info(1, &info));
    CHECK(strcmp(info.name, "Fake GPU 1") == 0 && 10 * info.compute_major + info.compute_minor == sm());
    CHECK(info.driver_version == 13000 && info.total_bytes == 1 << 30 && info.free_bytes == 1 << 30);
    CHECK_FAILS(CUFLASH_NULL_POINTER, "cuda_get_device_info|'info'", cuflash_cuda_get_device_info(0, NULL));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "cuda:9", cuflash_cuda_get_device_info(9, &info));
    CHECK_OK(cuflash_synchronize(0));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "cuda:7", cuflash_synchronize(7));
}

static void test_memory(void) {
    long allocations = fake.allocations();
    cuflash_memory_stats cpu = stats(CUFLASH_CPU);
    cuflash_tensor a = make(CUFLASH_FLOAT32, 0, 1, 2, 3, 4), b = make(CUFLASH_FLOAT16, 1, 1, 1, 1, 5);
    CHECK(a.device == 0 && b.device == 1 && fake.allocations() == allocations + 2);
    CHECK(stats(0).live_bytes == 96 && stats(1).live_bytes == 10 && stats(CUFLASH_CPU).live_bytes == cpu.live_bytes);
    cuflash_tensor view;
    REQUIRE_OK(cuflash_tensor_select(&view, &a, 1, 1));
    cuflash_tensor_release(&a);
    CHECK(stats(0).live_bytes == 96);
    cuflash_tensor_release(&view);
    cuflash_tensor_release(&b);
    CHECK(stats(0).live_bytes == 0 && stats(1).live_bytes == 0 && fake.allocations() == allocations);

    cuflash_tensor t;
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "tensor_empty|4.00 GiB|cuda:1|1.00 GiB free of 1.00 GiB|0 tensors",
                cuflash_tensor_empty(&t, CUFLASH_FLOAT32, 1, 1, SHAPE(1 << 30)));
    REQUIRE_OK(cuflash_memory_set_limit(1, 4096));
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "tensor_empty|8.00 KiB|cuda:1|limit 4.00 KiB",
                cuflash_tensor_empty(&t, CUFLASH_FLOAT32, 1, 1, SHAPE(2048)));
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, 0, 1, SHAPE(2048))); /* the other device has no limit */
    cuflash_tensor_release(&t);
    REQUIRE_OK(cuflash_memory_set_limit(1, 0));
    CHECK(fake.allocations() == allocations && stats(1).peak_bytes == 10);
    CHECK_OK(cuflash_memory_trim(1));
    CHECK_OK(cuflash_memory_trim(CUFLASH_CPU));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "cuda:7", cuflash_memory_trim(7));
}

/* ---- Attention ---------------------------------------------------------------------------------- */

typedef struct {
    cuflash_tensor q, k, v, o, lse, d_o, dq, dk, dv;
    cuflash_attention a;
} problem;

static void problem_make(problem *p, cuflash_dtype dtype, int64_t dim, int64_t dim_v) {
    memset(p, 0, sizeof *p);
    p->q = make(dtype, 0, 2, 4, 100, dim), p->k = make(dtype, 0, 2, 2, 300, dim), p->v = make(dtype, 0, 2, 2, 300, dim_v);
    p->o = make(dtype, 0, 2, 4, 100, dim_v), p->d_o = make(dtype, 0, 2, 4, 100, dim_v);
    p->dq = make(dtype, 0, 2, 4, 100, dim), p->dk = make(dtype, 0, 2, 2, 300, dim), p->dv = make(dtype, 0, 2, 2, 300, dim_v);
    REQUIRE_OK(cuflash_tensor_empty(&p->lse, CUFLASH_FLOAT32, 0, 3, SHAPE(2, 4, 100)));
    p->a = (cuflash_attention){sizeof p->a, &p->q,  &p->k, &p->v, &p->o, &p->lse, &p->d_o, &p->dq,
                               &p->dk,      &p->dv, 0,     0,     NULL,  NULL,    0};
}

static void problem_free(problem *p) {
    cuflash_tensor *const all[] = {&p->q, &p->k, &p->v, &p->o, &p->lse, &p->d_o, &p->dq, &p->dk, &p->dv};
    for (int i = 0; i < COUNT_OF(all); i++) cuflash_tensor_release(all[i]);
}

static const char *field(const char *plan, const char *name, char value[256]) {
    char key[64];
    snprintf(key, sizeof key, "%s: ", name);
    const char *at = strstr(plan, key);
    snprintf(value, 256, "%.*s", at ? (int)strcspn(at + strlen(key), "\n") : 0, at ? at + strlen(key) : "");
    return value;
}

/* Every head dimension has a kernel on every architecture, which fits into its shared memory, and what runs is what the plan
 * says. */
static void test_plans(void) {
    cuflash_cuda_device_info info;
    REQUIRE_OK(cuflash_cuda_get_device_info(0, &info));
    static const int dims[] = {1, 32, 33, 64, 96, 111, 128, 160, 192, 200, 256};
    for (int dtype = CUFLASH_FLOAT32; dtype <= CUFLASH_BFLOAT16; dtype++)
        for (int i = 0; i < COUNT_OF(dims); i++) {
            problem p;
            problem_make(&p, (cuflash_dtype)dtype, dims[i], dims[i] > 40 ? 40 : dims[i]);
            for (int pass = CUFLASH_FORWARD; pass <= CUFLASH_BACKWARD; pass++) {
                check_in("sm_%d, %s, head dim %d, %s", sm(), cuflash_dtype_name(dtype), dims[i], pass ? "backward" : "forward");
                char plan[1024], text[256], expected[320];
                REQUIRE_OK(cuflash_attention_plan(&p.a, (cuflash_pass)pass, plan, sizeof plan));
                bool tensor_cores = sm() >= 80 && (dtype != CUFLASH_FLOAT32 || (pass == CUFLASH_FORWARD && dims[i] <= 128));
                bool hopper = sm() == 90 && dims[i] % 8 == 0;
                const char *family = !tensor_cores              ? "cuflash_fma_"
                                     : dtype == CUFLASH_FLOAT32 ? "cuflash_tf32_"
                                     : hopper                   ? "cuflash_hopper_"
                                                                : "cuflash_mma_";
                CHECK_F(strncmp(field(plan, "kernel", text), family, strlen(family)) == 0 ||
                            (dtype == CUFLASH_FLOAT32 && dims[i] > 128),
                        "expected %s, got:\n%s", family, plan);
                CHECK_F(atoi(field(plan, "shared memory", text)) <= info.shared_bytes, "too much shared memory:\n%s", plan);
                CHECK(strstr(plan, "Fake GPU 0") && strstr(plan, "grid: ") && strstr(plan, "tile: ") &&
                      strstr(plan, "threads: "));
                long launches = fake.launches();
                CHECK_OK(pass ? cuflash_attention_backward(&p.a) : cuflash_attention_forward(&p.a));
                if (pass) {
                    /* so few blocks share out the two query heads of a group, and their sums are added up */
                    CHECK_F(strstr(plan, ", 2 to a tile of keys"), "the plan:\n%s", plan);
                    bool finished = tensor_cores && hopper && dims[i] <= 64; /* dq, as there are keys enough for that */
                    CHECK_F(fake.launches() == launches + 4 + (dtype == CUFLASH_FLOAT32) - finished, "got %ld launches",
                            fake.launches() - launches);
                } else {
                    CHECK(fake.launches() == launches + 1);
                    char kernel[256], grid[256], threads[256];
                    field(plan, "kernel", kernel)[0] ? kernel[strcspn(kernel, " ")] = 0 : 0;
                    snprintf(expected, sizeof expected, "%.100s %d %d %d", kernel, atoi(field(plan, "grid", grid)),
                             atoi(field(plan, "threads", threads)), atoi(field(plan, "shared memory", text)));
                    CHECK_F(strcmp(fake.last_launch(), expected) == 0, "expected '%s', got '%s'", expected, fake.last_launch());
                }
            }
            problem_free(&p);
        }
    check_in("%s", "");
}

/* On sm_90 a forward takes tensors as they lie, where tensor maps can tell how; other kernels take the rest. */
static void test_tensor_maps(void) {
    cuflash_tensor q = make(CUFLASH_BFLOAT16, 0, 2, 3, 70, 64), rows = make(CUFLASH_BFLOAT16, 0, 2, 3, 70, 72), k = q;
    cuflash_tensor by_seq = make(CUFLASH_BFLOAT16, 0, 2, 70, 3, 64), one = make(CUFLASH_BFLOAT16, 0, 2, 1, 70, 64);
    cuflash_attention a = {.struct_size = sizeof a, .q = &q, .k = &k, .v = &k};
    const struct {
        const char *what;
        bool taken;
    } cases[] = {{"as q", true},
                 {"[batch, seq, heads, dim] in memory", true},
                 {"rows of 72", true},
                 {"rows of 72, from the second", false},
                 {"one head for all", false}};
    for (int i = 0; i < COUNT_OF(cases); i++) {
        if (i == 0) k = q;
        if (i == 1) REQUIRE_OK(cuflash_tensor_transpose(&k, &by_seq, 1, 2));
        if (i == 2) REQUIRE_OK(cuflash_tensor_narrow(&k, &rows, 3, 0, 64));
        if (i == 3) REQUIRE_OK(cuflash_tensor_narrow(&k, &rows, 3, 1, 64));
        if (i == 4) REQUIRE_OK(cuflash_tensor_expand(&k, &one, 4, SHAPE(2, 3, 70, 64)));
        char plan[1024], text[256];
        check_in("sm_%d, k: %s", sm(), cases[i].what);
        REQUIRE_OK(cuflash_attention_plan(&a, CUFLASH_FORWARD, plan, sizeof plan));
        bool hopper = strncmp(field(plan, "kernel", text), "cuflash_hopper_", 15) == 0;
        CHECK_F(hopper == (sm() == 90 && cases[i].taken), "got %s", text);
        if (i > 0) cuflash_tensor_release(&k);
    }
    check_in("%s", "");
    cuflash_tensor_release(&q);
    cuflash_tensor_release(&rows);
    cuflash_tensor_release(&by_seq);
    cuflash_tensor_release(&one);
}

/* On sm_90 blocks draw causal tiles of queries, where a head has several and there are more than blocks, with a counter
 * as workspace. Tiles hold the heads of a group where that leaves blocks less to do, if there are as many as a box of a tensor
 * map can hold. */
static void test_tiles_of_queries(void) {
    const struct {
        int batch, heads, heads_kv, seq_q;
        bool causal, drawn;
        const char *tile;
    } cases[] = {{2, 4, 4, 300, true, false, "tile: 64 queries x 64 keys"},
                 {50, 32, 4, 320, true, true, "tile: 64 queries x 64 keys"},
                 {50, 32, 4, 320, false, false, "tile: 64 queries x 64 keys"},
                 {200, 64, 8, 1, false, false, "tile: 8 queries of 8 heads x 64 keys"},
                 {200, 64, 8, 3, true, false, "tile: 8 queries of 8 heads x 64 keys"},
                 {2, 64, 8, 1, false, false, "tile: 64 queries x 64 keys"},
                 {200, 48, 8, 1, false, false, "tile: 64 queries x 64 keys"}};
    if (sm() != 90) return;
    for (int i = 0; i < COUNT_OF(cases); i++) {
        check_in("case %d", i);
        cuflash_tensor q = make(CUFLASH_BFLOAT16, 0, cases[i].batch, cases[i].heads, cases[i].seq_q, 64);
        cuflash_tensor k = make(CUFLASH_BFLOAT16, 0, cases[i].batch, cases[i].heads_kv, 300, 64);
        cuflash_tensor o = make(CUFLASH_BFLOAT16, 0, cases[i].batch, cases[i].heads, cases[i].seq_q, 64);
        cuflash_attention a = {.struct_size = sizeof a, .q = &q, .k = &k, .v = &k, .o = &o};
        if (cases[i].causal) a.flags = CUFLASH_CAUSAL;
        char plan[1024];
        size_t bytes;
        REQUIRE_OK(cuflash_attention_plan(&a, CUFLASH_FORWARD, plan, sizeof plan));
        REQUIRE_OK(cuflash_attention_workspace(&a, CUFLASH_FORWARD, &bytes));
        CHECK_F(strstr(plan, cases[i].tile), "the plan:\n%s", plan);
        CHECK(bytes == (cases[i].drawn ? 4 : 0));
        long launches = fake.launches();
        CHECK_OK(cuflash_attention_forward(&a));
        CHECK_F(fake.launches() - launches == 1 + cases[i].drawn, "got %ld launches", fake.launches() - launches);
        cuflash_tensor_release(&q), cuflash_tensor_release(&k), cuflash_tensor_release(&o);
    }
    check_in("%s", "");
}

/* The grid of a backward of one sequence, D 128. */
static void backward_grid(char grid[256], int64_t heads, int64_t heads_kv, int64_t seq_q, int64_t seq_k, bool causal) {
    cuflash_tensor q = make(CUFLASH_FLOAT16, 0, 1, heads, seq_q, 128), k = make(CUFLASH_FLOAT16, 0, 1, heads_kv, seq_k, 128);
    cuflash_attention a = {.struct_size = sizeof a, .q = &q, .k = &k, .v = &k, .flags = causal ? CUFLASH_CAUSAL : 0};
    char plan[1024];
    REQUIRE_OK(cuflash_attention_plan(&a, CUFLASH_BACKWARD, plan, sizeof plan));
    field(plan, "grid", grid);
    cuflash_tensor_release(&q);
    cuflash_tensor_release(&k);
}

/* Few tiles of keys are dealt out to several blocks each; of many, those that are left for the last wave of blocks; where
 * there is nothing to gain, none is. */
static void test_parts(void) {
    cuflash_cuda_device_info info;
    REQUIRE_OK(cuflash_cuda_get_device_info(0, &info));
    int64_t all = info.multiprocessors;
    const struct {
        int64_t heads, seq_q, seq_k;
        bool causal;
        const char *expected;
    } cases[] = {
        {2, 1024, 20, false, " to a tile of keys,"},
        {2, 1024, 1024, true, " to a tile of keys,"},
        {all, 1024, 20, false, NULL},
        {all + 3, 1024, 20, false, " to each of the last 3 tiles of keys,"},
        {2, 64, 20, false, NULL},
        {16 * all, 1024, 20, true, NULL},
        {2 * all + 1, 1024, 8, false, " to the last tile of keys,"},
    };
    for (int i = 0; i < COUNT_OF(cases); i++) {
        char grid[256];
        check_in("sm_%d, case %d", sm(), i);
        backward_grid(grid, cases[i].heads, cases[i].heads, cases[i].seq_q, cases[i].seq_k, cases[i].causal);
        if (cases[i].expected)
            CHECK_F(strstr(grid, cases[i].expected), "expected '%s', got '%s'", cases[i].expected, grid);
        else
            CHECK_F(!strstr(grid, " to a tile") && !strstr(grid, " to each") && !strstr(grid, " to the last"),
                    "expected no parts, got '%s'", grid);
    }
    check_in("%s", "");
}

/* Heads of a group are not dealt out to a block each where their walks are short: what would be gained is lost to partial sums. */
static void test_short_walks(void) {
    cuflash_cuda_device_info info;
    REQUIRE_OK(cuflash_cuda_get_device_info(0, &info));
    for (int group = 5; group <= 7; group++) {
        char grid[256], each[32];
        check_in("sm_%d, group of %d", sm(), group);
        snprintf(each, sizeof each, ", %d to a tile of keys,", group);
        backward_grid(grid, group * info.multiprocessors / 2, info.multiprocessors / 2, 1024, 1024, true);
        CHECK_F(!strstr(grid, each), "got '%s'", grid);
        backward_grid(grid, group * 4, 4, 16384, 16384, true);
        CHECK_F(strstr(grid, "to a tile of keys,"), "got '%s'", grid);
    }
    check_in("%s", "");
}

/* A workspace of the caller's is used; one of our own is given back; both are the size that was said. */
static void test_workspace(void) {
    problem p;
    problem_make(&p, CUFLASH_FLOAT32, 64, 64);
    size_t bytes = 1;
    CHECK_OK(cuflash_attention_workspace(&p.a, CUFLASH_FORWARD, &bytes));
    CHECK(bytes == 0);
    REQUIRE_OK(cuflash_attention_workspace(&p.a, CUFLASH_BACKWARD, &bytes));
    size_t dq = 2 * 4 * 100 * 64, parts = 2 * (2 * 4 * 320 * 64); /* floats; parts of dk and of dv, a query head each */
    CHECK(bytes >= (dq + parts) * sizeof(float) && bytes < (2 * dq + parts) * sizeof(float));
    REQUIRE_OK(cuflash_memory_reset_peak(0));
    int64_t live = stats(0).live_bytes;
    CHECK_OK(cuflash_attention_backward(&p.a));
    CHECK(stats(0).peak_bytes == live + (int64_t)bytes && stats(0).live_bytes == live);
    cuflash_tensor workspace;
    REQUIRE_OK(cuflash_tensor_empty(&workspace, CUFLASH_FLOAT32, 0, 1, SHAPE((int64_t)bytes / 4)));
    REQUIRE_OK(cuflash_memory_reset_peak(0));
    p.a.workspace = workspace.data;
    p.a.workspace_bytes = bytes;
    CHECK_OK(cuflash_attention_backward(&p.a));
    CHECK(stats(0).peak_bytes == stats(0).live_bytes);
    p.a.workspace_bytes--;
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "attention_backward|'workspace_bytes'", cuflash_attention_backward(&p.a));
    p.a.workspace = NULL;
    REQUIRE_OK(cuflash_memory_set_limit(0, stats(0).live_bytes + 1000));
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "attention_backward|cuda:0|limit", cuflash_attention_backward(&p.a));
    REQUIRE_OK(cuflash_memory_set_limit(0, 0));
    CHECK_OK(cuflash_attention_backward(&p.a));
    cuflash_tensor_release(&workspace);
    problem_free(&p);
}

static void test_refusals(void) {
    problem p;
    problem_make(&p, CUFLASH_FLOAT16, 64, 64);
    cuflash_tensor wide = make(CUFLASH_FLOAT16, 0, 1, 1, 8, 257), other = make(CUFLASH_FLOAT16, 1, 2, 2, 300, 64);
    cuflash_attention a = {sizeof a, &wide, &wide, &wide, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, 0};
    char plan[1024];
    long launches = fake.launches();
    CHECK_FAILS(CUFLASH_UNSUPPORTED_HEAD_DIM, "'q'|1 to 256|257",
                cuflash_attention_plan(&a, CUFLASH_FORWARD, plan, sizeof plan));
    a = p.a;
    a.k = &other;
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "attention_forward|'k'|device of 'q', cuda:0|on cuda:1",
                cuflash_attention_forward(&a));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "reference_forward|'q'|CPU", cuflash_reference_forward(&p.a));
    CHECK(fake.launches() == launches);
    cuflash_tensor_release(&wide);
    cuflash_tensor_release(&other);
    problem_free(&p);
}

/* A fault on the device: every call says so in CUDA's words, and nothing crashes. */
static void test_fault(void) {
    problem p;
    problem_make(&p, CUFLASH_FLOAT32, 64, 64);
    long allocations = fake.allocations();
    fake.fault(700);
    cuflash_tensor t;
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "attention_forward|illegal memory access|CUDA_ERROR_ILLEGAL_ADDRESS",
                cuflash_attention_forward(&p.a));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "attention_backward|illegal memory access", cuflash_attention_backward(&p.a));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "synchronize|illegal memory access", cuflash_synchronize(0));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "tensor_empty|illegal memory access",
                cuflash_tensor_empty(&t, CUFLASH_FLOAT32, 0, 1, SHAPE(8)));
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(8))); /* the CPU lives on */
    CHECK_OK(cuflash_tensor_fill(&t, 3));
    cuflash_tensor_release(&t);
    fake.fault(0);
    CHECK(fake.allocations() == allocations);
    CHECK_OK(cuflash_attention_forward(&p.a));
    problem_free(&p);
}

static void test_streams(void) {
    cudaStream_t stream = NULL;
    cudaEvent_t start = NULL, end = NULL;
    REQUIRE_OK(cuflash_stream_create(0, &stream));
    REQUIRE_OK(cuflash_event_create(0, &start));
    REQUIRE_OK(cuflash_event_create(0, &end));
    CHECK(cuflash_set_stream(stream) == NULL && cuflash_set_stream(stream) == stream);
    CHECK_OK(cuflash_event_record(0, start, NULL));
    CHECK_OK(cuflash_event_record(0, end, stream));
    float milliseconds = 0;
    CHECK_OK(cuflash_event_synchronize(0, end));
    CHECK_OK(cuflash_event_elapsed(0, start, end, &milliseconds));
    CHECK(milliseconds == 1);
    CHECK_OK(cuflash_stream_wait_event(0, stream, end));
    CHECK_OK(cuflash_stream_synchronize(0, stream));
    CHECK_OK(cuflash_event_destroy(0, start));
    CHECK_OK(cuflash_event_destroy(0, end));
    CHECK_OK(cuflash_stream_destroy(0, stream));
    CHECK(cuflash_set_stream(NULL) == NULL); /* a destroyed stream is nobody's */
    CHECK_FAILS(CUFLASH_NULL_POINTER, "stream_create|'stream'", cuflash_stream_create(0, NULL));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "stream_destroy|'stream'", cuflash_stream_destroy(0, NULL));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "stream_wait_event|'event'", cuflash_stream_wait_event(0, NULL, NULL));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "event_create|'event'", cuflash_event_create(0, NULL));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "event_destroy|'event'", cuflash_event_destroy(0, NULL));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "event_record|'event'", cuflash_event_record(0, NULL, NULL));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "event_synchronize|'event'", cuflash_event_synchronize(0, NULL));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "event_elapsed|'start'", cuflash_event_elapsed(0, NULL, NULL, NULL));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "cuda:5", cuflash_stream_create(5, &stream));
}

/* Memory is given back on the stream it was made on, or, where the thread has left that one, on the default stream; a
 * workspace on the stream of its call. */
static void test_release_streams(void) {
    cudaStream_t first = NULL, second = NULL;
    REQUIRE_OK(cuflash_stream_create(0, &first));
    REQUIRE_OK(cuflash_stream_create(0, &second));
    cudaStream_t const made[] = {NULL, first, first, first, NULL}, current[] = {NULL, first, second, NULL, second},
                       expected[] = {NULL, first, NULL, NULL, NULL};
    for (int i = 0; i < COUNT_OF(made); i++) {
        cuflash_set_stream(made[i]);
        cuflash_tensor t = make(CUFLASH_FLOAT32, 0, 1, 1, 1, 8);
        cuflash_set_stream(current[i]);
        cuflash_tensor_release(&t);
        CHECK_F(fake.freed_on() == expected[i], "case %d", i);
    }
    cuflash_set_stream(first);
    problem p;
    problem_make(&p, CUFLASH_FLOAT32, 64, 64);
    p.a.stream = second;
    CHECK_OK(cuflash_attention_backward(&p.a));
    CHECK(fake.freed_on() == second);
    problem_free(&p);
    cuflash_set_stream(NULL);
    CHECK_OK(cuflash_stream_destroy(0, first));
    CHECK_OK(cuflash_stream_destroy(0, second));
}

static void *work(void *unused) {
    (void)unused;
    for (int i = 0; i < 50; i++) {
        problem p;
        problem_make(&p, i % 2 ? CUFLASH_FLOAT16 : CUFLASH_FLOAT32, 32 + 32 * (i % 3), 64);
        CHECK_OK(cuflash_attention_forward(&p.a));
        CHECK_OK(cuflash_attention_backward(&p.a));
        problem_free(&p);
    }
    return NULL;
}

static void test_threads(void) {
    long allocations = fake.allocations();
    pthread_t threads[4];
    for (int i = 0; i < COUNT_OF(threads); i++) pthread_create(&threads[i], NULL, work, NULL);
    for (int i = 0; i < COUNT_OF(threads); i++) pthread_join(threads[i], NULL);
    CHECK(fake.allocations() == allocations && stats(0).live_bytes == 0);
}

int main(int argc, char **argv) {
    if (!getenv("FAKE_CUDA_SM")) setenv("FAKE_CUDA_SM", "90", 1);
    if (!fake_load(argc, argv)) return 1;
    test_devices();
    test_memory();
    test_plans();
    test_tensor_maps();
    test_tiles_of_queries();
    test_parts();
    test_short_walks();
    test_workspace();
    test_refusals();
    test_fault();
    test_streams();
    test_release_streams();
    test_threads();
    return check_result();
}
