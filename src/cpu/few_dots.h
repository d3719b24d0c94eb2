/* Products of pairs for few rows by AVX512-BF16 (dots.h): pairs of d in scores, where sums are made across lanes as in few.h, and of
 * keys in outputs, lanes d. */
#ifndef CUFLASH_CPU_FEW_DOTS_H
#define CUFLASH_CPU_FEW_DOTS_H

#include "few_pairs.h"

enum { LEAST_FEW_PAIRS = 4 }; /* rows that products are made for, at least */

/* A row of Q, dim numbers rounded up to 32, as score_few_pairs takes it: [dim / 32][R][32]. */
static inline void few_put_row(int R, int64_t r, int64_t dim, const uint16_t *row, uint16_t *q) {
    for (int64_t d = 0; d < dim; d += 32) memcpy(q + (d / 32 * R + r) * 32, row + d, 64);
}

/* As score_few; says whether K has denormal numbers. */
static inline __attribute__((always_inline)) int score_few_pairs(const int R, int64_t count, int64_t dim, const char *k,
                                                                 int64_t k_row, const uint16_t *q, float *s) {
    const int K = VL / R;
    __m512i least = _mm512_set1_epi16(-1); /* of twice a number's bits */
    for (int64_t j = 0; j < count; j += K) {
        const char *key[8];
        vf sum[VL];
#pragma GCC unroll 4
        for (int i = 0; i < K; i++) key[i] = k + (j + i < count ? j + i : count - 1) * k_row;
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) sum[i] = (vf){0};
        for (int64_t d = 0; d < dim; d += 32) {
            __mmask32 inside = bf16_inside(dim, d);
            __m512i x[8];
#pragma GCC unroll 4
            for (int i = 0; i < K; i++) {
                __builtin_prefetch(key[i] + AHEAD * k_row + d * 2);
                x[i] = _mm512_maskz_loadu_epi16(inside, key[i] + d * 2);
                least = _mm512_mask_min_epu16(least, inside, least, _mm512_add_epi16(x[i], x[i]));
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                __m512bh y = (__m512bh)_mm512_loadu_si512(q + d * R + r * 32);
#pragma GCC unroll 4
                for (int i = 0; i < K; i++) {
                    vf *to = sum + i * R + r;
                    *to = (vf)_mm512_dpbf16_ps((__m512)*to, (__m512bh)x[i], y);
                }
            }
        }
        v_store(s + j * R, v_sums(sum));
    }
    return few_may_be_denormal(least) && few_denormal(count, dim, k, k_row);
}

/* P of an even number of keys, p[key][R], as pairs [key / 2][R][2]. */
static inline __attribute__((always_inline)) void few_pair_probabilities(const int R, int64_t count, const float *p, char *to) {
    int32_t index[VL];
    for (int i = 0; i < VL; i++) index[i] = i / R * 2 * R + i % R;
    __m512i even = _mm512_loadu_si512(index), odd = _mm512_add_epi32(even, _mm512_set1_epi32(R)); /* keys in two vectors */
    for (int64_t i = 0; i < count * R; i += 2 * VL, to += 64) {
        __m512 x = _mm512_load_ps(p + i), y = _mm512_load_ps(p + i + VL);
        bf16_store_pairs(1, to, 64, _mm512_permutex2var_ps(x, even, y), _mm512_permutex2var_ps(x, odd, y));
    }
}

/* 32 B numbers, or `left`, of out[row] += P V of `count` keys, of M rows, zeros for odd numbers of V if there are some. Or else, unless
 * it has any: then it does nothing. Says whether it did. `ahead`: bytes that memory is asked for, of a key AHEAD of each. */
