/* Which kernel serves a problem, and with what: pure functions of the problem and the machine. */
#ifndef CUFLASH_PLAN_H
#define CUFLASH_PLAN_H

#include "cpu/cpu.h"
#include "problem.h"

typedef struct {
    cuflash_pass pass;
    size_t workspace_bytes;
    cuflash_cpu_plan cpu; /* of problems on the CPU, the only ones there are */
} cuflash_plan;

cuflash_status cuflash_plan_make(cuflash_plan *plan, const cuflash_problem *problem, cuflash_pass pass);

void cuflash_plan_describe(const cuflash_plan *plan, const cuflash_problem *problem, char *text, size_t size);

/* Runs the plan; workspace holds at least workspace_bytes. Returns when the work is done, or early once it was
 * interrupted. */
void cuflash_plan_run(const cuflash_plan *plan, const cuflash_problem *problem, void *workspace, unsigned ticket);

#endif
