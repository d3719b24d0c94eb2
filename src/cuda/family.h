/* A family of kernels, as a plan chooses it and a launch takes it. */
#ifndef CUFLASH_CUDA_FAMILY_H
#define CUFLASH_CUDA_FAMILY_H

#include "cuda/launch.h"

/* The kernels of one construction. Their entry points are cuflash_<family>_<pass>_<dtype>_d<dim>_<block_m>x<block_n>. */
struct cuflash_cuda_family {
    const char *name, *what;
    int oldest, newest; /* compute capability, 10 * major + minor; 0: any later one */
    bool float32, half;
    bool maps;                                    /* takes q, k and v by tensor maps, and gradients */
    const cuflash_kernel_row *forward, *backward; /* rows by head dimension, then by preference; dim 0 ends them; or NULL */
    const cuflash_kernel_row *statistics;         /* rows of forward kernels that compute statistics alone; or NULL */
    const cuflash_fatbin *forward_fatbin, *backward_fatbin;
    int finish_threads; /* of the kernel after a backward; 0: as many as that has */
};

/* "f32", "f16" or "bf16" */
const char *cuflash_cuda_dtype_suffix(cuflash_dtype dtype);

enum { CUFLASH_ENTRY_TEXT = 96 };

/* Writes the name of a row's kernel of a kind: "forward", "statistics", "backward" or "finish". Returns it. */
const char *cuflash_cuda_entry_name(char text[CUFLASH_ENTRY_TEXT], const cuflash_cuda_family *family, const char *kind,
                                    cuflash_dtype dtype, const cuflash_kernel_row *row);

static inline int64_t cuflash_divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

#endif
