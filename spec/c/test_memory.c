/* The account of memory: what is held, the most ever held, and the limit, which makes any allocation fail on demand. */
#include <pthread.h>

#include "check.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

static cuflash_memory_stats stats(void) {
    cuflash_memory_stats s;
    REQUIRE_OK(cuflash_memory_get_stats(CUFLASH_CPU, &s));
    return s;
}

static void test_stats(void) {
    cuflash_memory_stats start = stats();
    CHECK(start.limit_bytes == 0);
    cuflash_tensor a, b, view;
    REQUIRE_OK(cuflash_tensor_empty(&a, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(1000)));
    REQUIRE_OK(cuflash_tensor_empty(&b, CUFLASH_FLOAT16, CUFLASH_CPU, 1, SHAPE(1001)));
    REQUIRE_OK(cuflash_tensor_narrow(&view, &b, 0, 5, 6));
    cuflash_memory_stats now = stats();
    CHECK(now.live_bytes == start.live_bytes + 6002 && now.live_storages == start.live_storages + 2);
    CHECK(now.total_storages == start.total_storages + 2 && now.peak_bytes >= now.live_bytes);
    cuflash_tensor_release(&a);
    cuflash_tensor_release(&b);
    now = stats();
    CHECK(now.live_bytes == start.live_bytes + 2002 && now.live_storages == start.live_storages + 1);
    CHECK(now.peak_bytes >= start.live_bytes + 6002);
    CHECK_OK(cuflash_memory_reset_peak(CUFLASH_CPU));
    CHECK(stats().peak_bytes == start.live_bytes + 2002);
    cuflash_tensor_release(&view);
    now = stats();
    CHECK(now.live_bytes == start.live_bytes && now.live_storages == start.live_storages);
    CHECK(now.peak_bytes == start.live_bytes + 2002 && now.total_storages == start.total_storages + 2);
}

static void test_refusals(void) {
    cuflash_memory_stats s;
    CHECK_FAILS(CUFLASH_NULL_POINTER, "memory_get_stats|'stats'", cuflash_memory_get_stats(CUFLASH_CPU, NULL));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "cuda:1000", cuflash_memory_get_stats(1000, &s));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "-2", cuflash_memory_get_stats(-2, &s));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "cuda:1000", cuflash_memory_reset_peak(1000));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "-2", cuflash_memory_reset_peak(-2));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, "cuda:1000", cuflash_memory_set_limit(1000, 1));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "-2", cuflash_memory_set_limit(-2, 1));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "memory_set_limit|'bytes'|-1", cuflash_memory_set_limit(CUFLASH_CPU, -1));
    CHECK(stats().limit_bytes == 0);
}

