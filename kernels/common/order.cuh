/* In which order blocks take up their work. */
#ifndef CUFLASH_COMMON_ORDER_CUH
#define CUFLASH_COMMON_ORDER_CUH

#include "attention.h"

namespace cuflash {

struct Order {
    int unit, tile;
};

/* Which of the tiles of which unit is the number-th block's; a unit is a head, of a batch element. Blocks go through the first
 * tiles of so many units together, then through their next ones; then through those of the next units. */
__device__ __forceinline__ Order order_of_block(int number, int tiles, int units, int together) {
    int first_unit = number / (tiles * together) * together;
    number -= first_unit * tiles;
    together = min(together, units - first_unit);
    return {first_unit + number % together, number / together};
}

/* The queries of a forward's block. */
struct QueryBlock {
    int batch, head, first_row;
};

template <int BLOCK_M> __device__ __forceinline__ QueryBlock queries_of_block(const cuflash_attention_args &args) {
    int tiles = (args.seq_q + BLOCK_M - 1) / BLOCK_M;
    Order order = order_of_block(blockIdx.x, tiles, args.batch * args.heads, args.causal ? CUFLASH_UNITS_TOGETHER : 1);
    int tile = args.causal ? tiles - 1 - order.tile : order.tile; /* causal: the last queries see the most keys */
    return {order.unit / args.heads, order.unit % args.heads, tile * BLOCK_M};
}

} // namespace cuflash

#endif
