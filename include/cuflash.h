/* cuflash: attention you can script. The C API.
 *
 * This header is the single definition of every public type and function: the LuaJIT module's
 * declarations are made from it at build time, and flash_attention.h is C++ on top of it.
 *
 * Conventions
 *   Status      Every function that can fail returns a cuflash_status (or, for the four raw-pointer
 *               functions, the same number as an int). On failure cuflash_last_error() holds one sentence
 *               that names the argument, what was expected and what came; nothing was written to any
 *               output, unless the function says otherwise, and the next call works.
 *   Indices     Dimensions and indices count from 0. Sizes, strides and offsets are 64-bit and count
 *               elements, not bytes, unless a name says bytes.
 *   Threads     Every function may be called from several threads at once, on different outputs.
 *   Devices     An int: CUFLASH_CPU (-1), or the ordinal of a CUDA device (0, 1, ...).
 */
#ifndef CUFLASH_H
#define CUFLASH_H

#ifndef CUFLASH_FFI_CDEF /* LuaJIT's FFI knows the standard types by itself */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#endif

#ifndef CUFLASH_API
#if defined(__GNUC__) && !defined(CUFLASH_FFI_CDEF)
#define CUFLASH_API __attribute__((visibility("default")))
#else
#define CUFLASH_API
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Version ------------------------------------------------------------------------------------ */

#define CUFLASH_VERSION_MAJOR 0
#define CUFLASH_VERSION_MINOR 1
#define CUFLASH_VERSION_PATCH 0

enum { CUFLASH_ABI_VERSION = 1 }; /* grows when a type or a function changes incompatibly */

/* "0.1.0" */
CUFLASH_API const char *cuflash_version(void);

/* CUFLASH_ABI_VERSION as the library was built with; compare it with the header's. */
CUFLASH_API int cuflash_abi_version(void);

/* This header as LuaJIT's ffi.cdef takes it: the library brings its own declarations, so the two cannot drift. */
CUFLASH_API const char *cuflash_ffi_cdef(void);

/* ---- Status ------------------------------------------------------------------------------------- */

/* One row per status: name, code, meaning. Codes 0 to 7 are those of cuflash::FlashAttentionError. */
#define CUFLASH_STATUS_MAP(X)                                                                          \
    X(SUCCESS, 0, "success")                                                                           \
    X(INVALID_DIMENSION, 1, "invalid dimension: a size is zero, negative or too large")                \
    X(DIMENSION_MISMATCH, 2, "dimension mismatch: the shapes of the tensors do not fit together")      \
    X(NULL_POINTER, 3, "null pointer: a required pointer or tensor is missing or was freed")           \
    X(CUDA_ERROR, 4, "CUDA error: the driver reported a failure, or CUDA is not available")            \
    X(OUT_OF_MEMORY, 5, "out of memory")                                                               \
    X(UNSUPPORTED_HEAD_DIM, 6, "unsupported head dimension")                                           \
    X(UNSUPPORTED_DTYPE, 7, "unsupported data type for this operation")                                \
    X(INVALID_ARGUMENT, 8, "invalid argument")                                                         \
    X(INTERRUPTED, 9, "interrupted before the work was complete")

typedef enum cuflash_status {
#define CUFLASH_STATUS_ENUM(name, code, text) CUFLASH_##name = code,
    CUFLASH_STATUS_MAP(CUFLASH_STATUS_ENUM)
#undef CUFLASH_STATUS_ENUM
} cuflash_status;

/* "INVALID_DIMENSION" and the like; "UNKNOWN_STATUS" for a number that is none. Never NULL. */
CUFLASH_API const char *cuflash_status_name(int status);

/* The meaning of a status in words. Never NULL. */
CUFLASH_API const char *cuflash_status_string(int status);

/* What the last failed call of this thread said; "" if none failed. Valid until this thread's next failure. */
CUFLASH_API const char *cuflash_last_error(void);

/* ---- Data types and devices --------------------------------------------------------------------- */

typedef enum cuflash_dtype {
    CUFLASH_FLOAT32 = 0,
    CUFLASH_FLOAT16 = 1,  /* IEEE binary16 */
    CUFLASH_BFLOAT16 = 2, /* the upper half of a float32 */
    CUFLASH_FLOAT64 = 3   /* for the reference and for checks; no attention kernel takes it */
} cuflash_dtype;

/* "float32" and the like; "unknown" for a number that is none. */
CUFLASH_API const char *cuflash_dtype_name(int dtype);

