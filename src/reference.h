/* Naive attention in float64: the single oracle. */
#ifndef CUFLASH_REFERENCE_H
#define CUFLASH_REFERENCE_H

#include "problem.h"

/* Runs a pass of a problem on the CPU. Stops early once interrupted. */
cuflash_status cuflash_reference_run(const cuflash_problem *problem, cuflash_pass pass, unsigned ticket);

#endif
