/* What a block of a backward works on: it keeps a tile of keys, and walks the queries that see it, of all query heads of its
 * KV head. A walk can be dealt out in args.parts, which write partial sums of dk and dv, for cuflash_rows_sum to add. The first
 * args.whole walks are not. */
#ifndef CUFLASH_COMMON_WALK_CUH
#define CUFLASH_COMMON_WALK_CUH

#include "attention.h"
#include "common/order.cuh"
#include "common/row.cuh"

namespace cuflash {

struct Walk {
    int first_key, batch;
    int unit;    /* number of (batch, KV head, part) */
    int steps;   /* tiles of queries; 0: none that sees a key */
    int partial; /* is it a part, whose sums are partial? */
};

/* And the tiles of queries that it goes through. */
struct Route : Walk {
    int head, tile; /* where it begins */
    int first_tile; /* that sees a key, of every head */
    int unmasked;   /* from this tile on, queries see all keys of the block */
};

__device__ __forceinline__ int head_kv_of(const cuflash_attention_args &args, int unit) {
    return unit / args.parts % args.heads_kv;
}

/* How many tiles of keys a tile of queries is in walks of. */
template <int BLOCK_M, int BLOCK_N> __device__ __forceinline__ int tiles_of_keys(const cuflash_attention_args &args, int tile) {
    int end = args.causal ? min((tile + 1) * BLOCK_M + args.seq_k - args.seq_q, args.seq_k) : args.seq_k;
    return max(end + BLOCK_N - 1, 0) / BLOCK_N;
}

/* Does the walk of the last keys of a unit begin? */
__device__ __forceinline__ bool descends(const cuflash_attention_args &args, int unit) {
    return unit < args.descending;
}

/* The place of a tile of keys among the `tiles` of a unit that a tile of queries is in walks of, in the order in which these
 * begin. */
__device__ __forceinline__ int place_of(const cuflash_attention_args &args, int unit, int tiles, int tile) {
    return descends(args, unit) ? tiles - 1 - tile : tile;
}

/* Where all walks are dealt out, the parts of a walk are units as heads are: what a unit reads stays in the L2 cache. Else the
 * last walks are, which are few; they are those of the last units. */
__device__ __forceinline__ Order walk_order(const cuflash_attention_args &args, int tiles, int number) {
    int units = args.batch * args.heads_kv, together = args.together, part = 0;
    if (args.whole == 0) return order_of_block(number, tiles, units * args.parts, together);
    if (args.whole < units * tiles && number >= args.whole - args.whole % (tiles * together)) together = 1;
    if (number >= args.whole) {
        part = (number - args.whole) % args.parts;
        number = args.whole + (number - args.whole) / args.parts;
    }
    Order order = order_of_block(number, tiles, units, together);
    order.unit = order.unit * args.parts + part;
    return order;
}

/* The number-th one. */
template <int BLOCK_M, int BLOCK_N> __device__ __forceinline__ Route walk_of(const cuflash_attention_args &args, int number) {
    Route w;
    int tiles_n = (args.seq_k + BLOCK_N - 1) / BLOCK_N, tiles_m = args.rows / BLOCK_M;
    Order order = walk_order(args, tiles_n, number);
    w.partial = number >= args.whole;
    w.unit = order.unit;
    w.first_key = place_of(args, w.unit, tiles_n, order.tile) * BLOCK_N; /* causal: the first are seen by the most queries */
    w.batch = w.unit / (args.heads_kv * args.parts);
    w.first_tile = first_query(args, w.first_key) / BLOCK_M;
    w.unmasked = (first_query(args, w.first_key + BLOCK_N - 1) + BLOCK_M - 1) / BLOCK_M;
    if (w.first_key + BLOCK_N > args.seq_k) w.unmasked = tiles_m;
    /* Tiles of all heads are numbered; those before first_tile are part of no walk. Parts are the same whichever keys, as
     * blocks that take turns at a tile of queries must be in order. */
    int64_t all = static_cast<int64_t>(args.group) * tiles_m;
    int parts = w.partial ? args.parts : 1, part = w.unit % args.parts;
    int from = all * part / parts, to = all * (part + 1) / parts;
    auto visible_before = [&](int tile) {
        return tile / tiles_m * (tiles_m - w.first_tile) + max(tile % tiles_m - w.first_tile, 0);
    };
    w.head = head_kv_of(args, w.unit) * args.group + from / tiles_m;
    w.tile = max(from % tiles_m, w.first_tile);
    w.steps = w.first_tile < tiles_m ? visible_before(to) - visible_before(from) : 0;
    return w;
}

/* The rows of partial sums of a unit's tile of keys, dim_padded floats each. */
template <int BLOCK_N>
__device__ __forceinline__ float *partial_rows(const cuflash_attention_args &args, float *sums, int unit, int tile) {
    int64_t tiles = (args.seq_k + BLOCK_N - 1) / BLOCK_N, walk = unit / args.parts * tiles + tile - args.whole;
    return sums + (walk * args.parts + unit % args.parts) * BLOCK_N * args.dim_padded;
}

} // namespace cuflash

#endif
