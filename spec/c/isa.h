/* Running a test with one instruction set: CUFLASH_CPU_ISA names it. Skipped only where the processor, asked directly,
 * cannot run it; where it can and the library still refuses, the test fails. */
#ifndef CUFLASH_SPEC_ISA_H
#define CUFLASH_SPEC_ISA_H

#include "check.h"

#ifdef CUFLASH_BF16_VARIANTS /* the compiler has its instructions */
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

static inline bool isa_of_processor(const char *name) {
    if (strcmp(name, "baseline") == 0) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (strcmp(name, "avx2") == 0) return avx2;
    if (strcmp(name, "avx512") == 0)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef CUFLASH_BF16_VARIANTS
    enum { ARCH_GET_XCOMP_SUPP = 0x1021, TILE_DATA = 18, TILES = 1 << 24, TILES_BF16 = 1 << 22, AVX512_BF16 = 1 << 5 };
    unsigned a, b, c, d;
    if (strcmp(name, "avx512bf16") == 0)
        return isa_of_processor("avx512") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & AVX512_BF16);
#ifdef CUFLASH_AMX_TILES
    if (strcmp(name, "amx") == 0) return isa_of_processor("avx512bf16"); /* amx_tiles.h */
#endif
    if (strcmp(name, "amx") == 0) {
        unsigned long of_kernel = 0;
        return isa_of_processor("avx512bf16") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES) && (d & TILES_BF16) &&
               syscall(SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &of_kernel) == 0 && (of_kernel >> TILE_DATA & 1);
    }
#endif
#endif
    return false;
}

/* Ends the program with CHECK_SKIPPED where the processor lacks the instruction set that is asked for. */
static inline void isa_require(void) {
    const char *wanted = getenv("CUFLASH_CPU_ISA");
    if (!wanted || !*wanted) return;
    if (!isa_of_processor(wanted)) {
        printf("skipped: this processor cannot run the '%s' kernels\n", wanted);
        exit(CHECK_SKIPPED);
    }
    CHECK_F(strcmp(cuflash_cpu_isa(), wanted) == 0, "CUFLASH_CPU_ISA=%s, but the library runs '%s'", wanted, cuflash_cpu_isa());
}

#endif
