/* Random numbers: Philox against its published answers, and against a second implementation of how words become numbers. */
#include <stdint.h>

#include "check.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

typedef struct {
    uint32_t word[4];
} words;

/* Philox4x32-10 as the paper describes it (Salmon et al., SC 2011, section 3.3). */
static words philox(words counter, uint32_t key0, uint32_t key1) {
    words x = counter;
    for (int round = 0; round < 10; round++) {
        uint64_t left = (uint64_t)0xD2511F53u * x.word[0], right = (uint64_t)0xCD9E8D57u * x.word[2];
        x = (words){{(uint32_t)(right >> 32) ^ x.word[1] ^ key0, (uint32_t)right, (uint32_t)(left >> 32) ^ x.word[3] ^ key1,
                     (uint32_t)left}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return x;
}

static words block(uint64_t seed, uint64_t number) {
    return philox((words){{(uint32_t)number, (uint32_t)(number >> 32), 0, 0}}, (uint32_t)seed, (uint32_t)(seed >> 32));
}

/* The known answers that come with the authors' Random123. */
static void test_known_answers(void) {
    static const struct {
        words counter;
        uint32_t key[2];
        words answer;
    } known[] = {
        {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
        {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
         {0xffffffff, 0xffffffff},
         {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
         {0xa4093822, 0x299f31d0},
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
    };
    for (int i = 0; i < COUNT_OF(known); i++) {
        words got = philox(known[i].counter, known[i].key[0], known[i].key[1]);
        CHECK(memcmp(&got, &known[i].answer, sizeof got) == 0);
    }
}

static double uniform_word(uint32_t x, int bits) {
    return ldexp((double)(x >> (32 - bits)), -bits);
}

static const struct {
    cuflash_dtype dtype;
    int bits; /* of a uniform number: as many as the dtype holds exactly below 1 */
} UNIFORM[] = {{CUFLASH_FLOAT32, 24}, {CUFLASH_FLOAT16, 11}, {CUFLASH_BFLOAT16, 8}};

static const struct {
    uint64_t seed, offset;
} STREAMS[] = {{0, 0}, {42, 0}, {0, 1}, {0x123456789abcdef0, 0xfedcba98}, {UINT64_MAX, 0xffffffffu}, {7, UINT64_MAX - 3}};

/* The library's words are Philox's, for every stream. */
static void test_words(void) {
    enum { N = 1003 };
    cuflash_tensor t;
    double value;
    for (int s = 0; s < COUNT_OF(STREAMS); s++) {
        for (int d = 0; d < COUNT_OF(UNIFORM); d++) {
            check_in("stream %d, uniform %s", s, cuflash_dtype_name(UNIFORM[d].dtype));
            cuflash_generator g = {STREAMS[s].seed, STREAMS[s].offset};
            REQUIRE_OK(cuflash_tensor_empty(&t, UNIFORM[d].dtype, CUFLASH_CPU, 1, SHAPE(N)));
            CHECK_OK(cuflash_random_uniform(&t, &g, 0, 1));
            CHECK(g.seed == STREAMS[s].seed && g.offset == STREAMS[s].offset + (N + 3) / 4);
            for (int64_t i = 0; i < N; i++) {
                REQUIRE_OK(cuflash_tensor_get(&t, &i, &value));
                double expected =
                    uniform_word(block(STREAMS[s].seed, STREAMS[s].offset + (uint64_t)i / 4).word[i % 4], UNIFORM[d].bits);
                CHECK_F(value == expected, "number %d: expected %.9g, got %.9g", (int)i, expected, value);
            }
            cuflash_tensor_release(&t);
        }
        check_in("stream %d, uniform float64", s);
        cuflash_generator g = {STREAMS[s].seed, STREAMS[s].offset};
        REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT64, CUFLASH_CPU, 1, SHAPE(N)));
        CHECK_OK(cuflash_random_uniform(&t, &g, 0, 1));
        CHECK(g.offset == STREAMS[s].offset + (N + 1) / 2);
        const double *x = t.data;
        for (int i = 0; i < N; i++) {
            words w = block(STREAMS[s].seed, STREAMS[s].offset + (uint64_t)i / 2);
            double expected = ldexp((double)((uint64_t)w.word[i % 2 * 2] << 21 | w.word[i % 2 * 2 + 1] >> 11), -53);
            CHECK_F(x[i] == expected, "number %d: expected %.17g, got %.17g", i, expected, x[i]);
        }
        check_in("stream %d, normal float64", s);
        g = (cuflash_generator){STREAMS[s].seed, STREAMS[s].offset};
        CHECK_OK(cuflash_random_normal(&t, &g, 0, 1));
        CHECK(g.offset == STREAMS[s].offset + (N + 3) / 4);
        for (int i = 0; i < N; i++) { /* Box and Muller: a pair of words, a pair of numbers */
            words w = block(STREAMS[s].seed, STREAMS[s].offset + (uint64_t)i / 4);
            const uint32_t *pair = w.word + i % 4 / 2 * 2;
            double radius = sqrt(-2 * log((2.0 * pair[0] + 1) * 0x1p-33)),
                   angle = 2 * acos(-1) * ((double)pair[1] + 0.5) * 0x1p-32;
            CHECK_NEAR(x[i], radius * (i % 2 ? sin(angle) : cos(angle)), 1e-13);
        }
        cuflash_tensor_release(&t);
    }
    check_in("%s", "");
}

/* Element i in row-major order gets number i: whatever the strides, the threads and the cuts. */
static void test_same_values(void) {
    int before = cuflash_get_num_threads();
    static const cuflash_dtype dtypes[] = {CUFLASH_FLOAT32, CUFLASH_FLOAT16, CUFLASH_BFLOAT16, CUFLASH_FLOAT64};
    for (int d = 0; d < 4; d++)
        for (int normal = 0; normal < 2; normal++) {
            check_in("the same %s %s values", normal ? "normal" : "uniform", cuflash_dtype_name(dtypes[d]));
            cuflash_status (*fill)(const cuflash_tensor *, cuflash_generator *, double, double) =
                normal ? cuflash_random_normal : cuflash_random_uniform;
            cuflash_tensor t, u, v;
            REQUIRE_OK(cuflash_tensor_empty(&t, dtypes[d], CUFLASH_CPU, 3, SHAPE(67, 3, 601)));
            REQUIRE_OK(cuflash_tensor_empty(&u, dtypes[d], CUFLASH_CPU, 3, SHAPE(610, 3, 67)));
            REQUIRE_OK(cuflash_tensor_narrow(&v, &u, 0, 4, 601));
            REQUIRE_OK(cuflash_tensor_transpose(&v, &v, 0, 2)); /* 67 x 3 x 601 as well */
            cuflash_close_report report;
            cuflash_generator g = {9, 100}, first;
            CHECK_OK(cuflash_set_num_threads(1));
            CHECK_OK(fill(&t, &g, 0.5, 2));
            first = g;
            for (int threads = 1; threads <= 7; threads += 2) {
                CHECK_OK(cuflash_set_num_threads(threads));
                CHECK_OK(cuflash_tensor_fill(&u, 0));
                g = (cuflash_generator){9, 100};
                CHECK_OK(fill(&v, &g, 0.5, 2));
                CHECK(g.offset == first.offset);
                CHECK_OK(cuflash_tensor_compare(&v, &t, 0, 0, false, &report));
                CHECK_F(report.n_bad == 0, "%d threads: %lld values differ", threads, (long long)report.n_bad);
            }
            cuflash_tensor_release(&v);
            /* Two fills of 1200 numbers are one of 2400: whole blocks, so nothing is left over. */
            double whole[2400], parts[2400];
            cuflash_tensor a, b;
            REQUIRE_OK(cuflash_tensor_borrow(&a, whole, dtypes[d], CUFLASH_CPU, 1, SHAPE(2400), NULL));
            g = (cuflash_generator){3, 5};
            CHECK_OK(fill(&a, &g, 0.5, 2));
            cuflash_generator again = {3, 5};
            REQUIRE_OK(cuflash_tensor_borrow(&b, parts, dtypes[d], CUFLASH_CPU, 1, SHAPE(2400), NULL));
            for (int half = 0; half < 2; half++) {
                REQUIRE_OK(cuflash_tensor_narrow(&v, &b, 0, half * 1200, 1200));
                CHECK_OK(fill(&v, &again, 0.5, 2));
            }
            CHECK(again.offset == g.offset);
            CHECK(memcmp(whole, parts, 2400 * cuflash_dtype_size(dtypes[d])) == 0);
            cuflash_tensor_release(&t);
            cuflash_tensor_release(&u);
        }
    CHECK_OK(cuflash_set_num_threads(before));
    check_in("%s", "");
}

/* 10^6 numbers: the moments lie within five standard errors. The seed is fixed, so this cannot fail by chance. */
static void test_moments(void) {
    const int64_t n = 1000000;
    cuflash_tensor t;
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT64, CUFLASH_CPU, 1, &n));
    const double *x = t.data;
    for (int normal = 0; normal < 2; normal++) {
        check_in("moments of the %s numbers", normal ? "normal" : "uniform");
        cuflash_generator g = {.seed = 2022};
        if (normal)
            CHECK_OK(cuflash_random_normal(&t, &g, 0, 1));
        else
            CHECK_OK(cuflash_random_uniform(&t, &g, -1, 1));
        double moment[5] = {0}, product = 0;
        for (int64_t i = 0; i < n; i++) {
            for (int k = 1; k <= 4; k++) moment[k] += pow(x[i], k) / (double)n;
            product += i ? x[i] * x[i - 1] / (double)n : 0;
        }
        double variance = normal ? 1 : 1.0 / 3, fourth = normal ? 3 : 0.2, error = 5 / sqrt((double)n);
        CHECK_NEAR(moment[1], 0, error * sqrt(variance));
        CHECK_NEAR(moment[2], variance, error * sqrt(fourth - variance * variance));
        CHECK_NEAR(moment[3], 0, error * sqrt(normal ? 15 : 1.0 / 7));
        CHECK_NEAR(moment[4], fourth, error * sqrt(normal ? 105 - 9 : 1.0 / 9 - 0.04));
        CHECK_NEAR(product, 0, error * variance);
    }
    check_in("mean and standard deviation");
    cuflash_generator g = {1, 2}, same = g;
    cuflash_tensor u;
    REQUIRE_OK(cuflash_tensor_empty(&u, CUFLASH_FLOAT64, CUFLASH_CPU, 1, &n));
    CHECK_OK(cuflash_random_normal(&t, &g, 0, 1));
    CHECK_OK(cuflash_random_normal(&u, &same, 3, 0.25));
    bool right = true;
    for (int64_t i = 0; i < n; i++) right = right && fabs(((double *)u.data)[i] - (3 + 0.25 * x[i])) <= 1e-15 * 8;
    CHECK(right);
    CHECK_OK(cuflash_random_normal(&u, &same, -2, 0));
    double low, high;
    CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_MIN, &u, &low));
    CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_MAX, &u, &high));
    CHECK(low == -2 && high == -2);
    cuflash_tensor_release(&t);
    cuflash_tensor_release(&u);
    check_in("%s", "");
}

