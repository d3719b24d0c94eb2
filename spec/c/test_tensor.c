/* Tensors: making them, views of them, and who owns what. */
#include "check.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

static const int64_t BIG = (int64_t)1 << 40;

/* The bytes of a tensor that no function has filled in: what a failed call must leave. */
static cuflash_tensor untouched(void) {
    cuflash_tensor t;
    memset(&t, 0x5a, sizeof t);
    return t;
}

static bool is_untouched(const cuflash_tensor *t) {
    for (size_t i = 0; i < sizeof *t; i++)
        if (((const unsigned char *)t)[i] != 0x5a) return false;
    return true;
}

#define CHECK_REFUSED(status, words, call)                                                                                     \
    do {                                                                                                                       \
        cuflash_tensor refused = untouched(), *out = &refused;                                                                 \
        int64_t live = check_live_bytes();                                                                                     \
        CHECK_FAILS(status, words, call);                                                                                      \
        CHECK(is_untouched(out));                                                                                              \
        CHECK(check_live_bytes() == live);                                                                                     \
    } while (0)

static void check_shape(const cuflash_tensor *t, int ndim, const int64_t *shape, const int64_t *stride, int line) {
    check_that(t->ndim == ndim, __FILE__, line, "expected %d dimensions, got %d", ndim, t->ndim);
    for (int i = 0; i < CUFLASH_MAX_DIMS; i++) {
        int64_t size = i < ndim ? shape[i] : 0, step = i < ndim ? stride[i] : 0;
        check_that(t->shape[i] == size, __FILE__, line, "expected size %lld in dimension %d, got %lld", (long long)size, i,
                   (long long)t->shape[i]);
        bool matters = i >= ndim || size > 1; /* the stride of a single element is never used */
        check_that(!matters || t->stride[i] == step, __FILE__, line, "expected stride %lld in dimension %d, got %lld",
                   (long long)step, i, (long long)t->stride[i]);
    }
}
#define CHECK_SHAPE(t, ndim, shape, stride) check_shape(t, ndim, shape, stride, __LINE__)

static double value_at(const cuflash_tensor *t, const int64_t *index) {
    double value = NAN;
    CHECK_OK(cuflash_tensor_get(t, index, &value));
    return value;
}

static void test_empty(void) {
    int64_t live = check_live_bytes();
    static const struct {
        cuflash_dtype dtype;
        int64_t bytes;
    } dtypes[] = {{CUFLASH_FLOAT32, 96}, {CUFLASH_FLOAT16, 48}, {CUFLASH_BFLOAT16, 48}, {CUFLASH_FLOAT64, 192}};
    for (int i = 0; i < COUNT_OF(dtypes); i++) {
        check_in("empty %s", cuflash_dtype_name(dtypes[i].dtype));
        cuflash_tensor t = untouched();
        CHECK_OK(cuflash_tensor_empty(&t, dtypes[i].dtype, CUFLASH_CPU, 3, SHAPE(2, 3, 4)));
        CHECK_SHAPE(&t, 3, SHAPE(2, 3, 4), SHAPE(12, 4, 1));
        CHECK(t.storage && t.data && (uintptr_t)t.data % 64 == 0);
        CHECK(t.dtype == dtypes[i].dtype && t.device == CUFLASH_CPU);
        CHECK(cuflash_tensor_numel(&t) == 24 && cuflash_tensor_is_contiguous(&t));
        CHECK(check_live_bytes() == live + dtypes[i].bytes);
        cuflash_tensor_release(&t);
        CHECK(check_live_bytes() == live);
    }
    check_in("a single number");
    cuflash_tensor t;
    CHECK_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 0, NULL));
    CHECK_SHAPE(&t, 0, NULL, NULL);
    CHECK(cuflash_tensor_numel(&t) == 1 && cuflash_tensor_is_contiguous(&t));
    CHECK_OK(cuflash_tensor_set(&t, NULL, 2.5));
    CHECK(value_at(&t, NULL) == 2.5);
    cuflash_tensor_release(&t);
    check_in("eight dimensions");
    CHECK_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 8, SHAPE(1, 2, 1, 2, 1, 2, 1, 2)));
    CHECK_SHAPE(&t, 8, SHAPE(1, 2, 1, 2, 1, 2, 1, 2), SHAPE(16, 8, 8, 4, 4, 2, 2, 1));
    cuflash_tensor_release(&t);
    check_in("%s", "");
}

