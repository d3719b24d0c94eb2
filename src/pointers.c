/* Attention on raw pointers, with the signatures of the earlier API: wraps the arrays in tensors on the device where
 * they live and calls the functions of attention.c. */
#include "device.h"
#include "problem.h"
#include "tensor.h"

typedef struct {
    const char *fn;
    cuflash_dtype dtype;
    cuflash_pass pass;
    int batch_size, num_heads, seq_len, head_dim;
    float scale;
    bool causal;
    cudaStream_t stream;
} call;

/* The arrays in the order of the arguments; a forward call has the first five. */
enum { Q, K, V, O, L, DO, DQ, DK, DV, ARRAYS };
static const char *const names[ARRAYS] = {"Q", "K", "V", "O", "L", "dO", "dQ", "dK", "dV"};

static cuflash_status check_sizes(const call *c) {
    const struct {
        const char *name;
        int value;
    } sizes[] = {
        {"batch_size", c->batch_size}, {"num_heads", c->num_heads}, {"seq_len", c->seq_len}, {"head_dim", c->head_dim}};
    for (int i = 0; i < 4; i++)
        if (sizes[i].value <= 0)
            return cuflash_fail(CUFLASH_INVALID_DIMENSION, "%s: argument '%s': expected a positive number, got %d", c->fn,
                                sizes[i].name, sizes[i].value);
    if (c->head_dim > CUFLASH_MAX_HEAD_DIM)
        return cuflash_fail(CUFLASH_UNSUPPORTED_HEAD_DIM, "%s: argument 'head_dim': expected 1 to %d, got %d", c->fn,
                            CUFLASH_MAX_HEAD_DIM, c->head_dim);
    return CUFLASH_SUCCESS;
}

static cuflash_status run(const call *c, const void *const data[ARRAYS]) {
    CUFLASH_TRY(check_sizes(c));
    int count = c->pass == CUFLASH_FORWARD ? L + 1 : ARRAYS;
    for (int i = 0; i < count; i++)
        if (!data[i])
            return cuflash_fail(CUFLASH_NULL_POINTER, "%s: argument '%s': expected a pointer, got NULL", c->fn, names[i]);
    int device = cuflash_pointer_device(data[Q]);
    for (int i = 1; i < count; i++)
        if (cuflash_pointer_device(data[i]) != device)
            return cuflash_fail(
                CUFLASH_INVALID_ARGUMENT,
                "%s: argument '%s': expected memory on the device of 'Q' (host and device pointers cannot be mixed)", c->fn,
                names[i]);
    const int64_t shape[] = {c->batch_size, c->num_heads, c->seq_len, c->head_dim};
    cuflash_tensor t[ARRAYS];
    for (int i = 0; i < count; i++)
        CUFLASH_TRY(cuflash_borrow_argument(c->fn, names[i], &t[i], (void *)(uintptr_t)data[i], c->dtype, device,
                                            i == L ? 3 : 4, shape, NULL));
    cuflash_attention attention = {
        .struct_size = sizeof attention, .q = &t[Q], .k = &t[K], .v = &t[V], .o = &t[O], .lse = &t[L]};
    attention.flags = CUFLASH_SCALE | (c->causal ? CUFLASH_CAUSAL : 0);
    attention.scale = c->scale;
    attention.stream = c->stream;
    if (c->pass == CUFLASH_FORWARD) return cuflash_attention_forward(&attention);
    attention.d_o = &t[DO];
    attention.dq = &t[DQ];
    attention.dk = &t[DK];
    attention.dv = &t[DV];
    return cuflash_attention_backward(&attention);
}

#define SIZES int batch_size, int num_heads, int seq_len, int head_dim, float scale, bool causal, cudaStream_t stream
#define CALL(dtype, pass) (&(call){__func__, dtype, pass, batch_size, num_heads, seq_len, head_dim, scale, causal, stream})

int cuflash_attention_forward_f32(const float *q, const float *k, const float *v, float *o, float *l, SIZES) {
    return run(CALL(CUFLASH_FLOAT32, CUFLASH_FORWARD), (const void *const[ARRAYS]){q, k, v, o, l});
}

int cuflash_attention_forward_f16(const void *q, const void *k, const void *v, void *o, void *l, SIZES) {
    return run(CALL(CUFLASH_FLOAT16, CUFLASH_FORWARD), (const void *const[ARRAYS]){q, k, v, o, l});
}

int cuflash_attention_backward_f32(const float *q, const float *k, const float *v, const float *o, const float *l,
                                   const float *d_o, float *dq, float *dk, float *dv, SIZES) {
    return run(CALL(CUFLASH_FLOAT32, CUFLASH_BACKWARD), (const void *const[ARRAYS]){q, k, v, o, l, d_o, dq, dk, dv});
}

int cuflash_attention_backward_f16(const void *q, const void *k, const void *v, const void *o, const void *l, const void *d_o,
                                   void *dq, void *dk, void *dv, SIZES) {
    return run(CALL(CUFLASH_FLOAT16, CUFLASH_BACKWARD), (const void *const[ARRAYS]){q, k, v, o, l, d_o, dq, dk, dv});
}
