/* Attention backward on Hopper, after Shah et al., "FlashAttention-3" (2024): a block keeps a tile of keys, 64 to a warpgroup,
 * and walks the queries that see it, of query heads of its KV head (common/walk.cuh); then it takes the next walk. Scores and
 * their gradients are made with keys as rows, so that from the registers they are the left operands of dv and dk; gradients
 * pass once through shared memory, to dq, which is made a step later: the warpgroups then need not wait for each other. dq is
 * added up in float32 in device memory, by bulk additions that nobody waits for. One thread copies. docs/kernels/
 * hopper-backward.md tells why the steps are in this order. */
#include <math_constants.h>

#include "attention.h"
#include "common/repair.cuh"
#include "common/row.cuh"
#include "common/walk.cuh"
#include "hopper/ring.cuh"
#include "hopper/store.cuh"
#include "hopper/table.h"
#include "ptx/atomic.cuh"
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/math.cuh"
#include "ptx/matrix.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/wgmma.cuh"

namespace cuflash {

template <typename T, int DIM, int BLOCK_M, int BLOCK_N, int STAGES, int THREADS> struct Backward {
    static constexpr int WARPGROUPS = 2, WARPS = 4 * WARPGROUPS; /* that multiply */
    static_assert(BLOCK_N == 64 * WARPGROUPS && THREADS == 128 * (WARPGROUPS + 1),
                  "a warpgroup to 64 keys, and one that copies");
    static constexpr int PANELS = DIM / 64;
    static constexpr int K_PANEL = BLOCK_N * 128, Q_PANEL = BLOCK_M * 128, S_PANEL = BLOCK_M * 128; /* bytes */
    static constexpr int K_BYTES = PANELS * K_PANEL, Q_BYTES = PANELS * Q_PANEL, S_BYTES = WARPGROUPS * S_PANEL;
    static constexpr int ROW_BYTES = BLOCK_M * 4; /* of a number of each query */
    /* dq of a tile is shared out to the warpgroups by columns, or where there are 64 queries for each, by rows. */
    static constexpr bool BY_ROWS = BLOCK_M == 64 * WARPGROUPS;
    static constexpr int DQ_COLUMNS = BY_ROWS ? DIM : DIM / WARPGROUPS;
    static constexpr int DQ_SHARE = 16 * DQ_COLUMNS * 4; /* bytes of a warp */
    using Steps = Ring<STAGES>;
    using Scores = ptx::Wgmma<T, BLOCK_M, false>;
    using Keys = ptx::Wgmma<T, DIM, true>;
    using Queries = ptx::Wgmma<T, DQ_COLUMNS, true>;

    const cuflash_attention_args &args;
    const cuflash_hopper_args &maps;
    uint32_t k_tile, v_tile, q_tiles, do_tiles, s_tiles, dq_tile, row_tiles, barriers, walk_at;
    Walk walk;

    __device__ __forceinline__ Backward(const cuflash_hopper_args &a, uint32_t shared)
        : args(a.attention), maps(a), k_tile((shared + 1023) / 1024 * 1024), v_tile(k_tile + K_BYTES),
          q_tiles(v_tile + K_BYTES), do_tiles(q_tiles + STAGES * Q_BYTES), s_tiles(do_tiles + STAGES * Q_BYTES),
          dq_tile(s_tiles + 2 * S_BYTES), row_tiles(dq_tile + WARPS * DQ_SHARE), barriers(row_tiles + STAGES * 2 * ROW_BYTES),
          walk_at(barriers + 128) {
    }

    /* Full: it is there. Empty: nobody reads it any more. Of K, V and what the walk is; of the step's tiles of Q and dO; and of
     * its dS. */
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

    __device__ __forceinline__ void make_barriers() {
        ptx::mbarrier_init(walk_full(), 1), ptx::mbarrier_init(walk_empty(), WARPS);
        for (int i = 0; i < STAGES; i++) ptx::mbarrier_init(full(i), 1), ptx::mbarrier_init(empty(i), WARPS);
        for (int i = 0; i < 2; i++) ptx::mbarrier_init(s_full(i), WARPS), ptx::mbarrier_init(s_empty(i), WARPS);
        ptx::fence_mbarrier_init();
    }

    /* What the thread that copies writes for the others: of this walk and of the next one. */
    __device__ __forceinline__ Walk &shared_walk(unsigned count) const {
        return *static_cast<Walk *>(__cvta_shared_to_generic(walk_at + count % 2 * 64));
    }
    enum { NONE = -1 }; /* steps: there is no further walk */

    /* ---- The thread that copies ------------------------------------------------------------------ */

    __device__ __forceinline__ void copy_tile(uint32_t to, const cuflash_tensor_map &map, uint32_t full, int panel_bytes,
                                              int row, int head, int batch) {
        for (int i = 0; i < PANELS; i++) ptx::load_box(to + i * panel_bytes, &map, full, i * 64, row, head, batch);
    }

    __device__ __forceinline__ void copy_step(const Walk &w, Steps &ring, int &head, int &tile) {
        uint32_t there = full(ring.stage()), rows = row_tiles + ring.stage() * 2 * ROW_BYTES;
        ptx::mbarrier_wait(empty(ring.stage()), ring.parity() ^ 1);
        ptx::mbarrier_arrive_expect(there, 2 * Q_BYTES + 2 * ROW_BYTES);
        copy_tile(q_tiles + ring.stage() * Q_BYTES, maps.q, there, Q_PANEL, tile * BLOCK_M, head, w.batch);
        int64_t row = row_number(args, w.batch, head, tile * BLOCK_M);
        ptx::load_bytes(rows, args.row_offset + row, ROW_BYTES, there);
        ptx::load_bytes(rows + ROW_BYTES, args.row_delta + row, ROW_BYTES, there);
        copy_tile(do_tiles + ring.stage() * Q_BYTES, maps.d_o, there, Q_PANEL, tile * BLOCK_M, head, w.batch);
        ring.count++;
        if (++tile == args.rows / BLOCK_M) tile = w.first_tile, head++;
    }

    __device__ __forceinline__ void copy_keys(const Walk &w) {
        int head_kv = head_kv_of(args, w.unit);
        ptx::mbarrier_arrive_expect(walk_full(), 2 * K_BYTES);
        copy_tile(k_tile, maps.k, walk_full(), K_PANEL, w.first_key, head_kv, w.batch);
        copy_tile(v_tile, maps.v, walk_full(), K_PANEL, w.first_key, head_kv, w.batch);
    }

    /* The first queries of a walk come before its keys, which are to wait until the last walk's are left. */
    __device__ __forceinline__ void copy() {
        Steps ring;
        for (Ring<1> walks;; walks.count++) {
            int number = atomicAdd(args.ticket, 1), step = 0;
            Walk &w = shared_walk(walks.count);
            if (number < args.walks)
                w = walk_of<BLOCK_M, BLOCK_N>(args, number);
            else
                w.steps = NONE;
            int head = w.head, tile = w.tile;
            if (step < w.steps) copy_step(w, ring, head, tile), step++;
            ptx::mbarrier_wait(walk_empty(), walks.parity() ^ 1);
            if (w.steps > 0)
                copy_keys(w);
            else
                ptx::mbarrier_arrive(walk_full());
            if (w.steps == NONE) return;
            for (; step < w.steps; step++) copy_step(w, ring, head, tile);
        }
    }

    /* ---- A warpgroup that multiplies ------------------------------------------------------------- */

    static __device__ __forceinline__ int lane() {
        return threadIdx.x % 32;
    }
    static __device__ __forceinline__ void arrive(uint32_t barrier) {
        ptx::mbarrier_arrive_if(barrier, lane() == 0);
    }
    /* The warp's first row in a tile of its warpgroup. */
    static __device__ __forceinline__ int warp_row() {
        return threadIdx.x / 32 % 4 * 16;
    }

    /* c = or += keys' rows at `left` times queries' rows at `right`: K Q^T or V dO^T, under way */
    template <bool ADD> __device__ __forceinline__ void multiply_rows(float (&c)[BLOCK_M / 2], uint32_t left, uint32_t right) {
        if (ADD) ptx::wgmma_hold(c);
        ptx::wgmma_fence();
        uint64_t keys = ptx::rows_descriptor(left), queries = ptx::rows_descriptor(right);
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
            uint64_t a = ptx::advance(keys, k / 4 * K_PANEL + k % 4 * 32),
                     b = ptx::advance(queries, k / 4 * Q_PANEL + k % 4 * 32);
            Scores::multiply(c, a, b, ADD || k > 0);
        }
        ptx::wgmma_commit();
    }

