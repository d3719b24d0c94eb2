#include "element.h"

#include <string.h>

#include "cuda/element.h"
#include "half.h"
#include "memory.h"
#include "parallel.h"
#include "tensor.h"

void cuflash_load_elements(cuflash_dtype dtype, const void *src, int64_t stride, int64_t n, double *dst) {
#define LOAD(type, convert)                                                                                                    \
    do {                                                                                                                       \
        const type *s = src;                                                                                                   \
        if (stride == 1)                                                                                                       \
            for (int64_t i = 0; i < n; i++) dst[i] = convert(s[i]);                                                            \
        else                                                                                                                   \
            for (int64_t i = 0; i < n; i++) dst[i] = convert(s[i * stride]);                                                   \
    } while (0)
    switch (dtype) {
    case CUFLASH_FLOAT32: LOAD(float, (double)); break;
    case CUFLASH_FLOAT16: LOAD(uint16_t, cuflash_half_to_float); break;
    case CUFLASH_BFLOAT16: LOAD(uint16_t, cuflash_bfloat_to_float); break;
    case CUFLASH_FLOAT64: LOAD(double, (double)); break;
    }
#undef LOAD
}

void cuflash_store_elements(cuflash_dtype dtype, void *dst, int64_t stride, int64_t n, const double *src) {
#define STORE(type, convert)                                                                                                   \
    do {                                                                                                                       \
        type *d = dst;                                                                                                         \
        if (stride == 1)                                                                                                       \
            for (int64_t i = 0; i < n; i++) d[i] = convert(src[i]);                                                            \
        else                                                                                                                   \
            for (int64_t i = 0; i < n; i++) d[i * stride] = convert(src[i]);                                                   \
    } while (0)
    switch (dtype) {
    case CUFLASH_FLOAT32: STORE(float, (float)); break;
    case CUFLASH_FLOAT16: STORE(uint16_t, cuflash_double_to_half); break;
    case CUFLASH_BFLOAT16: STORE(uint16_t, cuflash_double_to_bfloat); break;
    case CUFLASH_FLOAT64: STORE(double, (double)); break;
    }
#undef STORE
}

/* A copy of the same dtype is one of bits, those of NaNs included. */
static void move_elements(cuflash_dtype dtype, void *dst, int64_t dst_stride, const void *src, int64_t src_stride, int64_t n) {
#define MOVE(type)                                                                                                             \
    do {                                                                                                                       \
        type *d = dst;                                                                                                         \
        const type *s = src;                                                                                                   \
        for (int64_t i = 0; i < n; i++) d[i * dst_stride] = s[i * src_stride];                                                 \
    } while (0)
    size_t size = cuflash_dtype_size(dtype);
    if (dst_stride == 1 && src_stride == 1)
        memcpy(dst, src, (size_t)n * size);
    else if (size == 2)
        MOVE(uint16_t);
    else if (size == 4)
        MOVE(uint32_t);
    else
        MOVE(uint64_t);
#undef MOVE
}

/* ---- The walk through a nest -------------------------------------------------------------------- */

/* A unit is a piece of at most CUFLASH_CHUNK elements of the innermost dimension. */
typedef struct {
    cuflash_nest loops;
    int64_t pieces; /* units per innermost row */
    int64_t units;
} walk;

static walk walk_make(const cuflash_nest *loops) {
    walk w = {.loops = *loops};
    int64_t inner = loops->shape[loops->ndim - 1];
    w.pieces = (inner + CUFLASH_CHUNK - 1) / CUFLASH_CHUNK;
    w.units = cuflash_nest_numel(loops) / inner * w.pieces;
    return w;
}

/* Where a unit lies: its number of elements, its first one's row-major number, and its address in each operand. */
static int64_t walk_unit(const walk *w, int64_t unit, int64_t *first, char *address[CUFLASH_MAX_OPERANDS]) {
    const cuflash_nest *loops = &w->loops;
    int inner = loops->ndim - 1;
    int64_t row = unit / w->pieces, start = unit % w->pieces * CUFLASH_CHUNK;
    *first = row * loops->shape[inner] + start;
    int64_t offset[CUFLASH_MAX_OPERANDS] = {0};
    for (int k = 0; k < loops->operands; k++) offset[k] = start * loops->stride[k][inner];
    for (int i = inner - 1; i >= 0; i--) {
        int64_t index = row % loops->shape[i];
        row /= loops->shape[i];
        for (int k = 0; k < loops->operands; k++) offset[k] += index * loops->stride[k][i];
    }
    for (int k = 0; k < loops->operands; k++)
        address[k] = (char *)loops->data[k] + offset[k] * (int64_t)cuflash_dtype_size(loops->dtype[k]);
    int64_t left = loops->shape[inner] - start;
    return left < CUFLASH_CHUNK ? left : CUFLASH_CHUNK;
}

