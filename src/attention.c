/* The attention calls: check the arguments once -> problem -> plan -> run. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "interrupt.h"
#include "memory.h"
#include "overlap.h"
#include "plan.h"
#include "reference.h"
#include "tensor.h"

/* ---- Checking ----------------------------------------------------------------------------------- */

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
    for (int i = 1; i < count; i++)
        if (roles[i].tensor && roles[i].tensor->device != roles[0].tensor->device)
            return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                                "%s: argument '%s': expected a tensor on the device of 'q' (%d), got device %d", fn,
                                roles[i].name, roles[0].tensor->device, roles[i].tensor->device);
    return cuflash_device_check(roles[0].tensor->device);
}

static cuflash_status check_scale(const char *fn, const cuflash_attention *a, cuflash_problem *p) {
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

enum { FOR_KERNELS, FOR_PLAN, FOR_REFERENCE }; /* a plan can be made from q, k and v alone */

static cuflash_status check(const char *fn, const cuflash_attention *given, cuflash_pass pass, int purpose,
                            cuflash_problem *p) {
    if (!given) return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument 'attention': expected a pointer, got NULL", fn);
    if (given->struct_size != sizeof(cuflash_attention))
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: field 'struct_size': expected %zu, got %zu", fn,
                            sizeof(cuflash_attention), given->struct_size);
    if (given->flags & ~(uint32_t)(CUFLASH_CAUSAL | CUFLASH_SCALE | CUFLASH_DETERMINISTIC))
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: field 'flags': unknown bits in 0x%x", fn, given->flags);
    if (pass != CUFLASH_FORWARD && pass != CUFLASH_BACKWARD)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument 'pass': expected 0 or 1, got %d", fn, (int)pass);

    memset(p, 0, sizeof *p);
    role q = {.name = "q", .tensor = given->q, .operand = &p->q};
    role k = {.name = "k", .tensor = given->k, .operand = &p->k};
    role v = {.name = "v", .tensor = given->v, .operand = &p->v};
    CUFLASH_TRY(take(fn, &q, 0));
    p->batch = given->q->shape[0], p->heads = given->q->shape[1], p->seq_q = given->q->shape[2],
    p->head_dim = given->q->shape[3];
    k.dim = p->head_dim;
    CUFLASH_TRY(take(fn, &k, p->batch));
    p->heads_kv = given->k->shape[1], p->seq_k = given->k->shape[2];
    v.heads = p->heads_kv, v.seq = p->seq_k;
    CUFLASH_TRY(take(fn, &v, p->batch));
    p->head_dim_v = given->v->shape[3];
    if (p->heads % p->heads_kv != 0)
        return cuflash_fail(CUFLASH_DIMENSION_MISMATCH,
                            "%s: argument 'k': expected a number of heads that divides the %lld heads of 'q', got %lld", fn,
                            (long long)p->heads, (long long)p->heads_kv);

    bool backward = pass == CUFLASH_BACKWARD, reference = purpose == FOR_REFERENCE;
    role like_o = {.heads = p->heads, .seq = p->seq_q, .dim = p->head_dim_v, .optional = purpose == FOR_PLAN};
    role roles[9] = {q, k, v};
    int count = 3;
    if (!(backward && reference)) {
        role o = like_o, lse = like_o;
        o.name = "o", o.tensor = given->o, o.operand = &p->o, o.output = !backward;
        lse.name = "lse", lse.tensor = given->lse, lse.operand = &p->lse, lse.output = !backward;
        lse.dim = NO_DIM, lse.optional = true;
        roles[count++] = o;
        roles[count++] = lse;
    }
    if (backward) {
        role d_o = like_o;
        d_o.name = "d_o", d_o.tensor = given->d_o, d_o.operand = &p->d_o;
        roles[count++] = d_o;
        roles[count++] = (role){"dq", given->dq, &p->dq, p->heads, p->seq_q, p->head_dim, true, true};
        roles[count++] = (role){"dk", given->dk, &p->dk, p->heads_kv, p->seq_k, p->head_dim, true, true};
        roles[count++] = (role){"dv", given->dv, &p->dv, p->heads_kv, p->seq_k, p->head_dim_v, true, true};
    }
    for (int i = 3; i < count; i++) CUFLASH_TRY(take(fn, &roles[i], p->batch));
    CUFLASH_TRY(check_devices(fn, roles, count));
    if (!reference) {
        CUFLASH_TRY(check_dtypes(fn, roles, count));
        if (p->head_dim > CUFLASH_MAX_HEAD_DIM || p->head_dim_v > CUFLASH_MAX_HEAD_DIM)
            return cuflash_fail(CUFLASH_UNSUPPORTED_HEAD_DIM,
                                "%s: argument '%s': expected a head dimension of 1 to %d, got %lld", fn,
                                p->head_dim > CUFLASH_MAX_HEAD_DIM ? "q" : "v", CUFLASH_MAX_HEAD_DIM,
                                (long long)(p->head_dim > CUFLASH_MAX_HEAD_DIM ? p->head_dim : p->head_dim_v));
    }
    CUFLASH_TRY(check_scale(fn, given, p));
    CUFLASH_TRY(check_overlap(fn, roles, count));
    p->dtype = given->q->dtype;
    p->device = given->q->device;
    p->causal = given->flags & CUFLASH_CAUSAL;
    p->deterministic = given->flags & CUFLASH_DETERMINISTIC;
    p->stream = given->stream;
    return CUFLASH_SUCCESS;
}

