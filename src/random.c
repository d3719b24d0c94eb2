/* Filling tensors with random numbers; which number an element gets stands in operation.h. */
#include <float.h>
#include <math.h>

#include "element.h"
#include "tensor.h"

static double largest(cuflash_dtype dtype) {
    return dtype == CUFLASH_FLOAT16 ? 65504 : dtype == CUFLASH_BFLOAT16 ? 0x1.fep127 : (double)FLT_MAX;
}

static double round_up(cuflash_dtype dtype, double x) {
    double rounded = cuflash_round_to(dtype, x);
    if (rounded == -INFINITY) return -largest(dtype);
    for (double step = x - rounded; rounded < x; step *= 2) rounded = cuflash_round_to(dtype, x + step);
    return rounded;
}

static cuflash_status run(const char *name, const cuflash_tensor *out, cuflash_generator *generator, const cuflash_op *op) {
    CUFLASH_TRY(cuflash_map((cuflash_names){name, "out", NULL, NULL}, out, NULL, NULL, op));
    int64_t each = cuflash_elements_per_block(op), numel = cuflash_tensor_numel(out);
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
    double least = round_up(out->dtype, low);
    if (least >= high)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "random_uniform: argument 'high': there is no %s from %g up to below %g",
                            cuflash_dtype_name(out->dtype), low, high);
    return run("random_uniform", out, generator,
               &(cuflash_op){.kind = CUFLASH_OP_UNIFORM, .random = {*generator, out->dtype, low, high, least}});
}

cuflash_status cuflash_random_normal(const cuflash_tensor *out, cuflash_generator *generator, double mean, double std) {
    CUFLASH_TRY(check("random_normal", out, generator));
    if (!isfinite(mean) || !isfinite(std) || std < 0)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                            "random_normal: argument 'std': expected finite numbers with std >= 0, got mean %g and std %g",
                            mean, std);
    return run("random_normal", out, generator,
               &(cuflash_op){.kind = CUFLASH_OP_NORMAL, .random = {*generator, out->dtype, mean, std, 0}});
}
