/* The vector layer: all that the CPU kernels know of an instruction set. VL floats to a vector; the compiler's
 * flags decide which. Arithmetic is written with operators (GCC's and Clang's vector extensions), and a * b + c
 * becomes an FMA where there is one. */
#ifndef CUFLASH_CPU_VEC_H
#define CUFLASH_CPU_VEC_H

#include <stdint.h>
#include <string.h>

#include "half.h"

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { VL = 16 };
#elif defined(__AVX2__)
enum { VL = 8 };
#else
enum { VL = 4 };
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef float vf_unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));

static inline vf v_load(const float *p) {
    return *(const vf_unaligned *)p;
}

static inline void v_store(float *p, vf x) {
    *(vf_unaligned *)p = x;
}

static inline vf v_set(float x) {
    return x - (vf){0}; /* every lane; keeps the sign of zero */
}

/* x where mask is all ones, y where it is all zeros. */
static inline vf v_select(vi mask, vf x, vf y) {
    return (vf)(((vi)x & mask) | ((vi)y & ~mask));
}

/* The larger; y where either is NaN. */
static inline vf v_max(vf x, vf y) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)x, (__m128)y);
#else
    return v_select(x > y, x, y);
#endif
}

/* The smaller; y where either is NaN. */
static inline vf v_min(vf x, vf y) {
    return -v_max(-x, -y);
}

/* The numbers of the lanes. */
#if defined(__AVX512F__)
#define V_LANES ((vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#elif defined(__AVX2__)
#define V_LANES ((vi){0, 1, 2, 3, 4, 5, 6, 7})
#else
#define V_LANES ((vi){0, 1, 2, 3})
#endif

/* Lane l is lane from[l] of x, and then of y; `from` is made of constants. */
static inline __attribute__((always_inline)) vf v_pick(vf x, vf y, vi from) {
#if defined(__clang__)
    vf z;
    for (int l = 0; l < VL; l++) z[l] = from[l] < VL ? x[from[l]] : y[from[l] - VL];
    return z;
#else
    return __builtin_shuffle(x, y, from);
#endif
}

/* Lane l is lane l ^ n of x; n is a constant. */
static inline __attribute__((always_inline)) vf v_swap(vf x, const int n) {
    return v_pick(x, x, V_LANES ^ n);
}

/* Sums of pairs of lanes that are n apart: of x where l & n is 0, of y elsewhere; n is a constant. */
static inline __attribute__((always_inline)) vf v_add_pairs(vf x, vf y, const int n) {
    vi of_y = ((V_LANES & n) != 0) & VL;
    return v_pick(x, y, V_LANES + of_y) + v_pick(x, y, (V_LANES ^ n) + of_y);
}

/* The sums of the lanes of VL vectors: lane l is that of x[l]. */
static inline __attribute__((always_inline)) vf v_sums_4(const vf *x) {
    return v_add_pairs(v_add_pairs(x[0], x[1], 1), v_add_pairs(x[2], x[3], 1), 2);
}
static inline __attribute__((always_inline)) vf v_sums(const vf *x) {
    vf sums = v_sums_4(x);
    if (VL > 4) sums = v_add_pairs(sums, v_sums_4(x + 4 % VL), 4 % VL);
    if (VL > 8) sums = v_add_pairs(sums, v_add_pairs(v_sums_4(x + 8 % VL), v_sums_4(x + 12 % VL), 4 % VL), 8 % VL);
    return sums;
}

/* Lane l of x[i] becomes lane i of x[l]. */
static inline __attribute__((always_inline)) void v_transpose(vf *x) {
#pragma GCC unroll 4
    for (int n = 1; n < VL; n *= 2) { /* across the diagonal, of 1, 2, 4, 8 */
        vi low = V_LANES + (((V_LANES & n) != 0) & (VL - n));
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) {
            if (i & n) continue;
            vf a = x[i], b = x[i + n];
            x[i] = v_pick(a, b, low);
            x[i + n] = v_pick(a, b, low + n);
        }
    }
}

/* 2^r for |r| <= 1/2: a polynomial of degree 6 (minimax, error 2e-9 relative). */
static inline vf v_exp2_between(vf r) {
    vf p = v_set(0.00015353361959569156f);
    p = p * r + 0.0013398873852565885f;
    p = p * r + 0.00961843691766262f;
    p = p * r + 0.055503323674201965f;
    p = p * r + 0.24022647738456726f;
    p = p * r + 0.6931471824645996f;
    return p * r + 1.0f;
}

/* 2^x, within 1 ulp where the result is a normal number; 0 below 2^-126, infinity from 2^127.5 or 2^128 on; NaN for NaN.
 * x = n + r with |r| <= 1/2, and 2^n is an exponent. */
static inline vf v_exp2(vf x) {
#if defined(__AVX512DQ__)
    vf r = (vf)_mm512_reduce_ps((__m512)x, 0);                                              /* x - round(x), 0 for infinity */
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ); /* or NaN */
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)v_exp2_between(r), (__m512)(x - r));
#else
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves round(x) in the low bits */
    vi tiny = x < -126.0f;
    vf y = v_min(v_set(128.0f), v_max(v_set(-126.0f), x)); /* NaN stays: it is the second operand */
    vf shifted = y + magic;
    vf n = shifted - magic;
    vu exponent = ((vu)shifted << 23) + (127u << 23);
    return v_select(tiny, (vf){0}, v_exp2_between(y - n) * (vf)exponent);
#endif
}

/* ---- 16-bit numbers ----------------------------------------------------------------------------- */

static inline vf v_load_half(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vf x;
    for (int l = 0; l < VL; l++) x[l] = cuflash_half_to_float(p[l]);
    return x;
#endif
}

static inline vf v_load_bfloat(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    vu x;
    for (int l = 0; l < VL; l++) x[l] = (uint32_t)p[l] << 16;
    return (vf)x;
#endif
}

static inline void half_to_float_row(const uint16_t *src, int64_t n, float *dst) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) v_store(dst + i, v_load_half(src + i));
    for (; i < n; i++) dst[i] = cuflash_half_to_float(src[i]);
}

static inline void float_to_half_row(const float *src, int64_t n, uint16_t *dst) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(dst + i), _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(dst + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) dst[i] = cuflash_float_to_half(src[i]);
}

static inline void bfloat_to_float_row(const uint16_t *src, int64_t n, float *dst) {
    for (int64_t i = 0; i < n; i++) dst[i] = cuflash_bfloat_to_float(src[i]);
}

static inline void float_to_bfloat_row(const float *src, int64_t n, uint16_t *dst) {
    for (int64_t i = 0; i < n; i++) dst[i] = cuflash_float_to_bfloat(src[i]);
}

#endif