/* Bytes per element; 0 for a number that is no dtype. */
CUFLASH_API size_t cuflash_dtype_size(int dtype);

enum { CUFLASH_CPU = -1 };

/* The same handle as CUDA's cudaStream_t and CUstream; NULL is the calling thread's stream (see cuflash_set_stream).
 * Ignored on the CPU. */
typedef struct CUstream_st *cudaStream_t;

/* Number of CUDA devices that tensors can live on; 0 where there is no driver or no kernel that it can run. */
CUFLASH_API int cuflash_cuda_device_count(void);

/* SUCCESS if tensors can live on this device; otherwise an error whose message says why not. */
CUFLASH_API cuflash_status cuflash_device_check(int device);

/* Waits until all work queued on a device is done. The CPU never has any. */
CUFLASH_API cuflash_status cuflash_synchronize(int device);

typedef struct cuflash_cuda_device_info {
    char name[128];
    int32_t compute_major, compute_minor; /* 9 and 0: sm_90 */
    int32_t multiprocessors;
    int32_t shared_bytes;    /* shared memory that a block may ask for */
    int32_t driver_version;  /* what the driver is for: 13000 is CUDA 13.0 */
    int32_t toolkit_version; /* what the kernels were compiled with */
    int64_t total_bytes, free_bytes;
} cuflash_cuda_device_info;

CUFLASH_API cuflash_status cuflash_cuda_get_device_info(int device, cuflash_cuda_device_info *info);

/* ---- Streams and events ------------------------------------------------------------------------- */

/* Work on a CUDA device is queued on a stream, and calls return before it is done; only what hands numbers to the host
 * (copies to the CPU, cuflash_tensor_get, reductions to one number, comparisons) waits for it. A fault on the device is
 * therefore reported by a later call, in CUDA's words.
 *
 * These wrap CUDA's own streams and events; those made by anyone else (PyTorch, the CUDA runtime) serve as well. Memory
 * of tensors is allocated in the order of the thread's stream, and freed in the order of that stream or, where the thread
 * works on another one by then, of the default stream, which waits for all streams but those that were made not to block:
 * a tensor used on such a stream too must not be released before it is done with it. */
typedef struct CUevent_st *cudaEvent_t;

CUFLASH_API cuflash_status cuflash_stream_create(int device, cudaStream_t *stream);
CUFLASH_API cuflash_status cuflash_stream_destroy(int device, cudaStream_t stream);
CUFLASH_API cuflash_status cuflash_stream_synchronize(int device, cudaStream_t stream);
CUFLASH_API cuflash_status cuflash_stream_wait_event(int device, cudaStream_t stream, cudaEvent_t event);

/* The stream of the calling thread: every call that is given none, or NULL, uses it. At first NULL, the default
 * stream. Returns the one before. */
CUFLASH_API cudaStream_t cuflash_set_stream(cudaStream_t stream);

CUFLASH_API cuflash_status cuflash_event_create(int device, cudaEvent_t *event);
CUFLASH_API cuflash_status cuflash_event_destroy(int device, cudaEvent_t event);
CUFLASH_API cuflash_status cuflash_event_record(int device, cudaEvent_t event, cudaStream_t stream);
CUFLASH_API cuflash_status cuflash_event_synchronize(int device, cudaEvent_t event);

/* Time from start to end, both recorded and done. */
CUFLASH_API cuflash_status cuflash_event_elapsed(int device, cudaEvent_t start, cudaEvent_t end, float *milliseconds);

/* ---- Memory ------------------------------------------------------------------------------------- */

typedef struct cuflash_memory_stats {
    int64_t live_bytes;        /* held by storages now */
    int64_t peak_bytes;        /* the most ever held, since start or cuflash_memory_reset_peak */
    int64_t live_storages;     /* storages not yet released */
    int64_t total_storages;    /* storages ever allocated */
    int64_t limit_bytes;       /* 0: no limit */
} cuflash_memory_stats;

CUFLASH_API cuflash_status cuflash_memory_get_stats(int device, cuflash_memory_stats *stats);
CUFLASH_API cuflash_status cuflash_memory_reset_peak(int device);

/* Gives memory that was freed, and kept for the next allocation, back to a CUDA device, for other processes or libraries; waits
 * for the device. On the CPU it is a workspace of 1 to 256 MiB, kept for the next call that needs one as large; until then it
 * counts towards neither live_bytes nor the limit. */
