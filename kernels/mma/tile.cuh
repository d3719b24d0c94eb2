/* Tiles in shared memory, as the families with tensor cores keep them: rows of DIM elements of SIZE bytes, cut into panels of
 * 128 bytes (64 where a row is not a multiple of that). The 16-byte chunks of a panel's row are permuted by its number, so that
 * eight rows of one chunk column, which is what ldmatrix reads, lie in different banks. */
#ifndef CUFLASH_MMA_TILE_CUH
#define CUFLASH_MMA_TILE_CUH

#include "attention.h"
#include "common/type.cuh"
#include "ptx/copy.cuh"
#include "ptx/math.cuh"
#include "ptx/matrix.cuh"

namespace cuflash {

template <int ROWS_, int DIM_, int SIZE_ = 2> struct Tile {
    static constexpr int ROWS = ROWS_, DIM = DIM_, SIZE = SIZE_;
    static constexpr int EACH = 16 / SIZE;                       /* elements to a chunk */
    static constexpr int CHUNKS = DIM * SIZE % 128 == 0 ? 8 : 4; /* to a row of a panel */
    static constexpr int PANEL = CHUNKS * EACH, PANELS = DIM / PANEL;
    static constexpr int BYTES = ROWS * DIM * SIZE;

    /* Bytes from the tile's start to a chunk; chunk counts from the row's first column. */
    static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
        int panel = chunk / CHUNKS, column = chunk % CHUNKS;
        int key = CHUNKS == 8 ? row & 7 : row >> 1 & 3;
        return static_cast<uint32_t>((panel * ROWS + row) * CHUNKS * 16 + (column ^ key) * 16);
    }
};

template <int SIZE> struct Bits;
template <> struct Bits<2> { using type = unsigned short; };
template <> struct Bits<4> { using type = uint32_t; };

/* Queues the copy of rows [first, first + ROWS) of a [rows x dim] array to a tile; zeros where either ends. To be committed. */
template <typename Shape, int THREADS, typename T>
__device__ __forceinline__ void load_tile(uint32_t tile, const T *array, int64_t stride, int first, int rows, int dim,
                                          bool vector) {
    constexpr int CHUNKS = Shape::CHUNKS, STEP = THREADS / CHUNKS;
    static_assert(STEP % 8 == 0 || Shape::CHUNKS == 4, "a thread's rows have one key");
    static_assert(sizeof(T) == Shape::SIZE, "the array's elements are the tile's");
    if (vector) {
        int thread = ptx::anew(threadIdx.x), column = thread % CHUNKS, row = thread / CHUNKS;
        const T *source = array + static_cast<int64_t>(first + row) * stride + column * Shape::EACH;
#pragma unroll
        for (int r = 0; r < Shape::ROWS; r += STEP) {
            if (Shape::ROWS % STEP == 0 || row + r < Shape::ROWS) {
                bool inside = first + row + r < rows;
#pragma unroll
                for (int panel = 0; panel < Shape::PANELS; panel++) {
                    bool wanted = inside && column * Shape::EACH + panel * Shape::PANEL < dim;
                    ptx::cp_async_16(tile + Shape::offset(row + r, panel * CHUNKS + column), source + panel * Shape::PANEL,
                                     wanted);
                }
            }
            source += STEP * stride;
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < Shape::ROWS * Shape::DIM; i += THREADS) {
            int row = i / Shape::DIM, column = i % Shape::DIM;
            typename Bits<sizeof(T)>::type bits = 0;
            if (first + row < rows && column < dim)
                bits = reinterpret_cast<const decltype(bits) *>(array)[static_cast<int64_t>(first + row) * stride + column];
            ptx::store_shared(tile + Shape::offset(row, column / Shape::EACH) + column % Shape::EACH * Shape::SIZE, bits);
        }
    }
}

/* Writes rows [first, first + count) of a tile to rows [first_out, ...) of a [rows x dim] array, by `threads` threads of
 * which this is number `thread`. */