static void test_limit_on_tensors(void) {
    check_in("tensors at the limit");
    cuflash_tensor t, u;
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(512)));
    cuflash_memory_stats start = stats();
    REQUIRE_OK(cuflash_memory_set_limit(CUFLASH_CPU, start.live_bytes + 4096));
    CHECK(stats().limit_bytes == start.live_bytes + 4096);
    memset(&u, 0x5a, sizeof u);
    cuflash_tensor before = u;
    /* the sizes: asked for, held, limit (2 KiB more where nothing else lives) */
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "tensor_empty|4.01 KiB|2.00 KiB|1 tensor,|limit 6.00 KiB",
                cuflash_tensor_empty(&u, CUFLASH_BFLOAT16, CUFLASH_CPU, 1, SHAPE(2053)));
    CHECK(memcmp(&u, &before, sizeof u) == 0);
    CHECK(stats().live_bytes == start.live_bytes && stats().live_storages == start.live_storages);
    CHECK(stats().total_storages == start.total_storages);
    CHECK_OK(cuflash_tensor_empty(&u, CUFLASH_BFLOAT16, CUFLASH_CPU, 1, SHAPE(2048))); /* to the last byte */
    CHECK(stats().live_bytes == start.live_bytes + 4096);
    cuflash_tensor more;
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "tensor_empty|4 bytes",
                cuflash_tensor_empty(&more, CUFLASH_FLOAT32, CUFLASH_CPU, 0, NULL));
    cuflash_tensor_release(&u);
    /* a limit below what is held: nothing is taken away, nothing new is given */
    CHECK_OK(cuflash_memory_set_limit(CUFLASH_CPU, 1));
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "limit 1 bytes", cuflash_tensor_empty(&u, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(1)));
    CHECK_OK(cuflash_tensor_fill(&t, 1));
    /* the copy that overlapping operands need */
    cuflash_tensor turned;
    REQUIRE_OK(cuflash_tensor_view(&t, &t, 2, SHAPE(16, 32)));
    REQUIRE_OK(cuflash_tensor_narrow(&t, &t, 1, 0, 16));
    REQUIRE_OK(cuflash_tensor_transpose(&turned, &t, 0, 1));
    CHECK_OK(cuflash_tensor_set(&t, SHAPE(1, 0), 5));
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "1.00 KiB", cuflash_tensor_copy(&t, &turned));
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "1.00 KiB", cuflash_tensor_binary(CUFLASH_ADD, &t, &t, &turned));
    double value = 0;
    CHECK_OK(cuflash_tensor_get(&t, SHAPE(0, 1), &value));
    CHECK(value == 1); /* nothing was written */
    CHECK_OK(cuflash_memory_set_limit(CUFLASH_CPU, 0));
    CHECK_OK(cuflash_tensor_copy(&t, &turned));
    CHECK_OK(cuflash_tensor_get(&t, SHAPE(0, 1), &value));
    CHECK(value == 5);
    cuflash_tensor_release(&turned);
    cuflash_tensor_release(&t);
    check_in("%s", "");
}

/* What the system itself refuses leaves no trace in the account. */
static void test_refused_by_the_system(void) {
    cuflash_memory_stats before, after;
    cuflash_tensor t;
    CHECK_OK(cuflash_memory_get_stats(CUFLASH_CPU, &before));
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "tensor_empty|EiB",
                cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(INT64_C(1) << 59)));
    CHECK_OK(cuflash_memory_get_stats(CUFLASH_CPU, &after));
    CHECK(memcmp(&before, &after, sizeof before) == 0);
}

/* Attention takes its workspace from the same account; a workspace of the caller's needs none. */
static void test_limit_on_attention(void) {
    static const char *const names[] = {"attention_forward", "attention_backward", "reference"};
    const int64_t shape[] = {1, 2, 20, 8};
    cuflash_tensor q, o, lse, grad;
    cuflash_generator g = {.seed = 1};
    REQUIRE_OK(cuflash_tensor_empty(&q, CUFLASH_FLOAT32, CUFLASH_CPU, 4, shape));
    REQUIRE_OK(cuflash_tensor_empty(&o, CUFLASH_FLOAT32, CUFLASH_CPU, 4, shape));
    REQUIRE_OK(cuflash_tensor_empty(&grad, CUFLASH_FLOAT32, CUFLASH_CPU, 4, shape));
    REQUIRE_OK(cuflash_tensor_empty(&lse, CUFLASH_FLOAT32, CUFLASH_CPU, 3, shape));
    REQUIRE_OK(cuflash_random_normal(&q, &g, 0, 1));
    cuflash_attention a = {.struct_size = sizeof a, .q = &q, .k = &q, .v = &q, .o = &o, .lse = &lse, .d_o = &q, .dq = &grad};
    REQUIRE_OK(cuflash_attention_forward(&a));
    cuflash_status (*const calls[])(const cuflash_attention *) = {cuflash_attention_forward, cuflash_attention_backward,
                                                                  cuflash_reference_forward};
    for (int i = 0; i < 3; i++) {
        check_in("%s at the limit", names[i]);
        const cuflash_tensor *out = i == 1 ? &grad : &o;
        int64_t live = stats().live_bytes;
        REQUIRE_OK(cuflash_tensor_fill(out, -77));
        REQUIRE_OK(cuflash_memory_set_limit(CUFLASH_CPU, live + 64));
        char words[64];
        snprintf(words, sizeof words, "%s|KiB|limit", names[i]);
        CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, words, calls[i](&a));
        double least, most;
        CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_MIN, out, &least));
        CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_MAX, out, &most));
        CHECK(least == -77 && most == -77 && stats().live_bytes == live);
        if (i < 2) {
            size_t bytes = 0;
            CHECK_OK(cuflash_attention_workspace(&a, (cuflash_pass)i, &bytes));
            CHECK(bytes > 64);
            a.workspace = aligned_alloc(64, bytes + (64 - bytes % 64) % 64);
            a.workspace_bytes = bytes;
            CHECK_OK(calls[i](&a));
            free(a.workspace);
            a.workspace = NULL;
            a.workspace_bytes = 0;
            CHECK_OK(cuflash_memory_set_limit(CUFLASH_CPU, live + (int64_t)bytes)); /* just enough */
            CHECK_OK(calls[i](&a));
            CHECK_OK(cuflash_memory_set_limit(CUFLASH_CPU, live + (int64_t)bytes - 1));
            CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, words, calls[i](&a));
        }
        CHECK_OK(cuflash_memory_set_limit(CUFLASH_CPU, 0));
        CHECK_OK(calls[i](&a));
        CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_MIN, out, &least));
        CHECK(least > -77);
        CHECK(stats().live_bytes == live);
    }
    cuflash_tensor_release(&q);
    cuflash_tensor_release(&o);
    cuflash_tensor_release(&lse);
    cuflash_tensor_release(&grad);
    check_in("%s", "");
}

