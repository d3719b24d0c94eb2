/* Prints the float32 peak that this instruction set reaches with THREADS threads, in GFLOP/s: multiply-adds between
 * registers, enough independent chains to hide their latency. Where the instruction set has no FMA, a product and a sum
 * count as two operations just the same.
 *
 *   fma_peak_avx2 [THREADS] [SECONDS]
 */
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

#include "vec.h"

enum { CHAINS = VL == 16 ? 24 : 12, ROUNDS = 100000 };

static float run_chains(float seed) {
    vf sum[CHAINS], scale = v_set(0.999f), step = v_set(seed);
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++) sum[i] = v_set((float)i);
    for (int round = 0; round < ROUNDS; round++) {
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++) sum[i] = sum[i] * scale + step;
    }
    float total = 0;
    for (int i = 0; i < CHAINS; i++)
        for (int lane = 0; lane < VL; lane++) total += sum[i][lane];
    return total;
}

#ifdef __FMA__
/* Did the compiler make one instruction of a product and a sum, as the peak's loop needs it? Then nothing is rounded away. */
static int contracts(void) {
    volatile float x = 1 + 0x1p-12f, minus = -(1 + 0x1p-11f);
    float a = x, b = minus;
    return a * a + b != 0;
}
#endif

int main(int argc, char **argv) {
#ifdef __FMA__
    if (!contracts()) {
        fprintf(stderr, "%s: compiled without fused multiply-adds: no peak\n", argv[0]);
        return 1;
    }
#endif
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    double seconds = argc > 2 ? atof(argv[2]) : 0.5, best = 0;
    if (threads < 1 || !(seconds > 0)) {
        fprintf(stderr, "usage: %s [THREADS] [SECONDS]\n", argv[0]);
        return 2;
    }
    float keep = 0;
    for (double start = omp_get_wtime(); omp_get_wtime() - start < seconds;) {
        double rate = 0; /* of all threads, each by its own clock: one that was kept waiting does not slow the others */
#pragma omp parallel num_threads(threads) reduction(+ : keep, rate)
        {
#pragma omp barrier
            double began = omp_get_wtime();
            for (int i = 0; i < 10; i++) keep += run_chains((float)(i + 1)); /* never 0: sums that fade to denormals are slow */
            rate += 2.0 * CHAINS * VL * ROUNDS * 10 / (omp_get_wtime() - began) / 1e9;
        }
        if (rate > best) best = rate;
    }
    volatile float used = keep; /* the sums must be computed */
    (void)used;
    printf("%.1f\n", best);
    return 0;
}
