/* Reductions and comparison. Sums are kept in float64. */
#include <math.h>
#include <string.h>

#include "cuda/element.h"
#include "element.h"
#include "reduction.h"
#include "tensor.h"

static cuflash_status check_reduce_op(const char *fn, int op) {
    if (op >= 0 && op <= CUFLASH_MIN) return CUFLASH_SUCCESS;
    return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument 'op': expected 0 to %d, got %d", fn, CUFLASH_MIN, op);
}

/* ---- All elements ------------------------------------------------------------------------------- */

typedef struct {
    cuflash_reduce_op op;
    double partial[CUFLASH_GROUPS];
} reduction;

static void reduce_chunk(void *context, int group, int64_t first, int64_t n, const double *a, const double *b) {
    (void)first, (void)b;
    reduction *work = context;
    double value = cuflash_neutral(work->op);
    for (int64_t i = 0; i < n; i++) value = cuflash_combine(work->op, value, a[i]);
    work->partial[group] = cuflash_combine(work->op, work->partial[group], value);
}

static double reduce_all(cuflash_reduce_op op, const cuflash_tensor *a) {
    reduction work = {.op = op};
    for (int g = 0; g < CUFLASH_GROUPS; g++) work.partial[g] = cuflash_neutral(op);
    cuflash_scan(a, NULL, reduce_chunk, &work);
    double value = cuflash_neutral(op);
    for (int g = 0; g < CUFLASH_GROUPS; g++) value = cuflash_combine(op, value, work.partial[g]);
    return value;
}

cuflash_status cuflash_tensor_reduce_all(cuflash_reduce_op op, const cuflash_tensor *a, double *result) {
    static const char fn[] = "tensor_reduce_all";
    CUFLASH_TRY(check_reduce_op(fn, (int)op));
    CUFLASH_TRY(cuflash_check_tensor(fn, "a", a));
    if (!result) return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument 'result': expected a pointer, got NULL", fn);
    double value;
    if (a->device == CUFLASH_CPU)
        value = reduce_all(op, a);
    else
        CUFLASH_TRY(cuflash_cuda_reduce_all(fn, op, a, &value));
    *result = op == CUFLASH_MEAN ? value / (double)cuflash_tensor_numel(a) : value;
    return CUFLASH_SUCCESS;
}

/* ---- One dimension ------------------------------------------------------------------------------ */

typedef struct {
    cuflash_reduce_op op;
    cuflash_tensor slice; /* a without the dimension, at its first index */
    int64_t length, stride;
} dim_reduction;

/* The address of row-major element number `number` of t. */
static const char *element_at(const cuflash_tensor *t, int64_t number) {
    int64_t offset = 0;
    for (int i = t->ndim - 1; i >= 0; i--) {
        offset += number % t->shape[i] * t->stride[i];
        number /= t->shape[i];
    }
    return (const char *)t->data + offset * (int64_t)cuflash_dtype_size(t->dtype);
}

static void reduce_dim_chunk(const void *context, int64_t first, int64_t n, double *values) {
    const dim_reduction *work = context;
    const cuflash_tensor *slice = &work->slice;
    int64_t inner = slice->ndim > 0 ? slice->shape[slice->ndim - 1] : 1;
    int64_t inner_stride = slice->ndim > 0 ? slice->stride[slice->ndim - 1] : 1;
    int64_t step = work->stride * (int64_t)cuflash_dtype_size(slice->dtype);
    double row[CUFLASH_CHUNK];
    for (int64_t done = 0; done < n;) { /* as far as one row of the slice goes */
        int64_t left = inner - (first + done) % inner;
        int64_t count = n - done < left ? n - done : left;
        const char *address = element_at(slice, first + done);
        for (int64_t i = 0; i < count; i++) values[done + i] = cuflash_neutral(work->op);
        for (int64_t j = 0; j < work->length; j++) {
            cuflash_load_elements(slice->dtype, address + j * step, inner_stride, count, row);
            for (int64_t i = 0; i < count; i++) values[done + i] = cuflash_combine(work->op, values[done + i], row[i]);
        }
        if (work->op == CUFLASH_MEAN)
            for (int64_t i = 0; i < count; i++) values[done + i] /= (double)work->length;
        done += count;
    }
}

static void reduce_dim(cuflash_reduce_op op, const cuflash_tensor *out, const cuflash_tensor *slice, int64_t length,
                       int64_t stride) {
    dim_reduction work = {op, *slice, length, stride};
    cuflash_make(out, reduce_dim_chunk, &work);
}

