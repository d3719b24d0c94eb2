#include "element.h"

#include <string.h>

#include "half.h"
#include "memory.h"
#include "parallel.h"
#include "tensor.h"

/* Rounding float64 to 16 bits by way of float32 would round twice. Rounding the first step to odd makes the
 * second one right: the last bit then remembers that something was cut off. */
static float round_to_odd(double x) {
    float f = (float)x;
    double back = (double)f;
    if (back == x || x != x || f - f != 0) return f; /* exact, NaN, or overflowed */
    uint32_t bits = cuflash_float_bits(f);
    if (bits & 1) return f;
    bool away = back > x ? x > 0 : x < 0; /* was the magnitude rounded up? */
    return cuflash_bits_float(away ? bits - 1 : bits + 1);
}

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

static uint16_t double_to_half(double x) {
    return cuflash_float_to_half(round_to_odd(x));
}

static uint16_t double_to_bfloat(double x) {
    return cuflash_float_to_bfloat(round_to_odd(x));
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
    case CUFLASH_FLOAT16: STORE(uint16_t, double_to_half); break;
    case CUFLASH_BFLOAT16: STORE(uint16_t, double_to_bfloat); break;
    case CUFLASH_FLOAT64: STORE(double, (double)); break;
    }
#undef STORE
}

double cuflash_round_to(cuflash_dtype dtype, double value) {
    double held;
    cuflash_store_elements(dtype, &held, 1, 1, &value);
    cuflash_load_elements(dtype, &held, 1, 1, &value);
    return value;
}

/* ---- Strided nests of loops --------------------------------------------------------------------- */

enum { MAX_OPERANDS = 3 };

/* Up to three tensors walked together, dimensions merged where all of them allow it. A unit is a piece of at most
 * CUFLASH_CHUNK elements of the innermost dimension. */
typedef struct {
    int ndim, operands;
    int64_t shape[CUFLASH_MAX_DIMS];
    int64_t stride[MAX_OPERANDS][CUFLASH_MAX_DIMS];
    char *data[MAX_OPERANDS];
    cuflash_dtype dtype[MAX_OPERANDS];
    int64_t pieces; /* units per innermost row */
    int64_t units;
} nest;

/* Adds an operand that broadcasts to the nest's shape. */
static void nest_add(nest *loops, const cuflash_tensor *t) {
    int k = loops->operands++;
    loops->data[k] = t->data;
    loops->dtype[k] = t->dtype;
    for (int i = 0; i < loops->ndim; i++) {
        int from = i - (loops->ndim - t->ndim);
        loops->stride[k][i] = from < 0 || (t->shape[from] == 1 && loops->shape[i] != 1) ? 0 : t->stride[from];
    }
}

static void nest_close(nest *loops) {
    int merged = 0; /* dimensions kept so far, outermost first */
    for (int i = 0; i < loops->ndim; i++) {
        if (loops->shape[i] == 1) continue;
        bool joins = merged > 0;
        for (int k = 0; k < loops->operands && joins; k++)
            joins = loops->stride[k][merged - 1] == loops->stride[k][i] * loops->shape[i];
        if (joins) merged--;
        loops->shape[merged] = joins ? loops->shape[merged] * loops->shape[i] : loops->shape[i];
        for (int k = 0; k < loops->operands; k++) loops->stride[k][merged] = loops->stride[k][i];
        merged++;
    }
    if (merged == 0) {
        loops->shape[0] = 1;
        for (int k = 0; k < loops->operands; k++) loops->stride[k][0] = 1;
        merged = 1;
    }
    loops->ndim = merged;
    loops->pieces = (loops->shape[merged - 1] + CUFLASH_CHUNK - 1) / CUFLASH_CHUNK;
    loops->units = loops->pieces;
    for (int i = 0; i < merged - 1; i++) loops->units *= loops->shape[i];
}

static void nest_open(nest *loops, const cuflash_tensor *shape_of) {
    memset(loops, 0, sizeof *loops);
    loops->ndim = shape_of->ndim;
    memcpy(loops->shape, shape_of->shape, sizeof loops->shape);
}

/* Where a unit lies: its number of elements, its first one's row-major number, and its address in each operand. */
static int64_t nest_unit(const nest *loops, int64_t unit, int64_t *first, char *address[MAX_OPERANDS]) {
    int inner = loops->ndim - 1;
    int64_t row = unit / loops->pieces, start = unit % loops->pieces * CUFLASH_CHUNK;
    *first = row * loops->shape[inner] + start;
    int64_t offset[MAX_OPERANDS] = {0};
    for (int k = 0; k < loops->operands; k++) offset[k] = start * loops->stride[k][inner];
    for (int i = inner - 1; i >= 0; i--) {
        int64_t index = row % loops->shape[i];
        row /= loops->shape[i];
        for (int k = 0; k < loops->operands; k++) offset[k] += index * loops->stride[k][i];
    }
    for (int k = 0; k < loops->operands; k++)
        address[k] = loops->data[k] + offset[k] * (int64_t)cuflash_dtype_size(loops->dtype[k]);
    int64_t left = loops->shape[inner] - start;
    return left < CUFLASH_CHUNK ? left : CUFLASH_CHUNK;
}

static void nest_load(const nest *loops, int k, char *address[MAX_OPERANDS], int64_t n, double *buffer) {
    if (k < loops->operands) cuflash_load_elements(loops->dtype[k], address[k], loops->stride[k][loops->ndim - 1], n, buffer);
}

