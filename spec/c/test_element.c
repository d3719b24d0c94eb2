/* Element-wise work: conversion between all dtypes, broadcasting, overlap, arithmetic, reductions, comparison. */
#include <stdint.h>

#include "check.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

static const cuflash_dtype DTYPES[] = {CUFLASH_FLOAT32, CUFLASH_FLOAT16, CUFLASH_BFLOAT16, CUFLASH_FLOAT64};

static cuflash_tensor borrow(const void *data, cuflash_dtype dtype, int ndim, const int64_t *shape, const int64_t *strides) {
    cuflash_tensor t;
    REQUIRE_OK(cuflash_tensor_borrow(&t, (void *)(uintptr_t)data, dtype, CUFLASH_CPU, ndim, shape, strides));
    return t;
}

static cuflash_tensor row(const void *data, cuflash_dtype dtype, int64_t n) {
    return borrow(data, dtype, 1, &n, NULL);
}

static void copy(void *dst, cuflash_dtype to, const void *src, cuflash_dtype from, int64_t n) {
    cuflash_tensor a = row(dst, to, n), b = row(src, from, n);
    REQUIRE_OK(cuflash_tensor_copy(&a, &b));
}

/* ---- Conversion --------------------------------------------------------------------------------- */

/* A 16-bit format, and what its patterns mean, from the definition alone. */
typedef struct {
    cuflash_dtype dtype;
    int mantissa_bits, bias;
} format;
static const format FORMATS[] = {{CUFLASH_FLOAT16, 10, 15}, {CUFLASH_BFLOAT16, 7, 127}};

static uint16_t infinity_of(const format *f) {
    return (uint16_t)(0x7fff >> f->mantissa_bits << f->mantissa_bits);
}

static double meaning(const format *f, uint16_t pattern) {
    int fraction = pattern & ((1 << f->mantissa_bits) - 1), exponent = (pattern & 0x7fff) >> f->mantissa_bits;
    double magnitude;
    if (exponent == 0x7fff >> f->mantissa_bits)
        magnitude = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        magnitude = ldexp(fraction, 1 - f->bias - f->mantissa_bits);
    else
        magnitude = ldexp(fraction + (1 << f->mantissa_bits), exponent - f->bias - f->mantissa_bits);
    return pattern & 0x8000 ? -magnitude : magnitude;
}

static bool same(double x, double y) {
    return x != x ? y != y : x == y && signbit(x) == signbit(y);
}

/* All 65536 patterns to float32 and float64, and from there back to what they were. */
static void test_all_patterns(void) {
    static uint16_t patterns[65536], back[65536];
    static float singles[65536];
    static double doubles[65536];
    for (int i = 0; i < 65536; i++) patterns[i] = (uint16_t)i;
    for (int f = 0; f < COUNT_OF(FORMATS); f++) {
        const format *form = &FORMATS[f];
        check_in("all patterns of %s", cuflash_dtype_name(form->dtype));
        copy(singles, CUFLASH_FLOAT32, patterns, form->dtype, 65536);
        copy(doubles, CUFLASH_FLOAT64, patterns, form->dtype, 65536);
        for (int i = 0; i < 65536; i++) {
            double expected = meaning(form, patterns[i]);
            CHECK_F(same(singles[i], expected), "pattern 0x%04x as float32: expected %g, got %g", (unsigned)i, expected,
                    (double)singles[i]);
            CHECK_F(same(doubles[i], expected), "pattern 0x%04x as float64: expected %g, got %g", (unsigned)i, expected,
                    doubles[i]);
        }
        for (int from_double = 0; from_double < 2; from_double++) {
            memset(back, 0, sizeof back);
            if (from_double)
                copy(back, form->dtype, doubles, CUFLASH_FLOAT64, 65536);
            else
                copy(back, form->dtype, singles, CUFLASH_FLOAT32, 65536);
            for (int i = 0; i < 65536; i++) {
                bool nan = (i & 0x7fff) > infinity_of(form), stays_nan = (back[i] & 0x7fff) > infinity_of(form);
                CHECK_F(nan ? stays_nan : back[i] == i, "pattern 0x%04x came back as 0x%04x", (unsigned)i, back[i]);
            }
        }
    }
    check_in("%s", "");
}

/* Around every midpoint between two neighbours: on it, the even one; beside it, the near one. The doubles beside
 * it differ from the midpoint by less than float32 can tell, so that rounding twice would be caught. */
