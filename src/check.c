/* From the caller's struct to a checked problem. Every rule about arguments of attention is here, and nowhere else. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cuda/cuda.h"
#include "overlap.h"
#include "problem.h"
#include "tensor.h"

enum { NO_DIM = -1 }; /* of lse, which has three dimensions */

/* What is asked of one tensor of the problem. */
typedef struct {
    const char *name;
    const cuflash_tensor *tensor;
    cuflash_operand *operand;
    int64_t heads, seq, dim; /* expected; 0: this tensor decides */
    bool optional, output;
} role;

static cuflash_status shape_mismatch(const char *fn, const role *r, int64_t batch) {
    char got[CUFLASH_SHAPE_TEXT], want[CUFLASH_SHAPE_TEXT];
    int64_t sizes[4] = {batch, r->heads, r->seq, r->dim};
    int ndim = r->dim == NO_DIM ? 3 : 4, used = 0;
    static const char *const open[] = {"batch", "heads", "seq", "dim"};
    for (int i = 0; i < ndim; i++) {
        used += snprintf(want + used, sizeof want - (size_t)used, i ? " x " : "[");
        used += sizes[i] > 0 ? snprintf(want + used, sizeof want - (size_t)used, "%lld", (long long)sizes[i])
                             : snprintf(want + used, sizeof want - (size_t)used, "%s", open[i]);
    }
    return cuflash_fail(CUFLASH_DIMENSION_MISMATCH, "%s: argument '%s': expected %s], got %s", fn, r->name, want,
                        cuflash_shape_text(got, r->tensor->ndim, r->tensor->shape));
}

/* Checks one tensor by itself and against what is known, and makes its operand. */
static cuflash_status take(const char *fn, const role *r, int64_t batch) {
    memset(r->operand, 0, sizeof *r->operand);
    const cuflash_tensor *t = r->tensor;
    if (!t && r->optional) return CUFLASH_SUCCESS;
    CUFLASH_TRY(cuflash_check_tensor(fn, r->name, t));
    int64_t expected[4] = {batch, r->heads, r->seq, r->dim};
    int ndim = r->dim == NO_DIM ? 3 : 4;
    if (t->ndim != ndim) return shape_mismatch(fn, r, batch);
    for (int i = 0; i < ndim; i++)
        if (expected[i] > 0 && t->shape[i] != expected[i]) return shape_mismatch(fn, r, batch);
    if (ndim == 4 && t->shape[3] > 1 && t->stride[3] != 1)
        return cuflash_fail(
            CUFLASH_INVALID_ARGUMENT,
            "%s: argument '%s': expected a contiguous last dimension (stride 1), got stride %lld; make a contiguous copy", fn,
            r->name, (long long)t->stride[3]);
    if (r->output) CUFLASH_TRY(cuflash_check_output(fn, r->name, t));
    *r->operand = (cuflash_operand){t->data, t->dtype, t->stride[0], t->stride[1], t->stride[2]};
    return CUFLASH_SUCCESS;
}

static cuflash_status check_overlap(const char *fn, const role *roles, int count) {
    for (int i = 0; i < count; i++)
        for (int j = 0; j < count; j++) {
            if (i == j || !roles[i].output || !roles[i].tensor || !roles[j].tensor) continue;
            if (cuflash_tensors_overlap(roles[i].tensor, roles[j].tensor))
                return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                                    "%s: argument '%s': expected memory of its own, but it overlaps '%s'", fn, roles[i].name,
                                    roles[j].name);
        }
    return CUFLASH_SUCCESS;
}

static cuflash_status check_devices(const char *fn, const role *roles, int count) {
    int device = roles[0].tensor->device;
    char want[CUFLASH_DEVICE_TEXT], got[CUFLASH_DEVICE_TEXT];
    for (int i = 1; i < count; i++)
        if (roles[i].tensor && roles[i].tensor->device != device)
            return cuflash_fail(
                CUFLASH_INVALID_ARGUMENT, "%s: argument '%s': expected a tensor on the device of 'q', %s, got one on %s", fn,
                roles[i].name, cuflash_device_text(want, device), cuflash_device_text(got, roles[i].tensor->device));
    return cuflash_device_check(device);
}

