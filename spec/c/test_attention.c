/* The attention calls on tensors: right results that depend on nothing they should not. (What is refused: test_refusals.c; several
 * threads: test_threads.c.) Run once per instruction set: with CUFLASH_CPU_ISA set, see test_isa.c for when that is skipped. */
#include "attention_case.h"
#include "isa.h"

static const cuflash_dtype DTYPES[] = {CUFLASH_FLOAT32, CUFLASH_FLOAT16, CUFLASH_BFLOAT16};

static void name_case(const shape_case *s, cuflash_dtype dtype, layout how) {
    static const char *const layouts[LAYOUTS] = {"dense", "bshd", "gaps"};
    check_in("B %d H %d/%d S %dx%d D %d/%d%s scale %g %s %s", (int)s->batch, (int)s->heads, (int)s->heads_kv, (int)s->seq_q,
             (int)s->seq_k, (int)s->head_dim, (int)s->head_dim_v, s->causal ? " causal" : "", (double)s->scale,
             cuflash_dtype_name(dtype), layouts[how]);
}

/* ---- Results ------------------------------------------------------------------------------------ */

static void test_results(void) {
    static const shape_case shapes[] = {
        /* batch, heads, heads_kv, seq_q, seq_k, head_dim, head_dim_v, causal, scale */
        {1, 1, 1, 1, 1, 1, 1, false, 0},       {1, 2, 2, 1, 200, 32, 32, false, 0},     {2, 3, 3, 65, 97, 40, 40, false, 0},
        {1, 2, 1, 63, 96, 64, 64, true, 0},    {3, 6, 2, 37, 53, 59, 23, true, 0.2f},   {1, 2, 2, 130, 7, 16, 80, true, 0},
        {1, 1, 1, 96, 193, 128, 128, true, 0}, {1, 7, 1, 20, 33, 96, 111, false, 0},    {1, 1, 1, 17, 19, 256, 160, true, 0},
        {1, 1, 1, 9, 11, 512, 512, false, 0},  {2, 2, 2, 33, 31, 24, 24, false, -0.3f}, {1, 1, 1, 5, 6, 8, 8, true, 0},
    };
    int64_t live = check_live_bytes();
    for (int i = 0; i < COUNT_OF(shapes); i++)
        for (int d = 0; d < COUNT_OF(DTYPES); d++) {
            layout how = (layout)((i + d) % LAYOUTS);
            name_case(&shapes[i], DTYPES[d], how);
            fixture f;
            answer right, naive;
            fixture_make(&f, &shapes[i], DTYPES[d], how, (uint64_t)(100 + i));
            answer_right(&right, &f);
            answer_naive(&naive, &f);
            CHECK_OK(cuflash_attention_forward(&f.a));
            check_memory(&f, 1 << O | 1 << LSE);
            check_close(&f, O, &right, &naive);
            check_lse(&f, &right);
            fixture_remember(&f);
            CHECK_OK(cuflash_attention_backward(&f.a));
            check_memory(&f, 1 << DQ | 1 << DK | 1 << DV);
            for (int t = DQ; t <= DV; t++) check_close(&f, t, &right, &naive);
            answer_free(&right);
            answer_free(&naive);
            fixture_free(&f);
        }
    check_in("%s", "");
    CHECK(check_live_bytes() == live);
}

/* Rows that see no key: o is 0, lse -inf, and nothing flows back. */
static void test_rows_without_keys(void) {
    const shape_case shape = {1, 2, 1, 75, 5, 16, 16, true, 0};
    for (int d = 0; d < COUNT_OF(DTYPES); d++) {
        name_case(&shape, DTYPES[d], DENSE);
        fixture f;
        fixture_make(&f, &shape, DTYPES[d], DENSE, 4);
        CHECK_OK(cuflash_attention_forward(&f.a));
        CHECK_OK(cuflash_attention_backward(&f.a));
        int64_t at[4] = {0};
        for (at[1] = 0; at[1] < 2; at[1]++)
            for (at[2] = 0; at[2] < 75; at[2]++) {
                double lse, o, dq;
                at[3] = 7;
                CHECK_OK(cuflash_tensor_get(&f.t[LSE], at, &lse));
                CHECK_OK(cuflash_tensor_get(&f.t[O], at, &o));
                CHECK_OK(cuflash_tensor_get(&f.t[DQ], at, &dq));
                if (at[2] < 70)
                    CHECK_F(lse == -INFINITY && o == 0 && dq == 0, "row %d: lse %g, o %g, dq %g", (int)at[2], lse, o, dq);
                else
                    CHECK_F(isfinite(lse) && o != 0 && isfinite(o), "row %d: lse %g, o %g", (int)at[2], lse, o);
            }
        fixture_free(&f);
    }
    check_in("%s", "");
}