/* A backward of few queries, more than a block has, and many keys: little work, and a workspace that is kept for the next call. */
enum { FEW_QUERIES = 68, MANY_KEYS = 20000, WIDE = 256 };

typedef struct {
    cuflash_tensor q, k, o, d_o, dq, dk;
} wide_problem;

static cuflash_attention make_wide(wide_problem *x) {
    cuflash_generator g = {.seed = 3};
    cuflash_tensor *few[] = {&x->q, &x->o, &x->d_o, &x->dq}, *many[] = {&x->k, &x->dk};
    for (int i = 0; i < 4; i++)
        REQUIRE_OK(cuflash_tensor_empty(few[i], CUFLASH_FLOAT32, CUFLASH_CPU, 4, SHAPE(1, 1, FEW_QUERIES, WIDE)));
    for (int i = 0; i < 2; i++)
        REQUIRE_OK(cuflash_tensor_empty(many[i], CUFLASH_FLOAT32, CUFLASH_CPU, 4, SHAPE(1, 1, MANY_KEYS, WIDE)));
    REQUIRE_OK(cuflash_random_normal(&x->q, &g, 0, 1));
    REQUIRE_OK(cuflash_random_normal(&x->k, &g, 0, 1));
    REQUIRE_OK(cuflash_random_normal(&x->d_o, &g, 0, 1));
    cuflash_attention a = {.struct_size = sizeof a, .q = &x->q, .k = &x->k, .v = &x->k, .o = &x->o};
    REQUIRE_OK(cuflash_attention_forward(&a));
    a.d_o = &x->d_o, a.dq = &x->dq, a.dk = &x->dk;
    return a;
}

static void release_wide(wide_problem *x) {
    cuflash_tensor *all[] = {&x->q, &x->k, &x->o, &x->d_o, &x->dq, &x->dk};
    for (int i = 0; i < 6; i++) cuflash_tensor_release(all[i]);
}

static void *run_wide(void *attention) {
    for (int i = 0; i < 5; i++)
        if (cuflash_attention_backward(attention) != CUFLASH_SUCCESS) return (void *)1;
    return NULL;
}

/* Bytes of this process that are in memory; 0 where nothing tells, or where a sanitizer holds on to freed memory. */
static int64_t resident_bytes(void) {
    long long pages = 0;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    FILE *file = fopen("/proc/self/statm", "r");
    if (file && fscanf(file, "%*d %lld", &pages) != 1) pages = 0;
    if (file) fclose(file);
#endif
    return pages * 4096;
}

