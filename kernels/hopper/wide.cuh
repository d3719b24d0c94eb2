/* Attention backward on Hopper for head dimensions above 128. dk and dv of 64 keys are all that a block's registers hold, but
 * additions to dq for every 64 keys are more than the L2 cache takes: so two blocks on neighbouring multiprocessors, a cluster,
 * take a walk of 128 keys, swap their gradients dS and make half of the columns of dq each. One warpgroup of a block makes
 * scores, probabilities and dv, the other one their gradients and dk. */
#ifndef CUFLASH_HOPPER_WIDE_CUH
#define CUFLASH_HOPPER_WIDE_CUH

#include "hopper/gradients.cuh"
#include "ptx/cluster.cuh"

namespace cuflash {

template <typename T, int DIM, int BLOCK_M, int BLOCK_N, int STAGES>
struct WideBackward : Gradients<WideBackward<T, DIM, BLOCK_M, BLOCK_N, STAGES>, T, DIM, BLOCK_M, BLOCK_N, 64> {
    using Base = Gradients<WideBackward, T, DIM, BLOCK_M, BLOCK_N, 64>;
    using Base::args, Base::maps, Base::walk, Base::dq_tile, Base::walk_at;
    using Base::WARPS, Base::ROW_BYTES, Base::PANELS;
    static_assert(BLOCK_M == 64 && BLOCK_N == 128, "64 queries and two blocks of 64 keys");
    static constexpr int PANEL = 64 * 128, TILE = PANELS * PANEL; /* bytes: of K, V, Q and dO; dS is a panel */
    static constexpr int P_BYTES = BLOCK_M * 64 * 4;
    static constexpr int DO_STAGES = CUFLASH_HOPPER_DO_STAGES(DIM);
    using Steps = Ring<STAGES>;
    using DoSteps = Ring<DO_STAGES>;
    using Once = Ring<1>;

    int rank, first_key; /* of the block in its cluster; the first of its 64 keys */
    uint32_t k_tile, k_other, v_tile, q_tiles, do_tiles, p_tile, s_tiles, row_tiles, barriers, number_at;

    /* k_other: of the other block's keys the columns of this block's half of dq. */
    __device__ __forceinline__ WideBackward(const cuflash_hopper_args &a, uint32_t shared)
        : Base(a), rank(ptx::uniform(ptx::cluster_rank())), k_tile((shared + 1023) / 1024 * 1024), k_other(k_tile + TILE),
          v_tile(k_other + 2 * PANEL), q_tiles(v_tile + TILE), do_tiles(q_tiles + STAGES * TILE),
          p_tile(do_tiles + DO_STAGES * TILE), s_tiles(p_tile + P_BYTES) {
        dq_tile = s_tiles + 2 * PANEL;
        row_tiles = dq_tile + 2 * Base::DQ_BYTES;
        barriers = row_tiles + STAGES * 2 * ROW_BYTES;
        walk_at = barriers + 176;
        number_at = walk_at + CUFLASH_HOPPER_WALK_BYTES;
    }

