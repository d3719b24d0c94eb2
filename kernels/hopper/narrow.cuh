/* Attention backward on Hopper for head dimensions up to 128, after Shah et al., "FlashAttention-3" (2024): a block keeps 128
 * keys, 64 to a warpgroup, and walks the queries that see it; then it takes the next walk. In long walks the two
 * warpgroups take turns (docs/kernels/hopper-backward.md has the reasons). */
#ifndef CUFLASH_HOPPER_NARROW_CUH
#define CUFLASH_HOPPER_NARROW_CUH

#include "hopper/gradients.cuh"

namespace cuflash {

template <typename T, int DIM, int BLOCK_M, int BLOCK_N, int STAGES>
struct NarrowBackward : Gradients<NarrowBackward<T, DIM, BLOCK_M, BLOCK_N, STAGES>, T, DIM, BLOCK_M, BLOCK_N, BLOCK_N> {
    using Base = Gradients<NarrowBackward, T, DIM, BLOCK_M, BLOCK_N, BLOCK_N>;
    using Base::args, Base::maps, Base::walk, Base::dq_tile, Base::walk_at;
    using Base::WARPS, Base::WARPGROUPS, Base::K_BYTES, Base::Q_BYTES, Base::K_PANEL, Base::Q_PANEL, Base::ROW_BYTES;
    static_assert(BLOCK_N == 64 * WARPGROUPS, "64 keys to a warpgroup");
    static constexpr int S_BYTES = WARPGROUPS * Q_PANEL;
    /* dq of a tile is shared out to the warpgroups by columns, or where there are 64 queries for each, by rows. */
    static constexpr bool BY_ROWS = BLOCK_M == 64 * WARPGROUPS;
    static_assert(DIM == (BY_ROWS ? 64 : 128), "64 columns of dq to a warp");
    using Steps = Ring<STAGES>;
    static constexpr int LATE_STEPS = DIM == 64 ? 6 : 32; /* of a walk that makes dq a step later: measured */
    static constexpr int PIECE_ROWS = CUFLASH_HOPPER_DQ_ROWS, PIECE_BYTES = PIECE_ROWS * 64 * 4; /* of a sum: half a square */
    static constexpr int BOX_BYTES = CUFLASH_HOPPER_DK_ROWS * 128; /* of dk or dv: a warp's keys, 64 columns */
    static_assert(CUFLASH_HOPPER_DK_ROWS == 16 && BOX_BYTES * DIM / 64 <= Base::DQ_BYTES / 4, "in the warp's place for dq");

    uint32_t k_tile, v_tile, q_tiles, do_tiles, s_tiles, sum_pieces, dq_pieces, row_tiles, barriers;

    __device__ __forceinline__ NarrowBackward(const cuflash_hopper_args &a, uint32_t shared)
        : Base(a), k_tile((shared + 1023) / 1024 * 1024), v_tile(k_tile + K_BYTES), q_tiles(v_tile + K_BYTES),
          do_tiles(q_tiles + STAGES * Q_BYTES), s_tiles(do_tiles + STAGES * Q_BYTES) {
        dq_tile = s_tiles + 2 * S_BYTES;
        sum_pieces = dq_tile + WARPGROUPS * Base::DQ_BYTES;
        dq_pieces = sum_pieces + 2 * PIECE_BYTES;
        row_tiles = dq_pieces + PIECE_BYTES;
        barriers = row_tiles + STAGES * 2 * ROW_BYTES;
        walk_at = barriers + 128;
    }

    /* Full: it is there. Empty: nobody reads it any more. Of K, V and what the walk is; of the step's tiles of Q and dO; and of
     * its dS; and of dq. */
    __device__ __forceinline__ uint32_t walk_full() const {
        return barriers;
    }
    __device__ __forceinline__ uint32_t walk_empty() const {
        return barriers + 8;
    }
    __device__ __forceinline__ uint32_t full(int stage) const {
        return barriers + 16 + stage * 8;
    }
    __device__ __forceinline__ uint32_t empty(int stage) const {
        return barriers + 16 + (STAGES + stage) * 8;
    }
    __device__ __forceinline__ uint32_t s_full(int stage) const {
        return barriers + 16 + (2 * STAGES + stage) * 8;
    }
    __device__ __forceinline__ uint32_t s_empty(int stage) const {
        return barriers + 16 + (2 * STAGES + 2 + stage) * 8;
    }

