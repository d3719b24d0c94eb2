/* Attention on small shapes that leave partial tiles everywhere, for compute-sanitizer to watch (script/gpu-record): every
 * dtype, every head dimension that has kernels of its own, forward and backward, deterministic and not, causal and not, on
 * strided memory and dense. Without a device it says why and is skipped. */
#include "check.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

enum { Q, K, V, O, D_O, DQ, DK, DV, TENSORS };

typedef struct {
    int64_t seq_q, seq_k, heads, heads_kv;
    enum {
        ALL,
        MANY, /* more tiles than there are blocks, or heads of a group in a tile: for causal forwards on Hopper alone */
        LONG, /* walks long enough for another order of a backward's steps: on Hopper alone, not causal */
        LAST  /* deterministic, walks of the last keys first: on Hopper alone, causal */
    } what;
} sizes;

/* A [1, heads, seq, dim] tensor whose memory is in that order or in [1, seq, heads, dim]'s. */
static cuflash_tensor make(cuflash_dtype dtype, int64_t heads, int64_t seq, int64_t dim, bool by_seq) {
    cuflash_tensor t;
    REQUIRE_OK(cuflash_tensor_empty(&t, dtype, 0, 4, by_seq ? SHAPE(1, seq, heads, dim) : SHAPE(1, heads, seq, dim)));
    if (by_seq) REQUIRE_OK(cuflash_tensor_transpose(&t, &t, 1, 2));
    return t;
}

static void run(cuflash_dtype dtype, int64_t dim, const sizes *s, bool causal, bool by_seq) {
    check_in("%s, head dim %lld, %lld x %lld, %s, by %s", cuflash_dtype_name(dtype), (long long)dim, (long long)s->seq_q,
             (long long)s->seq_k, causal ? "causal" : "not causal", by_seq ? "sequence" : "head");
    cuflash_tensor t[TENSORS], lse;
    for (int i = 0; i < TENSORS; i++) {
        bool keys = i == K || i == V || i == DK || i == DV;
        t[i] = make(dtype, keys ? s->heads_kv : s->heads, keys ? s->seq_k : s->seq_q, dim, by_seq);
    }
    REQUIRE_OK(cuflash_tensor_empty(&lse, CUFLASH_FLOAT32, 0, 3, SHAPE(1, s->heads, s->seq_q)));
    cuflash_generator generator = {11, 0};
    static const int inputs[] = {Q, K, V, D_O};
    for (int i = 0; i < COUNT_OF(inputs); i++) REQUIRE_OK(cuflash_random_normal(&t[inputs[i]], &generator, 0, 1));
    for (int deterministic = s->what == LAST; deterministic < (s->what == ALL || s->what == LAST ? 2 : 1); deterministic++) {
        cuflash_attention a = {.struct_size = sizeof a, .q = &t[Q], .k = &t[K], .v = &t[V], .o = &t[O], .lse = &lse};
        a.flags = (causal ? CUFLASH_CAUSAL : 0) | (deterministic ? CUFLASH_DETERMINISTIC : 0);
        CHECK_OK(cuflash_attention_forward(&a));
        a.d_o = &t[D_O], a.dq = &t[DQ], a.dk = &t[DK], a.dv = &t[DV];
        if (deterministic) a.lse = NULL; /* and so the statistics are computed again */
        if (s->what != MANY) CHECK_OK(cuflash_attention_backward(&a));
        static const int outputs[] = {O, DQ, DK, DV};
        for (int i = 0; i < (s->what == MANY ? 1 : COUNT_OF(outputs)); i++) {
            double sum = NAN;
            CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_SUM, &t[outputs[i]], &sum));
            CHECK_F(sum == sum, "output %d is not a number", outputs[i]);
        }
    }
    for (int i = 0; i < TENSORS; i++) cuflash_tensor_release(&t[i]);
    cuflash_tensor_release(&lse);
}

/* On Hopper there are rows for many keys, and blocks go from tile to tile; others need not be watched again. */
static bool is_hopper(cuflash_dtype dtype, int64_t dim) {
    char text[4096];
    cuflash_tensor t = make(dtype, 1, 1, dim, false);
    cuflash_attention a = {.struct_size = sizeof a, .q = &t, .k = &t, .v = &t};
    REQUIRE_OK(cuflash_attention_plan(&a, CUFLASH_FORWARD, text, sizeof text));
    cuflash_tensor_release(&t);
    return strstr(text, "cuflash_hopper_forward") != NULL;
}

int main(void) {
    if (cuflash_device_check(0) != CUFLASH_SUCCESS) return printf("skipped: %s\n", cuflash_last_error()), CHECK_SKIPPED;
    static const sizes shapes[] = {{1, 1, 1, 1, ALL},          {65, 97, 2, 1, ALL},     {210, 70, 1, 1, ALL},
                                   {64, 256, 2, 2, ALL},       {70, 1100, 1, 1, ALL},   {70, 2100, 1, 1, ALL},
                                   {200, 150, 430, 430, MANY}, {5, 70, 448, 56, MANY},  {2050, 40, 134, 134, LONG},
                                   {140, 200, 80, 80, LAST},   {140, 200, 80, 20, LAST}};
    static const int dims[] = {32, 59, 64, 96, 128, 192, 256};
    int cases = 0;
    for (int dtype = CUFLASH_FLOAT32; dtype <= CUFLASH_BFLOAT16; dtype++)
        for (int d = 0; d < COUNT_OF(dims); d++)
            for (int i = 0; i < COUNT_OF(shapes); i++) {
                const sizes *s = &shapes[i];
                bool causal = s->what == ALL ? (i + d) % 2 == 0 : s->what != LONG;
                if ((s->seq_k > 1000 || s->what != ALL) && !is_hopper((cuflash_dtype)dtype, dims[d])) continue;
                if (s->what == LONG && dims[d] != 64 && dims[d] != 128) continue; /* which have kernels of that order */
                if (s->what == LAST && dims[d] != 64 && dims[d] != 256) continue; /* one of each kind */
                run((cuflash_dtype)dtype, dims[d], s, causal, i % 2 == 0);
                cases++;
            }
    check_in("%s", "");
    printf("sanitize: %d cases\n", cases);
    return check_result();
}
