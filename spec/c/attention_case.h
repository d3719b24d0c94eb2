/* What the attention tests share: problems whose tensors lie between guard bands, the oracle's answer to them, and
 * the error a naive implementation in the same dtype makes, which is the measure for ours. */
#ifndef CUFLASH_SPEC_ATTENTION_CASE_H
#define CUFLASH_SPEC_ATTENTION_CASE_H

#include "check.h"

enum { Q, K, V, O, LSE, D_O, DQ, DK, DV, TENSORS };
static const char *const TENSOR_NAMES[TENSORS] = {"q", "k", "v", "o", "lse", "d_o", "dq", "dk", "dv"};

typedef struct {
    int64_t batch, heads, heads_kv, seq_q, seq_k, head_dim, head_dim_v;
    bool causal;
    float scale; /* 0: the default */
} shape_case;

/* How [batch, heads, seq, dim] lies in memory: row-major, as [batch, seq, heads, dim], or with gaps everywhere. */
typedef enum { DENSE, BSHD, GAPS, LAYOUTS } layout;

enum { GUARD = 128, POISON = 0xff }; /* bytes of 0xff are a NaN in all four dtypes */

typedef struct {
    unsigned char *memory, *before; /* guard, elements and gaps, guard; and a copy */
    size_t bytes;
} buffer;

typedef struct {
    shape_case shape;
    cuflash_dtype dtype;
    cuflash_tensor t[TENSORS];
    buffer b[TENSORS];
    cuflash_attention a; /* with everything in it */
} fixture;

__attribute__((unused)) static void shape_of(const shape_case *s, int tensor, int64_t shape[4]) {
    bool kv = tensor == K || tensor == V || tensor == DK || tensor == DV;
    bool like_v = tensor == V || tensor == O || tensor == D_O || tensor == DV;
    shape[0] = s->batch;
    shape[1] = kv ? s->heads_kv : s->heads;
    shape[2] = kv ? s->seq_k : s->seq_q;
    shape[3] = like_v ? s->head_dim_v : s->head_dim;
}

__attribute__((unused)) static void make_tensor(fixture *f, int tensor, cuflash_dtype dtype, layout how) {
    int64_t s[4], stride[4];
    shape_of(&f->shape, tensor, s);
    int ndim = tensor == LSE ? 3 : 4;
    if (tensor == LSE) s[3] = 1;
    int64_t gap = how == GAPS ? 3 : 0;
    stride[3] = 1;
    if (how == BSHD) {
        stride[1] = s[3];
        stride[2] = s[1] * s[3];
        stride[0] = s[2] * stride[2];
    } else {
        stride[2] = s[3] + gap;
        stride[1] = s[2] * stride[2] + 2 * gap;
        stride[0] = s[1] * stride[1] + gap;
    }
    buffer *b = &f->b[tensor];
    b->bytes = (size_t)(s[0] * stride[0]) * cuflash_dtype_size(dtype) + 2 * GUARD;
    b->memory = (unsigned char *)aligned_alloc(64, (b->bytes + 63) / 64 * 64);
    b->before = (unsigned char *)malloc(b->bytes);
    if (!b->memory || !b->before) exit(1);
    memset(b->memory, POISON, b->bytes);
    REQUIRE_OK(cuflash_tensor_borrow(&f->t[tensor], b->memory + GUARD, dtype, CUFLASH_CPU, ndim, s, stride));
}

__attribute__((unused)) static void fixture_remember(fixture *f) {
    for (int i = 0; i < TENSORS; i++) memcpy(f->b[i].before, f->b[i].memory, f->b[i].bytes);
}

