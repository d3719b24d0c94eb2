/* What the attention calls on tensors refuse, in which words, and that nothing is written then. */
#include "attention_case.h"

enum {
    FORWARD = 1,
    BACKWARD = 2,
    REFERENCE_FORWARD = 4,
    REFERENCE_BACKWARD = 8,
    KERNELS = 3,
    FORWARDS = 5,
    BACKWARDS = 10,
    EVERY = 15
};

static const struct {
    int bit;
    const char *name;
    cuflash_status (*call)(const cuflash_attention *);
} CALLS[] = {{FORWARD, "attention_forward", cuflash_attention_forward},
             {BACKWARD, "attention_backward", cuflash_attention_backward},
             {REFERENCE_FORWARD, "reference_forward", cuflash_reference_forward},
             {REFERENCE_BACKWARD, "reference_backward", cuflash_reference_backward}};

typedef enum {
    MISSING,
    FREED,
    NDIM,
    SHAPE,
    STRIDE,
    DTYPE,
    DEVICE, /* of one tensor */
    STRUCT_SIZE,
    FLAGS,
    SCALE /* of the struct */
} what;

/* One thing made wrong, in which calls it matters, and what they say. */
typedef struct {
    what wrong;
    int tensor, dim;
    double value;
    int calls;
    cuflash_status status;
    const char *words;
} mistake;

static const shape_case GOOD = {2, 4, 2, 5, 7, 8, 6, true, 0};

static fixture good; /* of the shape GOOD, in float32, with the results of a good call remembered */

static void check_mistake(const mistake *m) {
    static const char *const kinds[] = {"missing", "freed",  "ndim",        "shape", "stride",
                                        "dtype",   "device", "struct_size", "flags", "scale"};
    cuflash_tensor t[TENSORS];
    memcpy(t, good.t, sizeof t);
    const cuflash_tensor *p[TENSORS];
    for (int i = 0; i < TENSORS; i++) p[i] = &t[i];
    cuflash_attention a = good.a;
    switch (m->wrong) {
    case MISSING: p[m->tensor] = NULL; break;
    case FREED: cuflash_tensor_release(&t[m->tensor]); break;
    case NDIM: t[m->tensor].ndim = (int32_t)m->value; break;
    case SHAPE: t[m->tensor].shape[m->dim] = (int64_t)m->value; break;
    case STRIDE: t[m->tensor].stride[m->dim] = (int64_t)m->value; break;
    case DTYPE: t[m->tensor].dtype = (cuflash_dtype)m->value; break;
    case DEVICE: t[m->tensor].device = (int32_t)m->value; break;
    case STRUCT_SIZE: a.struct_size = (size_t)((double)a.struct_size + m->value); break;
    case FLAGS: a.flags |= (uint32_t)m->value; break;
    case SCALE: a.flags |= CUFLASH_SCALE, a.scale = (float)m->value; break;
    }
    a.q = p[Q], a.k = p[K], a.v = p[V], a.o = p[O], a.lse = p[LSE], a.d_o = p[D_O], a.dq = p[DQ], a.dk = p[DK], a.dv = p[DV];
    for (int c = 0; c < COUNT_OF(CALLS); c++) {
        if (!(m->calls & CALLS[c].bit)) continue;
        check_in("%s with '%s' %s %d %g", CALLS[c].name, TENSOR_NAMES[m->tensor], kinds[m->wrong], m->dim, m->value);
        char words[160];
        snprintf(words, sizeof words, "%s|%s", CALLS[c].name, m->words);
        int64_t live = check_live_bytes();
        CHECK_FAILS(m->status, words, CALLS[c].call(&a));
        CHECK(check_live_bytes() == live);
        for (int i = 0; i < TENSORS; i++) CHECK_F(unchanged(&good, i), "'%s' was written", TENSOR_NAMES[i]);
        fixture_poison_outputs(&good); /* the next good call works, and is not changed by the failure */
        CHECK_OK(cuflash_attention_forward(&good.a));
        CHECK_OK(cuflash_attention_backward(&good.a));
        for (int i = 0; i < TENSORS; i++) CHECK_F(unchanged(&good, i), "'%s' differs in the next good call", TENSOR_NAMES[i]);
    }
    /* The functions that only look at a problem refuse what the passes refuse. */
    bool of_inputs = m->wrong >= STRUCT_SIZE || (m->tensor <= V && !(m->wrong == SHAPE && strstr(m->words, "'o'")));
    for (int pass = 0; pass < 2; pass++) {
        if (!of_inputs || !(m->calls & 1 << pass)) continue;
        check_in("plan of pass %d with '%s' %s %d %g", pass, TENSOR_NAMES[m->tensor], kinds[m->wrong], m->dim, m->value);
        size_t bytes = 3;
        char text[256] = "x";
        CHECK_FAILS(m->status, m->words, cuflash_attention_workspace(&a, (cuflash_pass)pass, &bytes));
        CHECK_FAILS(m->status, m->words, cuflash_attention_plan(&a, (cuflash_pass)pass, text, sizeof text));
        CHECK(bytes == 3 && strcmp(text, "x") == 0);
    }
}