CUFLASH_API cuflash_status cuflash_memory_trim(int device);

/* Allocations that would take live_bytes beyond this fail with OUT_OF_MEMORY; 0 removes the limit. It
 * counts tensors' storages and the workspace of calls that bring none of their own. */
CUFLASH_API cuflash_status cuflash_memory_set_limit(int device, int64_t bytes);

/* ---- Tensors ------------------------------------------------------------------------------------ */

enum { CUFLASH_MAX_DIMS = 8 };

typedef struct cuflash_storage cuflash_storage; /* a reference-counted buffer on one device */

/* A view of memory. A plain value: whoever holds one that a cuflash function filled in owns one reference
 * to its storage and gives it back with cuflash_tensor_release. Element [i0, i1, ...] lies at
 * data + dtype_size * (i0 * stride[0] + i1 * stride[1] + ...). Entries from ndim on are 0. A tensor with
 * data == NULL is released: every function answers it with NULL_POINTER. */
typedef struct cuflash_tensor {
    cuflash_storage *storage; /* NULL: memory of the caller's, see cuflash_tensor_borrow */
    void *data;               /* the first element */
    cuflash_dtype dtype;
    int32_t device;
    int32_t ndim; /* 0 to CUFLASH_MAX_DIMS; 0 is a single number */
    int64_t shape[CUFLASH_MAX_DIMS];
    int64_t stride[CUFLASH_MAX_DIMS];
} cuflash_tensor;

/* A new tensor of its own storage, row-major, aligned to 64 bytes; its values are undefined.
 * Sizes must be positive. INVALID_DIMENSION, UNSUPPORTED_DTYPE, OUT_OF_MEMORY, CUDA_ERROR. */
CUFLASH_API cuflash_status cuflash_tensor_empty(cuflash_tensor *out, cuflash_dtype dtype, int device,
                                                int ndim, const int64_t *shape);

/* A tensor over the caller's memory, which must outlive it. strides may be NULL: row-major. */
CUFLASH_API cuflash_status cuflash_tensor_borrow(cuflash_tensor *out, void *data, cuflash_dtype dtype,
                                                 int device, int ndim, const int64_t *shape,
                                                 const int64_t *strides);

/* Gives the reference to the storage back and marks the tensor released. NULL and a released tensor are
 * fine. Never fails. */
CUFLASH_API void cuflash_tensor_release(cuflash_tensor *tensor);

CUFLASH_API int64_t cuflash_tensor_numel(const cuflash_tensor *tensor);
CUFLASH_API bool cuflash_tensor_is_contiguous(const cuflash_tensor *tensor);

/* Views: out shares src's storage and holds a reference of its own. out may be src itself.
 *   alias      the same view
 *   narrow     elements [start, start + length) of a dimension
 *   select     one index of a dimension, which is dropped
 *   transpose  two dimensions swapped
 *   view       another shape of the same number of elements; INVALID_ARGUMENT where the strides
 *              forbid it without a copy. One size may be -1: whatever is left.
 *   expand     dimensions of size 1 (and new leading ones) repeated, by a stride of 0 */
CUFLASH_API cuflash_status cuflash_tensor_alias(cuflash_tensor *out, const cuflash_tensor *src);
CUFLASH_API cuflash_status cuflash_tensor_narrow(cuflash_tensor *out, const cuflash_tensor *src, int dim,
                                                 int64_t start, int64_t length);
CUFLASH_API cuflash_status cuflash_tensor_select(cuflash_tensor *out, const cuflash_tensor *src, int dim,
                                                 int64_t index);
CUFLASH_API cuflash_status cuflash_tensor_transpose(cuflash_tensor *out, const cuflash_tensor *src,
                                                    int dim0, int dim1);
CUFLASH_API cuflash_status cuflash_tensor_view(cuflash_tensor *out, const cuflash_tensor *src, int ndim,
                                               const int64_t *shape);
CUFLASH_API cuflash_status cuflash_tensor_expand(cuflash_tensor *out, const cuflash_tensor *src, int ndim,
                                                 const int64_t *shape);

/* ---- Element-wise work -------------------------------------------------------------------------- */

/* Every result is computed in float64 and rounded once to the dtype of the output. Inputs broadcast
 * to the output's shape: dimensions align from the right, and size 1 (or none) repeats. An input may be the
 * output itself, or any view of its memory. No output may have a stride of 0.
 *
 * The tensors of a call are on one device, where the work is done; only cuflash_tensor_copy and cuflash_tensor_compare take
 * two. Results are the same bits on every device but for exp and log, whose last bit is the device's, and for the order of
 * sums, which is each device's own but always the same. */

