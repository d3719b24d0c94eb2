/* Rows of elements of any dtype, read and written as float64, and the engine that runs over strided tensors. */
#ifndef CUFLASH_ELEMENT_H
#define CUFLASH_ELEMENT_H

#include "status.h"

enum { CUFLASH_CHUNK = 512 }; /* elements handled at a time */

void cuflash_load_elements(cuflash_dtype dtype, const void *src, int64_t stride, int64_t n, double *dst);
void cuflash_store_elements(cuflash_dtype dtype, void *dst, int64_t stride, int64_t n, const double *src);

/* value as the dtype holds it: rounded once. */
double cuflash_round_to(cuflash_dtype dtype, double value);

/* The larger and the smaller of two; NaN where either is. */
static inline double cuflash_larger(double x, double y) {
    return x > y || x != x ? x : y;
}

static inline double cuflash_smaller(double x, double y) {
    return x < y || x != x ? x : y;
}

/* Works on n <= CUFLASH_CHUNK elements, which are number first, first + 1, ... in row-major order of out: a holds
 * the first input and receives the result; b holds the second input. */
typedef void (*cuflash_map_fn)(void *context, int64_t first, int64_t n, double *a, const double *b);

/* What messages call the function and its tensors. */
typedef struct {
    const char *fn, *out, *a, *b;
} cuflash_names;

/* Checks the tensors and computes out = fn(a, b), element by element. Inputs broadcast to out and may overlap it. An input
 * that is not named is not there. */
cuflash_status cuflash_map(cuflash_names names, const cuflash_tensor *out, const cuflash_tensor *a, const cuflash_tensor *b,
                           cuflash_map_fn fn, void *context);

/* Reads one or two tensors of the same shape, in groups of elements that depend only on shape and strides: fn is called on
 * group number 0 ... CUFLASH_GROUPS - 1, several times each, in row-major order within a group, and different
 * groups run in parallel. Empty groups are not called. */
enum { CUFLASH_GROUPS = 256 };
typedef void (*cuflash_scan_fn)(void *context, int group, int64_t first, int64_t n, const double *a, const double *b);
void cuflash_scan(const cuflash_tensor *a, const cuflash_tensor *b, cuflash_scan_fn fn, void *context);

#endif
