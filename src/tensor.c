#include "tensor.h"

#include <stdio.h>
#include <string.h>

#include "memory.h"

const char *cuflash_dtype_name(int dtype) {
    switch (dtype) {
    case CUFLASH_FLOAT32: return "float32";
    case CUFLASH_FLOAT16: return "float16";
    case CUFLASH_BFLOAT16: return "bfloat16";
    case CUFLASH_FLOAT64: return "float64";
    }
    return "unknown";
}

size_t cuflash_dtype_size(int dtype) {
    switch (dtype) {
    case CUFLASH_FLOAT32: return 4;
    case CUFLASH_FLOAT16:
    case CUFLASH_BFLOAT16: return 2;
    case CUFLASH_FLOAT64: return 8;
    }
    return 0;
}

const char *cuflash_shape_text(char buffer[CUFLASH_SHAPE_TEXT], int ndim, const int64_t *shape) {
    size_t used = 1;
    buffer[0] = '[';
    for (int i = 0; i < ndim && used < CUFLASH_SHAPE_TEXT - 24; i++)
        used += (size_t)snprintf(buffer + used, CUFLASH_SHAPE_TEXT - used, i ? " x %lld" : "%lld", (long long)shape[i]);
    snprintf(buffer + used, CUFLASH_SHAPE_TEXT - used, "]");
    return buffer;
}

cuflash_status cuflash_check_tensor(const char *fn, const char *arg, const cuflash_tensor *tensor) {
    if (!tensor) return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument '%s': expected a tensor, got NULL", fn, arg);
    if (!tensor->data)
        return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument '%s': expected a live tensor, got one that was freed", fn, arg);
    if (cuflash_dtype_size(tensor->dtype) == 0)
        return cuflash_fail(CUFLASH_UNSUPPORTED_DTYPE, "%s: argument '%s': unknown dtype %d", fn, arg, (int)tensor->dtype);
    if (tensor->ndim < 0 || tensor->ndim > CUFLASH_MAX_DIMS)
        return cuflash_fail(CUFLASH_INVALID_DIMENSION, "%s: argument '%s': expected 0 to %d dimensions, got %d", fn, arg,
                            CUFLASH_MAX_DIMS, tensor->ndim);
    for (int i = 0; i < tensor->ndim; i++)
        if (tensor->shape[i] < 1 || tensor->stride[i] < 0)
            return cuflash_fail(CUFLASH_INVALID_DIMENSION,
                                "%s: argument '%s': dimension %d has size %lld and stride %lld, expected a positive size "
                                "and a stride of at least 0",
                                fn, arg, i, (long long)tensor->shape[i], (long long)tensor->stride[i]);
    return CUFLASH_SUCCESS;
}

/* A dimension whose stride is shorter than what the smaller ones span, so that elements share memory; -1 if none is. */
static int colliding_dim(const cuflash_tensor *tensor) {
    int64_t span = 1; /* of the dimensions taken so far */
    bool taken[CUFLASH_MAX_DIMS] = {false};
    for (int n = 0; n < tensor->ndim; n++) {
        int least = -1;
        for (int i = 0; i < tensor->ndim; i++)
            if (!taken[i] && (least < 0 || tensor->stride[i] < tensor->stride[least])) least = i;
        taken[least] = true;
        if (tensor->shape[least] == 1) continue;
        if (tensor->stride[least] < span) return least;
        span += (tensor->shape[least] - 1) * tensor->stride[least];
    }
    return -1;
}

cuflash_status cuflash_check_output(const char *fn, const char *arg, const cuflash_tensor *tensor) {
    CUFLASH_TRY(cuflash_check_tensor(fn, arg, tensor));
    int dim = colliding_dim(tensor);
    if (dim < 0) return CUFLASH_SUCCESS;
    return cuflash_fail(
        CUFLASH_INVALID_ARGUMENT,
        "%s: argument '%s': dimension %d has stride %lld, so its elements share memory (as in an expanded view) "
        "and cannot be written",
        fn, arg, dim, (long long)tensor->stride[dim]);
}

