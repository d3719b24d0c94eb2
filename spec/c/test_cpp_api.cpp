// The C++ API, on host memory. Where CUDA's headers were found this is compiled a second time, with them and with their
// half type (CUFLASH_SPEC_CUDA_HEADERS); without, half stays incomplete and its overloads are called through uint16_t.
#ifdef CUFLASH_SPEC_CUDA_HEADERS
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "flash_attention.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <type_traits>
#include <vector>

#include "check.h"

using cuflash::FlashAttentionError;

static_assert(static_cast<int>(FlashAttentionError::SUCCESS) == 0, "");
static_assert(static_cast<int>(FlashAttentionError::INVALID_DIMENSION) == 1, "");
static_assert(static_cast<int>(FlashAttentionError::DIMENSION_MISMATCH) == 2, "");
static_assert(static_cast<int>(FlashAttentionError::NULL_POINTER) == 3, "");
static_assert(static_cast<int>(FlashAttentionError::CUDA_ERROR) == 4, "");
static_assert(static_cast<int>(FlashAttentionError::OUT_OF_MEMORY) == 5, "");
static_assert(static_cast<int>(FlashAttentionError::UNSUPPORTED_HEAD_DIM) == 6, "");
static_assert(static_cast<int>(FlashAttentionError::UNSUPPORTED_DTYPE) == 7, "");
static_assert(std::is_same<cuflash::cudaStream_t, ::cudaStream_t>::value, "");
static_assert(std::is_same<cuflash::half, ::__half>::value, "");

namespace {

const int batch_size = 2, num_heads = 3, seq_len = 37, head_dim = 32;
const std::size_t n = std::size_t(batch_size) * num_heads * seq_len * head_dim, rows = n / head_dim;
const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));

std::vector<double> normal(std::uint64_t seed) {
    std::vector<double> values(n);
    const std::int64_t shape = n;
    cuflash_tensor t;
    cuflash_generator generator = {seed, 0};
    REQUIRE_OK(cuflash_tensor_borrow(&t, values.data(), CUFLASH_FLOAT64, CUFLASH_CPU, 1, &shape, nullptr));
    REQUIRE_OK(cuflash_random_normal(&t, &generator, 0, 1));
    return values;
}

// O and the gradients as the formulas say, in double, from inputs that the tested type holds exactly.
struct Answer {
    std::vector<double> o, l, dq, dk, dv;
};

Answer formulas(const std::vector<double> &q, const std::vector<double> &k, const std::vector<double> &v,
                const std::vector<double> &d_o, bool causal) {
    Answer a{std::vector<double>(n), std::vector<double>(rows), std::vector<double>(n), std::vector<double>(n),
             std::vector<double>(n)};
    for (std::size_t row = 0; row < rows; row++) {
        std::size_t head = row / seq_len * seq_len, seen = causal ? row - head + 1 : seq_len;
        std::vector<double> p(seen);
        double sum = 0, delta = 0;
        for (std::size_t j = 0; j < seen; j++) {
            for (int x = 0; x < head_dim; x++) p[j] += scale * q[row * head_dim + x] * k[(head + j) * head_dim + x];
            sum += std::exp(p[j]);
        }
        a.l[row] = std::log(sum);
        for (std::size_t j = 0; j < seen; j++) {
            p[j] = std::exp(p[j]) / sum;
            for (int x = 0; x < head_dim; x++) {
                a.o[row * head_dim + x] += p[j] * v[(head + j) * head_dim + x];
                a.dv[(head + j) * head_dim + x] += p[j] * d_o[row * head_dim + x];
            }
        }
        for (int x = 0; x < head_dim; x++) delta += a.o[row * head_dim + x] * d_o[row * head_dim + x];
        for (std::size_t j = 0; j < seen; j++) {
            double ds = -delta;
            for (int x = 0; x < head_dim; x++) ds += d_o[row * head_dim + x] * v[(head + j) * head_dim + x];
            ds *= p[j] * scale;
            for (int x = 0; x < head_dim; x++) {
                a.dq[row * head_dim + x] += ds * k[(head + j) * head_dim + x];
                a.dk[(head + j) * head_dim + x] += ds * q[row * head_dim + x];
            }
        }
    }
    return a;
}

