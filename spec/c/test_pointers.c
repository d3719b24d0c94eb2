/* The four functions on raw pointers: the same results as the calls on tensors, and every argument wrong in turn. What
 * they make of device pointers is tested with a stand-in for the CUDA driver, whose path is the argument. */
#include <dlfcn.h>
#include <sys/mman.h>

#include "attention_case.h"

/* One call's arguments, so that any of them can be changed. */
typedef struct {
    void *p[TENSORS];
    int size[4]; /* batch_size, num_heads, seq_len, head_dim */
    float scale;
    bool causal;
} arguments;

static const char *const POINTER_NAMES[TENSORS] = {"'Q'", "'K'", "'V'", "'O'", "'L'", "'dO'", "'dQ'", "'dK'", "'dV'"};

static const struct {
    const char *name;
    bool half, backward;
} FUNCTIONS[] = {{"cuflash_attention_forward_f32", false, false},
                 {"cuflash_attention_backward_f32", false, true},
                 {"cuflash_attention_forward_f16", true, false},
                 {"cuflash_attention_backward_f16", true, true}};

static int call(int function, const arguments *a) {
    void *const *p = a->p;
    const int *n = a->size;
    switch (function) {
    case 0:
        return cuflash_attention_forward_f32(p[Q], p[K], p[V], p[O], p[LSE], n[0], n[1], n[2], n[3], a->scale, a->causal, NULL);
    case 1:
        return cuflash_attention_backward_f32(p[Q], p[K], p[V], p[O], p[LSE], p[D_O], p[DQ], p[DK], p[DV], n[0], n[1], n[2],
                                              n[3], a->scale, a->causal, NULL);
    case 2:
        return cuflash_attention_forward_f16(p[Q], p[K], p[V], p[O], p[LSE], n[0], n[1], n[2], n[3], a->scale, a->causal, NULL);
    default:
        return cuflash_attention_backward_f16(p[Q], p[K], p[V], p[O], p[LSE], p[D_O], p[DQ], p[DK], p[DV], n[0], n[1], n[2],
                                              n[3], a->scale, a->causal, NULL);
    }
}

/* A fixture as these functions want it: row-major, with an L of the same dtype. */
static arguments make(fixture *f, const shape_case *shape, bool half, uint64_t seed) {
    fixture_make(f, shape, half ? CUFLASH_FLOAT16 : CUFLASH_FLOAT32, DENSE, seed);
    if (half) {
        free(f->b[LSE].memory);
        free(f->b[LSE].before);
        make_tensor(f, LSE, CUFLASH_FLOAT16, DENSE);
        fixture_remember(f);
    }
    arguments a = {.scale = shape->scale, .causal = shape->causal};
    for (int t = 0; t < TENSORS; t++) a.p[t] = f->t[t].data;
    const int64_t sizes[] = {shape->batch, shape->heads, shape->seq_q, shape->head_dim};
    for (int i = 0; i < 4; i++) a.size[i] = (int)sizes[i];
    return a;
}

static shape_case square(int64_t batch, int64_t heads, int64_t seq, int64_t dim, bool causal, float scale) {
    return (shape_case){batch, heads, heads, seq, seq, dim, dim, causal, scale};
}

