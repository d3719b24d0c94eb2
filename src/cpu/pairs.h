/* Products of pairs of bfloat16, by tiles (amx.h) or vectors (dots.h): their operands, how vectors of float32 become such, and the
 * numbers that they do not take. A left operand has rows of k, 32 numbers at a time; a right one has pairs of k, each of all
 * columns.
 *
 * A number of float16, or one of P or dS beside it, is the sum of two of bfloat16: operands have two planes then, of the larger
 * ones and of what they miss, and a product is the sum of three or four products of planes. Theirs are exact in float32. */
#ifndef CUFLASH_CPU_PAIRS_H
#define CUFLASH_CPU_PAIRS_H

#include <immintrin.h>

#include "tile.h"

enum {
    BF16_ROWS = 16,               /* of a left operand, at least */
    BF16_K = 32,                  /* numbers of its rows at a time */
    BF16_BLOCK_N = 128,           /* keys at a time */
    BF16_PAIRS = 2 * BLOCK_M * 2, /* bytes of a pair of k, of all rows of a block */
};

/* A left operand: bytes from a row to the next, from 32 of k to the next, and from a plane to the next. */
typedef struct {
    const char *data;
    int64_t row, step, plane;
} bf16_left;

/* Pairs: bytes from a pair of k to the next, and from a plane to the next. */
typedef struct {
    const char *data;
    int64_t pair, plane;
} bf16_right;

/* A product is the sum of the last so many of these products of planes, the smallest first: of one plane, of two without what both
 * miss, or of all. */
enum { BF16_MOST_PLANES = 2, BF16_ONE_TERM = 1, BF16_MOST_TERMS = 3, BF16_ALL_TERMS = 4 };
static const struct { int left, right; } bf16_terms[BF16_ALL_TERMS] = {{1, 1}, {1, 0}, {0, 1}, {0, 0}};

/* A call with planes as a constant N. */
#define BF16_WITH_PLANES(planes, CALL)                                                                                         \
    do {                                                                                                                       \
        if ((planes) == 1) {                                                                                                   \
            enum { N = 1 };                                                                                                    \
            CALL;                                                                                                              \
        } else {                                                                                                               \
            enum { N = 2 };                                                                                                    \
            CALL;                                                                                                              \
        }                                                                                                                      \
    } while (0)

#ifdef __AMX_BF16__
#include "amx.h"
#else
#include "dots.h"
#endif

/* 2^x for x <= 0, within 3e-6 of it. */
static inline __m512 bf16_exp2(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT); /* -1/2 to 1/2; 0 of -infinity */
    __m512 p = _mm512_set1_ps(0.00958286420778814f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0559064537211178f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240240985954843f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693124190085566f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    return _mm512_scalef_ps(p, _mm512_sub_ps(x, r));
}

/* The planes' numbers of a vector: each is rounded to bfloat16, and taken from what there is for the next. */
static inline __m512 bf16_take(__m512 x, __m512i rounded) {
    return _mm512_sub_ps(x, (__m512)_mm512_and_si512(rounded, _mm512_set1_epi32((int32_t)0xffff0000)));
}

/* Two vectors of lanes as pairs of bfloat16, N planes of them, rounded to the nearest, halves away from 0: by integers that is 2.5
 * clocks of an Intel core, by the conversion and a permutation 3. */
static inline __attribute__((always_inline)) void bf16_store_pairs(const int N, char *to, int64_t plane, __m512 first,
                                                                   __m512 second) {
    __m512i half = _mm512_set1_epi32(0x8000);
#pragma GCC unroll 2
    for (int i = 0; i < N; i++) {
        __m512i one = _mm512_add_epi32((__m512i)first, half), two = _mm512_add_epi32((__m512i)second, half);
        _mm512_store_si512(to + i * plane, _mm512_mask_mov_epi16(two, 0x55555555, _mm512_srli_epi32(one, 16)));
        if (i + 1 < N) first = bf16_take(first, one), second = bf16_take(second, two);
    }
}

/* 32 floats as bfloat16, and what they miss. */
static inline __m512i bf16_round(__m512 *low, __m512 *high, const int take) {
    __m512i x = (__m512i)_mm512_cvtne2ps_pbh(*high, *low);
    if (take) {
        *low = bf16_take(*low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16));
        *high = bf16_take(*high, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16));
    }
    return x;
}

/* A key's V vectors of lanes, one or two, as bfloat16: N planes, so many numbers from one to the next. */
static inline __attribute__((always_inline)) void bf16_store_row(const int N, const int V, uint16_t *to, int64_t plane,
                                                                 __m512 *x) {
    __m512 low = x[0], high = V == 2 ? x[1] : _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int i = 0; i < N; i++) {
        __m512i row = bf16_round(&low, &high, i + 1 < N);
        if (V == 2)
            _mm512_store_si512(to + i * plane, row);
        else
            _mm256_store_si256((__m256i *)(void *)(to + i * plane), _mm512_castsi512_si256(row));
    }
}