    __device__ __forceinline__ uint32_t dq_full(int warpgroup) const {
        return barriers + 16 + (2 * STAGES + 4 + warpgroup) * 8;
    }
    __device__ __forceinline__ uint32_t dq_empty(int warpgroup) const {
        return barriers + 16 + (2 * STAGES + 6 + warpgroup) * 8;
    }

    __device__ __forceinline__ uint32_t piece_full(int stage) const {
        return barriers + 16 + (2 * STAGES + 8 + stage) * 8;
    }

    __device__ __forceinline__ void make_barriers() {
        static_assert(16 + (2 * STAGES + 10) * 8 <= 128, "room for barriers");
        ptx::mbarrier_init(walk_full(), 1), ptx::mbarrier_init(walk_empty(), WARPS + WARPGROUPS);
        for (int i = 0; i < STAGES; i++) ptx::mbarrier_init(full(i), 1), ptx::mbarrier_init(empty(i), 32 * WARPS);
        for (int i = 0; i < 2; i++) ptx::mbarrier_init(s_full(i), WARPS), ptx::mbarrier_init(s_empty(i), WARPS);
        for (int i = 0; i < WARPGROUPS; i++) ptx::mbarrier_init(dq_full(i), 4), ptx::mbarrier_init(dq_empty(i), 1);
        for (int i = 0; i < 2; i++) ptx::mbarrier_init(piece_full(i), 1);
        ptx::fence_mbarrier_init();
    }

    __device__ __forceinline__ int take_walk(const Ring<1> &) {
        return atomicAdd(args.ticket, 1);
    }

    __device__ __forceinline__ void copy_step(const Route &w, const Steps &ring, int head, int tile) {
        uint32_t there = full(ring.stage()), rows = row_tiles + ring.stage() * 2 * ROW_BYTES;
        ptx::mbarrier_wait(empty(ring.stage()), ring.parity() ^ 1);
        Base::masked_tile(ring.stage()) = tile < w.unmasked ? tile : Base::NONE;
        ptx::mbarrier_arrive_expect(there, 2 * Q_BYTES + 2 * ROW_BYTES);
        Base::copy_tile(q_tiles + ring.stage() * Q_BYTES, maps.q, there, Q_PANEL, tile * BLOCK_M, head, w.batch);
        int64_t row = row_number(args, w.batch, head, tile * BLOCK_M);
        ptx::load_bytes(rows, args.row_offset + row, ROW_BYTES, there);
        ptx::load_bytes(rows + ROW_BYTES, args.row_delta + row, ROW_BYTES, there);
        Base::copy_tile(do_tiles + ring.stage() * Q_BYTES, maps.d_o, there, Q_PANEL, tile * BLOCK_M, head, w.batch);
    }

    __device__ __forceinline__ void copy_keys(const Walk &w) {
        int head_kv = head_kv_of(args, w.unit);
        ptx::mbarrier_arrive_expect(walk_full(), 2 * K_BYTES);
        Base::copy_tile(k_tile, maps.k, walk_full(), K_PANEL, w.first_key, head_kv, w.batch);
        Base::copy_tile(v_tile, maps.v, walk_full(), K_PANEL, w.first_key, head_kv, w.batch);
    }

    /* dS = P (V dO^T - delta) */
    __device__ __forceinline__ void multiply_by(float (&ds)[BLOCK_M / 2], const float (&p)[BLOCK_M / 2], uint32_t deltas) {
#pragma unroll
        for (int n = 0; n < BLOCK_M / 8; n++) {
            float2 delta = Base::of_queries(deltas, n);
#pragma unroll
            for (int e = 0; e < 4; e++) ds[n * 4 + e] = (ds[n * 4 + e] - (e % 2 ? delta.y : delta.x)) * p[n * 4 + e];
        }
    }

    /* The warpgroup's share of dq of a tile: dS^T K, under way */
    __device__ __forceinline__ void multiply_queries(float (&c)[32], uint32_t s_tile, int warpgroup) {
        ptx::wgmma_fence();
        int column = BY_ROWS ? 0 : warpgroup;
        uint64_t ds = ptx::rows_descriptor(s_tile + (BY_ROWS ? warpgroup * 64 * 128 : 0));
        uint64_t keys = ptx::columns_descriptor(k_tile + column * K_PANEL, K_PANEL);
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; k++) {
            uint64_t a = ptx::advance(ds, k / 4 * Q_PANEL + k % 4 * 32), b = ptx::advance(keys, k * 2048);
            Base::Queries::multiply(c, a, b, k > 0);
        }
        ptx::wgmma_commit();
    }