    /* Full: it is there. Empty: nobody reads it any more. Of K, V and what the walk is; of a step's Q; of its dO; of P; and of
     * dS, which came from the other block, too. Number: of the next walk, from the first block in
     * the second one. */
    __device__ __forceinline__ uint32_t walk_full() const {
        return barriers;
    }
    __device__ __forceinline__ uint32_t walk_empty() const {
        return barriers + 8;
    }
    __device__ __forceinline__ uint32_t p_full() const {
        return barriers + 16;
    }
    __device__ __forceinline__ uint32_t p_empty() const {
        return barriers + 24;
    }
    __device__ __forceinline__ uint32_t s_full() const {
        return barriers + 32;
    }
    __device__ __forceinline__ uint32_t s_empty() const {
        return barriers + 40;
    }
    __device__ __forceinline__ uint32_t s_came() const {
        return barriers + 48;
    }
    __device__ __forceinline__ uint32_t number_full() const {
        return barriers + 56;
    }
    __device__ __forceinline__ uint32_t number_empty() const {
        return barriers + 64;
    }
    __device__ __forceinline__ uint32_t dq_full(int warpgroup) const {
        return barriers + 72 + warpgroup * 8;
    }
    __device__ __forceinline__ uint32_t dq_empty(int warpgroup) const {
        return barriers + 88 + warpgroup * 8;
    }
    __device__ __forceinline__ uint32_t q_full(int stage) const {
        return barriers + 104 + stage * 8;
    }
    __device__ __forceinline__ uint32_t q_empty(int stage) const {
        return barriers + 104 + (STAGES + stage) * 8;
    }
    __device__ __forceinline__ uint32_t do_full(int stage) const {
        return barriers + 104 + (2 * STAGES + stage) * 8;
    }
    __device__ __forceinline__ uint32_t do_empty(int stage) const {
        return barriers + 104 + (2 * STAGES + DO_STAGES + stage) * 8;
    }

    __device__ __forceinline__ void make_barriers() {
        ptx::mbarrier_init(walk_full(), 1), ptx::mbarrier_init(walk_empty(), WARPS + 3);
        ptx::mbarrier_init(p_full(), 16 * WARPS), ptx::mbarrier_init(p_empty(), 16 * WARPS);
        ptx::mbarrier_init(s_full(), WARPS / 2), ptx::mbarrier_init(s_empty(), 2 * WARPS);
        ptx::mbarrier_init(s_came(), 1), ptx::mbarrier_init(number_full(), 1), ptx::mbarrier_init(number_empty(), 1);
        for (int i = 0; i < STAGES; i++) ptx::mbarrier_init(q_full(i), 1), ptx::mbarrier_init(q_empty(i), 32 * WARPS);
        for (int i = 0; i < DO_STAGES; i++) ptx::mbarrier_init(do_full(i), 1), ptx::mbarrier_init(do_empty(i), WARPS);
        for (int i = 0; i < 2; i++) ptx::mbarrier_init(dq_full(i), 4), ptx::mbarrier_init(dq_empty(i), 1);
        ptx::fence_mbarrier_init();
    }

    /* ---- The thread that copies ------------------------------------------------------------------ */

    /* The first block of the cluster takes it for both. */
    __device__ __forceinline__ int take_walk(const Once &walks) {
        if (rank == 0) {
            int number = atomicAdd(args.ticket, 1);
            ptx::mbarrier_wait_cluster(number_empty(), walks.parity() ^ 1);
            ptx::store_there(ptx::address_in(1, number_at), number);
            ptx::mbarrier_arrive_there(ptx::address_in(1, number_full()));
            return number;
        }
        ptx::mbarrier_wait_cluster(number_full(), walks.parity());
        int number = *static_cast<volatile int *>(__cvta_shared_to_generic(number_at));
        ptx::mbarrier_arrive_there(ptx::address_in(0, number_empty()));
        return number;
    }

    __device__ __forceinline__ void copy_step(const Route &w, const Steps &ring, int head, int tile) {
        uint32_t there = q_full(ring.stage()), rows = row_tiles + ring.stage() * 2 * ROW_BYTES;
        ptx::mbarrier_wait(q_empty(ring.stage()), ring.parity() ^ 1);
        Base::masked_tile(ring.stage()) = tile < w.unmasked ? tile : Base::NONE;
        ptx::mbarrier_arrive_expect(there, TILE + 2 * ROW_BYTES);
        Base::copy_tile(q_tiles + ring.stage() * TILE, maps.q, there, PANEL, tile * BLOCK_M, head, w.batch);
        int64_t row = row_number(args, w.batch, head, tile * BLOCK_M);
        ptx::load_bytes(rows, args.row_offset + row, ROW_BYTES, there);
        ptx::load_bytes(rows + ROW_BYTES, args.row_delta + row, ROW_BYTES, there);
        DoSteps gradient = {ring.count};
        there = do_full(gradient.stage());
        ptx::mbarrier_wait(do_empty(gradient.stage()), gradient.parity() ^ 1);
        ptx::mbarrier_arrive_expect(there, TILE);
        Base::copy_tile(do_tiles + gradient.stage() * TILE, maps.d_o, there, PANEL, tile * BLOCK_M, head, w.batch);
    }

