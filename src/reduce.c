/* Reductions and comparison. Sums are kept in float64. */
#include <math.h>
#include <string.h>

#include "element.h"
#include "tensor.h"

static double combine(cuflash_reduce_op op, double x, double y) {
    switch (op) {
    case CUFLASH_MAX: return cuflash_larger(x, y);
    case CUFLASH_MIN: return cuflash_smaller(x, y);
    default: return x + y;
    }
}

static double neutral(cuflash_reduce_op op) {
    return op == CUFLASH_MAX ? -INFINITY : op == CUFLASH_MIN ? INFINITY : 0;
}

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
    double value = neutral(work->op);
    for (int64_t i = 0; i < n; i++) value = combine(work->op, value, a[i]);
    work->partial[group] = combine(work->op, work->partial[group], value);
}

cuflash_status cuflash_tensor_reduce_all(cuflash_reduce_op op, const cuflash_tensor *a, double *result) {
    CUFLASH_TRY(check_reduce_op("tensor_reduce_all", (int)op));
    CUFLASH_TRY(cuflash_check_tensor("tensor_reduce_all", "a", a));
    if (!result)
        return cuflash_fail(CUFLASH_NULL_POINTER, "tensor_reduce_all: argument 'result': expected a pointer, got NULL");
    reduction work = {.op = op};
    for (int g = 0; g < CUFLASH_GROUPS; g++) work.partial[g] = neutral(op);
    cuflash_scan(a, NULL, reduce_chunk, &work);
    double value = neutral(op);
    for (int g = 0; g < CUFLASH_GROUPS; g++) value = combine(op, value, work.partial[g]);
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

static void reduce_dim_chunk(void *context, int64_t first, int64_t n, double *a, const double *b) {
    (void)b;
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
        for (int64_t i = 0; i < count; i++) a[done + i] = neutral(work->op);
        for (int64_t j = 0; j < work->length; j++) {
            cuflash_load_elements(slice->dtype, address + j * step, inner_stride, count, row);
            for (int64_t i = 0; i < count; i++) a[done + i] = combine(work->op, a[done + i], row[i]);
        }
        if (work->op == CUFLASH_MEAN)
            for (int64_t i = 0; i < count; i++) a[done + i] /= (double)work->length;
        done += count;
    }
}

cuflash_status cuflash_tensor_reduce(cuflash_reduce_op op, const cuflash_tensor *out, const cuflash_tensor *a, int dim) {
    CUFLASH_TRY(check_reduce_op("tensor_reduce", (int)op));
    CUFLASH_TRY(cuflash_check_output("tensor_reduce", "out", out));
    CUFLASH_TRY(cuflash_check_tensor("tensor_reduce", "a", a));
    if (dim < 0 || dim >= a->ndim)
        return cuflash_fail(CUFLASH_INVALID_DIMENSION,
                            "tensor_reduce: argument 'dim': expected a dimension of the %d of 'a', got %d", a->ndim, dim);
    dim_reduction work = {.op = op, .length = a->shape[dim], .stride = a->stride[dim]};
    CUFLASH_TRY(cuflash_tensor_select(&work.slice, a, dim, 0));
    cuflash_status status = CUFLASH_SUCCESS;
    char have[CUFLASH_SHAPE_TEXT], want[CUFLASH_SHAPE_TEXT];
    if (!cuflash_same_shape(out, &work.slice))
        status = cuflash_fail(CUFLASH_DIMENSION_MISMATCH, "tensor_reduce: argument 'out': expected %s, got %s",
                              cuflash_shape_text(want, work.slice.ndim, work.slice.shape),
                              cuflash_shape_text(have, out->ndim, out->shape));
    else if (out->device != a->device)
        status =
            cuflash_fail(CUFLASH_INVALID_ARGUMENT, "tensor_reduce: argument 'out': expected a tensor on the device of 'a'");
    else if (cuflash_spans_overlap(out, a))
        status = cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                              "tensor_reduce: argument 'out': expected memory of its own, got a part of 'a'");
    else
        status = cuflash_map((cuflash_names){"tensor_reduce", "out", NULL, NULL}, out, NULL, NULL, reduce_dim_chunk, &work);
    cuflash_tensor_release(&work.slice);
    return status;
}

/* ---- Comparison --------------------------------------------------------------------------------- */

typedef struct {
    int64_t n_bad, worst;
    double max_abs, max_rel, excess; /* excess: how far beyond its tolerance the worst element is */
    double diff_squares, expected_squares;
    double worst_actual, worst_expected;
} difference;

typedef struct {
    double rtol, atol;
    bool equal_nan;
    difference group[CUFLASH_GROUPS];
} comparison;

/* Is x further off than y? A NaN is further off than any number. */
static bool exceeds(double x, double y) {
    return y == y && !(x <= y);
}

static void compare_chunk(void *context, int group, int64_t first, int64_t n, const double *a, const double *b) {
    comparison *work = context;
    difference *d = &work->group[group];
    for (int64_t i = 0; i < n; i++) {
        if (a[i] == b[i] || (work->equal_nan && a[i] != a[i] && b[i] != b[i])) {
            if (isfinite(b[i])) d->expected_squares += b[i] * b[i];
            continue;
        }
        double gap = fabs(a[i] - b[i]), size = fabs(b[i]);
        bool close = gap <= work->atol + work->rtol * size && isfinite(size);
        d->max_abs = cuflash_larger(d->max_abs, gap);
        if (size != 0) d->max_rel = cuflash_larger(d->max_rel, gap / size);
        d->diff_squares += gap * gap;
        d->expected_squares += size * size;
        if (close) continue;
        double excess = gap - (work->atol + work->rtol * size);
        if (d->n_bad++ == 0 || exceeds(excess, d->excess)) {
            d->excess = excess;
            d->worst = first + i;
            d->worst_actual = a[i];
            d->worst_expected = b[i];
        }
    }
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
    comparison work = {.rtol = rtol, .atol = atol, .equal_nan = equal_nan};
    cuflash_scan(actual, expected, compare_chunk, &work);

    difference all = work.group[0];
    for (int g = 1; g < CUFLASH_GROUPS; g++) {
        const difference *d = &work.group[g];
        if (d->n_bad > 0 && (all.n_bad == 0 || exceeds(d->excess, all.excess))) {
            all.excess = d->excess;
            all.worst = d->worst;
            all.worst_actual = d->worst_actual;
            all.worst_expected = d->worst_expected;
        }
        all.n_bad += d->n_bad;
        all.max_abs = cuflash_larger(all.max_abs, d->max_abs);
        all.max_rel = cuflash_larger(all.max_rel, d->max_rel);
        all.diff_squares += d->diff_squares;
        all.expected_squares += d->expected_squares;
    }
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
