/* Where in a ring of STAGES the count-th tile is, and how often the ring has gone round. */
#ifndef CUFLASH_HOPPER_RING_CUH
#define CUFLASH_HOPPER_RING_CUH

namespace cuflash {

template <int STAGES> struct Ring {
    static_assert((STAGES & (STAGES - 1)) == 0, "a power of 2: a division is a shift");
    unsigned count = 0;
    __device__ __forceinline__ int stage() const {
        return count % STAGES;
    }
    __device__ __forceinline__ int parity() const {
        return count / STAGES % 2;
    }
};

} // namespace cuflash

#endif
