/* float16 and bfloat16 to and from float32, one number at a time, in portable C. Rounds to nearest, ties to even;
 * keeps infinities, denormals and the sign of zero; a NaN stays a NaN. */
#ifndef CUFLASH_HALF_H
#define CUFLASH_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t cuflash_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float cuflash_bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float cuflash_half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return cuflash_bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    /* Shifted into place the exponent is 112 too small; a product corrects it, denormals included. */
    float x = cuflash_bits_float(magnitude << 13) * 0x1p112f;
    return cuflash_bits_float(sign | cuflash_float_bits(x));
}

static inline uint16_t cuflash_float_to_half(float x) {
    uint32_t bits = cuflash_float_bits(x), magnitude = bits & 0x7fffffff;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* 65520 and more round to infinity */
    if (magnitude < 0x38800000) /* below 2^-14: adding 0.5 leaves the denormal in the low bits, rounded */
        return sign | (uint16_t)(cuflash_float_bits(cuflash_bits_float(magnitude) + 0.5f) - 0x3f000000);
    magnitude += 0xc8000fff + (magnitude >> 13 & 1); /* exponent down by 112, and round to even */
    return sign | (uint16_t)(magnitude >> 13);
}

static inline float cuflash_bfloat_to_float(uint16_t b) {
    return cuflash_bits_float((uint32_t)b << 16);
}

static inline uint16_t cuflash_float_to_bfloat(float x) {
    uint32_t bits = cuflash_float_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
