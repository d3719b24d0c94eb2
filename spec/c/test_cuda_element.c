/* Element-wise work on CUDA devices against a stand-in for the driver (fake_libcuda.c), whose path is the argument: which
 * kernels are launched, which bytes are copied, errors, and that nothing is left behind. What the kernels compute is tested
 * on a real device by spec/cuda_element_spec.lua. */
#include "fake_cuda.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

static int64_t live(int device) {
    cuflash_memory_stats stats;
    REQUIRE_OK(cuflash_memory_get_stats(device, &stats));
    return stats.live_bytes;
}

/* What is held everywhere, and the launches so far. */
typedef struct {
    int64_t cpu, first, second;
    long allocations, launches;
} state;

static state now(void) {
    return (state){live(CUFLASH_CPU), live(0), live(1), fake.allocations(), fake.launches()};
}

static void check_after(state before, long launches, const char *last, const char *file, int line, const char *call) {
    state after = now();
    check_that(after.cpu == before.cpu && after.first == before.first && after.second == before.second &&
                   after.allocations == before.allocations,
               file, line, "%s: memory is left behind", call);
    check_that(after.launches == before.launches + launches, file, line, "%s: expected %ld launches, got %ld", call, launches,
               after.launches - before.launches);
    if (last)
        check_that(strcmp(fake.last_launch(), last) == 0, file, line, "%s: expected '%s', got '%s'", call, last,
                   fake.last_launch());
}

/* The call succeeds with so many launches, the last of which was this one ("name blocks threads shared_bytes"), and leaves no
 * memory behind. */