static cuflash_status check_scale(const char *fn, const cuflash_attention *a, cuflash_problem *p) {
    if (!(a->flags & CUFLASH_SCALE) && a->scale != 0)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: field 'scale': it is set to %g, but 'flags' lack CUFLASH_SCALE", fn,
                            (double)a->scale);
    p->scale = a->flags & CUFLASH_SCALE ? (double)a->scale : 1 / sqrt((double)p->head_dim);
    if (isfinite(p->scale)) return CUFLASH_SUCCESS;
    return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument 'scale': expected a finite number, got %g", fn, p->scale);
}

/* The dtypes: kernels take one for all but lse; the reference takes any. */
static cuflash_status check_dtypes(const char *fn, const role *roles, int count) {
    cuflash_dtype dtype = roles[0].tensor->dtype;
    if (dtype == CUFLASH_FLOAT64)
        return cuflash_fail(
            CUFLASH_UNSUPPORTED_DTYPE,
            "%s: argument 'q': expected float32, float16 or bfloat16, got float64, which only the reference takes", fn);
    for (int i = 1; i < count; i++) {
        const cuflash_tensor *t = roles[i].tensor;
        if (!t) continue;
        if (roles[i].dim == NO_DIM) {
            if (t->dtype != CUFLASH_FLOAT32 && t->dtype != CUFLASH_FLOAT16)
                return cuflash_fail(CUFLASH_UNSUPPORTED_DTYPE, "%s: argument 'lse': expected float32 (or float16), got %s", fn,
                                    cuflash_dtype_name(t->dtype));
        } else if (t->dtype != dtype) {
            return cuflash_fail(CUFLASH_UNSUPPORTED_DTYPE, "%s: argument '%s': expected %s as 'q' is, got %s", fn,
                                roles[i].name, cuflash_dtype_name(dtype), cuflash_dtype_name(t->dtype));
        }
    }
    return CUFLASH_SUCCESS;
}

static cuflash_status check_struct(const char *fn, const cuflash_attention *given, cuflash_pass pass) {
    if (!given) return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument 'attention': expected a pointer, got NULL", fn);
    if (given->struct_size != sizeof(cuflash_attention))
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: field 'struct_size': expected %zu, got %zu", fn,
                            sizeof(cuflash_attention), given->struct_size);
    if (given->flags & ~(uint32_t)(CUFLASH_CAUSAL | CUFLASH_SCALE | CUFLASH_DETERMINISTIC))
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: field 'flags': unknown bits in 0x%x", fn, given->flags);
    if (pass != CUFLASH_FORWARD && pass != CUFLASH_BACKWARD)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument 'pass': expected 0 or 1, got %d", fn, (int)pass);
    return CUFLASH_SUCCESS;
}

/* Takes q, k and v, from which all sizes follow, into the first three roles. */
static cuflash_status take_inputs(const char *fn, const cuflash_attention *given, cuflash_problem *p, role *roles) {
    roles[0] = (role){.name = "q", .tensor = given->q, .operand = &p->q};
    CUFLASH_TRY(take(fn, &roles[0], 0));
    const int64_t *q = given->q->shape;
    p->batch = q[0], p->heads = q[1], p->seq_q = q[2], p->head_dim = q[3];
    roles[1] = (role){.name = "k", .tensor = given->k, .operand = &p->k, .dim = p->head_dim};
    CUFLASH_TRY(take(fn, &roles[1], p->batch));
    p->heads_kv = given->k->shape[1], p->seq_k = given->k->shape[2];
    roles[2] = (role){.name = "v", .tensor = given->v, .operand = &p->v, .heads = p->heads_kv, .seq = p->seq_k};
    CUFLASH_TRY(take(fn, &roles[2], p->batch));
    p->head_dim_v = given->v->shape[3];
    if (p->heads % p->heads_kv == 0) return CUFLASH_SUCCESS;
    return cuflash_fail(CUFLASH_DIMENSION_MISMATCH,
                        "%s: argument 'k': expected a number of heads that divides the %lld heads of 'q', got %lld", fn,
                        (long long)p->heads, (long long)p->heads_kv);
}

