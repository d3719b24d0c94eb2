/* Element-wise work on tensors of any dtype and strides: out = op(inputs), with broadcasting; reductions and comparison.
 *
 * A thread takes four elements in row-major order at a time (a block of Philox makes four random numbers), reads them as
 * float64, and rounds once: the formulas and the rounding are the CPU's own (src/operation.h, src/reduction.h, src/half.h),
 * so results are the same bits but for exp and log. Where four elements lie side by side in every operand they are one load
 * or store.
 *
 * Compiled without contraction to fma and without flushing denormals. */
#include "element/quad.cuh"

namespace cuflash {

/* ---- Maps --------------------------------------------------------------------------------------- */

/* out = formula(op, x, y, i) of INPUTS tensors; a binary operation may have a number in the place of one. */
template <int INPUTS, typename Formula> __device__ __forceinline__ void map(const cuflash_map_args &args, Formula formula) {
    for_quads(args.loops, args.vector, args.numel, [&](const quad &at) {
        double x[4] = {}, y[4] = {};
        if (INPUTS > 0) at.load(1, x);
        if (INPUTS > 1 && args.op.scalar == CUFLASH_NO_SCALAR) at.load(INPUTS, y);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (INPUTS > 1 && args.op.scalar == CUFLASH_SCALAR_Y) y[j] = args.op.value;
            if (INPUTS > 1 && args.op.scalar == CUFLASH_SCALAR_X) y[j] = x[j], x[j] = args.op.value;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = formula(&args.op, x[j], y[j], at.first + j);
        at.store(0, x);
    });
}

template <typename T> __device__ __forceinline__ void move(const quad &at) {
    pack<T> p;
    int64_t from[4], to[4];
    at.locate(1, from);
    at.locate(0, to);
    at.read(1, from, p);
    at.write(0, to, p);
}

/* ---- Scans -------------------------------------------------------------------------------------- */

/* Merges the values of all threads of a block, in a fixed order, into thread 0's. */
template <typename T, typename Merge> __device__ __forceinline__ void merge_block(T &value, Merge merge) {
    __shared__ T shared[CUFLASH_ELEMENT_THREADS];
    shared[threadIdx.x] = value;
    for (int half = CUFLASH_ELEMENT_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) merge(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
    value = shared[threadIdx.x];
}

/* ---- Reduction of a dimension ------------------------------------------------------------------- */

/* What one lane makes of its share of an output's elements. */
__device__ __forceinline__ double reduce_share(const cuflash_reduce_args &args, int64_t offset, int64_t count, int lane) {
    double value = cuflash_neutral(args.op);
    with_type(args.loops.dtype[1], [&](auto type) {
        const auto *data = static_cast<const decltype(type) *>(args.loops.data[1]) + offset;
#pragma unroll 4
        for (int64_t i = lane; i < count; i += args.lanes)
            value = cuflash_combine(args.op, value, to_double(data[i * args.stride]));
    });
    return value;
}

__device__ __forceinline__ void reduce(const cuflash_reduce_args &args) {
    __shared__ double shared[CUFLASH_ELEMENT_THREADS]; /* [lane][column] */
    int columns = CUFLASH_ELEMENT_THREADS / args.lanes, thread = threadIdx.x;
    int lane = args.lane_fast ? thread % args.lanes : thread / columns;
    int column = args.lane_fast ? thread / args.lanes : thread % columns;
    double *mine = &shared[lane * columns + column];
    int64_t number = static_cast<int64_t>(blockIdx.x) * columns + column;
    if (number < args.numel) {
        int64_t begin = divide(number, args.per_piece) * args.piece;
        *mine = reduce_share(args, place(args.loops, number).offset(args.loops, 1), min(args.piece, args.length - begin), lane);
    }
    for (int half = args.lanes / 2; half > 0; half /= 2) {
        __syncthreads();
        if (lane < half) *mine = cuflash_combine(args.op, *mine, mine[half * columns]);
    }
    if (lane > 0 || number >= args.numel) return;
    with_type(args.loops.dtype[0], [&](auto type) {
        auto *out = static_cast<decltype(type) *>(args.loops.data[0]) + place(args.loops, number).offset(args.loops, 0);
        from_double(*mine / args.divisor, *out);
    });
}

} // namespace cuflash

/* ---- Entry points ------------------------------------------------------------------------------- */

#define KERNEL(name, type)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(CUFLASH_ELEMENT_THREADS)                                                      \
        cuflash_element_##name(const __grid_constant__ type args)

#define FILL_KERNEL(kind, name, formula)                                                                                       \
    KERNEL(name, cuflash_map_args) {                                                                                           \
        cuflash::map<0>(args, [](const cuflash_op *op, double, double, int64_t i) { return formula; });                        \
    }
#define UNARY_KERNEL(kind, name, formula)                                                                                      \
    KERNEL(name, cuflash_map_args) {                                                                                           \
        cuflash::map<1>(args, [](const cuflash_op *, double x, double, int64_t) { return formula; });                          \
    }
#define BINARY_KERNEL(kind, name, formula)                                                                                     \
    KERNEL(name, cuflash_map_args) {                                                                                           \
        cuflash::map<2>(args, [](const cuflash_op *, double x, double y, int64_t) { return formula; });                        \
    }
#define RANDOM_KERNEL(kind, name, make_quad)                                                                                   \
    KERNEL(name, cuflash_map_args) {                                                                                           \
        cuflash::for_quads(args.loops, args.vector, args.numel, [&](const cuflash::quad &at) {                                 \
            double value[4];                                                                                                   \
            make_quad(&args.op, static_cast<uint64_t>(at.first) / 4, value);                                                   \
            at.store(0, value);                                                                                                \
        });                                                                                                                    \
    }

CUFLASH_FILL_MAP(FILL_KERNEL)
CUFLASH_UNARY_MAP(UNARY_KERNEL)
CUFLASH_BINARY_MAP(BINARY_KERNEL)
CUFLASH_RANDOM_MAP(RANDOM_KERNEL)

KERNEL(move, cuflash_map_args) {
    cuflash::for_quads(args.loops, args.vector, args.numel, [&](const cuflash::quad &at) {
        switch (args.loops.dtype[0]) {
        case CUFLASH_FLOAT32: cuflash::move<uint32_t>(at); break;
        case CUFLASH_FLOAT64: cuflash::move<uint64_t>(at); break;
        default: cuflash::move<uint16_t>(at);
        }
    });
}

KERNEL(reduce, cuflash_reduce_args) {
    cuflash::reduce(args);
}

KERNEL(reduce_all, cuflash_scan_args) {
    double value = cuflash_neutral(args.op);
    cuflash::for_quads(args.loops, args.vector, args.numel, [&](const cuflash::quad &at) {
        double x[4];
        at.load(0, x);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (j < at.count) value = cuflash_combine(args.op, value, x[j]);
    });
    cuflash::merge_block(value, [&](double &a, const double &b) { a = cuflash_combine(args.op, a, b); });
    if (threadIdx.x == 0) static_cast<double *>(args.partial)[blockIdx.x] = value;
}

KERNEL(compare, cuflash_scan_args) {
    cuflash_difference found = {};
    cuflash::for_quads(args.loops, args.vector, args.numel, [&](const cuflash::quad &at) {
        double actual[4], expected[4];
        at.load(0, actual);
        at.load(1, expected);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (j < at.count) cuflash_difference_add(&found, &args.tolerance, at.first + j, actual[j], expected[j]);
    });
    cuflash::merge_block(found, [](cuflash_difference &a, const cuflash_difference &b) { cuflash_difference_merge(&a, &b); });
    if (threadIdx.x == 0) static_cast<cuflash_difference *>(args.partial)[blockIdx.x] = found;
}