static void test_rounding(void) {
    enum { MOST = 0x7f80 * 6 };
    static double doubles[MOST];
    static float singles[MOST];
    static uint16_t expected[MOST], expected_single[MOST], got[MOST];
    for (int f = 0; f < COUNT_OF(FORMATS); f++) {
        const format *form = &FORMATS[f];
        check_in("rounding to %s", cuflash_dtype_name(form->dtype));
        int top = infinity_of(form), n = 0;
        for (int lower = 0; lower < top; lower++) {
            double below = meaning(form, (uint16_t)lower);
            /* beyond the largest number, infinity takes the place of the next one */
            double above =
                lower + 1 < top ? meaning(form, (uint16_t)(lower + 1)) : 2 * below - meaning(form, (uint16_t)(lower - 1));
            double middle = below + (above - below) / 2;
            uint16_t even = (uint16_t)(lower & 1 ? lower + 1 : lower);
            for (int sign = 0; sign < 2; sign++)
                for (int side = -1; side <= 1; side++, n++) {
                    double x = side < 0 ? nextafter(middle, 0) : side > 0 ? nextafter(middle, INFINITY) : middle;
                    float s = side < 0   ? nextafterf((float)middle, 0)
                              : side > 0 ? nextafterf((float)middle, INFINITY)
                                         : (float)middle;
                    uint16_t magnitude = side < 0 ? (uint16_t)lower : side > 0 ? (uint16_t)(lower + 1) : even;
                    doubles[n] = sign ? -x : x;
                    singles[n] = sign ? -s : s;
                    expected[n] = (uint16_t)(magnitude | sign << 15);
                    expected_single[n] = expected[n];
                }
        }
        copy(got, form->dtype, doubles, CUFLASH_FLOAT64, n);
        for (int i = 0; i < n; i++)
            CHECK_F(got[i] == expected[i], "%.17g (float64): expected 0x%04x, got 0x%04x", doubles[i], expected[i], got[i]);
        copy(got, form->dtype, singles, CUFLASH_FLOAT32, n);
        for (int i = 0; i < n; i++)
            CHECK_F(got[i] == expected_single[i], "%.9g (float32): expected 0x%04x, got 0x%04x", (double)singles[i],
                    expected_single[i], got[i]);

        const double far[] = {1e300, -1e300, 1e39, -1e39, INFINITY, -INFINITY, 1e-300, -1e-300, 5e-324, -0.0, 0.0};
        const uint16_t sign = 0x8000, inf = infinity_of(form);
        const uint16_t want[] = {inf, inf | sign, inf, inf | sign, inf, inf | sign, 0, sign, 0, sign, 0};
        copy(got, form->dtype, far, CUFLASH_FLOAT64, COUNT_OF(far));
        for (int i = 0; i < COUNT_OF(far); i++)
            CHECK_F(got[i] == want[i], "%g: expected 0x%04x, got 0x%04x", far[i], want[i], got[i]);
    }
    check_in("%s", "");
}

static void test_to_float32(void) {
    static double doubles[4096];
    static float got[4096];
    uint64_t state = 1;
    for (int i = 0; i < 4096; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        uint64_t bits = state ^ state >> 29;
        if (i % 2) bits = (bits & 0x800fffffffffffff) | (uint64_t)(0x360 + i % 0x120) << 52; /* in float32's range */
        memcpy(&doubles[i], &bits, sizeof bits);
    }
    copy(got, CUFLASH_FLOAT32, doubles, CUFLASH_FLOAT64, 4096);
    for (int i = 0; i < 4096; i++)
        CHECK_F(same(got[i], (float)doubles[i]), "%.17g: expected %.9g, got %.9g", doubles[i], (double)(float)doubles[i],
                (double)got[i]);
}

/* Every dtype to every dtype, strided on both sides. */
static void test_all_pairs(void) {
    static const double values[] = {0, -0.0, 1, -1, 0.5, 127, -128, 0.0625, 96, INFINITY, -INFINITY, NAN};
    enum { N = COUNT_OF(values) };
    double source[N * 3], target[N * 2], back[N]; /* the widest dtype's room */
    for (int from = 0; from < 4; from++)
        for (int to = 0; to < 4; to++) {
            check_in("%s to %s", cuflash_dtype_name(DTYPES[from]), cuflash_dtype_name(DTYPES[to]));
            cuflash_tensor src = borrow(source, DTYPES[from], 1, SHAPE(N), SHAPE(3));
            cuflash_tensor dst = borrow(target, DTYPES[to], 1, SHAPE(N), SHAPE(2));
            cuflash_tensor given = row(values, CUFLASH_FLOAT64, N), result = row(back, CUFLASH_FLOAT64, N);
            CHECK_OK(cuflash_tensor_copy(&src, &given));
            CHECK_OK(cuflash_tensor_copy(&dst, &src));
            CHECK_OK(cuflash_tensor_copy(&result, &dst));
            for (int i = 0; i < N; i++) CHECK_F(same(back[i], values[i]), "expected %g, got %g", values[i], back[i]);
        }
    check_in("%s", "");
}

/* ---- Filling, reading, writing ------------------------------------------------------------------ */