static void test_empty_refusals(void) {
    check_in("empty refuses");
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_empty|'out'",
                cuflash_tensor_empty(NULL, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(1)));
    CHECK_REFUSED(CUFLASH_UNSUPPORTED_DTYPE, "tensor_empty|'dtype'|4",
                  cuflash_tensor_empty(out, (cuflash_dtype)4, CUFLASH_CPU, 1, SHAPE(1)));
    CHECK_REFUSED(CUFLASH_INVALID_ARGUMENT, "-2", cuflash_tensor_empty(out, CUFLASH_FLOAT32, -2, 1, SHAPE(1)));
    CHECK_REFUSED(CUFLASH_CUDA_ERROR, "cuda:1000", cuflash_tensor_empty(out, CUFLASH_FLOAT32, 1000, 1, SHAPE(1)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'ndim'|-1",
                  cuflash_tensor_empty(out, CUFLASH_FLOAT32, CUFLASH_CPU, -1, SHAPE(1)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'ndim'|9",
                  cuflash_tensor_empty(out, CUFLASH_FLOAT32, CUFLASH_CPU, 9, SHAPE(1, 1, 1, 1, 1, 1, 1, 1, 1)));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "'shape'", cuflash_tensor_empty(out, CUFLASH_FLOAT32, CUFLASH_CPU, 1, NULL));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'shape'|dimension 1|0",
                  cuflash_tensor_empty(out, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(3, 0)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'shape'|dimension 0|-3",
                  cuflash_tensor_empty(out, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(-3, 2)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'shape'|64 bits",
                  cuflash_tensor_empty(out, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(BIG, BIG)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'shape'|64 bits",
                  cuflash_tensor_empty(out, CUFLASH_FLOAT64, CUFLASH_CPU, 1, SHAPE(INT64_MAX)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'shape'|64 bits",
                  cuflash_tensor_empty(out, CUFLASH_FLOAT16, CUFLASH_CPU, 3, SHAPE(INT64_MAX, INT64_MAX, INT64_MAX)));
    CHECK_REFUSED(CUFLASH_OUT_OF_MEMORY, "tensor_empty|PiB",
                  cuflash_tensor_empty(out, CUFLASH_FLOAT64, CUFLASH_CPU, 1, SHAPE(BIG * 1000)));
    check_in("%s", "");
}

static void test_borrow(void) {
    check_in("borrow");
    int64_t live = check_live_bytes();
    float memory[12];
    for (int i = 0; i < 12; i++) memory[i] = (float)i;
    cuflash_tensor t;
    CHECK_OK(cuflash_tensor_borrow(&t, memory, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(3, 4), NULL));
    CHECK_SHAPE(&t, 2, SHAPE(3, 4), SHAPE(4, 1));
    CHECK(t.storage == NULL && t.data == memory && check_live_bytes() == live);
    CHECK(value_at(&t, SHAPE(2, 1)) == 9);
    CHECK_OK(cuflash_tensor_set(&t, SHAPE(2, 1), -1));
    CHECK(memory[9] == -1);
    cuflash_tensor view;
    CHECK_OK(cuflash_tensor_select(&view, &t, 0, 1));
    cuflash_tensor_release(&t);
    CHECK(t.data == NULL);
    CHECK(value_at(&view, SHAPE(3)) == 7); /* the memory is the caller's and still there */
    cuflash_tensor_release(&view);
    CHECK_OK(cuflash_tensor_borrow(&t, memory, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(4, 3), SHAPE(1, 4)));
    CHECK(value_at(&t, SHAPE(3, 2)) == 11 && !cuflash_tensor_is_contiguous(&t));
    CHECK_OK(cuflash_tensor_borrow(&t, memory, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(5, 2), SHAPE(0, 3)));
    CHECK(value_at(&t, SHAPE(4, 1)) == 3);

    const int64_t *one = SHAPE(1);
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_borrow|'out'",
                cuflash_tensor_borrow(NULL, memory, CUFLASH_FLOAT32, CUFLASH_CPU, 1, one, NULL));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_borrow|'data'",
                  cuflash_tensor_borrow(out, NULL, CUFLASH_FLOAT32, CUFLASH_CPU, 1, one, NULL));
    CHECK_REFUSED(CUFLASH_UNSUPPORTED_DTYPE, "'dtype'|-1",
                  cuflash_tensor_borrow(out, memory, (cuflash_dtype)-1, CUFLASH_CPU, 1, one, NULL));
    CHECK_REFUSED(CUFLASH_CUDA_ERROR, "cuda:1000", cuflash_tensor_borrow(out, memory, CUFLASH_FLOAT32, 1000, 1, one, NULL));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'ndim'",
                  cuflash_tensor_borrow(out, memory, CUFLASH_FLOAT32, CUFLASH_CPU, 9, one, NULL));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "'shape'",
                  cuflash_tensor_borrow(out, memory, CUFLASH_FLOAT32, CUFLASH_CPU, 1, NULL, NULL));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'shape'",
                  cuflash_tensor_borrow(out, memory, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(0), NULL));
    CHECK_REFUSED(CUFLASH_INVALID_ARGUMENT, "'strides'|-1",
                  cuflash_tensor_borrow(out, memory, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(2), SHAPE(-1)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "64 bits",
                  cuflash_tensor_borrow(out, memory, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(3, 3), SHAPE(INT64_MAX, 1)));
    CHECK_REFUSED(CUFLASH_INVALID_ARGUMENT, "'data'|multiple of 4",
                  cuflash_tensor_borrow(out, (char *)memory + 2, CUFLASH_FLOAT32, CUFLASH_CPU, 1, one, NULL));
    CHECK_OK(cuflash_tensor_borrow(&t, (char *)memory + 2, CUFLASH_FLOAT16, CUFLASH_CPU, 1, one, NULL));
    CHECK(check_live_bytes() == live);
    check_in("%s", "");
}