/* Keys and values repeated over heads by strides of 0, and q, k and v interleaved in one buffer, as projections leave
 * them; the gradients likewise. */
static void test_shared_memory(void) {
    check_in("repeated keys");
    const shape_case shape = {2, 3, 3, 20, 20, 16, 16, true, 0}, one_head = {2, 3, 1, 20, 20, 16, 16, true, 0};
    fixture f, g;
    fixture_make(&f, &shape, CUFLASH_FLOAT32, DENSE, 11);
    fixture_make(&g, &one_head, CUFLASH_FLOAT32, DENSE, 12);
    for (int i = Q; i <= V; i++) REQUIRE_OK(i == Q ? cuflash_tensor_copy(&f.t[i], &g.t[i]) : CUFLASH_SUCCESS);
    cuflash_attention a = f.a;
    cuflash_tensor k, v;
    REQUIRE_OK(cuflash_tensor_expand(&k, &g.t[K], 4, f.t[K].shape));
    REQUIRE_OK(cuflash_tensor_expand(&v, &g.t[V], 4, f.t[V].shape));
    CHECK(k.stride[1] == 0);
    a.k = &k, a.v = &v;
    CHECK_OK(cuflash_attention_forward(&a));
    CHECK_OK(cuflash_attention_forward(&g.a));
    CHECK(distance(&f.t[O], &g.t[O]).rel_norm <= 2e-6);
    cuflash_tensor_release(&k);
    cuflash_tensor_release(&v);

    check_in("interleaved q, k and v");
    cuflash_tensor packed, packed_grad, view[3], grad[3];
    const int64_t sizes[] = {2, 20, 3, 3, 16}; /* batch, seq, q or k or v, heads, dim */
    REQUIRE_OK(cuflash_tensor_empty(&packed, CUFLASH_FLOAT32, CUFLASH_CPU, 5, sizes));
    REQUIRE_OK(cuflash_tensor_empty(&packed_grad, CUFLASH_FLOAT32, CUFLASH_CPU, 5, sizes));
    for (int i = 0; i < 3; i++) {
        REQUIRE_OK(cuflash_tensor_select(&view[i], &packed, 2, i));
        REQUIRE_OK(cuflash_tensor_transpose(&view[i], &view[i], 1, 2));
        REQUIRE_OK(cuflash_tensor_copy(&view[i], &f.t[Q + i]));
        REQUIRE_OK(cuflash_tensor_select(&grad[i], &packed_grad, 2, i));
        REQUIRE_OK(cuflash_tensor_transpose(&grad[i], &grad[i], 1, 2));
    }
    CHECK_OK(cuflash_attention_forward(&f.a));
    CHECK_OK(cuflash_attention_backward(&f.a));
    fixture_remember(&f);
    fixture_poison(&f, O);
    a = f.a;
    a.q = &view[0], a.k = &view[1], a.v = &view[2];
    CHECK_OK(cuflash_attention_forward(&a));
    CHECK(unchanged(&f, O)); /* the same bits as before */
    a.dq = &grad[0], a.dk = &grad[1], a.dv = &grad[2];
    CHECK_OK(cuflash_attention_backward(&a));
    for (int i = 0; i < 3; i++) CHECK(distance(&grad[i], &f.t[DQ + i]).n_bad == 0);
    for (int i = 0; i < 3; i++) {
        cuflash_tensor_release(&view[i]);
        cuflash_tensor_release(&grad[i]);
    }
    cuflash_tensor_release(&packed);
    cuflash_tensor_release(&packed_grad);
    fixture_free(&f);
    fixture_free(&g);
    check_in("%s", "");
}

