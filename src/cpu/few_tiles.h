/* Products of few rows by AMX (amx.h): as many as a tile has, which take no longer than one row.
 *
 *   S[key][row]   = K * Q     K where it lies, pairs of d
 *   O[row][d]    += P * V     P turned, pairs of keys of V, which are laid out a tile of keys at a time
 */
#ifndef CUFLASH_CPU_FEW_TILES_H
#define CUFLASH_CPU_FEW_TILES_H

#include "few_pairs.h"

enum { LEAST_FEW_PAIRS = FEW };                       /* rows that products are made for, at least */
enum { FEW_STEPS = (BLOCK_N + BF16_K - 1) / BF16_K }; /* of so many keys, in a tile of keys */

/* A row of Q, dim numbers rounded up to 32, as score_few_pairs takes it: pairs of d, [dim / 2][FEW][2]. */
static inline void few_put_row(int R, int64_t r, int64_t dim, const uint16_t *row, uint16_t *q) {
    for (int64_t d = 0; d < dim; d += 2) memcpy(q + (d / 2 * R + r) * 2, row + d, 4);
}

/* Those of the next tile of keys are asked for, to the L2 cache, which more lines are on their way to at a time. */
static inline void few_ask_ahead(const char *row, int64_t row_bytes, int64_t d) {
    __builtin_prefetch(row + BLOCK_N * row_bytes + d * 2, 0, 2);
}

/* As score_few, up to a multiple of 32 keys; says whether K has denormal numbers. R is FEW. */
static int score_few_pairs(int R, int64_t count, int64_t dim, const char *k, int64_t k_row, const uint16_t *q, float *s) {
    char padded[2][BF16_ROWS * WIDEST * 2] __attribute__((aligned(64)));
    (void)R;
    int64_t whole = cuflash_round_up(dim, BF16_K);
    __m512i least = _mm512_set1_epi16(-1); /* of twice a number's bits */
    for (int64_t j = 0; j < count; j += 2 * BF16_ROWS) {
        const char *keys[2];
        int64_t row[2];
        for (int i = 0; i < 2; i++) {
            int64_t first = j + i * BF16_ROWS, there = count - first < BF16_ROWS ? count - first : BF16_ROWS;
            int in_place = there == BF16_ROWS && dim == whole;
            keys[i] = in_place ? k + first * k_row : padded[i];
            row[i] = in_place ? k_row : whole * 2;
            for (int64_t n = 0; n < there; n++)
                for (int64_t d = 0; d < dim; d += 32) {
                    __mmask32 inside = bf16_inside(dim, d);
                    few_ask_ahead(k + (first + n) * k_row, k_row, d);
                    __m512i x = few_load_32(0, k + (first + n) * k_row, d, inside);
                    least = _mm512_mask_min_epu16(least, inside, least, _mm512_add_epi16(x, x));
                    if (!in_place) _mm512_store_si512(padded[i] + (n * whole + d) * 2, x);
                }
            for (int64_t n = there < 0 ? 0 : there; n < BF16_ROWS; n++) memset(padded[i] + n * whole * 2, 0, (size_t)whole * 2);
        }
        __asm__ volatile("" ::: "memory"); /* compilers are not told what tiles are loaded from */
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < whole; d += BF16_K) {
            _tile_loadd(5, q + d * FEW, 64);
            _tile_loadd(4, keys[0] + d * 2, row[0]);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, keys[1] + d * 2, row[1]);
            _tile_dpbf16ps(1, 6, 5);
        }
        _tile_stored(0, s + j * FEW, FEW * 4);
        _tile_stored(1, s + (j + BF16_ROWS) * FEW, FEW * 4);
    }
    return few_may_be_denormal(least) && few_denormal(count, dim, k, k_row);
}

/* P of 32 keys, p[key][FEW], as a left operand [row][32]. */
static void few_turn(const float *p, char *to) {
    vf x[FEW];
    for (int64_t i = 0; i < FEW; i++) {
        char pairs[64] __attribute__((aligned(64)));
        bf16_store_pairs(1, pairs, 64, (__m512)v_load(p + 2 * i * FEW), (__m512)v_load(p + (2 * i + 1) * FEW));
        x[i] = v_load((const float *)(const void *)pairs);
    }
    v_transpose(x);
    for (int64_t r = 0; r < FEW; r++) v_store((float *)(void *)(to + r * 64), x[r]);
}

/* Pairs of keys of V, up to a multiple of 32, as unpacking leaves them, zeros for odd numbers if there are some. Says whether there
 * may be. */
static inline __attribute__((always_inline)) int few_pair_keys(const int odd, int64_t count, int64_t dim, const char *v,
                                                               int64_t v_row, char *to) {
    int64_t whole = cuflash_round_up(dim, BF16_K);
    __m512i most = _mm512_setzero_si512();
    for (int64_t j = 0; j < cuflash_round_up(count, BF16_K); j += 2)
        for (int64_t d = 0; d < whole; d += 32) {
            __m512i x[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int i = 0; i < 2; i++) {
                if (j + i >= count) continue;
                few_ask_ahead(v + (j + i) * v_row, v_row, d);
                x[i] = few_load_32(odd, v + (j + i) * v_row, d, bf16_inside(dim, d));
                most = few_largest(most, x[i], bf16_inside(dim, d));
            }
            char *at = to + j / 2 * whole * 4 + d * 4;
            _mm512_store_si512(at, _mm512_unpacklo_epi16(x[0], x[1]));
            _mm512_store_si512(at + 64, _mm512_unpackhi_epi16(x[0], x[1]));
        }
    return few_may_be_odd(most);
}

/* As add_few, but odd numbers of V only where a row sees their key. p becomes 0 up to a multiple of 32 keys. */
static void add_few_pairs(int R, const row_block *block, int64_t first, int64_t count, int64_t dim, const char *v,
                          int64_t v_row, float *p, char *pairs, float *out, int64_t pad) {
    char left[FEW_STEPS][FEW * 64] __attribute__((aligned(64)));
    float sum[FEW * 32] __attribute__((aligned(64)));
    int odd = few_pair_keys(0, count, dim, v, v_row, pairs) && few_odd(count, dim, v, v_row);
    if (odd) few_pair_keys(1, count, dim, v, v_row, pairs);
    int64_t steps = cuflash_round_up(count, BF16_K) / BF16_K, row = cuflash_round_up(dim, BF16_K) * 4;
    memset(p + count * R, 0, (size_t)((steps * BF16_K - count) * R) * sizeof *p);
    for (int64_t i = 0; i < steps; i++) few_turn(p + i * BF16_K * FEW, left[i]);
    __asm__ volatile("" ::: "memory");
    for (int64_t d = 0; d < dim; d += 32) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t i = 0; i < steps; i++) {
            _tile_loadd(4, left[i], 64);
            _tile_loadd(5, pairs + i * 16 * row + d * 4, row);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, pairs + i * 16 * row + d * 4 + 64, row);
            _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, sum, 128);
        _tile_stored(1, sum + 16, 128);
        for (int64_t r = 0; r < block->rows; r++)
            few_add(_mm512_load_ps(sum + r * 32), _mm512_load_ps(sum + r * 32 + 16), pad - d, out + r * pad + d);
    }
    if (odd) few_add_odd(R, block, first, count, dim, v, v_row, p, out, pad);
}

#endif