static void test_release(void) {
    check_in("release");
    int64_t live = check_live_bytes();
    cuflash_tensor_release(NULL);
    cuflash_tensor t = {0};
    cuflash_tensor_release(&t);
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(100)));
    cuflash_tensor_release(&t);
    CHECK(t.data == NULL && t.storage == NULL && check_live_bytes() == live);
    cuflash_tensor_release(&t);
    CHECK(check_live_bytes() == live);
    CHECK(cuflash_tensor_numel(&t) == 0 && !cuflash_tensor_is_contiguous(&t));
    CHECK(cuflash_tensor_numel(NULL) == 0 && !cuflash_tensor_is_contiguous(NULL));

    /* The storage lives as long as one view of it does, whichever that is. */
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(10, 10)));
    cuflash_tensor row, same;
    CHECK_OK(cuflash_tensor_arange(&t, 0, 1));
    CHECK_OK(cuflash_tensor_select(&row, &t, 0, 7));
    CHECK_OK(cuflash_tensor_alias(&same, &row));
    cuflash_tensor_release(&t);
    cuflash_tensor_release(&row);
    CHECK(check_live_bytes() == live + 400);
    CHECK(value_at(&same, SHAPE(3)) == 73);
    cuflash_tensor_release(&same);
    CHECK(check_live_bytes() == live);

    /* A released tensor is refused everywhere, by name. */
    cuflash_tensor freed = {.dtype = CUFLASH_FLOAT32, .device = CUFLASH_CPU, .ndim = 1, .shape = {1}, .stride = {1}};
    double value;
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_alias|'src'|freed", cuflash_tensor_alias(out, &freed));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_narrow|'src'|freed", cuflash_tensor_narrow(out, &freed, 0, 0, 1));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_select|'src'|freed", cuflash_tensor_select(out, &freed, 0, 0));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_transpose|'src'|freed", cuflash_tensor_transpose(out, &freed, 0, 0));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_view|'src'|freed", cuflash_tensor_view(out, &freed, 1, SHAPE(1)));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_expand|'src'|freed", cuflash_tensor_expand(out, &freed, 1, SHAPE(1)));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_get|freed", cuflash_tensor_get(&freed, SHAPE(0), &value));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_set|freed", cuflash_tensor_set(&freed, SHAPE(0), 1));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_fill|'dst'|freed", cuflash_tensor_fill(&freed, 1));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_arange|'dst'|freed", cuflash_tensor_arange(&freed, 0, 1));
    check_in("%s", "");
}

