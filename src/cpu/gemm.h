/* The one matrix product all passes are made of:
 *
 *   C[m][n] (+)= sum over k of A[m * a_row + k * a_col] * B[k][n]
 *
 * A is read one number at a time, so any strides will do; B and C have contiguous rows of whole vectors. A tile
 * of TILE_M x TILE_V vectors of C stays in registers while k runs. Sums start from zero and are added to C once: short
 * chains of additions, so less rounding. */
#ifndef CUFLASH_CPU_GEMM_H
#define CUFLASH_CPU_GEMM_H

#include "vec.h"

#if defined(__AVX512F__)
enum { TILE_M = 6, TILE_V = 4 }; /* 24 accumulators of 32 registers */
#else
enum { TILE_M = 6, TILE_V = 2 }; /* 12 of 16 */
#endif

typedef void (*tile_fn)(int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t b_row, float *c,
                        int64_t c_row, int add);

#define DEFINE_TILE(M, V)                                                                              \
    static void tile_##M##x##V(int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t b_row, \
                               float *c, int64_t c_row, int add) {                                     \
        vf sum[M][V];                                                                                  \
        _Pragma("GCC unroll 8") for (int m = 0; m < M; m++)                                            \
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) sum[m][v] = (vf){0};                   \
        for (; k > 0; k--, a += a_col, b += b_row) {                                                   \
            vf right[V];                                                                               \
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) right[v] = v_load(b + v * VL);         \
            _Pragma("GCC unroll 8") for (int m = 0; m < M; m++) {                                      \
                vf left = v_set(a[m * a_row]);                                                         \
                _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) sum[m][v] = left * right[v] + sum[m][v]; \
            }                                                                                          \
        }                                                                                              \
        _Pragma("GCC unroll 8") for (int m = 0; m < M; m++)                                            \
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) {                                      \
                float *at = c + m * c_row + v * VL;                                                    \
                v_store(at, add ? v_load(at) + sum[m][v] : sum[m][v]);                                 \
            }                                                                                          \
    }

#define DEFINE_TILES(V)                                                                                \
    DEFINE_TILE(1, V) DEFINE_TILE(2, V) DEFINE_TILE(3, V) DEFINE_TILE(4, V) DEFINE_TILE(5, V) DEFINE_TILE(6, V)
#define TILES(V) {tile_1x##V, tile_2x##V, tile_3x##V, tile_4x##V, tile_5x##V, tile_6x##V}

DEFINE_TILES(1)
DEFINE_TILES(2)
#if defined(__AVX512F__)
DEFINE_TILES(3)
DEFINE_TILES(4)
static const tile_fn tiles[TILE_V][TILE_M] = {TILES(1), TILES(2), TILES(3), TILES(4)};
#else
static const tile_fn tiles[TILE_V][TILE_M] = {TILES(1), TILES(2)};
#endif

/* n counts floats and is a multiple of VL. */
static void gemm(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t b_row,
                 float *c, int64_t c_row, int add) {
    for (int64_t j = 0; j < n; j += TILE_V * VL) {
        int64_t vectors = (n - j) / VL < TILE_V ? (n - j) / VL : TILE_V;
        for (int64_t i = 0; i < m; i += TILE_M) {
            int64_t height = m - i < TILE_M ? m - i : TILE_M;
            tiles[vectors - 1][height - 1](k, a + i * a_row, a_row, a_col, b + j, b_row, c + i * c_row + j, c_row, add);
        }
    }
}

#endif