/* Bit-equal from run to run, for any number of threads, layout of memory, and with a workspace of one's own. */
static void test_bits(void) {
    static const shape_case shapes[] = {{2, 4, 2, 150, 201, 40, 24, true, 0}, {1, 1, 1, 300, 170, 64, 64, false, 0}};
    int before = cuflash_get_num_threads();
    for (int i = 0; i < COUNT_OF(shapes); i++)
        for (int d = 0; d < COUNT_OF(DTYPES); d++) {
            name_case(&shapes[i], DTYPES[d], DENSE);
            fixture f, other;
            fixture_make(&f, &shapes[i], DTYPES[d], DENSE, 21);
            CHECK_OK(cuflash_set_num_threads(1));
            CHECK_OK(cuflash_attention_forward(&f.a));
            CHECK_OK(cuflash_attention_backward(&f.a));
            fixture_remember(&f);
            static const int threads[] = {1, 2, 3, 7, 7, 64};
            for (int n = 0; n < COUNT_OF(threads); n++) {
                CHECK_OK(cuflash_set_num_threads(threads[n]));
                fixture_poison_outputs(&f);
                CHECK_OK(cuflash_attention_forward(&f.a));
                CHECK_OK(cuflash_attention_backward(&f.a));
                for (int t = 0; t < TENSORS; t++)
                    CHECK_F(unchanged(&f, t), "%d threads: '%s' differs from one thread's", threads[n], TENSOR_NAMES[t]);
            }
            CHECK_OK(cuflash_set_num_threads(before));
            for (int how = BSHD; how <= GAPS; how++) {
                fixture_make(&other, &shapes[i], DTYPES[d], (layout)how, 21);
                CHECK_OK(cuflash_attention_forward(&other.a));
                CHECK_OK(cuflash_attention_backward(&other.a));
                for (int t = 0; t < TENSORS; t++)
                    CHECK_F(distance(&other.t[t], &f.t[t]).n_bad == 0, "'%s' depends on the layout", TENSOR_NAMES[t]);
                fixture_free(&other);
            }
            fixture_free(&f);
        }
    check_in("%s", "");
}

/* lse and each gradient may be left out; what is left is the same, bit for bit. */
static void test_optional_outputs(void) {
    const shape_case shape = {2, 4, 2, 70, 99, 40, 24, true, 0};
    for (int d = 0; d < COUNT_OF(DTYPES); d++) {
        name_case(&shape, DTYPES[d], GAPS);
        fixture f;
        answer right, naive;
        fixture_make(&f, &shape, DTYPES[d], GAPS, 31);
        answer_right(&right, &f);
        answer_naive(&naive, &f);
        CHECK_OK(cuflash_attention_forward(&f.a));
        CHECK_OK(cuflash_attention_backward(&f.a));
        fixture_remember(&f);
        fixture_poison(&f, O);
        cuflash_attention a = f.a;
        a.lse = NULL, a.d_o = a.dq = a.dk = a.dv = NULL;
        CHECK_OK(cuflash_attention_forward(&a));
        CHECK(unchanged(&f, O));
        for (unsigned wanted = 0; wanted < 8; wanted++) {
            a = f.a;
            if (!(wanted & 1)) a.dq = NULL;
            if (!(wanted & 2)) a.dk = NULL;
            if (!(wanted & 4)) a.dv = NULL;
            for (int t = DQ; t <= DV; t++) {
                fixture_poison(&f, t);
                if (wanted & 1u << (t - DQ)) continue;
                memset(f.b[t].before, POISON, f.b[t].bytes);
            }
            CHECK_OK(cuflash_attention_backward(&a));
            for (int t = 0; t < TENSORS; t++)
                CHECK_F(unchanged(&f, t), "gradients %u wanted: '%s' differs", wanted, TENSOR_NAMES[t]);
            CHECK_OK(cuflash_attention_backward(&f.a));
            fixture_remember(&f);
        }
        a = f.a, a.lse = NULL;
        CHECK_OK(cuflash_attention_backward(&a)); /* recomputed: not the same bits, but as good */
        check_memory(&f, 1 << DQ | 1 << DK | 1 << DV);
        for (int t = DQ; t <= DV; t++) check_close(&f, t, &right, &naive);

        cuflash_tensor half;
        REQUIRE_OK(cuflash_tensor_empty(&half, CUFLASH_FLOAT16, CUFLASH_CPU, 3, f.t[LSE].shape));
        a = f.a, a.lse = &half;
        CHECK_OK(cuflash_attention_forward(&a));
        cuflash_close_report report;
        CHECK_OK(cuflash_tensor_compare(&half, &right.t[LSE], 0x1p-10, 0x1p-10, false, &report));
        CHECK(report.n_bad == 0);
        CHECK_OK(cuflash_tensor_fill(&half, NAN)); /* backward does not use so coarse an lse */
        CHECK_OK(cuflash_attention_backward(&a));
        for (int t = DQ; t <= DV; t++) check_close(&f, t, &right, &naive);
        cuflash_tensor_release(&half);
        answer_free(&right);
        answer_free(&naive);
        fixture_free(&f);
    }
    check_in("%s", "");
}