    /* dq of a tile to shared memory, from where another thread adds it. */
    __device__ __forceinline__ void give_queries(const float (&dq)[32], int warpgroup, unsigned count) {
        Base::put_queries(dq, 0, warpgroup, count);
        ptx::fence_proxy_async();
        __syncwarp();
        arrive(dq_full(warpgroup));
    }

    /* Of the named barriers of a block, the one at which a warpgroup waits for its turn. */
    static __device__ __forceinline__ int turn_of(int warpgroup) {
        return 1 + WARPGROUPS + warpgroup;
    }

    /* The steps of a walk: dk and dv of the warpgroup's keys, and dq on its way. The exponentials are begun under V dO^T; others
     * come after it, where what is made of them fills the time that they take. In a late walk dq is made of what the step before
     * left in shared memory, so the warpgroups need not be at the same place; and they take turns at what comes between the
     * products, so that they are not, and what one multiplies fills the other's time. */
    __device__ __forceinline__ void multiply_walk(float (&dk)[DIM / 2], float (&dv)[DIM / 2], Steps &ring, int warpgroup) {
        constexpr int EARLY = DIM == 64 ? 8 : 2; /* blocks of 8 queries: measured */
        uint32_t k_rows = k_tile + warpgroup * 64 * 128, v_rows = v_tile + warpgroup * 64 * 128;
        int first_key = walk.first_key + warpgroup * 64;
        bool late = walk.steps >= LATE_STEPS;
        float dq[32];
        for (int step = 0; step < walk.steps; step++, ring.count++) {
            float p[BLOCK_M / 2], ds[BLOCK_M / 2]; /* p: scores, then probabilities */
            uint32_t x[BLOCK_M / 16][4], y[BLOCK_M / 16][4];
            uint32_t q_tile = q_tiles + ring.stage() * Q_BYTES, do_tile = do_tiles + ring.stage() * Q_BYTES;
            uint32_t rows = row_tiles + ring.stage() * 2 * ROW_BYTES;
            Ring<2> s_ring = {ring.count}, s_made = {ring.count - late}; /* of dS; of what is made dq */
            ptx::mbarrier_wait(full(ring.stage()), ring.parity());
            int tile = Base::read(Base::masked_tile(ring.stage()));
            bool masked = tile != Base::NONE;
            Base::multiply_rows(p, k_rows, q_tile);
            Base::multiply_rows(ds, v_rows, do_tile);
            ptx::wgmma_wait<1>();
            ptx::wgmma_hold(p);
            if (masked) Base::mask(p, first_key, tile, Base::unseen());
            Base::template exponentiate<0, EARLY>(p, rows);
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(ds);
            if (masked) Base::mask(ds, first_key, tile, 0);
            if (late) ptx::barrier_sync(turn_of(warpgroup), 128 * WARPGROUPS);
            Base::template exponentiate<EARLY>(p, rows);
            Base::pack_left(x, p);
            multiply_by(ds, p, rows + ROW_BYTES);
            Base::pack_left(y, ds);
            ptx::mbarrier_wait(s_empty(s_ring.stage()), s_ring.parity() ^ 1);
            Base::put(s_tiles + s_ring.stage() * S_BYTES + warpgroup * Q_PANEL, y);
            Base::add_keys(dv, x, do_tile);
            if (late) ptx::barrier_arrive(turn_of(1 - warpgroup), 128 * WARPGROUPS);
            ptx::fence_proxy_async();
            __syncwarp();
            arrive(s_full(s_ring.stage()));
            if (step >= late) ptx::mbarrier_wait(s_full(s_made.stage()), s_made.parity());
            multiply_queries(dq, s_tiles + s_made.stage() * S_BYTES, warpgroup); /* the first time late: of what lies there */
            Base::add_keys(dk, y, q_tile);
            ptx::wgmma_wait<1>();
            ptx::wgmma_hold(dq);
            if (step >= late) {
                arrive(s_empty(s_made.stage()));
                give_queries(dq, warpgroup, s_made.count);
            }
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(dk);
            ptx::wgmma_hold(dv);
            arrive_all(empty(ring.stage()));
        }
        if (!late) return;
        Ring<2> s_made = {ring.count - 1};
        ptx::mbarrier_wait(s_full(s_made.stage()), s_made.parity());
        multiply_queries(dq, s_tiles + s_made.stage() * S_BYTES, warpgroup);
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(dq);
        arrive(s_empty(s_made.stage()));
        give_queries(dq, warpgroup, s_made.count);
    }