    /* dv += P dO or dk += dS Q, under way */
    __device__ __forceinline__ void add_keys(float (&c)[DIM / 2], const uint32_t (&x)[BLOCK_M / 16][4], uint32_t tile) {
        ptx::wgmma_hold(c);
        ptx::wgmma_fence();
        uint64_t b = ptx::columns_descriptor(tile, Q_PANEL);
#pragma unroll
        for (int k = 0; k < BLOCK_M / 16; k++) Keys::multiply(c, x[k], ptx::advance(b, k * 2048), true);
        ptx::wgmma_commit();
    }

    /* The warpgroup's share of dq of a tile: dS^T K, under way */
    __device__ __forceinline__ void multiply_queries(float (&c)[DQ_COLUMNS / 2], uint32_t s_tile, int warpgroup) {
        ptx::wgmma_fence();
        int column = BY_ROWS ? 0 : warpgroup * DQ_COLUMNS;
        uint64_t ds = ptx::rows_descriptor(s_tile + (BY_ROWS ? warpgroup * 64 * 128 : 0));
        uint64_t keys = ptx::columns_descriptor(k_tile + column / 64 * K_PANEL + column % 64 * 2, K_PANEL);
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; k++) {
            uint64_t a = ptx::advance(ds, k / 4 * S_PANEL + k % 4 * 32), b = ptx::advance(keys, k * 2048);
            Queries::multiply(c, a, b, k > 0);
        }
        ptx::wgmma_commit();
    }

    /* Of a tile of queries, among those of all heads. */
    __device__ __forceinline__ int number_of(int head, int tile) const {
        return (walk.batch * args.heads + head) * (args.rows / BLOCK_M) + tile;
    }

    /* The warp's share of dq of a tile, on its way to the sum: to shared memory, ... */
    __device__ __forceinline__ void put_queries(const float (&c)[DQ_COLUMNS / 2], int warp) {
        if (lane() == 0) ptx::add_wait_read();
        __syncwarp();
#pragma unroll
        for (int n = 0; n < DQ_COLUMNS / 8; n++) ptx::store_4(dq_tile + warp * DQ_SHARE + n * 512 + lane() * 16, &c[n * 4]);
    }

    /* ... and after a fence from there, by its first lane. */
    __device__ __forceinline__ void add_queries(int number, int warp) {
        if (!args.dq_sum || lane() > 0) return;
        int32_t *turn = args.turn ? args.turn + number : nullptr;
        if (turn) /* of all warps of a block, in any order: it is over when each has counted */
            while (ptx::load_acquire(turn) < WARPS * (walk.first_key / BLOCK_N)) {
            }
        ptx::add_floats(args.dq_sum + static_cast<int64_t>(number) * (BLOCK_M * DIM) + warp * (DQ_SHARE / 4),
                        dq_tile + warp * DQ_SHARE, DQ_SHARE);
        ptx::add_commit();
        if (!turn) return;
        ptx::add_wait();
        __threadfence();
        ptx::add_release(turn, 1);
    }

    /* A number of each query, for the thread's pair of columns of a block of 8. */
    static __device__ __forceinline__ float2 of_queries(uint32_t numbers, int n) {
        return *static_cast<const float2 *>(__cvta_shared_to_generic(numbers + (n * 8 + lane() % 4 * 2) * 4));
    }

    /* Scores to probabilities. */
    __device__ __forceinline__ void exponentiate(float (&p)[BLOCK_M / 2], uint32_t offsets) {
        float factor = args.negative ? -args.scale_log2 : args.scale_log2;
#pragma unroll
        for (int n = 0; n < BLOCK_M / 8; n++) {
            float2 offset = of_queries(offsets, n);
#pragma unroll
            for (int e = 0; e < 4; e++)
                p[n * 4 + e] = ptx::exp2_approx(fmaf(p[n * 4 + e], factor, -(e % 2 ? offset.y : offset.x)));
        }
    }

    /* V dO^T is added to this: dS = P (V dO^T - delta). */
    __device__ __forceinline__ void begin_with_delta(float (&ds)[BLOCK_M / 2], uint32_t deltas) {
#pragma unroll
        for (int n = 0; n < BLOCK_M / 8; n++) {
            float2 delta = of_queries(deltas, n);
#pragma unroll
            for (int e = 0; e < 4; e++) ds[n * 4 + e] = -(e % 2 ? delta.y : delta.x);
        }
        ptx::wgmma_hold(ds);
    }

    /* Clears what a query does not see, or what is no key. */
    __device__ __forceinline__ void mask(float (&c)[BLOCK_M / 2], int first_key, int tile) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int key = first_key + warp_row() + half * 8 + lane() / 4;
            int first = key < args.seq_k ? first_query(args, key) - tile * BLOCK_M - lane() % 4 * 2 : BLOCK_M;