static void test_mistakes(void) {
    static const mistake mistakes[] = {
        {MISSING, Q, 0, 0, EVERY, CUFLASH_NULL_POINTER, "'q'"},
        {MISSING, K, 0, 0, EVERY, CUFLASH_NULL_POINTER, "'k'"},
        {MISSING, V, 0, 0, EVERY, CUFLASH_NULL_POINTER, "'v'"},
        {MISSING, O, 0, 0, FORWARDS | BACKWARD, CUFLASH_NULL_POINTER, "'o'"},
        {MISSING, D_O, 0, 0, BACKWARDS, CUFLASH_NULL_POINTER, "'d_o'"},
        /* q decides what the others have to be, k and v what their gradients have to be */
        {SHAPE, Q, 0, 3, EVERY, CUFLASH_DIMENSION_MISMATCH, "'k'|expected [3|got [2"},
        {SHAPE, Q, 1, 3, EVERY, CUFLASH_DIMENSION_MISMATCH, "'k'|heads|3|2"},
        {SHAPE, Q, 1, 6, FORWARDS | BACKWARD, CUFLASH_DIMENSION_MISMATCH, "'o'|expected [2 x 6 x 5 x 6]|got [2 x 4 x 5 x 6]"},
        {SHAPE, Q, 2, 6, FORWARDS | BACKWARD, CUFLASH_DIMENSION_MISMATCH, "'o'|expected [2 x 4 x 6 x 6]|got [2 x 4 x 5 x 6]"},
        {SHAPE, Q, 3, 7, EVERY, CUFLASH_DIMENSION_MISMATCH, "'k'|x 7]|got [2 x 2 x 7 x 8]"},
        {SHAPE, K, 0, 1, EVERY, CUFLASH_DIMENSION_MISMATCH, "'k'|expected [2|got [1"},
        {SHAPE, K, 1, 4, EVERY, CUFLASH_DIMENSION_MISMATCH, "'v'|expected [2 x 4 x 7|got [2 x 2 x 7 x 6]"},
        {SHAPE, K, 2, 6, EVERY, CUFLASH_DIMENSION_MISMATCH, "'v'|expected [2 x 2 x 6|got [2 x 2 x 7 x 6]"},
        {SHAPE, K, 3, 7, EVERY, CUFLASH_DIMENSION_MISMATCH, "'k'|x 8]|got [2 x 2 x 7 x 7]"},
        {SHAPE, V, 0, 1, EVERY, CUFLASH_DIMENSION_MISMATCH, "'v'|expected [2|got [1"},
        {SHAPE, V, 1, 1, EVERY, CUFLASH_DIMENSION_MISMATCH, "'v'|got [2 x 1 x 7 x 6]"},
        {SHAPE, V, 2, 6, EVERY, CUFLASH_DIMENSION_MISMATCH, "'v'|got [2 x 2 x 6 x 6]"},
        {SHAPE, V, 3, 5, FORWARDS | BACKWARD, CUFLASH_DIMENSION_MISMATCH, "'o'|x 5]|got [2 x 4 x 5 x 6]"},
        {DTYPE, Q, 0, CUFLASH_FLOAT64, KERNELS, CUFLASH_UNSUPPORTED_DTYPE, "'q'|float64"},
        {DTYPE, LSE, 0, CUFLASH_BFLOAT16, KERNELS, CUFLASH_UNSUPPORTED_DTYPE, "'lse'|bfloat16"},
        {DTYPE, LSE, 0, CUFLASH_FLOAT64, KERNELS, CUFLASH_UNSUPPORTED_DTYPE, "'lse'|float64"},
        {STRUCT_SIZE, Q, 0, 8, EVERY, CUFLASH_INVALID_ARGUMENT, "'struct_size'"},
        {STRUCT_SIZE, Q, 0, -8, EVERY, CUFLASH_INVALID_ARGUMENT, "'struct_size'"},
        {FLAGS, Q, 0, 8, EVERY, CUFLASH_INVALID_ARGUMENT, "'flags'|0x9"},
        {FLAGS, Q, 0, 0x80000000, EVERY, CUFLASH_INVALID_ARGUMENT, "'flags'|0x80000001"},
        {SCALE, Q, 0, NAN, EVERY, CUFLASH_INVALID_ARGUMENT, "'scale'|nan"},
        {SCALE, Q, 0, INFINITY, EVERY, CUFLASH_INVALID_ARGUMENT, "'scale'|inf"},
    };
    fixture_make(&good, &GOOD, CUFLASH_FLOAT32, GAPS, 71);
    REQUIRE_OK(cuflash_attention_forward(&good.a));
    REQUIRE_OK(cuflash_attention_backward(&good.a));
    fixture_remember(&good);
    for (int i = 0; i < COUNT_OF(mistakes); i++) check_mistake(&mistakes[i]);

    /* What is the same for all tensors. */
    for (int t = 0; t < TENSORS; t++) {
        int calls = t <= V ? EVERY : t == O || t == LSE ? FORWARDS | BACKWARD : BACKWARDS;
        int as_output = t <= V || t == D_O ? 0 : t <= LSE ? FORWARDS : BACKWARDS, last = good.t[t].ndim - 1;
        char name[8];
        snprintf(name, sizeof name, "'%s'", TENSOR_NAMES[t]);
#define MISTAKE(...) check_mistake(&(const mistake){__VA_ARGS__})
        MISTAKE(FREED, t, 0, 0, calls, CUFLASH_NULL_POINTER, name);
        MISTAKE(NDIM, t, 0, last, calls, CUFLASH_DIMENSION_MISMATCH, name);
        MISTAKE(NDIM, t, 0, 9, calls, CUFLASH_INVALID_DIMENSION, name);
        MISTAKE(NDIM, t, 0, -1, calls, CUFLASH_INVALID_DIMENSION, name);
        MISTAKE(DTYPE, t, 0, 9, calls, CUFLASH_UNSUPPORTED_DTYPE, name);
        MISTAKE(DEVICE, t, 0, 0, calls, CUFLASH_INVALID_ARGUMENT, t == Q ? "'k'|device" : name);
        for (int d = 0; d <= last; d++) {
            MISTAKE(SHAPE, t, d, 0, calls, CUFLASH_INVALID_DIMENSION, name);
            MISTAKE(SHAPE, t, d, -1, calls, CUFLASH_INVALID_DIMENSION, name);
            MISTAKE(STRIDE, t, d, -1, calls, CUFLASH_INVALID_DIMENSION, name);
            MISTAKE(STRIDE, t, d, 0, as_output, CUFLASH_INVALID_ARGUMENT, name);
            if (t > V) MISTAKE(SHAPE, t, d, (double)good.t[t].shape[d] + 1, calls, CUFLASH_DIMENSION_MISMATCH, name);
        }
        if (t == LSE) continue;
        char words[32];
        snprintf(words, sizeof words, "%s|contiguous|stride 2", name);
        MISTAKE(STRIDE, t, last, 2, calls, CUFLASH_INVALID_ARGUMENT, words);
        if (t != Q) MISTAKE(DTYPE, t, 0, CUFLASH_FLOAT16, calls & KERNELS, CUFLASH_UNSUPPORTED_DTYPE, name);
#undef MISTAKE
    }
    check_in("the struct itself");
    for (int c = 0; c < COUNT_OF(CALLS); c++) CHECK_FAILS(CUFLASH_NULL_POINTER, "'attention'", CALLS[c].call(NULL));
    fixture_free(&good);
    check_in("%s", "");
}

