/* Which kernel serves a problem, and with what: pure functions of the problem and the machine. */
#ifndef CUFLASH_PLAN_H
#define CUFLASH_PLAN_H

#include "cpu/cpu.h"
#include "cuda/launch.h"
#include "problem.h"

typedef struct {
    cuflash_pass pass;
    size_t workspace_bytes;
    union { /* by the problem's device */
        cuflash_cpu_plan cpu;
        cuflash_cuda_plan cuda;
    };
} cuflash_plan;

cuflash_status cuflash_plan_make(cuflash_plan *plan, const cuflash_problem *problem, cuflash_pass pass);

void cuflash_plan_describe(const cuflash_plan *plan, const cuflash_problem *problem, char *text, size_t size);

/* Runs the plan; workspace holds at least workspace_bytes. On the CPU it returns when the work is done, or early once it
 * was interrupted; on a CUDA device as soon as the work is queued. */
cuflash_status cuflash_plan_run(const cuflash_plan *plan, const cuflash_problem *problem, void *workspace, unsigned ticket);

#endif
