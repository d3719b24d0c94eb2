/* Elements of any dtype, read and written as float64, four in row-major order at a time. */
#ifndef CUFLASH_ELEMENT_QUAD_CUH
#define CUFLASH_ELEMENT_QUAD_CUH

#include "element/element.h"

namespace cuflash {

/* The 16-bit dtypes as types of their own. */
struct half_bits {
    uint16_t bits;
};
struct bfloat_bits {
    uint16_t bits;
};

__device__ __forceinline__ double to_double(double x) {
    return x;
}
__device__ __forceinline__ double to_double(float x) {
    return cuflash_float_to_double(x);
}
__device__ __forceinline__ double to_double(half_bits x) {
    return cuflash_float_to_double(cuflash_half_to_float(x.bits));
}
__device__ __forceinline__ double to_double(bfloat_bits x) {
    return cuflash_float_to_double(cuflash_bfloat_to_float(x.bits));
}

__device__ __forceinline__ void from_double(double x, double &out) {
    out = x;
}
__device__ __forceinline__ void from_double(double x, float &out) {
    out = cuflash_double_to_float(x);
}
__device__ __forceinline__ void from_double(double x, half_bits &out) {
    out.bits = cuflash_double_to_half(x);
}
__device__ __forceinline__ void from_double(double x, bfloat_bits &out) {
    out.bits = cuflash_double_to_bfloat(x);
}

/* Calls f with a value of the dtype's type. */
template <typename F> __device__ __forceinline__ void with_type(cuflash_dtype dtype, F f) {
    switch (dtype) {
    case CUFLASH_FLOAT32: f(float()); break;
    case CUFLASH_FLOAT16: f(half_bits()); break;
    case CUFLASH_BFLOAT16: f(bfloat_bits()); break;
    case CUFLASH_FLOAT64: f(double()); break;
    }
}

/* One load or store of up to 16 bytes, or two. */
template <typename T> struct alignas(sizeof(T) < 4 ? 8 : 16) pack { T element[4]; };

/* Unsigned division takes half the time of signed. */
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
    return static_cast<int64_t>(static_cast<uint64_t>(a) / static_cast<uint64_t>(b));
}

/* A place in a nest of loops: the number of a row, counted over all dimensions but the innermost, and the index in it. */
struct place {
    int64_t row, index;

    __device__ __forceinline__ place(const cuflash_nest &loops, int64_t number) {
        row = loops.ndim > 1 ? divide(number, loops.shape[loops.ndim - 1]) : 0;
        index = number - row * loops.shape[loops.ndim - 1];
    }

    /* In elements of operand k. */
    __device__ __forceinline__ int64_t offset(const cuflash_nest &loops, int k) const {
        int64_t sum = index * loops.stride[k][loops.ndim - 1], rest = row;
#pragma unroll 1
        for (int d = loops.ndim - 2; d > 0; d--) {
            int64_t outer = divide(rest, loops.shape[d]);
            sum += (rest - outer * loops.shape[d]) * loops.stride[k][d];
            rest = outer;
        }
        return loops.ndim > 1 ? sum + rest * loops.stride[k][0] : sum;
    }
};

/* Elements first ... first + 3 of every operand, or as many as there are; first is a multiple of 4. */
struct quad {
    const cuflash_nest &loops;
    int64_t first;
    int count;
    bool vector; /* the four lie side by side, aligned, in every operand */
    place start;

    __device__ __forceinline__ quad(const cuflash_nest &loops, bool may_vector, int64_t first, int64_t numel)
        : loops(loops), first(first), count(numel - first < 4 ? static_cast<int>(numel - first) : 4),
          vector(may_vector && count == 4), start(loops, first) {
    }

    /* Where they lie in operand k; where vector, the first alone. */
    __device__ __forceinline__ void locate(int k, int64_t (&offset)[4]) const {
        place at = start;
        offset[0] = at.offset(loops, k);
        if (vector) return;
#pragma unroll
        for (int j = 1; j < 4; j++) {
            if (j >= count) break;
            if (++at.index < loops.shape[loops.ndim - 1]) {
                offset[j] = offset[j - 1] + loops.stride[k][loops.ndim - 1];
            } else {
                at.row++;
                at.index = 0;
                offset[j] = at.offset(loops, k);
            }
        }
    }

    template <typename T> __device__ __forceinline__ void read(int k, const int64_t (&offset)[4], pack<T> &p) const {
        const T *data = static_cast<const T *>(loops.data[k]);
        if (vector) {
            p = *reinterpret_cast<const pack<T> *>(data + offset[0]);
            return;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (j < count) p.element[j] = data[offset[j]];
    }

    template <typename T> __device__ __forceinline__ void write(int k, const int64_t (&offset)[4], const pack<T> &p) const {
        T *data = static_cast<T *>(loops.data[k]);
        if (vector) {
            *reinterpret_cast<pack<T> *>(data + offset[0]) = p;
            return;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (j < count) data[offset[j]] = p.element[j];
    }

    __device__ __forceinline__ void load(int k, double (&x)[4]) const {
        int64_t offset[4];
        locate(k, offset);
        with_type(loops.dtype[k], [&](auto type) {
            pack<decltype(type)> p = {};
            read(k, offset, p);
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] = to_double(p.element[j]);
        });
    }

    __device__ __forceinline__ void store(int k, const double (&x)[4]) const {
        int64_t offset[4];
        locate(k, offset);
        with_type(loops.dtype[k], [&](auto type) {
            pack<decltype(type)> p;
#pragma unroll
            for (int j = 0; j < 4; j++) from_double(x[j], p.element[j]);
            write(k, offset, p);
        });
    }
};

/* Calls f with every quad of the calling thread, in rising order. */
template <typename F> __device__ __forceinline__ void for_quads(const cuflash_nest &loops, bool vector, int64_t numel, F f) {
    int64_t thread = static_cast<int64_t>(blockIdx.x) * CUFLASH_ELEMENT_THREADS + threadIdx.x;
    int64_t step = static_cast<int64_t>(gridDim.x) * CUFLASH_ELEMENT_THREADS * 4;
#pragma unroll 1
    for (int64_t first = 4 * thread; first < numel; first += step) f(quad(loops, vector, first, numel));
}

} // namespace cuflash

#endif