/* Bit for bit what the calls on tensors give; and those are right (test_attention.c). */
static void test_same_as_tensors(void) {
    static const int head_dims[] = {1, 2, 7, 31, 32, 40, 64, 100, 128, 255, 256, 512};
    for (int i = 0; i < COUNT_OF(head_dims); i++)
        for (int half = 0; half < 2; half++) {
            check_in("head_dim %d, %s", head_dims[i], half ? "float16" : "float32");
            shape_case shape = square(1 + i % 2, 1 + i % 3, 20 + 11 * (i % 5), head_dims[i], i % 2, 0.1f);
            fixture f;
            arguments a = make(&f, &shape, half, (uint64_t)i);
            CHECK_OK(cuflash_attention_forward(&f.a));
            CHECK_OK(cuflash_attention_backward(&f.a));
            fixture_remember(&f);
            static const int outputs[] = {O, LSE, DQ, DK, DV};
            for (int t = 0; t < COUNT_OF(outputs); t++) fixture_poison(&f, outputs[t]);
            CHECK(call(half ? 2 : 0, &a) == CUFLASH_SUCCESS);
            CHECK(call(half ? 3 : 1, &a) == CUFLASH_SUCCESS);
            for (int t = 0; t < TENSORS; t++) CHECK_F(unchanged(&f, t), "%s differs from the tensor call's", POINTER_NAMES[t]);
            if (i % 3 == 0) {
                answer right, naive;
                answer_right(&right, &f);
                answer_naive(&naive, &f);
                check_close(&f, O, &right, &naive);
                for (int t = DQ; t <= DV; t++) check_close(&f, t, &right, &naive);
                answer_free(&right);
                answer_free(&naive);
            }
            fixture_free(&f);
        }
    check_in("%s", "");
}

/* A float16 L is too coarse to use, so backward must not: its gradients are as good as with a float32 one. Also where L
 * overflows to infinity, and where it is not L at all. */
static void test_coarse_l(void) {
    static const struct {
        const char *name;
        float scale;
        double l; /* what L is filled with; 0: what forward left there */
    } cases[] = {{"rounded", 0.125f, 0},
                 {"overflowed", 3000, 0},
                 {"zero", 0.125f, -0.0},
                 {"NaN", 0.125f, NAN},
                 {"infinite", 0.125f, INFINITY}};
    for (int i = 0; i < COUNT_OF(cases); i++) {
        check_in("L %s", cases[i].name);
        shape_case shape = square(1, 2, 70, 64, true, cases[i].scale);
        fixture f;
        answer right;
        arguments a = make(&f, &shape, true, 5);
        answer_right(&right, &f);
        CHECK(call(2, &a) == CUFLASH_SUCCESS);
        if (cases[i].l != 0 || signbit(cases[i].l)) REQUIRE_OK(cuflash_tensor_fill(&f.t[LSE], cases[i].l));
        double largest;
        REQUIRE_OK(cuflash_tensor_reduce_all(CUFLASH_MAX, &f.t[LSE], &largest));
        if (i == 1) CHECK(largest == INFINITY);
        CHECK(call(3, &a) == CUFLASH_SUCCESS);
        double error[3];
        for (int t = DQ; t <= DV; t++) error[t - DQ] = distance(&f.t[t], &right.t[t]).rel_norm;
        cuflash_tensor fine; /* the same with a float32 lse */
        REQUIRE_OK(cuflash_tensor_empty(&fine, CUFLASH_FLOAT32, CUFLASH_CPU, 3, f.t[LSE].shape));
        f.a.lse = &fine;
        REQUIRE_OK(cuflash_attention_forward(&f.a));
        REQUIRE_OK(cuflash_attention_backward(&f.a));
        for (int t = DQ; t <= DV; t++) {
            double with_fine = distance(&f.t[t], &right.t[t]).rel_norm;
            CHECK_F(error[t - DQ] <= 1.05 * with_fine + 1e-6, "%s: relative error %.3g, with a float32 L %.3g",
                    POINTER_NAMES[t], error[t - DQ], with_fine);
        }
        cuflash_tensor_release(&fine);
        answer_free(&right);
        fixture_free(&f);
    }
    check_in("%s", "");
}

static bool uses(int function, int tensor) {
    return FUNCTIONS[function].backward || tensor <= LSE;
}

/* This call is refused, by the function's name and these words, and leaves no trace. */
static void check_refused(const fixture *f, int function, const arguments *a, cuflash_status status, const char *words) {
    int64_t live = check_live_bytes();
    CHECK_FAILS(status, words, call(function, a));
    CHECK(check_live_bytes() == live);
    for (int t = 0; t < TENSORS; t++) CHECK_F(unchanged(f, t), "%s was written", POINTER_NAMES[t]);
}