/* In [low, high), whatever the dtype rounds to; and all of that range. */
static void test_range(void) {
    static const struct {
        double low, high;
    } ranges[] = {{0, 1},        {-1, 1},    {1, 1.0078125},    {-3, 1000},    {0.5, 0.75},    {1, 1.5},
                  {2, 2.015625}, {-1e-3, 0}, {-0.1875, -0.125}, {1.0004, 1.5}, {-1.5, -1.0004}};
    static const cuflash_dtype dtypes[] = {CUFLASH_FLOAT32, CUFLASH_FLOAT16, CUFLASH_BFLOAT16, CUFLASH_FLOAT64};
    for (int d = 0; d < 4; d++)
        for (int r = 0; r < COUNT_OF(ranges); r++) {
            double low = ranges[r].low, high = ranges[r].high, least, most;
            check_in("%s in [%g, %g)", cuflash_dtype_name(dtypes[d]), low, high);
            cuflash_tensor t;
            cuflash_generator g = {.seed = 77};
            REQUIRE_OK(cuflash_tensor_empty(&t, dtypes[d], CUFLASH_CPU, 1, SHAPE(40000)));
            CHECK_OK(cuflash_random_uniform(&t, &g, low, high));
            CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_MIN, &t, &least));
            CHECK_OK(cuflash_tensor_reduce_all(CUFLASH_MAX, &t, &most));
            CHECK_F(least >= low && most < high, "got %.9g to %.9g", least, most);
            double step = dtypes[d] == CUFLASH_BFLOAT16 ? 0x1p-7 : dtypes[d] == CUFLASH_FLOAT16 ? 0x1p-10 : 0;
            double slack = 0.01 * (high - low) + step * fmax(fabs(low), fabs(high));
            CHECK_F(least <= low + slack && most >= high - slack, "got only %.9g to %.9g", least, most);
            cuflash_tensor_release(&t);
        }
    check_in("a range without a number of the dtype");
    cuflash_tensor t;
    cuflash_generator g = {.seed = 77};
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT16, CUFLASH_CPU, 1, SHAPE(10)));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "random_uniform|'high'|float16", cuflash_random_uniform(&t, &g, 1.0006, 1.0009));
    CHECK(g.offset == 0);
    cuflash_tensor_release(&t);
    check_in("%s", "");
}

