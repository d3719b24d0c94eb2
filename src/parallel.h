/* Work shared out over threads. */
#ifndef CUFLASH_PARALLEL_H
#define CUFLASH_PARALLEL_H

#include "status.h"

/* Works on units [begin, end). thread counts from 0 and stays below the number of threads asked for. */
typedef void (*cuflash_range_fn)(void *context, int64_t begin, int64_t end, int thread);

/* Units 0 ... count - 1, for which fn is called, up to grain units at a time, towards the end fewer; by one thread all at once.
 * Units that read the same data may come in runs of equal length: a thread goes on with its run while there are units left in it,
 * and so finds the data in its cache. */
typedef struct {
    int64_t count, grain;
    cuflash_range_fn fn;
    void *context;
    int64_t whole; /* so many units cost less at once; grain and runs are multiples of it; 0 or 1: each is for itself */
    int64_t runs;  /* count is a multiple of it; 0 or 1: all units are one run */
    bool shrink;   /* units are large, a run's later ones smaller: threads go on with the run that has most left */
} cuflash_stage;

enum { CUFLASH_MOST_STAGES = 5 };

/* Does the units of up to so many stages, first come first served, those of a stage when all of the one before are done; of a run
 * when the same run of the stage before is done, where both stages have as many, more than one. Stages without units are as if they
 * were not there. Which thread gets which unit is open: results must not depend on it. Of the threads up to `woken`, at least one,
 * are woken if they sleep; the others help if they are awake. */
void cuflash_parallel_stages(int threads, int woken, const cuflash_stage *stages, int count);

/* One stage. */
void cuflash_parallel_for(int threads, int64_t count, int64_t grain, cuflash_range_fn fn, void *context);

#endif