static inline __attribute__((always_inline)) int add_few_dots(const int odd, const int R, const int M, const int B,
                                                              int64_t left, int64_t count, const char *v, int64_t v_row,
                                                              const char *pairs, float *out, int64_t pad, int64_t ahead) {
    __m512 sum[FEW][4];
    __m512i most = _mm512_setzero_si512();
    __mmask32 inside[2] = {bf16_inside(left, 0), B > 1 ? bf16_inside(left, 32) : 0};
#pragma GCC unroll 16
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * B; i++) sum[r][i] = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 2) {
        __m512bh x[4] = {{0}};
        for (int64_t i = 0; i < 2; i++) /* in order: Zen 5 reads 6 to 30 % faster so */
            for (int64_t at = 0; at < ahead; at += 64) __builtin_prefetch(v + (j + i + AHEAD) * v_row + at);
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            __m512i even = few_load_32(odd, v + j * v_row, b * 32, inside[b]), other = _mm512_setzero_si512();
            most = few_largest(most, even, inside[b]);
            if (j + 1 < count) {
                other = few_load_32(odd, v + (j + 1) * v_row, b * 32, inside[b]);
                most = few_largest(most, other, inside[b]);
            }
            x[2 * b] = (__m512bh)_mm512_unpacklo_epi16(even, other);
            x[2 * b + 1] = (__m512bh)_mm512_unpackhi_epi16(even, other);
        }
#pragma GCC unroll 16
        for (int r = 0; r < M; r++) {
            int32_t both;
            memcpy(&both, pairs + (j / 2 * R + r) * 4, sizeof both);
#pragma GCC unroll 4
            for (int i = 0; i < 2 * B; i++) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], (__m512bh)_mm512_set1_epi32(both), x[i]);
        }
    }
    if (!odd && few_may_be_odd(most) && few_odd(count, left < 32 * B ? left : 32 * B, v, v_row)) return 0;
#pragma GCC unroll 16
    for (int r = 0; r < M; r++)
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) few_add(sum[r][2 * b], sum[r][2 * b + 1], left - b * 32, out + r * pad + b * 32);
    return 1;
}

/* The same with odd numbers, out of line: inlined it cost the other 5 % with eight and 16 rows. */
static __attribute__((noinline)) void add_odd_dots(int R, int M, int B, int64_t left, int64_t count, const char *v,
                                                   int64_t v_row, const char *pairs, float *out, int64_t pad) {
    add_few_dots(1, R, M, B, left, count, v, v_row, pairs, out, pad, 0);
}

/* As add_few, but odd numbers of V only where a row sees their key. p becomes 0 up to a multiple of two vectors. */
static inline __attribute__((always_inline)) void add_few_pairs(const int R, const row_block *block, int64_t first,
                                                                int64_t count, int64_t dim, const char *v, int64_t v_row,
                                                                float *p, char *unused, float *out, int64_t pad) {
    char pairs[BLOCK_N / 2 * FEW * 4] __attribute__((aligned(64)));
    const int M = R < 8 ? R : 8, B = 8 / M; /* what registers hold */
    int some = 0;
    (void)unused;
    memset(p + count * R, 0, (size_t)(cuflash_round_up(count * R, 2 * VL) - count * R) * sizeof *p);
    few_pair_probabilities(R, count, p, pairs);
    int64_t d = 0;
#define VECTORS(B)                                                                                                             \
    for (; d + 32 * (B - 1) < dim; d += 32 * B)                                                                                \
        for (int r = 0; r < R; r += M)                                                                                         \
            if (!add_few_dots(0, R, M, B, dim - d, count, v + d * 2, v_row, pairs + r * 4, out + r * pad + d, pad,             \
                              d + r == 0 ? dim * 2 : 0)) {                                                                     \
                add_odd_dots(R, M, B, dim - d, count, v + d * 2, v_row, pairs + r * 4, out + r * pad + d, pad);                \
                some = 1;                                                                                                      \
            }
    VECTORS(B)
    if (B > 1) VECTORS(1)
#undef VECTORS
    if (some) few_add_odd(R, block, first, count, dim, v, v_row, p, out, pad);
}

#endif