/* dst = src, converted to dst's dtype and device; where the dtypes are the same, every bit is kept. */
CUFLASH_API cuflash_status cuflash_tensor_copy(const cuflash_tensor *dst, const cuflash_tensor *src);

CUFLASH_API cuflash_status cuflash_tensor_fill(const cuflash_tensor *dst, double value);

/* dst[i] = start + i * step, in row-major order of dst. */
CUFLASH_API cuflash_status cuflash_tensor_arange(const cuflash_tensor *dst, double start, double step);

CUFLASH_API cuflash_status cuflash_tensor_get(const cuflash_tensor *tensor, const int64_t *index,
                                              double *value);
CUFLASH_API cuflash_status cuflash_tensor_set(const cuflash_tensor *tensor, const int64_t *index,
                                              double value);

typedef enum cuflash_binary_op {
    CUFLASH_ADD = 0,
    CUFLASH_SUB = 1,
    CUFLASH_MUL = 2,
    CUFLASH_DIV = 3,
    CUFLASH_MAXIMUM = 4, /* NaN if either is */
    CUFLASH_MINIMUM = 5
} cuflash_binary_op;

CUFLASH_API cuflash_status cuflash_tensor_binary(cuflash_binary_op op, const cuflash_tensor *out,
                                                 const cuflash_tensor *a, const cuflash_tensor *b);

/* out = a op b, or b op a where reversed. */
CUFLASH_API cuflash_status cuflash_tensor_binary_scalar(cuflash_binary_op op, const cuflash_tensor *out,
                                                        const cuflash_tensor *a, double b, bool reversed);

typedef enum cuflash_unary_op {
    CUFLASH_NEG = 0,
    CUFLASH_ABS = 1,
    CUFLASH_EXP = 2,
    CUFLASH_LOG = 3,
    CUFLASH_SQRT = 4
} cuflash_unary_op;

CUFLASH_API cuflash_status cuflash_tensor_unary(cuflash_unary_op op, const cuflash_tensor *out,
                                                const cuflash_tensor *a);

typedef enum cuflash_reduce_op {
    CUFLASH_SUM = 0,
    CUFLASH_MEAN = 1,
    CUFLASH_MAX = 2, /* NaN if any is */
    CUFLASH_MIN = 3
} cuflash_reduce_op;

/* Reduces dimension dim of a; out has a's shape without it. */
CUFLASH_API cuflash_status cuflash_tensor_reduce(cuflash_reduce_op op, const cuflash_tensor *out,
                                                 const cuflash_tensor *a, int dim);

/* Reduces all elements to one number. The order of the sum does not depend on the number of threads. */
CUFLASH_API cuflash_status cuflash_tensor_reduce_all(cuflash_reduce_op op, const cuflash_tensor *a,
                                                     double *result);

/* How far actual is from expected. An element is close if |actual - expected| <= atol + rtol * |expected|,
 * or if both are the same infinity, or (where equal_nan) both NaN. */
typedef struct cuflash_close_report {
    int64_t numel;
    int64_t n_bad;                         /* elements that are not close; 0: the tensors are close */
    double max_abs;                        /* largest |actual - expected|; NaN if one of them is NaN */
    double max_rel;                        /* largest |actual - expected| / |expected| where expected != 0 */
    double rel_norm;                       /* ||actual - expected|| / ||expected||, Frobenius */
    int64_t worst_index[CUFLASH_MAX_DIMS]; /* of the element furthest beyond its tolerance */
    double worst_actual, worst_expected;
} cuflash_close_report;

/* Compares two tensors of the same shape; their dtypes and devices may differ. */
CUFLASH_API cuflash_status cuflash_tensor_compare(const cuflash_tensor *actual,
                                                  const cuflash_tensor *expected, double rtol, double atol,
                                                  bool equal_nan, cuflash_close_report *report);

/* ---- Random numbers ----------------------------------------------------------------------------- */

/* A counter-based generator, Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
 * SC 2011). The key is the seed; offset counts blocks of four 32-bit words, and every fill moves it past the
 * blocks it used. The same seed and offset give the same values on every device, for any number of
 * threads, and for any strides: element i in row-major order always gets the i-th number. */