static void test_head_dims_and_devices(void) {
    static const struct {
        int64_t head_dim, head_dim_v;
        const char *words;
    } dims[] = {{513, 8, "'q'|512|513"}, {8, 513, "'v'|512|513"}};
    for (int i = 0; i < COUNT_OF(dims); i++) {
        shape_case shape = {1, 1, 1, 2, 3, dims[i].head_dim, dims[i].head_dim_v, false, 0};
        check_in("head dims %d and %d", (int)shape.head_dim, (int)shape.head_dim_v);
        fixture f;
        fixture_make(&f, &shape, CUFLASH_FLOAT32, DENSE, 1);
        CHECK_FAILS(CUFLASH_UNSUPPORTED_HEAD_DIM, dims[i].words, cuflash_attention_forward(&f.a));
        CHECK_FAILS(CUFLASH_UNSUPPORTED_HEAD_DIM, dims[i].words, cuflash_attention_backward(&f.a));
        for (int t = 0; t < TENSORS; t++) CHECK(unchanged(&f, t));
        CHECK_OK(cuflash_reference_forward(&f.a)); /* the oracle has no such limit */
        CHECK_OK(cuflash_reference_backward(&f.a));
        /* a device that is not there, for all tensors alike */
        static const struct {
            int device;
            cuflash_status status;
            const char *words;
        } devices[] = {{1000, CUFLASH_CUDA_ERROR, "cuda:1000"}, {-2, CUFLASH_INVALID_ARGUMENT, "-2"}};
        for (int d = 0; d < 2; d++) {
            for (int t = 0; t < TENSORS; t++) f.t[t].device = devices[d].device;
            for (int c = 0; c < COUNT_OF(CALLS); c++) CHECK_FAILS(devices[d].status, devices[d].words, CALLS[c].call(&f.a));
        }
        fixture_free(&f);
    }
    check_in("%s", "");
}