    __device__ __forceinline__ void copy_keys(const Walk &w) {
        int head_kv = head_kv_of(args, w.unit), mine = w.first_key + rank * 64, others = w.first_key + (rank ^ 1) * 64;
        ptx::mbarrier_arrive_expect(walk_full(), 2 * TILE + 2 * PANEL);
        Base::copy_tile(k_tile, maps.k, walk_full(), PANEL, mine, head_kv, w.batch);
        Base::copy_tile(v_tile, maps.v, walk_full(), PANEL, mine, head_kv, w.batch);
        for (int i = 0; i < 2; i++)
            ptx::load_box(k_other + i * PANEL, &maps.k, walk_full(), (rank * 2 + i) * 64, others, head_kv, w.batch);
    }

    /* ---- The thread that gives the other block dS --------------------------------------------------- */

    __device__ __forceinline__ void give() {
        uint32_t mine = s_tiles + rank * PANEL, there = ptx::address_in(rank ^ 1, mine),
                 came = ptx::address_in(rank ^ 1, s_came());
        Once ring;
        for (Once walks;; walks.count++) {
            ptx::mbarrier_wait(walk_full(), walks.parity());
            int steps = Base::shared_walk(walks.count).steps;
            ptx::mbarrier_arrive(walk_empty());
            if (steps < 0) return;
            for (; steps > 0; steps--, ring.count++) {
                ptx::mbarrier_wait(s_full(), ring.parity()); /* so what came for the last step was read */
                ptx::mbarrier_arrive_expect(s_came(), PANEL);
                ptx::copy_there(there, mine, PANEL, came);
            }
        }
    }

    /* ---- The warpgroups that multiply ------------------------------------------------------------ */

    /* The warpgroup's 64 columns of dq of a tile: dS^T K of both blocks' keys, under way */
    __device__ __forceinline__ void multiply_queries(float (&c)[32], int warpgroup) {
        ptx::wgmma_fence();
        uint32_t mine = k_tile + (rank * 2 + warpgroup) * PANEL, others = k_other + warpgroup * PANEL;
#pragma unroll
        for (int block = 0; block < 2; block++) {
            uint64_t ds = ptx::rows_descriptor(s_tiles + block * PANEL),
                     keys = ptx::columns_descriptor(block == rank ? mine : others, PANEL);
#pragma unroll
            for (int k = 0; k < 4; k++)
                Base::Queries::multiply(c, ptx::advance(ds, k * 32), ptx::advance(keys, k * 2048), block > 0 || k > 0);
        }
        ptx::wgmma_commit();
    }

    /* dS of a step is not read any more by this warp: room for the next, of both blocks. */
    __device__ __forceinline__ void leave_gradients() {
        arrive(s_empty());
        ptx::mbarrier_leave_there_if(ptx::address_in(rank ^ 1, s_empty()), lane() == 0);
    }

    __device__ __forceinline__ void wait_for_gradients(const Once &once) {
        ptx::mbarrier_wait(s_full(), once.parity());
        ptx::mbarrier_wait(s_came(), once.parity());
    }

    /* A half of the warp's dq of the step before, on its way to its sum. */
    __device__ __forceinline__ void add_half(const float (&dq)[32], int half, int warpgroup, const Steps &ring) {
        Base::put_queries(dq, half, warpgroup, 2 * (ring.count - 1) + half);
        ptx::fence_proxy_async();
        __syncwarp();
        arrive(dq_full(warpgroup));
    }