/* Calls at the same time do not get the same workspace; the one that is kept is nobody's, and can be given back. */
static void test_kept_workspace(void) {
    check_in("a workspace that is kept");
    const int64_t large = INT64_C(32) << 20;
    wide_problem one, two;
    cuflash_attention a = make_wide(&one), b = make_wide(&two);
    size_t bytes = 0;
    REQUIRE_OK(cuflash_attention_workspace(&a, CUFLASH_BACKWARD, &bytes));
    CHECK_F((int64_t)bytes > large, "a workspace of %zu bytes is not one that is kept", bytes);
    int64_t live = stats().live_bytes;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_wide, &a) == 0);
    CHECK(run_wide(&b) == NULL);
    void *failed;
    pthread_join(thread, &failed);
    CHECK(!failed && stats().live_bytes == live);
    CHECK(memcmp(one.dq.data, two.dq.data, FEW_QUERIES * WIDE * sizeof(float)) == 0);
    CHECK(memcmp(one.dk.data, two.dk.data, (size_t)MANY_KEYS * WIDE * sizeof(float)) == 0);

    REQUIRE_OK(cuflash_memory_set_limit(CUFLASH_CPU, live + large)); /* also of what is kept */
    CHECK_FAILS(CUFLASH_OUT_OF_MEMORY, "attention_backward|limit", cuflash_attention_backward(&a));
    REQUIRE_OK(cuflash_memory_set_limit(CUFLASH_CPU, 0));
    CHECK_OK(cuflash_attention_backward(&a));
    int64_t before = resident_bytes();
    CHECK_OK(cuflash_memory_trim(CUFLASH_CPU));
    int64_t after = resident_bytes();
    CHECK_F(before == 0 || before - after > large / 2, "%lld bytes were in memory, now %lld", (long long)before,
            (long long)after);
    CHECK_OK(cuflash_memory_trim(CUFLASH_CPU));
    CHECK_OK(cuflash_attention_backward(&a));
    CHECK(memcmp(one.dk.data, two.dk.data, (size_t)MANY_KEYS * WIDE * sizeof(float)) == 0);
    CHECK(stats().live_bytes == live);
    release_wide(&one);
    release_wide(&two);
    check_in("%s", "");
}

static void *take_and_give(void *shared) {
    for (int i = 0; i < 300; i++) {
        cuflash_tensor mine, view, theirs;
        if (cuflash_tensor_empty(&mine, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(1 + i % 50)) != CUFLASH_SUCCESS)
            return (void *)1;
        if (cuflash_tensor_alias(&view, &mine) != CUFLASH_SUCCESS) return (void *)1;
        if (cuflash_tensor_alias(&theirs, (const cuflash_tensor *)shared) != CUFLASH_SUCCESS) return (void *)1;
        cuflash_tensor_release(&mine);
        cuflash_tensor_release(&theirs);
        cuflash_tensor_release(&view);
    }
    return NULL;
}

/* Four threads allocate, share and release at once; every reference is counted. */
static void test_threads(void) {
    check_in("threads");
    cuflash_memory_stats start = stats();
    cuflash_tensor shared;
    REQUIRE_OK(cuflash_tensor_empty(&shared, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(10)));
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, take_and_give, &shared) == 0);
    for (int i = 0; i < 4; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        CHECK(!failed);
    }
    cuflash_memory_stats now = stats();
    CHECK(now.live_bytes == start.live_bytes + 40 && now.live_storages == start.live_storages + 1);
    CHECK(now.total_storages == start.total_storages + 1 + 4 * 300);
    cuflash_tensor_release(&shared);
    CHECK(stats().live_bytes == start.live_bytes);
    check_in("%s", "");
}

int main(void) {
    int64_t live = check_live_bytes();
    test_stats();
    test_refusals();
    test_limit_on_tensors();
    test_refused_by_the_system();
    test_limit_on_attention();
    test_kept_workspace();
    test_threads();
    CHECK(check_live_bytes() == live);
    return check_result();
}
