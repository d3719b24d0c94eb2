#include "cuda/element.h"

#include <string.h>

#include "cuda/cuda.h"
#include "kernels/element/element.h"
#include "memory.h"
#include "tensor.h"

enum { BLOCKS_PER_MULTIPROCESSOR = 32 }; /* several times what fits: the last ones end together */

static int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static cuflash_status launch(const char *fn, int device, const char *entry, int64_t blocks, const void *args) {
    cuflash_cuda_scope scope;
    CUFLASH_TRY(cuflash_cuda_enter(fn, device, &scope));
    CUfunction function;
    cuflash_status status = cuflash_cuda_kernel(fn, device, &cuflash_fatbin_element, entry, 0, &function);
    if (status == CUFLASH_SUCCESS)
        status = cuflash_cuda_launch(fn, function, blocks, CUFLASH_ELEMENT_THREADS, 0, args, false, cuflash_cuda_stream());
    cuflash_cuda_leave(&scope);
    return status;
}

static cuflash_status copy_bytes(const char *fn, void *dst, int dst_device, const void *src, int src_device, size_t bytes) {
    cuflash_cuda_scope scope;
    CUFLASH_TRY(cuflash_cuda_enter(fn, src_device == CUFLASH_CPU ? dst_device : src_device, &scope));
    cuflash_status status = cuflash_cuda_copy(fn, dst, dst_device, src, src_device, bytes, cuflash_cuda_stream());
    cuflash_cuda_leave(&scope);
    return status;
}

cuflash_status cuflash_cuda_read(const char *fn, int device, const void *src, size_t bytes, void *dst) {
    return copy_bytes(fn, dst, CUFLASH_CPU, src, device, bytes);
}

/* ---- Maps --------------------------------------------------------------------------------------- */

/* Do four elements, from a multiple of 4 on, lie side by side and aligned in every operand? */
static bool is_vector(const cuflash_nest *loops) {
    int inner = loops->ndim - 1;
    if (inner > 0 && loops->shape[inner] % 4) return false;
    for (int k = 0; k < loops->operands; k++) {
        if (loops->stride[k][inner] != 1 || (uintptr_t)loops->data[k] % (4 * cuflash_dtype_size(loops->dtype[k]))) return false;
        for (int i = 0; i < inner; i++)
            if (loops->stride[k][i] % 4) return false;
    }
    return true;
}

static bool is_contiguous(const cuflash_nest *loops) {
    for (int k = 0; k < loops->operands; k++)
        if (loops->stride[k][0] != 1) return false;
    return loops->ndim == 1;
}

cuflash_status cuflash_cuda_map(const char *fn, int device, const cuflash_nest *loops, const cuflash_op *op) {
#define ENTRY(name, kernel, formula) [CUFLASH_OP_##name] = "cuflash_element_" #kernel,
    static const char *const entries[CUFLASH_OPS] = {CUFLASH_FILL_MAP(ENTRY) CUFLASH_UNARY_MAP(ENTRY) CUFLASH_BINARY_MAP(ENTRY)
                                                         CUFLASH_RANDOM_MAP(ENTRY)};
#undef ENTRY
    cuflash_map_args args = {*loops, cuflash_nest_numel(loops), is_vector(loops), *op};
    const char *entry = entries[op->kind];
    if (op->kind == CUFLASH_OP_COPY && loops->dtype[0] == loops->dtype[1]) {
        size_t bytes = (size_t)args.numel * cuflash_dtype_size(loops->dtype[0]);
        if (is_contiguous(loops)) return copy_bytes(fn, loops->data[0], device, loops->data[1], device, bytes);
        entry = "cuflash_element_move";
    }
    int64_t blocks = divide_up(args.numel, 4 * CUFLASH_ELEMENT_THREADS);
    int64_t most = (int64_t)cuflash_cuda_get_properties(device)->multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
    return launch(fn, device, entry, blocks < most ? blocks : most, &args);
}

/* ---- Copies between devices --------------------------------------------------------------------- */

/* A row-major copy on the same device, or the tensor itself where it is that already. */
static cuflash_status gather(const cuflash_tensor *src, cuflash_dtype dtype, cuflash_tensor *out) {
    if (src->dtype == dtype && cuflash_tensor_is_contiguous(src)) return cuflash_tensor_alias(out, src);
    CUFLASH_TRY(cuflash_tensor_empty(out, dtype, src->device, src->ndim, src->shape));
    return cuflash_tensor_copy(out, src);
}