static bool broadcasts(const cuflash_tensor *out, const cuflash_tensor *in) {
    if (in->ndim > out->ndim) return false;
    for (int i = 1; i <= in->ndim; i++) {
        int64_t size = in->shape[in->ndim - i];
        if (size != 1 && size != out->shape[out->ndim - i]) return false;
    }
    return true;
}

cuflash_status cuflash_check_input(const char *fn, const char *arg, const cuflash_tensor *out, const cuflash_tensor *in) {
    CUFLASH_TRY(cuflash_check_tensor(fn, arg, in));
    if (broadcasts(out, in)) return CUFLASH_SUCCESS;
    char have[CUFLASH_SHAPE_TEXT], want[CUFLASH_SHAPE_TEXT];
    return cuflash_fail(CUFLASH_DIMENSION_MISMATCH, "%s: argument '%s': expected a shape that broadcasts to %s, got %s", fn,
                        arg, cuflash_shape_text(want, out->ndim, out->shape), cuflash_shape_text(have, in->ndim, in->shape));
}

const char *cuflash_device_text(char buffer[CUFLASH_DEVICE_TEXT], int device) {
    if (device == CUFLASH_CPU) return strcpy(buffer, "cpu");
    snprintf(buffer, CUFLASH_DEVICE_TEXT, "cuda:%d", device);
    return buffer;
}

cuflash_status cuflash_check_device(const char *fn, const char *arg, const cuflash_tensor *tensor, int device) {
    if (tensor->device == device) return CUFLASH_SUCCESS;
    char want[CUFLASH_DEVICE_TEXT], got[CUFLASH_DEVICE_TEXT];
    return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument '%s': expected a tensor on %s as the others are, got one on %s",
                        fn, arg, cuflash_device_text(want, device), cuflash_device_text(got, tensor->device));
}

bool cuflash_same_shape(const cuflash_tensor *a, const cuflash_tensor *b) {
    if (a->ndim != b->ndim) return false;
    for (int i = 0; i < a->ndim; i++)
        if (a->shape[i] != b->shape[i]) return false;
    return true;
}

int64_t cuflash_tensor_extent(const cuflash_tensor *tensor) {
    int64_t last = 0;
    for (int i = 0; i < tensor->ndim; i++) last += (tensor->shape[i] - 1) * tensor->stride[i];
    return (last + 1) * (int64_t)cuflash_dtype_size(tensor->dtype);
}

bool cuflash_spans_overlap(const cuflash_tensor *a, const cuflash_tensor *b) {
    const char *a0 = a->data, *b0 = b->data;
    return a->device == b->device && a0 < b0 + cuflash_tensor_extent(b) && b0 < a0 + cuflash_tensor_extent(a);
}

int64_t cuflash_tensor_numel(const cuflash_tensor *tensor) {
    if (!tensor || !tensor->data) return 0;
    int64_t n = 1;
    for (int i = 0; i < tensor->ndim; i++) n *= tensor->shape[i];
    return n;
}

bool cuflash_tensor_is_contiguous(const cuflash_tensor *tensor) {
    if (!tensor || !tensor->data) return false;
    int64_t expected = 1;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->shape[i] > 1 && tensor->stride[i] != expected) return false;
        expected *= tensor->shape[i];
    }
    return true;
}

