/* One attention problem, checked: what every plan, backend and kernel works from. */
#ifndef CUFLASH_PROBLEM_H
#define CUFLASH_PROBLEM_H

#include "status.h"

enum { CUFLASH_MAX_HEAD_DIM = 512 };

/* A [batch, heads, seq, dim] tensor: element (b, h, s, d) lies at data + size * (b * batch + h * head + s * seq + d).
 * data is NULL where the tensor is not there. */
typedef struct {
    void *data;
    cuflash_dtype dtype;
    int64_t batch, head, seq; /* strides in elements */
} cuflash_operand;

typedef struct {
    int64_t batch, heads, heads_kv, seq_q, seq_k, head_dim, head_dim_v;
    cuflash_dtype dtype;
    int device;
    bool causal, deterministic;
    double scale; /* the default one is not rounded to float32 */
    cudaStream_t stream;
    cuflash_operand q, k, v, o, lse, d_o, dq, dk, dv; /* lse has no dim */
} cuflash_problem;

/* What a problem is checked for. A plan can be made from q, k and v alone; the reference takes any dtype and dimension. */
typedef enum { CUFLASH_FOR_KERNELS, CUFLASH_FOR_PLAN, CUFLASH_FOR_REFERENCE } cuflash_purpose;

cuflash_status cuflash_problem_check(const char *fn, const cuflash_attention *given, cuflash_pass pass, cuflash_purpose purpose,
                                     cuflash_problem *problem);

static inline char *cuflash_row(const cuflash_operand *x, int64_t b, int64_t h, int64_t s) {
    return (char *)x->data + (b * x->batch + h * x->head + s * x->seq) * (int64_t)cuflash_dtype_size(x->dtype);
}

/* How many keys query i sees: keys 0 ... n - 1. */
static inline int64_t cuflash_visible_keys(const cuflash_problem *p, int64_t i) {
    if (!p->causal) return p->seq_k;
    int64_t n = i + 1 + p->seq_k - p->seq_q;
    return n < 0 ? 0 : n < p->seq_k ? n : p->seq_k;
}

#endif
