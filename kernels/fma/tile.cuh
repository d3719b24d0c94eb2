/* Tiles of float32 in shared memory, as the fma family keeps them, and the two products made from them.
 *
 * A tile is cut into panels of 32 columns: a panel's rows are 128 bytes, all banks once, in eight chunks of 16 bytes. The
 * chunks of a row are permuted (xor) by a key of the row, chosen by who reads which rows at once:
 *   Uniform      all lanes read one row
 *   Interleaved  neighbouring lanes read neighbouring rows
 *   Owned        every lane has EACH rows lying together, and LANES lanes read one each
 *
 * The lanes of a warp share out a product as LANES lanes along its rows, and 32 / LANES along its columns. */
#ifndef CUFLASH_FMA_TILE_CUH
#define CUFLASH_FMA_TILE_CUH

#include "attention.h"
#include "common/type.cuh"
#include "ptx/copy.cuh"

namespace cuflash {

struct Uniform {
    static __device__ __forceinline__ int of(int) {
        return 0;
    }
};
struct Interleaved {
    static __device__ __forceinline__ int of(int row) {
        return row & 7;
    }
};
template <int EACH, int LANES> struct Owned {
    static __device__ __forceinline__ int of(int row) {
        return row / EACH % LANES * (8 / LANES);
    }
};

/* Floats from a tile's start to a chunk of a row; chunk counts from the row's first column. */
template <int ROWS> __device__ __forceinline__ int chunk_at(int row, int chunk, int key) {
    return (chunk / 8 * ROWS + row) * 32 + (chunk % 8 ^ key) * 4;
}

__device__ __forceinline__ float4 four(const float *x) {
    return *reinterpret_cast<const float4 *>(x);
}

__device__ __forceinline__ float4 four(const __half *x) {
    uint2 bits = *reinterpret_cast<const uint2 *>(x);
    float2 low = __half22float2(*reinterpret_cast<__half2 *>(&bits.x)),
           high = __half22float2(*reinterpret_cast<__half2 *>(&bits.y));
    return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ float4 four(const __nv_bfloat16 *x) {
    uint2 bits = *reinterpret_cast<const uint2 *>(x);
    return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000), __uint_as_float(bits.y << 16),
                       __uint_as_float(bits.y & 0xffff0000));
}

/* Loads rows [first, first + ROWS) and columns [column, column + COLUMNS) of a [rows x dim] array into a tile; zeros where
 * either ends. float32 is only queued where the architecture can, to be committed; the rest is there after the next barrier. */
template <int ROWS, int COLUMNS, typename Key, int THREADS, typename T>
__device__ __forceinline__ void load_tile(float *tile, const T *array, int64_t stride, int first, int rows, int column, int dim,
                                          bool vector) {
    if (vector) {
        constexpr int STEP = THREADS / 8; /* rows at a time: eight threads a row, a chunk of each panel a thread */
        int chunk = threadIdx.x % 8, row = threadIdx.x / 8;
        column += chunk * 4;
        const T *from = array + static_cast<int64_t>(first + row) * stride + column;
#pragma unroll
        for (int r = 0; r < ROWS; r += STEP, from += STEP * stride) {
            if (ROWS % STEP != 0 && row + r >= ROWS) break;
#pragma unroll
            for (int panel = 0; panel < COLUMNS / 32; panel++) {
                bool wanted = first + row + r < rows && column + panel * 32 < dim;
                float *to = tile + chunk_at<ROWS>(row + r, panel * 8 + chunk, Key::of(row + r));
#if __CUDA_ARCH__ >= 800
                if constexpr (sizeof(T) == 4) {
                    ptx::cp_async_16(ptx::shared_address(to), from + panel * 32, wanted);
                    continue;
                }
#endif
                *reinterpret_cast<float4 *>(to) = wanted ? four(from + panel * 32) : make_float4(0, 0, 0, 0);
            }
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
            int row = i / COLUMNS, d = i % COLUMNS;
            bool wanted = first + row < rows && column + d < dim;
            tile[chunk_at<ROWS>(row, d / 4, Key::of(row)) + d % 4] =
                wanted ? to_float(array[static_cast<int64_t>(first + row) * stride + column + d]) : 0;
        }
    }
}

/* The same for columns [0, COLUMNS), transposed: element d of row r lies at d * ROWS + r. It is there after the next
 * barrier. */
template <int ROWS, int COLUMNS, int THREADS, typename T>
__device__ __forceinline__ void load_transposed(float *tile, const T *array, int64_t stride, int first, int rows, int dim,
                                                bool vector) {
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * COLUMNS / 4; i += THREADS) {
        int row = i % ROWS, d = i / ROWS * 4;
        const T *from = array + static_cast<int64_t>(first + row) * stride + d;
        float4 x = make_float4(0, 0, 0, 0);
        if (first + row < rows) {
            if (vector) {
                if (d < dim) x = four(from);
            } else {
                if (d < dim) x.x = to_float(from[0]);
                if (d + 1 < dim) x.y = to_float(from[1]);
                if (d + 2 < dim) x.z = to_float(from[2]);
                if (d + 3 < dim) x.w = to_float(from[3]);
            }
        }
        float *to = tile + d * ROWS + row;
        to[0] = x.x, to[ROWS] = x.y, to[2 * ROWS] = x.z, to[3 * ROWS] = x.w;
    }
}