#define CHECK_LAUNCHES(count, last, call)                                                                                      \
    do {                                                                                                                       \
        state before_ = now();                                                                                                 \
        CHECK_OK(call);                                                                                                        \
        check_after(before_, count, last, __FILE__, __LINE__, #call);                                                          \
    } while (0)

/* It fails, and leaves nothing behind either. */
#define CHECK_REFUSED(status, words, call)                                                                                     \
    do {                                                                                                                       \
        state before_ = now();                                                                                                 \
        CHECK_FAILS(status, words, call);                                                                                      \
        check_after(before_, 0, NULL, __FILE__, __LINE__, #call);                                                              \
    } while (0)

static cuflash_tensor make(cuflash_dtype dtype, int device, int ndim, const int64_t *shape) {
    cuflash_tensor t;
    REQUIRE_OK(cuflash_tensor_empty(&t, dtype, device, ndim, shape));
    return t;
}

/* ---- Maps --------------------------------------------------------------------------------------- */

static void test_kernels(void) {
    static const char *const binary[] = {"add", "sub", "mul", "div", "maximum", "minimum"};
    static const char *const unary[] = {"neg", "abs", "exp", "log", "sqrt"};
    char expected[64];
    for (int dtype = CUFLASH_FLOAT32; dtype <= CUFLASH_FLOAT64; dtype++) {
        check_in("%s", cuflash_dtype_name(dtype));
        cuflash_tensor out = make((cuflash_dtype)dtype, 0, 2, SHAPE(5, 1000)), a = make(CUFLASH_FLOAT16, 0, 1, SHAPE(1000)),
                       b = make(CUFLASH_FLOAT64, 0, 2, SHAPE(5, 1));
        CHECK_LAUNCHES(1, "cuflash_element_fill 5 256 0", cuflash_tensor_fill(&out, 1));
        CHECK_LAUNCHES(1, "cuflash_element_arange 5 256 0", cuflash_tensor_arange(&out, 0, 1));
        for (int op = 0; op < COUNT_OF(binary); op++) {
            snprintf(expected, sizeof expected, "cuflash_element_%s 5 256 0", binary[op]);
            CHECK_LAUNCHES(1, expected, cuflash_tensor_binary((cuflash_binary_op)op, &out, &a, &b));
            CHECK_LAUNCHES(1, expected, cuflash_tensor_binary_scalar((cuflash_binary_op)op, &out, &a, 2, op % 2));
        }
        for (int op = 0; op < COUNT_OF(unary); op++) {
            snprintf(expected, sizeof expected, "cuflash_element_%s 5 256 0", unary[op]);
            CHECK_LAUNCHES(1, expected, cuflash_tensor_unary((cuflash_unary_op)op, &out, &b));
        }
        cuflash_generator generator = {1, 7};
        CHECK_LAUNCHES(1, "cuflash_element_uniform 5 256 0", cuflash_random_uniform(&out, &generator, 0, 1));
        CHECK(generator.offset == 7 + (dtype == CUFLASH_FLOAT64 ? 2500 : 1250));
        CHECK_LAUNCHES(1, "cuflash_element_normal 5 256 0", cuflash_random_normal(&out, &generator, 0, 1));
        CHECK(generator.offset == 7 + (dtype == CUFLASH_FLOAT64 ? 2500 : 1250) + 1250);
        cuflash_tensor_release(&out);
        cuflash_tensor_release(&a);
        cuflash_tensor_release(&b);
    }
    check_in("%s", "");
}

/* A thread takes four elements, and more where there are very many. */
static void test_grids(void) {
    static const struct {
        int64_t numel;
        const char *launch;
    } cases[] = {{1, "cuflash_element_fill 1 256 0"},
                 {1024, "cuflash_element_fill 1 256 0"},
                 {1025, "cuflash_element_fill 2 256 0"},
                 {1 << 20, "cuflash_element_fill 1024 256 0"},
                 {1 << 27, "cuflash_element_fill 4224 256 0"}}; /* 132 multiprocessors */
    for (int i = 0; i < COUNT_OF(cases); i++) {
        cuflash_tensor t = make(CUFLASH_FLOAT16, 1, 1, &cases[i].numel);
        CHECK_LAUNCHES(1, cases[i].launch, cuflash_tensor_fill(&t, 0));
        cuflash_tensor_release(&t);
    }
    cuflash_tensor single = make(CUFLASH_FLOAT32, 0, 0, NULL);
    CHECK_LAUNCHES(1, "cuflash_element_sqrt 1 256 0", cuflash_tensor_unary(CUFLASH_SQRT, &single, &single));
    cuflash_tensor_release(&single);
}

/* An input that overlaps the output is copied first. */
static void test_overlap(void) {
    cuflash_tensor t = make(CUFLASH_FLOAT32, 0, 1, SHAPE(101)), low, high;
    REQUIRE_OK(cuflash_tensor_narrow(&low, &t, 0, 0, 100));
    REQUIRE_OK(cuflash_tensor_narrow(&high, &t, 0, 1, 100));
    int64_t held = live(0);
    REQUIRE_OK(cuflash_memory_reset_peak(0));
    CHECK_LAUNCHES(1, "cuflash_element_add 1 256 0", cuflash_tensor_binary(CUFLASH_ADD, &low, &low, &high));
    cuflash_memory_stats stats;
    REQUIRE_OK(cuflash_memory_get_stats(0, &stats));
    CHECK(stats.peak_bytes == held + 400);
    REQUIRE_OK(cuflash_memory_set_limit(0, held + 399));
    CHECK_REFUSED(CUFLASH_OUT_OF_MEMORY, "cuda:0|limit", cuflash_tensor_binary(CUFLASH_ADD, &low, &low, &high));
    CHECK_REFUSED(CUFLASH_OUT_OF_MEMORY, "cuda:0|limit", cuflash_tensor_unary(CUFLASH_NEG, &low, &high));
    REQUIRE_OK(cuflash_memory_set_limit(0, 0));
    CHECK_LAUNCHES(1, "cuflash_element_neg 1 256 0", cuflash_tensor_unary(CUFLASH_NEG, &low, &low));
    cuflash_tensor_release(&low);
    cuflash_tensor_release(&high);
    cuflash_tensor_release(&t);
}

/* ---- Copies ------------------------------------------------------------------------------------- */

enum { ROWS = 3, COLUMNS = 4, N = ROWS * COLUMNS };

/* Values whose bits a conversion would not keep. */
static const uint16_t PATTERNS[N] = {0x7c01, 0xfc01, 0x7fff, 0x8000, 1, 0x03ff, 0x3c00, 0x7bff, 0x7c00, 0xfc00, 0x7e55, 0x1234};

static void test_copies_of_bits(void) {
    uint16_t back[N] = {0};
    cuflash_tensor host, result, here = make(CUFLASH_FLOAT16, 0, 2, SHAPE(ROWS, COLUMNS)),
                                 there = make(CUFLASH_FLOAT16, 1, 2, SHAPE(ROWS, COLUMNS)),
                                 again = make(CUFLASH_FLOAT16, 1, 2, SHAPE(ROWS, COLUMNS));
    REQUIRE_OK(
        cuflash_tensor_borrow(&host, (void *)(uintptr_t)PATTERNS, CUFLASH_FLOAT16, CUFLASH_CPU, 2, SHAPE(ROWS, COLUMNS), NULL));
    REQUIRE_OK(cuflash_tensor_borrow(&result, back, CUFLASH_FLOAT16, CUFLASH_CPU, 2, SHAPE(ROWS, COLUMNS), NULL));
    CHECK_LAUNCHES(0, NULL, cuflash_tensor_copy(&here, &host));
    CHECK_LAUNCHES(0, NULL, cuflash_tensor_copy(&there, &here));
    CHECK_LAUNCHES(0, NULL, cuflash_tensor_copy(&again, &there));
    CHECK_LAUNCHES(0, NULL, cuflash_tensor_copy(&result, &again));
    CHECK(memcmp(back, PATTERNS, sizeof back) == 0);

    check_in("strided on the CPU");
    uint16_t columns[N] = {0};
    cuflash_tensor turned;
    REQUIRE_OK(cuflash_tensor_borrow(&turned, columns, CUFLASH_FLOAT16, CUFLASH_CPU, 2, SHAPE(ROWS, COLUMNS), SHAPE(1, ROWS)));
    CHECK_LAUNCHES(0, NULL, cuflash_tensor_copy(&turned, &here));
    for (int i = 0; i < N; i++) CHECK(columns[i % COLUMNS * ROWS + i / COLUMNS] == PATTERNS[i]);
    memset(there.data, 0, sizeof back);
    CHECK_LAUNCHES(0, NULL, cuflash_tensor_copy(&there, &turned));
    CHECK(memcmp(there.data, PATTERNS, sizeof back) == 0); /* the stand-in's devices have the host's memory */

    check_in("strided on a device");
    cuflash_tensor view;
    REQUIRE_OK(cuflash_tensor_narrow(&view, &here, 1, 1, 2));
    cuflash_tensor part = make(CUFLASH_FLOAT16, CUFLASH_CPU, 2, SHAPE(ROWS, 2));
    CHECK_LAUNCHES(1, "cuflash_element_move 1 256 0", cuflash_tensor_copy(&part, &view));
    CHECK_LAUNCHES(1, "cuflash_element_move 1 256 0", cuflash_tensor_copy(&view, &part));
    CHECK_LAUNCHES(1, "cuflash_element_move 1 256 0", cuflash_tensor_copy(&view, &view));
    cuflash_tensor other;
    REQUIRE_OK(cuflash_tensor_narrow(&other, &there, 1, 1, 2));
    CHECK_LAUNCHES(2, "cuflash_element_move 1 256 0", cuflash_tensor_copy(&other, &view)); /* gathered, copied, scattered */

    check_in("broadcast");
    cuflash_tensor row;
    REQUIRE_OK(cuflash_tensor_select(&row, &host, 0, 1));
    CHECK_LAUNCHES(1, "cuflash_element_move 1 256 0", cuflash_tensor_copy(&here, &row));
    check_in("%s", "");
    cuflash_tensor *const all[] = {&host, &result, &here, &there, &again, &turned, &view, &part, &other, &row};
    for (int i = 0; i < COUNT_OF(all); i++) cuflash_tensor_release(all[i]);
}

/* The narrower dtype travels. */
static void test_conversions(void) {
    static const double values[N] = {0.5, 1, -2, 65504, 1e30, 3, 4, 5, 6, 7, 8, NAN};
    cuflash_tensor doubles, halves = make(CUFLASH_FLOAT16, CUFLASH_CPU, 1, SHAPE(N)),
                            device_doubles = make(CUFLASH_FLOAT64, 0, 1, SHAPE(N)),
                            device_halves = make(CUFLASH_FLOAT16, 0, 1, SHAPE(N));
    REQUIRE_OK(cuflash_tensor_borrow(&doubles, (void *)(uintptr_t)values, CUFLASH_FLOAT64, CUFLASH_CPU, 1, SHAPE(N), NULL));
    REQUIRE_OK(cuflash_tensor_copy(&halves, &doubles));
    CHECK_LAUNCHES(0, NULL, cuflash_tensor_copy(&device_halves, &doubles)); /* on the CPU */
    CHECK(memcmp(device_halves.data, halves.data, N * sizeof(uint16_t)) == 0);
    CHECK_LAUNCHES(1, "cuflash_element_copy 1 256 0", cuflash_tensor_copy(&device_doubles, &halves));
    CHECK_LAUNCHES(1, "cuflash_element_copy 1 256 0", cuflash_tensor_copy(&halves, &device_doubles));
    CHECK_LAUNCHES(1, "cuflash_element_copy 1 256 0", cuflash_tensor_copy(&device_halves, &device_doubles));
    REQUIRE_OK(cuflash_tensor_copy(&device_halves, &doubles));
    cuflash_tensor wide = make(CUFLASH_FLOAT64, CUFLASH_CPU, 1, SHAPE(N));
    CHECK_LAUNCHES(0, NULL, cuflash_tensor_copy(&wide, &device_halves));
    const double *got = wide.data;
    for (int i = 0; i < 4; i++) CHECK(got[i] == values[i]);
    CHECK(isinf(got[4]) && got[10] == 8 && isnan(got[11]));
    cuflash_tensor *const all[] = {&doubles, &halves, &device_doubles, &device_halves, &wide};
    for (int i = 0; i < COUNT_OF(all); i++) cuflash_tensor_release(all[i]);
}

static void test_get_set(void) {
    cuflash_tensor t = make(CUFLASH_BFLOAT16, 1, 2, SHAPE(ROWS, COLUMNS));
    uint16_t *data = t.data;
    for (int i = 0; i < N; i++) data[i] = (uint16_t)(0x3f80 + i);
    double value = 0;
    CHECK_LAUNCHES(0, NULL, cuflash_tensor_get(&t, SHAPE(1, 2), &value));
    CHECK(value == 1 + 6 / 128.0);
    CHECK_LAUNCHES(1, "cuflash_element_fill 1 256 0", cuflash_tensor_set(&t, SHAPE(2, 3), 5));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_get|'index'|0 to 2", cuflash_tensor_get(&t, SHAPE(3, 0), &value));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_set|'index'|0 to 3", cuflash_tensor_set(&t, SHAPE(0, -1), 1));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_get|'value'", cuflash_tensor_get(&t, SHAPE(0, 0), NULL));
    CHECK(value == 1 + 6 / 128.0);
    cuflash_tensor_release(&t);
}

/* ---- Reductions and comparison ------------------------------------------------------------------ */

/* Blocks are the outputs times the threads that share one; long dimensions with few outputs go in two steps. */
static void test_reduce(void) {
    static const struct {
        int64_t shape[3];
        int dim;
        long launches;
        const char *last;
    } cases[] = {
        {{1, 1, 1}, 0, 1, "cuflash_element_reduce 1 256 0"},        {{2, 3, 8}, 2, 1, "cuflash_element_reduce 1 256 0"},
        {{64, 64, 4096}, 2, 1, "cuflash_element_reduce 512 256 0"}, /* 32 lanes an output */
        {{2, 2, 4096}, 2, 1, "cuflash_element_reduce 4 256 0"},     /* a block an output */
        {{2, 2, 1 << 20}, 2, 2, "cuflash_element_reduce 1 256 0"},  /* 64 pieces, and 8 lanes for these */
        {{4096, 64, 64}, 0, 1, "cuflash_element_reduce 512 256 0"}, {{1 << 20, 2, 4}, 0, 2, "cuflash_element_reduce 1 256 0"},
        {{1, 1, 1 << 24}, 2, 2, "cuflash_element_reduce 1 256 0"},
    };
    for (int i = 0; i < COUNT_OF(cases); i++) {
        check_in("reduction %d", i);
        const int64_t *s = cases[i].shape;
        int dim = cases[i].dim;
        cuflash_tensor a = make(CUFLASH_FLOAT16, 0, 3, s),
                       out = make(CUFLASH_FLOAT32, 0, 2, SHAPE(s[dim == 0], s[dim == 2 ? 1 : 2]));
        for (int op = CUFLASH_SUM; op <= CUFLASH_MIN; op++)
            CHECK_LAUNCHES(cases[i].launches, cases[i].last, cuflash_tensor_reduce((cuflash_reduce_op)op, &out, &a, dim));
        cuflash_tensor_release(&a);
        cuflash_tensor_release(&out);
    }
    check_in("all elements");
    cuflash_tensor small = make(CUFLASH_FLOAT32, 1, 2, SHAPE(50, 40)),
                   large = make(CUFLASH_BFLOAT16, 1, 2, SHAPE(1 << 12, 1 << 12));
    double result;
    for (int op = CUFLASH_SUM; op <= CUFLASH_MIN; op++) {
        CHECK_LAUNCHES(1, "cuflash_element_reduce_all 2 256 0",
                       cuflash_tensor_reduce_all((cuflash_reduce_op)op, &small, &result));
        CHECK_LAUNCHES(1, "cuflash_element_reduce_all 512 256 0",
                       cuflash_tensor_reduce_all((cuflash_reduce_op)op, &large, &result));
    }
    REQUIRE_OK(cuflash_memory_set_limit(1, live(1)));
    CHECK_REFUSED(CUFLASH_OUT_OF_MEMORY, "tensor_reduce_all|cuda:1|limit",
                  cuflash_tensor_reduce_all(CUFLASH_SUM, &small, &result));
    REQUIRE_OK(cuflash_memory_set_limit(1, 0));
    check_in("%s", "");
    cuflash_tensor_release(&small);
    cuflash_tensor_release(&large);
}

static void test_compare(void) {
    cuflash_tensor a = make(CUFLASH_FLOAT32, 0, 2, SHAPE(20, 40)), b = make(CUFLASH_FLOAT16, 0, 2, SHAPE(20, 40)),
                   elsewhere = make(CUFLASH_FLOAT64, 1, 2, SHAPE(20, 40)),
                   host = make(CUFLASH_FLOAT16, CUFLASH_CPU, 2, SHAPE(20, 40));
    cuflash_close_report report;
    CHECK_LAUNCHES(1, "cuflash_element_compare 1 256 0", cuflash_tensor_compare(&a, &b, 0, 0, false, &report));
    CHECK(report.numel == 800);
    CHECK_LAUNCHES(1, "cuflash_element_compare 1 256 0", cuflash_tensor_compare(&a, &elsewhere, 0, 0, false, &report));
    REQUIRE_OK(cuflash_tensor_arange(&host, 0, 1));
    CHECK_LAUNCHES(1, "cuflash_element_compare 1 256 0", cuflash_tensor_compare(&b, &host, 0, 0, false, &report));
    REQUIRE_OK(cuflash_tensor_copy(&b, &host));
    CHECK_LAUNCHES(0, NULL, cuflash_tensor_compare(&host, &b, 0, 0, false, &report)); /* on the CPU */
    CHECK(report.numel == 800 && report.n_bad == 0);
    cuflash_tensor *const all[] = {&a, &b, &elsewhere, &host};
    for (int i = 0; i < COUNT_OF(all); i++) cuflash_tensor_release(all[i]);
}

/* ---- Errors ------------------------------------------------------------------------------------- */

static void test_refusals(void) {
    cuflash_tensor t = make(CUFLASH_FLOAT32, 0, 2, SHAPE(4, 4)), other = make(CUFLASH_FLOAT32, 1, 2, SHAPE(4, 4)),
                   host = make(CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(4, 4)), row = make(CUFLASH_FLOAT32, 1, 1, SHAPE(4)),
                   freed, repeated;
    const cuflash_tensor *const elsewhere[] = {&other, &host};
    const char *const got[] = {"got one on cuda:1", "got one on cpu"};
    char words[128];
    for (int i = 0; i < 2; i++) {
        const cuflash_tensor *x = elsewhere[i];
        snprintf(words, sizeof words, "tensor_binary|'a'|expected a tensor on cuda:0|%s", got[i]);
        CHECK_REFUSED(CUFLASH_INVALID_ARGUMENT, words, cuflash_tensor_binary(CUFLASH_ADD, &t, x, &t));
        snprintf(words, sizeof words, "tensor_binary|'b'|expected a tensor on cuda:0|%s", got[i]);
        CHECK_REFUSED(CUFLASH_INVALID_ARGUMENT, words, cuflash_tensor_binary(CUFLASH_ADD, &t, &t, x));
        snprintf(words, sizeof words, "tensor_binary_scalar|'a'|expected a tensor on cuda:0|%s", got[i]);
        CHECK_REFUSED(CUFLASH_INVALID_ARGUMENT, words, cuflash_tensor_binary_scalar(CUFLASH_ADD, &t, x, 1, false));
        snprintf(words, sizeof words, "tensor_unary|'a'|expected a tensor on cuda:0|%s", got[i]);
        CHECK_REFUSED(CUFLASH_INVALID_ARGUMENT, words, cuflash_tensor_unary(CUFLASH_NEG, &t, x));
    }
    CHECK_REFUSED(CUFLASH_INVALID_ARGUMENT, "tensor_reduce|'out'|expected a tensor on cuda:0|got one on cuda:1",
                  cuflash_tensor_reduce(CUFLASH_SUM, &row, &t, 0));
    CHECK_REFUSED(CUFLASH_DIMENSION_MISMATCH, "tensor_copy|'src'|[4]|[4 x 4]", cuflash_tensor_copy(&row, &t));
    REQUIRE_OK(cuflash_tensor_expand(&repeated, &row, 2, SHAPE(4, 4)));
    CHECK_REFUSED(CUFLASH_INVALID_ARGUMENT, "tensor_copy|'dst'|stride 0", cuflash_tensor_copy(&repeated, &t));
    CHECK_REFUSED(CUFLASH_INVALID_ARGUMENT, "tensor_fill|'dst'|stride 0", cuflash_tensor_fill(&repeated, 1));
    CHECK_LAUNCHES(1, "cuflash_element_move 1 256 0", cuflash_tensor_copy(&t, &repeated));

    freed = make(CUFLASH_FLOAT32, 1, 2, SHAPE(4, 4));
    cuflash_tensor_release(&freed);
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_copy|'dst'|freed", cuflash_tensor_copy(&freed, &t));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_copy|'src'|freed", cuflash_tensor_copy(&t, &freed));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_copy|'src'|NULL", cuflash_tensor_copy(&t, NULL));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_fill|'dst'|freed", cuflash_tensor_fill(&freed, 0));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_binary|'b'|freed", cuflash_tensor_binary(CUFLASH_ADD, &t, &t, &freed));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_set|'tensor'|freed", cuflash_tensor_set(&freed, SHAPE(0, 0), 0));

    /* A copy that needs memory it cannot have. */
    cuflash_tensor column;
    REQUIRE_OK(cuflash_tensor_select(&column, &t, 1, 0));
    REQUIRE_OK(cuflash_memory_set_limit(0, live(0)));
    CHECK_REFUSED(CUFLASH_OUT_OF_MEMORY, "cuda:0|limit", cuflash_tensor_copy(&row, &column));
    CHECK_REFUSED(CUFLASH_OUT_OF_MEMORY, "cuda:0|limit", cuflash_tensor_copy(&column, &row));
    REQUIRE_OK(cuflash_memory_set_limit(0, 0));
    CHECK_LAUNCHES(1, "cuflash_element_move 1 256 0", cuflash_tensor_copy(&row, &column));
    cuflash_tensor *const all[] = {&t, &other, &host, &row, &repeated, &column};
    for (int i = 0; i < COUNT_OF(all); i++) cuflash_tensor_release(all[i]);
}

