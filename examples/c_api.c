/* The C API in one sitting: tensors, attention forward and backward, and a check against the float64 reference.
 *
 *     cc examples/c_api.c $(pkg-config --cflags --libs cuflash) -o c_api &&
 *         LD_LIBRARY_PATH=$(pkg-config --variable=libdir cuflash) ./c_api
 *
 * The problem is one that is met in practice: causal self-attention with 8 query heads on 2 KV heads, in bfloat16, with
 * the tensors lying as [batch, seq, heads, dim], as a projection leaves them. */
#include <cuflash.h>
#include <stdio.h>
#include <stdlib.h>

/* Every function that can fail returns a status, and leaves a sentence about what was wrong. */
static void check(cuflash_status status) {
    if (status == CUFLASH_SUCCESS) return;
    fprintf(stderr, "%s: %s\n", cuflash_status_name(status), cuflash_last_error());
    exit(1);
}

enum { BATCH = 2, SEQ = 512, HEADS = 8, HEADS_KV = 2, DIM = 64 };

/* Memory for [batch, seq, heads, dim], seen as the [batch, heads, seq, dim] that attention takes: a transposed view of
 * the same storage. out may be the tensor itself, so one variable holds the one reference. */
static cuflash_tensor make(int64_t heads) {
    cuflash_tensor t;
    check(cuflash_tensor_empty(&t, CUFLASH_BFLOAT16, CUFLASH_CPU, 4, (const int64_t[]){BATCH, SEQ, heads, DIM}));
    check(cuflash_tensor_transpose(&t, &t, 1, 2));
    return t;
}

static cuflash_tensor make_random(int64_t heads, cuflash_generator *generator) {
    cuflash_tensor t = make(heads);
    check(cuflash_random_normal(&t, generator, 0, 1));
    return t;
}

/* A float64 tensor of the same shape, for the reference's answer. */
static cuflash_tensor make_exact(const cuflash_tensor *like) {
    cuflash_tensor t;
    check(cuflash_tensor_empty(&t, CUFLASH_FLOAT64, CUFLASH_CPU, like->ndim, like->shape));
    return t;
}

/* Prints how far off a result is; returns whether that is as close as bfloat16 (8 bits) lets it be. */
static bool compare(const char *name, const cuflash_tensor *got, const cuflash_tensor *exact) {
    cuflash_close_report report;
    check(cuflash_tensor_compare(got, exact, 0, 0, false, &report));
    bool good = report.rel_norm <= 0x1p-7;
    printf("  %-2s  relative error %.2e, largest difference %.2e  %s\n", name, report.rel_norm, report.max_abs,
           good ? "ok" : "TOO MUCH");
    return good;
}

int main(void) {
    cuflash_generator generator = {.seed = 42};
    cuflash_tensor q = make_random(HEADS, &generator), k = make_random(HEADS_KV, &generator),
                   v = make_random(HEADS_KV, &generator);
    cuflash_tensor d_o = make_random(HEADS, &generator);
    cuflash_tensor o = make(HEADS), dq = make(HEADS), dk = make(HEADS_KV), dv = make(HEADS_KV), lse;
    check(cuflash_tensor_empty(&lse, CUFLASH_FLOAT32, CUFLASH_CPU, 3, (const int64_t[]){BATCH, HEADS, SEQ}));

    /* One struct describes the problem; what is not set is zero, and means the default. */
    // clang-format off
    cuflash_attention attention = {
        .struct_size = sizeof attention,
        .q = &q, .k = &k, .v = &v, .o = &o, .lse = &lse,
        .d_o = &d_o, .dq = &dq, .dk = &dk, .dv = &dv,
        .flags = CUFLASH_CAUSAL,
    };
    // clang-format on
    char plan[1024];
    check(cuflash_attention_plan(&attention, CUFLASH_FORWARD, plan, sizeof plan));
    printf("cuflash %s will run\n%s\n", cuflash_version(), plan);

    check(cuflash_attention_forward(&attention));
    check(cuflash_attention_backward(&attention));

    /* The same problem naively in float64, from the same bfloat16 inputs. */
    cuflash_tensor exact_o = make_exact(&o), exact_dq = make_exact(&dq), exact_dk = make_exact(&dk), exact_dv = make_exact(&dv);
    cuflash_attention exact = attention;
    exact.lse = NULL;
    exact.o = &exact_o;
    exact.dq = &exact_dq, exact.dk = &exact_dk, exact.dv = &exact_dv;
    check(cuflash_reference_forward(&exact));
    check(cuflash_reference_backward(&exact));
    printf("against the float64 reference:\n");
    bool good = compare("o", &o, &exact_o);
    good = compare("dq", &dq, &exact_dq) && good;
    good = compare("dk", &dk, &exact_dk) && good;
    good = compare("dv", &dv, &exact_dv) && good;

    /* A mistake is an answer, not a crash: */
    attention.k = &q;
    if (cuflash_attention_forward(&attention) != CUFLASH_SUCCESS)
        printf("\na mistake reads like this:\n  %s\n", cuflash_last_error());

    cuflash_tensor *all[] = {&q, &k, &v, &d_o, &o, &dq, &dk, &dv, &lse, &exact_o, &exact_dq, &exact_dk, &exact_dv};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) cuflash_tensor_release(all[i]);
    cuflash_memory_stats stats;
    check(cuflash_memory_get_stats(CUFLASH_CPU, &stats));
    printf("\n%.1f MiB were held at most; %lld bytes are now\n", (double)stats.peak_bytes / (1 << 20),
           (long long)stats.live_bytes);
    return good ? 0 : 1;
}
