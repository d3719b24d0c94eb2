/* Philox4x32-10 and the numbers made from it. Only +, -, *, / and sqrt, each rounded once (compile without
 * contraction to fma), so that every device gets the same bits. C11 and CUDA C. */
#ifndef CUFLASH_PHILOX_H
#define CUFLASH_PHILOX_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "everywhere.h"

typedef struct {
    uint32_t word[4];
} cuflash_philox_block;

/* Block number `counter` of the stream `seed`. The constants are those of Salmon et al. (SC 2011), table 2. */
CUFLASH_EVERYWHERE cuflash_philox_block cuflash_philox(uint64_t seed, uint64_t counter) {
    uint32_t x0 = (uint32_t)counter, x1 = (uint32_t)(counter >> 32), x2 = 0, x3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53 * x0, p1 = (uint64_t)0xCD9E8D57 * x2;
        x0 = (uint32_t)(p1 >> 32) ^ x1 ^ k0;
        x1 = (uint32_t)p1;
        x2 = (uint32_t)(p0 >> 32) ^ x3 ^ k1;
        x3 = (uint32_t)p0;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    cuflash_philox_block block = {{x0, x1, x2, x3}};
    return block;
}

/* ln((2 x + 1) / 2^33), for a 32-bit x: the logarithm of a number strictly between 0 and 1. */
CUFLASH_EVERYWHERE double cuflash_philox_log(uint32_t x) {
    double u = (2.0 * (double)x + 1.0) * 0x1p-33, m;
    uint64_t bits;
    memcpy(&bits, &u, sizeof bits);
    double e = (double)((int)(bits >> 52) - 1023);
    bits = (bits & 0x000fffffffffffff) | 0x3ff0000000000000;
    memcpy(&m, &bits, sizeof m); /* u = m 2^e, m in [1, 2) */
    if (m > 1.4142135623730951) {
        m = m * 0.5;
        e = e + 1.0;
    }
    /* ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.172 */
    double s = (m - 1.0) / (m + 1.0), z = s * s, p = 1.0 / 21;
    for (int k = 19; k >= 1; k -= 2) p = p * z + 1.0 / k;
    return e * 0.6931471805599453 + 2.0 * s * p;
}

/* Two independent standard normal numbers from two words, after Box and Muller (1958). */
CUFLASH_EVERYWHERE void cuflash_philox_normal(uint32_t x0, uint32_t x1, double *z0, double *z1) {
    double radius = sqrt(-2.0 * cuflash_philox_log(x0));
    /* The angle: a quadrant, and a rest phi in (-pi/4, pi/4) around the quadrant's middle. */
    double phi = ((double)(x1 & 0x3fffffff) + 0.5 - 536870912.0) * (1.5707963267948966 / 1073741824.0);
    double z = phi * phi, sine = 0, cosine = 0;
    for (int k = 17; k >= 3; k -= 2) {
        sine = (sine + 1.0) * z * (-1.0 / (k * (k - 1)));
        cosine = (cosine + 1.0) * z * (-1.0 / ((k - 1) * (k - 2)));
    }
    sine = (sine + 1.0) * phi * 0.7071067811865476; /* Taylor series, divided by sqrt 2 */
    cosine = (cosine + 1.0) * 0.7071067811865476;
    double c = cosine - sine, s = cosine + sine; /* of phi + pi/4 */
    switch (x1 >> 30) {
    case 0: *z0 = radius * c, *z1 = radius * s; break;
    case 1: *z0 = -radius * s, *z1 = radius * c; break;
    case 2: *z0 = -radius * c, *z1 = -radius * s; break;
    default: *z0 = radius * s, *z1 = -radius * c; break;
    }
}

/* Uniform in [0, 1) with this many bits, at most 32. */
CUFLASH_EVERYWHERE double cuflash_philox_uniform(uint32_t x, int bits) {
    return (double)(x >> (32 - bits)) / (double)((uint64_t)1 << bits);
}

#endif