/* q, k, v and d_o random normal; the rest NaN. */
__attribute__((unused)) static void fixture_make(fixture *f, const shape_case *shape, cuflash_dtype dtype, layout how,
                                                 uint64_t seed) {
    memset(f, 0, sizeof *f);
    f->shape = *shape;
    f->dtype = dtype;
    cuflash_generator generator = {seed, 0};
    for (int i = 0; i < TENSORS; i++) {
        make_tensor(f, i, i == LSE && dtype != CUFLASH_FLOAT64 ? CUFLASH_FLOAT32 : dtype, how);
        if (i <= V || i == D_O) REQUIRE_OK(cuflash_random_normal(&f->t[i], &generator, 0, 1));
    }
    cuflash_attention *a = &f->a;
    a->struct_size = sizeof *a;
    a->q = &f->t[Q], a->k = &f->t[K], a->v = &f->t[V], a->o = &f->t[O], a->lse = &f->t[LSE];
    a->d_o = &f->t[D_O], a->dq = &f->t[DQ], a->dk = &f->t[DK], a->dv = &f->t[DV];
    if (shape->causal) a->flags |= CUFLASH_CAUSAL;
    if (shape->scale != 0) a->flags |= CUFLASH_SCALE;
    a->scale = shape->scale;
    fixture_remember(f);
}

__attribute__((unused)) static void fixture_free(fixture *f) {
    for (int i = 0; i < TENSORS; i++) {
        free(f->b[i].memory);
        free(f->b[i].before);
    }
}

__attribute__((unused)) static void fixture_poison(fixture *f, int tensor) {
    memset(f->b[tensor].memory, POISON, f->b[tensor].bytes);
}

__attribute__((unused)) static void fixture_poison_outputs(fixture *f) {
    static const int outputs[] = {O, LSE, DQ, DK, DV};
    for (int i = 0; i < COUNT_OF(outputs); i++) fixture_poison(f, outputs[i]);
}

/* Are the guard bands and gaps of a tensor as they were made? */
__attribute__((unused)) static bool guards_intact(const fixture *f, int tensor) {
    const buffer *b = &f->b[tensor];
    const cuflash_tensor *t = &f->t[tensor];
    size_t size = cuflash_dtype_size(t->dtype);
    unsigned char *mine = (unsigned char *)calloc(b->bytes, 1);
    int64_t n = cuflash_tensor_numel(t);
    for (int64_t i = 0; i < n; i++) {
        int64_t rest = i, offset = 0;
        for (int d = t->ndim - 1; d >= 0; d--) offset += rest % t->shape[d] * t->stride[d], rest /= t->shape[d];
        memset(mine + ((unsigned char *)t->data - b->memory) + offset * (int64_t)size, 1, size);
    }
    bool intact = true;
    for (size_t i = 0; i < b->bytes; i++) intact = intact && (mine[i] || b->memory[i] == POISON);
    free(mine);
    return intact;
}

/* Is every byte of a tensor's memory what it was when remembered? */
__attribute__((unused)) static bool unchanged(const fixture *f, int tensor) {
    return memcmp(f->b[tensor].memory, f->b[tensor].before, f->b[tensor].bytes) == 0;
}

/* After a call: inputs as before, nothing written beside the outputs. `outputs` is a set of 1 << tensor. */
__attribute__((unused)) static void check_memory(const fixture *f, unsigned outputs) {
    for (int i = 0; i < TENSORS; i++) {
        CHECK_F(guards_intact(f, i), "'%s': written outside of its elements", TENSOR_NAMES[i]);
        if (!(outputs & 1u << i)) CHECK_F(unchanged(f, i), "'%s': an input was changed", TENSOR_NAMES[i]);
    }
}

/* ---- What is right, and what is good enough ----------------------------------------------------- */

typedef struct {
    cuflash_tensor t[TENSORS]; /* float64, row-major; o, lse, dq, dk, dv filled in */
} answer;

__attribute__((unused)) static void answer_make(answer *r, const fixture *f) {
    memset(r, 0, sizeof *r);
    for (int i = 0; i < TENSORS; i++) {
        REQUIRE_OK(cuflash_tensor_empty(&r->t[i], CUFLASH_FLOAT64, CUFLASH_CPU, f->t[i].ndim, f->t[i].shape));
        if (i <= V || i == D_O) REQUIRE_OK(cuflash_tensor_copy(&r->t[i], &f->t[i]));
    }
}

