/* Attention forward on Hopper, after Shah et al., "FlashAttention-3" (2024): two threads copy tiles by tensor maps into rings
 * in shared memory; warpgroups of 64 queries each multiply them by wgmma. A warpgroup's softmax runs under its own product with
 * V of the tile before, and under the products of the other warpgroups. Blocks stay, and go through tiles of queries: the first
 * scores of the next one are made under the last product of this one. Most tiles of keys need no maximum (softmax_open). */
#include <math_constants.h>

#include "attention.h"
#include "common/order.cuh"
#include "common/repair.cuh"
#include "common/row.cuh"
#include "hopper/ring.cuh"
#include "hopper/store.cuh"
#include "hopper/table.h"
#include "hopper/warp.cuh"
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/grid.cuh"
#include "ptx/math.cuh"
#include "ptx/matrix.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/wgmma.cuh"

namespace cuflash {

template <typename T, int DIM, int BLOCK_M, int BLOCK_N, int STAGES, int Q_STAGES, int THREADS, int BLOCKS> struct Forward {
    static constexpr int WARPGROUPS = BLOCK_M / 64;
    static_assert(THREADS == 128 * (WARPGROUPS + 1) && BLOCK_M % 64 == 0, "a warpgroup to 64 queries, and one that copies");
    static constexpr int PANELS = (DIM + 63) / 64;
    static constexpr int Q_PANEL = 64 * 128, K_PANEL = BLOCK_N * 128; /* bytes */
    static constexpr int Q_BYTES = WARPGROUPS * PANELS * Q_PANEL, K_BYTES = PANELS * K_PANEL;
    static constexpr int BARRIER_BYTES = CUFLASH_HOPPER_BARRIER_BYTES;
    static_assert((2 * Q_STAGES + 4 * STAGES + 4) * 8 <= BARRIER_BYTES, "room for barriers");
    /* Registers of a thread: when the kernel is launched, then of those that copy, and of those that multiply. */
    static constexpr int LAUNCHED = 65536 / (THREADS * BLOCKS) / 8 * 8, COPYING = WARPGROUPS == 2 ? 40 : 32;
    static constexpr int MULTIPLYING = (LAUNCHED * (WARPGROUPS + 1) - COPYING) / WARPGROUPS / 8 * 8;
    static constexpr float LAZY = 8;     /* a reference stays while no score is above it by more, as a power of 2 */
    static constexpr float ROOM = 32768; /* for a sum of probabilities: none of them may be too large for float16 */
    using Keys = Ring<STAGES>;
    using Queries = Ring<Q_STAGES>;
    using Scores = ptx::Wgmma<T, BLOCK_N, false>;
    using Values = ptx::Wgmma<T, DIM, true>;

    const cuflash_attention_args &args;
    const cuflash_hopper_args &maps;
    uint32_t q_tiles, k_tiles, v_tiles, barriers, items;

    __device__ __forceinline__ Forward(const cuflash_hopper_args &a, uint32_t shared)
        : args(a.attention), maps(a), q_tiles((shared + 1023) / 1024 * 1024), k_tiles(q_tiles + Q_STAGES * Q_BYTES),
          v_tiles(k_tiles + STAGES * K_BYTES), barriers(v_tiles + STAGES * K_BYTES), items(barriers + BARRIER_BYTES) {
    }

    /* Full: the tile is there. Empty: nobody reads it any more. */
    __device__ __forceinline__ uint32_t q_full(int stage) const {
        return barriers + stage * 8;
    }
    __device__ __forceinline__ uint32_t q_empty(int stage) const {
        return barriers + (Q_STAGES + stage) * 8;
    }
    __device__ __forceinline__ uint32_t k_full(int stage) const {
        return barriers + (2 * Q_STAGES + stage) * 8;
    }
    __device__ __forceinline__ uint32_t k_empty(int stage) const {
        return barriers + (2 * Q_STAGES + STAGES + stage) * 8;
    }
    __device__ __forceinline__ uint32_t v_full(int stage) const {
        return barriers + (2 * Q_STAGES + 2 * STAGES + stage) * 8;
    }
    __device__ __forceinline__ uint32_t v_empty(int stage) const {
        return barriers + (2 * Q_STAGES + 3 * STAGES + stage) * 8;
    }

    /* The same of what the thread that copies V is told. */
    __device__ __forceinline__ uint32_t told_full(int stage) const {
        return barriers + (2 * Q_STAGES + 4 * STAGES + stage) * 8;
    }
    __device__ __forceinline__ uint32_t told_empty(int stage) const {
        return barriers + (2 * Q_STAGES + 4 * STAGES + 2 + stage) * 8;
    }

    /* A tile of queries. The thread that copies it writes it for those that multiply, and for the one that copies V. */
    struct Item {
        int batch, head, first_row; /* the first head of those in the tile */
        int tiles; /* of keys that a query sees; one at least, whose mask then hides all; 0: there is no tile of queries */
    };
    __device__ __forceinline__ Item &item_of(int stage) const {
        return *static_cast<Item *>(__cvta_shared_to_generic(items + stage * sizeof(Item)));
    }
    __device__ __forceinline__ Item &told(int stage) const {
        return item_of(2 + stage);
    }

    /* Rows are the queries of a head, or of so many heads of a group: those of the first query, then of the second. */
    __device__ __forceinline__ int all_rows() const {
        return args.seq_q << args.packed;
    }
    __device__ __forceinline__ int visible(int row) const {
        return visible_keys(args, row >> args.packed);
    }

    /* The number-th one. Causal: those of args.together heads from the longest to the shortest, then of the next heads. */
    __device__ __forceinline__ Item item_at(int number) const {
        int tiles_m = (all_rows() + BLOCK_M - 1) / BLOCK_M, heads = args.heads >> args.packed, units = args.batch * heads;
        if (number >= units * tiles_m) return {0, 0, 0, 0};
        Order order = order_of_block(number, tiles_m, units, args.together);
        int first_row = (args.causal ? tiles_m - 1 - order.tile : order.tile) * BLOCK_M;
        int end = visible(min(first_row + BLOCK_M, all_rows()) - 1);
        int batch = order.unit / heads, head = order.unit % heads << args.packed;
        return {batch, head, first_row, max(1, (end + BLOCK_N - 1) / BLOCK_N)};
    }

    /* Read by the lane that says for its warp when that is done. */
    __device__ __forceinline__ int read(const int &x) const {
        int value = 0;
        if (lane() == 0) value = x;
        return __shfl_sync(0xffffffff, value, 0);
    }

    __device__ __forceinline__ void make_barriers() {
        constexpr int WARPS = 4 * WARPGROUPS; /* each says for itself that it has read */
        for (int i = 0; i < Q_STAGES; i++) ptx::mbarrier_init(q_full(i), 1), ptx::mbarrier_init(q_empty(i), WARPS);
        for (int i = 0; i < 2; i++) ptx::mbarrier_init(told_full(i), 1), ptx::mbarrier_init(told_empty(i), 1);
        for (int i = 0; i < STAGES; i++) {
            ptx::mbarrier_init(k_full(i), 1), ptx::mbarrier_init(k_empty(i), WARPS);
            ptx::mbarrier_init(v_full(i), 1), ptx::mbarrier_init(v_empty(i), WARPS);
        }
        ptx::fence_mbarrier_init();
    }

    /* ---- The threads that copy ------------------------------------------------------------------- */

    /* Rows of all columns. */
    __device__ __forceinline__ void copy_rows(uint32_t to, const cuflash_tensor_map &map, uint32_t full, int panel_bytes,
                                              int row, int head, int batch) {
        for (int i = 0; i < PANELS; i++) ptx::load_box(to + i * panel_bytes, &map, full, i * 64, row, head, batch);
    }

    __device__ __forceinline__ void copy_queries(const Item &item, Queries &ring) {
        uint32_t full = q_full(ring.stage());
        ptx::mbarrier_wait(q_empty(ring.stage()), ring.parity() ^ 1);
        item_of(ring.stage()) = item;
        if (item.tiles == 0) {
            ptx::mbarrier_arrive(full);
        } else {
            ptx::mbarrier_arrive_expect(full, Q_BYTES);
            for (int i = 0; i < WARPGROUPS * PANELS; i++)
                ptx::load_box_packed(q_tiles + ring.stage() * Q_BYTES + i * Q_PANEL, &maps.q, full, i % PANELS * 64,
                                     item.first_row + i / PANELS * 64 >> args.packed, item.head >> args.packed, item.batch);
        }
        ring.count++;
    }

    /* A tile of K or of V, where the ring has room. */
    __device__ __forceinline__ void copy_keys(uint32_t tiles, const cuflash_tensor_map &map, uint32_t full, uint32_t empty,
                                              Keys &ring, int tile, int head_kv, int batch) {
        full += ring.stage() * 8;
        ptx::mbarrier_wait(empty + ring.stage() * 8, ring.parity() ^ 1);
        ptx::mbarrier_arrive_expect(full, K_BYTES);
        copy_rows(tiles + ring.stage() * K_BYTES, map, full, K_PANEL, tile * BLOCK_N, head_kv, batch);
        ring.count++;
    }

    __device__ __forceinline__ void tell(const Item &item, Ring<2> &ring) {
        ptx::mbarrier_wait(told_empty(ring.stage()), ring.parity() ^ 1);
        told(ring.stage()) = item;
        ptx::mbarrier_arrive(told_full(ring.stage()));
        ring.count++;
    }

    /* The thread that copies Q and K, and says which tile of queries is next. Where blocks draw them, it draws when few tiles of
     * keys are left to copy: later, and its block would wait; earlier, and a block that is behind would hold what another one
     * could do. Where there is room for two tiles of queries, the next one is copied before the last keys of this one. */
    __device__ __forceinline__ void copy_scores() {
        /* How many tiles of keys are then left after this one. Without drawing all is as early as can be. */
        const int drawn = args.ticket ? 3 : CUFLASH_ANY_KEYS, copied = args.ticket ? 1 : CUFLASH_ANY_KEYS;
        Keys k_ring;
        Queries q_ring;
        Ring<2> v_ring;
        int number = blockIdx.x;
        Item item;
        auto draw = [&]() {
            if (args.ticket) {
                ptx::wait_for_grid();
                number = gridDim.x + atomicAdd(args.ticket, 1);
            } else {
                number += gridDim.x;
            }
        };
        auto next = [&]() {
            item = item_at(number);
            tell(item, v_ring);
            if (Q_STAGES > 1) copy_queries(item, q_ring);
            if (item.tiles <= drawn) draw();
        };
        next();
        while (item.tiles > 0) {
            int tiles = item.tiles, head_kv = item.head / args.group, batch = item.batch;
            for (int tile = tiles - 1; tile >= 0; tile--) {
                if (tile == drawn) draw();
                copy_keys(k_tiles, maps.k, k_full(0), k_empty(0), k_ring, tile, head_kv, batch);
                if (Q_STAGES > 1 && tile == min(copied, max(0, tiles - 2))) next();
                if (Q_STAGES == 1 && tile == tiles - 1) copy_queries(item, q_ring);
            }
            if (Q_STAGES == 1) next();
        }
        if (Q_STAGES == 1) copy_queries(item, q_ring);
    }

    /* The thread that copies V. */
    __device__ __forceinline__ void copy_values() {
        Keys v_ring;
        for (Ring<2> ring;; ring.count++) {
            ptx::mbarrier_wait(told_full(ring.stage()), ring.parity());
            Item item = told(ring.stage());
            ptx::mbarrier_arrive(told_empty(ring.stage()));
            if (item.tiles == 0) break;
            int head_kv = item.head / args.group;
            for (int tile = item.tiles - 1; tile >= 0; tile--)
                copy_keys(v_tiles, maps.v, v_full(0), v_empty(0), v_ring, tile, head_kv, item.batch);
        }
    }

    /* ---- A warpgroup that multiplies ------------------------------------------------------------- */

    /* One tile of queries of a warpgroup, and where it is among tiles of keys. */
    struct Place {
        int first_row, tile;
        int unmasked; /* so many tiles, from the first, all queries see whole, and keys after them */
        uint32_t q_tile;
        Keys ring; /* of K; of V, the tile before */
    };

    struct Rows {           /* the thread's two */
        float reference[2]; /* what is subtracted from scores: the maximum of the first tiles that they see, or a later one */
        float sum[2];       /* of this thread's probabilities */
    };

    /* s = Q K^T, under way */
    __device__ __forceinline__ void multiply_scores(float (&s)[BLOCK_N / 2], uint32_t q_tile, uint32_t k_tile) {
        ptx::wgmma_hold(s);
        ptx::wgmma_fence();
        uint64_t q = ptx::rows_descriptor(q_tile), keys = ptx::rows_descriptor(k_tile);
#pragma unroll
        for (int k = 0; k < DIM / 16; k++)
            Scores::multiply(s, ptx::advance(q, k / 4 * Q_PANEL + k % 4 * 32), ptx::advance(keys, k / 4 * K_PANEL + k % 4 * 32),
                             k > 0);
        ptx::wgmma_commit();
    }

    /* out += P V, under way */
    __device__ __forceinline__ void multiply_values(float (&out)[DIM / 2], const uint32_t (&p)[BLOCK_N / 16][4],
                                                    uint32_t v_tile) {
        ptx::wgmma_hold(out);
        ptx::wgmma_fence();
        uint64_t v = ptx::columns_descriptor(v_tile, K_PANEL);
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; k++) Values::multiply(out, p[k], ptx::advance(v, k * 2048), true);
        ptx::wgmma_commit();
    }