static void test_views(void) {
    check_in("views");
    int64_t live = check_live_bytes();
    cuflash_tensor t, v;
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 3, SHAPE(2, 3, 4)));
    CHECK_OK(cuflash_tensor_arange(&t, 0, 1));

    CHECK_OK(cuflash_tensor_alias(&v, &t));
    CHECK(memcmp(&v, &t, sizeof t) == 0);
    cuflash_tensor_release(&v);

    CHECK_OK(cuflash_tensor_narrow(&v, &t, 1, 1, 2));
    CHECK_SHAPE(&v, 3, SHAPE(2, 2, 4), SHAPE(12, 4, 1));
    CHECK(value_at(&v, SHAPE(1, 1, 2)) == 22 && !cuflash_tensor_is_contiguous(&v));
    cuflash_tensor_release(&v);

    CHECK_OK(cuflash_tensor_select(&v, &t, 1, 2));
    CHECK_SHAPE(&v, 2, SHAPE(2, 4), SHAPE(12, 1));
    CHECK(value_at(&v, SHAPE(1, 3)) == 23);
    cuflash_tensor_release(&v);

    CHECK_OK(cuflash_tensor_transpose(&v, &t, 0, 2));
    CHECK_SHAPE(&v, 3, SHAPE(4, 3, 2), SHAPE(1, 4, 12));
    CHECK(value_at(&v, SHAPE(3, 2, 0)) == 11);
    cuflash_tensor_release(&v);
    CHECK_OK(cuflash_tensor_transpose(&v, &t, 1, 1));
    CHECK(memcmp(&v, &t, sizeof t) == 0);
    cuflash_tensor_release(&v);

    CHECK_OK(cuflash_tensor_expand(&v, &t, 4, SHAPE(5, 2, 3, 4)));
    CHECK_SHAPE(&v, 4, SHAPE(5, 2, 3, 4), SHAPE(0, 12, 4, 1));
    CHECK(value_at(&v, SHAPE(4, 1, 0, 1)) == 13 && cuflash_tensor_numel(&v) == 120);
    cuflash_tensor_release(&v);

    /* out may be src: the one reference passes on. */
    cuflash_tensor chain;
    CHECK_OK(cuflash_tensor_alias(&chain, &t));
    CHECK_OK(cuflash_tensor_alias(&chain, &chain));
    CHECK_OK(cuflash_tensor_narrow(&chain, &chain, 2, 1, 2));
    CHECK_OK(cuflash_tensor_transpose(&chain, &chain, 0, 1));
    CHECK_OK(cuflash_tensor_select(&chain, &chain, 2, 1));
    CHECK_SHAPE(&chain, 2, SHAPE(3, 2), SHAPE(4, 12));
    CHECK(value_at(&chain, SHAPE(2, 1)) == 22);
    CHECK_OK(cuflash_tensor_view(&chain, &chain, 3, SHAPE(3, 1, 2)));
    CHECK_OK(cuflash_tensor_expand(&chain, &chain, 3, SHAPE(3, 7, 2)));
    CHECK(value_at(&chain, SHAPE(2, 6, 1)) == 22);
    cuflash_tensor_release(&t);
    CHECK(check_live_bytes() == live + 96);
    cuflash_tensor_release(&chain);
    CHECK(check_live_bytes() == live);
    check_in("%s", "");
}