/* Small tensors are not worth sharing out. */
static int nest_threads(const nest *loops) {
    return loops->units < 64 ? 1 : cuflash_get_num_threads();
}

/* ---- Map ---------------------------------------------------------------------------------------- */

typedef struct {
    nest loops; /* out, then the inputs */
    cuflash_map_fn fn;
    void *context;
} map_work;

static void map_units(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const map_work *work = context;
    double a[CUFLASH_CHUNK], b[CUFLASH_CHUNK];
    for (int64_t unit = begin; unit < end; unit++) {
        char *address[MAX_OPERANDS];
        int64_t first, n = nest_unit(&work->loops, unit, &first, address);
        nest_load(&work->loops, 1, address, n, a);
        nest_load(&work->loops, 2, address, n, b);
        work->fn(work->context, first, n, a, b);
        cuflash_store_elements(work->loops.dtype[0], address[0], work->loops.stride[0][work->loops.ndim - 1], n, a);
    }
}

static bool broadcasts(const cuflash_tensor *out, const cuflash_tensor *in) {
    if (in->ndim > out->ndim) return false;
    for (int i = 1; i <= in->ndim; i++) {
        int64_t size = in->shape[in->ndim - i];
        if (size != 1 && size != out->shape[out->ndim - i]) return false;
    }
    return true;
}

static bool same_view(const cuflash_tensor *a, const cuflash_tensor *b) {
    if (a->data != b->data || a->dtype != b->dtype || !cuflash_same_shape(a, b)) return false;
    for (int i = 0; i < a->ndim; i++)
        if (a->shape[i] > 1 && a->stride[i] != b->stride[i]) return false;
    return true;
}

/* Checks an input. One that overlaps out, other than element on element, is copied first. */
static cuflash_status take_input(const char *name, const char *arg, const cuflash_tensor *out, const cuflash_tensor *in,
                                 cuflash_tensor *taken) {
    CUFLASH_TRY(cuflash_check_tensor(name, arg, in));
    if (!broadcasts(out, in)) {
        char have[CUFLASH_SHAPE_TEXT], want[CUFLASH_SHAPE_TEXT];
        return cuflash_fail(CUFLASH_DIMENSION_MISMATCH, "%s: argument '%s': expected a shape that broadcasts to %s, got %s",
                            name, arg, cuflash_shape_text(want, out->ndim, out->shape),
                            cuflash_shape_text(have, in->ndim, in->shape));
    }
    if (in->device != out->device)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument '%s': expected a tensor on the output's device", name, arg);
    if (same_view(out, in) || !cuflash_spans_overlap(out, in)) return cuflash_tensor_alias(taken, in);
    CUFLASH_TRY(cuflash_tensor_empty(taken, in->dtype, in->device, in->ndim, in->shape));
    return cuflash_tensor_copy(taken, in);
}

cuflash_status cuflash_map(cuflash_names names, const cuflash_tensor *out, const cuflash_tensor *a, const cuflash_tensor *b,
                           cuflash_map_fn fn, void *context) {
    CUFLASH_TRY(cuflash_check_output(names.fn, names.out, out));
    cuflash_tensor taken_a = {0}, taken_b = {0};
    cuflash_status status = names.a ? take_input(names.fn, names.a, out, a, &taken_a) : CUFLASH_SUCCESS;
    if (status == CUFLASH_SUCCESS && names.b) status = take_input(names.fn, names.b, out, b, &taken_b);
    if (status == CUFLASH_SUCCESS) {
        map_work work = {.fn = fn, .context = context};
        nest_open(&work.loops, out);
        nest_add(&work.loops, out);
        if (names.a) nest_add(&work.loops, &taken_a);
        if (names.b) nest_add(&work.loops, &taken_b);
        nest_close(&work.loops);
        cuflash_parallel_for(nest_threads(&work.loops), work.loops.units, 16, map_units, &work);
    }
    cuflash_tensor_release(&taken_a);
    cuflash_tensor_release(&taken_b);
    return status;
}

/* ---- Scan --------------------------------------------------------------------------------------- */

typedef struct {
    nest loops;
    cuflash_scan_fn fn;
    void *context;
} scan_work;

static void scan_groups(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const scan_work *work = context;
    const nest *loops = &work->loops;
    double a[CUFLASH_CHUNK], b[CUFLASH_CHUNK];
    int64_t each = (loops->units + CUFLASH_GROUPS - 1) / CUFLASH_GROUPS;
    for (int64_t group = begin; group < end; group++)
        for (int64_t unit = group * each; unit < (group + 1) * each && unit < loops->units; unit++) {
            char *address[MAX_OPERANDS];
            int64_t first, n = nest_unit(loops, unit, &first, address);
            nest_load(loops, 0, address, n, a);
            nest_load(loops, 1, address, n, b);
            work->fn(work->context, (int)group, first, n, a, b);
        }
}

void cuflash_scan(const cuflash_tensor *a, const cuflash_tensor *b, cuflash_scan_fn fn, void *context) {
    scan_work work = {.fn = fn, .context = context};
    nest_open(&work.loops, a);
    nest_add(&work.loops, a);
    if (b) nest_add(&work.loops, b);
    nest_close(&work.loops);
    cuflash_parallel_for(nest_threads(&work.loops), CUFLASH_GROUPS, 1, scan_groups, &work);
}
