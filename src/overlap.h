/* Do two strided tensors share memory? */
#ifndef CUFLASH_OVERLAP_H
#define CUFLASH_OVERLAP_H

#include "status.h"

/* Whether any byte belongs to an element of a and to an element of b. Exact for all but contrived strides, where a
 * search that takes too long counts as no. */
bool cuflash_tensors_overlap(const cuflash_tensor *a, const cuflash_tensor *b);

#endif