static void test_refusals(void) {
    check_in("refusals");
    cuflash_tensor t, freed = {0}, repeated;
    cuflash_generator g = {1, 2};
    REQUIRE_OK(cuflash_tensor_empty(&t, CUFLASH_FLOAT32, CUFLASH_CPU, 1, SHAPE(4)));
    REQUIRE_OK(cuflash_tensor_expand(&repeated, &t, 2, SHAPE(3, 4)));
    REQUIRE_OK(cuflash_tensor_fill(&t, 8));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "random_uniform|'out'", cuflash_random_uniform(NULL, &g, 0, 1));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "random_uniform|'out'|freed", cuflash_random_uniform(&freed, &g, 0, 1));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "random_uniform|'generator'", cuflash_random_uniform(&t, NULL, 0, 1));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "random_uniform|'out'|stride 0", cuflash_random_uniform(&repeated, &g, 0, 1));
    static const double ranges[][2] = {{1, 1}, {2, 1}, {NAN, 1}, {0, NAN}, {0, INFINITY}, {-INFINITY, 0}, {-1.7e308, 1.7e308}};
    for (int i = 0; i < COUNT_OF(ranges); i++)
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "random_uniform|low|high",
                    cuflash_random_uniform(&t, &g, ranges[i][0], ranges[i][1]));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "random_normal|'out'", cuflash_random_normal(NULL, &g, 0, 1));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "random_normal|'out'|freed", cuflash_random_normal(&freed, &g, 0, 1));
    CHECK_FAILS(CUFLASH_NULL_POINTER, "random_normal|'generator'", cuflash_random_normal(&t, NULL, 0, 1));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "random_normal|'out'|stride 0", cuflash_random_normal(&repeated, &g, 0, 1));
    static const double parameters[][2] = {{0, -1}, {NAN, 1}, {0, NAN}, {INFINITY, 1}, {0, INFINITY}};
    for (int i = 0; i < COUNT_OF(parameters); i++)
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "random_normal|std",
                    cuflash_random_normal(&t, &g, parameters[i][0], parameters[i][1]));
    CHECK(g.seed == 1 && g.offset == 2);
    for (int64_t i = 0; i < 4; i++) CHECK(((float *)t.data)[i] == 8);
    cuflash_tensor_release(&repeated);
    cuflash_tensor_release(&t);
    check_in("%s", "");
}

int main(void) {
    int64_t live = check_live_bytes();
    test_known_answers();
    test_words();
    test_same_values();
    test_moments();
    test_range();
    test_refusals();
    CHECK(check_live_bytes() == live);
    return check_result();
}
