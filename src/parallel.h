/* Work shared out over threads. The only place that knows OpenMP. */
#ifndef CUFLASH_PARALLEL_H
#define CUFLASH_PARALLEL_H

#include "status.h"

/* Works on units [begin, end). thread counts from 0 and stays below the number of threads asked for. */
typedef void (*cuflash_range_fn)(void *context, int64_t begin, int64_t end, int thread);

/* Calls fn until units 0 ... count - 1 are done, grain units at a time, first come first served. Which
 * thread gets which unit is open: results must not depend on it. */
void cuflash_parallel_for(int threads, int64_t count, int64_t grain, cuflash_range_fn fn, void *context);

#endif
