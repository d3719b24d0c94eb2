/* Attention on raw pointers, with the signatures of the earlier API: wraps the arrays in tensors on the device where
 * they live and calls the functions of attention.c. */
#include "device.h"
#include "problem.h"
#include "tensor.h"

typedef struct {
    const char *fn;
    int batch_size, num_heads, seq_len, head_dim;
    int device;
    bool located; /* is device known? */
    cuflash_dtype dtype;
} arrays;

static cuflash_status check_sizes(const arrays *a) {
    const struct {
        const char *name;
        int value;
    } sizes[] = {
        {"batch_size", a->batch_size}, {"num_heads", a->num_heads}, {"seq_len", a->seq_len}, {"head_dim", a->head_dim}};
    for (int i = 0; i < 4; i++)
        if (sizes[i].value <= 0)
            return cuflash_fail(CUFLASH_INVALID_DIMENSION, "%s: argument '%s': expected a positive number, got %d", a->fn,
                                sizes[i].name, sizes[i].value);
    if (a->head_dim > CUFLASH_MAX_HEAD_DIM)
        return cuflash_fail(CUFLASH_UNSUPPORTED_HEAD_DIM, "%s: argument 'head_dim': expected 1 to %d, got %d", a->fn,
                            CUFLASH_MAX_HEAD_DIM, a->head_dim);
    return CUFLASH_SUCCESS;
}

/* Wraps one array. dims is 4, or 3 for L. */
static cuflash_status wrap(arrays *a, const char *name, const void *data, int dims, cuflash_tensor *out) {
    if (!data) return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument '%s': expected a pointer, got NULL", a->fn, name);
    int device = cuflash_pointer_device(data);
    if (a->located && device != a->device)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                            "%s: argument '%s': expected memory on the device of 'Q'; host and device pointers cannot be mixed",
                            a->fn, name);
    a->device = device;
    a->located = true;
    CUFLASH_TRY(cuflash_device_check(device));
    const int64_t shape[] = {a->batch_size, a->num_heads, a->seq_len, a->head_dim};
    return cuflash_tensor_borrow(out, (void *)(uintptr_t)data, a->dtype, device, dims, shape, NULL);
}

static int forward(const char *fn, cuflash_dtype dtype, const void *Q, const void *K, const void *V, void *O, void *L,
                   int batch_size, int num_heads, int seq_len, int head_dim, float scale, bool causal, cudaStream_t stream) {
    arrays a = {fn, batch_size, num_heads, seq_len, head_dim, CUFLASH_CPU, false, dtype};
    cuflash_tensor q, k, v, o, lse;
    CUFLASH_TRY(check_sizes(&a));
    CUFLASH_TRY(wrap(&a, "Q", Q, 4, &q));
    CUFLASH_TRY(wrap(&a, "K", K, 4, &k));
    CUFLASH_TRY(wrap(&a, "V", V, 4, &v));
    CUFLASH_TRY(wrap(&a, "O", O, 4, &o));
    CUFLASH_TRY(wrap(&a, "L", L, 3, &lse));
    cuflash_attention problem = {.struct_size = sizeof problem, .q = &q, .k = &k, .v = &v, .o = &o, .lse = &lse};
    problem.flags = CUFLASH_SCALE | (causal ? CUFLASH_CAUSAL : 0);
    problem.scale = scale;
    problem.stream = stream;
    return cuflash_attention_forward(&problem);
}

static int backward(const char *fn, cuflash_dtype dtype, const void *Q, const void *K, const void *V, const void *O,
                    const void *L, const void *dO, void *dQ, void *dK, void *dV, int batch_size, int num_heads, int seq_len,
                    int head_dim, float scale, bool causal, cudaStream_t stream) {
    arrays a = {fn, batch_size, num_heads, seq_len, head_dim, CUFLASH_CPU, false, dtype};
    cuflash_tensor q, k, v, o, lse, d_o, dq, dk, dv;
    CUFLASH_TRY(check_sizes(&a));
    CUFLASH_TRY(wrap(&a, "Q", Q, 4, &q));
    CUFLASH_TRY(wrap(&a, "K", K, 4, &k));
    CUFLASH_TRY(wrap(&a, "V", V, 4, &v));
    CUFLASH_TRY(wrap(&a, "O", O, 4, &o));
    CUFLASH_TRY(wrap(&a, "L", L, 3, &lse));
    CUFLASH_TRY(wrap(&a, "dO", dO, 4, &d_o));
    CUFLASH_TRY(wrap(&a, "dQ", dQ, 4, &dq));
    CUFLASH_TRY(wrap(&a, "dK", dK, 4, &dk));
    CUFLASH_TRY(wrap(&a, "dV", dV, 4, &dv));
    cuflash_attention problem = {.struct_size = sizeof problem, .q = &q, .k = &k, .v = &v, .o = &o, .lse = &lse};
    problem.d_o = &d_o;
    problem.dq = &dq;
    problem.dk = &dk;
    problem.dv = &dv;
    problem.flags = CUFLASH_SCALE | (causal ? CUFLASH_CAUSAL : 0);
    problem.scale = scale;
    problem.stream = stream;
    return cuflash_attention_backward(&problem);
}

int cuflash_attention_forward_f32(const float *Q, const float *K, const float *V, float *O, float *L, int batch_size,
                                  int num_heads, int seq_len, int head_dim, float scale, bool causal, cudaStream_t stream) {
    return forward("cuflash_attention_forward_f32", CUFLASH_FLOAT32, Q, K, V, O, L, batch_size, num_heads, seq_len, head_dim,
                   scale, causal, stream);
}

int cuflash_attention_forward_f16(const void *Q, const void *K, const void *V, void *O, void *L, int batch_size, int num_heads,
                                  int seq_len, int head_dim, float scale, bool causal, cudaStream_t stream) {
    return forward("cuflash_attention_forward_f16", CUFLASH_FLOAT16, Q, K, V, O, L, batch_size, num_heads, seq_len, head_dim,
                   scale, causal, stream);
}

int cuflash_attention_backward_f32(const float *Q, const float *K, const float *V, const float *O, const float *L,
                                   const float *dO, float *dQ, float *dK, float *dV, int batch_size, int num_heads, int seq_len,
                                   int head_dim, float scale, bool causal, cudaStream_t stream) {
    return backward("cuflash_attention_backward_f32", CUFLASH_FLOAT32, Q, K, V, O, L, dO, dQ, dK, dV, batch_size, num_heads,
                    seq_len, head_dim, scale, causal, stream);
}

int cuflash_attention_backward_f16(const void *Q, const void *K, const void *V, const void *O, const void *L, const void *dO,
                                   void *dQ, void *dK, void *dV, int batch_size, int num_heads, int seq_len, int head_dim,
                                   float scale, bool causal, cudaStream_t stream) {
    return backward("cuflash_attention_backward_f16", CUFLASH_FLOAT16, Q, K, V, O, L, dO, dQ, dK, dV, batch_size, num_heads,
                    seq_len, head_dim, scale, causal, stream);
}