/* Each output in turn put where another tensor lies: exactly there, and partly over it. */
static void test_overlap(void) {
    const shape_case shape = {1, 2, 2, 6, 6, 8, 8, false, 0};
    fixture f;
    fixture_make(&f, &shape, CUFLASH_FLOAT32, DENSE, 81);
    REQUIRE_OK(cuflash_attention_forward(&f.a));
    fixture_remember(&f);
    for (int out = O; out < TENSORS; out++)
        for (int other = Q; other < TENSORS; other++) {
            bool forward = out <= LSE;
            if (out == D_O || out == other || (forward && other > LSE)) continue;
            for (int shift = 0; shift < 3; shift++) {
                check_in("'%s' over '%s', shift %d", TENSOR_NAMES[out], TENSOR_NAMES[other], shift);
                cuflash_tensor t[TENSORS];
                memcpy(t, f.t, sizeof t);
                t[out].data = (char *)t[other].data + shift * 4;
                cuflash_attention a = f.a;
                a.o = &t[O], a.lse = &t[LSE], a.dq = &t[DQ], a.dk = &t[DK], a.dv = &t[DV];
                char words[32];
                snprintf(words, sizeof words, "'%s'|overlaps|'%s'", TENSOR_NAMES[out], TENSOR_NAMES[other]);
                cuflash_status status = forward ? cuflash_attention_forward(&a) : cuflash_attention_backward(&a);
                bool swapped =
                    other > out || (out >= DQ && other >= DQ); /* of two outputs, the message may begin with either */
                CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, swapped ? "overlaps" : words, status);
                for (int i = 0; i < TENSORS; i++) CHECK(unchanged(&f, i));
            }
        }
    fixture_free(&f);

    check_in("strided views that share elements");
    /* o is q moved on by one position within the same [batch, seq, heads, dim] buffer. */
    cuflash_tensor memory, q, o;
    const int64_t sizes[] = {1, 7, 4, 8};
    REQUIRE_OK(cuflash_tensor_empty(&memory, CUFLASH_FLOAT32, CUFLASH_CPU, 4, sizes));
    REQUIRE_OK(cuflash_tensor_fill(&memory, 1));
    REQUIRE_OK(cuflash_tensor_narrow(&q, &memory, 2, 0, 2)); /* two of the four heads, so that the view has gaps */
    REQUIRE_OK(cuflash_tensor_transpose(&q, &q, 1, 2));
    REQUIRE_OK(cuflash_tensor_narrow(&o, &q, 2, 1, 6));
    REQUIRE_OK(cuflash_tensor_narrow(&q, &q, 2, 0, 6));
    cuflash_attention a = {.struct_size = sizeof a, .q = &q, .k = &q, .v = &q, .o = &o};
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "'o'|overlaps|'q'", cuflash_attention_forward(&a));
    double least, most;
    CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_MIN, &memory, &least));
    CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_MAX, &memory, &most));
    CHECK(least == 1 && most == 1);
    cuflash_tensor_release(&q);
    cuflash_tensor_release(&o);
    cuflash_tensor_release(&memory);
    check_in("%s", "");
}