// ||actual - expected|| / ||expected||
double distance(const std::vector<double> &actual, const std::vector<double> &expected) {
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < expected.size(); i++) {
        difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
        size += expected[i] * expected[i];
    }
    return std::sqrt(difference / size);
}

// Between double and what the calls take: float, or half through its 16 bits.
template <cuflash_dtype dtype, typename Element>
void convert(void *to, cuflash_dtype to_dtype, const void *from, cuflash_dtype from_dtype, std::size_t count) {
    static_assert(dtype == CUFLASH_FLOAT32 || sizeof(Element) == 2, "");
    const std::int64_t shape = static_cast<std::int64_t>(count);
    cuflash_tensor a, b;
    REQUIRE_OK(cuflash_tensor_borrow(&a, to, to_dtype, CUFLASH_CPU, 1, &shape, nullptr));
    REQUIRE_OK(cuflash_tensor_borrow(&b, const_cast<void *>(from), from_dtype, CUFLASH_CPU, 1, &shape, nullptr));
    REQUIRE_OK(cuflash_tensor_copy(&a, &b));
}

// Element is what the memory holds, Argument what the overload is called with.
template <cuflash_dtype dtype, typename Element, typename Argument>
void test_overloads(double forward_bound, double backward_bound) {
    std::vector<double> exact[4];
    std::vector<Element> inputs[4];
    for (int i = 0; i < 4; i++) {
        inputs[i].resize(n);
        exact[i] = normal(std::uint64_t(i + 1));
        convert<dtype, Element>(inputs[i].data(), dtype, exact[i].data(), CUFLASH_FLOAT64, n);
        convert<dtype, Element>(exact[i].data(), CUFLASH_FLOAT64, inputs[i].data(), dtype, n);
    }
    for (bool causal : {false, true}) {
        check_in("%s%s", cuflash_dtype_name(dtype), causal ? " causal" : "");
        std::vector<Element> o(n), l(rows), dq(n), dk(n), dv(n);
        auto in = [&](int i) { return reinterpret_cast<const Argument *>(inputs[i].data()); };
        auto out = [](std::vector<Element> &x) { return reinterpret_cast<Argument *>(x.data()); };
        const auto *const_o = reinterpret_cast<const Argument *>(o.data()),
                   *const_l = reinterpret_cast<const Argument *>(l.data());
        // with the stream left out, and with one
        CHECK(cuflash::flash_attention_forward(in(0), in(1), in(2), out(o), out(l), batch_size, num_heads, seq_len, head_dim,
                                               scale, causal) == FlashAttentionError::SUCCESS);
        CHECK(cuflash::flash_attention_forward(in(0), in(1), in(2), out(o), out(l), batch_size, num_heads, seq_len, head_dim,
                                               scale, causal, nullptr) == FlashAttentionError::SUCCESS);
        CHECK(cuflash::flash_attention_backward(in(0), in(1), in(2), const_o, const_l, in(3), out(dq), out(dk), out(dv),
                                                batch_size, num_heads, seq_len, head_dim, scale,
                                                causal) == FlashAttentionError::SUCCESS);
        CHECK(cuflash::flash_attention_backward(in(0), in(1), in(2), const_o, const_l, in(3), out(dq), out(dk), out(dv),
                                                batch_size, num_heads, seq_len, head_dim, scale, causal,
                                                nullptr) == FlashAttentionError::SUCCESS);
        Answer right = formulas(exact[0], exact[1], exact[2], exact[3], causal);
        auto back = [](const std::vector<Element> &x) {
            std::vector<double> y(x.size());
            convert<dtype, Element>(y.data(), CUFLASH_FLOAT64, x.data(), dtype, x.size());
            return y;
        };
        CHECK_NEAR(distance(back(o), right.o), 0, forward_bound);
        CHECK_NEAR(distance(back(l), right.l), 0, forward_bound);
        CHECK_NEAR(distance(back(dq), right.dq), 0, backward_bound);
        CHECK_NEAR(distance(back(dk), right.dk), 0, backward_bound);
        CHECK_NEAR(distance(back(dv), right.dv), 0, backward_bound);

        CHECK(cuflash::flash_attention_forward(in(0), in(1), in(2), out(o), static_cast<Argument *>(nullptr), batch_size,
                                               num_heads, seq_len, head_dim, scale,
                                               causal) == FlashAttentionError::NULL_POINTER);
        CHECK(cuflash::flash_attention_forward(in(0), in(1), in(2), out(o), out(l), batch_size, num_heads, 0, head_dim, scale,
                                               causal) == FlashAttentionError::INVALID_DIMENSION);
        CHECK(cuflash::flash_attention_backward(in(0), in(1), in(2), const_o, const_l, in(3), out(dq), out(dk), out(dv),
                                                batch_size, num_heads, seq_len, 513, scale,
                                                causal) == FlashAttentionError::UNSUPPORTED_HEAD_DIM);
        CHECK(check_contains(cuflash_last_error(), "head_dim|513"));
    }
    check_in("%s", "");
}