/* Times so much, of these lanes: others keep their planes, which may not be how their sum would be split. */
static inline __attribute__((always_inline)) void bf16_scale_pairs(const int N, char *pairs, int64_t plane, __mmask16 lanes,
                                                                   __m512 factor) {
    __m512 first = _mm512_setzero_ps(), second = first;
    char scaled[BF16_MOST_PLANES * 64] __attribute__((aligned(64)));
    for (int i = 0; i < N; i++) {
        __m512i x = _mm512_load_si512(pairs + i * plane);
        first = _mm512_add_ps(first, (__m512)_mm512_slli_epi32(x, 16));
        second = _mm512_add_ps(second, (__m512)_mm512_and_si512(x, _mm512_set1_epi32((int32_t)0xffff0000)));
    }
    bf16_store_pairs(N, scaled, 64, _mm512_mul_ps(first, factor), _mm512_mul_ps(second, factor));
    for (int i = 0; i < N; i++) _mm512_mask_store_epi32(pairs + i * plane, lanes, _mm512_load_si512(scaled + i * 64));
}

/* From a plane of P's or dS' pairs to the next. */
enum { BF16_PAIRS_PLANE = BF16_BLOCK_N * BLOCK_M * 2 };

/* A vector of scores as probabilities: 2^((s - max) c - LESS). */
static inline __m512 bf16_probabilities(const float *s, __m512 max, __m512 c) {
    return bf16_exp2(_mm512_fmsub_ps(_mm512_sub_ps(_mm512_load_ps(s), max), c, _mm512_set1_ps(LESS)));
}

/* As softmax_lanes, of all lanes, from scores to pairs of probabilities; pairs of keys up to a multiple of 32, 0 where there
 * are none. They come behind `done` keys' that no output has yet, and that are scaled down with it. */
static inline __attribute__((always_inline)) void bf16_softmax_lanes(const int N, const int V, const float *s, char *pairs,
                                                                     int64_t done, int64_t count, float scale, float *max,
                                                                     float *sum, float *out, int64_t dim) {
    __mmask16 moved[4];
    __m512 m[4], base[4], total[4], c = _mm512_set1_ps(scale), none = _mm512_set1_ps(-INFINITY);
    for (int v = 0; v < V; v++) m[v] = _mm512_load_ps(max + v * 16);
    for (int64_t j = 0; j < count; j++)
        for (int v = 0; v < V; v++) m[v] = _mm512_max_ps(_mm512_load_ps(s + j * BLOCK_M + v * 16), m[v]);
    for (int v = 0; v < V; v++) {
        __m512 before = _mm512_load_ps(max + v * 16), above = _mm512_mul_ps(_mm512_sub_ps(m[v], before), c);
        moved[v] = _mm512_cmp_ps_mask(above, _mm512_set1_ps(MOST_EXPONENT), _CMP_GT_OQ); /* from -inf, too */
        m[v] = _mm512_mask_mov_ps(before, moved[v], m[v]);
        base[v] = _mm512_mask_mov_ps(m[v], _mm512_cmpeq_ps_mask(m[v], none), _mm512_setzero_ps());
        total[v] = _mm512_setzero_ps();
    }
    char *to = pairs + done / 2 * BF16_PAIRS;
    int64_t j = 0;
    for (; j + 2 <= count; j += 2)
        for (int v = 0; v < V; v++) {
            const float *at = s + j * BLOCK_M + v * 16;
            __m512 first = bf16_probabilities(at, base[v], c);
            __m512 second = bf16_probabilities(at + BLOCK_M, base[v], c);
            total[v] = _mm512_add_ps(total[v], _mm512_add_ps(first, second));
            bf16_store_pairs(N, to + j / 2 * BF16_PAIRS + v * 64, BF16_PAIRS_PLANE, first, second);
        }
    for (; j < cuflash_round_up(count, BF16_K); j += 2)
        for (int v = 0; v < V; v++) {
            __m512 first = _mm512_setzero_ps();
            if (j < count) {
                first = bf16_probabilities(s + j * BLOCK_M + v * 16, base[v], c);
                total[v] = _mm512_add_ps(total[v], first);
            }
            bf16_store_pairs(N, to + j / 2 * BF16_PAIRS + v * 64, BF16_PAIRS_PLANE, first, _mm512_setzero_ps());
        }
    for (int v = 0; v < V; v++) {
        __m512 before = _mm512_load_ps(max + v * 16);
        __m512 shrink = bf16_exp2(_mm512_mul_ps(_mm512_sub_ps(before, base[v]), c));
        _mm512_store_ps(sum + v * 16, _mm512_fmadd_ps(_mm512_load_ps(sum + v * 16), shrink, total[v]));
        _mm512_store_ps(max + v * 16, m[v]);
        if (moved[v] == 0) continue;
        for (int64_t i = 0; i < done; i += 2)
            bf16_scale_pairs(N, pairs + i / 2 * BF16_PAIRS + v * 64, BF16_PAIRS_PLANE, moved[v], shrink);
        for (int64_t d = 0; d < dim; d++) {
            float *at = out + d * BLOCK_M + v * 16;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
        }
    }
}

