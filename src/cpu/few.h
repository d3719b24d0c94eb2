/* Products for a row or some, as in decoding: there is not much to be done for each byte of K and V, and vectors of rows would be
 * nearly empty. So vectors run over d: scores are dot products, and an output is a sum of rows of V, which are converted as they are
 * read and fetched a while before. R rows, a constant, are kept in registers; those past the last one are 0. T, a constant, too, is
 * the dtype of K or V, whose rows are so many bytes apart. */
#ifndef CUFLASH_CPU_FEW_H
#define CUFLASH_CPU_FEW_H

#include <math.h>

#include "cuflash.h"
#include "vec.h"

enum {
    FEW = VL,  /* rows, at most */
    AHEAD = 32 /* keys that memory is asked for before they are read */
};

/* What is subtracted from scores, max, stays until a score is so many exponents of 2 above it: the output need not be scaled as
 * often. Probabilities, before they are divided by their sum, are 2^((s - max) c - LESS), so at most 2: what they multiply is to stay
 * finite. */
static const float MOST_EXPONENT = 4, LESS = 3;

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

/* s[key][R] = K Q of `count` keys, and anything up to a whole vector. q is [dim / VL][R][VL]. */
static inline __attribute__((always_inline)) void score_few(const int R, const cuflash_dtype T, int64_t count, int64_t dim,
                                                            const char *k, int64_t k_row, const float *q, float *s) {
    const int K = VL / R; /* keys at a time */
    int64_t whole = dim / VL * VL;
    for (int64_t j = 0; j < count; j += K) {
        const char *key[VL];
        vf sum[VL]; /* [K][R] */
#pragma GCC unroll 16
        for (int i = 0; i < K; i++) key[i] = k + (j + i < count ? j + i : count - 1) * k_row;
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) sum[i] = (vf){0};
        if (R <= 2) { /* memory is the limit, and wants to be read in order */
#pragma GCC unroll 16
            for (int i = 0; i < K; i++)
                for (int64_t d = 0; d < whole; d += VL) {
                    if (d * few_bytes(T) % 64 == 0) __builtin_prefetch(key[i] + AHEAD * k_row + d * few_bytes(T));
                    vf x = few_load(T, key[i], d);
#pragma GCC unroll 2
                    for (int r = 0; r < R; r++) sum[i * R + r] = x * v_load(q + d * R + r * VL) + sum[i * R + r];
                }
        } else {
#pragma GCC unroll 4
            for (int i = 0; i < K; i++)
                for (int64_t at = 0; at < dim * few_bytes(T); at += 64) __builtin_prefetch(key[i] + AHEAD * k_row + at);
            for (int64_t d = 0; d < whole; d += VL) {
                vf x[8];
#pragma GCC unroll 4
                for (int i = 0; i < K; i++) x[i] = few_load(T, key[i], d);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    vf y = v_load(q + d * R + r * VL);
#pragma GCC unroll 4
                    for (int i = 0; i < K; i++) sum[i * R + r] = x[i] * y + sum[i * R + r];
                }
            }
        }
        v_store(s + j * R, v_sums(sum));
        for (int64_t d = whole; d < dim; d++)
            for (int i = 0; i < K; i++)
                for (int r = 0; r < R; r++) s[(j + i) * R + r] += few_number(T, key[i], d) * q[whole * R + r * VL + d - whole];
    }
}

/* As softmax_lanes: max and sum, of row l % R in lane l, are brought up to date, and s become probabilities. Returns
 * what an output so far is to be multiplied by. */
static inline __attribute__((always_inline)) vf softmax_few(const int R, int64_t count, float c, float *s, float *max,
                                                            float *sum) {
    for (int64_t i = count * R; i % VL != 0; i++) s[i] = -INFINITY; /* what is behind the last key */
    vf before = v_load(max), m = before, total = {0};
    for (int64_t i = 0; i < count * R; i += VL) m = v_max(v_load(s + i), m);
#pragma GCC unroll 4
    for (int n = R; n < VL; n *= 2) m = v_max(v_swap(m, n), m);
    m = v_select((m - before) * c > MOST_EXPONENT, m, before); /* from -inf, too */
    vf base = v_select(m == -INFINITY, (vf){0}, m);            /* nothing seen yet */
    for (int64_t i = 0; i < count * R; i += VL) {
        vf probability = v_exp2((v_load(s + i) - base) * c - LESS);
        v_store(s + i, probability);
        total = total + probability;
    }
#pragma GCC unroll 4
    for (int n = R; n < VL; n *= 2) total = total + v_swap(total, n);
    vf shrink = v_exp2((before - base) * c);
    v_store(sum, v_load(sum) * shrink + total);
    v_store(max, m);
    return shrink;
}

/* C vectors of out[row] += P V of `count` keys. `ahead`: bytes that memory is asked for, of a key AHEAD of each. */
static inline __attribute__((always_inline)) void add_few_vectors(const int R, const int C, const cuflash_dtype T,
                                                                  int64_t count, const char *v, int64_t v_row, const float *p,
                                                                  float *out, int64_t pad, int64_t ahead) {
    vf sum[FEW][8];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < C; i++) sum[r][i] = v_load(out + r * pad + i * VL);
    for (int64_t j = 0; j < count; j++) {
        for (int64_t at = 0; at < ahead; at += 64) __builtin_prefetch(v + (j + AHEAD) * v_row + at);
#pragma GCC unroll 8
        for (int i = 0; i < C; i++) {
            vf x = few_load(T, v + j * v_row, i * VL);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) sum[r][i] = v_set(p[j * R + r]) * x + sum[r][i];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < C; i++) v_store(out + r * pad + i * VL, sum[r][i]);
}

/* out[row] += P V of `count` keys. */
static inline __attribute__((always_inline)) void add_few(const int R, const cuflash_dtype T, int64_t count, int64_t dim,
                                                          const char *v, int64_t v_row, const float *p, float *out,
                                                          int64_t pad) {
    const int MOST = VL == 16 ? 16 : 8, C = MOST / R < 8 ? MOST / R : 8; /* vectors of d at a time: what registers hold */
    int64_t d = 0;
#define VECTORS(C)                                                                                                             \
    add_few_vectors(R, C, T, count, v + d * few_bytes(T), v_row, p, out + d, pad, d == 0 ? dim * few_bytes(T) : 0)
    for (; d + C * VL <= dim; d += C * VL) VECTORS(C);
    if (C > 4)
        for (; d + 4 * VL <= dim; d += 4 * VL) VECTORS(4);
    for (; d + VL <= dim; d += VL) VECTORS(1);
#undef VECTORS
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int64_t e = d; e < dim; e++) out[r * pad + e] += p[j * R + r] * few_number(T, v + j * v_row, e);
}

#endif