static void test_refusals(void) {
    static const char *const sizes[] = {"'batch_size'", "'num_heads'", "'seq_len'", "'head_dim'"};
    const shape_case shape = square(2, 2, 9, 8, true, 0.3f);
    for (int function = 0; function < COUNT_OF(FUNCTIONS); function++) {
        fixture f;
        arguments good = make(&f, &shape, FUNCTIONS[function].half, 3);
        char words[128];
        for (int t = 0; t < TENSORS; t++) {
            if (!uses(function, t)) continue;
            check_in("%s with %s NULL", FUNCTIONS[function].name, POINTER_NAMES[t]);
            arguments a = good;
            a.p[t] = NULL;
            snprintf(words, sizeof words, "%s|%s|NULL", FUNCTIONS[function].name, POINTER_NAMES[t]);
            check_refused(&f, function, &a, CUFLASH_NULL_POINTER, words);
            check_in("%s with %s misaligned", FUNCTIONS[function].name, POINTER_NAMES[t]);
            a.p[t] = (char *)good.p[t] + 1;
            snprintf(words, sizeof words, "%s|%s", FUNCTIONS[function].name, POINTER_NAMES[t]);
            check_refused(&f, function, &a, CUFLASH_INVALID_ARGUMENT, words);
        }
        for (int i = 0; i < 4; i++) {
            static const int wrong[] = {0, -1, INT32_MIN};
            for (int w = 0; w < COUNT_OF(wrong); w++) {
                check_in("%s with %s %d", FUNCTIONS[function].name, sizes[i], wrong[w]);
                arguments a = good;
                a.size[i] = wrong[w];
                snprintf(words, sizeof words, "%s|%s|%d", FUNCTIONS[function].name, sizes[i], wrong[w]);
                check_refused(&f, function, &a, CUFLASH_INVALID_DIMENSION, words);
            }
        }
        static const int wide[] = {513, 1024, INT32_MAX};
        for (int i = 0; i < COUNT_OF(wide); i++) {
            check_in("%s with head_dim %d", FUNCTIONS[function].name, wide[i]);
            arguments a = good;
            a.size[3] = wide[i];
            snprintf(words, sizeof words, "%s|'head_dim'|512|%d", FUNCTIONS[function].name, wide[i]);
            check_refused(&f, function, &a, CUFLASH_UNSUPPORTED_HEAD_DIM, words);
        }
        check_in("%s with more than 64 bits address", FUNCTIONS[function].name);
        arguments a = good;
        a.size[0] = a.size[1] = a.size[2] = INT32_MAX;
        check_refused(&f, function, &a, CUFLASH_INVALID_DIMENSION, "64 bits");
        static const float scales[] = {NAN, INFINITY, -INFINITY};
        for (int i = 0; i < COUNT_OF(scales); i++) {
            check_in("%s with scale %g", FUNCTIONS[function].name, (double)scales[i]);
            a = good;
            a.scale = scales[i];
            check_refused(&f, function, &a, CUFLASH_INVALID_ARGUMENT, "'scale'|finite");
        }
        check_in("%s with an output over an input", FUNCTIONS[function].name);
        a = good;
        a.p[FUNCTIONS[function].backward ? DK : O] = good.p[Q];
        check_refused(&f, function, &a, CUFLASH_INVALID_ARGUMENT, "overlaps");
        check_in("%s after all that", FUNCTIONS[function].name);
        CHECK(call(FUNCTIONS[function].half ? 2 : 0, &good) == CUFLASH_SUCCESS);
        CHECK(call(function, &good) == CUFLASH_SUCCESS);
        fixture_free(&f);
    }
    check_in("%s", "");
}

