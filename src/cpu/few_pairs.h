/* Products of pairs for few rows of bfloat16, by tiles (few_tiles.h) or vectors (few_dots.h). Numbers that these do not take (pairs.h)
 * are looked for while K and V are read. */
#ifndef CUFLASH_CPU_FEW_PAIRS_H
#define CUFLASH_CPU_FEW_PAIRS_H

#include "pairs.h"

/* The sizes of the numbers of so many rows: looked at where a product may have met some that it does not take. */
static __attribute__((noinline)) bf16_sizes few_sizes(int64_t count, int64_t dim, const char *x, int64_t row) {
    bf16_sizes sizes = bf16_no_sizes;
    for (int64_t j = 0; j < count; j++) bf16_add_sizes(&sizes, x + j * row, dim);
    return sizes;
}
static inline int few_denormal(int64_t count, int64_t dim, const char *x, int64_t row) {
    bf16_sizes sizes = few_sizes(count, dim, x, row);
    return some_missing(CUFLASH_BFLOAT16, &sizes);
}
static inline int few_odd(int64_t count, int64_t dim, const char *x, int64_t row) {
    bf16_sizes sizes = few_sizes(count, dim, x, row);
    return some_odd(CUFLASH_BFLOAT16, &sizes);
}

/* 32 numbers of V from d on, those inside, zeros for odd ones if there are some. */
static inline __attribute__((always_inline)) __m512i few_load_32(const int odd, const char *row, int64_t d, __mmask32 inside) {
    __m512i x = _mm512_maskz_loadu_epi16(inside, row + d * 2);
    return odd ? _mm512_mask_mov_epi16(x, odd_lanes(x), _mm512_setzero_si512()) : x;
}

/* out[row] += p[key][R] of the odd numbers of V that a row sees. */
static __attribute__((noinline)) void few_add_odd(int R, const row_block *block, int64_t first, int64_t count, int64_t dim,
                                                  const char *v, int64_t v_row, const float *p, float *out, int64_t pad) {
    for (int64_t j = 0; j < count; j++)
        for (int64_t d = 0; d < dim; d++) {
            uint16_t x = ((const uint16_t *)(const void *)(v + j * v_row))[d];
            for (int64_t r = 0; r < block->rows && is_odd(CUFLASH_BFLOAT16, x); r++)
                if (block->limit[r] > first + j) out[r * pad + d] += p[j * R + r] * cuflash_bfloat_to_float(x);
        }
}

/* Adds to 32 numbers of an output, or 16 where it ends there, what unpacking has left in two vectors: 0-3, 8-11, 16-19 and 24-27, and
 * the others. */
static inline void few_add(__m512 x, __m512 y, int64_t left, float *out) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    v_store(out, v_load(out) + (vf)_mm512_permutex2var_ps(x, first, y));
    if (left <= VL) return;
    __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    v_store(out + VL, v_load(out + VL) + (vf)_mm512_permutex2var_ps(x, last, y));
}

/* Of the least of twice the bits of numbers, signs aside: is any of them denormal, or 0? */
static inline int few_may_be_denormal(__m512i least) {
    return _mm512_cmplt_epu16_mask(least, _mm512_set1_epi16(2 * 0x80)) != 0;
}

/* The largest of sizes, from SMALL on, of 32 numbers: those below, and 0, count as larger than all. */
static inline __m512i few_largest(__m512i most, __m512i x, __mmask32 inside) {
    __m512i size = _mm512_sub_epi16(_mm512_add_epi16(x, x), _mm512_set1_epi16(2 * SMALL)); /* twice */
    return _mm512_mask_max_epu16(most, inside, most, size);
}
static inline int few_may_be_odd(__m512i most) {
    return _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16((int16_t)(2 * (BF16_INFINITY - SMALL)))) != 0;
}

#ifdef __AMX_BF16__
#include "few_tiles.h"
#else
#include "few_dots.h"
#endif

#endif