static void walk_load(const walk *w, int k, char *address[CUFLASH_MAX_OPERANDS], int64_t n, double *buffer) {
    const cuflash_nest *loops = &w->loops;
    if (k < loops->operands) cuflash_load_elements(loops->dtype[k], address[k], loops->stride[k][loops->ndim - 1], n, buffer);
}

static void walk_store(const walk *w, char *address[CUFLASH_MAX_OPERANDS], int64_t n, const double *buffer) {
    const cuflash_nest *loops = &w->loops;
    cuflash_store_elements(loops->dtype[0], address[0], loops->stride[0][loops->ndim - 1], n, buffer);
}

/* Small tensors are not worth sharing out. */
static int walk_threads(const walk *w) {
    return w->units < 64 ? 1 : cuflash_get_num_threads();
}

/* ---- Map ---------------------------------------------------------------------------------------- */

/* x = op(x, y), for elements number first, first + 1, ... */
static void apply(const cuflash_op *op, int64_t first, int64_t n, double *restrict x_values, const double *restrict y_values) {
#define FILL_CASE(name, kernel, formula)                                                                                       \
    case CUFLASH_OP_##name:                                                                                                    \
        for (int64_t k = 0; k < n; k++) {                                                                                      \
            int64_t i = first + k;                                                                                             \
            (void)i;                                                                                                           \
            x_values[k] = (formula);                                                                                           \
        }                                                                                                                      \
        break;
#define UNARY_CASE(name, kernel, formula)                                                                                      \
    case CUFLASH_OP_##name:                                                                                                    \
        for (int64_t k = 0; k < n; k++) {                                                                                      \
            double x = x_values[k];                                                                                            \
            x_values[k] = (formula);                                                                                           \
        }                                                                                                                      \
        break;
#define BINARY_CASE(name, kernel, formula)                                                                                     \
    case CUFLASH_OP_##name:                                                                                                    \
        for (int64_t k = 0; k < n; k++) {                                                                                      \
            double x = x_values[k], y = y_values[k];                                                                           \
            x_values[k] = (formula);                                                                                           \
        }                                                                                                                      \
        break;
#define RANDOM_CASE(name, kernel, make_quad)                                                                                   \
    case CUFLASH_OP_##name:                                                                                                    \
        for (int64_t k = 0; k < n;) {                                                                                          \
            double quad[4];                                                                                                    \
            make_quad(op, (uint64_t)(first + k) / 4, quad);                                                                    \
            for (int64_t place = (first + k) % 4; place < 4 && k < n; place++, k++) x_values[k] = quad[place];                 \
        }                                                                                                                      \
        break;
    switch (op->kind) {
        CUFLASH_FILL_MAP(FILL_CASE)
        CUFLASH_UNARY_MAP(UNARY_CASE)
        CUFLASH_BINARY_MAP(BINARY_CASE)
        CUFLASH_RANDOM_MAP(RANDOM_CASE)
    case CUFLASH_OPS: break;
    }
#undef FILL_CASE
#undef UNARY_CASE
#undef BINARY_CASE
#undef RANDOM_CASE
}

typedef struct {
    walk walk; /* out, then the inputs */
    const cuflash_op *op;
} map_work;

static void map_units(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const map_work *work = context;
    const cuflash_op *op = work->op;
    double x[CUFLASH_CHUNK], y[CUFLASH_CHUNK];
    if (op->scalar == CUFLASH_SCALAR_Y)
        for (int i = 0; i < CUFLASH_CHUNK; i++) y[i] = op->value;
    for (int64_t unit = begin; unit < end; unit++) {
        char *address[CUFLASH_MAX_OPERANDS];
        int64_t first, n = walk_unit(&work->walk, unit, &first, address);
        if (op->scalar == CUFLASH_SCALAR_X) {
            for (int64_t i = 0; i < n; i++) x[i] = op->value;
            walk_load(&work->walk, 1, address, n, y);
        } else {
            walk_load(&work->walk, 1, address, n, x);
            walk_load(&work->walk, 2, address, n, y);
        }
        apply(op, first, n, x, y);
        walk_store(&work->walk, address, n, x);
    }
}

static void move_units(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const walk *w = &((const map_work *)context)->walk;
    const cuflash_nest *loops = &w->loops;
    int inner = loops->ndim - 1;
    for (int64_t unit = begin; unit < end; unit++) {
        char *address[CUFLASH_MAX_OPERANDS];
        int64_t first, n = walk_unit(w, unit, &first, address);
        move_elements(loops->dtype[0], address[0], loops->stride[0][inner], address[1], loops->stride[1][inner], n);
    }
}