static void test_fill_arange_get_set(void) {
    for (int d = 0; d < 4; d++) {
        check_in("%s", cuflash_dtype_name(DTYPES[d]));
        cuflash_tensor t, v;
        double x = 0;
        REQUIRE_OK(cuflash_tensor_empty(&t, DTYPES[d], CUFLASH_CPU, 3, SHAPE(3, 4, 5)));
        CHECK_OK(cuflash_tensor_fill(&t, -1.5));
        CHECK_OK(cuflash_tensor_transpose(&v, &t, 0, 2)); /* 5 x 4 x 3 */
        CHECK_OK(cuflash_tensor_narrow(&v, &v, 1, 1, 2)); /* 5 x 2 x 3 */
        CHECK_OK(cuflash_tensor_arange(&v, 10, 0.5));
        int64_t at[3], n = 0;
        for (at[0] = 0; at[0] < 5; at[0]++)
            for (at[1] = 0; at[1] < 2; at[1]++)
                for (at[2] = 0; at[2] < 3; at[2]++, n++) {
                    CHECK_OK(cuflash_tensor_get(&v, at, &x));
                    CHECK(x == 10 + 0.5 * (double)n);
                }
        CHECK_OK(cuflash_tensor_get(&t, SHAPE(0, 0, 0), &x));
        CHECK(x == -1.5); /* outside of the view */
        CHECK_OK(cuflash_tensor_set(&v, SHAPE(4, 1, 2), 33));
        CHECK_OK(cuflash_tensor_get(&t, SHAPE(2, 2, 4), &x));
        CHECK(x == 33);
        cuflash_tensor_release(&v);
        cuflash_tensor_release(&t);
    }
    check_in("%s", "");
}

/* More elements than one chunk, threads and odd strides: every element is met exactly once. */
static void test_large(void) {
    check_in("large");
    int before = cuflash_get_num_threads();
    cuflash_tensor t, v, u;
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT64, CUFLASH_CPU, 3, SHAPE(37, 5, 1031)));
    REQUIRE_OK(cuflash_tensor_empty(&u, CUFLASH_FLOAT64, CUFLASH_CPU, 3, SHAPE(37, 1031, 5)));
    for (int threads = 1; threads <= 7; threads += 3) {
        REQUIRE_OK(cuflash_set_num_threads(threads));
        CHECK_OK(cuflash_tensor_fill(&t, 0));
        CHECK_OK(cuflash_tensor_arange(&t, 0, 1));
        CHECK_OK(cuflash_tensor_transpose(&v, &t, 1, 2));
        CHECK_OK(cuflash_tensor_copy(&u, &v));
        const double *a = t.data, *b = u.data;
        bool right = true;
        for (int64_t i = 0; i < 37; i++)
            for (int64_t j = 0; j < 5; j++)
                for (int64_t k = 0; k < 1031; k++)
                    right = right && a[(i * 5 + j) * 1031 + k] == (double)((i * 5 + j) * 1031 + k) &&
                            b[(i * 1031 + k) * 5 + j] == a[(i * 5 + j) * 1031 + k];
        CHECK_F(right, "wrong with %d threads", threads);
        cuflash_tensor_release(&v);
    }
    REQUIRE_OK(cuflash_set_num_threads(before));
    cuflash_tensor_release(&t);
    cuflash_tensor_release(&u);
    check_in("%s", "");
}

/* ---- Arithmetic --------------------------------------------------------------------------------- */

static double binary(cuflash_binary_op op, double x, double y) {
    switch (op) {
    case CUFLASH_ADD: return x + y;
    case CUFLASH_SUB: return x - y;
    case CUFLASH_MUL: return x * y;
    case CUFLASH_DIV: return x / y;
    case CUFLASH_MAXIMUM: return x != x || y != y ? NAN : x > y ? x : y;
    case CUFLASH_MINIMUM: return x != x || y != y ? NAN : x < y ? x : y;
    }
    return NAN;
}

static double unary(cuflash_unary_op op, double x) {
    switch (op) {
    case CUFLASH_NEG: return -x;
    case CUFLASH_ABS: return fabs(x);
    case CUFLASH_EXP: return exp(x);
    case CUFLASH_LOG: return log(x);
    case CUFLASH_SQRT: return sqrt(x);
    }
    return NAN;
}