typedef struct cuflash_generator {
    uint64_t seed;
    uint64_t offset;
} cuflash_generator;

/* Uniform in [low, high), also after rounding to the dtype. */
CUFLASH_API cuflash_status cuflash_random_uniform(const cuflash_tensor *out, cuflash_generator *generator,
                                                  double low, double high);

/* Normal with this mean and standard deviation (>= 0), by Box and Muller's transform. */
CUFLASH_API cuflash_status cuflash_random_normal(const cuflash_tensor *out, cuflash_generator *generator,
                                                 double mean, double std);

/* ---- Attention ---------------------------------------------------------------------------------- */

/* One attention problem: o = softmax(scale * q k^T + mask) v, for every batch and head.
 *
 *   q    [batch, heads,    seq_q, head_dim]      heads a multiple of heads_kv: query head h reads
 *   k    [batch, heads_kv, seq_k, head_dim]      KV head h / (heads / heads_kv)
 *   v    [batch, heads_kv, seq_k, head_dim_v]
 *   o    [batch, heads,    seq_q, head_dim_v]
 *   lse  [batch, heads,    seq_q]                natural log of the sum of exp(scale * q k^T), float32 (or
 *                                                float16, which leaves 3 digits: backward then recomputes it)
 *   d_o, dq, dk, dv   the gradients of o, q, k, v, each shaped like the tensor itself
 *
 * q, k, v, o and the gradients are of one dtype: float32, float16 or bfloat16; sums are kept in float32. Any
 * strides are accepted where the last dimension is contiguous, so [batch, seq, heads, dim] memory
 * works through a transposed view. Outputs must not overlap inputs, nor each other.
 *
 * A query row with nothing to attend to (causal with seq_q > seq_k) gives o = 0, lse = -inf and no
 * gradient.
 *
 * Set struct_size to sizeof(cuflash_attention) and everything not needed to zero: fields added later
 * mean, when zero, what their absence meant before. */
typedef struct cuflash_attention {
    size_t struct_size;
    const cuflash_tensor *q, *k, *v;
    const cuflash_tensor *o;   /* forward: output; backward: input */
    const cuflash_tensor *lse; /* forward: output, or NULL; backward: input, or NULL: recomputed */
    const cuflash_tensor *d_o; /* backward: input; the next three are its outputs */
    const cuflash_tensor *dq, *dk, *dv;
    uint32_t flags;            /* CUFLASH_CAUSAL and so on, or-ed together */
    float scale;               /* with CUFLASH_SCALE; without it 0, and 1 / sqrt(head_dim) is used */
    cudaStream_t stream;       /* CUDA tensors only */
    void *workspace;           /* NULL: the call takes memory of its own and gives it back */
    size_t workspace_bytes;    /* size of workspace, at least what cuflash_attention_workspace says */
} cuflash_attention;

enum {
    CUFLASH_CAUSAL = 1,        /* query i sees keys 0 ... i + seq_k - seq_q (aligned at the bottom right) */
    CUFLASH_SCALE = 2,         /* use the field scale, any finite number */
    CUFLASH_DETERMINISTIC = 4  /* backward: bit-equal from run to run (the CPU always is) */
};

typedef enum cuflash_pass { CUFLASH_FORWARD = 0, CUFLASH_BACKWARD = 1 } cuflash_pass;

/* Writes o and, unless NULL, lse. May be INTERRUPTED, leaving the outputs partly written. On the CPU results
 * are bit-equal from run to run and for any number of threads.
 * Online softmax after Milakov and Gimelshein (2018), tiled after Dao et al., "FlashAttention" (2022):
 * memory is O(seq), never seq_q x seq_k. */
CUFLASH_API cuflash_status cuflash_attention_forward(const cuflash_attention *attention);

/* Writes dq, dk and dv from q, k, v, o, lse and d_o. Any of dq, dk and dv may be NULL: not wanted. Otherwise as
 * cuflash_attention_forward. Where lse is missing, float16, or so large that float32 no longer holds it well
 * enough (|lse| > 32), it is recomputed. */
CUFLASH_API cuflash_status cuflash_attention_backward(const cuflash_attention *attention);

/* Bytes of workspace a pass needs, 64-byte aligned, on the tensors' device. Checks its arguments as the pass
 * itself would, but q, k and v suffice. On the CPU it grows with cuflash_get_num_threads(). */