/* c[i][n] += row i of a times row n of b, over one panel. a: the lane's first row, its MI rows lie together; b: the lane's
 * first row, the next ones B_STEP further each. */
template <int B_STEP, int MI, int NI>
__device__ __forceinline__ void multiply_panel(float (&c)[MI][NI], const float *a, int a_key, const float *b, int b_key) {
#pragma unroll 2
    for (int chunk = 0; chunk < 8; chunk++) {
        float4 x[MI];
#pragma unroll
        for (int i = 0; i < MI; i++) x[i] = four(a + i * 32 + (chunk ^ a_key) * 4);
#pragma unroll
        for (int n = 0; n < NI; n++) {
            float4 y = four(b + n * B_STEP * 32 + (chunk ^ b_key) * 4);
#pragma unroll
            for (int i = 0; i < MI; i++) c[i][n] = fmaf(x[i].x, y.x, c[i][n]);
#pragma unroll
            for (int i = 0; i < MI; i++) c[i][n] = fmaf(x[i].y, y.y, c[i][n]);
#pragma unroll
            for (int i = 0; i < MI; i++) c[i][n] = fmaf(x[i].z, y.z, c[i][n]);
#pragma unroll
            for (int i = 0; i < MI; i++) c[i][n] = fmaf(x[i].w, y.w, c[i][n]);
        }
    }
}

/* N neighbours, N a power of two up to 8, from an address that is a multiple of N floats. */
template <int N> __device__ __forceinline__ void load_neighbours(float (&x)[N], const float *from) {
    if constexpr (N >= 4) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            float4 v = four(from + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = from[i];
    }
}

/* multiply_panel with a transposed, the panel's 32 columns being rows of A_ROWS floats; a: the first of the lane's rows.
 * Neighbouring rows lie in registers of different banks, so that most multiply-adds read their operands in one cycle. Rows
 * are taken to and fro: where they turn, the next multiply-add finds its row among the operands of the last one. HOLD_B: a
 * chunk of all rows of b is held, and one column of a, else the other way round; which is faster was measured. */
template <int A_ROWS, int B_STEP, bool HOLD_B, int MI, int NI>
__device__ __forceinline__ void multiply_transposed(float (&c)[MI][NI], const float *a, const float *b, int b_key) {
    auto column = [](float4 y, int e) { return e == 0 ? y.x : e == 1 ? y.y : e == 2 ? y.z : y.w; };
#pragma unroll 2
    for (int chunk = 0; chunk < 8; chunk++) {
        const float *from = b + (chunk ^ b_key) * 4;
        if constexpr (HOLD_B) {
            float4 y[NI];
#pragma unroll
            for (int n = 0; n < NI; n++) y[n] = four(from + n * B_STEP * 32);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float x[MI];
                load_neighbours(x, a + (chunk * 4 + e) * A_ROWS);
#pragma unroll
                for (int n = 0; n < NI; n++)
#pragma unroll
                    for (int i = 0; i < MI; i++) {
                        int row = n % 2 ? MI - 1 - i : i;
                        c[row][n] = fmaf(x[row], column(y[n], e), c[row][n]);
                    }
            }
        } else {
            float x[4][MI];
#pragma unroll
            for (int e = 0; e < 4; e++) load_neighbours(x[e], a + (chunk * 4 + e) * A_ROWS);
#pragma unroll
            for (int n = 0; n < NI; n++) {
                float4 y = four(from + n * B_STEP * 32);
#pragma unroll
                for (int e = 0; e < 4; e++)
#pragma unroll
                    for (int i = 0; i < MI; i++) {
                        int row = e % 2 ? MI - 1 - i : i;
                        c[row][n] = fmaf(x[e][row], column(y, e), c[row][n]);
                    }
            }
        }
    }
}

/* The columns of a lane, one of LANES along a row of LANES * DI columns: pieces of VEC neighbours, a piece to every LANES *
 * VEC columns. */
template <int DI, int LANES> struct Columns {
    static constexpr int VEC = DI % 4 == 0 ? 4 : 2, PIECES = DI / VEC, STEP = LANES * VEC;
    static_assert(DI % 2 == 0 && STEP % 32 == 0, "pieces are whole panels apart");
    static __device__ __forceinline__ int column(int lane, int piece) {
        return piece * STEP + lane * VEC;
    }
};

