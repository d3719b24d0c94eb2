/* float16, bfloat16, float32 and float64 to and from one another, one number at a time. Rounds once, to nearest, ties to
 * even; keeps infinities, denormals and the sign of zero; a NaN stays a NaN, of the same bits on every device. C11 and CUDA
 * C (compile without flushing denormals to zero). */
#ifndef CUFLASH_HALF_H
#define CUFLASH_HALF_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "everywhere.h"

CUFLASH_EVERYWHERE uint32_t cuflash_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

CUFLASH_EVERYWHERE float cuflash_bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

CUFLASH_EVERYWHERE float cuflash_half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return cuflash_bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    /* Shifted into place the exponent is 112 too small; a product corrects it, denormals included. */
    float x = cuflash_bits_float(magnitude << 13) * 0x1p112f;
    return cuflash_bits_float(sign | cuflash_float_bits(x));
}

CUFLASH_EVERYWHERE uint16_t cuflash_float_to_half(float x) {
    uint32_t bits = cuflash_float_bits(x), magnitude = bits & 0x7fffffff;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* 65520 and more round to infinity */
    if (magnitude < 0x38800000) /* below 2^-14: adding 0.5 leaves the denormal in the low bits, rounded */
        return sign | (uint16_t)(cuflash_float_bits(cuflash_bits_float(magnitude) + 0.5f) - 0x3f000000);
    magnitude += 0xc8000fff + (magnitude >> 13 & 1); /* exponent down by 112, and round to even */
    return sign | (uint16_t)(magnitude >> 13);
}

CUFLASH_EVERYWHERE float cuflash_bfloat_to_float(uint16_t b) {
    return cuflash_bits_float((uint32_t)b << 16);
}

CUFLASH_EVERYWHERE uint16_t cuflash_float_to_bfloat(float x) {
    uint32_t bits = cuflash_float_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* CPUs keep the sign of a NaN and as much of its payload as fits; GPUs have one NaN for all. */
CUFLASH_EVERYWHERE double cuflash_float_to_double(float x) {
#ifdef __CUDA_ARCH__
    if (x != x) {
        uint64_t bits = cuflash_float_bits(x);
        return __longlong_as_double((long long)((bits & 0x80000000) << 32 | 0x7ff8000000000000 | (bits & 0x7fffff) << 29));
    }
#endif
    return (double)x;
}

CUFLASH_EVERYWHERE float cuflash_double_to_float(double x) {
#ifdef __CUDA_ARCH__
    if (x != x) {
        uint64_t bits = (uint64_t)__double_as_longlong(x);
        return cuflash_bits_float((uint32_t)((bits >> 32 & 0x80000000) | 0x7fc00000 | (bits >> 29 & 0x7fffff)));
    }
#endif
    return (float)x;
}

/* Rounding float64 to 16 bits by way of float32 would round twice. Rounding the first step to odd makes the
 * second one right: the last bit then remembers that something was cut off. */
CUFLASH_EVERYWHERE float cuflash_round_to_odd(double x) {
    float f = cuflash_double_to_float(x);
    double back = (double)f;
    if (back == x || x != x || f - f != 0) return f; /* exact, NaN, or overflowed */
    uint32_t bits = cuflash_float_bits(f);
    if (bits & 1) return f;
    bool away = back > x ? x > 0 : x < 0; /* was the magnitude rounded up? */
    return cuflash_bits_float(away ? bits - 1 : bits + 1);
}

CUFLASH_EVERYWHERE uint16_t cuflash_double_to_half(double x) {
    return cuflash_float_to_half(cuflash_round_to_odd(x));
}

CUFLASH_EVERYWHERE uint16_t cuflash_double_to_bfloat(double x) {
    return cuflash_float_to_bfloat(cuflash_round_to_odd(x));
}

#endif
