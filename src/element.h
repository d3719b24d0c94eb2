/* Rows of elements of any dtype, read and written as float64, and the engine that runs over strided tensors. */
#ifndef CUFLASH_ELEMENT_H
#define CUFLASH_ELEMENT_H

#include "operation.h"
#include "status.h"

enum { CUFLASH_CHUNK = 512 }; /* elements handled at a time */

/* In host memory. */
void cuflash_load_elements(cuflash_dtype dtype, const void *src, int64_t stride, int64_t n, double *dst);
void cuflash_store_elements(cuflash_dtype dtype, void *dst, int64_t stride, int64_t n, const double *src);

/* What messages call the function and its tensors. */
typedef struct {
    const char *fn, *out, *a, *b;
} cuflash_names;

/* Checks the tensors and computes out = op(a, b), element by element, on their device. Inputs broadcast to out and may overlap
 * it. An input that is not named is not there. */
cuflash_status cuflash_map(cuflash_names names, const cuflash_tensor *out, const cuflash_tensor *a, const cuflash_tensor *b,
                           const cuflash_op *op);

/* ---- On the CPU alone --------------------------------------------------------------------------- */

/* Fills a tensor: fn makes n <= CUFLASH_CHUNK values, of elements first, first + 1, ... in row-major order. */
typedef void (*cuflash_make_fn)(const void *context, int64_t first, int64_t n, double *values);
void cuflash_make(const cuflash_tensor *out, cuflash_make_fn fn, const void *context);

/* Reads one or two tensors of the same shape, in groups of elements that depend only on shape and strides: fn is called on
 * group number 0 ... CUFLASH_GROUPS - 1, several times each, in row-major order within a group, and different
 * groups run in parallel. Empty groups are not called. */
enum { CUFLASH_GROUPS = 256 };
typedef void (*cuflash_scan_fn)(void *context, int group, int64_t first, int64_t n, const double *a, const double *b);
void cuflash_scan(const cuflash_tensor *a, const cuflash_tensor *b, cuflash_scan_fn fn, void *context);

#endif
