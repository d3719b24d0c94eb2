/* Products of pairs by AVX512-BF16: vectors of 16 columns, each lane the sum of two products at a time. Sums stay in registers, as
 * in gemm.h. */
#ifndef CUFLASH_CPU_DOTS_H
#define CUFLASH_CPU_DOTS_H

#include "gemm.h"

enum { BF16_SCORES_N = BF16_BLOCK_N }; /* keys at a time of a forward's scores */

enum { BF16_HALF_PLANES = 0 }; /* products of pairs are twice as fast as those of float32, not four times */

#define BF16_WORDS "vectors of 16 pairs of bfloat16"
#define BF16_FEW_WORDS "vectors of 16 float32 over the head dimension, by pairs of bfloat16"

static void bf16_begin(void) {
}
static void bf16_end(void) {
}

/* M rows of A by V vectors of columns; M and V are constants wherever this is inlined. */
static inline __attribute__((always_inline)) void dots(const int M, const int V, int64_t steps, int terms, bf16_left x,
                                                       bf16_right y, float *c, int64_t c_row, int add) {
    __m512 sum[TILE_M][TILE_V];
    __m512bh right[TILE_V];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            sum[m][v] = _mm512_setzero_ps();
            if (add) __builtin_prefetch(c + m * c_row + v * VL, 1);
        }
    for (int term = BF16_ALL_TERMS - terms; term < BF16_ALL_TERMS; term++) {
        const char *a = x.data + bf16_terms[term].left * x.plane, *b = y.data + bf16_terms[term].right * y.plane;
        for (int64_t step = 0; step < steps; step++, a += x.step)
            for (int64_t k = 0; k < BF16_K; k += 2, b += y.pair) {
                __builtin_prefetch(a + (M + k / 2) * x.row); /* a line of what the next tiles read, as in gemm.h */
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + v * 64);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    int32_t both;
                    memcpy(&both, a + m * x.row + k * 2, sizeof both);
                    __m512bh left = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 8
                    for (int v = 0; v < V; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], left, right[v]);
                }
            }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            float *at = c + m * c_row + v * VL;
            v_store(at, add ? v_load(at) + (vf)sum[m][v] : (vf)sum[m][v]);
        }
}

/* C = A B or C += A B, for m x n of C, multiples of 16, in rows of out_row floats, and so many times 32 of k and terms. */
static void bf16_gemm(int64_t m, int64_t n, int64_t steps, bf16_left x, bf16_right y, int terms, float *out, int64_t out_row,
                      int add) {
    for (int64_t j = 0; j < n; j += TILE_V * VL) {
        int64_t vectors = (n - j) / VL < TILE_V ? (n - j) / VL : TILE_V;
        for (int64_t i = 0; i < m; i += TILE_M) {
            int64_t rows = m - i < TILE_M ? m - i : TILE_M; /* an even number, as m is */
            bf16_left left = {x.data + i * x.row, x.row, x.step, x.plane};
            bf16_right right = {y.data + j * 4, y.pair, y.plane};
            float *c = out + i * out_row + j;
#define DOTS(M, V)                                                                                                             \
    case 8 * M + V: dots(M, V, steps, terms, left, right, c, out_row, add); break
            switch (8 * rows + vectors) {
                DOTS(2, 1);
                DOTS(2, 2);
                DOTS(2, 3);
                DOTS(2, 4);
                DOTS(4, 1);
                DOTS(4, 2);
                DOTS(4, 3);
                DOTS(4, 4);
                DOTS(6, 1);
                DOTS(6, 2);
                DOTS(6, 3);
                DOTS(6, 4);
            }
#undef DOTS
        }
    }
}

#endif
