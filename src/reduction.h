/* How many elements become one: reductions and comparison. Used by reduce.c and by the kernels (kernels/element). C11 and
 * CUDA C (compile without contraction to fma). */
#ifndef CUFLASH_REDUCTION_H
#define CUFLASH_REDUCTION_H

#include "operation.h"

CUFLASH_EVERYWHERE double cuflash_combine(cuflash_reduce_op op, double x, double y) {
    switch (op) {
    case CUFLASH_MAX: return cuflash_larger(x, y);
    case CUFLASH_MIN: return cuflash_smaller(x, y);
    default: return x + y;
    }
}

/* What changes nothing when combined. */
CUFLASH_EVERYWHERE double cuflash_neutral(cuflash_reduce_op op) {
    return op == CUFLASH_MAX ? -INFINITY : op == CUFLASH_MIN ? INFINITY : 0;
}

typedef struct {
    double rtol, atol;
    int32_t equal_nan;
} cuflash_tolerance;

/* What a comparison has found in some elements; all 0 before the first. */
typedef struct {
    int64_t n_bad, worst; /* worst: row-major number of the element furthest beyond its tolerance, the first of several */
    double max_abs, max_rel, excess; /* excess: how far beyond its tolerance the worst element is */
    double diff_squares, expected_squares;
    double worst_actual, worst_expected;
} cuflash_difference;

/* Is x further off than y? A NaN is further off than any number. */
CUFLASH_EVERYWHERE bool cuflash_exceeds(double x, double y) {
    return y == y && !(x <= y);
}

/* Element number i, which comes after those that d has seen. */
CUFLASH_EVERYWHERE void cuflash_difference_add(cuflash_difference *d, const cuflash_tolerance *t, int64_t i, double actual,
                                               double expected) {
    double size = fabs(expected);
    bool finite = size - size == 0;
    if (actual == expected || (t->equal_nan && actual != actual && expected != expected)) {
        if (finite) d->expected_squares += expected * expected;
        return;
    }
    double gap = fabs(actual - expected), excess = gap - (t->atol + t->rtol * size);
    d->max_abs = cuflash_larger(d->max_abs, gap);
    if (size != 0) d->max_rel = cuflash_larger(d->max_rel, gap / size);
    d->diff_squares += gap * gap;
    d->expected_squares += size * size;
    if (gap <= t->atol + t->rtol * size && finite) return;
    if (d->n_bad++ == 0 || cuflash_exceeds(excess, d->excess)) {
        d->excess = excess;
        d->worst = i;
        d->worst_actual = actual;
        d->worst_expected = expected;
    }
}

/* Adds what b has found to a. */
CUFLASH_EVERYWHERE void cuflash_difference_merge(cuflash_difference *a, const cuflash_difference *b) {
    bool first = b->worst < a->worst && !cuflash_exceeds(a->excess, b->excess);
    if (b->n_bad > 0 && (a->n_bad == 0 || cuflash_exceeds(b->excess, a->excess) || first)) {
        a->excess = b->excess;
        a->worst = b->worst;
        a->worst_actual = b->worst_actual;
        a->worst_expected = b->worst_expected;
    }
    a->n_bad += b->n_bad;
    a->max_abs = cuflash_larger(a->max_abs, b->max_abs);
    a->max_rel = cuflash_larger(a->max_rel, b->max_rel);
    a->diff_squares += b->diff_squares;
    a->expected_squares += b->expected_squares;
}

#endif
