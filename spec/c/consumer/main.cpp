#include <flash_attention.h>

#include <iostream>

int main() {
    const float x = 2;
    float o = 0, l = 0;
    auto err = cuflash::flash_attention_forward(&x, &x, &x, &o, &l, 1, 1, 1, 1, 1.0f, true);
    std::cout << cuflash::get_error_string(err) << ", o = " << o << "\n";
    return err == cuflash::FlashAttentionError::SUCCESS && o == 2 && l == 4 ? 0 : 1;
}