    /* Hides keys that do not exist, or that a row does not see. */
    __device__ __forceinline__ void mask(float (&s)[BLOCK_N / 2], const int (&seen)[2], int tile) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int left = seen[half] - tile * BLOCK_N - lane() % 4 * 2;
#pragma unroll
            for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (n * 8 + e >= left) s[n * 4 + half * 2 + e] = -CUDART_INF_F;
        }
    }

    /* The maximum of a row's scores in this thread may make a new reference. Gives what is there already must be scaled by: 1
     * where the reference stays. */
    __device__ __forceinline__ float refer(Rows &rows, int half, float maximum) {
        float before = rows.reference[half], now = fmaxf(before, maximum);
        now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, 1));
        now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, 2));
        if ((now - before) * args.scale_log2 > LAZY) rows.reference[half] = now;
        return ptx::exp2_approx((before - finite(rows.reference[half])) * args.scale_log2);
    }

    /* A row may have seen nothing yet. */
    static __device__ __forceinline__ float finite(float reference) {
        return reference == -CUDART_INF_F ? 0 : reference;
    }

    /* Scores to probabilities, by the book. */
    __device__ __forceinline__ void softmax(float (&s)[BLOCK_N / 2], Rows &rows, float (&factor)[2]) {
        float maximum[2][2];
#pragma unroll
        for (int half = 0; half < 2; half++) maximum[half][0] = maximum[half][1] = -CUDART_INF_F;
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; i++) maximum[i / 2 % 2][i % 2] = fmaxf(maximum[i / 2 % 2][i % 2], s[i]);
#pragma unroll
        for (int half = 0; half < 2; half++) factor[half] = refer(rows, half, fmaxf(maximum[half][0], maximum[half][1]));
        float offset[2] = {finite(rows.reference[0]) * args.scale_log2, finite(rows.reference[1]) * args.scale_log2};
        float sum[2][2];
        exponentiate(s, offset, sum);