static void test_arithmetic(void) {
    static const double values[] = {0, -0.0, 1, -1, 2.5, 1e-300, -7e120, 3, INFINITY, -INFINITY, NAN};
    enum { N = COUNT_OF(values) };
    double out[N * N] = {0};
    cuflash_tensor result = borrow(out, CUFLASH_FLOAT64, 2, SHAPE(N, N), NULL);
    cuflash_tensor a = borrow(values, CUFLASH_FLOAT64, 2, SHAPE(N, 1), NULL), b = row(values, CUFLASH_FLOAT64, N);
    for (int op = CUFLASH_ADD; op <= CUFLASH_MINIMUM; op++) {
        check_in("binary op %d", op);
        CHECK_OK(cuflash_tensor_binary((cuflash_binary_op)op, &result, &a, &b));
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++) {
                double expected = binary((cuflash_binary_op)op, values[i], values[j]), got = out[i * N + j];
                CHECK_F(got == expected || same(got, expected), "%g and %g: expected %g, got %g", values[i], values[j],
                        expected, got);
            }
        cuflash_tensor line = row(out, CUFLASH_FLOAT64, N);
        for (int reversed = 0; reversed < 2; reversed++)
            for (int j = 0; j < N; j++) {
                CHECK_OK(cuflash_tensor_binary_scalar((cuflash_binary_op)op, &line, &b, values[j], reversed));
                for (int i = 0; i < N; i++) {
                    double expected = reversed ? binary((cuflash_binary_op)op, values[j], values[i])
                                               : binary((cuflash_binary_op)op, values[i], values[j]);
                    CHECK_F(out[i] == expected || same(out[i], expected), "%g with the scalar %g%s: expected %g, got %g",
                            values[i], values[j], reversed ? " first" : "", expected, out[i]);
                }
            }
    }
    cuflash_tensor line = row(out, CUFLASH_FLOAT64, N);
    for (int op = CUFLASH_NEG; op <= CUFLASH_SQRT; op++) {
        check_in("unary op %d", op);
        CHECK_OK(cuflash_tensor_unary((cuflash_unary_op)op, &line, &b));
        for (int i = 0; i < N; i++) {
            double expected = unary((cuflash_unary_op)op, values[i]);
            CHECK_F(same(out[i], expected) || fabs(out[i] - expected) <= 1e-15 * fabs(expected), "%g: expected %g, got %g",
                    values[i], expected, out[i]);
        }
    }
    /* Rounded once: 1 + 2^-11 + 2^-40 is above the midpoint of two halves, which float32 would not see. */
    check_in("one rounding");
    uint16_t half[1];
    double one = 1;
    cuflash_tensor h = row(half, CUFLASH_FLOAT16, 1), x = row(&one, CUFLASH_FLOAT64, 1);
    CHECK_OK(cuflash_tensor_binary_scalar(CUFLASH_ADD, &h, &x, 0x1p-11 + 0x1p-40, false));
    CHECK(half[0] == 0x3c01);
    CHECK_OK(cuflash_tensor_binary_scalar(CUFLASH_ADD, &h, &x, 0x1p-11, false));
    CHECK(half[0] == 0x3c00);
    check_in("%s", "");
}

static void test_broadcast(void) {
    check_in("broadcast");
    double a[6] = {0, 1, 2, 3, 4, 5}, b[2] = {10, 20}, c[1] = {100}, out[24] = {0};
    cuflash_tensor result = borrow(out, CUFLASH_FLOAT64, 4, SHAPE(2, 2, 3, 2), NULL);
    cuflash_tensor ta = borrow(a, CUFLASH_FLOAT64, 3, SHAPE(2, 3, 1), NULL),
                   tb = borrow(b, CUFLASH_FLOAT64, 4, SHAPE(2, 1, 1, 1), NULL);
    CHECK_OK(cuflash_tensor_binary(CUFLASH_ADD, &result, &ta, &tb));
    for (int i = 0; i < 24; i++) CHECK(out[i] == b[i / 12] + a[i / 2 % 6]);
    cuflash_tensor tc = borrow(c, CUFLASH_FLOAT64, 0, NULL, NULL);
    CHECK_OK(cuflash_tensor_binary(CUFLASH_SUB, &result, &tc, &ta));
    for (int i = 0; i < 24; i++) CHECK(out[i] == 100 - a[i / 2 % 6]);
    CHECK_OK(cuflash_tensor_copy(&result, &tc));
    for (int i = 0; i < 24; i++) CHECK(out[i] == 100);

    out[0] = 7;
    cuflash_tensor small = borrow(out, CUFLASH_FLOAT64, 2, SHAPE(3, 1), NULL);
    CHECK_FAILS(CUFLASH_DIMENSION_MISMATCH, "tensor_binary|'a'|[3 x 1]|[2 x 3 x 1]",
                cuflash_tensor_binary(CUFLASH_ADD, &small, &ta, &tc));
    CHECK_FAILS(CUFLASH_DIMENSION_MISMATCH, "tensor_binary|'b'|[3 x 1]", cuflash_tensor_binary(CUFLASH_ADD, &small, &tc, &ta));
    cuflash_tensor wide = borrow(a, CUFLASH_FLOAT64, 2, SHAPE(3, 2), NULL);
    CHECK_FAILS(CUFLASH_DIMENSION_MISMATCH, "tensor_copy|'src'|[3 x 1]|[3 x 2]", cuflash_tensor_copy(&small, &wide));
    CHECK(out[0] == 7);
    check_in("%s", "");
}