/* Device pointers. The stand-in's device memory cannot be read or written at all, so any access would be noticed. */
static void test_device_pointers(const char *driver_path) {
    const shape_case shape = square(1, 2, 9, 8, false, 0.3f);
    fixture f[COUNT_OF(FUNCTIONS)];
    arguments good[COUNT_OF(FUNCTIONS)];
    for (int i = 0; i < COUNT_OF(FUNCTIONS); i++) {
        good[i] = make(&f[i], &shape, FUNCTIONS[i].half, 6);
        CHECK(call(FUNCTIONS[i].half ? 2 : 0, &good[i]) == CUFLASH_SUCCESS);
        CHECK(call(i, &good[i]) == CUFLASH_SUCCESS);
        fixture_remember(&f[i]);
    }
    const size_t each = 1 << 16;
    char *device = mmap(NULL, each * TENSORS, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void *driver = dlopen(driver_path, RTLD_NOW);
    if (!CHECK_F(driver && device != MAP_FAILED, "cannot load the stand-in for the driver: %s", driver ? "" : dlerror()))
        return;
    void (*fake_device_memory)(const void *, size_t, int);
    int (*fake_calls)(void);
    *(void **)&fake_device_memory = dlsym(driver, "fake_device_memory");
    *(void **)&fake_calls = dlsym(driver, "fake_calls");
    fake_device_memory(device, each * TENSORS, 3);
    char words[128];
    for (int i = 0; i < COUNT_OF(FUNCTIONS); i++) {
        check_in("%s with host pointers and the driver loaded", FUNCTIONS[i].name);
        int before = fake_calls();
        for (int t = 0; t < TENSORS; t++)
            if (FUNCTIONS[i].backward ? t >= DQ : t == O || t == LSE) fixture_poison(&f[i], t);
        CHECK(call(i, &good[i]) == CUFLASH_SUCCESS);
        CHECK(fake_calls() > before); /* it was this library that the pointers were asked of */
        for (int t = 0; t < TENSORS; t++) CHECK(unchanged(&f[i], t));

        check_in("%s with device pointers", FUNCTIONS[i].name);
        arguments a = good[i];
        for (int t = 0; t < TENSORS; t++) a.p[t] = device + (size_t)t * each;
        check_refused(&f[i], i, &a, CUFLASH_CUDA_ERROR, "cuda:3");
        for (int t = 0; t < TENSORS; t++) {
            if (!uses(i, t)) continue;
            check_in("%s with only %s on the device", FUNCTIONS[i].name, POINTER_NAMES[t]);
            a = good[i];
            a.p[t] = device;
            snprintf(words, sizeof words, "%s|%s|mixed", FUNCTIONS[i].name, t == Q ? "'K'" : POINTER_NAMES[t]);
            check_refused(&f[i], i, &a, CUFLASH_INVALID_ARGUMENT, words);
            check_in("%s with only %s on the host", FUNCTIONS[i].name, POINTER_NAMES[t]);
            for (int other = 0; other < TENSORS; other++)
                a.p[other] = other == t ? good[i].p[t] : device + (size_t)other * each;
            check_refused(&f[i], i, &a, CUFLASH_INVALID_ARGUMENT, words);
            check_in("%s with %s NULL among device pointers", FUNCTIONS[i].name, POINTER_NAMES[t]);
            a.p[t] = NULL;
            snprintf(words, sizeof words, "%s|%s|NULL", FUNCTIONS[i].name, POINTER_NAMES[t]);
            check_refused(&f[i], i, &a, CUFLASH_NULL_POINTER, words);
        }
        fixture_free(&f[i]);
    }
    munmap(device, each * TENSORS);
    dlclose(driver);
    check_in("%s", "");
}

int main(int argc, char **argv) {
    if (argc != 2) return fprintf(stderr, "usage: %s path-of-the-stand-in-driver\n", argv[0]), 1;
    int64_t live = check_live_bytes();
    test_same_as_tensors();
    test_coarse_l();
    test_refusals();
    test_device_pointers(argv[1]);
    CHECK(check_live_bytes() == live);
    return check_result();
}