/* The oracle takes any dtype in and out, float64 among them, and rounds once. */
static void test_reference_dtypes(void) {
    check_in("reference");
    const shape_case shape = {1, 2, 1, 6, 9, 5, 3, true, 0};
    fixture f;
    answer right;
    fixture_make(&f, &shape, CUFLASH_FLOAT64, GAPS, 41);
    answer_right(&right, &f);
    for (int d = 0; d < COUNT_OF(DTYPES); d++) {
        cuflash_tensor o, expected;
        REQUIRE_OK(cuflash_tensor_empty(&o, DTYPES[d], CUFLASH_CPU, 4, f.t[O].shape));
        REQUIRE_OK(cuflash_tensor_empty(&expected, DTYPES[d], CUFLASH_CPU, 4, f.t[O].shape));
        cuflash_attention a = f.a;
        a.o = &o;
        CHECK_OK(cuflash_reference_forward(&a));
        REQUIRE_OK(cuflash_tensor_copy(&expected, &right.t[O]));
        CHECK(distance(&o, &expected).n_bad == 0);
        cuflash_tensor_release(&o);
        cuflash_tensor_release(&expected);
    }
    answer naive; /* written by someone else, as it were */
    answer_naive(&naive, &f);
    for (int t = DQ; t <= DV; t++) CHECK(distance(&right.t[t], &naive.t[t]).rel_norm <= 1e-12);
    CHECK(distance(&right.t[O], &naive.t[O]).rel_norm <= 1e-13);
    answer_free(&naive);
    answer_free(&right);
    fixture_free(&f);
    check_in("%s", "");
}

/* Scores so large that their log-sum-exp is infinite in float32: backward may not take it at its word. */
static void test_overflowed_lse(void) {
    const double queries[] = {10, -10};
    for (int i = 0; i < 2; i++) {
        check_in("a log-sum-exp of %s", i ? "-inf" : "inf");
        const int64_t shape[] = {1, 1, 3, 4}, flat[] = {1, 1, 3};
        cuflash_tensor t[7], lse;
        for (int k = 0; k < 7; k++) REQUIRE_OK(cuflash_tensor_empty(&t[k], CUFLASH_FLOAT32, CUFLASH_CPU, 4, shape));
        REQUIRE_OK(cuflash_tensor_empty(&lse, CUFLASH_FLOAT32, CUFLASH_CPU, 3, flat));
        cuflash_generator g = {.seed = 3};
        REQUIRE_OK(cuflash_tensor_fill(&t[0], queries[i]));
        REQUIRE_OK(cuflash_tensor_fill(&t[1], 1));
        for (int k = 2; k < 7; k++) REQUIRE_OK(cuflash_random_normal(&t[k], &g, 0, 1));
        cuflash_attention a = {.struct_size = sizeof a, .q = &t[0], .k = &t[1], .v = &t[2], .o = &t[3], .lse = &lse};
        a.d_o = &t[4], a.dv = &t[5], a.flags = CUFLASH_SCALE, a.scale = 1e38f;
        CHECK_OK(cuflash_attention_forward(&a));
        double value;
        CHECK_OK(cuflash_tensor_get(&lse, (const int64_t[]){0, 0, 0}, &value));
        CHECK(isinf(value) && (value < 0) == (i == 1));
        CHECK_OK(cuflash_attention_backward(&a));
        a.dv = &t[6];
        CHECK_OK(cuflash_reference_backward(&a));
        cuflash_close_report report;
        CHECK_OK(cuflash_tensor_compare(&t[5], &t[6], 0, 0, false, &report));
        CHECK_F(report.rel_norm <= 5e-6, "got %g", report.rel_norm);
        for (int k = 0; k < 7; k++) cuflash_tensor_release(&t[k]);
        cuflash_tensor_release(&lse);
    }
    check_in("%s", "");
}