/* dst itself where the bytes of src can go right there, otherwise memory beside it. */
static cuflash_status land(const cuflash_tensor *dst, const cuflash_tensor *src, cuflash_dtype dtype, cuflash_tensor *out) {
    if (dst->dtype == dtype && cuflash_tensor_is_contiguous(dst) && cuflash_tensor_numel(dst) == cuflash_tensor_numel(src))
        return cuflash_tensor_alias(out, dst);
    return cuflash_tensor_empty(out, dtype, dst->device, src->ndim, src->shape);
}

cuflash_status cuflash_cuda_transfer(const char *fn, const cuflash_tensor *dst, const cuflash_tensor *src) {
    CUFLASH_TRY(cuflash_check_output(fn, "dst", dst));
    CUFLASH_TRY(cuflash_check_input(fn, "src", dst, src));
    /* The narrower of the two dtypes travels. */
    cuflash_dtype dtype = cuflash_dtype_size(src->dtype) < cuflash_dtype_size(dst->dtype) ? src->dtype : dst->dtype;
    cuflash_tensor from = {0}, to = {0};
    cuflash_status status = gather(src, dtype, &from);
    if (status == CUFLASH_SUCCESS) status = land(dst, src, dtype, &to);
    if (status == CUFLASH_SUCCESS)
        status = copy_bytes(fn, to.data, dst->device, from.data, src->device, (size_t)cuflash_tensor_extent(&from));
    if (status == CUFLASH_SUCCESS && to.data != dst->data) status = cuflash_tensor_copy(dst, &to);
    cuflash_tensor_release(&to);
    cuflash_tensor_release(&from);
    return status;
}

/* ---- Reduction of a dimension ------------------------------------------------------------------- */

enum {
    ENOUGH_THREADS = 1 << 17, /* to fill any device; which ones it has does not matter, so that all give the same sums */
    LEAST_SHARE = 8,          /* elements worth a thread of their own */
    LEAST_PIECE = 64          /* elements to a thread where outputs are made in pieces */
};

/* One kernel. The outermost dimension of out and slice is that of the pieces, if there are several. */
static cuflash_status reduce_once(const char *fn, cuflash_reduce_args *args, const cuflash_tensor *out,
                                  const cuflash_tensor *slice) {
    const cuflash_tensor *operands[] = {out, slice};
    cuflash_nest_make(&args->loops, 2, operands);
    args->numel = cuflash_nest_numel(&args->loops);
    if (args->per_piece == 0) args->per_piece = args->numel;
    return launch(fn, out->device, "cuflash_element_reduce", divide_up(args->numel, CUFLASH_ELEMENT_THREADS / args->lanes),
                  args);
}

/* The lanes of an output: as many as neighbouring elements make a good load, and more where outputs are few. */
static void choose_lanes(cuflash_reduce_args *args, const cuflash_tensor *slice) {
    int64_t outputs = cuflash_tensor_numel(slice);
    int last = slice->ndim - 1;
    while (last >= 0 && slice->shape[last] == 1) last--;
    args->lane_fast = last < 0 || args->stride <= slice->stride[last];
    int most = args->lane_fast ? CUFLASH_ELEMENT_THREADS : 32, good = args->lane_fast ? 32 : 1;
    args->lanes = 1;
    while (args->lanes < most && args->lanes * LEAST_SHARE < args->length &&
           (args->lanes < good || args->lanes * outputs < ENOUGH_THREADS))
        args->lanes *= 2;
}

/* How many pieces make enough threads of each output's elements. */
static int64_t choose_pieces(const cuflash_reduce_args *args, int64_t outputs) {
    int64_t wanted = ENOUGH_THREADS / (outputs * args->lanes), most = args->length / (LEAST_PIECE * args->lanes);
    return wanted < most ? wanted : most;
}

