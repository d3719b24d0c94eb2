/* Products for a row or some, as in decoding: there is not much to be done for each byte of K and V, and vectors of rows would be
 * nearly empty. So vectors run over d: scores are dot products, and an output is a sum of rows of V, which are converted as they are
 * read and fetched a while before. R rows, a constant, are kept in registers; those past the last one are 0. T, a constant, too, is
 * the dtype of K or V, whose rows are so many bytes apart. */
#ifndef CUFLASH_CPU_FEW_H
#define CUFLASH_CPU_FEW_H

#include "cuflash.h"
#include "vec.h"

enum {
    FEW = VL / 2, /* rows, of which vectors would be mostly empty */
    AHEAD = 32    /* keys that memory is asked for before they are read */
};

static inline __attribute__((always_inline)) int64_t few_bytes(const cuflash_dtype T) {
    return T == CUFLASH_FLOAT32 ? 4 : 2;
}

static inline __attribute__((always_inline)) vf few_load(const cuflash_dtype T, const char *row, int64_t d) {
    const void *at = row + d * few_bytes(T);
    return T == CUFLASH_FLOAT32 ? v_load(at) : T == CUFLASH_FLOAT16 ? v_load_half(at) : v_load_bfloat(at);
}

static inline __attribute__((always_inline)) float few_number(const cuflash_dtype T, const char *row, int64_t d) {
    if (T == CUFLASH_FLOAT32) return ((const float *)(const void *)row)[d];
    uint16_t x = ((const uint16_t *)(const void *)row)[d];
    return T == CUFLASH_FLOAT16 ? cuflash_half_to_float(x) : cuflash_bfloat_to_float(x);
}

/* s[key][row] = K Q of `count` keys; s has rows of s_row numbers, of which a vector is written. */
static inline __attribute__((always_inline)) void score_few(const int R, const cuflash_dtype T, int64_t count, int64_t dim,
                                                            const char *k, int64_t k_row, const float *q, int64_t pad, float *s,
                                                            int64_t s_row) {
    const int K = VL / R < 4 ? VL / R : 4; /* keys at a time */
    int64_t whole = dim / VL * VL;
    for (int64_t j = 0; j < count; j += K) {
        const char *key[4];
        vf sum[VL]; /* [K][R] */
#pragma GCC unroll 4
        for (int i = 0; i < K; i++) key[i] = k + (j + i < count ? j + i : count - 1) * k_row;
#pragma GCC unroll 16
        for (int i = 0; i < K * R; i++) sum[i] = (vf){0};
        if (R <= 2) { /* memory is the limit, and wants to be read in order */
#pragma GCC unroll 4
            for (int i = 0; i < K; i++)
                for (int64_t d = 0; d < whole; d += VL) {
                    __builtin_prefetch(key[i] + AHEAD * k_row + d * few_bytes(T));
                    vf x = few_load(T, key[i], d);
#pragma GCC unroll 2
                    for (int r = 0; r < R; r++) sum[i * R + r] = x * v_load(q + r * pad + d) + sum[i * R + r];
                }
        } else {
            for (int64_t d = 0; d < whole; d += VL)
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    vf y = v_load(q + r * pad + d);
#pragma GCC unroll 4
                    for (int i = 0; i < K; i++) {
                        if (r == 0) __builtin_prefetch(key[i] + AHEAD * k_row + d * few_bytes(T));
                        sum[i * R + r] = few_load(T, key[i], d) * y + sum[i * R + r];
                    }
                }
        }
        float sums[VL / 4 * VL];
#pragma GCC unroll 4
        for (int i = 0; i < K * R / 4; i++) v_store(sums + i * VL, v_sums(sum + i * 4));
        for (int i = 0; i < K && j + i < count; i++) {
            float *to = s + (j + i) * s_row;
            v_store(to, (vf){0});
            for (int r = 0; r < R; r++) {
                float x = sums[(i * R + r) / 4 * VL + (i * R + r) % 4];
                for (int64_t d = whole; d < dim; d++) x += few_number(T, key[i], d) * q[r * pad + d];
                to[r] = x;
            }
        }
    }
}

/* C vectors of out[row] += P V of `count` keys. */
static inline __attribute__((always_inline)) void add_few_vectors(const int R, const int C, const cuflash_dtype T,
                                                                  int64_t count, const char *v, int64_t v_row, const float *p,
                                                                  int64_t p_row, float *out, int64_t pad) {
    vf sum[FEW][8];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < C; i++) sum[r][i] = v_load(out + r * pad + i * VL);
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 8
        for (int i = 0; i < C; i++) {
            vf x = few_load(T, v + j * v_row, i * VL);
            __builtin_prefetch(v + (j + AHEAD) * v_row + i * VL * few_bytes(T));
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) sum[r][i] = v_set(p[j * p_row + r]) * x + sum[r][i];
        }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < C; i++) v_store(out + r * pad + i * VL, sum[r][i]);
}

/* out[row] += P V of `count` keys; p has rows of p_row numbers. */
static inline __attribute__((always_inline)) void add_few(const int R, const cuflash_dtype T, int64_t count, int64_t dim,
                                                          const char *v, int64_t v_row, const float *p, int64_t p_row,
                                                          float *out, int64_t pad) {
    const int MOST = VL == 16 ? 16 : 8, C = MOST / R < 8 ? MOST / R : 8; /* vectors of d at a time: what registers hold */
    int64_t d = 0;
    for (; d + C * VL <= dim; d += C * VL) add_few_vectors(R, C, T, count, v + d * few_bytes(T), v_row, p, p_row, out + d, pad);
    if (C > 4)
        for (; d + 4 * VL <= dim; d += 4 * VL)
            add_few_vectors(R, 4, T, count, v + d * few_bytes(T), v_row, p, p_row, out + d, pad);
    for (; d + VL <= dim; d += VL) add_few_vectors(R, 1, T, count, v + d * few_bytes(T), v_row, p, p_row, out + d, pad);
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int64_t e = d; e < dim; e++) out[r * pad + e] += p[j * p_row + r] * few_number(T, v + j * v_row, e);
}

#endif
