/* What functions begin with that the host's C11 and the kernels' CUDA C share. */
#ifndef CUFLASH_EVERYWHERE_H
#define CUFLASH_EVERYWHERE_H

#ifdef __CUDACC__
#define CUFLASH_EVERYWHERE static inline __host__ __device__
#else
#define CUFLASH_EVERYWHERE static inline
#endif

#endif