static inline __attribute__((always_inline)) void bf16_softmax_planes(const int N, int64_t lanes, const float *s, char *pairs,
                                                                      int64_t done, int64_t count, float c, float *max,
                                                                      float *sum, float *out, int64_t dim) {
    int64_t lane = 0;
    for (; lane + 64 <= lanes; lane += 64)
        bf16_softmax_lanes(N, 4, s + lane, pairs + lane * 4, done, count, c, max + lane, sum + lane, out + lane, dim);
    for (; lane < lanes; lane += 16)
        bf16_softmax_lanes(N, 1, s + lane, pairs + lane * 4, done, count, c, max + lane, sum + lane, out + lane, dim);
}

static void bf16_softmax(int64_t planes, int64_t lanes, const float *s, char *pairs, int64_t done, int64_t count, float c,
                         float *max, float *sum, float *out, int64_t dim) {
    BF16_WITH_PLANES(planes, bf16_softmax_planes(N, lanes, s, pairs, done, count, c, max, sum, out, dim));
}

/* ---- Numbers that these products do not take ------------------------------------------------------
 *
 * They take denormal numbers for 0, in operands and products; and infinities and NaN must not meet the probability 0 of what hides
 * them, nor are they sums of two. What meets probabilities, and is turned or in pairs of rows for that, has zeros in the place of
 * odd numbers; in what scores are made of, denormal ones are 0 already, and there are zeros for infinities and NaN of float16.
 * Where there are any (hardly ever), what they come to is added by itself, so that rows and keys that they do not concern have the
 * same bits as without them. */

enum { ODD_TURNED = 1, MISSING_IN_PLACE = 2 }; /* there are some among 128 keys */

static int is_half(cuflash_dtype dtype) {
    return dtype == CUFLASH_FLOAT16;
}

static float bf16_value(cuflash_dtype dtype, uint16_t x) {
    return is_half(dtype) ? cuflash_half_to_float(x) : cuflash_bfloat_to_float(x);
}

enum { HALF_INFINITY = 0x7c00, BF16_INFINITY = 0x7f80 };

/* Is it missing in scores? */
static int is_missing(cuflash_dtype dtype, uint16_t x) {
    if (is_half(dtype)) return (x & 0x7fff) >= HALF_INFINITY;
    return (x & BF16_INFINITY) == 0 && (x & 0x7f) != 0;
}

/* Below 2^-100, and not 0: times a probability that counts it may be denormal. Float16 has none. */
enum { SMALL = (127 - 100) << 7 };

static int is_odd(cuflash_dtype dtype, uint16_t x) {
    if (is_half(dtype)) return (x & 0x7fff) >= HALF_INFINITY;
    return ((x & 0x7fff) != 0 && (x & 0x7fff) < SMALL) || (x & 0x7fff) >= BF16_INFINITY;
}

/* Which of a row's so many numbers from d on there are. */
static inline __mmask32 bf16_inside(int64_t dim, int64_t d) {
    return dim - d >= 32 ? 0xffffffff : (1u << (dim - d)) - 1;
}

/* Which of 32 numbers are odd. */
static inline __mmask32 odd_lanes(__m512i x) {
    __m512i size = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
    return (_mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(SMALL)) & _mm512_test_epi16_mask(size, size)) |
           _mm512_cmpge_epu16_mask(size, _mm512_set1_epi16(BF16_INFINITY));
}

/* The smallest size of numbers but 0, less 1, and the largest, of 32 lanes: whether any of them is missing, or odd. */
typedef struct {
    __m512i least, most;
} bf16_sizes;

static const bf16_sizes bf16_no_sizes = {{-1, -1, -1, -1, -1, -1, -1, -1}, {0}};

/* Those of a row, too. */
static inline void bf16_add_sizes(bf16_sizes *sizes, const void *row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 32) {
        __m512i x = _mm512_maskz_loadu_epi16(bf16_inside(dim, d), (const uint16_t *)row + d);
        x = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
        sizes->least = _mm512_min_epu16(sizes->least, _mm512_sub_epi16(x, _mm512_set1_epi16(1)));
        sizes->most = _mm512_max_epu16(sizes->most, x);
    }
}

