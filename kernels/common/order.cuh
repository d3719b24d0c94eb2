/* In which order blocks take up their work. */
#ifndef CUFLASH_COMMON_ORDER_CUH
#define CUFLASH_COMMON_ORDER_CUH

#include "attention.h"

namespace cuflash {

constexpr int SECTION = 16; /* units */

struct Order {
    int unit, tile;
};

/* Which of the tiles of which unit is this block's; a unit is a head, of a batch element. Blocks go through the tiles of a
 * unit, then of the next. Where tiles are of unequal length (causal), and tile 0 is the longest, they go through the first
 * tiles of several units, then through the next ones, as long blocks should not start last; of so many units, as more would
 * read more at a time than stays in the L2 cache. */
__device__ __forceinline__ Order order_of_block(int tiles, int units, bool unequal) {
    int section = unequal ? SECTION : 1, first_unit = blockIdx.x / (tiles * section) * section;
    int number = blockIdx.x - first_unit * tiles;
    section = min(section, units - first_unit);
    return {first_unit + number % section, number / section};
}

} // namespace cuflash

#endif
