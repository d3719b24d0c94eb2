/* What a block of a backward works on: it keeps a tile of keys, and walks the queries that see it, of some query heads of its
 * KV head. Where one block has all of them, it writes dk and dv; else the heads are dealt out to args.parts blocks, which
 * write partial sums, for cuflash_rows_sum to add. */
#ifndef CUFLASH_COMMON_WALK_CUH
#define CUFLASH_COMMON_WALK_CUH

#include "attention.h"
#include "common/order.cuh"
#include "common/row.cuh"

namespace cuflash {

struct Walk {
    int first_key, batch;
    int unit;           /* number of (batch, KV head, part) */
    int head, end_head; /* from, and to before; none where no query sees a key */
    int first_tile;     /* of queries, of every head */
    int unmasked;       /* from this tile on, queries see all keys of the block */
};

__device__ __forceinline__ int head_kv_of(const cuflash_attention_args &args, int unit) {
    return unit / args.parts % args.heads_kv;
}

template <int BLOCK_M, int BLOCK_N> __device__ __forceinline__ Walk walk_of_block(const cuflash_attention_args &args) {
    Walk w;
    int tiles_n = (args.seq_k + BLOCK_N - 1) / BLOCK_N, tiles_m = args.rows / BLOCK_M;
    Order order = order_of_block(tiles_n, args.batch * args.heads_kv * args.parts, args.causal);
    w.unit = order.unit;
    w.first_key = order.tile * BLOCK_N; /* causal: the first keys are seen by the most queries */
    w.batch = w.unit / (args.heads_kv * args.parts);
    w.first_tile = first_query(args, w.first_key) / BLOCK_M;
    w.unmasked = (first_query(args, w.first_key + BLOCK_N - 1) + BLOCK_M - 1) / BLOCK_M;
    if (w.first_key + BLOCK_N > args.seq_k) w.unmasked = tiles_m;
    int first = head_kv_of(args, w.unit) * args.group, part = w.unit % args.parts;
    w.head = first + part * args.group / args.parts;
    w.end_head = w.first_tile < tiles_m ? first + (part + 1) * args.group / args.parts : w.head;
    return w;
}

/* A key's row of a unit's partial sums, dim_padded floats. */
__device__ __forceinline__ float *partial_row(const cuflash_attention_args &args, float *sums, int unit, int key) {
    return sums + (static_cast<int64_t>(unit) * args.seq_k + key) * args.dim_padded;
}

} // namespace cuflash

#endif
