/* The element-wise functions of the API, each a few lines over the engine in element.c. */
#include <math.h>

#include "element.h"
#include "tensor.h"

static void copy_chunk(void *context, int64_t first, int64_t n, double *a, const double *b) {
    (void)context, (void)first, (void)n, (void)a, (void)b;
}

cuflash_status cuflash_tensor_copy(const cuflash_tensor *dst, const cuflash_tensor *src) {
    return cuflash_map((cuflash_names){"tensor_copy", "dst", "src", NULL}, dst, src, NULL, copy_chunk, NULL);
}

static void fill_chunk(void *context, int64_t first, int64_t n, double *a, const double *b) {
    (void)first, (void)b;
    for (int64_t i = 0; i < n; i++) a[i] = *(const double *)context;
}

cuflash_status cuflash_tensor_fill(const cuflash_tensor *dst, double value) {
    return cuflash_map((cuflash_names){"tensor_fill", "dst", NULL, NULL}, dst, NULL, NULL, fill_chunk, &value);
}

typedef struct {
    double start, step;
} progression;

static void arange_chunk(void *context, int64_t first, int64_t n, double *a, const double *b) {
    (void)b;
    const progression *p = context;
    for (int64_t i = 0; i < n; i++) a[i] = p->start + (double)(first + i) * p->step;
}

cuflash_status cuflash_tensor_arange(const cuflash_tensor *dst, double start, double step) {
    progression p = {start, step};
    return cuflash_map((cuflash_names){"tensor_arange", "dst", NULL, NULL}, dst, NULL, NULL, arange_chunk, &p);
}

static cuflash_status element_address(const char *fn, const cuflash_tensor *tensor, const int64_t *index, void **address) {
    CUFLASH_TRY(cuflash_check_tensor(fn, "tensor", tensor));
    if (tensor->ndim > 0 && !index)
        return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument 'index': expected %d indices, got NULL", fn, tensor->ndim);
    int64_t offset = 0;
    for (int i = 0; i < tensor->ndim; i++) {
        if (index[i] < 0 || index[i] >= tensor->shape[i])
            return cuflash_fail(CUFLASH_INVALID_DIMENSION, "%s: argument 'index': expected 0 to %lld in dimension %d, got %lld",
                                fn, (long long)tensor->shape[i] - 1, i, (long long)index[i]);
        offset += index[i] * tensor->stride[i];
    }
    *address = (char *)tensor->data + offset * (int64_t)cuflash_dtype_size(tensor->dtype);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_tensor_get(const cuflash_tensor *tensor, const int64_t *index, double *value) {
    void *address;
    CUFLASH_TRY(element_address("tensor_get", tensor, index, &address));
    if (!value) return cuflash_fail(CUFLASH_NULL_POINTER, "tensor_get: argument 'value': expected a pointer, got NULL");
    cuflash_load_elements(tensor->dtype, address, 1, 1, value);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_tensor_set(const cuflash_tensor *tensor, const int64_t *index, double value) {
    void *address;
    CUFLASH_TRY(element_address("tensor_set", tensor, index, &address));
    cuflash_store_elements(tensor->dtype, address, 1, 1, &value);
    return CUFLASH_SUCCESS;
}

/* ---- Binary ------------------------------------------------------------------------------------- */

#define FOR_EACH_XY(expr)                                                                                                      \
    for (int64_t i = 0; i < n; i++) {                                                                                          \
        double x = a[i], y = b[i];                                                                                             \
        a[i] = (expr);                                                                                                         \
    }                                                                                                                          \
    break

/* a = a op b */
static void apply_binary(cuflash_binary_op op, int64_t n, double *restrict a, const double *restrict b) {
    switch (op) {
    case CUFLASH_ADD: FOR_EACH_XY(x + y);
    case CUFLASH_SUB: FOR_EACH_XY(x - y);
    case CUFLASH_MUL: FOR_EACH_XY(x * y);
    case CUFLASH_DIV: FOR_EACH_XY(x / y);
    case CUFLASH_MAXIMUM: FOR_EACH_XY(cuflash_larger(x, y));
    case CUFLASH_MINIMUM: FOR_EACH_XY(cuflash_smaller(x, y));
    }
}

static void binary_chunk(void *context, int64_t first, int64_t n, double *a, const double *b) {
    (void)first;
    apply_binary(*(const cuflash_binary_op *)context, n, a, b);
}

static cuflash_status check_op(const char *fn, int op, int last) {
    if (op >= 0 && op <= last) return CUFLASH_SUCCESS;
    return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument 'op': expected 0 to %d, got %d", fn, last, op);
}

cuflash_status cuflash_tensor_binary(cuflash_binary_op op, const cuflash_tensor *out, const cuflash_tensor *a,
                                     const cuflash_tensor *b) {
    CUFLASH_TRY(check_op("tensor_binary", (int)op, CUFLASH_MINIMUM));
    return cuflash_map((cuflash_names){"tensor_binary", "out", "a", "b"}, out, a, b, binary_chunk, &op);
}

typedef struct {
    cuflash_binary_op op;
    bool reversed;
    double scalar[CUFLASH_CHUNK];
} scalar_binary;

static void scalar_chunk(void *context, int64_t first, int64_t n, double *a, const double *b) {
    (void)first, (void)b;
    const scalar_binary *work = context;
    if (!work->reversed) {
        apply_binary(work->op, n, a, work->scalar);
        return;
    }
    double result[CUFLASH_CHUNK];
    for (int64_t i = 0; i < n; i++) result[i] = work->scalar[i];
    apply_binary(work->op, n, result, a);
    for (int64_t i = 0; i < n; i++) a[i] = result[i];
}

cuflash_status cuflash_tensor_binary_scalar(cuflash_binary_op op, const cuflash_tensor *out, const cuflash_tensor *a, double b,
                                            bool reversed) {
    CUFLASH_TRY(check_op("tensor_binary_scalar", (int)op, CUFLASH_MINIMUM));
    scalar_binary work = {.op = op, .reversed = reversed};
    for (int i = 0; i < CUFLASH_CHUNK; i++) work.scalar[i] = b;
    return cuflash_map((cuflash_names){"tensor_binary_scalar", "out", "a", NULL}, out, a, NULL, scalar_chunk, &work);
}

/* ---- Unary -------------------------------------------------------------------------------------- */

#define FOR_EACH_X(expr)                                                                                                       \
    for (int64_t i = 0; i < n; i++) {                                                                                          \
        double x = a[i];                                                                                                       \
        a[i] = (expr);                                                                                                         \
    }                                                                                                                          \
    break

static void unary_chunk(void *context, int64_t first, int64_t n, double *a, const double *b) {
    (void)first, (void)b;
    switch (*(const cuflash_unary_op *)context) {
    case CUFLASH_NEG: FOR_EACH_X(-x);
    case CUFLASH_ABS: FOR_EACH_X(fabs(x));
    case CUFLASH_EXP: FOR_EACH_X(exp(x));
    case CUFLASH_LOG: FOR_EACH_X(log(x));
    case CUFLASH_SQRT: FOR_EACH_X(sqrt(x));
    }
}

cuflash_status cuflash_tensor_unary(cuflash_unary_op op, const cuflash_tensor *out, const cuflash_tensor *a) {
    CUFLASH_TRY(check_op("tensor_unary", (int)op, CUFLASH_SQRT));
    return cuflash_map((cuflash_names){"tensor_unary", "out", "a", NULL}, out, a, NULL, unary_chunk, &op);
}