/* The lane's columns of a row of a tile of Y_ROWS rows; y: the lane's first one. */
template <int Y_ROWS, typename Mine, int DI> __device__ __forceinline__ void load_columns(float (&b)[DI], const float *y) {
#pragma unroll
    for (int piece = 0; piece < Mine::PIECES; piece++) {
        const float *from = y + piece * (Mine::STEP / 32) * Y_ROWS * 32;
        if constexpr (Mine::VEC == 4) {
            float4 v = four(from);
            b[piece * 4] = v.x, b[piece * 4 + 1] = v.y, b[piece * 4 + 2] = v.z, b[piece * 4 + 3] = v.w;
        } else {
            float2 v = *reinterpret_cast<const float2 *>(from);
            b[piece * 2] = v.x, b[piece * 2 + 1] = v.y;
        }
    }
}

/* c[i][d] += sum over n < COUNT of x[i][first + n] y[n][d]. x: the tile's column 0 of the lane's first row, its MI rows lie
 * together, panels of X_ROWS rows; y: a tile of Y_ROWS rows, of which the lane has the columns of Columns<DI, LANES>. */
template <int X_ROWS, int Y_ROWS, int COUNT, int LANES, typename YKey, int MI, int DI>
__device__ __forceinline__ void multiply_outer(float (&c)[MI][DI], const float *x, int x_key, int first, const float *y,
                                               int column_lane) {
    using Mine = Columns<DI, LANES>;
    constexpr int VEC = Mine::VEC;
    int chunk = column_lane * VEC / 4, inside = column_lane * VEC % 4;
    y += chunk / 8 * Y_ROWS * 32 + inside;
#pragma unroll 2
    for (int n = 0; n < COUNT; n += 4) {
        int x_chunk = (first + n) / 4;
        float4 a[MI];
#pragma unroll
        for (int i = 0; i < MI; i++) a[i] = four(x + x_chunk / 8 * X_ROWS * 32 + i * 32 + (x_chunk % 8 ^ x_key) * 4);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float b[DI];
            load_columns<Y_ROWS, Mine>(b, y + (n + e) * 32 + (chunk % 8 ^ YKey::of(n + e)) * 4);
#pragma unroll
            for (int i = 0; i < MI; i++)
#pragma unroll
                for (int d = 0; d < DI; d++)
                    c[i][d] = fmaf(e == 0 ? a[i].x : e == 1 ? a[i].y : e == 2 ? a[i].z : a[i].w, b[d], c[i][d]);
        }
    }
}

/* Where a row's element is in a transposed tile, columns of ROWS floats. A column's eights of rows are permuted by its
 * number, so that lanes that write neighbouring columns do not all write to the same banks. */
template <int ROWS> __device__ __forceinline__ int transposed_at(int row, int column) {
    constexpr int EIGHTS = ROWS / 8, PERMUTED = EIGHTS % 4 == 0 ? 4 : EIGHTS % 2 == 0 ? 2 : 1;
    return column * ROWS + (row / 8 ^ column % PERMUTED) * 8 + row % 8;
}

/* Stores the lane's elements of a tile to a transposed one: rows from `row` on, columns from `column` on in steps of STEP. */
template <int ROWS, int STEP, int MI, int NI>
__device__ __forceinline__ void store_transposed(float *tile, const float (&x)[MI][NI], int row, int column) {
#pragma unroll
    for (int n = 0; n < NI; n++) {
        float *to = tile + transposed_at<ROWS>(row, column + n * STEP);
        if constexpr (MI % 4 == 0) {
#pragma unroll
            for (int i = 0; i < MI; i += 4)
                *reinterpret_cast<float4 *>(to + i) = make_float4(x[i][n], x[i + 1][n], x[i + 2][n], x[i + 3][n]);
        } else {
#pragma unroll
            for (int i = 0; i < MI; i++) to[i] = x[i][n];
        }
    }
}

/* multiply_outer with x transposed, of X_ROWS rows, of which the lane has those from first_row on. */
template <int X_ROWS, int Y_ROWS, int COUNT, int LANES, typename YKey, int MI, int DI>
__device__ __forceinline__ void multiply_outer_transposed(float (&c)[MI][DI], const float *x, int first_row, int first,
                                                          const float *y, int column_lane) {
    using Mine = Columns<DI, LANES>;
    int chunk = column_lane * Mine::VEC / 4;
    y += chunk / 8 * Y_ROWS * 32 + column_lane * Mine::VEC % 4;
#pragma unroll 8
    for (int n = 0; n < COUNT; n++) {
        float a[MI], b[DI];
        load_neighbours(a, x + transposed_at<X_ROWS>(first_row, first + n));
        load_columns<Y_ROWS, Mine>(b, y + n * 32 + (chunk % 8 ^ YKey::of(n)) * 4);
#pragma unroll
        for (int d = 0; d < DI; d++)
#pragma unroll
            for (int i = 0; i < MI; i++) {
                int row = d % 2 ? MI - 1 - i : i;
                c[row][d] = fmaf(a[row], b[d], c[row][d]);
            }
    }
}

} // namespace cuflash

#endif