/* Checks what describes a tensor and fills in everything but its memory. strides may be NULL: row-major. */
static cuflash_status describe(const char *fn, cuflash_tensor *t, cuflash_dtype dtype, int device, int ndim,
                               const int64_t *shape, const int64_t *strides) {
    memset(t, 0, sizeof *t);
    if (cuflash_dtype_size(dtype) == 0)
        return cuflash_fail(CUFLASH_UNSUPPORTED_DTYPE, "%s: argument 'dtype': unknown dtype %d", fn, (int)dtype);
    CUFLASH_TRY(cuflash_device_check(device));
    if (ndim < 0 || ndim > CUFLASH_MAX_DIMS)
        return cuflash_fail(CUFLASH_INVALID_DIMENSION, "%s: argument 'ndim': expected 0 to %d, got %d", fn, CUFLASH_MAX_DIMS,
                            ndim);
    if (ndim > 0 && !shape)
        return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument 'shape': expected %d sizes, got NULL", fn, ndim);
    for (int i = 0; i < ndim; i++)
        if (shape[i] < 1)
            return cuflash_fail(CUFLASH_INVALID_DIMENSION,
                                "%s: argument 'shape': expected a positive size in dimension %d, got %lld", fn, i,
                                (long long)shape[i]);
    t->dtype = dtype;
    t->device = device;
    t->ndim = ndim;
    int64_t count = 1, last = 0;
    bool fits = true;
    for (int i = ndim - 1; i >= 0; i--) {
        t->shape[i] = shape[i];
        t->stride[i] = strides ? strides[i] : count;
        if (strides && strides[i] < 0)
            return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                                "%s: argument 'strides': expected at least 0 in dimension %d, got %lld", fn, i,
                                (long long)strides[i]);
        int64_t reach;
        fits = fits && t->stride[i] < INT64_MAX / 8 && !__builtin_mul_overflow(count, shape[i], &count) &&
               !__builtin_mul_overflow(shape[i] - 1, t->stride[i], &reach) && !__builtin_add_overflow(last, reach, &last);
    }
    int64_t limit = INT64_MAX / 8 - 1; /* in elements of any dtype */
    if (!fits || count > limit || last > limit) {
        char text[CUFLASH_SHAPE_TEXT];
        return cuflash_fail(CUFLASH_INVALID_DIMENSION, "%s: argument 'shape': %s has more elements than 64 bits can address",
                            fn, cuflash_shape_text(text, ndim, shape));
    }
    return CUFLASH_SUCCESS;
}

static cuflash_status need_out(const char *fn, const cuflash_tensor *out) {
    return out ? CUFLASH_SUCCESS : cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument 'out': expected a tensor, got NULL", fn);
}