    /* P of a step from one warpgroup to the other, each thread's own: in shared memory, blocks of 16 bytes of all threads. */
    __device__ __forceinline__ uint32_t p_at(int n) const {
        return p_tile + n * 2048 + threadIdx.x % 128 * 16;
    }

    /* The steps of a walk: dv, and P for the other warpgroup. */
    __device__ __forceinline__ void multiply_scores(float (&dv)[DIM / 2], Steps &ring) {
        float p[32], dq[32]; /* p: scores, then probabilities */
        ptx::mbarrier_wait(q_full(ring.stage()), ring.parity());
        ptx::wgmma_hold(dv);
        Base::multiply_rows(p, k_tile, q_tiles + ring.stage() * TILE);
        for (int step = 0; step < walk.steps; step++, ring.count++) {
            uint32_t x[4][4];
            Once once = {ring.count};
            DoSteps gradient = {ring.count};
            Steps next = {ring.count + 1};
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(p);
            ptx::wgmma_hold(dq);
            if (step > 0) {
                leave_gradients();
                add_half(dq, 0, 0, ring);
            }
            Base::exponentiate(p, row_tiles + ring.stage() * 2 * ROW_BYTES);
            int tile = Base::read(Base::masked_tile(ring.stage()));
            __syncwarp();
            arrive_all(q_empty(ring.stage()));
            if (tile != Base::NONE) Base::mask(p, first_key, tile, 0);
            ptx::mbarrier_wait(p_empty(), once.parity() ^ 1);
#pragma unroll
            for (int n = 0; n < 8; n++) ptx::store_4(p_at(n), &p[n * 4]);
            __syncwarp();
            arrive_all(p_full());
            Base::pack_left(x, p);
            if (step > 0) add_half(dq, 1, 0, ring);
            ptx::mbarrier_wait(do_full(gradient.stage()), gradient.parity());
            Base::add_keys(dv, x, do_tiles + gradient.stage() * TILE);
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(dv);
            arrive(do_empty(gradient.stage()));
            if (step + 1 < walk.steps) ptx::mbarrier_wait(q_full(next.stage()), next.parity());
            Base::multiply_rows(p, k_tile, q_tiles + next.stage() * TILE); /* the last time of what lies there */
            wait_for_gradients(once);
            multiply_queries(dq, 0);
        }
        end_steps(p, dq, 0, ring);
    }

    /* The steps of a walk: dk, and dS for dq. */
    __device__ __forceinline__ void multiply_gradients(float (&dk)[DIM / 2], Steps &ring) {
        float ds[32], dq[32];
        DoSteps first = {ring.count};
        ptx::mbarrier_wait(do_full(first.stage()), first.parity());
        ptx::wgmma_hold(dk);
        Base::multiply_rows(ds, v_tile, do_tiles + first.stage() * TILE);
        for (int step = 0; step < walk.steps; step++, ring.count++) {
            uint32_t y[4][4], deltas = row_tiles + ring.stage() * 2 * ROW_BYTES + ROW_BYTES;
            Once once = {ring.count};
            DoSteps gradient = {ring.count}, next = {ring.count + 1};
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(ds);
            ptx::wgmma_hold(dq);
            arrive(do_empty(gradient.stage()));
            if (step > 0) {
                leave_gradients();
                add_half(dq, 0, 1, ring);
            }
            ptx::mbarrier_wait(q_full(ring.stage()), ring.parity());
            int tile = Base::read(Base::masked_tile(ring.stage()));
            ptx::mbarrier_wait(p_full(), once.parity());
#pragma unroll
            for (int n = 0; n < 8; n++) {
                float p[4];
                float2 delta = Base::of_queries(deltas, n);
                ptx::load_shared_4(p, p_at(n));
#pragma unroll
                for (int e = 0; e < 4; e++) ds[n * 4 + e] = (ds[n * 4 + e] - (e % 2 ? delta.y : delta.x)) * p[e];
            }
            __syncwarp();
            arrive_all(p_empty());
            if (tile != Base::NONE) Base::mask(ds, first_key, tile, 0);
            Base::pack_left(y, ds);
            ptx::mbarrier_wait_cluster(s_empty(), once.parity() ^ 1);
            Base::put(s_tiles + rank * PANEL, y);
            if (step > 0) Base::put_queries(dq, 1, 1, 2 * ring.count - 1);
            ptx::fence_proxy_async();
            __syncwarp();
            arrive(s_full());
            Base::add_keys(dk, y, q_tiles + ring.stage() * TILE);
            if (step > 0) arrive(dq_full(1));
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(dk);
            arrive_all(q_empty(ring.stage()));
            if (step + 1 < walk.steps) ptx::mbarrier_wait(do_full(next.stage()), next.parity());
            Base::multiply_rows(ds, v_tile, do_tiles + next.stage() * TILE); /* the last time of what lies there */
            wait_for_gradients(once);
            multiply_queries(dq, 1);
        }
        end_steps(ds, dq, 1, ring);
    }