/* ---- Running ------------------------------------------------------------------------------------ */

static cuflash_status finish(const char *fn, unsigned ticket) {
    cuflash_interruptible_end();
    if (!cuflash_interrupted(ticket)) return CUFLASH_SUCCESS;
    return cuflash_fail(CUFLASH_INTERRUPTED, "%s: interrupted before the work was complete; the outputs are partly written",
                        fn);
}

static cuflash_status run(const char *fn, const cuflash_attention *given, cuflash_pass pass) {
    cuflash_problem problem;
    cuflash_plan plan;
    CUFLASH_TRY(check(fn, given, pass, FOR_KERNELS, &problem));
    CUFLASH_TRY(cuflash_plan_make(&plan, &problem, pass));
    void *workspace = given->workspace, *own = NULL;
    if (workspace) {
        if (given->workspace_bytes < plan.workspace_bytes)
            return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: field 'workspace_bytes': expected at least %zu, got %zu", fn,
                                plan.workspace_bytes, given->workspace_bytes);
        if ((uintptr_t)workspace % 64 != 0)
            return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: field 'workspace': expected a 64-byte aligned address, got %p",
                                fn, workspace);
    } else {
        CUFLASH_TRY(cuflash_workspace_new(&own, problem.device, plan.workspace_bytes, fn));
        workspace = own;
    }
    unsigned ticket = cuflash_interruptible_begin();
    cuflash_plan_run(&plan, &problem, workspace, ticket);
    cuflash_workspace_release(own, problem.device, plan.workspace_bytes);
    return finish(fn, ticket);
}

cuflash_status cuflash_attention_forward(const cuflash_attention *attention) {
    return run("attention_forward", attention, CUFLASH_FORWARD);
}

cuflash_status cuflash_attention_backward(const cuflash_attention *attention) {
    return run("attention_backward", attention, CUFLASH_BACKWARD);
}

cuflash_status cuflash_attention_workspace(const cuflash_attention *attention, cuflash_pass pass, size_t *bytes) {
    cuflash_problem problem;
    cuflash_plan plan;
    CUFLASH_TRY(check("attention_workspace", attention, pass, FOR_PLAN, &problem));
    if (!bytes)
        return cuflash_fail(CUFLASH_NULL_POINTER, "attention_workspace: argument 'bytes': expected a pointer, got NULL");
    CUFLASH_TRY(cuflash_plan_make(&plan, &problem, pass));
    *bytes = plan.workspace_bytes;
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_attention_plan(const cuflash_attention *attention, cuflash_pass pass, char *text, size_t size) {
    cuflash_problem problem;
    cuflash_plan plan;
    if (!text || size == 0)
        return cuflash_fail(CUFLASH_NULL_POINTER, "attention_plan: argument 'text': expected a buffer, got %s",
                            text ? "size 0" : "NULL");
    CUFLASH_TRY(check("attention_plan", attention, pass, FOR_PLAN, &problem));
    CUFLASH_TRY(cuflash_plan_make(&plan, &problem, pass));
    cuflash_plan_describe(&plan, &problem, text, size);
    return CUFLASH_SUCCESS;
}

static cuflash_status run_reference(const char *fn, const cuflash_attention *given, cuflash_pass pass) {
    cuflash_problem problem;
    CUFLASH_TRY(check(fn, given, pass, FOR_REFERENCE, &problem));
    if (problem.device != CUFLASH_CPU)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument 'q': expected a tensor on the CPU, got device %d", fn,
                            problem.device);
    unsigned ticket = cuflash_interruptible_begin();
    cuflash_status status = cuflash_reference_run(&problem, pass, ticket);
    cuflash_status end = finish(fn, ticket);
    return status == CUFLASH_SUCCESS ? end : status;
}

cuflash_status cuflash_reference_forward(const cuflash_attention *attention) {
    return run_reference("reference_forward", attention, CUFLASH_FORWARD);
}

cuflash_status cuflash_reference_backward(const cuflash_attention *attention) {
    return run_reference("reference_backward", attention, CUFLASH_BACKWARD);
}
