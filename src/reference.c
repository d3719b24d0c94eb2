/* The oracle: attention and its gradients as the formulas say, in float64, a query row at a time.
 *
 *   s_j = scale q . k_j      p_j = exp(s_j - lse)      o = sum_j p_j v_j
 *   dv_j += p_j d_o          dp_j = d_o . v_j          ds_j = p_j (dp_j - d_o . o)
 *   dq = scale sum_j ds_j k_j                          dk_j += scale ds_j q
 *
 * A unit of work is one batch element and KV head, whose query heads run one after the other: its dk and dv are
 * sums nobody else adds to. */
#include <math.h>
#include <string.h>

#include "element.h"
#include "interrupt.h"
#include "memory.h"
#include "parallel.h"
#include "reference.h"

typedef struct {
    const cuflash_problem *p;
    cuflash_pass pass;
    unsigned ticket;
    double *scratch; /* of all threads */
    size_t scratch_each;
} work;

/* float64 copies of a unit's rows, and what the pass computes from them. */
typedef struct {
    double *k, *v, *dk, *dv; /* [seq_k][dim] */
    double *q, *dq;          /* [head_dim] */
    double *o, *d_o;         /* [head_dim_v] */
    double *prob;            /* [seq_k] */
} rows;

/* Doubles a thread needs; false where that does not fit 64 bits (expanded views can be that long). */
static bool scratch_size(const cuflash_problem *p, size_t *doubles) {
    int64_t dims = 2 * (p->head_dim + p->head_dim_v), size;
    if (__builtin_mul_overflow(p->seq_k, dims + 1, &size) || __builtin_add_overflow(size, dims, &size)) return false;
    *doubles = (size_t)size;
    return true;
}

static rows lay_out(const cuflash_problem *p, double *scratch) {
    rows r;
    double *next = scratch;
#define TAKE(name, count) r.name = next, next += (count)
    TAKE(k, p->seq_k * p->head_dim);
    TAKE(v, p->seq_k * p->head_dim_v);
    TAKE(dk, p->seq_k * p->head_dim);
    TAKE(dv, p->seq_k * p->head_dim_v);
    TAKE(q, p->head_dim);
    TAKE(dq, p->head_dim);
    TAKE(o, p->head_dim_v);
    TAKE(d_o, p->head_dim_v);
    TAKE(prob, p->seq_k);
#undef TAKE
    return r;
}

static void load(const cuflash_operand *x, int64_t b, int64_t h, int64_t s, int64_t dim, double *dst) {
    cuflash_load_elements(x->dtype, cuflash_row(x, b, h, s), 1, dim, dst);
}

static void store(const cuflash_operand *x, int64_t b, int64_t h, int64_t s, int64_t dim, const double *src) {
    if (x->data) cuflash_store_elements(x->dtype, cuflash_row(x, b, h, s), 1, dim, src);
}