/* The result is as if all inputs were read before anything is written. */
static void test_overlap(void) {
    enum { N = 2000 };
    static double memory[N + 8], was[N + 8];
    for (int shift = -3; shift <= 3; shift++) {
        check_in("overlap shifted by %d", shift);
        for (int i = 0; i < N + 8; i++) memory[i] = was[i] = i * 0.5 + 3;
        cuflash_tensor dst = row(memory + 3, CUFLASH_FLOAT64, N), src = row(memory + 3 + shift, CUFLASH_FLOAT64, N);
        CHECK_OK(cuflash_tensor_copy(&dst, &src));
        for (int i = 0; i < N; i++) CHECK(memory[3 + i] == was[3 + shift + i]);
        memcpy(memory, was, sizeof was);
        CHECK_OK(cuflash_tensor_binary(CUFLASH_MUL, &dst, &src, &dst));
        for (int i = 0; i < N; i++) CHECK(memory[3 + i] == was[3 + shift + i] * was[3 + i]);
        CHECK(memory[2] == was[2] && memory[N + 3] == was[N + 3]);
    }
    check_in("a square and its transpose");
    enum { S = 40 };
    for (int i = 0; i < S * S; i++) memory[i] = i;
    cuflash_tensor square = borrow(memory, CUFLASH_FLOAT64, 2, SHAPE(S, S), NULL),
                   turned = borrow(memory, CUFLASH_FLOAT64, 2, SHAPE(S, S), SHAPE(1, S));
    CHECK_OK(cuflash_tensor_copy(&square, &turned));
    for (int i = 0; i < S * S; i++) CHECK(memory[i] == i % S * S + i / S);
    check_in("another dtype in the same memory");
    for (int i = 0; i < 100; i++) memory[i] = i;
    cuflash_tensor doubles = row(memory, CUFLASH_FLOAT64, 100), floats = row(memory, CUFLASH_FLOAT32, 100);
    CHECK_OK(cuflash_tensor_copy(&floats, &doubles));
    for (int i = 0; i < 100; i++) {
        float got;
        memcpy(&got, (const char *)memory + 4 * i, 4);
        CHECK(got == (float)i);
    }
    CHECK_OK(cuflash_tensor_copy(&doubles, &floats));
    for (int i = 0; i < 100; i++) CHECK(memory[i] == i);
    check_in("a broadcast part of the output");
    for (int i = 0; i < 12; i++) memory[i] = i + 1;
    cuflash_tensor grid = borrow(memory, CUFLASH_FLOAT64, 2, SHAPE(3, 4), NULL),
                   first = borrow(memory, CUFLASH_FLOAT64, 2, SHAPE(3, 1), SHAPE(4, 1));
    CHECK_OK(cuflash_tensor_binary(CUFLASH_DIV, &grid, &grid, &first));
    for (int i = 0; i < 12; i++) CHECK(memory[i] == (double)(i + 1) / (i / 4 * 4 + 1));
    check_in("%s", "");
}