#pragma unroll
        for (int half = 0; half < 2; half++) rows.sum[half] = fmaf(rows.sum[half], factor[half], sum[half][0] + sum[half][1]);
    }

    __device__ __forceinline__ void exponentiate(float (&s)[BLOCK_N / 2], const float (&offset)[2], float (&sum)[2][2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) sum[half][0] = sum[half][1] = 0;
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; i++) {
            s[i] = ptx::exp2_approx(fmaf(s[i], args.scale_log2, -offset[i / 2 % 2]));
            sum[i / 2 % 2][i % 2] += s[i];
        }
    }

    /* Scores to probabilities, where no key of the tile is hidden and the row has a reference. That need not be a maximum, so
     * none is looked for: probabilities above 1 are as exact. Rows whose sum says that it was too low are made again. */
    __device__ __forceinline__ void softmax_open(float (&s)[BLOCK_N / 2], float (&out)[DIM / 2], Rows &rows,
                                                 const Place &place) {
        /* a reference of -infinity, where only infinite scores were seen, makes sums that have no room */
        float offset[2] = {rows.reference[0] * args.scale_log2, rows.reference[1] * args.scale_log2}, parts[2][2];
        exponentiate(s, offset, parts);
        float sum[2] = {parts[0][0] + parts[0][1], parts[1][0] + parts[1][1]};
        if (__any_sync(0xffffffff, !(sum[0] <= ROOM) || !(sum[1] <= ROOM))) {
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(out);
            softmax_again(s, out, rows, sum, place);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) rows.sum[half] += sum[half];
    }

    /* Scores of 8 keys once more, which the warp can do alone; K's tile is left by then. */
    __device__ __forceinline__ void scores_again(float (&x)[4], const Place &place, int first_key) {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = 0;
        int thread = ptx::anew(threadIdx.x), lane = thread % 32, query = thread / 32 % 4 * 16 + lane % 16;
        const Item &item = item_of((place.q_tile - q_tiles) / Q_BYTES);
        const T *key =
            row_of<T>(args.k, args.k_stride, item.batch, item.head / args.group, place.tile * BLOCK_N + first_key + lane / 4);
#pragma unroll 1
        for (int k = 0; k < DIM / 16; k++) {
            uint32_t a[4], b[2];
            ptx::ldmatrix_x4(a, place.q_tile + k / 4 * Q_PANEL + query * 128 + ((k % 4 * 2 + lane / 16) ^ query % 8) * 16);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int column = k * 16 + i * 8 + lane % 4 * 2;
                b[i] = column < args.head_dim ? *reinterpret_cast<const uint32_t *>(key + column) : 0;
            }
            ptx::mma_16816<T>(x, a, b[0], b[1]);
        }
    }

    static __device__ __forceinline__ void rescale(float (&out)[DIM / 2], const float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) out[i] *= factor[i / 2 % 2];
    }

    /* The rows whose sums have no room are made again by the book. The others stay as they are, to the last bit. */
    __device__ __forceinline__ void softmax_again(float (&s)[BLOCK_N / 2], float (&out)[DIM / 2], Rows &rows, float (&sum)[2],
                                                  const Place &place) {
        constexpr float AGAIN = -1; /* a sum of rows to be made again, as registers are short */
        float maximum[2] = {-CUDART_INF_F, -CUDART_INF_F}, factor[2], offset[2], x[4];
#pragma unroll 1
        for (int n = 0; n < BLOCK_N; n += 8) {
            scores_again(x, place, n);
#pragma unroll
            for (int i = 0; i < 4; i++) maximum[i / 2] = fmaxf(maximum[i / 2], x[i]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bool again = __ballot_sync(0xffffffff, !(sum[half] <= ROOM)) & 15u << (lane() & ~3); /* the row's lanes */
            float before = rows.reference[half];
            factor[half] = refer(rows, half, maximum[half]);
            if (again)
                rows.sum[half] *= factor[half], sum[half] = AGAIN;
            else
                rows.reference[half] = before, factor[half] = 1;
            offset[half] = finite(rows.reference[half]) * args.scale_log2;
        }
        rescale(out, factor);
#pragma unroll
        for (int n = 0; n < BLOCK_N; n += 8) {
            scores_again(x, place, n);
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (sum[i / 2] == AGAIN) {
                    s[n / 2 + i] = ptx::exp2_approx(fmaf(x[i], args.scale_log2, -offset[i / 2]));
                    rows.sum[i / 2] += s[n / 2 + i];
                }
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (sum[half] == AGAIN) sum[half] = 0;
    }

    static __device__ __forceinline__ void pack_probabilities(uint32_t (&p)[BLOCK_N / 16][4], const float (&s)[BLOCK_N / 2]) {
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) p[k][i] = pack<T>(s[k * 8 + i * 2], s[k * 8 + i * 2 + 1]);
    }

    __device__ __forceinline__ void store(float (&out)[DIM / 2], Rows &rows, int batch, int head, int first_row) {
        bool spoilt = false;
        if (args.causal) { /* NaN or infinite; where no key is hidden nothing is amiss */
            float zero = 0;
#pragma unroll
            for (int i = 0; i < DIM / 2; i++) zero = fmaf(out[i], 0, zero);
            spoilt = zero != 0;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = rows.sum[half];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            int row = first_row + warp_row() + half * 8 + lane() / 4;
            bool inside = row < all_rows();
            int query = row >> args.packed, own_head = head + (row & (1 << args.packed) - 1);
            if (lane() % 4 == 0 && inside) store_lse(args, batch, own_head, query, rows.reference[half], sum);
            float factor = sum == 0 ? 0 : ptx::reciprocal_approx(sum);
            store_half<T, DIM>(out, half, factor, row_of<T>(args.o, args.o_stride, batch, own_head, query),
                               inside ? args.head_dim_v : 0);
        }
        if (__any_sync(0xffffffff, spoilt)) {
            ptx::wgmma_wait<0>();
            int first = first_row + warp_row();
            repair_rows<T>(args, batch, head, first, min(all_rows(), first + 16));
        }
    }

    /* Scores of a negative scale are of -Q. */
    __device__ __forceinline__ void negate(uint32_t q_tile, int warpgroup) {
        for (int i = threadIdx.x % 128 * 16; i < Q_BYTES / WARPGROUPS; i += 128 * 16) {
            uint4 *x = static_cast<uint4 *>(__cvta_shared_to_generic(q_tile + i)), y = *x;
            *x = make_uint4(y.x ^ 0x80008000, y.y ^ 0x80008000, y.z ^ 0x80008000, y.w ^ 0x80008000);
        }
        ptx::fence_proxy_async();
        ptx::barrier_sync(1 + warpgroup, 128);
    }

    /* The product of a tile with V, under way while the next tile's probabilities are made. */
    template <bool MASKED>
    __device__ __forceinline__ void go_on(float (&s)[BLOCK_N / 2], float (&out)[DIM / 2], Rows &rows, Place &place,
                                          const int (&seen)[2]) {
        uint32_t p[BLOCK_N / 16][4];
        pack_probabilities(p, s);
        place.tile--;
        Keys v_ring = {place.ring.count - 1};
        ptx::mbarrier_wait(k_full(place.ring.stage()), place.ring.parity());
        multiply_scores(s, place.q_tile, k_tiles + place.ring.stage() * K_BYTES);
        multiply_values(out, p, v_tiles + v_ring.stage() * K_BYTES);
        ptx::wgmma_wait<1>();
        ptx::wgmma_hold(s);
        arrive(k_empty(place.ring.stage()));
        place.ring.count++;
        float factor[2];
        bool later = false;
        if (MASKED) {
            mask(s, seen, place.tile);
            softmax(s, rows, factor);
            /* The assembler would put the softmax off until the product with V is done, under which it is to run. So what
             * stands between waits for sums that are not negative. */
            later = rows.sum[0] < 0 || rows.sum[1] < 0;
        } else {
            softmax_open(s, out, rows, place);
        }
        ptx::wgmma_hold(s);
        Keys next = {place.ring.count - 1};
        ptx::mbarrier_wait(v_full(next.stage()), next.parity() ^ later);
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(out);
        arrive(v_empty(v_ring.stage()));
        if (MASKED && __any_sync(0xffffffff, factor[0] != 1 || factor[1] != 1)) rescale(out, factor);
    }

    /* The next tile of queries, and its first scores under way; false: there is none, and the product is of what lies there.
     * `v_stage` is what the product under way reads; gives -1 for it where that is left. */
    __device__ __forceinline__ bool begin(float (&s)[BLOCK_N / 2], float (&out)[DIM / 2], Place &place, int warpgroup,
                                          const Queries &ring, int &v_stage) {
        ptx::mbarrier_wait(q_full(ring.stage()), ring.parity());
        const Item &item = item_of(ring.stage());
        place.q_tile = q_tiles + ring.stage() * Q_BYTES + warpgroup * (Q_BYTES / WARPGROUPS);
        place.first_row = read(item.first_row) + warpgroup * 64, place.tile = read(item.tiles) - 1;
        bool more = place.tile >= 0;
        /* The last tiles of keys may be for later warpgroups alone; and queries past the last want none, but are given one. */
        int end = place.first_row < all_rows() ? visible(min(place.first_row + 64, all_rows()) - 1) : 0;
        int last = ptx::uniform(max(0, (end + BLOCK_N - 1) / BLOCK_N - 1));
        place.unmasked = ptx::uniform(max(0, visible(place.first_row) - 1) / BLOCK_N);
        if (place.tile > last) {
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(out);
            if (v_stage >= 0) arrive(v_empty(v_stage));
            v_stage = -1;
            for (; place.tile > last; place.tile--, place.ring.count++) {
                ptx::mbarrier_wait(k_full(place.ring.stage()), place.ring.parity());
                arrive(k_empty(place.ring.stage()));
                ptx::mbarrier_wait(v_full(place.ring.stage()), place.ring.parity());
                arrive(v_empty(place.ring.stage()));
            }
        }
        if (args.negative) negate(place.q_tile, warpgroup);
        if (more) ptx::mbarrier_wait(k_full(place.ring.stage()), place.ring.parity());
        multiply_scores(s, place.q_tile, k_tiles + place.ring.stage() * K_BYTES);
        return more;
    }

    __device__ __forceinline__ void multiply(int warpgroup) {
        float s[BLOCK_N / 2], out[DIM / 2];
        Place place;
        Queries q_ring;
        int v_stage = -1;
        bool more = begin(s, out, place, warpgroup, q_ring, v_stage);
        while (more) {
            float factor[2];
            Rows rows = {{-CUDART_INF_F, -CUDART_INF_F}, {0, 0}};
#pragma unroll
            for (int i = 0; i < DIM / 2; i++) out[i] = 0;
            ptx::wgmma_wait<0>();
            ptx::wgmma_hold(s);
            arrive(k_empty(place.ring.stage()));
            place.ring.count++;
            int seen[2]; /* made here, as in the mask it costs the addresses of all products their uniform registers */
#pragma unroll
            for (int half = 0; half < 2; half++) seen[half] = visible(place.first_row + warp_row() + half * 8 + lane() / 4);
            if ((place.tile + 1) * BLOCK_N > visible(place.first_row)) mask(s, seen, place.tile);
            softmax(s, rows, factor);
            Keys v_ring = {place.ring.count - 1};
            ptx::mbarrier_wait(v_full(v_ring.stage()), v_ring.parity());
            while (place.tile > place.unmasked) go_on<true>(s, out, rows, place, seen);
            while (place.tile > 0) go_on<false>(s, out, rows, place, seen);

            /* The last product with V; under it the first of the next tile of queries begins, and under that this one ends. */
            uint32_t p[BLOCK_N / 16][4];
            pack_probabilities(p, s);
            v_stage = (place.ring.count - 1) % STAGES;
            multiply_values(out, p, v_tiles + v_stage * K_BYTES);
            const Item &item = item_of(q_ring.stage());
            int batch = read(item.batch), head = read(item.head), first_row = read(item.first_row) + warpgroup * 64;
            arrive(q_empty(q_ring.stage()));
            q_ring.count++;
            more = begin(s, out, place, warpgroup, q_ring, v_stage);
            ptx::wgmma_wait<1>();
            ptx::wgmma_hold(out);
            if (v_stage >= 0) arrive(v_empty(v_stage));
            store(out, rows, batch, head, first_row);
        }
        ptx::wgmma_wait<0>();
    }

    __device__ __forceinline__ void run() {
        int warpgroup = ptx::uniform(threadIdx.x / 128);
        if (threadIdx.x == 0) {
            make_barriers();
            ptx::prefetch_tensor_map(&maps.q), ptx::prefetch_tensor_map(&maps.k), ptx::prefetch_tensor_map(&maps.v);
        }
        __syncthreads();
        if (warpgroup == 0) {
            ptx::give_registers<COPYING>();
            if (threadIdx.x == 0) copy_scores();
            if (threadIdx.x == 32) copy_values();
        } else {
            ptx::take_registers<MULTIPLYING>();
            multiply(warpgroup - 1);
        }
    }
};

} // namespace cuflash

#define KERNEL(type, suffix, dim, block_m, block_n, stages, threads, blocks)                                                   \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                                              \
        cuflash_hopper_forward_##suffix##_d##dim##_##block_m##x##block_n(const __grid_constant__ cuflash_hopper_args args) {   \
        extern __shared__ __align__(1024) unsigned char shared[];                                                              \
        cuflash::Forward<type, dim, block_m, block_n, stages, CUFLASH_HOPPER_Q_STAGES(dim, block_m, block_n, stages), threads, \
                         blocks>(args, ptx::shared_address(shared))                                                            \
            .run();                                                                                                            \
    }
#define KERNELS(dim, block_m, block_n, stages, threads, blocks, smem_bytes, keys, keys_causal, cluster)                        \
    KERNEL(__half, f16, dim, block_m, block_n, stages, threads, blocks)                                                        \
    KERNEL(__nv_bfloat16, bf16, dim, block_m, block_n, stages, threads, blocks)
CUFLASH_HOPPER_FORWARD(KERNELS)