template <typename Shape, typename T>
__device__ __forceinline__ void store_tile(const unsigned char *tile, int first, int count, T *array, int64_t stride,
                                           int first_out, int rows, int dim, bool vector, int thread, int threads) {
    constexpr int EACH = Shape::EACH, PER_ROW = Shape::DIM / EACH;
#pragma unroll 4
    for (int i = thread; i < count * PER_ROW; i += threads) {
        int row = i / PER_ROW, chunk = i % PER_ROW;
        if (first_out + row >= rows || chunk * EACH >= dim) continue;
        uint4 values = *reinterpret_cast<const uint4 *>(tile + Shape::offset(first + row, chunk));
        T *to = array + static_cast<int64_t>(first_out + row) * stride + chunk * EACH;
        if (vector) {
            *reinterpret_cast<uint4 *>(to) = values;
        } else {
            const T *elements = reinterpret_cast<const T *>(&values);
#pragma unroll
            for (int e = 0; e < EACH; e++)
                if (chunk * EACH + e < dim) to[e] = elements[e];
        }
    }
}

/* Does a row of a tile hold a NaN? For a whole warp. */
template <typename Shape, typename T> __device__ __forceinline__ bool row_has_nan(const unsigned char *tile, int row) {
    bool found = false;
    for (int chunk = threadIdx.x % 32; chunk < Shape::DIM / 8; chunk += 32) {
        const T *elements = reinterpret_cast<const T *>(tile + Shape::offset(row, chunk));
        for (int e = 0; e < 8; e++) found |= __hisnan(elements[e]);
    }
    return __any_sync(0xffffffff, found);
}

/* Changes the sign of every element of a tile. */
template <typename Shape, int THREADS> __device__ __forceinline__ void negate_tile(unsigned char *tile) {
#pragma unroll 1
    for (int i = threadIdx.x; i < Shape::BYTES / 16; i += THREADS) {
        uint4 *chunk = reinterpret_cast<uint4 *>(tile) + i;
        uint4 v = *chunk;
        *chunk = make_uint4(v.x ^ 0x80008000u, v.y ^ 0x80008000u, v.z ^ 0x80008000u, v.w ^ 0x80008000u);
    }
}

/* Fragments of mma_16816 from a tile, by ldmatrix. `lane` is the thread's address for the block at row 0 and chunk 0, as
 * lane_a or lane_b make it (plus whole rows); the block lies at (row, chunk), which should be known at compile time: then an
 * address costs one instruction. Rows are multiples of 8, chunks (of 8 elements) of 2.
 *   load_a        lane_a: the left operand, its rows the tile's rows
 *   load_b        lane_b: the right operand, its columns the tile's rows: row ... row + 15; r[0], r[1] are of the first eight
 *   load_b_trans  lane_a: the right operand, its k the tile's rows; columns 8 chunk ...; registers as for load_b
 *   load_a_trans  lane_b: the left operand, its k the tile's rows, its rows the tile's columns */
template <typename Shape> __device__ __forceinline__ uint32_t lane_a(uint32_t tile) {
    int lane = threadIdx.x % 32;
    return tile + Shape::offset(lane % 16, lane / 16);
}

template <typename Shape> __device__ __forceinline__ uint32_t lane_b(uint32_t tile) {
    int lane = threadIdx.x % 32;
    return tile + Shape::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

template <typename Shape> __device__ __forceinline__ uint32_t block_address(uint32_t lane, int row, int chunk) {
    return (lane ^ chunk % Shape::CHUNKS * 16) + (chunk / Shape::CHUNKS * Shape::ROWS + row) * Shape::CHUNKS * 16;
}

template <typename Shape> __device__ __forceinline__ void load_a(uint32_t (&r)[4], uint32_t lane, int row, int chunk) {
    ptx::ldmatrix_x4(r, block_address<Shape>(lane, row, chunk));
}

template <typename Shape> __device__ __forceinline__ void load_b(uint32_t (&r)[4], uint32_t lane, int row, int chunk) {
    ptx::ldmatrix_x4(r, block_address<Shape>(lane, row, chunk));
}

template <typename Shape> __device__ __forceinline__ void load_b_trans(uint32_t (&r)[4], uint32_t lane, int row, int chunk) {
    ptx::ldmatrix_x4_trans(r, block_address<Shape>(lane, row, chunk));
}

template <typename Shape> __device__ __forceinline__ void load_a_trans(uint32_t (&r)[4], uint32_t lane, int row, int chunk) {
    ptx::ldmatrix_x4_trans(r, block_address<Shape>(lane, row, chunk));
}

} // namespace cuflash

#endif