    __device__ __forceinline__ void multiply(int warpgroup) {
        Steps ring;
        if (warpgroup == 1) ptx::barrier_arrive(turn_of(0), 128 * WARPGROUPS); /* which begins */
        for (Ring<1> walks;; walks.count++) {
            ptx::mbarrier_wait(walk_full(), walks.parity());
            Base::read_walk(walks.count);
            if (lane() == 0) ptx::add_wait_read(); /* of the last walk's dk and dv, before any warp writes there */
            ptx::barrier_sync(1 + warpgroup, 128);
            if (walk.steps < 0) break; /* so the compiler knows that below they are not */
            float dk[DIM / 2] = {}, dv[DIM / 2] = {};
            if (walk.steps > 0) multiply_walk(dk, dv, ring, warpgroup);
            arrive(walk_empty());
            store_walk(dk, dv, ring, warpgroup);
        }
    }

    /* dk or dv of the warp's keys by way of `tile`, whose panels are so many bytes apart, and which is read for a while; says
     * whether there is something that is not finite. */
    __device__ __forceinline__ bool store_box(const float (&c)[DIM / 2], int first_key, float factor, uint32_t tile, int panel,
                                              const cuflash_tensor_map &map) {
        float zero = 0;
        uint32_t to = tile + lane() % 16 * 128 + (lane() / 16 ^ lane() % 8) * 16;
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
            uint32_t x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float a = c[k * 8 + i * 2] * factor, b = c[k * 8 + i * 2 + 1] * factor;
                x[i] = pack<T>(a, b), zero = fmaf(a, 0, fmaf(b, 0, zero));
            }
            ptx::stmatrix_x4((to ^ k % 4 * 32) + k / 4 * panel, x);
        }
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane() == 0) {
            int head = head_kv_of(args, walk.unit);
            for (int i = 0; i < Base::PANELS; i++)
                ptx::store_box(&map, tile + i * panel, i * 64, first_key + warp_row(), head, walk.batch);
            ptx::add_commit();
        }
        return zero != 0;
    }

    __device__ __forceinline__ void store_walk(float (&dk)[DIM / 2], float (&dv)[DIM / 2], const Steps &ring, int warpgroup) {
        int first_key = walk.first_key + warpgroup * 64;
        if (walk.partial) {
            Base::store_part(dv, first_key, args.dv ? args.dv_parts : nullptr);
            Base::store_part(dk, first_key, args.dk ? args.dk_parts : nullptr);
            return;
        }
        bool spoilt = false;
        uint32_t s_tile = s_tiles + warpgroup * Q_PANEL + warp_row() * 128;
        for (unsigned i = 0; i < 2; i++) { /* by way of the places for dS and for dq, as soon as nobody reads these */
            Ring<2> s_next = {ring.count + i};
            ptx::mbarrier_wait(s_empty(s_next.stage()), s_next.parity() ^ 1);
        }
        if (args.dv) spoilt |= store_box(dv, first_key, 1, s_tile, S_BYTES, maps.dv);
        ptx::mbarrier_wait(dq_empty(warpgroup), Ring<1>{ring.count}.parity() ^ 1);
        if (args.dk) spoilt |= store_box(dk, first_key, args.scale, Base::dq_place(warpgroup), BOX_BYTES, maps.dk);
        if (!args.causal || !__any_sync(0xffffffff, spoilt)) return;
        if (lane() == 0) ptx::add_wait(), ptx::fence_proxy_async_global(); /* repairs come after what was stored */
        __syncwarp();
        Base::repair(first_key + warp_row(), 16, 0, 1);
    }

    /* ---- The warp that finishes dq --------------------------------------------------------------- */

    /* Tile after tile, whichever is next for any block. Nobody waits for it. */
    __device__ __forceinline__ void finish() {
        int tiles = args.rows / BLOCK_M, heads = args.batch * args.heads;
        int together = max(args.together * args.group / (args.whole == 0 ? args.parts : 1), 1); /* heads of as many units */
        auto take = [&]() { return lane() == 0 ? atomicAdd(args.ticket + 1, 1) : 0; };
        for (int next = take();;) {
            int number = __shfl_sync(0xffffffff, next, 0);
            if (number >= heads * tiles) break;
            next = take(); /* which is on its way for a while */
            Order order = order_of_block(number, tiles, heads, together);
            int turns = tiles_of_keys<BLOCK_M, BLOCK_N>(args, order.tile) * Base::SQUARES;
            finish_tile(order.unit, order.tile, args.turn + order.unit * tiles + order.tile, turns);
        }
        ptx::add_wait_read();
    }

    /* dq of a tile, as soon as all tiles of keys have added to its sum, in pieces. There are two places for a piece's sums, and
     * two for what is made of them. It shares a scheduler with two warps that multiply, so its instructions count. */
    __device__ __forceinline__ void finish_tile(int unit, int tile, int32_t *turn, int turns) {
        constexpr int PIECES = BLOCK_M * DIM * 4 / PIECE_BYTES;
        static_assert(PIECES == 4, "each of two barriers goes round in a tile");
        const float *sums = args.dq_sum + (static_cast<int64_t>(unit) * args.rows + tile * BLOCK_M) * DIM;
        auto load = [&](int piece) {
            uint32_t full = piece_full(piece % 2);
            ptx::mbarrier_arrive_expect(full, PIECE_BYTES);
            ptx::load_bytes(sum_pieces + piece % 2 * PIECE_BYTES, sums + piece * (PIECE_BYTES / 4), PIECE_BYTES, full);
        };
        int batch = unit / args.heads, head = unit % args.heads;
        while (ptx::load_relaxed(turn) < turns) __nanosleep(200);
        ptx::fence_proxy_async_global();
        if (lane() == 0) load(0), load(1);
        uint32_t zero = 0;
#pragma unroll 1
        for (int piece = 0; piece < PIECES; piece++) {
            uint32_t from = sum_pieces + piece % 2 * PIECE_BYTES + lane() * 16;
            uint32_t to = dq_pieces + piece % 2 * (PIECE_BYTES / 2) + lane() % 16 * 128 + lane() % 8 * 16;
            ptx::mbarrier_wait(piece_full(piece % 2), piece / 2);
#pragma unroll 1
            for (int rows = 0; rows < PIECE_ROWS; rows += 16, to += 16 * 128)
#pragma unroll
                for (int chunk = 0; chunk < 8; chunk++, from += 512) { /* of 8 columns */
                    float x[4];
                    ptx::load_shared_4(x, from);
                    uint32_t y[2] = {pack<T>(x[0] * args.scale, x[1] * args.scale),
                                     pack<T>(x[2] * args.scale, x[3] * args.scale)};
                    for (int half = 0; half < 2; half++) zero = ptx::fma_2<T>(y[half], 0, zero);
                    ptx::stmatrix_x2(to ^ chunk * 16, y);
                }
            ptx::fence_proxy_async();
            __syncwarp();
            if (lane() == 0) {
                int p = ptx::anew(piece); /* nothing that is made of it stays in registers from above */
                int row = tile * BLOCK_M + (BY_ROWS ? p : p % 2) * PIECE_ROWS, column = BY_ROWS ? 0 : p / 2 * 64;
                ptx::store_box(&maps.dq, dq_pieces + p % 2 * (PIECE_BYTES / 2), column, row, head, batch);
                ptx::add_commit();
                if (p + 2 < PIECES) load(p + 2);
                ptx::add_wait_read_but_1(); /* the next piece's box */
            }
            __syncwarp();
        }
        if (args.causal && __any_sync(0xffffffff, zero % 0x8000 | zero / 0x10000 % 0x8000)) *turn = CUFLASH_HOPPER_SPOILT;
    }

    __device__ __forceinline__ void run() {
        int warpgroup = ptx::uniform(threadIdx.x / 128);
        if (threadIdx.x == 0) make_barriers(), Base::prefetch_maps();
        __syncthreads();
        if (warpgroup == 0) {
            ptx::give_registers<DIM == 64 ? 40 : 24>();
            ptx::wait_for_grid(); /* before anything is read that was written before */
            if (threadIdx.x == 0) Base::template copy<Steps>();
            if (threadIdx.x == 32) Base::add_queries(0, 0);
            if (threadIdx.x == 64) Base::add_queries(1, 1);
            if (threadIdx.x / 32 == 3 && args.finishes) finish();
        } else {
            ptx::take_registers<DIM == 64 ? 232 : 240>();
            multiply(warpgroup - 1);
        }
    }
};

} // namespace cuflash

#endif
