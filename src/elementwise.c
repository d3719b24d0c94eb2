/* The element-wise functions of the API, each a few lines over the engine in element.c. */
#include "cuda/element.h"
#include "element.h"
#include "tensor.h"

cuflash_status cuflash_tensor_copy(const cuflash_tensor *dst, const cuflash_tensor *src) {
    if (dst && src && dst->device != src->device) return cuflash_cuda_transfer("tensor_copy", dst, src);
    return cuflash_map((cuflash_names){"tensor_copy", "dst", "src", NULL}, dst, src, NULL,
                       &(cuflash_op){.kind = CUFLASH_OP_COPY});
}

cuflash_status cuflash_tensor_fill(const cuflash_tensor *dst, double value) {
    return cuflash_map((cuflash_names){"tensor_fill", "dst", NULL, NULL}, dst, NULL, NULL,
                       &(cuflash_op){.kind = CUFLASH_OP_FILL, .value = value});
}

cuflash_status cuflash_tensor_arange(const cuflash_tensor *dst, double start, double step) {
    return cuflash_map((cuflash_names){"tensor_arange", "dst", NULL, NULL}, dst, NULL, NULL,
                       &(cuflash_op){.kind = CUFLASH_OP_ARANGE, .arange = {start, step}});
}

/* ---- One element -------------------------------------------------------------------------------- */

/* The element as a tensor of no dimensions. */
static cuflash_status take_element(const char *fn, const cuflash_tensor *tensor, const int64_t *index,
                                   cuflash_tensor *element) {
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
    *element = (cuflash_tensor){.data = (char *)tensor->data + offset * (int64_t)cuflash_dtype_size(tensor->dtype),
                                .dtype = tensor->dtype,
                                .device = tensor->device};
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_tensor_get(const cuflash_tensor *tensor, const int64_t *index, double *value) {
    cuflash_tensor element;
    CUFLASH_TRY(take_element("tensor_get", tensor, index, &element));
    if (!value) return cuflash_fail(CUFLASH_NULL_POINTER, "tensor_get: argument 'value': expected a pointer, got NULL");
    double held;
    void *data = element.data;
    if (element.device != CUFLASH_CPU) {
        CUFLASH_TRY(cuflash_cuda_read("tensor_get", element.device, element.data, cuflash_dtype_size(element.dtype), &held));
        data = &held;
    }
    cuflash_load_elements(element.dtype, data, 1, 1, value);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_tensor_set(const cuflash_tensor *tensor, const int64_t *index, double value) {
    cuflash_tensor element;
    CUFLASH_TRY(take_element("tensor_set", tensor, index, &element));
    if (element.device == CUFLASH_CPU) {
        cuflash_store_elements(element.dtype, element.data, 1, 1, &value);
        return CUFLASH_SUCCESS;
    }
    return cuflash_map((cuflash_names){"tensor_set", "tensor", NULL, NULL}, &element, NULL, NULL,
                       &(cuflash_op){.kind = CUFLASH_OP_FILL, .value = value});
}

/* ---- Arithmetic --------------------------------------------------------------------------------- */

static cuflash_status check_op(const char *fn, int op, int last) {
    if (op >= 0 && op <= last) return CUFLASH_SUCCESS;
    return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument 'op': expected 0 to %d, got %d", fn, last, op);
}

cuflash_status cuflash_tensor_binary(cuflash_binary_op op, const cuflash_tensor *out, const cuflash_tensor *a,
                                     const cuflash_tensor *b) {
    CUFLASH_TRY(check_op("tensor_binary", (int)op, CUFLASH_MINIMUM));
    return cuflash_map((cuflash_names){"tensor_binary", "out", "a", "b"}, out, a, b,
                       &(cuflash_op){.kind = (cuflash_op_kind)(CUFLASH_OP_ADD + (int)op)});
}

cuflash_status cuflash_tensor_binary_scalar(cuflash_binary_op op, const cuflash_tensor *out, const cuflash_tensor *a, double b,
                                            bool reversed) {
    CUFLASH_TRY(check_op("tensor_binary_scalar", (int)op, CUFLASH_MINIMUM));
    return cuflash_map((cuflash_names){"tensor_binary_scalar", "out", "a", NULL}, out, a, NULL,
                       &(cuflash_op){.kind = (cuflash_op_kind)(CUFLASH_OP_ADD + (int)op),
                                     .scalar = reversed ? CUFLASH_SCALAR_X : CUFLASH_SCALAR_Y,
                                     .value = b});
}

cuflash_status cuflash_tensor_unary(cuflash_unary_op op, const cuflash_tensor *out, const cuflash_tensor *a) {
    CUFLASH_TRY(check_op("tensor_unary", (int)op, CUFLASH_SQRT));
    return cuflash_map((cuflash_names){"tensor_unary", "out", "a", NULL}, out, a, NULL,
                       &(cuflash_op){.kind = (cuflash_op_kind)(CUFLASH_OP_NEG + (int)op)});
}