/* Every argument wrong, one at a time; the output stays as it was. */
static void test_refusals(void) {
    check_in("refusals");
    double memory[6] = {1, 2, 3, 4, 5, 6}, value = -9;
    cuflash_tensor t = row(memory, CUFLASH_FLOAT64, 6), freed = {0};
    cuflash_tensor repeated = borrow(memory, CUFLASH_FLOAT64, 2, SHAPE(2, 3), SHAPE(0, 1));
    cuflash_close_report report;
    const int wrong_ops[] = {-1, 99};
    for (int i = 0; i < 2; i++) {
        int op = wrong_ops[i];
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_binary|'op'", cuflash_tensor_binary((cuflash_binary_op)op, &t, &t, &t));
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_binary_scalar|'op'",
                    cuflash_tensor_binary_scalar((cuflash_binary_op)op, &t, &t, 1, false));
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_unary|'op'", cuflash_tensor_unary((cuflash_unary_op)op, &t, &t));
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_reduce|'op'", cuflash_tensor_reduce((cuflash_reduce_op)op, &t, &t, 0));
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_reduce_all|'op'",
                    cuflash_tensor_reduce_all((cuflash_reduce_op)op, &t, &value));
    }
    const cuflash_tensor *missing[] = {NULL, &freed};
    for (int i = 0; i < 2; i++) {
        const cuflash_tensor *m = missing[i];
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_copy|'dst'", cuflash_tensor_copy(m, &t));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_copy|'src'", cuflash_tensor_copy(&t, m));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_fill|'dst'", cuflash_tensor_fill(m, 1));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_arange|'dst'", cuflash_tensor_arange(m, 0, 1));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_get|'tensor'", cuflash_tensor_get(m, SHAPE(0), &value));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_set|'tensor'", cuflash_tensor_set(m, SHAPE(0), 1));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_binary|'out'", cuflash_tensor_binary(CUFLASH_ADD, m, &t, &t));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_binary|'a'", cuflash_tensor_binary(CUFLASH_ADD, &t, m, &t));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_binary|'b'", cuflash_tensor_binary(CUFLASH_ADD, &t, &t, m));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_binary_scalar|'out'",
                    cuflash_tensor_binary_scalar(CUFLASH_ADD, m, &t, 1, false));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_binary_scalar|'a'",
                    cuflash_tensor_binary_scalar(CUFLASH_ADD, &t, m, 1, false));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_unary|'out'", cuflash_tensor_unary(CUFLASH_NEG, m, &t));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_unary|'a'", cuflash_tensor_unary(CUFLASH_NEG, &t, m));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_reduce|'out'", cuflash_tensor_reduce(CUFLASH_SUM, m, &t, 0));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_reduce|'a'", cuflash_tensor_reduce(CUFLASH_SUM, &t, m, 0));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_reduce_all|'a'", cuflash_tensor_reduce_all(CUFLASH_SUM, m, &value));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_compare|'actual'", cuflash_tensor_compare(m, &t, 0, 0, false, &report));
        CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_compare|'expected'", cuflash_tensor_compare(&t, m, 0, 0, false, &report));
    }
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_copy|'dst'|stride 0", cuflash_tensor_copy(&repeated, &t));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_fill|'dst'|stride 0", cuflash_tensor_fill(&repeated, 0));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_arange|'dst'|stride 0", cuflash_tensor_arange(&repeated, 0, 1));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_binary|'out'|stride 0",
                cuflash_tensor_binary(CUFLASH_ADD, &repeated, &t, &t));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_unary|'out'|stride 0", cuflash_tensor_unary(CUFLASH_NEG, &repeated, &t));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_reduce|'out'|stride 0", cuflash_tensor_reduce(CUFLASH_SUM, &repeated, &t, 0));

    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_get|'index'", cuflash_tensor_get(&t, NULL, &value));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_set|'index'", cuflash_tensor_set(&t, NULL, 1));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_get|'value'", cuflash_tensor_get(&t, SHAPE(0), NULL));
    const int64_t outside[] = {-1, 6, INT64_MAX, INT64_MIN};
    for (int i = 0; i < COUNT_OF(outside); i++) {
        CHECK_FAILS(CUFLASH_INVALID_DIMENSION, "tensor_get|'index'|0 to 5", cuflash_tensor_get(&t, &outside[i], &value));
        CHECK_FAILS(CUFLASH_INVALID_DIMENSION, "tensor_set|'index'|0 to 5", cuflash_tensor_set(&t, &outside[i], 1));
    }
    double sums[3];
    cuflash_tensor grid = borrow(memory, CUFLASH_FLOAT64, 2, SHAPE(2, 3), NULL), out = row(sums, CUFLASH_FLOAT64, 3);
    CHECK_FAILS(CUFLASH_INVALID_DIMENSION, "tensor_reduce|'dim'|-1", cuflash_tensor_reduce(CUFLASH_SUM, &out, &grid, -1));
    CHECK_FAILS(CUFLASH_INVALID_DIMENSION, "tensor_reduce|'dim'|2", cuflash_tensor_reduce(CUFLASH_SUM, &out, &grid, 2));
    CHECK_FAILS(CUFLASH_DIMENSION_MISMATCH, "tensor_reduce|'out'|[2]|[3]", cuflash_tensor_reduce(CUFLASH_SUM, &out, &grid, 1));
    cuflash_tensor within = row(memory + 1, CUFLASH_FLOAT64, 3);
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_reduce|'out'", cuflash_tensor_reduce(CUFLASH_SUM, &within, &grid, 0));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_reduce_all|'result'", cuflash_tensor_reduce_all(CUFLASH_SUM, &grid, NULL));

    CHECK_FAILS(CUFLASH_NULL_POINTER, "tensor_compare|'report'", cuflash_tensor_compare(&t, &t, 0, 0, false, NULL));
    CHECK_FAILS(CUFLASH_DIMENSION_MISMATCH, "tensor_compare|'actual'|[6]|[2 x 3]",
                cuflash_tensor_compare(&t, &grid, 0, 0, false, &report));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_compare|'rtol'", cuflash_tensor_compare(&t, &t, -1, 0, false, &report));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_compare|'rtol'", cuflash_tensor_compare(&t, &t, NAN, 0, false, &report));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_compare|'atol'", cuflash_tensor_compare(&t, &t, 0, -1, false, &report));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "tensor_compare|'atol'", cuflash_tensor_compare(&t, &t, 0, NAN, false, &report));
    for (int i = 0; i < 6; i++) CHECK(memory[i] == i + 1);
    CHECK(value == -9);
    check_in("%s", "");
}