static cuflash_status check_result(const char *fn, const cuflash_tensor *out, const cuflash_tensor *a,
                                   const cuflash_tensor *slice) {
    char have[CUFLASH_SHAPE_TEXT], want[CUFLASH_SHAPE_TEXT];
    if (!cuflash_same_shape(out, slice))
        return cuflash_fail(CUFLASH_DIMENSION_MISMATCH, "%s: argument 'out': expected %s, got %s", fn,
                            cuflash_shape_text(want, slice->ndim, slice->shape),
                            cuflash_shape_text(have, out->ndim, out->shape));
    CUFLASH_TRY(cuflash_check_device(fn, "out", out, a->device));
    if (cuflash_spans_overlap(out, a))
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument 'out': expected memory of its own, got a part of 'a'", fn);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_tensor_reduce(cuflash_reduce_op op, const cuflash_tensor *out, const cuflash_tensor *a, int dim) {
    static const char fn[] = "tensor_reduce";
    CUFLASH_TRY(check_reduce_op(fn, (int)op));
    CUFLASH_TRY(cuflash_check_output(fn, "out", out));
    CUFLASH_TRY(cuflash_check_tensor(fn, "a", a));
    if (dim < 0 || dim >= a->ndim)
        return cuflash_fail(CUFLASH_INVALID_DIMENSION, "%s: argument 'dim': expected a dimension of the %d of 'a', got %d", fn,
                            a->ndim, dim);
    cuflash_tensor slice;
    CUFLASH_TRY(cuflash_tensor_select(&slice, a, dim, 0));
    cuflash_status status = check_result(fn, out, a, &slice);
    if (status == CUFLASH_SUCCESS && a->device != CUFLASH_CPU)
        status = cuflash_cuda_reduce(fn, op, out, &slice, a->shape[dim], a->stride[dim]);
    else if (status == CUFLASH_SUCCESS)
        reduce_dim(op, out, &slice, a->shape[dim], a->stride[dim]);
    cuflash_tensor_release(&slice);
    return status;
}

/* ---- Comparison --------------------------------------------------------------------------------- */

typedef struct {
    cuflash_tolerance tolerance;
    cuflash_difference group[CUFLASH_GROUPS];
} comparison;

static void compare_chunk(void *context, int group, int64_t first, int64_t n, const double *a, const double *b) {
    comparison *work = context;
    for (int64_t i = 0; i < n; i++) cuflash_difference_add(&work->group[group], &work->tolerance, first + i, a[i], b[i]);
}

static cuflash_difference compare(const cuflash_tolerance *tolerance, const cuflash_tensor *actual,
                                  const cuflash_tensor *expected) {
    comparison work = {.tolerance = *tolerance};
    cuflash_scan(actual, expected, compare_chunk, &work);
    cuflash_difference all = {0};
    for (int g = 0; g < CUFLASH_GROUPS; g++) cuflash_difference_merge(&all, &work.group[g]);
    return all;
}

/* On the device of actual, to which expected goes where it is on another. */
static cuflash_status compare_on_device(const char *fn, const cuflash_tolerance *tolerance, const cuflash_tensor *actual,
                                        const cuflash_tensor *expected, cuflash_difference *all) {
    if (actual->device != expected->device) {
        cuflash_tensor moved;
        CUFLASH_TRY(cuflash_tensor_empty(&moved, expected->dtype, actual->device, expected->ndim, expected->shape));
        cuflash_status status = cuflash_tensor_copy(&moved, expected);
        if (status == CUFLASH_SUCCESS) status = compare_on_device(fn, tolerance, actual, &moved, all);
        cuflash_tensor_release(&moved);
        return status;
    }
    if (actual->device != CUFLASH_CPU) return cuflash_cuda_compare(fn, tolerance, actual, expected, all);
    *all = compare(tolerance, actual, expected);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_tensor_compare(const cuflash_tensor *actual, const cuflash_tensor *expected, double rtol, double atol,
                                      bool equal_nan, cuflash_close_report *report) {
    static const char fn[] = "tensor_compare";
    CUFLASH_TRY(cuflash_check_tensor(fn, "actual", actual));
    CUFLASH_TRY(cuflash_check_tensor(fn, "expected", expected));
    if (!report) return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument 'report': expected a pointer, got NULL", fn);
    if (!(rtol >= 0) || !(atol >= 0))
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument '%s': expected a tolerance of at least 0, got %g", fn,
                            rtol >= 0 ? "atol" : "rtol", rtol >= 0 ? atol : rtol);
    if (!cuflash_same_shape(actual, expected)) {
        char have[CUFLASH_SHAPE_TEXT], want[CUFLASH_SHAPE_TEXT];
        return cuflash_fail(CUFLASH_DIMENSION_MISMATCH, "%s: argument 'actual': expected %s as 'expected' has, got %s", fn,
                            cuflash_shape_text(want, expected->ndim, expected->shape),
                            cuflash_shape_text(have, actual->ndim, actual->shape));
    }
    cuflash_difference all;
    CUFLASH_TRY(compare_on_device(fn, &(cuflash_tolerance){rtol, atol, equal_nan}, actual, expected, &all));
    memset(report, 0, sizeof *report);
    report->numel = cuflash_tensor_numel(actual);
    report->n_bad = all.n_bad;
    report->max_abs = all.max_abs;
    report->max_rel = all.max_rel;
    report->rel_norm = all.diff_squares == 0 ? 0 : sqrt(all.diff_squares) / sqrt(all.expected_squares);
    report->worst_actual = all.worst_actual;
    report->worst_expected = all.worst_expected;
    if (all.n_bad > 0)
        for (int i = actual->ndim - 1; i >= 0; i--) {
            report->worst_index[i] = all.worst % actual->shape[i];
            all.worst /= actual->shape[i];
        }
    return CUFLASH_SUCCESS;
}
