#include "plan.h"

#include <stdio.h>

cuflash_status cuflash_plan_make(cuflash_plan *plan, const cuflash_problem *problem, cuflash_pass pass) {
    plan->pass = pass;
    if (problem->device != CUFLASH_CPU) return cuflash_cuda_plan_make(&plan->cuda, problem, pass, &plan->workspace_bytes);
    return cuflash_cpu_plan_make(&plan->cpu, problem, pass, cuflash_get_num_threads(), &plan->workspace_bytes);
}

void cuflash_plan_describe(const cuflash_plan *plan, const cuflash_problem *p, char *text, size_t size) {
    char kernel[512];
    if (p->device == CUFLASH_CPU)
        cuflash_cpu_plan_describe(&plan->cpu, p, kernel, sizeof kernel);
    else
        cuflash_cuda_plan_describe(&plan->cuda, p, plan->pass, kernel, sizeof kernel);
    snprintf(text, size,
             "pass: %s\n"
             "problem: %s, batch %lld, heads %lld on %lld KV head%s, %lld %s x %lld key%s, head dim %lld (v %lld), %s, "
             "scale %.6g\n"
             "%s"
             "workspace: %zu bytes\n",
             plan->pass == CUFLASH_FORWARD ? "forward" : "backward", cuflash_dtype_name(p->dtype), (long long)p->batch,
             (long long)p->heads, (long long)p->heads_kv, p->heads_kv == 1 ? "" : "s", (long long)p->seq_q,
             p->seq_q == 1 ? "query" : "queries", (long long)p->seq_k, p->seq_k == 1 ? "" : "s", (long long)p->head_dim,
             (long long)p->head_dim_v, p->causal ? "causal" : "not causal", p->scale, kernel, plan->workspace_bytes);
}

cuflash_status cuflash_plan_run(const cuflash_plan *plan, const cuflash_problem *problem, void *workspace, unsigned ticket) {
    if (problem->device != CUFLASH_CPU) return cuflash_cuda_run(&plan->cuda, problem, plan->pass, workspace);
    cuflash_cpu_run(&plan->cpu, problem, plan->pass, workspace, ticket);
    return CUFLASH_SUCCESS;
}
