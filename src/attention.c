/* The attention calls: check -> problem -> plan -> run. */
#include "interrupt.h"
#include "memory.h"
#include "plan.h"
#include "reference.h"
#include "tensor.h"

static cuflash_status finish(const char *fn, unsigned ticket) {
    cuflash_interruptible_end();
    if (!cuflash_interrupted(ticket)) return CUFLASH_SUCCESS;
    return cuflash_fail(CUFLASH_INTERRUPTED, "%s: interrupted before the work was complete; the outputs are partly written",
                        fn);
}

static cuflash_status check_workspace(const char *fn, const cuflash_attention *given, size_t needed) {
    if (given->workspace_bytes < needed)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: field 'workspace_bytes': expected at least %zu, got %zu", fn, needed,
                            given->workspace_bytes);
    if ((uintptr_t)given->workspace % 64 != 0)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: field 'workspace': expected a 64-byte aligned address, got %p", fn,
                            given->workspace);
    return CUFLASH_SUCCESS;
}

static cuflash_status run(const char *fn, const cuflash_attention *given, cuflash_pass pass) {
    cuflash_problem problem;
    cuflash_plan plan;
    CUFLASH_TRY(cuflash_problem_check(fn, given, pass, CUFLASH_FOR_KERNELS, &problem));
    CUFLASH_TRY(cuflash_plan_make(&plan, &problem, pass));
    void *own = NULL;
    if (given->workspace) CUFLASH_TRY(check_workspace(fn, given, plan.workspace_bytes));
    unsigned ticket = cuflash_interruptible_begin();          /* to map a large workspace takes a while, too */
    cudaStream_t before = cuflash_set_stream(problem.stream); /* a workspace of our own belongs to the call's stream */
    cuflash_status status = CUFLASH_SUCCESS;
    if (!given->workspace) status = cuflash_workspace_new(&own, problem.device, plan.workspace_bytes, fn);
    if (status == CUFLASH_SUCCESS) status = cuflash_plan_run(&plan, &problem, own ? own : given->workspace, ticket);
    cuflash_workspace_release(own, problem.device, plan.workspace_bytes);
    cuflash_set_stream(before);
    cuflash_status end = finish(fn, ticket);
    return status == CUFLASH_SUCCESS ? end : status;
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
    CUFLASH_TRY(cuflash_problem_check("attention_workspace", attention, pass, CUFLASH_FOR_PLAN, &problem));
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
    CUFLASH_TRY(cuflash_problem_check("attention_plan", attention, pass, CUFLASH_FOR_PLAN, &problem));
    CUFLASH_TRY(cuflash_plan_make(&plan, &problem, pass));
    cuflash_plan_describe(&plan, &problem, text, size);
    return CUFLASH_SUCCESS;
}

static cuflash_status run_reference(const char *fn, const cuflash_attention *given, cuflash_pass pass) {
    cuflash_problem problem;
    CUFLASH_TRY(cuflash_problem_check(fn, given, pass, CUFLASH_FOR_REFERENCE, &problem));
    char got[CUFLASH_DEVICE_TEXT];
    if (problem.device != CUFLASH_CPU)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s: argument 'q': expected a tensor on the CPU, got one on %s", fn,
                            cuflash_device_text(got, problem.device));
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
