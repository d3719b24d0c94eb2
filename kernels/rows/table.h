/* What the row kernels are launched with. C11 and CUDA C. */
#ifndef CUFLASH_ROWS_TABLE_H
#define CUFLASH_ROWS_TABLE_H

enum { CUFLASH_ROWS_PER_BLOCK = 64, CUFLASH_ROWS_THREADS = 256 };

#endif
