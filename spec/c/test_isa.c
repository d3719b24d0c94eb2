/* Which instruction set is chosen: the best one without CUFLASH_CPU_ISA; and for a name that cannot run, an error
 * instead of another one. ctest runs this with the variable unset, empty and wrong. */
#include "attention_case.h"
#include "isa.h"

static const char *best(void) {
    static const char *const names[] = {"amx", "avx512bf16", "avx512", "avx2"};
    for (int i = 0; i < COUNT_OF(names); i++)
        if (isa_of_processor(names[i])) return names[i];
    return "baseline";
}

int main(void) {
    const char *wanted = getenv("CUFLASH_CPU_ISA");
    const shape_case shape = {1, 1, 1, 3, 4, 8, 8, false, 0};
    fixture f;
    fixture_make(&f, &shape, CUFLASH_FLOAT32, DENSE, 1);
    if (!wanted || !*wanted) {
        CHECK_F(strcmp(cuflash_cpu_isa(), best()) == 0, "expected '%s', got '%s'", best(), cuflash_cpu_isa());
        CHECK_OK(cuflash_attention_forward(&f.a));
    } else {
        char words[128], text[256];
        snprintf(words, sizeof words, "CUFLASH_CPU_ISA|'%s'|baseline|%s", wanted, best());
        size_t bytes;
        CHECK(strcmp(cuflash_cpu_isa(), wanted) != 0);
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, words, cuflash_attention_forward(&f.a));
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, words, cuflash_attention_backward(&f.a));
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, words, cuflash_attention_workspace(&f.a, CUFLASH_FORWARD, &bytes));
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, words, cuflash_attention_plan(&f.a, CUFLASH_FORWARD, text, sizeof text));
        for (int t = 0; t < TENSORS; t++) CHECK(unchanged(&f, t));
        CHECK_OK(cuflash_reference_forward(&f.a)); /* the oracle needs no kernels */
    }
    fixture_free(&f);
    return check_result();
}