/* The roles of the other tensors; returns how many there are in all. */
static int add_roles(const cuflash_attention *given, cuflash_pass pass, cuflash_purpose purpose, cuflash_problem *p,
                     role *roles) {
    bool backward = pass == CUFLASH_BACKWARD, plan = purpose == CUFLASH_FOR_PLAN;
    int64_t h = p->heads, hk = p->heads_kv, sq = p->seq_q, sk = p->seq_k, d = p->head_dim, dv = p->head_dim_v;
    int count = 3;
    if (!backward || purpose != CUFLASH_FOR_REFERENCE) { /* the reference's backward begins anew */
        roles[count++] = (role){"o", given->o, &p->o, h, sq, dv, .optional = plan, .output = !backward};
        roles[count++] = (role){"lse", given->lse, &p->lse, h, sq, NO_DIM, .optional = true, .output = !backward};
    }
    if (backward) {
        roles[count++] = (role){"d_o", given->d_o, &p->d_o, h, sq, dv, .optional = plan};
        roles[count++] = (role){"dq", given->dq, &p->dq, h, sq, d, .optional = true, .output = true};
        roles[count++] = (role){"dk", given->dk, &p->dk, hk, sk, d, .optional = true, .output = true};
        roles[count++] = (role){"dv", given->dv, &p->dv, hk, sk, dv, .optional = true, .output = true};
    }
    return count;
}

static cuflash_status check_head_dims(const char *fn, const cuflash_problem *p) {
    bool v = p->head_dim <= CUFLASH_MAX_HEAD_DIM;
    int64_t dim = v ? p->head_dim_v : p->head_dim;
    if (dim <= CUFLASH_MAX_HEAD_DIM) return CUFLASH_SUCCESS;
    return cuflash_fail(CUFLASH_UNSUPPORTED_HEAD_DIM, "%s: argument '%s': expected a head dimension of 1 to %d, got %lld", fn,
                        v ? "v" : "q", CUFLASH_MAX_HEAD_DIM, (long long)dim);
}

cuflash_status cuflash_problem_check(const char *fn, const cuflash_attention *given, cuflash_pass pass, cuflash_purpose purpose,
                                     cuflash_problem *p) {
    role roles[9];
    memset(p, 0, sizeof *p);
    CUFLASH_TRY(check_struct(fn, given, pass));
    CUFLASH_TRY(take_inputs(fn, given, p, roles));
    int count = add_roles(given, pass, purpose, p, roles);
    for (int i = 3; i < count; i++) CUFLASH_TRY(take(fn, &roles[i], p->batch));
    CUFLASH_TRY(check_devices(fn, roles, count));
    if (purpose != CUFLASH_FOR_REFERENCE) {
        CUFLASH_TRY(check_dtypes(fn, roles, count));
        CUFLASH_TRY(check_head_dims(fn, p));
    }
    CUFLASH_TRY(check_scale(fn, given, p));
    CUFLASH_TRY(check_overlap(fn, roles, count));
    p->dtype = given->q->dtype;
    p->device = given->q->device;
    p->causal = given->flags & CUFLASH_CAUSAL;
    p->deterministic = given->flags & CUFLASH_DETERMINISTIC;
    p->stream = given->stream ? given->stream : cuflash_cuda_stream();
    return CUFLASH_SUCCESS;
}