cuflash_status cuflash_tensor_empty(cuflash_tensor *out, cuflash_dtype dtype, int device, int ndim, const int64_t *shape) {
    CUFLASH_TRY(need_out("tensor_empty", out));
    cuflash_tensor t;
    CUFLASH_TRY(describe("tensor_empty", &t, dtype, device, ndim, shape, NULL));
    CUFLASH_TRY(cuflash_storage_new(&t.storage, device, (size_t)cuflash_tensor_extent(&t), "tensor_empty"));
    t.data = cuflash_storage_data(t.storage);
    *out = t;
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_borrow_argument(const char *fn, const char *arg, cuflash_tensor *out, void *data, cuflash_dtype dtype,
                                       int device, int ndim, const int64_t *shape, const int64_t *strides) {
    if (!data) return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument '%s': expected a pointer, got NULL", fn, arg);
    cuflash_tensor t;
    CUFLASH_TRY(describe(fn, &t, dtype, device, ndim, shape, strides));
    if ((uintptr_t)data % cuflash_dtype_size(dtype) != 0)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                            "%s: argument '%s': expected an address that is a multiple of %zu (%s), got %p", fn, arg,
                            cuflash_dtype_size(dtype), cuflash_dtype_name(dtype), data);
    t.data = data;
    *out = t;
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_tensor_borrow(cuflash_tensor *out, void *data, cuflash_dtype dtype, int device, int ndim,
                                     const int64_t *shape, const int64_t *strides) {
    CUFLASH_TRY(need_out("tensor_borrow", out));
    return cuflash_borrow_argument("tensor_borrow", "data", out, data, dtype, device, ndim, shape, strides);
}

void cuflash_tensor_release(cuflash_tensor *tensor) {
    if (!tensor) return;
    cuflash_storage_release(tensor->storage);
    tensor->storage = NULL;
    tensor->data = NULL;
}

/* Hands a finished view out. Where out is src itself, the reference it holds passes to the view. */
static cuflash_status give_view(cuflash_tensor *out, const cuflash_tensor *src, const cuflash_tensor *view) {
    if (out != src) cuflash_storage_retain(view->storage);
    *out = *view;
    return CUFLASH_SUCCESS;
}

static cuflash_status check_dim(const char *fn, const char *arg, const cuflash_tensor *src, int dim) {
    if (dim >= 0 && dim < src->ndim) return CUFLASH_SUCCESS;
    if (src->ndim == 0)
        return cuflash_fail(CUFLASH_INVALID_DIMENSION,
                            "%s: argument '%s': a tensor of no dimensions has none to choose, got %d", fn, arg, dim);
    return cuflash_fail(CUFLASH_INVALID_DIMENSION, "%s: argument '%s': expected a dimension from 0 to %d, got %d", fn, arg,
                        src->ndim - 1, dim);
}

static cuflash_status check_view(const char *fn, const cuflash_tensor *out, const cuflash_tensor *src) {
    CUFLASH_TRY(need_out(fn, out));
    return cuflash_check_tensor(fn, "src", src);
}

static void move_data(cuflash_tensor *t, int64_t elements) {
    t->data = (char *)t->data + elements * (int64_t)cuflash_dtype_size(t->dtype);
}

cuflash_status cuflash_tensor_alias(cuflash_tensor *out, const cuflash_tensor *src) {
    CUFLASH_TRY(check_view("tensor_alias", out, src));
    return give_view(out, src, src);
}

cuflash_status cuflash_tensor_narrow(cuflash_tensor *out, const cuflash_tensor *src, int dim, int64_t start, int64_t length) {
    CUFLASH_TRY(check_view("tensor_narrow", out, src));
    CUFLASH_TRY(check_dim("tensor_narrow", "dim", src, dim));
    if (length < 1 || start < 0 || start >= src->shape[dim] || length > src->shape[dim] - start)
        return cuflash_fail(CUFLASH_INVALID_DIMENSION,
                            "tensor_narrow: argument 'start': expected a non-empty range within dimension %d of size %lld, got "
                            "start %lld and length %lld",
                            dim, (long long)src->shape[dim], (long long)start, (long long)length);
    cuflash_tensor t = *src;
    t.shape[dim] = length;
    move_data(&t, start * t.stride[dim]);
    return give_view(out, src, &t);
}

cuflash_status cuflash_tensor_select(cuflash_tensor *out, const cuflash_tensor *src, int dim, int64_t index) {
    CUFLASH_TRY(check_view("tensor_select", out, src));
    CUFLASH_TRY(check_dim("tensor_select", "dim", src, dim));
    if (index < 0 || index >= src->shape[dim])
        return cuflash_fail(CUFLASH_INVALID_DIMENSION,
                            "tensor_select: argument 'index': expected 0 to %lld in dimension %d, got %lld",
                            (long long)src->shape[dim] - 1, dim, (long long)index);
    cuflash_tensor t = *src;
    move_data(&t, index * t.stride[dim]);
    t.ndim--;
    for (int i = dim; i < t.ndim; i++) {
        t.shape[i] = t.shape[i + 1];
        t.stride[i] = t.stride[i + 1];
    }
    t.shape[t.ndim] = t.stride[t.ndim] = 0;
    return give_view(out, src, &t);
}

cuflash_status cuflash_tensor_transpose(cuflash_tensor *out, const cuflash_tensor *src, int dim0, int dim1) {
    CUFLASH_TRY(check_view("tensor_transpose", out, src));
    CUFLASH_TRY(check_dim("tensor_transpose", "dim0", src, dim0));
    CUFLASH_TRY(check_dim("tensor_transpose", "dim1", src, dim1));
    cuflash_tensor t = *src;
    t.shape[dim0] = src->shape[dim1];
    t.shape[dim1] = src->shape[dim0];
    t.stride[dim0] = src->stride[dim1];
    t.stride[dim1] = src->stride[dim0];
    return give_view(out, src, &t);
}

/* Strides of new_shape over src's memory, if a view can do it: dimensions of src that lie densely in one another
 * form runs, and each run must be covered exactly by a group of new dimensions. */
static bool view_strides(const cuflash_tensor *src, int ndim, const int64_t *shape, int64_t *stride) {
    int next = ndim - 1;
    for (int i = src->ndim - 1; i >= 0;) {
        int64_t run = src->shape[i], base = src->stride[i];
        int j = i - 1;
        while (j >= 0 && (src->shape[j] == 1 || run == 1 || src->stride[j] == base * run)) {
            if (run == 1) base = src->stride[j];
            run *= src->shape[j--];
        }
        int64_t covered = 1;
        while (next >= 0 && covered < run) {
            stride[next] = base * covered;
            covered *= shape[next--];
        }
        if (covered != run) return false;
        i = j;
    }
    for (; next >= 0; next--) { /* what is left has size 1 */
        if (shape[next] != 1) return false;
        stride[next] = 1;
    }
    return true;
}

cuflash_status cuflash_tensor_view(cuflash_tensor *out, const cuflash_tensor *src, int ndim, const int64_t *shape) {
    CUFLASH_TRY(check_view("tensor_view", out, src));
    if (ndim < 0 || ndim > CUFLASH_MAX_DIMS)
        return cuflash_fail(CUFLASH_INVALID_DIMENSION, "tensor_view: argument 'ndim': expected 0 to %d, got %d",
                            CUFLASH_MAX_DIMS, ndim);
    if (ndim > 0 && !shape)
        return cuflash_fail(CUFLASH_NULL_POINTER, "tensor_view: argument 'shape': expected %d sizes, got NULL", ndim);
    int64_t numel = cuflash_tensor_numel(src), known = 1, sizes[CUFLASH_MAX_DIMS];
    int open = -1;
    bool fits = true;
    char have[CUFLASH_SHAPE_TEXT], want[CUFLASH_SHAPE_TEXT];
    for (int i = 0; i < ndim; i++) {
        sizes[i] = shape[i];
        if (shape[i] == -1 && open < 0) {
            open = i;
        } else if (shape[i] < 1) {
            return cuflash_fail(CUFLASH_INVALID_DIMENSION,
                                "tensor_view: argument 'shape': expected positive sizes (one may be -1), got %s",
                                cuflash_shape_text(want, ndim, shape));
        } else {
            fits = fits && !__builtin_mul_overflow(known, shape[i], &known);
        }
    }
    if (open >= 0 && fits) sizes[open] = numel / known;
    if (!fits || (open >= 0 ? numel % known != 0 : numel != known))
        return cuflash_fail(
            CUFLASH_DIMENSION_MISMATCH, "tensor_view: argument 'shape': %s does not hold the %lld elements of %s",
            cuflash_shape_text(want, ndim, shape), (long long)numel, cuflash_shape_text(have, src->ndim, src->shape));
    cuflash_tensor t = *src;
    memset(t.shape, 0, sizeof t.shape);
    memset(t.stride, 0, sizeof t.stride);
    t.ndim = ndim;
    for (int i = 0; i < ndim; i++) t.shape[i] = sizes[i];
    if (!view_strides(src, ndim, sizes, t.stride))
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                            "tensor_view: argument 'src': the strides of %s do not allow the shape %s without a copy",
                            cuflash_shape_text(have, src->ndim, src->shape), cuflash_shape_text(want, ndim, sizes));
    return give_view(out, src, &t);
}

