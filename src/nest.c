#include "nest.h"

#include <string.h>

/* Adds an operand that broadcasts to the nest's shape. */
static void add(cuflash_nest *loops, const cuflash_tensor *t) {
    int k = loops->operands++;
    loops->data[k] = t->data;
    loops->dtype[k] = t->dtype;
    for (int i = 0; i < loops->ndim; i++) {
        int from = i - (loops->ndim - t->ndim);
        loops->stride[k][i] = from < 0 || (t->shape[from] == 1 && loops->shape[i] != 1) ? 0 : t->stride[from];
    }
}

static void merge(cuflash_nest *loops) {
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
}

void cuflash_nest_make(cuflash_nest *loops, int count, const cuflash_tensor *const *operands) {
    memset(loops, 0, sizeof *loops);
    loops->ndim = operands[0]->ndim;
    memcpy(loops->shape, operands[0]->shape, sizeof loops->shape);
    for (int k = 0; k < count; k++) add(loops, operands[k]);
    merge(loops);
}

int64_t cuflash_nest_numel(const cuflash_nest *loops) {
    int64_t numel = 1;
    for (int i = 0; i < loops->ndim; i++) numel *= loops->shape[i];
    return numel;
}
