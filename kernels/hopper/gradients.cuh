/* What the backwards on Hopper have in common: `Own` says where in shared memory things are, how they are copied and in which
 * order a step's products come. Scores and their gradients are made with keys as rows, 64 to a warpgroup, so that from the
 * registers they are the left operands of dv and dk; gradients pass once through shared memory, to dq. dq is added up in
 * float32 in device memory, by bulk additions that nobody waits for. One thread copies, a walk (common/walk.cuh) after the
 * other. */
#ifndef CUFLASH_HOPPER_GRADIENTS_CUH
#define CUFLASH_HOPPER_GRADIENTS_CUH

#include <math_constants.h>

#include "attention.h"
#include "common/repair.cuh"
#include "common/row.cuh"
#include "common/walk.cuh"
#include "hopper/ring.cuh"
#include "hopper/store.cuh"
#include "hopper/table.h"
#include "hopper/warp.cuh"
#include "ptx/atomic.cuh"
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/grid.cuh"
#include "ptx/math.cuh"
#include "ptx/matrix.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/wgmma.cuh"

namespace cuflash {

/* dq of a tile of queries is added up in squares of 64 queries and 64 columns, one of a warpgroup: first the queries, then the
 * columns. In a square there is one part of each warp's registers, then the other part. */
constexpr int DQ_SQUARE = 64 * 64;
template <int DIM> constexpr int DQ_PARTS_OF = DIM > 128 ? 2 : 1;

/* BLOCK_N: keys of a walk. KEYS: in a tile of K in shared memory. */
template <typename Own, typename T, int DIM, int BLOCK_M, int BLOCK_N, int KEYS> struct Gradients {
    static constexpr int WARPGROUPS = 2, WARPS = 4 * WARPGROUPS; /* that multiply */
    static constexpr int PANELS = DIM / 64;
    static constexpr int K_PANEL = KEYS * 128, Q_PANEL = BLOCK_M * 128; /* bytes; 64 keys' gradients are a panel as of Q */
    static constexpr int K_BYTES = PANELS * K_PANEL, Q_BYTES = PANELS * Q_PANEL;
    static constexpr int ROW_BYTES = BLOCK_M * 4;                                          /* of a number of each query */
    static constexpr int SQUARES = BLOCK_M * DIM / DQ_SQUARE;                              /* of a tile */
    static constexpr int DQ_PARTS = DQ_PARTS_OF<DIM>, DQ_BYTES = DQ_SQUARE * 4 / DQ_PARTS; /* of a part of a square */
    using Scores = ptx::Wgmma<T, BLOCK_M, false>;
    using Keys = ptx::Wgmma<T, DIM, true>;
    using Queries = ptx::Wgmma<T, 64, true>;

    const cuflash_attention_args &args;
    const cuflash_hopper_args &maps;
    uint32_t dq_tile, walk_at; /* in shared memory: a part of dq of each warpgroup; what walks and tiles are */
    Walk walk;

    __device__ __forceinline__ Gradients(const cuflash_hopper_args &a) : args(a.attention), maps(a) {
    }
    __device__ __forceinline__ Own &own() {
        return *static_cast<Own *>(this);
    }

    /* ---- The thread that copies ------------------------------------------------------------------ */

    /* What that writes for the others: of this walk and of the next one. */
    __device__ __forceinline__ Route &shared_walk(unsigned count) const {
        static_assert(2 * sizeof(Route) <= TILES_AT && TILES_AT + 16 <= CUFLASH_HOPPER_WALK_BYTES, "room for them");
        return *static_cast<Route *>(__cvta_shared_to_generic(walk_at + count % 2 * (TILES_AT / 2)));
    }
    enum { TILES_AT = 128 }; /* behind both of them */
    enum { NONE = -1 };      /* steps: there is no further walk. masked_tile: queries see all keys of the walk */

    /* And of the tile of queries of a stage, its number where some query does not see all keys. */
    __device__ __forceinline__ volatile int &masked_tile(int stage) const {
        return *static_cast<volatile int *>(__cvta_shared_to_generic(walk_at + TILES_AT + stage * 4));
    }

    __device__ __forceinline__ void copy_tile(uint32_t to, const cuflash_tensor_map &map, uint32_t full, int panel_bytes,
                                              int row, int head, int batch) {
        for (int i = 0; i < PANELS; i++) ptx::load_box(to + i * panel_bytes, &map, full, i * 64, row, head, batch);
    }

    /* Causal walks of a unit end at the same queries, but begin at different ones. Where those of the last keys begin, each is a
     * step behind the one before. Where those of the first keys do, they go backwards: each need only begin a step later. */
    __device__ __forceinline__ void turn_round(Route &w) const {
        int visible = args.rows / BLOCK_M - w.first_tile, last = w.tile - w.first_tile + w.steps - 1;
        w.head += last / visible, w.tile = w.first_tile + last % visible;
    }

    __device__ __forceinline__ bool goes_back(const Walk &w) const {
        return args.causal && !descends(args, w.unit);
    }

    __device__ __forceinline__ void next_tile(const Route &w, int &head, int &tile) const {
        int tiles = args.rows / BLOCK_M;
        if (goes_back(w)) {
            if (tile-- == w.first_tile) tile = tiles - 1, head--;
        } else if (++tile == tiles)
            tile = w.first_tile, head++;
    }

    /* The first queries of a walk come before its keys, which are to wait until the last walk's are left. */
    template <typename Steps> __device__ __forceinline__ void copy() {
        Steps ring;
        for (Ring<1> walks;; walks.count++) {
            int number = own().take_walk(walks), step = 0;
            Route &w = shared_walk(walks.count);
            if (number < args.walks)
                w = walk_of<BLOCK_M, BLOCK_N>(args, number);
            else
                w.steps = NONE;
            if (goes_back(w) && w.steps > 0) turn_round(w);
            int head = w.head, tile = w.tile;
            auto copy_step = [&]() {
                own().copy_step(w, ring, head, tile);
                next_tile(w, head, tile);
                step++, ring.count++;
            };
            if (step < w.steps) copy_step();
            ptx::mbarrier_wait(own().walk_empty(), walks.parity() ^ 1);
            if (w.steps > 0)
                own().copy_keys(w);
            else
                ptx::mbarrier_arrive(own().walk_full());
            if (w.steps == NONE) return;
            while (step < w.steps) copy_step();
        }
    }

    /* ---- A warpgroup that multiplies ------------------------------------------------------------- */

    /* Read by the lane that says for its warp when that is done. */
    static __device__ __forceinline__ int read(const volatile int &x) {
        return ptx::uniform(lane() == 0 ? x : 0);
    }

    __device__ __forceinline__ void read_walk(unsigned count) {
        const Walk &w = shared_walk(count);
        walk.first_key = read(w.first_key), walk.batch = read(w.batch), walk.unit = read(w.unit);
        walk.steps = read(w.steps), walk.partial = read(w.partial);
    }

    /* c = keys' rows at `left` times queries' rows at `right`: K Q^T or V dO^T, under way */
    __device__ __forceinline__ void multiply_rows(float (&c)[BLOCK_M / 2], uint32_t left, uint32_t right) {
        ptx::wgmma_fence();
        uint64_t keys = ptx::rows_descriptor(left), queries = ptx::rows_descriptor(right);
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
            uint64_t a = ptx::advance(keys, k / 4 * K_PANEL + k % 4 * 32),
                     b = ptx::advance(queries, k / 4 * Q_PANEL + k % 4 * 32);
            Scores::multiply(c, a, b, k > 0);
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

    /* A number of each query, for the thread's pair of columns of a block of 8. */
    static __device__ __forceinline__ float2 of_queries(uint32_t numbers, int n) {
        return *static_cast<const float2 *>(__cvta_shared_to_generic(numbers + (n * 8 + lane() % 4 * 2) * 4));
    }

    /* Scores to probabilities, of these blocks of 8 queries. */
    template <int FROM = 0, int TO = BLOCK_M / 8>
    __device__ __forceinline__ void exponentiate(float (&p)[BLOCK_M / 2], uint32_t offsets) {
        float factor = args.negative ? -args.scale_log2 : args.scale_log2;
#pragma unroll
        for (int n = FROM; n < TO; n++) {
            float2 offset = of_queries(offsets, n);
#pragma unroll
            for (int e = 0; e < 4; e++)
                p[n * 4 + e] = ptx::exp2_approx(fmaf(p[n * 4 + e], factor, -(e % 2 ? offset.y : offset.x)));
        }
    }

    /* A score whose probability is 0. */
    __device__ __forceinline__ float unseen() const {
        return args.negative ? CUDART_INF_F : -CUDART_INF_F;
    }

    /* Sets what a query does not see, or what is no key. */
    __device__ __forceinline__ void mask(float (&c)[BLOCK_M / 2], int first_key, int tile, float value) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int key = first_key + warp_row() + half * 8 + lane() / 4;
            int first = key < args.seq_k ? first_query(args, key) - tile * BLOCK_M - lane() % 4 * 2 : BLOCK_M;
#pragma unroll
            for (int n = 0; n < BLOCK_M / 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (n * 8 + e < first) c[n * 4 + half * 2 + e] = value;
        }
    }

    static __device__ __forceinline__ void pack_left(uint32_t (&x)[BLOCK_M / 16][4], const float (&c)[BLOCK_M / 2]) {
#pragma unroll
        for (int k = 0; k < BLOCK_M / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[k][i] = pack<T>(c[k * 8 + i * 2], c[k * 8 + i * 2 + 1]);
    }

    /* dS, with queries as rows, to a panel in shared memory. */
    __device__ __forceinline__ void put(uint32_t panel, const uint32_t (&x)[BLOCK_M / 16][4]) {
        int chunk = warp_row() / 8 + lane() / 8 % 2, query = lane() / 16 * 8 + lane() % 8;
        uint32_t to = panel + query * 128 + (chunk ^ query % 8) * 16;
#pragma unroll
        for (int k = 0; k < BLOCK_M / 16; k++) ptx::stmatrix_x4_trans(to + k * 2048, x[k]);
    }

    /* ---- dq ------------------------------------------------------------------------------------ */

    /* Where the warp puts dq. */
    __device__ __forceinline__ uint32_t dq_place(int warpgroup) const {
        return dq_tile + warpgroup * DQ_BYTES + warp_row() * (DQ_BYTES / 64);
    }

    /* A part of the warp's dq to shared memory, from where it is added to the sum: the count-th of its warpgroup. */
    __device__ __forceinline__ void put_queries(const float (&c)[32], int part, int warpgroup, unsigned count) {
        ptx::mbarrier_wait(own().dq_empty(warpgroup), Ring<1>{count}.parity() ^ 1);
        uint32_t to = dq_place(warpgroup) + lane() * 16;
#pragma unroll
        for (int n = 0; n < 8 / DQ_PARTS; n++) ptx::store_4(to + n * 512, &c[(part * 8 / DQ_PARTS + n) * 4]);
    }

    /* The thread that adds dq of a warpgroup to its sum, the square of this number. The first tile of keys stores it; others
     * wait until all squares of a tile are there, or where the order counts, until all tiles of keys before them have added
     * theirs. Turns are counted where somebody waits for them; a turn ends with a release. It begins with no acquire: this
     * thread reads nothing of what others add, and its copy, which does not begin before the look at the turn has come back, is
     * made in the L2 cache. */
    __device__ __forceinline__ void add_queries(int warpgroup, int square) {
        Ring<1> ring;
        for (Ring<1> walks;; walks.count++) {
            ptx::mbarrier_wait(own().walk_full(), walks.parity());
            Route w = shared_walk(walks.count);
            ptx::mbarrier_arrive(own().walk_empty());
            if (w.steps < 0) return;
            int mine = w.first_key / BLOCK_N; /* tile of keys */
            bool wanted = args.dq_sum && square < SQUARES, counts = wanted && (args.finishes || args.ordered || mine == 0);
            /* Of a tile, among those of all heads. */
            auto number_of = [&]() { return (w.batch * args.heads + w.head) * (args.rows / BLOCK_M) + w.tile; };
            int number = number_of(), turn = wanted ? ptx::load_relaxed(args.turn + number) : 0;
            for (int step = 0; step < w.steps; step++) {
                int place = place_of(args, w.unit, tiles_of_keys<BLOCK_M, BLOCK_N>(args, w.tile), mine);
                int before = args.ordered ? place : min(place, 1); /* tiles of keys that this one comes after */
                while (wanted && turn < before * SQUARES) turn = ptx::load_relaxed(args.turn + number);
                float *sum = args.dq_sum + static_cast<int64_t>(number) * (BLOCK_M * DIM) + square * DQ_SQUARE;
#pragma unroll
                for (int part = 0; part < DQ_PARTS; part++, ring.count++) {
                    ptx::mbarrier_wait(own().dq_full(warpgroup), ring.parity());
                    uint32_t from = dq_tile + warpgroup * DQ_BYTES;
                    if (wanted && place == 0)
                        ptx::store_floats(sum + part * (DQ_BYTES / 4), from, DQ_BYTES);
                    else if (wanted)
                        ptx::add_floats(sum + part * (DQ_BYTES / 4), from, DQ_BYTES);
                    ptx::add_commit();
                    ptx::add_wait_read();
                    ptx::mbarrier_arrive(own().dq_empty(warpgroup));
                }
                int32_t *own_turn = args.turn + number;
                next_tile(w, w.head, w.tile);
                number = number_of();
                if (wanted && step + 1 < w.steps)
                    turn = ptx::load_relaxed(args.turn + number); /* while the addition is under way */
                if (!counts) continue;
                ptx::add_wait();
                ptx::fence_proxy_async_global();
                ptx::add_release(own_turn, 1);
            }
        }
    }

    /* ---- dk and dv ----------------------------------------------------------------------------- */

    /* dk or dv of the warpgroup's keys; says whether there is something that is not finite. */
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

    /* The walk's share of them. */
    __device__ __forceinline__ void store_part(const float (&c)[DIM / 2], int first_key, float *parts) {
        if (!parts) return;
        float *rows = partial_rows<BLOCK_N>(args, parts, walk.unit, walk.first_key / BLOCK_N) +
                      (first_key - walk.first_key + warp_row() + lane() / 4) * DIM + lane() % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < DIM / 8; n++)
                *reinterpret_cast<float2 *>(rows + half * 8 * DIM + n * 8) =
                    make_float2(c[n * 4 + half * 2], c[n * 4 + half * 2 + 1]);
    }

    /* After all keys from `first` on, of which this is one of so many warps, are stored. */
    __device__ __forceinline__ void repair(int first, int keys, int warp, int warps) {
        for (int key = first + warp; key < min(first + keys, args.seq_k); key += warps)
            repair_dk_dv_row<T>(args, walk.batch, head_kv_of(args, walk.unit), key);
    }

    __device__ __forceinline__ void prefetch_maps() {
        ptx::prefetch_tensor_map(&maps.k), ptx::prefetch_tensor_map(&maps.v);
        ptx::prefetch_tensor_map(&maps.q), ptx::prefetch_tensor_map(&maps.d_o);
    }
};

} // namespace cuflash

#endif