cuflash_status cuflash_tensor_expand(cuflash_tensor *out, const cuflash_tensor *src, int ndim, const int64_t *shape) {
    CUFLASH_TRY(check_view("tensor_expand", out, src));
    if (ndim < src->ndim || ndim > CUFLASH_MAX_DIMS)
        return cuflash_fail(CUFLASH_INVALID_DIMENSION, "tensor_expand: argument 'ndim': expected %d to %d, got %d", src->ndim,
                            CUFLASH_MAX_DIMS, ndim);
    cuflash_tensor t;
    CUFLASH_TRY(describe("tensor_expand", &t, src->dtype, src->device, ndim, shape, NULL));
    t.storage = src->storage;
    t.data = src->data;
    for (int i = 0; i < ndim; i++) {
        int from = i - (ndim - src->ndim);
        int64_t size = from >= 0 ? src->shape[from] : 1;
        if (size != shape[i] && size != 1) {
            char have[CUFLASH_SHAPE_TEXT], want[CUFLASH_SHAPE_TEXT];
            return cuflash_fail(CUFLASH_DIMENSION_MISMATCH, "tensor_expand: argument 'shape': %s does not expand to %s",
                                cuflash_shape_text(have, src->ndim, src->shape), cuflash_shape_text(want, ndim, shape));
        }
        t.stride[i] = size == 1 && shape[i] != 1 ? 0 : from >= 0 ? src->stride[from] : 0;
    }
    return give_view(out, src, &t);
}