#pragma unroll
            for (int n = 0; n < BLOCK_M / 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (n * 8 + e < first) c[n * 4 + half * 2 + e] = 0;
        }
    }

    static __device__ __forceinline__ void pack_left(uint32_t (&x)[BLOCK_M / 16][4], const float (&c)[BLOCK_M / 2]) {
#pragma unroll
        for (int k = 0; k < BLOCK_M / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[k][i] = pack<T>(c[k * 8 + i * 2], c[k * 8 + i * 2 + 1]);
    }

    /* dS, with queries as rows, to shared memory. */
    __device__ __forceinline__ void put(uint32_t s_tile, const uint32_t (&x)[BLOCK_M / 16][4], int warpgroup) {
        int chunk = warp_row() / 8 + lane() / 8 % 2, query = lane() / 16 * 8 + lane() % 8;
        uint32_t to = s_tile + warpgroup * S_PANEL + query * 128 + (chunk ^ query % 8) * 16;
#pragma unroll
        for (int k = 0; k < BLOCK_M / 16; k++) ptx::stmatrix_x4_trans(to + k * 2048, x[k]);
    }

    /* Read by the lane that says for its warp when that is done. */
    static __device__ __forceinline__ int read(const int &x) {
        return ptx::uniform(lane() == 0 ? x : 0);
    }

    __device__ __forceinline__ void read_walk(unsigned count) {
        const Walk &w = shared_walk(count);
        walk = {read(w.first_key), read(w.batch),      read(w.unit),     read(w.head),   read(w.tile),
                read(w.steps),     read(w.first_tile), read(w.unmasked), read(w.partial)};
    }

    /* The steps of a walk, one after the other: dk and dv of the warpgroup's keys, and dq on its way. */
    __device__ __forceinline__ void multiply_walk(float (&dk)[DIM / 2], float (&dv)[DIM / 2], Steps &ring, int warpgroup) {
        float p[BLOCK_M / 2], ds[BLOCK_M / 2], dq[DQ_COLUMNS / 2]; /* p: scores, then probabilities */
        uint32_t k_rows = k_tile + warpgroup * 64 * 128, v_rows = v_tile + warpgroup * 64 * 128;
        int head = walk.head, tile = walk.tile, first_key = walk.first_key + warpgroup * 64;
        int before[2] = {}; /* tiles of queries of the last two steps */
        int warp = ptx::uniform(threadIdx.x / 32) - 4;
        ptx::mbarrier_wait(full(ring.stage()), ring.parity());
        ptx::wgmma_hold(dk);
        ptx::wgmma_hold(dv);
        multiply_rows<false>(p, k_rows, q_tiles + ring.stage() * Q_BYTES);
        /* What a step waits for at its top it began a step before: its scores, and dq of two steps before. */
        for (int step = 0; step < walk.steps; step++, ring.count++) {
            uint32_t x[BLOCK_M / 16][4], y[BLOCK_M / 16][4];
            uint32_t rows = row_tiles + ring.stage() * 2 * ROW_BYTES, do_tile = do_tiles + ring.stage() * Q_BYTES;
            Ring<2> s_ring = {ring.count}, s_before = {ring.count - 1};
            Steps next = {ring.count + 1}, last = {ring.count - 1};
            bool masked = tile < walk.unmasked;
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(p);
            ptx::wgmma_hold(dq);
            ptx::wgmma_hold(dk);
            if (step > 0) arrive(empty(last.stage()));
            if (step > 1) {
                arrive(s_empty(s_ring.stage()));
                put_queries(dq, warp);
            }
            begin_with_delta(ds, rows + ROW_BYTES);
            multiply_rows<true>(ds, v_rows, do_tile);
            exponentiate(p, rows);
            if (masked) mask(p, first_key, tile);
            pack_left(x, p);
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(ds);
#pragma unroll
            for (int i = 0; i < BLOCK_M / 2; i++) ds[i] *= p[i];
            if (masked) mask(ds, first_key, tile);
            add_keys(dv, x, do_tile);
            pack_left(y, ds);
            ptx::mbarrier_wait(s_empty(s_ring.stage()), s_ring.parity() ^ 1);
            put(s_tiles + s_ring.stage() * S_BYTES, y, warpgroup);
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(dv);
            add_keys(dk, y, q_tiles + ring.stage() * Q_BYTES);
            ptx::fence_proxy_async();
            __syncwarp();
            arrive(s_full(s_ring.stage()));
            if (step > 1) add_queries(before[1], warp);
            if (step > 0) ptx::mbarrier_wait(s_full(s_before.stage()), s_before.parity());
            multiply_queries(dq, s_tiles + s_before.stage() * S_BYTES, warpgroup); /* the first time of what lies there */
            if (step + 1 < walk.steps) ptx::mbarrier_wait(full(next.stage()), next.parity());
            multiply_rows<false>(p, k_rows, q_tiles + next.stage() * Q_BYTES); /* the last time too */
            before[1] = before[0], before[0] = number_of(head, tile);
            if (++tile == args.rows / BLOCK_M) tile = walk.first_tile, head++;
        }
        Ring<2> s_last = {ring.count - 1}, s_before = {ring.count - 2};
        Steps last = {ring.count - 1};
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(p);
        ptx::wgmma_hold(dq);
        ptx::wgmma_hold(dk);
        arrive(empty(last.stage()));
        auto add = [&](int number) {
            put_queries(dq, warp);
            ptx::fence_proxy_async();
            __syncwarp();
            add_queries(number, warp);
        };
        if (walk.steps > 1) {
            arrive(s_empty(s_before.stage()));
            add(before[1]);
        }
        ptx::mbarrier_wait(s_full(s_last.stage()), s_last.parity());
        multiply_queries(dq, s_tiles + s_last.stage() * S_BYTES, warpgroup);
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(dq);
        arrive(s_empty(s_last.stage()));
        add(before[0]);
    }

    __device__ __forceinline__ void multiply(int warpgroup) {
        Steps ring;
        for (Ring<1> walks;; walks.count++) {
            ptx::mbarrier_wait(walk_full(), walks.parity());
            read_walk(walks.count);
            if (walk.steps < 0) break; /* so the compiler knows that below they are not */
            float dk[DIM / 2] = {}, dv[DIM / 2] = {};
            if (walk.steps > 0) multiply_walk(dk, dv, ring, warpgroup);
            arrive(walk_empty());
            store_walk(dk, dv, warpgroup);
        }
        if (lane() == 0) ptx::add_wait_read();
    }

    __device__ __forceinline__ void store_walk(float (&dk)[DIM / 2], float (&dv)[DIM / 2], int warpgroup) {
        int first_key = walk.first_key + warpgroup * 64;
        if (walk.partial) {
            store_part(dv, args.dv ? args.dv_parts : nullptr, warpgroup);
            store_part(dk, args.dk ? args.dk_parts : nullptr, warpgroup);
            return;
        }
        bool spoilt = store(dv, first_key, 1, args.dv, args.dv_stride, args.head_dim_v);
        spoilt |= store(dk, first_key, args.scale, args.dk, args.dk_stride, args.head_dim);
        if (!args.causal || !__any_sync(0xffffffff, spoilt)) return;
        for (int key = first_key + warp_row(); key < min(first_key + warp_row() + 16, args.seq_k); key++)
            repair_dk_dv_row<T>(args, walk.batch, head_kv_of(args, walk.unit), key);
    }

    /* dk or dv of the walk; says whether there is something that is not finite. */
    __device__ __forceinline__ bool store(float (&c)[DIM / 2], int first_key, float factor, void *array,
                                          const cuflash_kernel_strides &stride, int dim) {
        if (!array) return false;
        float zero = 0;
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) c[i] *= factor, zero = fmaf(c[i], 0, zero);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int key = first_key + warp_row() + half * 8 + lane() / 4;
            T *row = row_of<T>(array, stride, walk.batch, head_kv_of(args, walk.unit), key);
            store_half<T, DIM>(c, half, 1, row, key < args.seq_k ? dim : 0);
        }
        return zero != 0;
    }

    /* The walk's share of dk or dv. */
    __device__ __forceinline__ void store_part(const float (&c)[DIM / 2], float *parts, int warpgroup) {
        if (!parts) return;
        float *rows = partial_rows<BLOCK_N>(args, parts, walk.unit, walk.first_key / BLOCK_N) +
                      (warpgroup * 64 + warp_row() + lane() / 4) * DIM + lane() % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < DIM / 8; n++)
                *reinterpret_cast<float2 *>(rows + half * 8 * DIM + n * 8) =
                    make_float2(c[n * 4 + half * 2], c[n * 4 + half * 2 + 1]);
    }

    __device__ __forceinline__ void run() {
        int warpgroup = ptx::uniform(threadIdx.x / 128);
        if (threadIdx.x == 0) {
            make_barriers();
            ptx::prefetch_tensor_map(&maps.k), ptx::prefetch_tensor_map(&maps.v);
            ptx::prefetch_tensor_map(&maps.q), ptx::prefetch_tensor_map(&maps.d_o);
        }
        __syncthreads();
        if (warpgroup == 0) {
            ptx::give_registers<24>();
            if (threadIdx.x == 0) copy();
        } else {
            ptx::take_registers<240>();
            multiply(warpgroup - 1);
        }
    }
};