/* view: which shapes need no copy. Elements keep their row-major order. */
static void test_view_shapes(void) {
    enum { DENSE, TRANSPOSED, NARROWED, EXPANDED };
    static const char *const names[] = {"dense", "transposed", "narrowed", "expanded"};
    static const struct {
        int source; /* DENSE 4 x 6, TRANSPOSED 6 x 4, NARROWED 4 x 3, EXPANDED 5 x 6 (of 1 x 6) */
        int ndim;
        int64_t shape[4];
        cuflash_status status;
    } cases[] = {
        {DENSE, 1, {24}, CUFLASH_SUCCESS},
        {DENSE, 1, {-1}, CUFLASH_SUCCESS},
        {DENSE, 4, {2, 2, 3, 2}, CUFLASH_SUCCESS},
        {DENSE, 3, {8, 1, 3}, CUFLASH_SUCCESS},
        {DENSE, 3, {-1, 1, 3}, CUFLASH_SUCCESS},
        {DENSE, 3, {24, -1, 1}, CUFLASH_SUCCESS},
        {DENSE, 2, {5, 5}, CUFLASH_DIMENSION_MISMATCH},
        {DENSE, 2, {5, -1}, CUFLASH_DIMENSION_MISMATCH},
        {DENSE, 2, {48, -1}, CUFLASH_DIMENSION_MISMATCH},
        {DENSE, 2, {-1, -1}, CUFLASH_INVALID_DIMENSION},
        {DENSE, 2, {0, 24}, CUFLASH_INVALID_DIMENSION},
        {DENSE, 2, {-2, 12}, CUFLASH_INVALID_DIMENSION},
        {DENSE, 0, {0}, CUFLASH_DIMENSION_MISMATCH},
        {DENSE, 2, {(int64_t)1 << 62, 8}, CUFLASH_DIMENSION_MISMATCH},
        {DENSE, 3, {-1, (int64_t)1 << 40, (int64_t)1 << 40}, CUFLASH_DIMENSION_MISMATCH},
        {DENSE, 3, {(int64_t)1 << 32, (int64_t)1 << 32, -1}, CUFLASH_DIMENSION_MISMATCH},
        {TRANSPOSED, 2, {6, 4}, CUFLASH_SUCCESS},
        {TRANSPOSED, 4, {3, 2, 2, 2}, CUFLASH_SUCCESS},
        {TRANSPOSED, 4, {6, 1, 4, 1}, CUFLASH_SUCCESS},
        {TRANSPOSED, 1, {24}, CUFLASH_INVALID_ARGUMENT},
        {TRANSPOSED, 2, {4, 6}, CUFLASH_INVALID_ARGUMENT},
        {TRANSPOSED, 2, {12, 2}, CUFLASH_INVALID_ARGUMENT},
        {NARROWED, 3, {2, 2, 3}, CUFLASH_SUCCESS},
        {NARROWED, 3, {4, 3, 1}, CUFLASH_SUCCESS},
        {NARROWED, 1, {12}, CUFLASH_INVALID_ARGUMENT},
        {NARROWED, 2, {2, 6}, CUFLASH_INVALID_ARGUMENT},
        {EXPANDED, 3, {5, 2, 3}, CUFLASH_SUCCESS},
        {EXPANDED, 1, {30}, CUFLASH_INVALID_ARGUMENT},
    };
    cuflash_tensor sources[4];
    REQUIRE_OK(cuflash_tensor_empty(&sources[DENSE], CUFLASH_FLOAT64, CUFLASH_CPU, 2, SHAPE(4, 6)));
    CHECK_OK(cuflash_tensor_arange(&sources[DENSE], 0, 1));
    REQUIRE_OK(cuflash_tensor_transpose(&sources[TRANSPOSED], &sources[DENSE], 0, 1));
    REQUIRE_OK(cuflash_tensor_narrow(&sources[NARROWED], &sources[DENSE], 1, 2, 3));
    REQUIRE_OK(cuflash_tensor_narrow(&sources[EXPANDED], &sources[DENSE], 0, 1, 1));
    REQUIRE_OK(cuflash_tensor_expand(&sources[EXPANDED], &sources[EXPANDED], 2, SHAPE(5, 6)));
    for (int i = 0; i < COUNT_OF(cases); i++) {
        const cuflash_tensor *src = &sources[cases[i].source];
        check_in("view of the %s tensor, case %d", names[cases[i].source], i);
        cuflash_tensor v = untouched();
        if (cases[i].status != CUFLASH_SUCCESS) {
            const char *words =
                cases[i].status == CUFLASH_INVALID_ARGUMENT ? "tensor_view|strides|without a copy" : "tensor_view|'shape'";
            CHECK_FAILS(cases[i].status, words, cuflash_tensor_view(&v, src, cases[i].ndim, cases[i].shape));
            CHECK(is_untouched(&v));
            continue;
        }
        if (!CHECK_OK(cuflash_tensor_view(&v, src, cases[i].ndim, cases[i].shape))) continue;
        CHECK(v.ndim == cases[i].ndim && cuflash_tensor_numel(&v) == cuflash_tensor_numel(src));
        for (int d = 0; d < v.ndim; d++) CHECK(cases[i].shape[d] == -1 || v.shape[d] == cases[i].shape[d]);
        for (int64_t n = 0; n < cuflash_tensor_numel(src); n++) {
            int64_t in_view[4], in_src[2], rest = n;
            for (int d = v.ndim - 1; d >= 0; d--) in_view[d] = rest % v.shape[d], rest /= v.shape[d];
            in_src[0] = n / src->shape[1], in_src[1] = n % src->shape[1];
            CHECK(value_at(&v, in_view) == value_at(src, in_src));
        }
        cuflash_tensor_release(&v);
    }
    check_in("%s", "");
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_view|'shape'", cuflash_tensor_view(&sources[DENSE], &sources[DENSE], 1, NULL));
    for (int i = 0; i < COUNT_OF(sources); i++) cuflash_tensor_release(&sources[i]);
}

