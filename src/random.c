/* Filling tensors with random numbers. Element i takes word i % 4 of block offset + i / 4; a float64 uniform takes
 * two words, i % 2 of block offset + i / 2. */
#include <float.h>
#include <math.h>

#include "element.h"
#include "philox.h"
#include "tensor.h"

typedef struct {
    cuflash_generator generator;
    cuflash_dtype dtype;
    double low, high; /* or mean and std */
    double least;     /* uniform: the smallest number of the dtype that is not below low */
} fill;

static int words_per_block(const fill *work, bool uniform) {
    return uniform && work->dtype == CUFLASH_FLOAT64 ? 2 : 4;
}

/* Bits of a uniform number that the dtype holds exactly below 1. */
static int uniform_bits(cuflash_dtype dtype) {
    return dtype == CUFLASH_FLOAT16 ? 11 : dtype == CUFLASH_BFLOAT16 ? 8 : 24;
}

static double largest(cuflash_dtype dtype) {
    return dtype == CUFLASH_FLOAT16 ? 65504 : dtype == CUFLASH_BFLOAT16 ? 0x1.fep127 : (double)FLT_MAX;
}

static double round_up(cuflash_dtype dtype, double x) {
    double rounded = cuflash_round_to(dtype, x);
    if (rounded == -INFINITY) return -largest(dtype);
    for (double step = x - rounded; rounded < x; step *= 2) rounded = cuflash_round_to(dtype, x + step);
    return rounded;
}

static void uniform_chunk(void *context, int64_t first, int64_t n, double *a, const double *b) {
    (void)b;
    const fill *work = context;
    int each = words_per_block(work, true), bits = uniform_bits(work->dtype);
    cuflash_philox_block block = {{0}};
    for (int64_t i = 0; i < n; i++) {
        int64_t number = first + i;
        int place = (int)(number % each);
        if (i == 0 || place == 0)
            block = cuflash_philox(work->generator.seed, work->generator.offset + (uint64_t)(number / each));
        double u;
        if (each == 2)
            u = (double)(((uint64_t)block.word[2 * place] << 21) ^ (block.word[2 * place + 1] >> 11)) * 0x1p-53;
        else
            u = cuflash_philox_uniform(block.word[place], bits);
        double value = cuflash_round_to(work->dtype, work->low + u * (work->high - work->low));
        a[i] = value < work->low || value >= work->high ? work->least : value; /* rounding must not leave the range */
    }
}

static void normal_chunk(void *context, int64_t first, int64_t n, double *a, const double *b) {
    (void)b;
    const fill *work = context;
    for (int64_t i = 0; i < n;) {
        int64_t number = first + i;
        int place = (int)(number % 4);
        cuflash_philox_block block = cuflash_philox(work->generator.seed, work->generator.offset + (uint64_t)(number / 4));
        double z[4];
        cuflash_philox_normal(block.word[0], block.word[1], &z[0], &z[1]);
        cuflash_philox_normal(block.word[2], block.word[3], &z[2], &z[3]);
        for (; place < 4 && i < n; place++, i++) a[i] = work->low + work->high * z[place];
    }
}

static cuflash_status run(const char *name, const cuflash_tensor *out, cuflash_generator *generator, fill *work,
                          cuflash_map_fn fn) {
    work->generator = *generator;
    work->dtype = out->dtype;
    CUFLASH_TRY(cuflash_map((cuflash_names){name, "out", NULL, NULL}, out, NULL, NULL, fn, work));
    int64_t each = words_per_block(work, fn == uniform_chunk), numel = cuflash_tensor_numel(out);
    generator->offset += (uint64_t)((numel + each - 1) / each);
    return CUFLASH_SUCCESS;
}

static cuflash_status check(const char *name, const cuflash_tensor *out, const cuflash_generator *generator) {
    CUFLASH_TRY(cuflash_check_output(name, "out", out));
    if (generator) return CUFLASH_SUCCESS;
    return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument 'generator': expected a generator, got NULL", name);
}

cuflash_status cuflash_random_uniform(const cuflash_tensor *out, cuflash_generator *generator, double low, double high) {
    CUFLASH_TRY(check("random_uniform", out, generator));
    if (!isfinite(low) || !isfinite(high) || !(low < high) || !isfinite(high - low))
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                            "random_uniform: argument 'high': expected finite numbers with low < high, got low %g and high %g",
                            low, high);
    fill work = {.low = low, .high = high, .least = round_up(out->dtype, low)};
    if (work.least >= high)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "random_uniform: argument 'high': there is no %s from %g up to below %g",
                            cuflash_dtype_name(out->dtype), low, high);
    return run("random_uniform", out, generator, &work, uniform_chunk);
}

cuflash_status cuflash_random_normal(const cuflash_tensor *out, cuflash_generator *generator, double mean, double std) {
    CUFLASH_TRY(check("random_normal", out, generator));
    if (!isfinite(mean) || !isfinite(std) || std < 0)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                            "random_normal: argument 'std': expected finite numbers with std >= 0, got mean %g and std %g",
                            mean, std);
    return run("random_normal", out, generator, &(fill){.low = mean, .high = std}, normal_chunk);
}