__attribute__((unused)) static void answer_free(answer *r) {
    for (int i = 0; i < TENSORS; i++) cuflash_tensor_release(&r->t[i]);
}

/* The oracle's. */
__attribute__((unused)) static void answer_right(answer *r, const fixture *f) {
    answer_make(r, f);
    cuflash_attention a = f->a;
    a.o = &r->t[O], a.lse = &r->t[LSE], a.dq = &r->t[DQ], a.dk = &r->t[DK], a.dv = &r->t[DV];
    REQUIRE_OK(cuflash_reference_forward(&a));
    REQUIRE_OK(cuflash_reference_backward(&a));
}

/* x as the dtype holds it, from the definition: so many bits of mantissa above a least exponent. */
__attribute__((unused)) static double rounded(cuflash_dtype dtype, double x) {
    if (dtype == CUFLASH_FLOAT64 || !isfinite(x) || x == 0) return x;
    if (dtype == CUFLASH_FLOAT32) return (float)x;
    int bits = dtype == CUFLASH_FLOAT16 ? 10 : 7, least = dtype == CUFLASH_FLOAT16 ? -14 : -126, exponent = ilogb(x);
    double unit = ldexp(1, (exponent < least ? least : exponent) - bits);
    double y = nearbyint(x / unit) * unit, most = dtype == CUFLASH_FLOAT16 ? 65504 : 0x1.fep127;
    return fabs(y) > most ? copysign(INFINITY, y) : y;
}

__attribute__((unused)) static double *row_at(const cuflash_tensor *t, int64_t b, int64_t h, int64_t s) {
    return (double *)t->data + b * t->stride[0] + h * t->stride[1] + s * t->stride[2];
}

/* A naive implementation's: every matrix it makes is stored in the dtype, products are summed without rounding. */
__attribute__((unused)) static void answer_naive(answer *r, const fixture *f) {
    answer_make(r, f);
    const shape_case *c = &f->shape;
    int64_t n = c->seq_k, d = c->head_dim, dv = c->head_dim_v, group = c->heads / c->heads_kv;
    double scale = f->a.flags & CUFLASH_SCALE ? (double)f->a.scale : 1 / sqrt((double)d);
    double *p = (double *)malloc((size_t)n * sizeof *p);
    for (int i = DQ; i <= DV; i++) REQUIRE_OK(cuflash_tensor_fill(&r->t[i], 0));
#define ROUND(x) rounded(f->dtype, x)
    for (int64_t b = 0; b < c->batch; b++)
        for (int64_t h = 0; h < c->heads; h++)
            for (int64_t i = 0; i < c->seq_q; i++) {
                int64_t seen = c->causal ? i + 1 + c->seq_k - c->seq_q : n, kv = h / group;
                seen = seen < 0 ? 0 : seen > n ? n : seen;
                const double *q = row_at(&r->t[Q], b, h, i), *d_o = row_at(&r->t[D_O], b, h, i);
                double *o = row_at(&r->t[O], b, h, i), *dq = row_at(&r->t[DQ], b, h, i), max = -INFINITY, sum = 0, delta = 0;
                for (int64_t j = 0; j < seen; j++) {
                    const double *k = row_at(&r->t[K], b, kv, j);
                    double s = 0;
                    for (int64_t x = 0; x < d; x++) s += q[x] * k[x];
                    p[j] = ROUND(scale * ROUND(s));
                    max = fmax(max, p[j]);
                }
                for (int64_t j = 0; j < seen; j++) sum += exp(p[j] - max);
                for (int64_t j = 0; j < seen; j++) p[j] = ROUND(exp(p[j] - max) / sum);
                for (int64_t x = 0; x < dv; x++) {
                    double value = 0;
                    for (int64_t j = 0; j < seen; j++) value += p[j] * row_at(&r->t[V], b, kv, j)[x];
                    o[x] = ROUND(value);
                    delta += o[x] * d_o[x];
                }
                for (int64_t j = 0; j < seen; j++) {
                    const double *k = row_at(&r->t[K], b, kv, j), *v = row_at(&r->t[V], b, kv, j);
                    double dp = 0;
                    for (int64_t x = 0; x < dv; x++) dp += d_o[x] * v[x];
                    double ds = ROUND(p[j] * (ROUND(dp) - delta));
                    for (int64_t x = 0; x < dv; x++) row_at(&r->t[DV], b, kv, j)[x] += p[j] * d_o[x];
                    for (int64_t x = 0; x < d; x++)
                        row_at(&r->t[DK], b, kv, j)[x] += scale * ds * q[x], dq[x] += scale * ds * k[x];
                }
            }
    for (int t = DQ; t <= DV; t++)
        for (int64_t i = 0; i < cuflash_tensor_numel(&r->t[t]); i++) {
            double *x = (double *)r->t[t].data + i;
            *x = ROUND(*x);
        }
#undef ROUND
    free(p);
}