/* Where the instruction set has fused multiply-adds, sums of products are made of them: twice as fast, and not rounded in between.
 * Here the score is 1 * -(1 + 2^-11) + (1 + 2^-12)^2 = 2^-24, but 0 if the square is rounded before it is added. */
static void test_fused(void) {
    if (strcmp(cuflash_cpu_isa(), "baseline") == 0) return;
    const shape_case shape = {1, 1, 1, 64, 1, 2, 2, false, 1};
    fixture f;
    fixture_make(&f, &shape, CUFLASH_FLOAT32, DENSE, 1);
    float *q = f.t[Q].data, *k = f.t[K].data, *lse = f.t[LSE].data;
    for (int i = 0; i < 64; i++) q[2 * i] = 1, q[2 * i + 1] = 1 + 0x1p-12f;
    k[0] = -(1 + 0x1p-11f), k[1] = 1 + 0x1p-12f;
    CHECK_OK(cuflash_attention_forward(&f.a));
    CHECK_F(lse[0] == 0x1p-24f && lse[63] == 0x1p-24f, "expected %g, got %g and %g", 0x1p-24, lse[0], lse[63]);
    fixture_free(&f);
}

/* ---- Workspace and plan ------------------------------------------------------------------------- */

static void test_workspace(void) {
    const shape_case shape = {1, 2, 2, 40, 50, 20, 20, false, 0};
    for (int pass = CUFLASH_FORWARD; pass <= CUFLASH_BACKWARD; pass++) {
        check_in("workspace of pass %d", pass);
        fixture f;
        fixture_make(&f, &shape, CUFLASH_FLOAT16, GAPS, 51);
        cuflash_status (*call)(const cuflash_attention *) =
            pass == CUFLASH_FORWARD ? cuflash_attention_forward : cuflash_attention_backward;
        CHECK_OK(cuflash_attention_forward(&f.a));
        CHECK_OK(cuflash_attention_backward(&f.a));
        fixture_remember(&f);
        unsigned outputs = pass == CUFLASH_FORWARD ? 1 << O | 1 << LSE : 1 << DQ | 1 << DK | 1 << DV;

        size_t bytes = 0, least = 0;
        CHECK_OK(cuflash_attention_workspace(&f.a, (cuflash_pass)pass, &bytes));
        cuflash_attention a = {.struct_size = sizeof a, .q = f.a.q, .k = f.a.k, .v = f.a.v};
        CHECK_OK(cuflash_attention_workspace(&a, (cuflash_pass)pass, &least)); /* q, k and v suffice */
        CHECK(bytes > 0 && least == bytes && bytes % 64 == 0);

        size_t room = (bytes + 63) / 64 * 64 + 128;
        unsigned char *memory = aligned_alloc(64, room);
        memset(memory, 0xa5, room);
        a = f.a;
        a.workspace = memory + 64;
        a.workspace_bytes = bytes;
        for (int t = O; t <= DV; t++)
            if (outputs & 1u << t) fixture_poison(&f, t);
        cuflash_memory_stats stats;
        CHECK_OK(cuflash_memory_reset_peak(CUFLASH_CPU));
        CHECK_OK(call(&a));
        CHECK_OK(cuflash_memory_get_stats(CUFLASH_CPU, &stats));
        CHECK(stats.peak_bytes == stats.live_bytes); /* it took no memory of its own */
        for (int t = 0; t < TENSORS; t++) CHECK_F(unchanged(&f, t), "'%s' differs", TENSOR_NAMES[t]);
        bool kept = true;
        for (int i = 0; i < 64; i++) kept = kept && memory[i] == 0xa5 && memory[64 + bytes + (size_t)i] == 0xa5;
        CHECK(kept);

        char words[64];
        snprintf(words, sizeof words, "%s|'workspace_bytes'|%zu|%zu", pass ? "attention_backward" : "attention_forward", bytes,
                 bytes - 1);
        a.workspace_bytes = bytes - 1;
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, words, call(&a));
        a.workspace_bytes = 0;
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "'workspace_bytes'", call(&a));
        a.workspace_bytes = bytes + 64;
        a.workspace = memory + 4;
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "'workspace'|64-byte", call(&a));
        for (int t = 0; t < TENSORS; t++) CHECK(unchanged(&f, t));
        free(memory);

        CHECK_FAILS(CUFLASH_NULL_POINTER, "attention_workspace|'bytes'",
                    cuflash_attention_workspace(&f.a, (cuflash_pass)pass, NULL));
        fixture_free(&f);
    }
    check_in("%s", "");
}

