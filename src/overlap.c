#include "overlap.h"

#include "tensor.h"

/* a and b share a byte if, for some indices i of a, j of b and bytes p, q within an element,
 *
 *   a.data + sum i s + p = b.data + sum j t + q.
 *
 * With j and q counted from their ends every coefficient is positive: is `target` a sum of x_k * stride_k with
 * 0 <= x_k < count_k? With the strides in falling order what is left to the smaller ones is bounded, and in all usual
 * layouts only one or two values of x_k come into question. */
typedef struct {
    int64_t stride, last; /* bytes; the largest x */
} term;

enum { MAX_TERMS = 2 * CUFLASH_MAX_DIMS + 2, BUDGET = 10000 };

static int add_terms(term *terms, int count, const cuflash_tensor *t) {
    int64_t size = (int64_t)cuflash_dtype_size(t->dtype);
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] > 1 && t->stride[i] > 0) terms[count++] = (term){t->stride[i] * size, t->shape[i] - 1};
    terms[count++] = (term){1, size - 1};
    return count;
}

static void sort_falling(term *terms, int count) {
    for (int i = 1; i < count; i++)
        for (int k = i; k > 0 && terms[k - 1].stride < terms[k].stride; k--) {
            term swapped = terms[k];
            terms[k] = terms[k - 1];
            terms[k - 1] = swapped;
        }
}

/* reach: the largest sum the terms can make. */
static bool is_sum(const term *terms, int count, int64_t reach, int64_t target, int *budget) {
    if (target < 0 || target > reach || --*budget < 0) return false;
    if (target == 0) return true;
    if (count == 0) return false;
    int64_t stride = terms[0].stride, rest = reach - stride * terms[0].last;
    int64_t most = target / stride < terms[0].last ? target / stride : terms[0].last;
    for (int64_t x = most; x >= 0 && target - x * stride <= rest; x--)
        if (is_sum(terms + 1, count - 1, rest, target - x * stride, budget)) return true;
    return false;
}

bool cuflash_tensors_overlap(const cuflash_tensor *a, const cuflash_tensor *b) {
    if (!cuflash_spans_overlap(a, b)) return false;
    term terms[MAX_TERMS];
    int count = add_terms(terms, 0, a), budget = BUDGET;
    count = add_terms(terms, count, b);
    sort_falling(terms, count);
    int64_t reach = 0;
    for (int i = 0; i < count; i++) reach += terms[i].stride * terms[i].last;
    int64_t target = (const char *)b->data - (const char *)a->data + cuflash_tensor_extent(b) - 1;
    return is_sum(terms, count, reach, target, &budget);
}