/* dq of a tile of queries from its sum. */
template <typename T, int DIM, int BLOCK_M, int BLOCK_N, int STAGES, int THREADS>
__device__ __forceinline__ void finish(const cuflash_attention_args &args) {
    using Main = Backward<T, DIM, BLOCK_M, BLOCK_N, STAGES, THREADS>;
    constexpr int COLUMNS = Main::DQ_COLUMNS;
    int tiles = args.rows / BLOCK_M, tile = blockIdx.x % tiles, pair = blockIdx.x / tiles, batch = pair / args.heads,
        head = pair % args.heads, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float *sum = args.dq_sum + static_cast<int64_t>(blockIdx.x) * (BLOCK_M * DIM) + warp * (COLUMNS * 16);
    int first = tile * BLOCK_M + (Main::BY_ROWS ? warp : warp % 4) * 16, column = Main::BY_ROWS ? 0 : warp / 4 * COLUMNS;
    float c[COLUMNS / 2], zero = 0;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++) {
        float x[4];
        ptx::load_4(x, sum + n * 128, lane);
#pragma unroll
        for (int e = 0; e < 4; e++) c[n * 4 + e] = x[e] * args.scale, zero = fmaf(c[n * 4 + e], 0, zero);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + half * 8 + lane / 4;
        T *dq = row_of<T>(args.dq, args.dq_stride, batch, head, row) + column;
        store_half<T, COLUMNS>(c, half, 1, dq, row < args.seq_q ? args.head_dim - column : 0);
    }
    if (!args.causal) return;
    if (__syncthreads_or(zero != 0))
        for (int row = tile * BLOCK_M + warp; row < min((tile + 1) * BLOCK_M, args.seq_q);
             row += CUFLASH_HOPPER_FINISH_THREADS / 32)
            repair_dq_row<T>(args, batch, head, row);
}

} // namespace cuflash

#define KERNEL(type, suffix, dim, block_m, block_n, stages, threads, blocks)                                                   \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                                              \
        cuflash_hopper_backward_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_hopper_args args) {  \
        extern __shared__ __align__(1024) unsigned char shared[];                                                              \
        cuflash::Backward<type, dim, block_m, block_n, stages, threads>(args, ptx::shared_address(shared)).run();              \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(CUFLASH_HOPPER_FINISH_THREADS)                                                \
        cuflash_hopper_finish_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_attention_args args) { \
        cuflash::finish<type, dim, block_m, block_n, stages, threads>(args);                                                   \
    }
#define KERNELS(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                    \
    KERNEL(__half, f16, dim, block_m, block_n, stages, threads, blocks)                                                        \
    KERNEL(__nv_bfloat16, bf16, dim, block_m, block_n, stages, threads, blocks)
CUFLASH_HOPPER_BACKWARD(KERNELS)
