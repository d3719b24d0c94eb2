/* In which order blocks take up their work. */
#ifndef CUFLASH_COMMON_ORDER_CUH
#define CUFLASH_COMMON_ORDER_CUH

#include "attention.h"

namespace cuflash {

constexpr int SECTION = 16; /* units */

struct Order {
    int unit, tile;
};

/* Which of the tiles of which unit is the number-th block's; a unit is a head, of a batch element. Blocks go through the tiles
 * of a unit, then of the next. Where tiles are of unequal length (causal), and tile 0 is the longest, they go through the
 * first tiles of several units, then through the next ones, as long blocks should not start last; of so many units, as more
 * would read more at a time than stays in the L2 cache; of `together` units at least. */
__device__ __forceinline__ Order order_of_block(int number, int tiles, int units, bool unequal, int together = 1) {
    int section = max(unequal ? SECTION : 1, together), first_unit = number / (tiles * section) * section;
    number -= first_unit * tiles;
    section = min(section, units - first_unit);
    return {first_unit + number % section, number / section};
}

/* The queries of a forward's block. */
struct QueryBlock {
    int batch, head, first_row;
};

template <int BLOCK_M> __device__ __forceinline__ QueryBlock queries_of_block(const cuflash_attention_args &args) {
    int tiles = (args.seq_q + BLOCK_M - 1) / BLOCK_M;
    Order order = order_of_block(blockIdx.x, tiles, args.batch * args.heads, args.causal);
    int tile = args.causal ? tiles - 1 - order.tile : order.tile; /* causal: the last queries see the most keys */
    return {order.unit / args.heads, order.unit % args.heads, tile * BLOCK_M};
}

} // namespace cuflash

#endif