CUFLASH_API cuflash_status cuflash_attention_workspace(const cuflash_attention *attention,
                                                       cuflash_pass pass, size_t *bytes);

/* Which kernel will run and how, in words, as lines of "name: value". Always null-terminated; cut short where
 * size does not suffice (1024 does). Checks its arguments as the pass itself would, but q, k and v suffice. */
CUFLASH_API cuflash_status cuflash_attention_plan(const cuflash_attention *attention, cuflash_pass pass,
                                                  char *text, size_t size);

/* The oracle: the same problem computed naively in float64 on the CPU, from inputs of any dtype (float64
 * included), each output rounded once to its own dtype (any of the four; normally float64). Backward takes
 * nothing from the forward pass: o and lse are ignored. Slow on purpose: it is written to be read. */
CUFLASH_API cuflash_status cuflash_reference_forward(const cuflash_attention *attention);
CUFLASH_API cuflash_status cuflash_reference_backward(const cuflash_attention *attention);

/* ---- Attention on raw pointers ------------------------------------------------------------------ */

/* For callers with row-major arrays and no tensors: Q, K, V, O and their gradients [batch_size, num_heads,
 * seq_len, head_dim], L [batch_size, num_heads, seq_len]. They return a cuflash_status as int.
 *
 * Pointers say where they live: host pointers run on the CPU, device pointers on their GPU and on `stream`. A mix
 * of the two is INVALID_ARGUMENT. NULL_POINTER, INVALID_DIMENSION (<= 0), UNSUPPORTED_HEAD_DIM
 * (above 512), CUDA_ERROR (device pointers that this build has no kernels for), OUT_OF_MEMORY. */
CUFLASH_API int cuflash_attention_forward_f32(const float *Q, const float *K, const float *V, float *O,
                                              float *L, int batch_size, int num_heads, int seq_len,
                                              int head_dim, float scale, bool causal, cudaStream_t stream);

CUFLASH_API int cuflash_attention_backward_f32(const float *Q, const float *K, const float *V,
                                               const float *O, const float *L, const float *dO, float *dQ,
                                               float *dK, float *dV, int batch_size, int num_heads,
                                               int seq_len, int head_dim, float scale, bool causal,
                                               cudaStream_t stream);

/* The same on float16 (C has no name for it: pass half, _Float16 or uint16_t pointers). L is float16 too: it
 * holds the log-sum-exp to 11 bits, and overflows to infinity beyond 65504. Backward therefore recomputes
 * it in float32 from Q and K (one product more, of seven); its gradients are as good as with a float32 L. */
CUFLASH_API int cuflash_attention_forward_f16(const void *Q, const void *K, const void *V, void *O, void *L,
                                              int batch_size, int num_heads, int seq_len, int head_dim,
                                              float scale, bool causal, cudaStream_t stream);

CUFLASH_API int cuflash_attention_backward_f16(const void *Q, const void *K, const void *V, const void *O,
                                               const void *L, const void *dO, void *dQ, void *dK, void *dV,
                                               int batch_size, int num_heads, int seq_len, int head_dim,
                                               float scale, bool causal, cudaStream_t stream);

/* ---- The CPU backend and long calls ------------------------------------------------------------- */

/* The instruction set the CPU kernels run with: "baseline", "avx2", "avx512", "avx512bf16" or "amx". The best one the machine
 * has, unless the environment variable CUFLASH_CPU_ISA names another (read at the first use); "none" where it names one that
 * cannot run here, which every attention call then says. */
CUFLASH_API const char *cuflash_cpu_isa(void);

/* Threads a call on the CPU may use; at first OMP_NUM_THREADS, or all cores that the process may use. At most 64, or 4 for every
 * core where that is more, up to 1024. They are the library's own, sleep when there is nothing to do, and take no signals; a call
 * waits for none that has not come to its work. */
CUFLASH_API int cuflash_get_num_threads(void);
CUFLASH_API cuflash_status cuflash_set_num_threads(int threads);

/* Makes every attention call now running on the CPU, in any thread, return INTERRUPTED soon. Safe to call from
 * a signal handler. */
CUFLASH_API void cuflash_interrupt(void);

/* While on, SIGINT (Ctrl-C) during an attention call interrupts it; outside of calls the signal is left to
 * whoever had it. A second SIGINT during the same call goes to the handler that was there before. Off at
 * first. Returns the old setting. */
CUFLASH_API bool cuflash_catch_sigint(bool on);

#ifdef __cplusplus
}
#endif
#endif
