/* The one matrix product all passes are made of:
 *
 *   C[m][n] (+)= sum over k of A[m * a_row + k * a_col] * B[k][n]
 *
 * A is read one number at a time, so any strides will do; B and C have contiguous rows of whole vectors. A tile
 * of TILE_M rows by TILE_V vectors of C stays in registers while k runs. Sums start from zero and are added to C once:
 * short chains of additions, so less rounding. */
#ifndef CUFLASH_CPU_GEMM_H
#define CUFLASH_CPU_GEMM_H

#include "vec.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE_V 4 /* 24 accumulators of 32 registers */
#else
#define TILE_V 2 /* 12 of 16 */
#endif
enum { TILE_M = 6, LINE = 16 }; /* LINE: floats of the cache */

/* M and V are constants wherever this is inlined, so the loops over them unroll and sum is registers. */
static inline __attribute__((always_inline)) void tile(const int M, const int V, int64_t k, const float *a, int64_t a_row,
                                                       int64_t a_col, const float *ahead, const float *b, int64_t b_row,
                                                       float *c, int64_t c_row, int add) {
    vf sum[TILE_M][TILE_V], right[TILE_V];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[m][v] = (vf){0};
    if (add) /* C may come from far away: it does while k runs */
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) __builtin_prefetch(c + m * c_row + v * VL, 1);
    for (; k > 0; k--, a += a_col, b += b_row) {
        /* By rows a line is 16 steps of one of 16 rows, by columns every second step's. */
        __builtin_prefetch(a_col == 1 ? ahead++ + (k & (LINE - 1)) * a_row : ahead + (k >> 1) * a_col);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) right[v] = v_load(b + v * VL);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            vf left = v_set(a[m * a_row]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sum[m][v] = left * right[v] + sum[m][v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            float *at = c + m * c_row + v * VL;
            v_store(at, add ? v_load(at) + sum[m][v] : sum[m][v]);
        }
}

/* n counts floats and is a multiple of VL. */
static inline __attribute__((always_inline)) void gemm(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row,
                                                       int64_t a_col, const float *b, int64_t b_row, float *c, int64_t c_row,
                                                       int add) {
    for (int64_t j = 0; j < n; j += TILE_V * VL) {
        int64_t vectors = (n - j) / VL < TILE_V ? (n - j) / VL : TILE_V;
        for (int64_t i = 0; i < m; i += TILE_M) {
            int64_t rows = m - i < TILE_M ? m - i : TILE_M;
            const float *ai = a + i * a_row, *bj = b + j;
            /* What is read of A next is asked for: by rows the next rows, by columns the next line of half of the k steps, for which
             * there are two tiles at least, or in the end the first line of the next steps. More at a time would fill the buffers
             * that loads wait in. */
            const float *ahead = a_col == 1 ? ai + TILE_M * a_row : i + LINE < m ? ai + LINE : a + k * a_col;
            if (a_col != 1 && i / TILE_M % 2 == 1) ahead += k / 2 * a_col;
            float *cij = c + i * c_row + j;
#define TILE(M, V)                                                                                                             \
    case 8 * M + V:                                                                                                            \
        tile(M, V, k, ai, a_row, a_col, ahead, bj, b_row, cij, c_row, add);                                                    \
        break
#define TILES(V)                                                                                                               \
    TILE(1, V);                                                                                                                \
    TILE(2, V);                                                                                                                \
    TILE(3, V);                                                                                                                \
    TILE(4, V);                                                                                                                \
    TILE(5, V);                                                                                                                \
    TILE(6, V)
            switch (8 * rows + vectors) {
                TILES(1);
                TILES(2);
#if TILE_V > 2
                TILES(3);
                TILES(4);
#endif
            }
        }
    }
#undef TILES
#undef TILE
}

/* A by rows, [m][k]. */
static __attribute__((noinline)) void gemm_rows(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, const float *b,
                                                int64_t b_row, float *c, int64_t c_row, int add) {
    gemm(m, n, k, a, a_row, 1, b, b_row, c, c_row, add);
}

/* A by columns, [k][m]. */
static __attribute__((noinline)) void gemm_columns(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_col,
                                                   const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
    gemm(m, n, k, a, 1, a_col, b, b_row, c, c_row, add);
}

#endif
