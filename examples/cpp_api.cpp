// The C++ API: attention forward and backward on arrays in host memory. The same calls take device pointers.
//
//     c++ -std=c++17 examples/cpp_api.cpp $(pkg-config --cflags --libs cuflash) -o cpp_api && ./cpp_api
//
// The gradients are checked as one would by hand: a small step along them must change the loss by what they say.
#include <flash_attention.h>

#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <iostream>
#include <random>
#include <vector>

namespace {

const int batch_size = 2, num_heads = 4, seq_len = 256, head_dim = 64;
const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
const bool causal = true;
const std::size_t rows = std::size_t(batch_size) * num_heads * seq_len, size = rows * head_dim;

using Array = std::vector<float>; // [batch_size, num_heads, seq_len, head_dim], row-major

void check(cuflash::FlashAttentionError err) {
    if (err != cuflash::FlashAttentionError::SUCCESS) {
        std::cerr << "FlashAttention error: " << cuflash::get_error_string(err) << std::endl;
        std::cerr << cuflash_last_error() << std::endl; // the sentence about this very call
        std::exit(1);
    }
}

void forward(const Array &Q, const Array &K, const Array &V, Array &O, Array &L) {
    auto err = cuflash::flash_attention_forward(Q.data(), K.data(), V.data(), O.data(), L.data(), batch_size, num_heads,
                                                seq_len, head_dim, scale, causal);
    check(err);
}

double dot(const Array &a, const Array &b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); i++) sum += double(a[i]) * double(b[i]);
    return sum;
}

Array moved(const Array &x, const Array &direction, float step) {
    Array y = x;
    for (std::size_t i = 0; i < y.size(); i++) y[i] += step * direction[i];
    return y;
}

} // namespace

int main() {
    std::mt19937 generator(42);
    std::normal_distribution<float> normal;
    Array Q(size), K(size), V(size), dO(size), direction(size);
    for (Array *x : {&Q, &K, &V, &dO, &direction})
        for (float &value : *x) value = normal(generator);

    Array O(size), L(rows), dQ(size), dK(size), dV(size);
    forward(Q, K, V, O, L);
    check(cuflash::flash_attention_backward(Q.data(), K.data(), V.data(), O.data(), L.data(), dO.data(), dQ.data(), dK.data(),
                                            dV.data(), batch_size, num_heads, seq_len, head_dim, scale, causal));

    // The first query sees one key alone, so the first row of O is that of V.
    double first_row = 0;
    for (int i = 0; i < head_dim; i++) first_row = std::fmax(first_row, std::fabs(O[i] - V[i]));
    std::cout << "first row of O minus first row of V: " << first_row << "\n";
    bool good = first_row <= 1e-6;

    // loss = <O, dO>. Its slope along a direction, from two forwards and from the gradient.
    const struct {
        const char *name;
        const Array *gradient;
        int input;
    } checks[] = {{"dQ", &dQ, 0}, {"dK", &dK, 1}, {"dV", &dV, 2}};
    const float step = 1e-2f;
    for (const auto &c : checks) {
        double loss[2];
        for (int side = 0; side < 2; side++) {
            const Array *in[3] = {&Q, &K, &V};
            Array changed = moved(*in[c.input], direction, side ? step : -step), result(size), unused(rows);
            in[c.input] = &changed;
            forward(*in[0], *in[1], *in[2], result, unused);
            loss[side] = dot(result, dO);
        }
        double measured = (loss[1] - loss[0]) / (2 * step), said = dot(*c.gradient, direction);
        bool close = std::fabs(measured - said) <= 2e-3 * std::fabs(said) + 0.05;
        std::cout << "slope of the loss along " << c.name[1] << ": " << c.name << " says " << said << ", two forwards say "
                  << measured << (close ? "  ok" : "  WRONG") << "\n";
        good = good && close;
    }

    // What an error looks like.
    auto err = cuflash::flash_attention_forward(Q.data(), K.data(), V.data(), O.data(), L.data(), batch_size, num_heads, -1,
                                                head_dim, scale, causal);
    std::cout << "a wrong argument gives: " << cuflash::get_error_string(err) << "\n  " << cuflash_last_error() << "\n";
    return good ? 0 : 1;
}
