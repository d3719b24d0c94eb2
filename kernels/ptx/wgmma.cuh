/* wgmma: products of 64 rows by a warpgroup (sm_90a). One instruction a function.
 *
 * Operands in shared memory are told by descriptors, of tiles in panels of 64 16-bit columns: rows of 128 bytes, of which the
 * 16-byte chunks are swapped by row % 8, as tensor maps of 128-byte swizzle lay them. Eight rows are 1024 bytes, at whose
 * multiples a tile begins. The accumulators of a thread are those of mma.sync.m16n8 for each 8 columns: rows lane / 4 and
 * lane / 4 + 8 of the warp's 16, columns 2 (lane % 4) and the next. */
#ifndef CUFLASH_PTX_WGMMA_CUH
#define CUFLASH_PTX_WGMMA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace ptx {

/* What this thread wrote to registers that the next products read, or to accumulators, is there. */
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* The products since the last one are a group. */
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most n groups are under way. */
template <int n> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

/* Registers that a group under way has: the compiler may not move uses of them across this. */
template <int N> __device__ __forceinline__ void wgmma_hold(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}

/* An operand whose rows lie along k: 16 columns of a panel. */
__device__ __forceinline__ uint64_t rows_descriptor(uint32_t address) {
    return uint64_t(1) << 62 | uint64_t(1024 / 16) << 32 | uint64_t(1) << 16 | (address & 0x3ffff) >> 4;
}

/* An operand whose columns lie along k: 16 rows of a panel, and of the next ones. */
__device__ __forceinline__ uint64_t columns_descriptor(uint32_t address, int panel_bytes) {
    return uint64_t(1) << 62 | uint64_t(1024 / 16) << 32 | uint64_t(panel_bytes / 16) << 16 | (address & 0x3ffff) >> 4;
}

/* The operand so many bytes further on. */
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
    return descriptor >> 32 << 32 | (static_cast<uint32_t>(descriptor) + bytes / 16);
}

/* multiply(c, a, b, accumulate): c = A B or c += A B, N columns, 16 along k. `a` is a descriptor of rows, or the registers that
 * mma.sync.m16n8k16 takes; `b` is a descriptor of rows, or TRANSPOSED, of columns. */
template <typename T, int N, bool TRANSPOSED> struct Wgmma;

#define CUFLASH_F8(c, i)                                                                                                       \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])

/* type, its name, N, the list of accumulators, the numbers of the operands after them, the accumulators */
#define CUFLASH_WGMMA(type, name, n, list, o0, o1, o2, o3, o4, o5, o6, ...)                                                    \
    template <bool TRANSPOSED> struct Wgmma<type, n, TRANSPOSED> {                                                             \
        static __device__ __forceinline__ void multiply(float (&c)[n / 2], uint64_t a, uint64_t b, bool accumulate) {          \
            asm volatile("{\n"                                                                                                 \
                         ".reg .pred p;\n"                                                                                     \
                         "setp.ne.b32 p, %" #o2 ", 0;\n"                                                                       \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" list "}, %" #o0 ", %" #o1        \
                         ", p, 1, 1, 0, %" #o3 ";\n"                                                                           \
                         "}"                                                                                                   \
                         : __VA_ARGS__                                                                                         \
                         : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TRANSPOSED)));                                        \
        }                                                                                                                      \
        static __device__ __forceinline__ void multiply(float (&c)[n / 2], const uint32_t (&a)[4], uint64_t b,                 \
                                                        bool accumulate) {                                                     \
            asm volatile("{\n"                                                                                                 \
                         ".reg .pred p;\n"                                                                                     \
                         "setp.ne.b32 p, %" #o5 ", 0;\n"                                                                       \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" list "}, {%" #o0 ", %" #o1       \
                         ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, %" #o6 ";\n"                                               \
                         "}"                                                                                                   \
                         : __VA_ARGS__                                                                                         \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(TRANSPOSED)));    \
        }                                                                                                                      \
    };
#define CUFLASH_WGMMA_BOTH(...) CUFLASH_WGMMA(__half, "f16", __VA_ARGS__) CUFLASH_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__)

#define CUFLASH_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define CUFLASH_FLOATS_16 CUFLASH_F8(c, 0), CUFLASH_F8(c, 8)
#define CUFLASH_LIST_32                                                                                                        \
    CUFLASH_LIST_16 ", "                                                                                                       \
                    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CUFLASH_FLOATS_32 CUFLASH_FLOATS_16, CUFLASH_F8(c, 16), CUFLASH_F8(c, 24)
#define CUFLASH_LIST_48                                                                                                        \
    CUFLASH_LIST_32 ", "                                                                                                       \
                    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define CUFLASH_FLOATS_48 CUFLASH_FLOATS_32, CUFLASH_F8(c, 32), CUFLASH_F8(c, 40)
#define CUFLASH_LIST_64                                                                                                        \
    CUFLASH_LIST_48 ", "                                                                                                       \
                    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CUFLASH_FLOATS_64 CUFLASH_FLOATS_48, CUFLASH_F8(c, 48), CUFLASH_F8(c, 56)
#define CUFLASH_LIST_96                                                                                                        \
    CUFLASH_LIST_64                                                                                                            \
    ", "                                                                                                                       \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "           \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define CUFLASH_FLOATS_96 CUFLASH_FLOATS_64, CUFLASH_F8(c, 64), CUFLASH_F8(c, 72), CUFLASH_F8(c, 80), CUFLASH_F8(c, 88)
#define CUFLASH_LIST_128                                                                                                       \
    CUFLASH_LIST_96                                                                                                            \
    ", "                                                                                                                       \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "           \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CUFLASH_FLOATS_128 CUFLASH_FLOATS_96, CUFLASH_F8(c, 96), CUFLASH_F8(c, 104), CUFLASH_F8(c, 112), CUFLASH_F8(c, 120)

CUFLASH_WGMMA_BOTH(32, CUFLASH_LIST_16, 16, 17, 18, 19, 20, 21, 22, CUFLASH_FLOATS_16)
CUFLASH_WGMMA_BOTH(64, CUFLASH_LIST_32, 32, 33, 34, 35, 36, 37, 38, CUFLASH_FLOATS_32)
CUFLASH_WGMMA_BOTH(96, CUFLASH_LIST_48, 48, 49, 50, 51, 52, 53, 54, CUFLASH_FLOATS_48)
CUFLASH_WGMMA_BOTH(128, CUFLASH_LIST_64, 64, 65, 66, 67, 68, 69, 70, CUFLASH_FLOATS_64)
CUFLASH_WGMMA_BOTH(192, CUFLASH_LIST_96, 96, 97, 98, 99, 100, 101, 102, CUFLASH_FLOATS_96)
CUFLASH_WGMMA_BOTH(256, CUFLASH_LIST_128, 128, 129, 130, 131, 132, 133, 134, CUFLASH_FLOATS_128)

} // namespace ptx

#endif