/* In pieces first, and then the pieces. */
static cuflash_status reduce_pieces(const char *fn, cuflash_reduce_args args, const cuflash_tensor *out,
                                    const cuflash_tensor *slice, int64_t pieces) {
    args.piece = divide_up(args.length, pieces);
    cuflash_tensor all = *slice, partial;
    all.ndim++;
    all.shape[0] = divide_up(args.length, args.piece);
    all.stride[0] = args.piece * args.stride;
    memcpy(all.shape + 1, slice->shape, (size_t)slice->ndim * sizeof *slice->shape);
    memcpy(all.stride + 1, slice->stride, (size_t)slice->ndim * sizeof *slice->stride);
    CUFLASH_TRY(cuflash_tensor_empty(&partial, CUFLASH_FLOAT64, out->device, all.ndim, all.shape));

    cuflash_reduce_args rest = {.op = args.op,
                                .length = all.shape[0],
                                .stride = cuflash_tensor_numel(slice),
                                .piece = all.shape[0],
                                .divisor = args.divisor};
    args.divisor = 1;
    args.per_piece = rest.stride;
    cuflash_status status = reduce_once(fn, &args, &partial, &all);
    if (status == CUFLASH_SUCCESS) status = cuflash_tensor_select(&partial, &partial, 0, 0);
    choose_lanes(&rest, &partial);
    if (status == CUFLASH_SUCCESS) status = reduce_once(fn, &rest, out, &partial);
    cuflash_tensor_release(&partial);
    return status;
}

cuflash_status cuflash_cuda_reduce(const char *fn, cuflash_reduce_op op, const cuflash_tensor *out, const cuflash_tensor *slice,
                                   int64_t length, int64_t stride) {
    cuflash_reduce_args args = {
        .op = op, .length = length, .stride = stride, .piece = length, .divisor = op == CUFLASH_MEAN ? (double)length : 1};
    choose_lanes(&args, slice);
    int64_t pieces = choose_pieces(&args, cuflash_tensor_numel(slice));
    return pieces > 1 ? reduce_pieces(fn, args, out, slice, pieces) : reduce_once(fn, &args, out, slice);
}

/* ---- Scans -------------------------------------------------------------------------------------- */

/* Has blocks leave their results of `each` bytes, and brings these here. */
static cuflash_status scan(const char *fn, const char *entry, cuflash_scan_args *args, int count,
                           const cuflash_tensor *const *operands, void *results, size_t each, int *blocks) {
    int device = operands[0]->device;
    cuflash_nest_make(&args->loops, count, operands);
    args->numel = cuflash_nest_numel(&args->loops);
    args->vector = is_vector(&args->loops);
    int64_t wanted = divide_up(args->numel, 4 * CUFLASH_ELEMENT_THREADS);
    *blocks = wanted < CUFLASH_SCAN_BLOCKS ? (int)wanted : CUFLASH_SCAN_BLOCKS;
    size_t bytes = (size_t)*blocks * each;
    CUFLASH_TRY(cuflash_workspace_new(&args->partial, device, bytes, fn));
    cuflash_status status = launch(fn, device, entry, *blocks, args);
    if (status == CUFLASH_SUCCESS) status = cuflash_cuda_read(fn, device, args->partial, bytes, results);
    cuflash_workspace_release(args->partial, device, bytes);
    return status;
}

cuflash_status cuflash_cuda_reduce_all(const char *fn, cuflash_reduce_op op, const cuflash_tensor *a, double *value) {
    cuflash_scan_args args = {.op = op};
    double partial[CUFLASH_SCAN_BLOCKS];
    int blocks;
    CUFLASH_TRY(scan(fn, "cuflash_element_reduce_all", &args, 1, &a, partial, sizeof *partial, &blocks));
    *value = cuflash_neutral(op);
    for (int i = 0; i < blocks; i++) *value = cuflash_combine(op, *value, partial[i]);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_cuda_compare(const char *fn, const cuflash_tolerance *tolerance, const cuflash_tensor *actual,
                                    const cuflash_tensor *expected, cuflash_difference *all) {
    cuflash_scan_args args = {.tolerance = *tolerance};
    const cuflash_tensor *operands[] = {actual, expected};
    cuflash_difference partial[CUFLASH_SCAN_BLOCKS];
    int blocks;
    CUFLASH_TRY(scan(fn, "cuflash_element_compare", &args, 2, operands, partial, sizeof *partial, &blocks));
    memset(all, 0, sizeof *all);
    for (int i = 0; i < blocks; i++) cuflash_difference_merge(all, &partial[i]);
    return CUFLASH_SUCCESS;
}