static cuflash_status run(const char *fn, int device, const cuflash_nest *loops, const cuflash_op *op) {
    if (device != CUFLASH_CPU) return cuflash_cuda_map(fn, device, loops, op);
    map_work work = {walk_make(loops), op};
    bool moves = op->kind == CUFLASH_OP_COPY && loops->dtype[0] == loops->dtype[1];
    cuflash_parallel_for(walk_threads(&work.walk), work.walk.units, 16, moves ? move_units : map_units, &work);
    return CUFLASH_SUCCESS;
}

static bool same_view(const cuflash_tensor *a, const cuflash_tensor *b) {
    if (a->data != b->data || a->dtype != b->dtype || !cuflash_same_shape(a, b)) return false;
    for (int i = 0; i < a->ndim; i++)
        if (a->shape[i] > 1 && a->stride[i] != b->stride[i]) return false;
    return true;
}

/* Checks an input. One that overlaps out, other than element on element, is copied first. */
static cuflash_status take_input(const char *fn, const char *arg, const cuflash_tensor *out, const cuflash_tensor *in,
                                 cuflash_tensor *taken) {
    CUFLASH_TRY(cuflash_check_input(fn, arg, out, in));
    CUFLASH_TRY(cuflash_check_device(fn, arg, in, out->device));
    if (same_view(out, in) || !cuflash_spans_overlap(out, in)) return cuflash_tensor_alias(taken, in);
    CUFLASH_TRY(cuflash_tensor_empty(taken, in->dtype, in->device, in->ndim, in->shape));
    return cuflash_tensor_copy(taken, in);
}

cuflash_status cuflash_map(cuflash_names names, const cuflash_tensor *out, const cuflash_tensor *a, const cuflash_tensor *b,
                           const cuflash_op *op) {
    CUFLASH_TRY(cuflash_check_output(names.fn, names.out, out));
    cuflash_tensor taken_a = {0}, taken_b = {0};
    cuflash_status status = names.a ? take_input(names.fn, names.a, out, a, &taken_a) : CUFLASH_SUCCESS;
    if (status == CUFLASH_SUCCESS && names.b) status = take_input(names.fn, names.b, out, b, &taken_b);
    if (status == CUFLASH_SUCCESS) {
        const cuflash_tensor *operands[] = {out, &taken_a, &taken_b};
        cuflash_nest loops;
        cuflash_nest_make(&loops, names.b ? 3 : names.a ? 2 : 1, operands);
        status = run(names.fn, out->device, &loops, op);
    }
    cuflash_tensor_release(&taken_a);
    cuflash_tensor_release(&taken_b);
    return status;
}

/* ---- Make and scan ------------------------------------------------------------------------------ */

typedef struct {
    walk walk;
    cuflash_make_fn fn;
    const void *context;
} make_work;

static void make_units(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const make_work *work = context;
    double values[CUFLASH_CHUNK];
    for (int64_t unit = begin; unit < end; unit++) {
        char *address[CUFLASH_MAX_OPERANDS];
        int64_t first, n = walk_unit(&work->walk, unit, &first, address);
        work->fn(work->context, first, n, values);
        walk_store(&work->walk, address, n, values);
    }
}

void cuflash_make(const cuflash_tensor *out, cuflash_make_fn fn, const void *context) {
    cuflash_nest loops;
    cuflash_nest_make(&loops, 1, &out);
    make_work work = {walk_make(&loops), fn, context};
    cuflash_parallel_for(walk_threads(&work.walk), work.walk.units, 16, make_units, &work);
}

typedef struct {
    walk walk;
    cuflash_scan_fn fn;
    void *context;
} scan_work;

static void scan_groups(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const scan_work *work = context;
    const walk *w = &work->walk;
    double a[CUFLASH_CHUNK], b[CUFLASH_CHUNK];
    int64_t each = (w->units + CUFLASH_GROUPS - 1) / CUFLASH_GROUPS;
    for (int64_t group = begin; group < end; group++)
        for (int64_t unit = group * each; unit < (group + 1) * each && unit < w->units; unit++) {
            char *address[CUFLASH_MAX_OPERANDS];
            int64_t first, n = walk_unit(w, unit, &first, address);
            walk_load(w, 0, address, n, a);
            walk_load(w, 1, address, n, b);
            work->fn(work->context, (int)group, first, n, a, b);
        }
}

void cuflash_scan(const cuflash_tensor *a, const cuflash_tensor *b, cuflash_scan_fn fn, void *context) {
    const cuflash_tensor *operands[] = {a, b};
    cuflash_nest loops;
    cuflash_nest_make(&loops, b ? 2 : 1, operands);
    scan_work work = {walk_make(&loops), fn, context};
    cuflash_parallel_for(walk_threads(&work.walk), CUFLASH_GROUPS, 1, scan_groups, &work);
}