static double dot(const double *x, const double *y, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

static void add_scaled(double *y, double scale, const double *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += scale * x[i];
}

/* prob and o of one row; returns its log-sum-exp. */
static double forward_row(const cuflash_problem *p, rows *r, int64_t visible) {
    double max = -INFINITY, sum = 0;
    memset(r->o, 0, (size_t)p->head_dim_v * sizeof *r->o);
    for (int64_t j = 0; j < visible; j++) {
        r->prob[j] = p->scale * dot(r->q, r->k + j * p->head_dim, p->head_dim);
        if (r->prob[j] > max) max = r->prob[j];
    }
    bool empty = true; /* nothing to attend to: no key, or every score -inf */
    for (int64_t j = 0; j < visible; j++) empty = empty && r->prob[j] == -INFINITY;
    if (empty) {
        memset(r->prob, 0, (size_t)p->seq_k * sizeof *r->prob);
        return -INFINITY;
    }
    for (int64_t j = 0; j < visible; j++) sum += r->prob[j] = exp(r->prob[j] - max);
    for (int64_t j = 0; j < visible; j++) {
        r->prob[j] /= sum;
        add_scaled(r->o, r->prob[j], r->v + j * p->head_dim_v, p->head_dim_v);
    }
    return max + log(sum);
}

static void backward_row(const cuflash_problem *p, rows *r, int64_t visible) {
    double delta = dot(r->d_o, r->o, p->head_dim_v);
    memset(r->dq, 0, (size_t)p->head_dim * sizeof *r->dq);
    for (int64_t j = 0; j < visible; j++) {
        double ds = r->prob[j] * (dot(r->d_o, r->v + j * p->head_dim_v, p->head_dim_v) - delta);
        add_scaled(r->dv + j * p->head_dim_v, r->prob[j], r->d_o, p->head_dim_v);
        add_scaled(r->dk + j * p->head_dim, p->scale * ds, r->q, p->head_dim);
        add_scaled(r->dq, p->scale * ds, r->k + j * p->head_dim, p->head_dim);
    }
}

static void run_unit(const work *w, int64_t unit, rows *r) {
    const cuflash_problem *p = w->p;
    int64_t b = unit / p->heads_kv, kv = unit % p->heads_kv, group = p->heads / p->heads_kv;
    for (int64_t j = 0; j < p->seq_k; j++) {
        load(&p->k, b, kv, j, p->head_dim, r->k + j * p->head_dim);
        load(&p->v, b, kv, j, p->head_dim_v, r->v + j * p->head_dim_v);
    }
    memset(r->dk, 0, (size_t)(p->seq_k * (p->head_dim + p->head_dim_v)) * sizeof(double)); /* dv lies behind it */
    for (int64_t h = kv * group; h < (kv + 1) * group; h++)
        for (int64_t i = 0; i < p->seq_q; i++) {
            if (cuflash_interrupted(w->ticket)) return;
            int64_t visible = cuflash_visible_keys(p, i);
            load(&p->q, b, h, i, p->head_dim, r->q);
            double lse = forward_row(p, r, visible);
            if (w->pass == CUFLASH_FORWARD) {
                store(&p->o, b, h, i, p->head_dim_v, r->o);
                store(&p->lse, b, h, i, 1, &lse);
            } else {
                load(&p->d_o, b, h, i, p->head_dim_v, r->d_o);
                backward_row(p, r, lse == -INFINITY ? 0 : visible);
                store(&p->dq, b, h, i, p->head_dim, r->dq);
            }
        }
    if (w->pass == CUFLASH_FORWARD) return;
    for (int64_t j = 0; j < p->seq_k; j++) {
        store(&p->dk, b, kv, j, p->head_dim, r->dk + j * p->head_dim);
        store(&p->dv, b, kv, j, p->head_dim_v, r->dv + j * p->head_dim_v);
    }
}

static void run_units(void *context, int64_t begin, int64_t end, int thread) {
    const work *w = context;
    rows r = lay_out(w->p, w->scratch + (size_t)thread * w->scratch_each);
    for (int64_t unit = begin; unit < end && !cuflash_interrupted(w->ticket); unit++) run_unit(w, unit, &r);
}

cuflash_status cuflash_reference_run(const cuflash_problem *p, cuflash_pass pass, unsigned ticket) {
    int64_t units = p->batch * p->heads_kv;
    int threads = cuflash_get_num_threads();
    if (threads > units) threads = (int)units;
    work w = {.p = p, .pass = pass, .ticket = ticket};
    size_t bytes;
    if (!scratch_size(p, &w.scratch_each) || __builtin_mul_overflow(w.scratch_each, (size_t)threads * sizeof(double), &bytes))
        return cuflash_fail(CUFLASH_OUT_OF_MEMORY, "reference: the workspace of this problem does not fit 64 bits");
    void *scratch;
    CUFLASH_TRY(cuflash_workspace_new(&scratch, CUFLASH_CPU, bytes, "reference"));
    w.scratch = scratch;
    cuflash_parallel_for(threads, units, 1, run_units, &w);
    cuflash_workspace_release(scratch, CUFLASH_CPU, bytes);
    return CUFLASH_SUCCESS;
}
