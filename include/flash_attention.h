// The C++ API of cuflash: four overloads on raw pointers, over the C functions of cuflash.h (which say more about shapes,
// devices and accuracy). It needs C++11, no CUDA header for float, and CUDA's cuda_fp16.h only where half values
// are used.
#ifndef CUFLASH_FLASH_ATTENTION_H
#define CUFLASH_FLASH_ATTENTION_H

#include "cuflash.h"

struct __half; // CUDA's float16, complete where the caller includes cuda_fp16.h

namespace cuflash {

using ::cudaStream_t;
using half = ::__half;

#define CUFLASH_ERROR_ENUM(name, code, text) name = code,
/// What a call returned. The first eight are those of the original API; the rest follow cuflash_status.
enum class FlashAttentionError { CUFLASH_STATUS_MAP(CUFLASH_ERROR_ENUM) };
#undef CUFLASH_ERROR_ENUM

/// The meaning of an error in words. Never null. cuflash_last_error() has a sentence about the very call that failed.
inline const char *get_error_string(FlashAttentionError error) {
    return cuflash_status_string(static_cast<int>(error));
}

/// O = softmax(scale Q K^T) V and its log-sum-exp L, in float32.
/// Q, K, V, O: [batch_size, num_heads, seq_len, head_dim], row-major; L: [batch_size, num_heads, seq_len].
/// Host pointers run on the CPU, device pointers on their GPU, on `stream`. head_dim: 1 to 512.
inline FlashAttentionError flash_attention_forward(const float *Q, const float *K, const float *V, float *O, float *L,
                                                   int batch_size, int num_heads, int seq_len, int head_dim, float scale,
                                                   bool causal, cudaStream_t stream = nullptr) {
    return static_cast<FlashAttentionError>(cuflash_attention_forward_f32(Q, K, V, O, L, batch_size, num_heads, seq_len,
                                                                          head_dim, scale, causal, stream));
}

/// The same in float16, accumulated in float32.
inline FlashAttentionError flash_attention_forward(const half *Q, const half *K, const half *V, half *O, half *L,
                                                   int batch_size, int num_heads, int seq_len, int head_dim, float scale,
                                                   bool causal, cudaStream_t stream = nullptr) {
    return static_cast<FlashAttentionError>(cuflash_attention_forward_f16(Q, K, V, O, L, batch_size, num_heads, seq_len,
                                                                          head_dim, scale, causal, stream));
}

/// dQ, dK and dV from the forward's inputs and outputs and the upstream gradient dO, in float32.
inline FlashAttentionError flash_attention_backward(const float *Q, const float *K, const float *V, const float *O,
                                                    const float *L, const float *dO, float *dQ, float *dK, float *dV,
                                                    int batch_size, int num_heads, int seq_len, int head_dim, float scale,
                                                    bool causal, cudaStream_t stream = nullptr) {
    return static_cast<FlashAttentionError>(cuflash_attention_backward_f32(Q, K, V, O, L, dO, dQ, dK, dV, batch_size, num_heads,
                                                                           seq_len, head_dim, scale, causal, stream));
}

/// The same in float16. L holds only 11 bits, so it is recomputed: the gradients are as good as with a float32 L.
inline FlashAttentionError flash_attention_backward(const half *Q, const half *K, const half *V, const half *O, const half *L,
                                                    const half *dO, half *dQ, half *dK, half *dV, int batch_size,
                                                    int num_heads, int seq_len, int head_dim, float scale, bool causal,
                                                    cudaStream_t stream = nullptr) {
    return static_cast<FlashAttentionError>(cuflash_attention_backward_f16(Q, K, V, O, L, dO, dQ, dK, dV, batch_size, num_heads,
                                                                           seq_len, head_dim, scale, causal, stream));
}

} // namespace cuflash

#endif
