/* What is done to every element of a tensor, as data: a kind and its parameters. The formulas stand here alone, for the
 * CPU's loops (element.c) and for the kernels (kernels/element). Values are float64 and rounded to the output's dtype
 * afterwards. C11 and CUDA C (compile without contraction to fma). */
#ifndef CUFLASH_OPERATION_H
#define CUFLASH_OPERATION_H

#include "nest.h"
#include "half.h"
#include "philox.h"

/* The larger and the smaller of two; NaN where either is. */
CUFLASH_EVERYWHERE double cuflash_larger(double x, double y) {
    return x > y || x != x ? x : y;
}

CUFLASH_EVERYWHERE double cuflash_smaller(double x, double y) {
    return x < y || x != x ? x : y;
}

/* Rows of kinds: name, name of the kernel, formula. op is the operation, i the element's row-major number, x and y the
 * inputs. */
#define CUFLASH_FILL_MAP(X)                                                                                                    \
    X(FILL, fill, op->value)                                                                                                   \
    X(ARANGE, arange, op->arange.start + (double)i * op->arange.step)

#define CUFLASH_UNARY_MAP(X) /* after the copy in the order of cuflash_unary_op */                                             \
    X(COPY, copy, x)                                                                                                           \
    X(NEG, neg, -x)                                                                                                            \
    X(ABS, abs, fabs(x))                                                                                                       \
    X(EXP, exp, exp(x))                                                                                                        \
    X(LOG, log, log(x))                                                                                                        \
    X(SQRT, sqrt, sqrt(x))

#define CUFLASH_BINARY_MAP(X) /* in the order of cuflash_binary_op */                                                          \
    X(ADD, add, x + y)                                                                                                         \
    X(SUB, sub, x - y)                                                                                                         \
    X(MUL, mul, (x * y))                                                                                                       \
    X(DIV, div, x / y)                                                                                                         \
    X(MAXIMUM, maximum, cuflash_larger(x, y))                                                                                  \
    X(MINIMUM, minimum, cuflash_smaller(x, y))

/* Here the formula is a function that makes elements 4 * quad to 4 * quad + 3. */
#define CUFLASH_RANDOM_MAP(X)                                                                                                  \
    X(UNIFORM, uniform, cuflash_uniform_quad)                                                                                  \
    X(NORMAL, normal, cuflash_normal_quad)

typedef enum {
#define CUFLASH_OP_ENUM(name, kernel, formula) CUFLASH_OP_##name,
    CUFLASH_FILL_MAP(CUFLASH_OP_ENUM) CUFLASH_UNARY_MAP(CUFLASH_OP_ENUM) CUFLASH_BINARY_MAP(CUFLASH_OP_ENUM)
        CUFLASH_RANDOM_MAP(CUFLASH_OP_ENUM)
#undef CUFLASH_OP_ENUM
            CUFLASH_OPS
} cuflash_op_kind;

/* Where a binary operation has a number in the place of a tensor. */
typedef enum { CUFLASH_NO_SCALAR, CUFLASH_SCALAR_X, CUFLASH_SCALAR_Y } cuflash_scalar_place;

typedef struct {
    double start, step;
} cuflash_progression;

typedef struct {
    cuflash_generator generator;
    cuflash_dtype dtype; /* uniform: of the output */
    double low, high;    /* normal: mean and standard deviation */
    double least;        /* uniform: the smallest number of the dtype that is not below low */
} cuflash_distribution;

typedef struct {
    cuflash_op_kind kind;
    cuflash_scalar_place scalar; /* binary kinds */
    union {
        double value; /* of the scalar, or to fill with */
        cuflash_progression arange;
        cuflash_distribution random;
    };
} cuflash_op;

/* x as the dtype holds it: rounded once. */
CUFLASH_EVERYWHERE double cuflash_round_to(cuflash_dtype dtype, double x) {
    switch (dtype) {
    case CUFLASH_FLOAT32: return (double)(float)x;
    case CUFLASH_FLOAT16: return (double)cuflash_half_to_float(cuflash_double_to_half(x));
    case CUFLASH_BFLOAT16: return (double)cuflash_bfloat_to_float(cuflash_double_to_bfloat(x));
    case CUFLASH_FLOAT64: break;
    }
    return x;
}

/* ---- Random numbers ----------------------------------------------------------------------------- */

/* Element i takes word i % 4 of block offset + i / 4; a float64 uniform takes two words, i % 2 of block offset + i / 2. */
CUFLASH_EVERYWHERE int cuflash_elements_per_block(const cuflash_op *op) {
    return op->kind == CUFLASH_OP_UNIFORM && op->random.dtype == CUFLASH_FLOAT64 ? 2 : 4;
}

/* Bits of a uniform number that the dtype, no float64, holds exactly below 1. */
CUFLASH_EVERYWHERE int cuflash_uniform_bits(cuflash_dtype dtype) {
    return dtype == CUFLASH_FLOAT16 ? 11 : dtype == CUFLASH_BFLOAT16 ? 8 : 24;
}

CUFLASH_EVERYWHERE void cuflash_uniform_quad(const cuflash_op *op, uint64_t quad, double value[4]) {
    const cuflash_distribution *p = &op->random;
    if (p->dtype == CUFLASH_FLOAT64)
        for (int half = 0; half < 2; half++) {
            cuflash_philox_block block = cuflash_philox(p->generator.seed, p->generator.offset + 2 * quad + (uint64_t)half);
            for (int j = 0; j < 2; j++)
                value[2 * half + j] = (double)(((uint64_t)block.word[2 * j] << 21) ^ (block.word[2 * j + 1] >> 11)) * 0x1p-53;
        }
    else {
        cuflash_philox_block block = cuflash_philox(p->generator.seed, p->generator.offset + quad);
        for (int j = 0; j < 4; j++) value[j] = cuflash_philox_uniform(block.word[j], cuflash_uniform_bits(p->dtype));
    }
    for (int j = 0; j < 4; j++) {
        double x = cuflash_round_to(p->dtype, p->low + value[j] * (p->high - p->low));
        value[j] = x < p->low || x >= p->high ? p->least : x; /* rounding must not leave the range */
    }
}

CUFLASH_EVERYWHERE void cuflash_normal_quad(const cuflash_op *op, uint64_t quad, double value[4]) {
    const cuflash_distribution *p = &op->random;
    cuflash_philox_block block = cuflash_philox(p->generator.seed, p->generator.offset + quad);
    cuflash_philox_normal(block.word[0], block.word[1], &value[0], &value[1]);
    cuflash_philox_normal(block.word[2], block.word[3], &value[2], &value[3]);
    for (int j = 0; j < 4; j++) value[j] = p->low + p->high * value[j];
}

#endif