    /* What the last step of a walk began. */
    __device__ __forceinline__ void end_steps(float (&scores)[32], float (&dq)[32], int warpgroup, const Steps &ring) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(scores);
        ptx::wgmma_hold(dq);
        leave_gradients();
        for (int half = 0; half < 2; half++) add_half(dq, half, warpgroup, ring);
    }

    __device__ __forceinline__ void multiply(int warpgroup) {
        Steps ring;
        for (Once walks;; walks.count++) {
            ptx::mbarrier_wait(walk_full(), walks.parity());
            Base::read_walk(walks.count);
            first_key = walk.first_key + rank * 64;
            if (walk.steps < 0) break; /* so the compiler knows that below they are not */
            float c[DIM / 2] = {};     /* dv or dk */
            if (walk.steps > 0) {
                if (warpgroup == 0)
                    multiply_scores(c, ring);
                else
                    multiply_gradients(c, ring);
            }
            arrive(walk_empty());
            store_walk(c, warpgroup);
        }
    }

    __device__ __forceinline__ void store_walk(float (&c)[DIM / 2], int warpgroup) {
        if (walk.partial) {
            if (warpgroup == 0)
                Base::store_part(c, first_key, args.dv ? args.dv_parts : nullptr);
            else
                Base::store_part(c, first_key, args.dk ? args.dk_parts : nullptr);
            return;
        }
        bool spoilt = warpgroup == 0 ? Base::store(c, first_key, 1, args.dv, args.dv_stride, args.head_dim_v)
                                     : Base::store(c, first_key, args.scale, args.dk, args.dk_stride, args.head_dim);
        if (!args.causal || !ptx::barrier_or(1, 32 * WARPS, spoilt)) return;
        Base::repair(first_key, 64, threadIdx.x / 32 - 4, WARPS);
    }

    __device__ __forceinline__ void run() {
        int warpgroup = ptx::uniform(threadIdx.x / 128);
        if (threadIdx.x == 0) make_barriers(), Base::prefetch_maps();
        ptx::cluster_sync();
        if (warpgroup == 0) {
            ptx::give_registers<40>();
            ptx::wait_for_grid(); /* before anything is read that was written before */
            if (threadIdx.x == 0) Base::template copy<Steps>();
            if (threadIdx.x == 32) give();
            if (threadIdx.x == 64) Base::add_queries(0, rank * 2);
            if (threadIdx.x == 96) Base::add_queries(1, rank * 2 + 1);
        } else {
            ptx::take_registers<232>();
            multiply(warpgroup - 1);
        }
        ptx::cluster_sync(); /* nobody reaches for the shared memory of a block that is gone */
    }
};

} // namespace cuflash

#endif