static void test_plan(void) {
    check_in("plan");
    const shape_case shape = {1, 4, 2, 40, 50, 20, 24, true, 0.5f};
    fixture f;
    fixture_make(&f, &shape, CUFLASH_BFLOAT16, BSHD, 61);
    cuflash_attention a = {.struct_size = sizeof a, .q = f.a.q, .k = f.a.k, .v = f.a.v, .flags = f.a.flags, .scale = f.a.scale};
    char text[1024], whole[1024], isa[32];
    snprintf(isa, sizeof isa, "cpu %s", cuflash_cpu_isa());
    for (int pass = CUFLASH_FORWARD; pass <= CUFLASH_BACKWARD; pass++) {
        memset(whole, 'x', sizeof whole);
        CHECK_OK(cuflash_attention_plan(&a, (cuflash_pass)pass, whole, sizeof whole));
        CHECK(memchr(whole, 0, sizeof whole) != NULL);
        CHECK_F(check_contains(whole, pass ? "pass: backward" : "pass: forward"), "%s", whole);
        CHECK_F(check_contains(whole, "bfloat16|batch 1|40 queries|50 keys|causal|scale 0.5|workspace: "), "%s", whole);
        CHECK_F(check_contains(whole, isa), "expected '%s' in %s", isa, whole);
        bool lines = strlen(whole) > 0 && whole[strlen(whole) - 1] == '\n';
        char copy[1024];
        memcpy(copy, whole, sizeof copy);
        for (char *line = strtok(copy, "\n"); line; line = strtok(NULL, "\n")) lines = lines && strstr(line, ": ") != NULL;
        CHECK_F(lines, "expected lines of 'name: value', got %s", whole);
        static const size_t sizes[] = {1, 2, 10, 100};
        for (int i = 0; i < COUNT_OF(sizes); i++) {
            memset(text, 'x', sizeof text);
            CHECK_OK(cuflash_attention_plan(&a, (cuflash_pass)pass, text, sizes[i]));
            CHECK(strlen(text) == sizes[i] - 1 && memcmp(text, whole, sizes[i] - 1) == 0 && text[sizes[i]] == 'x');
        }
    }
    CHECK_FAILS(CUFLASH_NULL_POINTER, "attention_plan|'text'", cuflash_attention_plan(&a, CUFLASH_FORWARD, NULL, 100));
    memset(text, 'x', sizeof text);
    CHECK_FAILS(CUFLASH_NULL_POINTER, "attention_plan|'text'|size 0", cuflash_attention_plan(&a, CUFLASH_FORWARD, text, 0));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "attention_plan|'pass'|2",
                cuflash_attention_plan(&a, (cuflash_pass)2, text, sizeof text));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "attention_plan|'attention'",
                cuflash_attention_plan(NULL, CUFLASH_FORWARD, text, sizeof text));
    size_t bytes = 3;
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "attention_workspace|'pass'|-1",
                cuflash_attention_workspace(&a, (cuflash_pass)-1, &bytes));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "attention_workspace|'attention'",
                cuflash_attention_workspace(NULL, CUFLASH_FORWARD, &bytes));
    CHECK(text[0] == 'x' && bytes == 3);
    fixture_free(&f);
    check_in("%s", "");
}

int main(void) {
    isa_require();
    int64_t live = check_live_bytes();
    test_results();
    test_rows_without_keys();
    test_shared_memory();
    test_bits();
    test_optional_outputs();
    test_reference_dtypes();
    test_overflowed_lse();
    test_fused();
    test_workspace();
    test_plan();
    CHECK(check_live_bytes() == live);
    return check_result();
}