static void test_view_refusals(void) {
    check_in("views refuse");
    cuflash_tensor t, scalar;
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(3, 4)));
    REQUIRE_OK(cuflash_tensor_empty(&scalar, CUFLASH_FLOAT32, CUFLASH_CPU, 0, NULL));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_alias|'out'", cuflash_tensor_alias(NULL, &t));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_narrow|'out'", cuflash_tensor_narrow(NULL, &t, 0, 0, 1));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_select|'out'", cuflash_tensor_select(NULL, &t, 0, 0));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_transpose|'out'", cuflash_tensor_transpose(NULL, &t, 0, 1));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_view|'out'", cuflash_tensor_view(NULL, &t, 1, SHAPE(12)));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_expand|'out'", cuflash_tensor_expand(NULL, &t, 2, SHAPE(3, 4)));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_alias|'src'", cuflash_tensor_alias(out, NULL));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_narrow|'src'", cuflash_tensor_narrow(out, NULL, 0, 0, 1));

    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_narrow|'dim'|2", cuflash_tensor_narrow(out, &t, 2, 0, 1));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_narrow|'dim'|-1", cuflash_tensor_narrow(out, &t, -1, 0, 1));
    static const int64_t ranges[][2] = {{-1, 1}, {4, 1}, {0, 0}, {0, 5}, {3, 2}, {2, -1}, {1, INT64_MAX}, {INT64_MAX, 1}};
    for (int i = 0; i < COUNT_OF(ranges); i++)
        CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_narrow|'start'",
                      cuflash_tensor_narrow(out, &t, 1, ranges[i][0], ranges[i][1]));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_select|'dim'|3", cuflash_tensor_select(out, &t, 3, 0));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_select|'dim'", cuflash_tensor_select(out, &scalar, 0, 0));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_select|'index'|-1", cuflash_tensor_select(out, &t, 0, -1));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_select|'index'|3", cuflash_tensor_select(out, &t, 0, 3));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_transpose|'dim0'|2", cuflash_tensor_transpose(out, &t, 2, 0));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_transpose|'dim1'|-1", cuflash_tensor_transpose(out, &t, 0, -1));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_view|'ndim'|9", cuflash_tensor_view(out, &t, 9, SHAPE(12)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_view|'ndim'|-1", cuflash_tensor_view(out, &t, -1, SHAPE(12)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_expand|'ndim'|1", cuflash_tensor_expand(out, &t, 1, SHAPE(12)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_expand|'ndim'|9", cuflash_tensor_expand(out, &t, 9, SHAPE(12)));
    CHECK_REFUSED(CUFLASH_NULL_POINTER, "tensor_expand|'shape'", cuflash_tensor_expand(out, &t, 2, NULL));
    CHECK_REFUSED(CUFLASH_DIMENSION_MISMATCH, "tensor_expand|'shape'|[3 x 4]|[3 x 8]",
                  cuflash_tensor_expand(out, &t, 2, SHAPE(3, 8)));
    CHECK_REFUSED(CUFLASH_DIMENSION_MISMATCH, "tensor_expand|'shape'", cuflash_tensor_expand(out, &t, 2, SHAPE(1, 4)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_expand|'shape'", cuflash_tensor_expand(out, &t, 3, SHAPE(0, 3, 4)));
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "tensor_expand|64 bits", cuflash_tensor_expand(out, &t, 4, SHAPE(BIG, BIG, 3, 4)));

    /* Values of the struct that no function made. */
    cuflash_tensor made = t;
    made.ndim = 9;
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'src'|9", cuflash_tensor_alias(out, &made));
    made = t, made.shape[1] = 0;
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'src'|dimension 1", cuflash_tensor_alias(out, &made));
    made = t, made.stride[0] = -4;
    CHECK_REFUSED(CUFLASH_INVALID_DIMENSION, "'src'|dimension 0|-4", cuflash_tensor_alias(out, &made));
    made = t, made.dtype = (cuflash_dtype)17;
    CHECK_REFUSED(CUFLASH_UNSUPPORTED_DTYPE, "'src'|17", cuflash_tensor_alias(out, &made));
    cuflash_tensor_release(&t);
    cuflash_tensor_release(&scalar);
    check_in("%s", "");
}

int main(void) {
    int64_t live = check_live_bytes();
    test_empty();
    test_empty_refusals();
    test_borrow();
    test_release();
    test_views();
    test_view_shapes();
    test_view_refusals();
    CHECK(check_live_bytes() == live);
    return check_result();
}