static int some_not_finite(const bf16_sizes *sizes, int infinity) {
    return _mm512_cmpge_epu16_mask(sizes->most, _mm512_set1_epi16((int16_t)infinity)) != 0;
}

static int some_missing(cuflash_dtype dtype, const bf16_sizes *sizes) {
    if (is_half(dtype)) return some_not_finite(sizes, HALF_INFINITY);
    return _mm512_cmplt_epu16_mask(sizes->least, _mm512_set1_epi16(0x7f)) != 0;
}

static int some_odd(cuflash_dtype dtype, const bf16_sizes *sizes) {
    if (is_half(dtype)) return some_not_finite(sizes, HALF_INFINITY);
    return some_not_finite(sizes, BF16_INFINITY) || _mm512_cmplt_epu16_mask(sizes->least, _mm512_set1_epi16(SMALL - 1)) != 0;
}

static const uint16_t *bf16_key_row(const row_block *block, const cuflash_operand *x, int64_t key) {
    return (const uint16_t *)(const void *)cuflash_row(x, block->batch, block->head_kv, key);
}

static const uint16_t *bf16_query_row(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x,
                                      int64_t r) {
    return (const uint16_t *)(const void *)row_address(plan, block, x, r);
}

/* s[key][row] += x y over the numbers of keys' x and rows' y that are missing; s has rows of s_row numbers. */
static void bf16_add_scores(const cuflash_cpu_plan *plan, const row_block *block, int64_t first, int64_t count,
                            const cuflash_operand *keys, const cuflash_operand *rows, int64_t dim, float factor, float *s,
                            int64_t s_row) {
    cuflash_dtype type = keys->dtype;
    for (int64_t r = 0; r < block->rows; r++) {
        const uint16_t *y = bf16_query_row(plan, block, rows, r);
        for (int64_t j = 0; j < count; j++) {
            const uint16_t *x = bf16_key_row(block, keys, first + j);
            for (int64_t d = 0; d < dim; d++)
                if (is_missing(type, x[d]) || is_missing(type, y[d]))
                    s[j * s_row + r] += factor * bf16_value(type, x[d]) * bf16_value(type, y[d]);
        }
    }
}

/* A number of P or dS: of all planes, so many numbers from one to the next. */
static float bf16_weight(const uint16_t *at, int64_t planes, int64_t plane) {
    float sum = 0;
    for (int64_t i = 0; i < planes; i++) sum += cuflash_bfloat_to_float(at[i * plane]);
    return sum;
}

/* out[d][row] += x weight over the odd numbers of keys' x. */
static void bf16_add_to_lanes(const cuflash_cpu_plan *plan, const row_block *block, int64_t first, int64_t count,
                              const cuflash_operand *keys, int64_t dim, const char *pairs, float *out) {
    const uint16_t *weight = (const uint16_t *)(const void *)pairs;
    for (int64_t j = 0; j < count; j++)
        for (int64_t d = 0; d < dim; d++) {
            uint16_t x = bf16_key_row(block, keys, first + j)[d];
            if (!is_odd(keys->dtype, x)) continue;
            for (int64_t r = 0; r < block->rows; r++) {
                const uint16_t *at = weight + j / 2 * (BF16_PAIRS / 2) + r * 2 + j % 2;
                if (block->limit[r] > first + j)
                    out[d * BLOCK_M + r] += bf16_weight(at, plan->planes, BF16_PAIRS_PLANE / 2) * bf16_value(keys->dtype, x);
            }
        }
}

/* Columns of P and dS of a backward: rows of all blocks that go through the keys together. */
static int64_t bf16_columns(const cuflash_cpu_plan *plan) {
    return plan->together * BLOCK_M;
}

/* out[key][d] += weight[key][row] y over the odd numbers of rows' y. */
static void bf16_add_to_keys(const cuflash_cpu_plan *plan, const row_block *block, int64_t first, int64_t count,
                             const cuflash_operand *rows, int64_t dim, const char *weights, float *out, int64_t pad) {
    const uint16_t *weight = (const uint16_t *)(const void *)weights;
    int64_t columns = bf16_columns(plan);
    for (int64_t r = 0; r < block->rows; r++)
        for (int64_t d = 0; d < dim; d++) {
            uint16_t y = bf16_query_row(plan, block, rows, r)[d];
            if (!is_odd(rows->dtype, y)) continue;
            for (int64_t j = 0; j < count && block->limit[r] > first + j; j++)
                out[j * pad + d] +=
                    bf16_weight(weight + j * plan->planes * columns + r, plan->planes, columns) * bf16_value(rows->dtype, y);
        }
}

#endif
