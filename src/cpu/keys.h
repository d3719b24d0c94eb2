/* The gradients of keys and values: sums that row blocks add to, and how they are written. */
#ifndef CUFLASH_CPU_KEYS_H
#define CUFLASH_CPU_KEYS_H

#include "rows.h"

/* dk and dv of keys, [key][pad]. */
typedef struct {
    float *dk, *dv;
} key_sums;

/* A split's, of all keys of a pair. */
static key_sums sums_of_split(const cuflash_cpu_work *work, int64_t pair, int64_t split) {
    const cuflash_cpu_plan *plan = work->plan;
    float *dk = work->partials + (pair * plan->splits + split) * plan->partial_floats;
    return (key_sums){dk, dk + plan->pad_k * plan->pad_d};
}

/* A tile's: among those of all keys, or, where they are written at once, by themselves. */
static key_sums sums_of_tile(const cuflash_cpu_plan *plan, key_sums all, int64_t first) {
    if (cuflash_keys_at_once(plan)) return all;
    return (key_sums){all.dk + first * plan->pad_d, all.dv + first * plan->pad_dv};
}

/* x[key] = factor * the sum of the splits' partial rows, `pad` floats each from `row` on, for so many keys: all splits side by
 * side, as memory is read ahead in so many places. */
static void sum_splits(const cuflash_cpu_plan *plan, const cuflash_operand *x, int64_t b, int64_t h, int64_t first,
                       int64_t keys, int64_t dim, int64_t pad, const float *row, float factor) {
    if (!x->data) return;
    float sum[WIDEST];
    for (int64_t key = first; key < first + keys; key++, row += pad) {
        for (int64_t d = 0; d < dim; d += VL) {
            vf total = v_load(row + d);
            for (int64_t split = 1; split < plan->splits; split++)
                total = total + v_load(row + split * plan->partial_floats + d);
            v_store(sum + d, total * factor);
        }
        store_row(x->dtype, cuflash_row(x, b, h, key), dim, sum);
    }
}

/* Writes dk and dv of so many keys from `first` on, whose sums begin here: of one split, or of the first. */
static void store_keys(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t b, int64_t h, int64_t first,
                       int64_t keys, key_sums sums) {
    sum_splits(plan, &p->dk, b, h, first, keys, p->head_dim, plan->pad_d, sums.dk, (float)p->scale);
    sum_splits(plan, &p->dv, b, h, first, keys, p->head_dim_v, plan->pad_dv, sums.dv, 1);
}

#endif