void test_error_strings() {
    for (int i = 0; i < 8; i++) {
        const char *text = cuflash::get_error_string(static_cast<FlashAttentionError>(i));
        CHECK(text != nullptr && std::strcmp(text, cuflash_status_string(i)) == 0);
    }
    CHECK(std::strlen(cuflash::get_error_string(static_cast<FlashAttentionError>(1234))) > 0);
}

// The usage example of the API reference, as it is written there.
void test_example() {
    std::vector<float> memory(4 * n + rows);
    for (std::size_t i = 0; i < 3 * n; i++) memory[i] = static_cast<float>(i % 17) / 17;
    float *d_Q = memory.data(), *d_K = d_Q + n, *d_V = d_K + n, *d_O = d_V + n, *d_L = d_O + n;
    bool failed = false;

    // clang-format off
    auto err = cuflash::flash_attention_forward(
        d_Q, d_K, d_V, d_O, d_L,
        batch_size, num_heads, seq_len, head_dim,
        1.0f / std::sqrt(static_cast<float>(head_dim)),
        /*causal=*/true
    );

    if (err != cuflash::FlashAttentionError::SUCCESS) {
        std::cerr << "FlashAttention error: "
                  << cuflash::get_error_string(err) << std::endl;
        failed = true;
    }
    // clang-format on
    CHECK(!failed);
    CHECK(d_O[0] == d_V[0]); // a causal first row sees only itself
    CHECK(d_O[n - 1] > 0 && d_O[n - 1] < 1);
}

#ifdef CUFLASH_SPEC_CUDA_HEADERS
// Both namespaces at once: CUDA's half and cudaStream_t are the same types.
void test_with_using() {
    using namespace cuflash;
    std::vector<half> x(4 * n), l(rows);
    for (std::size_t i = 0; i < 3 * n; i++) x[i] = __float2half(static_cast<float>(i % 13) / 13);
    cudaStream_t stream = nullptr;
    CHECK(flash_attention_forward(&x[0], &x[n], &x[2 * n], &x[3 * n], l.data(), batch_size, num_heads, seq_len, head_dim, scale,
                                  true, stream) == FlashAttentionError::SUCCESS);
    CHECK(__half2float(x[3 * n]) == __half2float(x[2 * n]));
}
#endif

} // namespace

int main() {
    test_error_strings();
    test_example();
    test_overloads<CUFLASH_FLOAT32, float, float>(2e-6, 5e-6);
#ifdef CUFLASH_SPEC_CUDA_HEADERS
    test_overloads<CUFLASH_FLOAT16, half, half>(1e-3, 2e-3);
    test_with_using();
#else
    test_overloads<CUFLASH_FLOAT16, std::uint16_t, cuflash::half>(1e-3, 2e-3);
#endif
    return check_result();
}