/* ---- Reductions and comparison ------------------------------------------------------------------ */

static double reduce(cuflash_reduce_op op, double so_far, double x) {
    switch (op) {
    case CUFLASH_MAX: return so_far != so_far || x != x ? NAN : x > so_far ? x : so_far;
    case CUFLASH_MIN: return so_far != so_far || x != x ? NAN : x < so_far ? x : so_far;
    default: return so_far + x;
    }
}

static void test_reduce(void) {
    enum { A = 3, B = 700, C = 11 }; /* the middle dimension is longer than a chunk */
    static double values[A * B * C], out[B * C];
    uint64_t state = 7;
    for (int i = 0; i < A * B * C; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        values[i] = (double)(int)(state >> 52) - 2048; /* whole numbers: sums are exact in any order */
    }
    const int64_t shape[] = {A, B, C};
    cuflash_tensor t = borrow(values, CUFLASH_FLOAT64, 3, shape, NULL);
    for (int op = CUFLASH_SUM; op <= CUFLASH_MIN; op++)
        for (int dim = 0; dim < 3; dim++)
            for (int nan = 0; nan < 2; nan++) {
                check_in("reduce op %d over dimension %d%s", op, dim, nan ? " with a NaN" : "");
                double kept = values[777];
                if (nan) values[777] = NAN;
                int64_t rest[2] = {shape[dim == 0], shape[dim == 2 ? 1 : 2]};
                cuflash_tensor result = borrow(out, CUFLASH_FLOAT64, 2, rest, NULL);
                CHECK_OK(cuflash_tensor_reduce((cuflash_reduce_op)op, &result, &t, dim));
                for (int64_t i = 0; i < rest[0]; i++)
                    for (int64_t j = 0; j < rest[1]; j++) {
                        double expected = op == CUFLASH_MAX ? -INFINITY : op == CUFLASH_MIN ? INFINITY : 0;
                        for (int64_t k = 0; k < shape[dim]; k++) {
                            int64_t at[3];
                            at[dim] = k, at[dim == 0] = i, at[dim == 2 ? 1 : 2] = j;
                            expected = reduce((cuflash_reduce_op)op, expected, values[(at[0] * B + at[1]) * C + at[2]]);
                        }
                        if (op == CUFLASH_MEAN) expected /= (double)shape[dim];
                        CHECK_F(same(out[i * rest[1] + j], expected), "[%d, %d]: expected %g, got %g", (int)i, (int)j, expected,
                                out[i * rest[1] + j]);
                    }
                double all = op == CUFLASH_MAX ? -INFINITY : op == CUFLASH_MIN ? INFINITY : 0, got = -1;
                for (int i = 0; i < A * B * C; i++) all = reduce((cuflash_reduce_op)op, all, values[i]);
                if (op == CUFLASH_MEAN) all /= A * B * C;
                CHECK_OK(cuflash_tensor_reduce_all((cuflash_reduce_op)op, &t, &got));
                CHECK_F(same(got, all), "all: expected %g, got %g", all, got);
                values[777] = kept;
            }
    check_in("the mean of 16-bit numbers is kept in float64");
    uint16_t ones[4096], mean;
    for (int i = 0; i < 4096; i++) ones[i] = 0x3c01; /* 1 + 2^-10 */
    cuflash_tensor half = row(ones, CUFLASH_FLOAT16, 4096), single = borrow(&mean, CUFLASH_FLOAT16, 0, NULL, NULL);
    CHECK_OK(cuflash_tensor_reduce(CUFLASH_MEAN, &single, &half, 0));
    CHECK(mean == 0x3c01);
    check_in("%s", "");
}

/* The sum's bits do not depend on the number of threads. */
static void test_reduce_threads(void) {
    check_in("threads");
    int before = cuflash_get_num_threads();
    cuflash_tensor t;
    cuflash_generator generator = {.seed = 5};
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(301, 1237)));
    REQUIRE_OK(cuflash_random_normal(&t, &generator, 0, 1));
    double first = 0, sum = 0;
    CHECK_OK(cuflash_set_num_threads(1));
    CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_SUM, &t, &first));
    CHECK(first != 0);
    for (int threads = 2; threads <= 7; threads++) {
        CHECK_OK(cuflash_set_num_threads(threads));
        CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_SUM, &t, &sum));
        CHECK(sum == first);
    }
    CHECK_OK(cuflash_set_num_threads(before));
    cuflash_tensor_release(&t);
    check_in("%s", "");
}