__attribute__((unused)) static cuflash_close_report distance(const cuflash_tensor *actual, const cuflash_tensor *expected) {
    cuflash_close_report report;
    REQUIRE_OK(cuflash_tensor_compare(actual, expected, 0, 0, false, &report));
    return report;
}

/* The bounds every kernel has to keep: float32 by the relative error of the whole, 16-bit numbers by how far off a
 * naive implementation in that dtype is. They are measured with <=, so that a NaN fails. */
__attribute__((unused)) static void check_close(const fixture *f, int tensor, const answer *right, const answer *naive) {
    cuflash_close_report ours = distance(&f->t[tensor], &right->t[tensor]);
    bool gradient = tensor >= DQ;
    if (f->dtype == CUFLASH_FLOAT32) {
        double bound = gradient ? 5e-6 : 2e-6;
        bool vanishes = f->shape.seq_k == 1 && (tensor == DQ || tensor == DK); /* a weight of 1 has no gradient */
        if (vanishes)
            CHECK_F(ours.max_abs <= 1e-5, "'%s': expected nothing but rounding, got %.3g", TENSOR_NAMES[tensor], ours.max_abs);
        else
            CHECK_F(ours.rel_norm <= bound, "'%s': relative error %.3g, bound %.3g", TENSOR_NAMES[tensor], ours.rel_norm,
                    bound);
    } else {
        double theirs = distance(&naive->t[tensor], &right->t[tensor]).max_abs, bound = (gradient ? 3 : 2) * theirs + 1e-5;
        CHECK_F(ours.max_abs <= bound, "'%s': error %.3g, bound %.3g (naive %.3g)", TENSOR_NAMES[tensor], ours.max_abs, bound,
                theirs);
    }
}

__attribute__((unused)) static void check_lse(const fixture *f, const answer *right) {
    cuflash_tensor got;
    REQUIRE_OK(cuflash_tensor_empty(&got, CUFLASH_FLOAT64, CUFLASH_CPU, 3, f->t[LSE].shape));
    REQUIRE_OK(cuflash_tensor_copy(&got, &f->t[LSE]));
    const double *x = (const double *)got.data, *y = (const double *)right->t[LSE].data;
    double worst = 0;
    for (int64_t i = 0; i < cuflash_tensor_numel(&got); i++) {
        double error = x[i] == y[i] ? 0 : fabs(x[i] - y[i]) / fmax(1, fabs(y[i]));
        if (!(error <= worst)) worst = error;
    }
    CHECK_F(worst <= 1e-5, "'lse': relative error %.3g, bound 1e-5", worst);
    cuflash_tensor_release(&got);
}

#endif
