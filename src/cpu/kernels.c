/* The CPU kernels: FlashAttention (Dao et al. 2022; backward as in FlashAttention-2, Dao 2023) on tiles of block_m query
 * rows and block_n keys.
 *
 * Query rows are the lanes of the vectors. Scores are kept transposed, S[key][row], and so is the output while it
 * grows, O[d][row]: then the softmax needs no sums across lanes, a row's maximum and sum are one lane each, and every
 * product is gemm() with K and V read where they lie:
 *
 *   S[key][row]    = K[key][d]   * Q[d][row]           forward and backward
 *   O[d][row]     += V[key][d]   * P[key][row]         A read by columns
 *   dP[key][row]   = V[key][d]   * dO[d][row]
 *   dV[key][d]    += P[key][row] * dO[row][d]
 *   dK[key][d]    += dS[key][row] * Q[row][d]
 *   dQ[d][row]    += K[key][d]   * dS[key][row]        A read by columns
 *
 * Scores are differences before they are scaled: p = 2^((s - m) c), c = |scale| log2 e, with the sign of scale in Q.
 * Near the maximum the difference is exact, so logits of any size lose nothing. m is the largest, or little below it. */
#include "backward.h"
#include "forward.h"

enum { ALIGNMENT = 64 };

/* ---- Sizes -------------------------------------------------------------------------------------- */

static int64_t scratch_floats(const cuflash_cpu_plan *plan, const cuflash_problem *p, cuflash_pass pass) {
    scratch w;
    int64_t used = lay_out(plan, p, pass, (float *)(uintptr_t)ALIGNMENT, &w); /* only the sizes count */
#ifdef __AVX512BF16__
    bf16_scratch x;
    if (plan->packed_bytes > 0) used += bf16_lay_out(plan, p, (float *)(uintptr_t)ALIGNMENT, &x);
#endif
    return used;
}

/* ---- The row of the table in cpu.c -------------------------------------------------------------- */

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

const cuflash_cpu_kernels PASTE(cuflash_cpu_, CUFLASH_ISA) = {
    .name = TEXT(CUFLASH_ISA),
    .vector = VL,
    .block_m = BLOCK_M,
    .block_n = BLOCK_N,
    .scratch_floats = scratch_floats,
    .forward = forward,
    .forward_finish = forward_finish,
    .backward_begin = backward_begin,
    .backward = backward,
    .backward_finish_keys = backward_finish_keys,
    .backward_finish_rows = backward_finish_rows,
#ifdef __AVX512BF16__
    .on_pairs = BF16_WORDS,
    .few_on_pairs = BF16_FEW_WORDS,
    .planes = {[CUFLASH_FLOAT16] = BF16_HALF_PLANES, [CUFLASH_BFLOAT16] = 1},
    .packed_bytes = bf16_packed_bytes,
    .pack = bf16_pack,
    .pack_n = BF16_BLOCK_N,
#endif
};