/* Expanded views can be so long that no workspace fits; that is an error, not a small number. */
static void test_endless_keys(void) {
    check_in("endless keys");
    const int64_t one[] = {1, 1, 1, 1}, some[] = {1, 1, 100, 1}, many[] = {1, 1, INT64_C(1) << 59, 1};
    cuflash_tensor q, hundred, k, o;
    REQUIRE_OK(cuflash_tensor_empty(&q, CUFLASH_FLOAT32, CUFLASH_CPU, 4, one));
    REQUIRE_OK(cuflash_tensor_empty(&o, CUFLASH_FLOAT32, CUFLASH_CPU, 4, one));
    REQUIRE_OK(cuflash_tensor_expand(&hundred, &q, 4, some));
    REQUIRE_OK(cuflash_tensor_expand(&k, &q, 4, many));
    cuflash_attention a = {.struct_size = sizeof a, .q = &q, .k = &k, .v = &k, .o = &o};
    size_t bytes = 0;
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "", cuflash_reference_forward(&a));
    CHECK_OK(cuflash_attention_workspace(&a, CUFLASH_BACKWARD, &bytes)); /* dk and dv of one block of rows take none */
    CHECK(bytes < (size_t)1 << 30);
    a.q = a.o = &hundred;
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "", cuflash_attention_workspace(&a, CUFLASH_BACKWARD, &bytes));
    a.q = a.o = &k; /* and as many queries */
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "", cuflash_attention_workspace(&a, CUFLASH_BACKWARD, &bytes));
    cuflash_tensor_release(&q);
    cuflash_tensor_release(&hundred);
    cuflash_tensor_release(&k);
    cuflash_tensor_release(&o);
    check_in("%s", "");
}

int main(void) {
    int64_t live = check_live_bytes();
    test_mistakes();
    test_head_dims_and_devices();
    test_overlap();
    test_endless_keys();
    CHECK(check_live_bytes() == live);
    return check_result();
}