static void test_compare(void) {
    static const struct {
        const char *name;
        double actual, expected, rtol, atol;
        bool equal_nan;
        int bad;
        double max_abs, max_rel;
    } cases[] = {
        {"equal", 3, 3, 0, 0, false, 0, 0, 0},
        {"zeros of either sign", 0.0, -0.0, 0, 0, false, 0, 0, 0},
        {"within atol", 3.25, 3, 0, 0.25, false, 0, 0.25, 0.25 / 3},
        {"beyond atol", 3.25, 3, 0, 0.2, false, 1, 0.25, 0.25 / 3},
        {"within rtol", 5, 4, 0.25, 0, false, 0, 1, 0.25},
        {"beyond rtol", 5, 4, 0.2, 0, false, 1, 1, 0.25},
        {"rtol is of expected", 4, 5, 0.21, 0, false, 0, 1, 0.2},
        {"expected zero", 1, 0, 1, 0, false, 1, 1, 0},
        {"the same infinity", INFINITY, INFINITY, 0, 0, false, 0, 0, 0},
        {"other infinities", INFINITY, -INFINITY, 1, 1, false, 1, INFINITY, NAN},
        {"infinity for a number", INFINITY, 1, 1, 1, false, 1, INFINITY, INFINITY},
        {"a number for infinity", 1, INFINITY, 1, 1, false, 1, INFINITY, NAN},
        {"NaN is not NaN", NAN, NAN, 1, 1, false, 1, NAN, NAN},
        {"NaN is NaN where asked for", NAN, NAN, 0, 0, true, 0, 0, 0},
        {"NaN for a number", NAN, 1, 1, 1, true, 1, NAN, NAN},
        {"a number for NaN", 1, NAN, 1, 1, true, 1, NAN, NAN},
    };
    for (int i = 0; i < COUNT_OF(cases); i++) {
        check_in("compare: %s", cases[i].name);
        double actual[3] = {1, 2, cases[i].actual}, expected[3] = {1, 2, cases[i].expected};
        cuflash_tensor a = row(actual, CUFLASH_FLOAT64, 3), b = row(expected, CUFLASH_FLOAT64, 3);
        cuflash_close_report r;
        memset(&r, 0x5a, sizeof r);
        CHECK_OK(cuflash_tensor_compare(&a, &b, cases[i].rtol, cases[i].atol, cases[i].equal_nan, &r));
        CHECK(r.numel == 3 && r.n_bad == cases[i].bad);
        CHECK_F(same(r.max_abs, cases[i].max_abs), "max_abs: expected %g, got %g", cases[i].max_abs, r.max_abs);
        CHECK_F(same(r.max_rel, cases[i].max_rel), "max_rel: expected %g, got %g", cases[i].max_rel, r.max_rel);
        if (cases[i].bad > 0) {
            CHECK(r.worst_index[0] == 2);
            CHECK(same(r.worst_actual, cases[i].actual) && same(r.worst_expected, cases[i].expected));
        }
    }
    check_in("compare: across dtypes and strides");
    cuflash_tensor a, b, turned;
    REQUIRE_OK(cuflash_tensor_empty(&a, CUFLASH_FLOAT16, CUFLASH_CPU, 2, SHAPE(50, 40)));
    REQUIRE_OK(cuflash_tensor_empty(&b, CUFLASH_FLOAT32, CUFLASH_CPU, 2, SHAPE(40, 50)));
    REQUIRE_OK(cuflash_tensor_transpose(&turned, &b, 0, 1));
    REQUIRE_OK(cuflash_tensor_arange(&a, 0, 1));
    REQUIRE_OK(cuflash_tensor_arange(&turned, 0, 1));
    cuflash_close_report r;
    CHECK_OK(cuflash_tensor_compare(&a, &turned, 0, 0, false, &r));
    CHECK(r.n_bad == 0 && r.numel == 2000 && r.rel_norm == 0);
    REQUIRE_OK(cuflash_tensor_set(&a, SHAPE(17, 3), 1000));
    REQUIRE_OK(cuflash_tensor_set(&a, SHAPE(30, 39), 1500));
    CHECK_OK(cuflash_tensor_compare(&a, &turned, 0, 0, false, &r));
    CHECK(r.n_bad == 2 && r.worst_index[0] == 17 && r.worst_index[1] == 3 && r.worst_actual == 1000 && r.worst_expected == 683);
    double squares = 0;
    for (int i = 0; i < 2000; i++) squares += (double)i * i;
    CHECK_NEAR(r.rel_norm, sqrt(317.0 * 317 + 261.0 * 261) / sqrt(squares), 1e-14);
    cuflash_tensor_release(&a);
    cuflash_tensor_release(&b);
    cuflash_tensor_release(&turned);
    check_in("%s", "");
}

int main(void) {
    int64_t live = check_live_bytes();
    test_all_patterns();
    test_rounding();
    test_to_float32();
    test_all_pairs();
    test_fill_arange_get_set();
    test_large();
    test_arithmetic();
    test_broadcast();
    test_overlap();
    test_refusals();
    test_reduce();
    test_reduce_threads();
    test_compare();
    CHECK(check_live_bytes() == live);
    return check_result();
}