/* A fault on the device comes back from every call, in CUDA's words. */
static void test_fault(void) {
    cuflash_tensor t = make(CUFLASH_FLOAT32, 0, 2, SHAPE(4, 4)), host = make(CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(4, 4)),
                   row = make(CUFLASH_FLOAT32, 0, 1, SHAPE(4)), turned;
    REQUIRE_OK(cuflash_tensor_transpose(&turned, &t, 0, 1));
    cuflash_close_report report;
    cuflash_generator generator = {0, 0};
    double value = -9;
    fake.fault(700);
#define FAULTS(fn, call) CHECK_REFUSED(CUFLASH_CUDA_ERROR, fn "|illegal memory access", call)
    FAULTS("tensor_fill", cuflash_tensor_fill(&t, 1));
    FAULTS("tensor_copy", cuflash_tensor_copy(&t, &host));
    FAULTS("tensor_copy", cuflash_tensor_copy(&host, &t));
    FAULTS("tensor_empty", cuflash_tensor_copy(&t, &turned));
    FAULTS("tensor_empty", cuflash_tensor_copy(&host, &turned));
    FAULTS("tensor_binary", cuflash_tensor_binary(CUFLASH_ADD, &t, &t, &row));
    FAULTS("tensor_unary", cuflash_tensor_unary(CUFLASH_NEG, &t, &t));
    FAULTS("tensor_reduce", cuflash_tensor_reduce(CUFLASH_SUM, &row, &t, 0));
    FAULTS("tensor_reduce_all", cuflash_tensor_reduce_all(CUFLASH_SUM, &t, &value));
    FAULTS("tensor_compare", cuflash_tensor_compare(&t, &t, 0, 0, false, &report));
    FAULTS("random_normal", cuflash_random_normal(&t, &generator, 0, 1));
    FAULTS("tensor_get", cuflash_tensor_get(&t, SHAPE(0, 0), &value));
    FAULTS("tensor_set", cuflash_tensor_set(&t, SHAPE(0, 0), 1));
#undef FAULTS
    fake.fault(0);
    CHECK(value == -9 && generator.offset == 0);
    CHECK_LAUNCHES(1, "cuflash_element_fill 1 256 0", cuflash_tensor_fill(&t, 1));
    cuflash_tensor *const all[] = {&t, &host, &row, &turned};
    for (int i = 0; i < COUNT_OF(all); i++) cuflash_tensor_release(all[i]);
}

int main(int argc, char **argv) {
    if (!fake_load(argc, argv)) return 1;
    test_kernels();
    test_grids();
    test_overlap();
    test_copies_of_bits();
    test_conversions();
    test_get_set();
    test_reduce();
    test_compare();
    test_refusals();
    test_fault();
    CHECK(live(0) == 0 && live(1) == 0 && live(CUFLASH_CPU) == 0);
    return check_result();
}
