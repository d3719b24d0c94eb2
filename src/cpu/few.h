/* Products for a row or some, as in decoding: there is not much to be done for each byte of K and V, and vectors of rows would be
 * nearly empty. So vectors run over d: scores are dot products, and an output is a sum of rows of V. R rows, a constant, are kept in
 * registers; those past the last one are 0. */
#ifndef CUFLASH_CPU_FEW_H
#define CUFLASH_CPU_FEW_H

#include "vec.h"

enum { FEW = VL / 2 }; /* rows, of which vectors would be mostly empty */

/* s[key][row] = K Q of `count` keys; s has rows of s_row numbers, of which a vector is written. */
static inline __attribute__((always_inline)) void score_few(const int R, int64_t count, int64_t dim, const float *k,
                                                            int64_t k_row, const float *q, int64_t pad, float *s,
                                                            int64_t s_row) {
    const int K = VL / R < 4 ? VL / R : 4; /* keys at a time */
    int64_t whole = dim / VL * VL;
    for (int64_t j = 0; j < count; j += K) {
        const float *key[4];
        vf sum[VL]; /* [K][R] */
#pragma GCC unroll 4
        for (int i = 0; i < K; i++) key[i] = k + (j + i < count ? j + i : count - 1) * k_row;
#pragma GCC unroll 16
        for (int i = 0; i < K * R; i++) sum[i] = (vf){0};
        for (int64_t d = 0; d < whole; d += VL)
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                vf y = v_load(q + r * pad + d);
#pragma GCC unroll 4
                for (int i = 0; i < K; i++) sum[i * R + r] = v_load(key[i] + d) * y + sum[i * R + r];
            }
        float sums[VL / 4 * VL];
#pragma GCC unroll 4
        for (int i = 0; i < K * R / 4; i++) v_store(sums + i * VL, v_sums(sum + i * 4));
        for (int i = 0; i < K && j + i < count; i++) {
            float *to = s + (j + i) * s_row;
            v_store(to, (vf){0});
            for (int r = 0; r < R; r++) {
                float x = sums[(i * R + r) / 4 * VL + (i * R + r) % 4];
                for (int64_t d = whole; d < dim; d++) x += key[i][d] * q[r * pad + d];
                to[r] = x;
            }
        }
    }
}

/* out[row] += P V of `count` keys; p has rows of p_row numbers. */
static inline __attribute__((always_inline)) void add_few(const int R, int64_t count, int64_t dim, const float *v,
                                                          int64_t v_row, const float *p, int64_t p_row, float *out,
                                                          int64_t pad) {
    const int C = (VL == 16 ? 16 : 8) / R < 4 ? (VL == 16 ? 16 : 8) / R : 4; /* vectors of d at a time */
    int64_t d = 0;
    for (; d + C * VL <= dim; d += C * VL) {
        vf sum[FEW][4];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int i = 0; i < C; i++) sum[r][i] = v_load(out + r * pad + d + i * VL);
        for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 16
            for (int i = 0; i < C; i++) {
                vf x = v_load(v + j * v_row + d + i * VL);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) sum[r][i] = v_set(p[j * p_row + r]) * x + sum[r][i];
            }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int i = 0; i < C; i++) v_store(out + r * pad + d + i * VL, sum[r][i]);
    }
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int64_t e = d; e < dim; e++) out[r * pad + e] += p[j * p_row + r] * v[j * v_row + e];
}

#endif
